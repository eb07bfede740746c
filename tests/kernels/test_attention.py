"""Paged attention: the definition against torch's own attention and an explicit loop, the Triton form against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.attention import definition, plan
from kernels.attention import triton as form
from tests.kernels.cases import ATTENTION, TOLERANCE, Attention, AttentionInput, attention_input

SMALL = tuple(case for case in ATTENTION if case.dtype == torch.float32 and case.cache_dtype is None)


def ids(case: Attention) -> str:
    return case.name


@pytest.fixture
def serving_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, float32's precision with the tiles that bf16 and fp16 are served with."""
    if device.type == "cpu":
        real = plan.tile
        monkeypatch.setattr(plan, "tile", lambda target, e, group, _, short: real(target, e, group, 2, short=short))


def contiguous(given: AttentionInput, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [n, H, E], k and v [L, K, E] of one sequence in float64, gathered token by token."""
    q, k_cache, v_cache, starts, seq_lens, tables = given.exact
    at = [(tables[s, i // 16].item(), i % 16) for i in range(int(seq_lens[s]))]
    k = torch.stack([k_cache[block, :, offset] for block, offset in at])
    v = torch.stack([v_cache[block, :, offset] for block, offset in at])
    return q[int(starts[s]) : int(starts[s + 1])], k, v


@pytest.mark.parametrize("case", [c for c in SMALL if not c.soft_cap and not c.sinks], ids=ids)
def test_definition_is_torch_attention_over_the_gathered_pages(case: Attention, generator: torch.Generator) -> None:
    given = attention_input(case, generator, torch.device("cpu"))
    out = definition.paged_attention(*given.exact, **given.exact_options())
    for s, (count, total) in enumerate(case.lengths):
        if not total:
            continue
        q, k, v = contiguous(given, s)
        mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        if case.window:
            mask &= ~torch.ones(count, total, dtype=torch.bool).tril(total - count - case.window)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask, enable_gqa=True
        )
        start = sum(c for c, _ in case.lengths[:s])
        torch.testing.assert_close(out[start : start + count], expected.transpose(0, 1), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", [c for c in SMALL if (c.soft_cap or c.sinks) and len(c.lengths) < 6], ids=ids)
def test_definition_is_the_sum_written_out(case: Attention, generator: torch.Generator) -> None:
    """The newest query of each sequence, head by head and key by key in plain Python."""
    given = attention_input(case, generator, torch.device("cpu"))
    out = definition.paged_attention(*given.exact, **given.exact_options())
    sinks = given.exact_options()["sinks"]
    for s, (count, total) in enumerate(case.lengths):
        q, k, v = contiguous(given, s)
        first = max(0, total - case.window) if case.window else 0
        for h in range(case.heads):
            kv_head = h * case.kv_heads // case.heads
            scores = [float(q[-1, h] @ k[j, kv_head]) / math.sqrt(case.head_dim) for j in range(first, total)]
            if case.soft_cap:
                scores = [case.soft_cap * math.tanh(score / case.soft_cap) for score in scores]
            weights = [math.exp(score) for score in scores]
            denominator = sum(weights) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
            expected = sum(w * v[first + j, kv_head] for j, w in enumerate(weights)) / denominator
            row = sum(c for c, _ in case.lengths[:s]) + count - 1
            torch.testing.assert_close(out[row, h], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.usefixtures("serving_tiles")
@pytest.mark.parametrize("case", ATTENTION, ids=ids)
def test_triton_equals_the_definition(case: Attention, generator: torch.Generator, device: torch.device) -> None:
    if device.type == "cpu" and case.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they were integers")
    given = attention_input(case, generator, device)
    expected = definition.paged_attention(*given.exact, **given.exact_options())[: given.rows]
    out = form.paged_attention(*given.args, **given.options)
    assert out.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out[: given.rows].double(), expected, atol=tolerance, rtol=tolerance)


def test_float32_tiles_equal_the_definition(generator: torch.Generator, device: torch.device) -> None:
    given = attention_input(Attention("", ((1, 130), (19, 40)), 4, 2, 64, window=25), generator, device)
    expected = definition.paged_attention(*given.exact, **given.exact_options())
    out = form.paged_attention(*given.args, **given.options)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("serving_tiles")
@pytest.mark.parametrize("num_splits", [2, 3, 20])
def test_any_number_of_parts_gives_the_same(
    num_splits: int, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than there are steps of keys, parts of uneven size, and parts that see nothing of a short context."""
    case = Attention("", ((1, 200), (1, 530), (1, 0), (1, 1)), 2, 1, 64, sinks=True)
    given = attention_input(case, generator, device)
    monkeypatch.setattr(plan, "splits", lambda *_: num_splits)
    expected = definition.paged_attention(*given.exact, **given.exact_options())
    out = form.paged_attention(*given.args, **given.options)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("target", plan.LONG)
def test_every_gpus_tiles_give_the_same(
    target: str, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU runs only its own tiles")
    monkeypatch.setattr(form, "device_facts", lambda _: (target, 4))
    case = Attention("", ((35, 70), (2, 40)), 4, 2, 64, dtype=torch.float16, window=30)
    given = attention_input(case, generator, device)
    expected = definition.paged_attention(*given.exact, **given.exact_options())
    out = form.paged_attention(*given.args, **given.options)
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.usefixtures("serving_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the cap's tanh goes through infinity, rightly
def test_scores_far_from_zero_stay_finite(generator: torch.Generator, device: torch.device) -> None:
    """Scores of some hundreds in both directions: the online softmax must not overflow, nor the soft cap's tanh."""
    for soft_cap in (0.0, 1.0):
        case = Attention("", ((1, 140), (30, 40)), 2, 1, 64, soft_cap=soft_cap)
        given = attention_input(case, generator, device)
        given.options["scale"] = 40.0
        expected = definition.paged_attention(*given.exact, **given.exact_options())
        out = form.paged_attention(*given.args, **given.options)
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
