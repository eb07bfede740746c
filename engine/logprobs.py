"""Logprobs: what the model itself thought of a token, before any sampling parameter.

Knows logits and token ids; knows no sequence and no text. Vocabulary-wide work on prompts is done in slices of rows,
so its memory is bounded however long the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.messages import TokenLogprob

# R rows, V vocabulary, D hidden, k likeliest tokens

SLICE_BYTES = 64 * 2**20  # of float32 logits held at once for prompt logprobs
LEAST = -9999.0  # in place of -inf, as in OpenAI's API: JSON has no infinity


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob | None]:
    """Logprob and rank of one token per row and the row's `top[i]` likeliest; None for a row without finite logits.

    logits float32 [R, V]; R tokens and R counts. Rank is one more than the number of strictly likelier tokens; equally
    likely tokens in `top` are ordered by id.
    """
    if not len(tokens):
        return []
    total = logits.logsumexp(-1)  # not finite iff the row holds NaN, +inf or nothing but -inf
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logits > chosen).sum(-1) + 1
    values = (chosen[:, 0] - total).clamp(min=LEAST).tolist()
    likeliest = _likeliest(logits, total, np.asarray(top))
    return [
        TokenLogprob(token, value, rank, best) if finite else None
        for token, value, rank, best, finite in zip(
            tokens, values, ranks.tolist(), likeliest, total.isfinite().tolist(), strict=True
        )
    ]


def _likeliest(logits: Tensor, total: Tensor, top: NDArray[np.int64]) -> list[list[tuple[int, float]]]:
    """Each row's `top[i]` likeliest tokens, likeliest first. Rows with the same count are one topk: what a row gets
    never depends on what its neighbours ask for."""
    found: list[list[tuple[int, float]]] = [[] for _ in top]
    for k in np.unique(top[top > 0]):
        rows = np.flatnonzero(top == k)
        on_device = torch.from_numpy(rows).to(logits.device)
        values, ids = logits.index_select(0, on_device).topk(min(int(k), logits.shape[1]), -1)
        logprobs = (values - total.index_select(0, on_device)[:, None]).clamp(min=LEAST).cpu().numpy()
        names = ids.cpu().numpy()
        order = np.lexsort((names, -logprobs), axis=-1)
        logprobs, names = np.take_along_axis(logprobs, order, -1), np.take_along_axis(names, order, -1)
        for row, row_ids, row_logprobs in zip(rows, names.tolist(), logprobs.tolist(), strict=True):
            found[row] = list(zip(row_ids, row_logprobs, strict=True))
    return found


def prompt_logprobs(
    hidden: Tensor, targets: list[int], top: int, head: Callable[[Tensor], Tensor], vocab_size: int
) -> list[TokenLogprob] | None:
    """Entry i is what the model thought of targets[i] at the row hidden[i]; None if some row's logits are not finite.

    hidden [R, D], R targets; head: hidden [L, D] -> logits float32 [L, V].
    """
    step = max(1, SLICE_BYTES // (4 * vocab_size))
    found: list[TokenLogprob] = []
    for start in range(0, len(targets), step):
        part = targets[start : start + step]
        for entry in token_logprobs(head(hidden[start : start + step]), part, [top] * len(part)):
            if entry is None:
                return None
            found.append(entry)
    return found
