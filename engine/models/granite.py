"""Granite: Llama with multipliers on embeddings, attention scores, what layers add, and logits.

IBM 2024, Granite 3.0 Language Models; Yang et al. 2022, arXiv 2203.03466, for the multipliers.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config_fields import Fields
from engine.model_config import ModelConfig
from engine.models.llama import LlamaForCausalLM


class GraniteForCausalLM(LlamaForCausalLM):
    """All of it is in the config."""

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        return replace(
            LlamaForCausalLM.read_config(fields),
            embedding_scale=fields.number("embedding_multiplier", 1e-6, 1e6, default=1.0),
            attention_scale=fields.number("attention_multiplier", 1e-6, 1e6, default=1.0),
            residual_scale=fields.number("residual_multiplier", 1e-6, 1e6, default=1.0),
            logits_scale=1 / fields.number("logits_scaling", 1e-6, 1e6, default=1.0),
        )
