"""RoPE with the KV write, RMSNorm, SiLU-and-multiply: definitions against loops, Triton forms against definitions."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from kernels import rms_norm, rope_kv, silu_mul
from tests.kernels.cases import PAGE, RMS_NORM, ROPE_KV, SILU_MUL, RopeKv

NARROW = (torch.float16, torch.bfloat16)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    # Up to three roundings to bfloat16 follow each other, and the interpreter cuts off: 2**-7 each.
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2.4e-2}[got.dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def rope_input(case: RopeKv, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(qkv [T, (H + 2K) E], cache [2, N, K, P, E], cos_sin, positions, slots with some -1)."""
    heads = case.heads + 2 * case.kv_heads
    qkv = torch.randn(case.tokens, heads * case.head_dim, generator=generator)
    cache = torch.randn(2, 3, case.kv_heads, PAGE, case.head_dim, generator=generator)
    angle = torch.rand(50, case.rotary // 2, generator=generator, dtype=torch.float64) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1)
    positions = torch.randint(0, 50, (case.tokens,), generator=generator)
    slots = torch.randperm(3 * PAGE, generator=generator)[: case.tokens]
    slots[1::4] = -1
    return qkv, cache, cos_sin, positions, slots


def split(case: RopeKv, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv.view(case.tokens, -1, case.head_dim).split([case.heads, case.kv_heads, case.kv_heads], dim=1)


@pytest.mark.parametrize("case", ROPE_KV, ids=str)
def test_rope_kv_definition_turns_pairs_as_complex_numbers(case: RopeKv, generator: torch.Generator) -> None:
    """Feature i and i + rot / 2 are the parts of a number that is multiplied by e^(i angle); what is past rot stays."""
    qkv, cache, cos_sin, positions, slots = rope_input(case, generator)
    qkv, cache, half = qkv.double(), cache.double(), case.rotary // 2
    q, k, v = split(case, qkv)
    before_q, before_cache = q.clone(), cache.clone()
    rope_kv.rope_kv(q, k, v, cos_sin, positions, slots, cache[0], cache[1])

    def turned(x: torch.Tensor, token: int) -> list[float]:
        row = cos_sin[positions[token]]
        pairs = [complex(x[i], x[i + half]) * complex(row[i], row[i + half]) for i in range(half)]
        assert all(cmath.isclose(abs(p), abs(complex(x[i], x[i + half]))) for i, p in enumerate(pairs))
        return [p.real for p in pairs] + [p.imag for p in pairs] + x[case.rotary :].tolist()

    for token, slot in enumerate(slots.tolist()):
        for h in (0, case.heads - 1):
            assert q[token, h].tolist() == pytest.approx(turned(before_q[token, h], token))
        if slot >= 0:
            for h in range(case.kv_heads):
                assert cache[0, slot // PAGE, h, slot % PAGE].tolist() == pytest.approx(turned(k[token, h], token))
                assert torch.equal(cache[1, slot // PAGE, h, slot % PAGE], v[token, h])
    kept = torch.ones(3 * PAGE, dtype=torch.bool)
    kept[slots[slots >= 0]] = False
    assert torch.equal(
        cache.transpose(2, 3).flatten(1, 2)[:, kept], before_cache.transpose(2, 3).flatten(1, 2)[:, kept]
    )


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("case", ROPE_KV, ids=str)
def test_rope_kv_triton_equals_the_definition(
    case: RopeKv, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    qkv, cache, cos_sin, positions, slots = rope_input(case, generator)
    qkv, cache = qkv.to(device, dtype), cache.to(device, dtype)
    exact, exact_cache = qkv.double(), cache.double()
    where = positions.to(device), slots.to(device)
    rope_kv.rope_kv(*split(case, exact), cos_sin.to(device), *where, exact_cache[0], exact_cache[1])
    before = qkv.clone()
    rope_kv.rope_kv_triton(*split(case, qkv), cos_sin.float().to(device), *where, cache[0], cache[1])
    width = case.heads * case.head_dim
    close(qkv[:, :width], exact[:, :width])
    assert torch.equal(qkv[:, width:], before[:, width:]), "k and v are not to be touched"
    close(cache, exact_cache)


def test_rope_kv_writes_a_narrow_cache_from_wide_activations(generator: torch.Generator, device: torch.device) -> None:
    case = ROPE_KV[0]
    qkv, cache, cos_sin, positions, slots = rope_input(case, generator)
    qkv, cache = qkv.to(device), cache.to(device, torch.float16)
    exact, exact_cache = qkv.double(), cache.double()
    where = positions.to(device), slots.to(device)
    rope_kv.rope_kv(*split(case, exact), cos_sin.to(device), *where, exact_cache[0], exact_cache[1])
    rope_kv.rope_kv_triton(*split(case, qkv), cos_sin.float().to(device), *where, cache[0], cache[1])
    close(cache, exact_cache)


def test_rms_norm_definition_is_the_formula(generator: torch.Generator) -> None:
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    w = torch.randn(7, generator=generator, dtype=torch.float64)
    y = rms_norm.rms_norm(x, w, 1e-3)
    for row in range(3):
        length = math.sqrt(sum(float(value) ** 2 for value in x[row]) / 7 + 1e-3)
        assert y[row].tolist() == pytest.approx([float(a) / length * float(b) for a, b in zip(x[row], w, strict=True)])


def test_rms_norm_definition_is_torchs(generator: torch.Generator) -> None:
    x, w = torch.randn(5, 64, generator=generator), torch.randn(64, generator=generator)
    torch.testing.assert_close(rms_norm.rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (64,), w, 1e-5))


def test_rms_norm_of_large_half_floats_does_not_overflow(device: torch.device) -> None:
    """The squares of these are beyond float16."""
    x, w = torch.full((2, 64), 3e4, device=device).half(), torch.ones(64, device=device).half()
    for form in (rms_norm.rms_norm, rms_norm.rms_norm_triton):
        torch.testing.assert_close(form(x, w, 1e-5), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), RMS_NORM)
def test_rms_norm_triton_equals_the_definition(
    tokens: int, heads: int, width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """Rows of a wider tensor: the heads of a fused qkv projection."""
    wide = torch.randn(tokens, (heads + 2) * width, generator=generator).to(device, dtype)
    x = wide.view(tokens, heads + 2, width)[:, :heads] if heads > 1 else wide[:, :width]
    w = torch.randn(width, generator=generator).to(device, dtype)
    y = rms_norm.rms_norm_triton(x, w, 1e-5)
    assert y.shape == x.shape
    close(y, rms_norm.rms_norm(x.double(), w.double(), 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [case for case in RMS_NORM if case[1] == 1])
def test_add_rms_norm_triton_equals_the_definition(
    tokens: int, heads: int, width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    x, residual = torch.randn(2, tokens, width, generator=generator).to(device, dtype)
    w = torch.randn(width, generator=generator).to(device, dtype)
    y, total = rms_norm.add_rms_norm(x, residual, w, 1e-5)
    got, got_total = rms_norm.add_rms_norm_triton(x, residual.clone(), w, 1e-5)
    if device.type == "cpu" and dtype == torch.bfloat16:  # Triton's interpreter cuts float32 off where it should round
        close(got_total, x.double() + residual.double())
    else:
        assert torch.equal(got_total, total)
    close(got, y.double())


def test_silu_mul_definition_is_the_formula(generator: torch.Generator) -> None:
    x = torch.randn(3, 10, generator=generator, dtype=torch.float64) * 3
    expected = [[g / (1 + math.exp(-g)) * u for g, u in zip(row[:5], row[5:], strict=True)] for row in x.tolist()]
    torch.testing.assert_close(silu_mul.silu_mul(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SILU_MUL)
def test_silu_mul_triton_equals_the_definition(
    tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    x = (torch.randn(tokens, 2 * width + 8, generator=generator) * 3).to(device, dtype)[:, : 2 * width]
    close(silu_mul.silu_mul_triton(x), silu_mul.silu_mul(x.double()))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + e^1000) is 0, rightly
def test_silu_mul_of_large_numbers_is_finite(device: torch.device) -> None:
    x = torch.tensor([[1000.0, -1000.0, 1.0, 1.0]], device=device)
    assert silu_mul.silu_mul_triton(x).tolist() == [[1000.0, 0.0]]
