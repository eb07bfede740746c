"""Attention over a compressed cache, and what goes with it: against plain attention, in float64, in every form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import choose, rope_kv
from kernels.attention import definition, plan
from kernels.attention import triton as form
from kernels.cpu import threads
from kernels.experts import PackedExperts
from kernels.per_head import per_head
from tests.kernels.cases import PAGE, Attention, attention_input

MIXTURE = ((1, 300), (35, 70), (2, 40), (1, 16), (17, 17))


@dataclass(frozen=True)
class Latent:
    lengths: tuple[tuple[int, int], ...]
    heads: int
    key: int  # features of the cache that are no values
    rank: int


LATENT = (
    Latent(((1, 33), (1, 7), (1, 1), (1, 0)), 16, 16, 64),
    Latent(MIXTURE, 4, 8, 24),
    Latent(((1, 600), (1, 530)), 20, 64, 32),  # split, in groups of four heads
    Latent(((40, 40), (23, 61)), 3, 20, 40),  # nothing is a power of two
)


def latent_input(case: Latent, generator: torch.Generator, device: torch.device) -> tuple[tuple[Tensor, ...], Any]:
    """(q, cache, starts, lengths, tables) and options, in float32, as tests of plain attention draw them."""
    features = case.key + case.rank
    given = attention_input(Attention("", case.lengths, case.heads, 1, features), generator, device)
    q, k, _, *where = given.args
    limits = {name: given.options[name] for name in ("max_query_len", "max_seq_len", "scale")}
    return (q, k, *where), {**limits, "rank": case.rank}


@pytest.mark.parametrize("case", LATENT, ids=str)
def test_latent_attention_is_attention_whose_values_are_part_of_its_keys(
    case: Latent, generator: torch.Generator
) -> None:
    (q, cache, starts, lengths, tables), options = latent_input(case, generator, torch.device("cpu"))
    out = definition.latent_attention(q.double(), cache.double(), starts, lengths, tables, **options)
    for s, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        at = torch.arange(length)
        keys = cache[tables[s, at // PAGE].long(), 0, at % PAGE].double()
        for i, row in enumerate(q[rows].double()):
            seen = keys[: length - q[rows].shape[0] + i + 1]
            weights = (row @ seen.T * options["scale"]).softmax(-1)
            torch.testing.assert_close(
                out[rows][i], weights @ seen[:, case.key :] if length else torch.zeros_like(out[0])
            )


@pytest.mark.parametrize("case", LATENT, ids=str)
@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_latent_attention_equals_its_definition(
    case: Latent, name: str, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu" and name == "triton":  # float32's precision with the tiles that bf16 is served with
        real = plan.tile
        monkeypatch.setattr(plan, "tile", lambda target, e, group, _, short: real(target, e, group, 2, short=short))
    threads.set_threads(2)
    where = device if name == "triton" else torch.device("cpu")
    (q, cache, *rest), options = latent_input(case, generator, where)
    run = form.latent_attention if name == "triton" else choose("cpu").latent_attention
    expected = definition.latent_attention(q.double(), cache.double(), *rest, **options)
    out = run(q.contiguous(), cache, *rest, **options)
    assert out.shape == (q.shape[0], case.heads, case.rank)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_without_values_only_the_key_is_rotated_and_kept(
    name: str, interleaved: bool, generator: torch.Generator, device: torch.device
) -> None:
    where = device if name == "triton" else torch.device("cpu")
    q, k = torch.randn(7, 3, 40, generator=generator), torch.randn(7, 1, 40, generator=generator)
    cache, cos_sin = torch.randn(2, 1, PAGE, 40, generator=generator), torch.randn(50, 16, generator=generator)
    positions, slots = torch.arange(7) * 5, torch.randperm(2 * PAGE, generator=generator)[:7]
    slots[2] = -1
    exact, exact_cache = q.double(), cache.double()
    rope_kv.rope_kv(
        exact, k.double(), None, cos_sin.double(), positions, slots, exact_cache, None, interleaved=interleaved
    )
    q, k, cache, cos_sin, positions, slots = (x.to(where) for x in (q, k, cache, cos_sin, positions, slots))
    run = rope_kv.rope_kv_triton if name == "triton" else choose("cpu").rope_kv
    run(q, k, None, cos_sin, positions, slots, cache, None, interleaved=interleaved)
    torch.testing.assert_close(q.cpu().double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.cpu().double(), exact_cache, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_head_is_multiplied_by_its_own_matrix(form: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    weights = torch.randn(3, 21, 10, generator=generator).to(dtype)
    packed = PackedExperts.empty(form, 3, 21, 10, dtype, torch.device("cpu"))
    for head in range(3):
        packed.put(head, weights[head])
    x = torch.randn(9, 3, 16, generator=generator)[..., 3:13]
    exact = x.to(dtype).double() if form == "torch" else x.double()  # which rounds x, not only weights
    y = per_head(x, packed)
    want = torch.einsum("thk,hnk->thn", exact, weights.double())
    tolerance = 1e-5 if form == "numba" or dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y.double(), want, atol=tolerance, rtol=tolerance)
    if form == "numba":
        assert torch.equal(per_head(x[4:5], packed), y[4:5])
