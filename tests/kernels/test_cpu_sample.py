"""The compiled sampling against the definition, and against what its words say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.sample import sample as definition

VOCABULARIES = (1, 2, 15, 16, 17, 127, 128, 129, 1000, 5003)


@pytest.fixture(autouse=True, scope="module")
def _threads() -> None:
    cpu.set_threads(2)


def options(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top_k, top_p, min_p, uniform: each option on and off in many combinations."""

    def some(values: Tensor, off: float) -> Tensor:
        return torch.where(torch.rand(rows, generator=generator) < 0.5, values, off)

    temperature = some(torch.rand(rows, generator=generator) * 2 + 0.05, 1.0)
    temperature[torch.rand(rows, generator=generator) < 0.1] = 0
    top_k = some(torch.randint(1, 300, (rows,), generator=generator).float(), 0).int()
    top_p = some(torch.rand(rows, generator=generator), 1.0)
    min_p = some(torch.rand(rows, generator=generator) * 0.3, 0.0)
    return temperature, top_k, top_p, min_p, torch.rand(rows, generator=generator, dtype=torch.float64)


def assert_drawn(logits: Tensor, chosen: tuple[Tensor, ...], ids: Tensor) -> None:
    """Equal to the definition, but for draws within a float32's rounding of a boundary between two kept tokens."""
    expected = definition(logits, *chosen)
    nudged = [definition(logits, *chosen[:4], (chosen[4] + step).clamp(0, 1 - 1e-12)) for step in (-3e-6, 3e-6)]
    right = (ids == expected) | (ids == nudged[0]) | (ids == nudged[1])
    wrong = (~right).nonzero().flatten().tolist()
    assert not wrong, [(r, ids[r].item(), expected[r].item(), [c[r].item() for c in chosen]) for r in wrong]
    assert (ids == expected).float().mean() > 0.98


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_draws_equal_the_definition(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(300, vocab, generator=generator) * spread
    chosen = options(300, generator)
    assert_drawn(logits, chosen, cpu.sample(logits, *chosen))


@pytest.mark.parametrize("vocab", [17, 129, 1000])
def test_draws_among_ties_equal_the_definition(vocab: int) -> None:
    """Few different values, so that every threshold falls into a crowd of equals."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 4, (400, vocab), generator=generator).float()
    logits[torch.rand(400, vocab, generator=generator) < 0.2] = -torch.inf
    logits[:, 0] = 0.5
    chosen = options(400, generator)
    assert_drawn(logits, chosen, cpu.sample(logits, *chosen))


def one(logits: Tensor, uniform: Tensor, t: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0) -> Tensor:
    """Ids for many uniforms over the same logits [V]."""
    n = len(uniform)
    full = [torch.full((n,), value) for value in (t, p, m)]
    rows = logits.expand(n, -1).contiguous()
    return cpu.sample(rows, full[0], torch.full((n,), k, dtype=torch.int32), full[1], full[2], uniform)


def test_uniform_numbers_sweep_the_kept_tokens_in_order_and_in_proportion() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2]))
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    counts = torch.bincount(one(logits, uniform), minlength=5)
    assert (counts - torch.tensor([100, 400, 0, 300, 200])).abs().max() <= 1
    assert one(logits, uniform).diff().min() >= 0
    assert torch.bincount(one(logits, uniform, k=2), minlength=5).nonzero().flatten().tolist() == [1, 3]
    assert torch.bincount(one(logits, uniform, p=0.5), minlength=5).nonzero().flatten().tolist() == [1, 3]
    assert torch.bincount(one(logits, uniform, m=0.45), minlength=5).nonzero().flatten().tolist() == [1, 3, 4]
    # top-p over what top-k kept: 0.4 and 0.3 become 4/7 and 3/7, so 0.55 keeps one of them alone
    assert torch.bincount(one(logits, uniform, k=2, p=0.55), minlength=5).nonzero().flatten().tolist() == [1]


def test_the_last_kept_token_takes_what_rounding_leaves() -> None:
    logits = torch.zeros(200)
    logits[150:] = -torch.inf
    assert one(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 149]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(1000)
    logits[[700, 130, 999]] = 2.0
    assert one(logits, torch.tensor([0.9], dtype=torch.float64), t=0.0).tolist() == [130]


def test_small_temperatures_and_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([3e38, -3e38, 2.9e38, 0.0])
    uniform = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    assert one(logits, uniform, t=1e-6).tolist() == [0, 0, 0]
    assert one(torch.arange(50.0), uniform, t=1e-6, k=5, p=0.9, m=0.1).tolist() == [49, 49, 49]


def test_rows_without_a_number_give_some_valid_id() -> None:
    for value in (torch.nan, -torch.inf, torch.inf):
        ids = one(torch.full((300,), value), torch.tensor([0.3, 0.9], dtype=torch.float64), k=3, p=0.5, m=0.1)
        assert ((ids >= 0) & (ids < 300)).all()


def test_a_nan_row_leaves_its_neighbours_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, chosen = torch.randn(6, 500, generator=generator), options(6, generator)
    clean = cpu.sample(logits, *chosen)
    logits[2] = torch.nan
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(cpu.sample(logits, *chosen)[kept], clean[kept])


def test_a_row_draws_the_same_alone_and_from_a_strided_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, chosen = torch.randn(40, 800, generator=generator)[:, 100:700], options(40, generator)
    crowd = cpu.sample(logits, *chosen)
    for r in range(40):
        assert cpu.sample(logits[r : r + 1], *(c[r : r + 1] for c in chosen)) == crowd[r]
