"""Small GGUF files as llama.cpp's converter writes them, from tiny transformers models, by gguf's own writer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(architecture: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random float32 model with weights large enough that its distribution is far from flat."""
    torch.manual_seed(seed)
    settings = {**SIZES, "rope_theta": 10000.0, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape) * spread + (1.0 if "norm" in name else 0.0))
    return model


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the halves of each head are interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Type = Type.F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """kind: type of the matrices; vectors stay F32. metadata: further keys; extra: further F32 tensors."""
    config = model.config
    if not hasattr(config, "head_dim"):  # qwen2
        config.head_dim = config.hidden_size // config.num_attention_heads
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and (match := re.search(r"([qk])_proj\.(weight|bias)$", name)):
            values = permute(values, config.num_attention_heads if match[1] == "q" else config.num_key_value_heads)
        stem, suffix = name.rsplit(".", 1)
        add_tensor(writer, f"{names.get_name(stem)}.{suffix}", values, kind if values.ndim > 1 else Type.F32)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> None:
    quantised = gguf.quantize(np.ascontiguousarray(values), kind)
    writer.add_tensor(name, quantised, raw_dtype=None if kind in (Type.F32, Type.F16) else kind)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """The kind that llama.cpp uses for a value of this Python type."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
