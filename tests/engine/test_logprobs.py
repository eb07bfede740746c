"""Logprobs against log_softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import logprobs
from engine.logprobs import LEAST, prompt_logprobs, token_logprobs
from engine.messages import TokenLogprob

V = 97


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def check(entry: TokenLogprob | None, row: torch.Tensor, token: int, top: int) -> None:
    expected = row.double().log_softmax(-1).tolist()
    assert entry is not None
    assert entry.token == token
    assert entry.logprob == pytest.approx(expected[token], abs=1e-5)
    assert entry.rank == 1 + sum(other > row[token].item() for other in row.tolist())
    by_likelihood = sorted(range(V), key=lambda i: (-row[i].item(), i))[:top]
    assert [i for i, _ in entry.top] == by_likelihood
    assert [value for _, value in entry.top] == pytest.approx([expected[i] for i in by_likelihood], abs=1e-5)


def test_each_row_gets_its_tokens_logprob_rank_and_as_many_likeliest_as_it_asks_for(generator: torch.Generator) -> None:
    logits = torch.randn(40, V, generator=generator) * 4
    tokens = torch.randint(V, (40,), generator=generator).tolist()
    top = torch.randint(0, 21, (40,), generator=generator).tolist()
    entries = token_logprobs(logits, tokens, top)
    for entry, row, token, count in zip(entries, logits, tokens, top, strict=True):
        check(entry, row, token, count)


def test_more_likeliest_than_the_vocabulary_holds_are_all_of_it(generator: torch.Generator) -> None:
    (entry,) = token_logprobs(torch.randn(1, V, generator=generator), [3], [V + 50])
    assert entry is not None
    assert sorted(i for i, _ in entry.top) == list(range(V))


def test_equally_likely_tokens_share_a_rank_and_are_listed_by_id() -> None:
    (entry,) = token_logprobs(torch.zeros(1, V), [50], [V])
    assert entry is not None
    assert entry.rank == 1
    assert [i for i, _ in entry.top] == list(range(V))


def test_a_token_that_the_model_excludes_has_a_finite_logprob() -> None:
    logits = torch.zeros(1, V)
    logits[0, 5:] = -torch.inf
    (entry,) = token_logprobs(logits, [9], [7])
    assert entry is not None
    assert entry.logprob == LEAST
    assert all(value >= LEAST for _, value in entry.top)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_logprob_and_its_neighbours_have_theirs(
    poison: float, generator: torch.Generator
) -> None:
    logits = torch.randn(5, V, generator=generator)
    logits[2, 17] = poison
    logits[3] = -torch.inf
    entries = token_logprobs(logits, [1] * 5, [4] * 5)
    assert entries[2] is entries[3] is None
    for i in (0, 1, 4):
        check(entries[i], logits[i], 1, 4)


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_prompt_logprobs_hold_no_more_logits_than_a_slice_and_do_not_depend_on_it(
    rows_at_once: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "SLICE_BYTES", 4 * V * rows_at_once)
    hidden, weight = torch.randn(10, 6, generator=generator), torch.randn(V, 6, generator=generator)
    targets = torch.randint(V, (10,), generator=generator).tolist()
    held = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        held.append(len(rows))
        return rows @ weight.T

    entries = prompt_logprobs(hidden, targets, 5, head, V)
    assert entries is not None
    assert max(held) <= rows_at_once
    assert len(entries) == len(targets)
    for entry, row, token in zip(entries, hidden @ weight.T, targets, strict=True):
        assert entry.logprob == pytest.approx(row.double().log_softmax(-1)[token].item(), abs=1e-5)
        assert len(entry.top) == 5
    hidden[7] = torch.nan
    assert prompt_logprobs(hidden, targets, 5, head, V) is None
