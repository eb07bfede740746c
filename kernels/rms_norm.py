"""RMSNorm, alone and after a residual addition. Zhang & Sennrich 2019, arXiv 1910.07467."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps), in float32 (float64 stays), rounded to x's dtype, then * w.

    x: [..., D] of any layout; w: [D]. The product with w is taken in x's dtype, as Hugging Face's models do.
    """
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * w


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(r), r) with r = x + residual in their dtype. Other forms may write r over `residual`."""
    total = x + residual
    return rms_norm(total, w, eps), total
