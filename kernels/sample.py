"""Drawing the next token of every row at once. Knows logits and numbers in [0, 1), not where either comes from."""

from __future__ import annotations

import torch
from torch import Tensor

# R rows, V vocabulary


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """One token id per row, int64 [R].

    logits float32 [R, V]; temperature, top_p, min_p float32 [R]; top_k int32 [R], 0 is off; uniform float64 [R] in
    [0, 1). Temperature 0 takes the largest logit, the lowest id among equals. Otherwise, in vLLM's and Hugging
    Face's order: divide by the temperature; top-k keeps tokens with fewer than k strictly likelier ones (so ties
    stay together); top-p keeps tokens whose strictly likelier ones have, renormalised over what top-k kept, a mass
    below top_p; min-p keeps tokens at least min_p times as likely as the likeliest, which always stays. The draw
    inverts the cumulative distribution in order of token id: the smallest id whose cumulative kept mass exceeds
    uniform * (kept mass). A logit of -inf is never drawn. A row with NaN gives some valid id: check it first.
    """
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1).double()[:, None]
    threshold = _keep_threshold(scaled, top_k, top_p, min_p)
    weight = torch.exp(scaled - scaled.amax(-1, keepdim=True)) * (scaled >= threshold[:, None])
    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= cumulative[:, -1:] * uniform.double()[:, None]).sum(-1)
    last_kept = logits.shape[-1] - 1 - (weight > 0).flip(-1).int().argmax(-1)  # uniform * total may round up to total
    return torch.where(temperature > 0, torch.minimum(drawn, last_kept), logits.argmax(-1))


def _keep_threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Float64 [R]: the smallest scaled logit that top-k, then top-p, then min-p keep."""
    ordered = scaled.sort(-1, descending=True).values
    vocab = scaled.shape[-1]
    kth = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()[:, None] - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, kth), -torch.inf)
    mass = torch.softmax(ordered, -1)
    likelier = mass.cumsum(-1) - mass  # of a token's strictly likelier ones, at the first of equals
    in_nucleus = (likelier < top_p.double()[:, None]) & (ordered > -torch.inf)
    in_nucleus[:, 0] = True  # the likeliest stays, whatever the numbers
    last = in_nucleus.sum(-1, keepdim=True) - 1
    floor = ordered[:, 0] + torch.log(min_p.double())  # p_i >= min_p * p_max, as a scaled logit; -inf when off
    return torch.maximum(ordered.gather(-1, last).squeeze(-1), torch.minimum(floor, ordered[:, 0]))
