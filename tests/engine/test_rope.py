"""The table of angles equals transformers' for every scaling, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rope import CHUNK, cos_sin_table
from engine.model_config import read_model_config
from engine.rope_config import MAX_POSITIONS
from tests.engine.tiny import random_config


def draw_scaling(kind: str, rng: random.Random) -> dict[str, Any]:
    """Random parameters of one rope kind, optional ones present half of the time."""
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = rng.choice([1.0, 2.0, 2.5, 8.0, 40.0])
    if kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rng.choice([32, 100, 512])
    if kind == "llama3":
        low = rng.choice([1.0, 1.5])
        scaling |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([2.0, 4.0])}
    if kind == "yarn":
        optional = {
            "attention_factor": rng.choice([0.7, 1.3]),
            "beta_fast": rng.choice([16.0, 40]),
            "beta_slow": rng.choice([0.5, 2]),
            "mscale": rng.choice([0.7, 1.0]),
            "mscale_all_dim": rng.choice([0.5, 1.0]),
            "truncate": rng.random() < 0.5,
        }
        scaling |= {key: value for key, value in optional.items() if rng.random() < 0.5}
    return scaling


def both(scaling: dict[str, Any], seed: int, **config: Any) -> tuple[Any, LlamaRotaryEmbedding]:
    """Our config and transformers' module for the same config.json."""
    config = random_config("LlamaForCausalLM", seed, rope_scaling=scaling, **config)
    return read_model_config(config), LlamaRotaryEmbedding(LlamaConfig(**config))


def reference(module: LlamaRotaryEmbedding, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = module(torch.empty(0), positions[None])
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("seed", range(8))
def test_table_equals_transformers(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind}/{seed}")
    scaling = draw_scaling(kind, rng)
    print(scaling)
    ours, module = both(scaling, seed)
    table = cos_sin_table(ours.ropes[0], 2000)
    assert torch.equal(table, reference(module, torch.arange(2000)))


def test_table_does_not_depend_on_the_size_of_its_chunks() -> None:
    ours, module = both({"rope_type": "yarn", "factor": 8.0}, seed=3)
    table = cos_sin_table(ours.ropes[0], CHUNK + 100)
    assert torch.equal(table[CHUNK - 5 :], reference(module, torch.arange(CHUNK - 5, CHUNK + 100)))


@pytest.mark.parametrize("factor", [1.0, 2.3, 8.0])
def test_dynamic_table_equals_transformers_within_the_window_and_token_by_token_beyond(factor: float) -> None:
    window = 50
    ours, module = both({"type": "dynamic", "factor": factor}, seed=1, max_position_embeddings=window)
    table = cos_sin_table(ours.ropes[0], 4 * window)
    assert torch.equal(table[:window], reference(module, torch.arange(window)))
    one_by_one = torch.cat([reference(module, torch.tensor([p])) for p in range(window, 4 * window)])
    torch.testing.assert_close(table[window:], one_by_one, rtol=0, atol=2e-5)  # 1 ulp of an angle of 200 is 1.5e-5


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_old_and_new_config_styles_mean_the_same(kind: str) -> None:
    scaling = draw_scaling(kind, random.Random(kind))
    old = random_config("Qwen2ForCausalLM", 0, rope_theta=5e5, rope_scaling=scaling)
    new = random_config("Qwen2ForCausalLM", 0, rope_parameters={"rope_theta": 5e5, **scaling})
    del new["rope_theta"]
    assert read_model_config(old) == read_model_config(new)
    assert read_model_config(old).ropes[0].theta == 5e5


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"type": "dynamic", "factor": 2}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 8192),
        ({"rope_type": "linear", "factor": 1e6}, MAX_POSITIONS),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            2048,
        ),
    ],
)
def test_context_length_includes_the_scaling(scaling: dict[str, Any] | None, expected: int) -> None:
    config = random_config("LlamaForCausalLM", 0, rope_scaling=scaling, max_position_embeddings=2048)
    assert read_model_config(config).context_length == expected
