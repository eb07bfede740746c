"""A product for each head with a matrix of its own. Knows the forms of kernels/experts.py's matrices, no model."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts import PackedExperts
from kernels.linear import PackedLinear, linear


def per_head(x_THK: Tensor, matrices: PackedExperts) -> Tensor:
    """y[t, h] = matrices[h] x[t, h]: [T, H, N] for H matrices [N, K]. Heads may be strided views.

    The torch form computes in the weights' dtype. The numba form gives a row the same bits whatever rows are beside it.
    """
    if matrices.form == "torch":
        y_HTN = torch.bmm(x_THK.transpose(0, 1).to(matrices.data.dtype), matrices.data.transpose(1, 2))
        return y_HTN.transpose(0, 1).to(x_THK.dtype)
    n, k = matrices.out_features, matrices.in_features
    heads = [PackedLinear(matrices.form, data, n, k) for data in matrices.data]
    return torch.stack([linear(x_THK[:, h], matrix) for h, matrix in enumerate(heads)], dim=1)
