"""Sampling: the definition against a plain loop over sorted tokens, the Triton form against the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.sample import sample, sample_triton


@dataclass
class Rows:
    """Arguments of sample."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    def args(self, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return tuple(x.to(device) if device else x for x in vars(self).values())


def rows(generator: torch.Generator, num: int, vocab: int) -> Rows:
    """Every option switched on in some rows and off in others; ties, and logits of -inf, in some."""

    def some(scale: float, every: int, off: float) -> Tensor:
        values = torch.rand(num, generator=generator) * scale
        values[::every] = off
        return values

    logits = torch.randn(num, vocab, generator=generator) * 3
    logits[1::3] = (logits[1::3] * 2).round() / 2
    logits[2::5, torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    return Rows(logits, some(2.0, 7, 0.0), some(60, 3, 0.0).int(), some(1.0, 4, 1.0), some(0.3, 2, 0.0), uniform)


def drawn_by_loop(given: Rows, row: int) -> int:
    """The documented rules, in the order of the documentation, one row at a time in Python's float."""
    logits = [float(x) for x in given.logits[row]]
    temperature, top_k = float(given.temperature[row]), int(given.top_k[row])
    top_p, min_p, uniform = float(given.top_p[row]), float(given.min_p[row]), float(given.uniform[row])
    if temperature == 0:
        return logits.index(max(logits))
    scaled = {i: x / temperature for i, x in enumerate(logits) if x > -math.inf}
    if top_k:
        scaled = {i: x for i, x in scaled.items() if sum(other > x for other in scaled.values()) < top_k}
    peak = max(scaled.values())
    weight = {i: math.exp(x - peak) for i, x in scaled.items()}
    total = sum(weight.values())
    kept = {}
    for i, x in scaled.items():
        likelier = sum(weight[j] for j, other in scaled.items() if other > x)
        if x == peak or (likelier / total < top_p and weight[i] >= min_p):
            kept[i] = weight[i]
    target, cumulative = uniform * sum(kept.values()), 0.0
    for i in sorted(kept):
        cumulative += kept[i]
        if cumulative > target:
            return i
    return max(kept)


def test_definition_is_the_documented_loop(generator: torch.Generator) -> None:
    given = rows(generator, 200, 53)
    assert sample(*given.args()).tolist() == [drawn_by_loop(given, row) for row in range(200)]


def test_a_grid_of_uniforms_draws_each_token_as_often_as_its_probability(generator: torch.Generator) -> None:
    logits = torch.randn(1, 12, generator=generator) * 2
    num = 20_000
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    off = torch.zeros(num)
    drawn = sample(logits.expand(num, -1), off + 0.7, off.int(), off + 1, off, uniform)
    probability = torch.softmax(logits[0].double() / 0.7, -1)
    assert ((drawn.bincount(minlength=12) - num * probability).abs() < 1.01).all()
    assert (drawn.diff() >= 0).all(), "larger numbers draw larger ids"


@pytest.mark.parametrize("vocab", [1, 37, 2048, 5003])
def test_triton_equals_the_definition(vocab: int, generator: torch.Generator, device: torch.device) -> None:
    """Equal but where a draw falls within float32's rounding of a boundary between two tokens."""
    given = rows(generator, 24, vocab)
    got = sample_triton(*given.args(device)).cpu()
    allowed = []
    for nudge in (-2e-6, 0.0, 2e-6):
        given_nudged = Rows(**{**vars(given), "uniform": (given.uniform + nudge).clamp(0, 1 - 1e-12)})
        allowed.append(sample(*given_nudged.args()))
    assert torch.stack([got == ids for ids in allowed]).any(0).all(), (got, allowed[1])


def one(logits: list[float], device: torch.device, **options: float) -> list[int]:
    """What both forms draw from one row; they must agree."""
    ids = []
    for form in (sample, sample_triton):
        args = [torch.tensor([logits], device=device)]
        args += [torch.tensor([options.get(name, off)], device=device) for name, off in (("temperature", 1.0),)]
        args += [torch.tensor([int(options.get("top_k", 0))], dtype=torch.int32, device=device)]
        args += [
            torch.tensor([options.get(name, off)], device=device) for name, off in (("top_p", 1.0), ("min_p", 0.0))
        ]
        args += [torch.tensor([options.get("uniform", 0.0)], dtype=torch.float64, device=device)]
        ids.append(int(form(*args)))
    return ids


def test_greedy_takes_the_lowest_of_equals(device: torch.device) -> None:
    assert one([1.0, 5.0, 5.0, 0.0], device, temperature=0.0) == [1, 1]


def test_greedy_takes_the_lowest_of_equals_across_blocks(device: torch.device) -> None:
    logits = [0.0] * 5000
    logits[2047] = logits[2048] = logits[4999] = 1.0
    assert one(logits, device, temperature=0.0) == [2047, 2047]


def test_top_k_keeps_ties_together(device: torch.device) -> None:
    logits = [1.0, 2.0, 2.0, 3.0]
    drawn = {uniform: one(logits, device, top_k=2, uniform=uniform) for uniform in (0.0, 0.3, 0.999)}
    assert drawn == {0.0: [1, 1], 0.3: [2, 2], 0.999: [3, 3]}


def test_zero_and_minus_zero_are_ties(device: torch.device) -> None:
    drawn = [one([-0.0, 0.0, -1.0], device, top_k=1, uniform=uniform) for uniform in (0.0, 0.99)]
    assert drawn == [[0, 0], [1, 1]]


def test_top_k_beyond_the_vocabulary_is_off(device: torch.device) -> None:
    assert one([0.0, 0.0], device, top_k=1000, uniform=0.75) == [1, 1]


def test_the_likeliest_stays_whatever_the_numbers(device: torch.device) -> None:
    assert one([0.0, 3.0, 1.0], device, top_p=1e-9, uniform=0.999) == [1, 1]
    assert one([0.0, 3.0, 1.0], device, min_p=1.0, uniform=0.999) == [1, 1]
    assert one([0.0, 3.0, 1.0], device, top_p=0.0, uniform=0.999) == [1, 1]


def test_top_p_is_renormalised_over_what_top_k_kept(device: torch.device) -> None:
    """Of 0.4, 0.3, 0.3 the first two are kept by k = 2 with ties: all. Of 0.5, 0.3, 0.2 with k = 2: 0.625, 0.375."""
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    assert one(logits, device, top_k=2, top_p=0.6, uniform=0.999) == [0, 0]
    assert one(logits, device, top_k=2, top_p=0.65, uniform=0.999) == [1, 1]


def test_minus_infinity_is_never_drawn(device: torch.device) -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    drawn = [one(logits, device, uniform=uniform) for uniform in (0.0, 0.4999, 0.5, 1 - 2**-53)]
    assert drawn == [[1, 1], [1, 1], [3, 3], [3, 3]]


def test_a_tiny_temperature_is_greedy(device: torch.device) -> None:
    assert one([1.0, 1.5, 1.4], device, temperature=1e-30, uniform=0.9) == [1, 1]


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN")
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_bad_row_gives_a_valid_id_and_spoils_no_other(bad: float, device: torch.device) -> None:
    logits = torch.zeros(3, 40, device=device)
    logits[0] = bad
    logits[1, 7] = math.nan
    logits[2, 11] = 9.0
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 5, 0.5)):
        full = torch.full((3,), temperature, device=device)
        options = (torch.full((3,), top_k, device=device).int(), full * 0 + top_p, full * 0)
        uniform = torch.full((3,), 0.5, device=device, dtype=torch.float64)
        for form in (sample, sample_triton):
            drawn = form(logits, full, *options, uniform)
            assert ((drawn >= 0) & (drawn < 40)).all()
            assert drawn[2] == 11
