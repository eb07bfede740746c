"""Small random checkpoints as ordinary Hugging Face folders: config.json, model.safetensors and, if asked, a tokenizer.

Weights are drawn large enough that the next-token distribution is far from flat, so that a wrong kernel, mask or
rotation shows. Everything is a function of the seed. Knows the file format by its own tables, not by engine/.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
END_OF_TEXT, IM_START, IM_END = 256, 257, 258  # ids of the byte tokenizer's special tokens; id b < 256 is the byte b
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_config(architecture: str, seed: int, **config: Any) -> dict[str, Any]:
    """A small config.json of odd shapes; `config` overrides or adds keys (None is written as null)."""
    rng = random.Random(f"{architecture}/{seed}")
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4, 8] if kv_heads == 1 else [1, 2, 4])
    drawn: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": 264 + 8 * rng.randrange(8),
        "hidden_size": heads * rng.choice([8, 12, 20]) if heads < 6 else heads * rng.choice([4, 6, 8]),
        "intermediate_size": 8 * rng.randrange(6, 20),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([8, 16, 24, 32]),
        "max_position_embeddings": 2048,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "rope_theta": rng.choice([10000.0, 500000.0]),
        "hidden_act": "silu",
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "torch_dtype": "float32",
    }
    if architecture == "LlamaForCausalLM":
        drawn |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    if architecture == "Qwen3ForCausalLM":
        drawn |= {"attention_bias": rng.random() < 0.5}
    if architecture == "MistralForCausalLM":
        drawn |= {"sliding_window": rng.choice([None, 24])}
    return drawn | config


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors and their shapes, as transformers names them."""
    architecture = config["architectures"][0]
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = architecture == "Qwen2ForCausalLM" or config.get("attention_bias", False)
    out_bias = architecture != "Qwen2ForCausalLM" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    projections = {
        "self_attn.q_proj": (q, hidden, qkv_bias),
        "self_attn.k_proj": (kv, hidden, qkv_bias),
        "self_attn.v_proj": (kv, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, q, out_bias),
        "mlp.gate_proj": (inner, hidden, mlp_bias),
        "mlp.up_proj": (inner, hidden, mlp_bias),
        "mlp.down_proj": (hidden, inner, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
        if architecture == "Qwen3ForCausalLM":
            shapes |= {f"{layer}self_attn.{n}_norm.weight": (head_dim,) for n in "qk"}
        for name, (n_out, n_in, bias) in projections.items():
            shapes[f"{layer}{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{layer}{name}.bias"] = (n_out,)
    return shapes


def random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of unit gain, norms around one, logits with a standard deviation of about three."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name:
            drawn = 1 + 0.3 * drawn
        elif name.endswith(".bias"):
            drawn = 0.5 * drawn
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            drawn = drawn * 3 / shape[1] ** 0.5
        else:
            drawn = drawn * 1.5 / shape[1] ** 0.5
        weights[name] = drawn.to(dtype)
    return weights


def make_checkpoint(
    directory: str | Path,
    architecture: str = "LlamaForCausalLM",
    seed: int = 0,
    *,
    tokenizer: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write a checkpoint into `directory` (made if absent) and return it. `config` overrides keys of config.json.

    tokenizer: also a byte-level tokenizer with a ChatML template, so that the whole server can serve the folder.
    shards: 1 writes model.safetensors, more write model-0000i-of-0000n.safetensors and the index.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype_name = str(dtype).removeprefix("torch.")
    full = random_config(architecture, seed, **{"torch_dtype": dtype_name, **config})
    (directory / "config.json").write_text(json.dumps(full, indent=2))
    eos = full.get("eos_token_id")
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": END_OF_TEXT, "eos_token_id": eos}))
    write_weights(directory, random_weights(full, seed, dtype), shards)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_weights(directory: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or `shards` files that each take every n-th tensor, and their index."""
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: id b is byte b, then <|endoftext|>, <|im_start|>, <|im_end|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={char: b for b, char in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself if printable, else the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
