"""Rotary position embedding and the write of K and V into their pages. Su et al. 2021, arXiv 2104.09864.

Knows angles only as a table of cosines and sines; how a model scales them is the engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor

# T tokens, H query heads, K kv heads, E head dim, N blocks, P block size


def rope_kv(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """Rotates q in place; writes rotated k, and v, to their slots in the caches [N, K, P, E].

    cos_sin float32 [max_pos, rot]: cosines, then sines, of rot / 2 angles; the first rot <= E features are rotated,
    feature i with feature i + rot / 2 (the half-split of GPT-NeoX). positions int64 [T]; slot_mapping int64 [T] is
    block * P + offset, and -1 writes nothing. q, k and v may be strided views whose last dimension is contiguous.
    Angles are applied in float32 (float64 stays) and rounded once. k is left as it was.
    """
    angles = cos_sin[positions]
    q_THE.copy_(_rotate(q_THE, angles))
    kept = slot_mapping >= 0
    block, offset = slot_mapping[kept] // k_cache.shape[2], slot_mapping[kept] % k_cache.shape[2]
    k_cache[block, :, offset] = _rotate(k_TKE, angles)[kept].to(k_cache.dtype)
    v_cache[block, :, offset] = v_TKE[kept].to(v_cache.dtype)


def _rotate(x_THE: Tensor, cos_sin_TR: Tensor) -> Tensor:
    """x with its first R features rotated by the row's angles; a new tensor of x's dtype."""
    rot = cos_sin_TR.shape[-1]
    cos, sin = cos_sin_TR[:, None, : rot // 2], cos_sin_TR[:, None, rot // 2 :]
    x32 = x_THE.to(torch.promote_types(x_THE.dtype, torch.float32))
    first, second = x32[..., : rot // 2], x32[..., rot // 2 : rot]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, x32[..., rot:]], dim=-1)
    return rotated.to(x_THE.dtype)
