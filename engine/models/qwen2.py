"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, whose upper layers may see a window.

Yang et al. 2024, arXiv 2407.10671.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.model_config import (
    FULL,
    SLIDING,
    ModelConfig,
    read_decoder,
    read_layer_types,
    read_window,
    windows_by_type,
)
from engine.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The biases are the family's, not the config's."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = read_decoder(fields)
        return replace(found, qkv_bias=True, windows=upper_windows(fields, found.num_layers))


def upper_windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Qwen's windows: of the layers from max_window_layers on, or as layer_types says, and only if they are in use."""
    window = read_window(fields) if fields.flag("use_sliding_window", default=False) else 0
    first = fields.integer("max_window_layers", 0, 2**31 - 1, default=28)
    absent = [SLIDING if window and i >= first else FULL for i in range(num_layers)]
    return windows_by_type(read_layer_types(fields, num_layers, absent), window)
