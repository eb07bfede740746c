"""SmolLM3: Llama without rope in every fourth layer. Bakouch et al. 2025; Yang et al. 2025, arXiv 2501.18795."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.model_config import FULL, SLIDING, ModelConfig, read_layer_types, read_window, windows_by_type
from engine.models.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """Layers without rope may see a window."""

    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    }

    @staticmethod
    def read_config(fields: Fields) -> ModelConfig:
        found = LlamaForCausalLM.read_config(fields)
        interval = fields.integer("no_rope_layer_interval", 1, 1024, default=4)
        rotates: list[float] = [int((i + 1) % interval != 0) for i in range(found.num_layers)]
        if fields.has("no_rope_layers"):  # which, despite its name, has a 1 where there is rope
            rotates = list(fields.numbers("no_rope_layers", found.num_layers, 0, 1))
        window = read_window(fields) if fields.flag("use_sliding_window", default=False) else 0
        absent = [SLIDING if window and not turned else FULL for turned in rotates]
        return replace(
            found,
            ropes=tuple(rope if turned else None for rope, turned in zip(found.ropes, rotates, strict=True)),
            windows=windows_by_type(read_layer_types(fields, found.num_layers, absent), window),
        )
