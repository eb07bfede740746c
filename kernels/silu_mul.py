# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of kernels have Triton's types, which mypy does not know)
"""The gate of a SwiGLU feed-forward layer. Shazeer 2020, arXiv 2002.05202."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import OPTIONS, jit, tl


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 (float64 stays), rounded once. gate_up: [T, 2I], gate first; returns [T, I]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


# The Triton form: a program takes a stretch of one row.

BLOCK = 2048  # 128-bit loads for the 256 threads that four warps are on an AMD GPU


@jit()
def _silu_mul(out_ptr, gate_up_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, stretches): out [T, WIDTH] is contiguous, rows of gate_up are `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_ptr = gate_up_ptr + token * stride + column
    gate = tl.load(gate_ptr, mask=column < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=column < WIDTH, other=0.0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * WIDTH + column, product.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """silu_mul on a GPU; rows of gate_up may be strided."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, -(-width // BLOCK))
    _silu_mul[grid](out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    return out
