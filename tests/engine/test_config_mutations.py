"""Whatever stands in a config.json, reading it gives a model of bounded size or one clear error."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.layers.weights import Weights
from engine.model_config import ModelConfig, read_model_config
from engine.models import FAMILIES, model_class
from kernels import definitions
from tests.engine.families import CONFIGS, family_config
from tests.engine.tiny import ARCHITECTURES, random_config

MUTATIONS = 200
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**63, -(2**70), 10**400, 0.0, 0.5, -1.5, 1e-300, 1e300, math.nan,
    math.inf, -math.inf, "", "linear", "yarn", "longrope", "su", "gelu", "x" * 5000, "\x1b[2J\u202e", [], [None],
    [1, 2], [[]], ["sliding_attention"], ["full_attention"] * 2, [0.5] * 4, {}, {"rope_type": "yarn"},
    {"type": "longrope"},
    {"rope_type": "llama3", "factor": 2}, {"full_attention": {}}, {"full_attention": 3}, {"sliding_attention": None},
    {"a": {"b": {"c": []}}},
)  # fmt: skip
KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps", "norm_epsilon",
    "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq",
    "partial_rotary_factor", "hidden_act", "hidden_activation", "activation_function", "sliding_window", "layer_types",
    "sliding_window_pattern", "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval",
    "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "tie_word_embeddings", "eos_token_id", "torch_dtype", "dtype",
    "logit_scale", "logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
    "use_qk_norm", "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "scale_attn_by_inverse_layer_idx",
    "add_cross_attention", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "architectures", "text_config",
)  # fmt: skip


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three keys, also inside the rope's object, with odd values; or a key taken away."""
    changed = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        inner = [value for value in changed.values() if isinstance(value, dict) and value]
        target = rng.choice(inner) if inner and rng.random() < 0.3 else changed
        key = rng.choice([*target] if rng.random() < 0.6 or target is not changed else KEYS)
        if rng.random() < 0.15:
            target.pop(key, None)
        else:
            target[key] = copy.deepcopy(rng.choice(ODD))
    return changed


def read(config: dict[str, Any]) -> ModelConfig | str:
    """The model, or what was said instead."""
    try:
        return read_model_config(config)
    except CheckpointError as error:
        return str(error)


def start(architecture: str, number: int) -> dict[str, Any]:
    if architecture in CONFIGS:
        return family_config(architecture, number % len(CONFIGS[architecture][1]))
    if architecture in ARCHITECTURES:
        return random_config(architecture, number)
    return random_config("MistralForCausalLM", number) | {"architectures": [architecture], "moe_intermediate_size": 16}


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_mutated_configs_give_a_bounded_model_or_one_clear_error(architecture: str) -> None:
    rng = random.Random(architecture)
    num_read = 0
    for number in range(MUTATIONS):
        config = mutated(start(architecture, number), rng)
        found = read(config)
        if isinstance(found, str):
            assert 20 < len(found) < 2000, config
            assert found.isprintable(), config
            continue
        num_read += 1
        assert found.num_layers <= 1024, config
        assert len(found.ropes) == len(found.windows) == found.num_layers, config
        assert max(found.vocab_size, found.context_length, found.max_position_embeddings) <= 2**24, config
        assert found.num_heads % found.num_kv_heads == 0, config
        assert all(map(math.isfinite, (found.attention_scale, found.norm_eps, found.logits_scale))), config
        if found.num_layers <= 8:
            family = model_class(found.architecture)
            layers = family(found, Weights(definitions(), family.FUSED)).weights.layers
            sizes = [size for layer in layers for shape in layer.shapes().values() for size in shape]
            assert 0 < min(sizes) <= max(sizes) < 2**33, config
    if architecture in (*CONFIGS, *ARCHITECTURES):
        assert 10 < num_read < MUTATIONS - 10, "mutations that are all refused, or none, show little"
