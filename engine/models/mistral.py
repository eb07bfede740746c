"""Mistral: Llama whose tokens see a window of positions. Jiang et al. 2023, arXiv 2310.06825."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.errors import CheckpointError
from engine.model_config import ModelConfig, read_decoder, read_window
from engine.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """One window for all layers. No biases anywhere."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = read_decoder(fields)
        kinds = fields.values.get("layer_types")
        if isinstance(kinds, list) and any(kind != kinds[0] for kind in kinds):
            raise CheckpointError(f"config.json: layer_types mixes kinds; {found.architecture} has one kind of layer.")
        return replace(found, windows=(read_window(fields),) * found.num_layers)
