"""Small random models of each family, made by transformers and saved in the hub's layout. Knows nothing of engine/."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.1, 1.9, 3.5, 6.0],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}

# architecture -> model_type and the keys, beside the common ones, of configs that reach each of the family's branches
CONFIGS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "CohereForCausalLM": ("cohere", [{"logit_scale": 0.9, "head_dim": None}]),
    "Cohere2ForCausalLM": (
        "cohere2",
        [
            {"sliding_window": 20, "num_hidden_layers": 5, "logit_scale": 1.0, "head_dim": None},
            {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 3,
             "logit_scale": 1.2, "tie_word_embeddings": False, "attention_bias": True, "head_dim": None},
        ],
    ),
    "GPT2LMHeadModel": (
        "gpt2",
        [
            {"n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 128},
            {"n_embd": 36, "n_layer": 3, "n_head": 4, "n_positions": 90, "n_inner": 50, "tie_word_embeddings": False,
             "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"},
        ],
    ),
    "GemmaForCausalLM": ("gemma", [GEMMA]),
    "Ernie4_5ForCausalLM": ("ernie4_5", [{"use_bias": True, "tie_word_embeddings": False}]),
    "HeliumForCausalLM": (
        "helium",
        [{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 72, "attention_bias": True,
          "mlp_bias": True}],
    ),
    "SeedOssForCausalLM": ("seed_oss", [{"attention_bias": True, "attention_out_bias": True, "rope_scaling": YARN}]),
    "Gemma2ForCausalLM": (
        "gemma2",
        [
            {**GEMMA, "sliding_window": 20, "query_pre_attn_scalar": 24, "num_hidden_layers": 3,
             "attn_logit_softcapping": 2.0, "final_logit_softcapping": 7.0},
            {**GEMMA, "sliding_window": 3, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        ],
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        [
            {**GEMMA, "sliding_window": 20, "sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_theta": 1e6,
             "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {**GEMMA, "sliding_window": 33, "layer_types": ["full_attention", "sliding_attention"],
             "num_hidden_layers": 2, "final_logit_softcapping": 9.0, "query_pre_attn_scalar": 10,
             "rope_parameters": {"full_attention": {**YARN, "rope_theta": 5e5},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 7e3}}},
        ],
    ),
    "GlmForCausalLM": ("glm", [{"head_dim": 24, "partial_rotary_factor": 0.5, "attention_bias": True}]),
    "Glm4ForCausalLM": (
        "glm4",
        [
            {"head_dim": 16, "attention_bias": False},
            {"head_dim": 40, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4,
                                                 "partial_rotary_factor": 0.25}, "attention_bias": True},
        ],
    ),
    "GraniteForCausalLM": (
        "granite",
        [
            {"tie_word_embeddings": False, "embedding_multiplier": 6.0, "attention_multiplier": 0.11,
             "residual_multiplier": 0.22, "logits_scaling": 0.9, "attention_bias": True, "mlp_bias": True},
        ],
    ),
    "Ministral3ForCausalLM": (
        "ministral3",
        [
            {"rope_parameters": {**YARN, "factor": 16.0, "original_max_position_embeddings": 9, "rope_theta": 1e4,
                                 "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.6},
             "sliding_window": 40},
        ],
    ),
    "Olmo2ForCausalLM": ("olmo2", [{"attention_bias": True, "rope_scaling": YARN}]),
    "Olmo3ForCausalLM": (
        "olmo3",
        [{"sliding_window": 20, "num_hidden_layers": 4, "rope_theta": 5e5, "rope_scaling": {**YARN, "beta_fast": 8}}],
    ),
    "Phi3ForCausalLM": (
        "phi3",
        [
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4, "max_position_embeddings": 256,
             "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 72, "head_dim": None,
             "partial_rotary_factor": 0.7, "tie_word_embeddings": True},
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 256,
             "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": None},
            {"sliding_window": 20, "num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 80,
             "head_dim": None},
        ],
    ),
    "SmolLM3ForCausalLM": (
        "smollm3",
        [
            {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True},
            {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 20},
        ],
    ),
    "Starcoder2ForCausalLM": (
        "starcoder2",
        [
            {"sliding_window": 20, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5},
            {"sliding_window": None, "use_bias": False, "hidden_act": "gelu_pytorch_tanh",
             "tie_word_embeddings": False},
        ],
    ),
}  # fmt: skip


def family_config(architecture: str, number: int) -> dict[str, Any]:
    """A small config.json of odd shapes; None leaves a key out."""
    model_type, variants = CONFIGS[architecture]
    rng = random.Random(f"{architecture}/{number}")
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    drawn: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 264 + 8 * rng.randrange(8),
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if architecture != "GPT2LMHeadModel":
        drawn |= {
            "hidden_size": heads * rng.choice([8, 12, 20]),
            "intermediate_size": 8 * rng.randrange(6, 16),
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": rng.choice([8, 16, 24]),
            "max_position_embeddings": 512,
            "tie_word_embeddings": number % 2 == 0,
        }
    full = copy.deepcopy(drawn | variants[number])  # transformers writes into what it is given
    return {key: value for key, value in full.items() if key != "head_dim" or value is not None}


def make_family(directory: Path, architecture: str, number: int) -> PreTrainedModel:
    """Writes the checkpoint and returns transformers' model of the same weights, drawn for sharp probabilities."""
    config = family_config(architecture, number)
    kinds = {key: value for key, value in copy.deepcopy(config).items() if key not in ("architectures", "torch_dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kinds), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(number)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and not name.endswith("bias"):
            zero_is_one = architecture.startswith("Gemma")
            drawn = 0.3 * drawn + (0 if zero_is_one else 1)
        elif parameter.dim() == 1:
            drawn = 0.5 * drawn
        else:
            into = parameter.shape[0] if architecture == "GPT2LMHeadModel" and "c_" in name else parameter.shape[1]
            drawn = drawn * (3 if "embed" in name or "lm_head" in name or "wte" in name else 1.5) / into**0.5
        parameter.data = drawn
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return model
