"""What a GGUF file says about its model, in the words of Hugging Face: config.json and tensor names.

Knows the architectures llama, qwen2 and qwen3 and how llama.cpp writes them; reads no weights and writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.gguf_file import GgufFile

HF_NAMES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_SIZE = 1 << 24  # of any width or count in a config
NORM_SUFFIX = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class Target:
    """One tensor of the checkpoint to be written. source None: zeros.

    permuted_head: the head size if llama.cpp's order of q/k rows must be undone, else 0.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    permuted_head: int = 0


class _Keys:
    """The keys under `{architecture}.`, checked."""

    def __init__(self, gguf: GgufFile) -> None:
        self.metadata = gguf.metadata
        self.architecture = str(gguf.metadata.get("general.architecture"))
        self.path = gguf.path

    def wrong(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be converted: {message}")

    def raw(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
            raise self.wrong(f"{self.architecture}.{key} is {value!r:.60}, not a number from 1 to {MAX_SIZE}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(f"{self.architecture}.{key} is {value!r:.60}, not a positive number.")
        return shortest(value)


def shortest(value: float) -> float:
    """A float32 of the file as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return next(d for d in (float(f"{value:.{n}g}") for n in range(1, 18)) if math.isclose(d, value, rel_tol=5e-8))


def model_config(gguf: GgufFile, rope_factors: Sequence[float] | None = None) -> dict[str, Any]:
    """config.json of the model, without its dtype. rope_factors: the tensor rope_freqs.weight, if there is one.

    Raises CheckpointError.
    """
    keys = _Keys(gguf)
    architecture = keys.architecture
    if architecture not in HF_NAMES:
        supported = ", ".join(HF_NAMES)
        raise keys.wrong(
            f"its architecture is {architecture!r:.60}; supported are {supported}.\n"
            "Use the model's original safetensors folder instead, if Penstock supports that architecture."
        )
    if keys.raw("expert_count"):
        raise keys.wrong("it is a mixture of experts, which is not supported as GGUF yet.")
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise keys.wrong(f"{architecture}.{key} differs from the head size {head_dim}, which is not supported.")
    if head_dim % 2:
        raise keys.wrong(f"its head size {head_dim} is odd.")
    if "token_embd.weight" not in gguf.tensors or keys.count("block_count") > len(gguf.tensors):
        raise keys.wrong("it has no token_embd.weight, or fewer tensors than layers.")
    window = keys.raw("attention.sliding_window") if architecture == "llama" else None
    config = {
        "architectures": ["MistralForCausalLM" if window else HF_NAMES[architecture]],
        "model_type": "mistral" if window else architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number(NORM_SUFFIX),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, head_dim, rope_factors),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": architecture == "qwen2" or "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "use_cache": True,
    }
    if window:
        config["sliding_window"] = keys.count("attention.sliding_window")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _rope_scaling(keys: _Keys, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any] | None:
    kind = keys.raw("rope.scaling.type")
    if factors is not None and any(factor != 1 for factor in factors):
        return _llama3_scaling(keys, head_dim, factors)
    if kind in (None, "none"):
        linear = keys.raw("rope.scale_linear")  # files before September 2023
        return {"rope_type": "linear", "factor": keys.number("rope.scale_linear")} if linear not in (None, 1) else None
    if kind not in ("linear", "yarn"):
        raise keys.wrong(f"its rope scaling {kind!r:.40} is not supported (linear, yarn and llama3 are).")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        scaling |= {n: keys.number(f"rope.scaling.{k}") for n, k in names.items() if keys.raw(f"rope.scaling.{k}")}
    return scaling


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """What Llama 3.1 divides each of the head_dim/2 frequencies by."""
    factors = []
    for i in range(0, head_dim, 2):
        turns = original * theta ** (-i / head_dim) / (2 * math.pi)  # within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _llama3_scaling(keys: _Keys, head_dim: int, factors: Sequence[float]) -> dict[str, Any]:
    """The parameters behind rope_freqs.weight, which holds only their result.

    Between the two wavelengths 1/factor is linear in the number of turns, so a line through the first and the last
    such point gives low and high; only their ratios to the original context matter, so that may be taken as 8192.
    """
    theta, largest = keys.number("rope.freq_base", 10000.0), max(factors)
    original = 8192
    if len(factors) != head_dim // 2 or not 1 < largest < math.inf or min(factors) <= 0:
        raise keys.wrong("rope_freqs.weight does not hold the factors of a Llama 3 rope scaling.")
    candidates = [(1.0, 4.0)]
    points = [
        (original * theta ** (-2 * i / head_dim) / (2 * math.pi), (1 / f - 1 / largest) / (1 - 1 / largest))
        for i, f in enumerate(factors)
        if 1.001 < f < largest * 0.999
    ]
    if len(points) > 1:
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = (y1 - y0) / (x1 - x0)
        low = x0 - y0 / slope
        candidates.append((low, low + 1 / slope))
    for low, high in candidates:
        computed = llama3_factors(theta, head_dim, largest, low, high, original) if low < high else []
        if computed and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, computed, strict=True)):
            bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_type": "llama3", "factor": shortest(largest), **bounds}
    raise keys.wrong("rope_freqs.weight follows no Llama 3 rope scaling, and other rules are not supported.")


def checkpoint_tensors(gguf: GgufFile, config: Mapping[str, Any]) -> list[Target]:
    """Every tensor of the checkpoint, in the file's order. Raises CheckpointError naming missing and unknown ones."""
    targets = _named_targets(config, gguf.tensors)
    known = {target.source for target in targets}
    missing = sorted(name for name in known if name is not None and name not in gguf.tensors)
    unknown = sorted(gguf.tensors.keys() - known - {"rope_freqs.weight"})
    lines = [f"{label}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" for label, names in
             (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
    lines += [
        f"{target.source} has the shape {list(gguf.tensors[target.source].shape)}, expected {list(target.shape)}"
        for target in targets
        if target.source in gguf.tensors and gguf.tensors[target.source].shape != target.shape
    ][:4]
    if lines:
        raise CheckpointError("\n".join([f"{gguf.path} does not hold the tensors of its architecture.", *lines]))
    order = {name: i for i, name in enumerate(gguf.tensors)}
    return sorted(targets, key=lambda target: order.get(target.source or "", len(order)))


def _named_targets(config: Mapping[str, Any], present: Mapping[str, Any]) -> list[Target]:
    """The tensors that `config` asks for; `present` says which biases the file has."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    E, arch = config["head_dim"], config["model_type"]
    Q, K = config["num_attention_heads"] * E, config["num_key_value_heads"] * E
    permuted = arch in ("llama", "mistral")
    targets = [
        Target("model.embed_tokens.weight", "token_embd.weight", (V, D)),
        Target("model.norm.weight", "output_norm.weight", (D,)),
    ]
    if not config["tie_word_embeddings"]:
        targets.append(Target("lm_head.weight", "output.weight", (V, D)))
    rows = {"attn_q": Q, "attn_k": K, "attn_v": K, "attn_output": D, "ffn_gate": F, "ffn_up": F, "ffn_down": D}
    columns = {"attn_output": Q, "ffn_down": F}
    biased = ["attn_q", "attn_k", "attn_v"] if config["attention_bias"] else []
    biased += ["attn_output"] if config["attention_bias"] and permuted else []
    biased += ["ffn_gate", "ffn_up", "ffn_down"] if config["mlp_bias"] else []
    for layer in range(config["num_hidden_layers"]):
        there, here = f"blk.{layer}.", f"model.layers.{layer}."
        norms = {"attn_norm": D, "ffn_norm": D} | ({"attn_q_norm": E, "attn_k_norm": E} if arch == "qwen3" else {})
        targets += [Target(f"{here}{HF_PARTS[n]}.weight", f"{there}{n}.weight", (size,)) for n, size in norms.items()]
        for part, size in rows.items():
            turned = E if permuted and part in ("attn_q", "attn_k") else 0
            shape = (size, columns.get(part, D))
            targets.append(Target(f"{here}{HF_PARTS[part]}.weight", f"{there}{part}.weight", shape, turned))
            if part in biased:
                source = f"{there}{part}.bias"
                exists = source in present or part in ("attn_q", "attn_k", "attn_v")
                targets.append(Target(f"{here}{HF_PARTS[part]}.bias", source if exists else None, (size,), turned))
    return targets


HF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
