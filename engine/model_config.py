"""What config.json and generation_config.json say about a model, checked field by field.

Knows the fields of the supported families and what transformers assumes where one is absent. Knows no weights and
imports no torch. Every value is bounded, so nothing computed from a config can be absurdly large.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.models import check_architecture

MAX_POSITIONS = 2**24  # beyond it float32 positions are no longer exact
DTYPES = ("float32", "float16", "bfloat16")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

# What transformers assumes for a key that is absent from config.json (null is a value of its own).
ABSENT: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `kind` picks the formula in engine/layers/rope.py, which uses the other fields."""

    kind: str = "default"  # one of ROPE_KINDS
    theta: float = 10000.0
    factor: float = 1.0  # how far the window is stretched
    original_window: int = 0  # positions seen in pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn: None derives it from factor and the mscales
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn; 0 is absent
    mscale_all_dim: float = 0.0  # yarn; 0 is absent
    truncate: bool = True  # yarn: whole dimensions bound the ramp


@dataclass(frozen=True)
class ModelConfig:
    """One model's sizes and switches, all checked."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int, ...]  # per layer: how many positions a token sees, itself included; 0 is all
    attention_bias: bool  # as config.json has it; what it means is the family's
    mlp_bias: bool
    tie_word_embeddings: bool
    ties_explicitly: bool  # config.json says so one way or the other
    eos_token_ids: tuple[int, ...]
    dtype: str | None  # one of DTYPES, None where config.json does not say

    @property
    def context_length(self) -> int:
        """Positions the model is made for, rope scaling included."""
        stretched = {
            "linear": self.max_position_embeddings * self.rope.factor,
            "dynamic": self.max_position_embeddings * self.rope.factor,
            "yarn": self.rope.original_window * self.rope.factor,
        }.get(self.rope.kind, 0)
        return min(max(self.max_position_embeddings, int(stretched)), MAX_POSITIONS)


def read_model_config(config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> ModelConfig:
    """The model that a config.json describes. CheckpointError names the field, what it holds and what is expected."""
    architecture = _architecture(config)
    _refuse_quantised(config)
    fields = Fields(ABSENT[architecture] | config)
    hidden_size = fields.integer("hidden_size", 1, 2**17)
    num_layers = fields.integer("num_hidden_layers", 1, 1024)
    num_heads = fields.integer("num_attention_heads", 1, 4096)
    num_kv_heads = fields.integer("num_key_value_heads", 1, 4096, default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})."
        )
    head_dim = _head_dim(fields, hidden_size, num_heads)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    fields.choice("hidden_act", ("silu", "swish"), default="silu")
    vocab_size = fields.integer("vocab_size", 1, 2**24)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, 2**20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, default=1e-6),
        rope=_rope(fields, head_dim, max_positions),
        windows=_windows(architecture, fields, num_layers),
        attention_bias=fields.flag("attention_bias", default=False),
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", default=False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        ties_explicitly=config.get("tie_word_embeddings") is not None,
        eos_token_ids=_eos_token_ids(fields, Fields(generation_config or {}, "generation_config.json"), vocab_size),
        dtype=_dtype(fields),
    )


@dataclass(frozen=True)
class Fields:
    """Typed, bounded reads from a JSON object; null counts as absent. Errors name the file and the field."""

    values: dict[str, Any]
    where: str = "config.json"

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN and infinities fail the comparison
            raise self.fault(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.fault(name, value, "true or false")
        return value

    def choice(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.fault(name, value, f"one of {', '.join(known)}")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.fault(name, value, "an object")
        return value

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def fault(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {shown(value)}; expected {expected}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {name} is missing.")
        return default if value is None else value


def shown(value: Any, limit: int = 80) -> str:
    """A value from a file that nobody vouches for, short and printable."""
    if type(value) is int and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json: architectures is missing; expected a list with the model's class name.")
    try:
        check_architecture(names[0])
    except CheckpointError as error:
        if "auto_map" not in config:
            raise
        raise CheckpointError(f"{error} The folder brings its own code (auto_map); Penstock never runs it.") from None
    return names[0]


def _refuse_quantised(config: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if found is not None:
            method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
            raise CheckpointError(
                f"config.json: {key} says that the weights are quantised ({shown(method)}); "
                "only float32, float16 and bfloat16 weights are served so far. Use the unquantised checkpoint."
            )


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads}), "
            "and head_dim is not given."
        )
    head_dim = fields.integer("head_dim", 2, 1024, default=hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embedding needs an even number.")
    return head_dim


def _rope(fields: Fields, head_dim: int, max_positions: int) -> Rope:
    """From `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`, with its precedence."""
    key = "rope_scaling" if fields.object("rope_scaling") else "rope_parameters"
    rope = Fields(fields.object(key), f"config.json: {key}")
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise CheckpointError(
                f"config.json: {key}.{name[:40]!a} is an object; one rope for all layers is supported."
            )
    partial = (rope if rope.has("partial_rotary_factor") else fields).number("partial_rotary_factor", 0, 1, default=1)
    if partial != 1:
        raise CheckpointError(f"config.json: partial_rotary_factor is {partial:g}; this family rotates whole heads.")
    kind = rope.choice("rope_type" if rope.has("rope_type") else "type", ROPE_KINDS, default="default")
    theta = (rope if rope.has("rope_theta") else fields).number("rope_theta", 1.001, 1e15, default=10000.0)
    if kind == "default":
        return Rope(theta=theta, original_window=max_positions)
    if kind == "dynamic" and head_dim < 4:
        raise CheckpointError(f"config.json: dynamic rope needs a head_dim of at least 4, not {head_dim}.")
    # Phi-3's files keep it beside the scaling; transformers lets that one win.
    window = (fields if fields.has("original_max_position_embeddings") else rope).integer(
        "original_max_position_embeddings", 1, MAX_POSITIONS, default=max_positions
    )
    implied = max_positions / window if kind == "yarn" else None
    factor = rope.number("factor", 1.0, 1e6, default=implied)
    if kind == "llama3":
        return _llama3(rope, theta, factor, window)
    if kind == "yarn":
        return _yarn(rope, theta, factor, window)
    return Rope(kind=kind, theta=theta, factor=factor, original_window=max_positions)


def _llama3(rope: Fields, theta: float, factor: float, window: int) -> Rope:
    low, high = (rope.number(f"{end}_freq_factor", 1e-3, 1e6) for end in ("low", "high"))
    if high <= low:
        raise CheckpointError(f"{rope.where}: high_freq_factor ({high:g}) is not above low_freq_factor ({low:g}).")
    return Rope("llama3", theta, factor, window, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Fields, theta: float, factor: float, window: int) -> Rope:
    found = Rope(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_window=window,
        attention_factor=rope.number("attention_factor", 1e-6, 1e6) if rope.has("attention_factor") else None,
        beta_fast=rope.number("beta_fast", 0, 1e6, default=0.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0, 1e6, default=0.0) or 1.0,
        mscale=rope.number("mscale", 0, 1e3, default=0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0, 1e3, default=0.0),
        truncate=rope.flag("truncate", default=True),
    )
    if found.beta_fast < found.beta_slow:
        raise CheckpointError(
            f"{rope.where}: beta_fast ({found.beta_fast:g}) is below beta_slow ({found.beta_slow:g})."
        )
    return found


def _windows(architecture: str, fields: Fields, num_layers: int) -> tuple[int, ...]:
    """How far each layer looks back. Llama has no windows, Mistral one for all layers, Qwen one for some."""
    if architecture == "LlamaForCausalLM":
        return (0,) * num_layers
    window = fields.integer("sliding_window", 1, 2**31 - 1) if fields.has("sliding_window") else 0
    if architecture == "MistralForCausalLM":
        kinds = fields.values.get("layer_types")
        if isinstance(kinds, list) and any(kind != kinds[0] for kind in kinds):
            raise CheckpointError("config.json: layer_types mixes kinds; MistralForCausalLM has one kind of layer.")
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", default=False):
        window = 0
    if fields.has("layer_types"):
        return _windows_by_type(fields.values["layer_types"], window, num_layers)
    first = fields.integer("max_window_layers", 0, 2**31 - 1, default=28)
    return tuple(window if i >= first else 0 for i in range(num_layers))


def _windows_by_type(kinds: Any, window: int, num_layers: int) -> tuple[int, ...]:
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types is {shown(kinds)}; expected {num_layers} of {' or '.join(known)}."
        )
    if "sliding_attention" in kinds and not window:
        raise CheckpointError("config.json: layer_types has sliding_attention, but no sliding_window is in use.")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _eos_token_ids(config: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    """Every id that either file calls an end, in order, once; ids outside the vocabulary can never be drawn."""
    found: dict[int, None] = {}
    for fields in (generation, config):
        value = fields.values.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1024 or any(type(i) is not int for i in ids):
            raise fields.fault("eos_token_id", value, "an integer or a list of integers")
        found |= {i: None for i in ids if 0 <= i < vocab_size}
    return tuple(found)


def _dtype(fields: Fields) -> str | None:
    for name in ("dtype", "torch_dtype"):
        value = fields.values.get(name)
        if value is not None and value != "auto":
            if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
                raise fields.fault(name, value, f"one of {', '.join(DTYPES)}")
            return value.removeprefix("torch.")
    return None
