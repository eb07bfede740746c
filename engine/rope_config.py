"""How a config.json says that positions become angles: its rope fields under their old and new names, checked.

Knows the scalings by name and their parameters; the formulas are engine/layers/rope.py's. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config_fields import Fields
from engine.errors import CheckpointError

MAX_POSITIONS = 2**24  # beyond it float32 positions are no longer exact
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
OLD_NAMES = {"su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `kind` picks the formula in engine/layers/rope.py, which uses the other fields."""

    rotary: int  # features of a head that are turned, its first ones; even
    kind: str = "default"  # one of ROPE_KINDS
    theta: float = 10000.0
    factor: float = 1.0  # how far the window is stretched
    original_window: int = 0  # positions seen in pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, longrope: None derives it from factor (and yarn's mscales)
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn; 0 is absent
    mscale_all_dim: float = 0.0  # yarn; 0 is absent
    truncate: bool = True  # yarn: whole dimensions bound the ramp
    short_factors: tuple[float, ...] = ()  # longrope: rotary / 2 divisors of the frequencies within original_window
    long_factors: tuple[float, ...] = ()  # longrope: beyond it
    interleaved: bool = False  # a feature is turned with its neighbour, not with the one rotary / 2 further
    q_scale_beta: float = 0.0  # Llama 4, Ministral 3: q at p is scaled by 1 + beta log(1 + floor(p / original_window))

    def context_length(self, max_positions: int) -> int:
        """Positions the model is made for, scaling included."""
        stretched = {
            "linear": max_positions * self.factor,
            "dynamic": max_positions * self.factor,
            "yarn": self.original_window * self.factor,
        }.get(self.kind, 0)
        return min(max(max_positions, int(stretched)), MAX_POSITIONS)


def read_rope(fields: Fields, head_dim: int, max_positions: int, *, partial: bool = False) -> Rope:
    """One rope for all layers: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

    partial: the family may rotate only the first features of a head.
    """
    parameters = rope_parameters(fields)
    for name, value in parameters.values.items():
        if isinstance(value, dict):
            raise CheckpointError(
                f"{parameters.where}.{name[:40]!a} is an object; one rope for all layers is supported."
            )
    return _read(parameters, fields, head_dim, max_positions, partial)


def read_ropes(fields: Fields, head_dim: int, max_positions: int, thetas: dict[str, float]) -> dict[str, Rope]:
    """A rope for each kind of layer; `thetas` are the bases where config.json gives none.

    `rope_scaling` means the layers of "full_attention"; `rope_parameters` has an object for each kind.
    """
    scaling = Fields(fields.object("rope_scaling"), f"{fields.where}: rope_scaling")
    nested = Fields(fields.object("rope_parameters"), f"{fields.where}: rope_parameters")
    if nested.values and not any(kind in nested.values for kind in thetas):
        raise CheckpointError(f"{nested.where} has no object for {' or '.join(thetas)}.")
    ropes = {}
    for kind, theta in thetas.items():
        parameters = Fields(nested.object(kind), f"{nested.where}.{kind}")
        if kind == "full_attention" and scaling.values:
            parameters = Fields(parameters.values | scaling.values, scaling.where)
        with_theta = Fields({"rope_theta": theta} | parameters.values, parameters.where)
        ropes[kind] = _read(with_theta, fields, head_dim, max_positions, partial=False)
    return ropes


def interleaved(ropes: tuple[Rope | None, ...]) -> tuple[Rope | None, ...]:
    """The same ropes, each turning a feature with its neighbour."""
    return tuple(replace(rope, interleaved=True) if rope else None for rope in ropes)


def rope_parameters(fields: Fields) -> Fields:
    """The object with the scaling's parameters, with transformers' precedence."""
    key = "rope_scaling" if fields.object("rope_scaling") else "rope_parameters"
    return Fields(fields.object(key), f"{fields.where}: {key}")


def _read(rope: Fields, fields: Fields, head_dim: int, max_positions: int, partial: bool) -> Rope:
    rotary = _rotary(rope, fields, head_dim, partial)
    named = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.choice(named, (*ROPE_KINDS, *OLD_NAMES), default="default")
    kind = OLD_NAMES.get(kind, kind)
    theta = (rope if rope.has("rope_theta") else fields).number("rope_theta", 1.001, 1e15, default=10000.0)
    if kind == "default":
        return Rope(rotary, theta=theta, original_window=max_positions)
    if kind == "dynamic" and rotary < 4:
        raise CheckpointError(f"{fields.where}: dynamic rope needs at least 4 features to rotate, not {rotary}.")
    # Phi-3's files keep it beside the scaling; transformers lets that one win.
    window = (fields if fields.has("original_max_position_embeddings") else rope).integer(
        "original_max_position_embeddings", 1, MAX_POSITIONS, default=max_positions
    )
    implied = max(1.0, max_positions / window) if kind in ("yarn", "longrope") else None
    factor = rope.number("factor", 1.0, 1e6, default=implied)
    if kind == "llama3":
        return _llama3(rope, rotary, theta, factor, window)
    if kind == "yarn":
        return _yarn(rope, rotary, theta, factor, window)
    if kind == "longrope":
        return _longrope(rope, rotary, theta, factor, window)
    return Rope(rotary, kind, theta, factor, original_window=max_positions)


def _rotary(rope: Fields, fields: Fields, head_dim: int, partial: bool) -> int:
    share = (rope if rope.has("partial_rotary_factor") else fields).number("partial_rotary_factor", 0, 1, default=1)
    if share != 1 and not partial:
        raise CheckpointError(f"{fields.where}: partial_rotary_factor is {share:g}; this family rotates whole heads.")
    rotary = int(head_dim * share)
    if rotary % 2 or not rotary:
        raise CheckpointError(
            f"{fields.where}: head_dim is {head_dim} and partial_rotary_factor {share:g}; rotary embedding needs an "
            "even number of features."
            if partial
            else f"{fields.where}: head_dim is {head_dim}; rotary embedding needs an even number."
        )
    return rotary


def _llama3(rope: Fields, rotary: int, theta: float, factor: float, window: int) -> Rope:
    low, high = (rope.number(f"{end}_freq_factor", 1e-3, 1e6) for end in ("low", "high"))
    if high <= low:
        raise CheckpointError(f"{rope.where}: high_freq_factor ({high:g}) is not above low_freq_factor ({low:g}).")
    return Rope(rotary, "llama3", theta, factor, window, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Fields, rotary: int, theta: float, factor: float, window: int) -> Rope:
    found = Rope(
        rotary,
        kind="yarn",
        theta=theta,
        factor=factor,
        original_window=window,
        attention_factor=_attention_factor(rope),
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


def _longrope(rope: Fields, rotary: int, theta: float, factor: float, window: int) -> Rope:
    if window < 2:
        raise CheckpointError(f"{rope.where}: longrope needs original_max_position_embeddings above 1, not {window}.")
    return Rope(
        rotary,
        kind="longrope",
        theta=theta,
        factor=factor,
        original_window=window,
        attention_factor=_attention_factor(rope),
        short_factors=rope.numbers("short_factor", rotary // 2, 1e-6, 1e6),
        long_factors=rope.numbers("long_factor", rotary // 2, 1e-6, 1e6),
    )


def _attention_factor(rope: Fields) -> float | None:
    return rope.number("attention_factor", 1e-6, 1e6) if rope.has("attention_factor") else None
