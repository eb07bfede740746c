"""Models whose blocks are Llama's under another name: what differs is in their config.json and its defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models.llama import LlamaForCausalLM
from engine.rope_config import interleaved


class HeliumForCausalLM(LlamaForCausalLM):
    """Kyutai 2025. Neighbouring features are rotated together; no bias after attention."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 4096,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = LlamaForCausalLM.read_config(fields)
        return replace(found, ropes=interleaved(found.ropes), out_bias=False)


class Ernie4_5ForCausalLM(LlamaForCausalLM):
    """Baidu 2025. Neighbouring features are rotated together; one switch for all biases."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found, bias = LlamaForCausalLM.read_config(fields), fields.flag("use_bias", default=False)
        return replace(found, ropes=interleaved(found.ropes), qkv_bias=bias, out_bias=bias, mlp_bias=bias)


class SeedOssForCausalLM(LlamaForCausalLM):
    """ByteDance 2025. The bias after attention has a switch of its own."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = LlamaForCausalLM.read_config(fields)
        return replace(found, out_bias=fields.flag("attention_out_bias", default=False))
