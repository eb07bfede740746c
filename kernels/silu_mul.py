"""The gate of a SwiGLU feed-forward layer. Shazeer 2020, arXiv 2002.05202."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 (float64 stays), rounded once. gate_up: [T, 2I], gate first; returns [T, I]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
