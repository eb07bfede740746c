"""Angles of rotary position embedding as one table of cosines and sines, computed as transformers does, in float32.

Knows the scalings: default, linear, dynamic (NTK), llama3, yarn, longrope. Knows neither heads nor caches:
kernels/rope_kv.py applies the table.

The table is a function of the position alone, so that chunks, cached prefixes and neighbours cannot change a token's
angles. For `dynamic` that fixes what a position beyond the original window means: position p uses the base for a
sequence of p + 1 tokens, which is what transformers does when it decodes token by token. (Given a longer prompt at
once, transformers turns all its positions by the base for the whole prompt, and keeps what it cached by other bases.)
For `longrope` the table's size decides: one that reaches past the original window has the long factors everywhere, as
a sequence of that length has in transformers; a server whose context stays within it has the short ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.rope_config import Rope

CHUNK = 8192  # positions at a time, so that the temporaries stay small beside the table

# P positions, F = rot / 2 frequencies


class RotaryTable:
    """cos_sin float32 [positions, rot], cosines first; shared by layers, filled by `build` when sizes are known.

    Without a rope rot is 0: nothing is turned. q_scale float32 [positions], where queries are scaled by position.
    """

    __slots__ = ("cos_sin", "q_scale", "rope")

    def __init__(self, rope: Rope | None) -> None:
        self.rope = rope
        self.cos_sin = torch.empty(0, rope.rotary if rope else 0)
        self.q_scale: Tensor | None = None

    def build(self, num_positions: int, device: torch.device) -> None:
        table = cos_sin_table(self.rope, num_positions) if self.rope else torch.empty(num_positions, 0)
        self.cos_sin = table.to(device)
        if self.rope and self.rope.q_scale_beta:
            turns = torch.floor(torch.arange(num_positions) / self.rope.original_window)
            self.q_scale = (1 + self.rope.q_scale_beta * torch.log(1 + turns)).to(device)


def cos_sin_table(rope: Rope, num_positions: int) -> Tensor:
    """float32 [num_positions, rot]: cosines, then sines, of rot / 2 angles, times the attention factor."""
    rot = rope.rotary
    table = torch.empty(num_positions, rot)
    scale = attention_factor(rope)
    if rope.kind == "longrope" and num_positions <= rope.original_window:
        rope = replace(rope, long_factors=rope.short_factors)
    for positions in torch.arange(num_positions).split(CHUNK):
        angles_PF = positions[:, None].float() * SCALINGS[rope.kind](rope, rot, positions)
        rows = slice(int(positions[0]), int(positions[-1]) + 1)
        table[rows] = torch.cat([angles_PF.cos() * scale, angles_PF.sin() * scale], dim=-1)
    return table


def attention_factor(rope: Rope) -> float:
    """The temperature on q and k of yarn and longrope.

    Peng et al. 2023, arXiv 2309.00071, section 3.4, with mscale as in DeepSeek-V2; Ding et al. 2024, arXiv 2402.13753.
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_window))
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _powers(theta: float | Tensor, rot: int) -> Tensor:
    """theta^(2i / rot), i < rot / 2. Su et al. 2021, arXiv 2104.09864."""
    return theta ** (torch.arange(0, rot, 2, dtype=torch.float) / rot)


def _default(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    return 1.0 / _powers(rope.theta, rot)


def _linear(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    return 1.0 / _powers(rope.theta, rot) / rope.factor


def _dynamic(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    """A base that grows with the length once the original window is full; see the module's docstring."""
    window = rope.original_window
    lengths_P1 = (positions + 1).clamp(min=window)[:, None]
    stretch_P1 = (rope.factor * lengths_P1 / window) - (rope.factor - 1)
    inside = 1.0 / _powers(rope.theta, rot)
    beyond = 1.0 / _powers(rope.theta * stretch_P1 ** (rot / (rot - 2)), rot)
    return torch.where(lengths_P1 > window, beyond, inside)


def _llama3(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    inverse = 1.0 / _powers(rope.theta, rot)
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > rope.original_window / rope.low_freq_factor, inverse / rope.factor, inverse)
    smooth = rope.original_window / wavelength - rope.low_freq_factor
    smooth = smooth / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    long = wavelength > rope.original_window / rope.low_freq_factor
    short = wavelength < rope.original_window / rope.high_freq_factor
    return torch.where(long | short, stretched, between)


def _yarn(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    """A ramp over the dimensions from kept to stretched. Peng et al. 2023, arXiv 2309.00071, section 3.2."""
    powers = _powers(rope.theta, rot)
    kept, stretched = 1.0 / powers, 1.0 / (rope.factor * powers)
    low, high = (_dimension_of(turns, rope, rot) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rot - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(rot // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    return stretched * (1 - keep) + kept * keep


def _longrope(rope: Rope, rot: int, positions: Tensor) -> Tensor:
    """A divisor of its own for each frequency. Ding et al. 2024, arXiv 2402.13753."""
    return 1.0 / (torch.tensor(rope.long_factors) * _powers(rope.theta, rot))


def _dimension_of(turns: float, rope: Rope, rot: int) -> float:
    """The dimension that turns so often within the original window."""
    return rot * math.log(rope.original_window / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


SCALINGS: dict[str, Callable[[Rope, int, Tensor], Tensor]] = {  # radians per position: float32 [F] or [P, F]
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
