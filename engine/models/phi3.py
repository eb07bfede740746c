"""Phi-3, 3.5 and 4: Llama whose checkpoints hold q, k and v, and gate and up, as one projection each.

Abdin et al. 2024, arXiv 2404.14219. Long contexts by longrope; Phi-4-mini rotates a part of each head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.model_config import ModelConfig, read_decoder, read_window
from engine.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    """One window for all layers. No biases anywhere."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    }
    FUSED: ClassVar = {}

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        scaling = fields.object("rope_scaling")
        if scaling.get("type") == "yarn":  # what its first files call longrope
            fields = Fields(fields.values | {"rope_scaling": scaling | {"type": "longrope"}})
        found = read_decoder(fields, partial_rotary=True)
        return replace(found, windows=(read_window(fields),) * found.num_layers)
