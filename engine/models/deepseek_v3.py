"""DeepSeek-V3 and R1: V2 whose experts are scored one by one and chosen with a learned correction. arXiv 2412.19437."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from engine.config_fields import Fields
from engine.models.deepseek_v2 import DeepseekConfig, DeepseekV2ForCausalLM, read_deepseek, read_groups


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """Groups are ranked by their two best experts. The layers that predict further tokens are not used."""

    CORRECTION: ClassVar = "gate.e_score_correction_bias"
    ABSENT: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 4096,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    }

    @staticmethod
    def read_config(fields: Fields) -> DeepseekConfig:
        fields.only("scoring_func", "sigmoid", "this family scores each expert by itself")
        fields.only("topk_method", "noaux_tc", "this family chooses with a correction bias")
        routing = replace(
            read_groups(fields, group_best=2),
            scoring="sigmoid",
            normalise=fields.flag("norm_topk_prob", default=True),
            scale=fields.number("routed_scaling_factor", 0, 1e6),
        )
        return read_deepseek(fields, routing, interleaved=fields.flag("rope_interleave", default=True))
