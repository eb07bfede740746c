"""Ministral 3: Mistral with yarn, whose queries grow with the logarithm of their position. Mistral AI 2025."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models.mistral import MistralForCausalLM
from engine.rope_config import rope_parameters


class Ministral3ForCausalLM(MistralForCausalLM):
    """The growth, `llama_4_scaling_beta`, stands among the rope's parameters."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = MistralForCausalLM.read_config(fields)
        beta = rope_parameters(fields).number("llama_4_scaling_beta", 0, 1e3, default=0.0)
        ropes = tuple(replace(rope, q_scale_beta=beta) for rope in found.ropes if rope)
        return replace(found, ropes=ropes)
