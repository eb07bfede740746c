# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of kernels have Triton's types, which mypy does not know)
"""RMSNorm, alone and after a residual addition. Zhang & Sennrich 2019, arXiv 1910.07467."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jit import OPTIONS, jit, next_power_of_2, tl


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps), in float32 (float64 stays), rounded to x's dtype, then * w.

    x: [..., D] of any layout; w: [D]. The product with w is taken in x's dtype, as Hugging Face's models do.
    """
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * w).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(r), r) with r = x + residual in their dtype. Other forms may write r over `residual`."""
    total = x + residual
    return rms_norm(total, w, eps), total


# The Triton form: a program takes a few whole rows, reads each once and writes it once.


@jit(("rows",))
def _rms_norm(
    y_ptr, x_ptr, residual_ptr, w_ptr, rows, x_outer, x_inner, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Row r of x is at r // INNER * x_outer + r % INNER * x_inner; y and residual are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    is_item = (row < rows)[:, None] & (column < D)[None, :]
    at = (row // INNER * x_outer + row % INNER * x_inner)[:, None] + column[None, :]
    flat = (row * D)[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=is_item, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + flat, mask=is_item, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + flat, x, mask=is_item)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 1) / D + eps)
    w = tl.load(w_ptr + column, mask=column < D, other=0.0)
    normed = (x32 * scale[:, None]).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + flat, (normed * w[None, :].to(tl.float32)).to(x.dtype), mask=is_item)


def constants(width: int, inner: int, *, add: bool) -> dict[str, Any]:
    """`_rms_norm`'s compile-time constants and launch options for rows of `width`, `inner` of them per outer stride."""
    block = next_power_of_2(width)
    rows = max(1, 1024 // block)  # short rows (a head) share a program
    warps = min(16, max(4, block // 1024))
    return {
        "D": width,
        "BLOCK_D": block,
        "INNER": inner,
        "ROWS": rows,
        "ADD": add,
        "num_warps": warps,
    }


def rms_norm_triton(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """rms_norm on a GPU. x: [T, D] or [T, H, D], strided as you like but for a contiguous last dimension."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(y, x, y, w, eps, add=False)
    return y


def add_rms_norm_triton(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """add_rms_norm on a GPU; writes x + residual over `residual`, which must be contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    assert residual.is_contiguous()
    assert residual.dtype == x.dtype
    _launch(y, x, residual, w, eps, add=True)
    return y, residual


def _launch(y: Tensor, x: Tensor, residual: Tensor, w: Tensor, eps: float, *, add: bool) -> None:
    outer_TID = x if x.dim() == 3 else x.unsqueeze(1)
    _tokens, inner, width = outer_TID.shape
    assert x.dim() in (2, 3)
    assert x.stride(-1) == 1
    chosen = constants(width, inner, add=add)
    rows = x.numel() // width
    grid = (-(-rows // chosen["ROWS"]),)
    _rms_norm[grid](y, x, residual, w, rows, outer_TID.stride(0), outer_TID.stride(1), eps, **chosen, **OPTIONS)
