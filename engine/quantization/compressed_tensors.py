"""compressed-tensors, as llm-compressor writes it: integers, packed or not, FP8 and MXFP4. Its repository's docs.

A config group says how its targets' weights are stored: pack-quantized is `weight_packed` int32 with `weight_scale` per
group or channel and perhaps a packed `weight_zero_point`; int-quantized int8 and float-quantized e4m3 `weight` with
scales; mxfp4-pack-quantized two 4-bit floats to a byte. Activations are not rounded, whatever input_activations says
(W8A8 is computed as W8A16), nor is the cache: a result is never less exact for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config_fields import Fields
from engine.errors import CheckpointError
from engine.quantization import FLOATS, WHERE, Headers, Scheme, Stored, check_group, refuse_unknown, stored_shape
from engine.quantization.fp8 import scaled_floats
from engine.quantization.integers import codes_of, scale_dtype, split_words, with_zeros
from engine.tensor_file import printable

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")
UNDERSTOOD = {"quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status"}
IRRELEVANT = {"global_compression_ratio", "version"}
OF_GROUP = {"targets", "weights", "input_activations", "format"}
OF_WEIGHTS = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
              "scale_dtype", "zp_dtype", "observer", "observer_kwargs"}  # fmt: skip
MAX_PATTERN, MAX_REPEATS, MAX_GROUPS, MAX_NAMES = 200, 4, 100, 20_000


@dataclass(frozen=True)
class Names:
    """Modules by name, by regular expression ("re:...") or by the class Linear."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    all_linears: bool

    def match(self, name: str) -> bool:
        return self.all_linears or name in self.exact or any(pattern.match(name) for pattern in self.patterns)


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`: the first group whose target a weight is and whose tensors it has."""
    refuse_unknown(fields, UNDERSTOOD | IRRELEVANT)
    fields.choice("quantization_status", ("compressed", "frozen"), "compressed")
    ignored = _names(fields, "ignore")
    groups = fields.object("config_groups")
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise CheckpointError(f"{WHERE}: config_groups should have 1 to {MAX_GROUPS} entries, not {len(groups)}.")
    found: list[tuple[Names, str, Scheme]] = []
    for key, group in groups.items():
        where = f"{WHERE}: config_groups.{printable(key)}"
        if not isinstance(group, dict):
            raise CheckpointError(f"{where}: presets are not supported; expected an object.")
        own = Fields(group, where)
        refuse_unknown(own, OF_GROUP)
        written = own.choice("format", FORMATS, None if not fields.has("format") else str(fields.values["format"]))
        found.append((_names(own, "targets"), *_scheme(written, Fields(own.object("weights"), where), tensors)))

    def scheme_of(name: str) -> Scheme | None:
        if ignored.match(name):
            return None
        fitting = (made for names, mark, made in found if f"{name}.{mark}" in tensors and names.match(name))
        return next(fitting, None)

    return scheme_of


def _names(fields: Fields, field: str) -> Names:
    """A list of targets. Patterns that could take forever are refused."""
    given = fields.values.get(field) or []
    if not isinstance(given, list) or len(given) > MAX_NAMES or not all(isinstance(item, str) for item in given):
        raise CheckpointError(f"{fields.where}: {field} should be a list of names.")
    patterns = []
    for text in (item.removeprefix("re:") for item in given if item.startswith("re:")):
        # without repeated parentheses and with few repetitions, a match takes polynomial time
        harmless = len(text) <= MAX_PATTERN and len(re.findall(r"[*+{]", text)) <= MAX_REPEATS
        try:
            if not harmless or re.search(r"\)[*+?{]|\\\d", text):
                raise re.error("too complex")
            patterns.append(re.compile(text))
        except (re.error, OverflowError, RecursionError):
            raise CheckpointError(f"{fields.where}: {field}: {printable(text)} is no pattern that is tried.") from None
    return Names(frozenset(given), tuple(patterns), field == "targets" and "Linear" in given)


def _scheme(written: str, weights: Fields, tensors: Headers) -> tuple[str, Scheme]:
    """(suffix of the tensor by which one knows that a weight is stored so, how)."""
    refuse_unknown(weights, OF_WEIGHTS)
    kind, bits = weights.choice("type", ("int", "float"), "int"), weights.integer("num_bits", 1, 64, 8)
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"))
    weights.only("dynamic", False, "weights cannot be quantised while they are used")
    if weights.values.get("actorder") in ("group", True):
        raise weights.fault("actorder", weights.values["actorder"], "weight, static or none")
    group = -1
    if strategy == "group":
        group = check_group(weights, "group_size", weights.integer("group_size", -1, 1 << 20))
    symmetric = weights.flag("symmetric", default=True)
    if written == "mxfp4-pack-quantized" and (kind, bits, group, symmetric) == ("float", 4, 32, True):
        return "weight_packed", _mxfp4()
    if written == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("channel", "group"):
        return "weight_packed", _packed_integers(bits, group, symmetric)
    if written in ("int-quantized", "naive-quantized") and (kind, bits) == ("int", 8) and strategy != "block":
        return "weight_scale", _integers(group, tensors)
    if written in ("float-quantized", "naive-quantized") and (kind, bits, symmetric) == ("float", 8, True):
        if strategy == "group":
            return "weight_scale", scaled_floats(tensors, (1, group))
        block = None
        if strategy == "block":
            rows, columns = weights.numbers("block_structure", 2, 1, 1 << 20)
            block = (int(rows), int(columns))
        return "weight_scale", scaled_floats(tensors, block)
    what = f"{'' if symmetric else 'a'}symmetric {bits}-bit {kind} weights per {strategy}"
    raise CheckpointError(f"{weights.where}: {written} with {what} is not supported.")


def _packed_integers(bits: int, group: int, symmetric: bool) -> Scheme:
    def sizes(n: int, k: int) -> tuple[int, int]:
        per_word = 32 // bits
        return -(-k // per_word), 1 if group == -1 else -(-k // group)

    def stored(name: str, n: int, k: int) -> Stored:
        words, groups = sizes(n, k)
        found: Stored = {
            f"{name}.weight_packed": ((n, words), ("I32",)),
            f"{name}.weight_scale": ((n, groups), FLOATS),
            f"{name}.weight_shape": ((2,), ("I64", "I32")),
        }
        if not symmetric:
            found[f"{name}.weight_zero_point"] = ((-(-n * bits // 32), groups), ("I32",))
        return found

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        from kernels.quantized import Quantized

        if get(f"{name}.weight_shape").tolist() != [n, k]:
            raise CheckpointError(f"{name}.weight_shape should be {[n, k]}.")
        codes = split_words(get(f"{name}.weight_packed"), bits).flatten(1)[:, :k].contiguous()
        scales, size = get(f"{name}.weight_scale"), k if group == -1 else group
        if symmetric:
            return Quantized(codes, scale_dtype(scales), None, size, bits, "signed")
        zeros = split_words(get(f"{name}.weight_zero_point"), bits).transpose(1, 2).flatten(0, 1)[:n]
        return with_zeros(codes, scales, zeros.int(), size, bits)

    share = (16 if symmetric else 64) / group if group > 0 else 0.0
    return Scheme(f"compressed-tensors W{bits}A16", bits + share, stored, read)


def _integers(group: int, tensors: Headers) -> Scheme:
    def shape(name: str, part: str, n: int, k: int) -> tuple[int, ...]:
        per_group: tuple[int, ...] = (n, 1 if group == -1 else -(-k // group))
        return stored_shape(tensors, f"{name}.{part}", per_group, (1,), (), (1, 1), (n,))

    def stored(name: str, n: int, k: int) -> Stored:
        found: Stored = {
            f"{name}.weight": ((n, k), ("I8",)),
            f"{name}.weight_scale": (shape(name, "weight_scale", n, k), FLOATS),
        }
        if f"{name}.weight_zero_point" in tensors:
            found[f"{name}.weight_zero_point"] = (shape(name, "weight_zero_point", n, k), ("I8",))
        return found

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        from kernels.quantized import Quantized

        groups = 1 if group == -1 else -(-k // group)

        def spread(part: Tensor) -> Tensor:
            return part if part.shape == (n, groups) else part.reshape(-1, 1).expand(n, groups)

        codes, scales = codes_of(get(f"{name}.weight")), spread(get(f"{name}.weight_scale"))
        size: Any = k if group == -1 else group
        if f"{name}.weight_zero_point" in tensors:
            zeros = spread(get(f"{name}.weight_zero_point")).int() + 128
            return with_zeros(codes, scales, zeros, size, 8)
        return Quantized(codes, scale_dtype(scales), None, size, 8, "signed")

    return Scheme("compressed-tensors int8", 8 + (32 / group if group > 0 else 0.0), stored, read)


def _mxfp4() -> Scheme:
    def stored(name: str, n: int, k: int) -> Stored:
        return {
            f"{name}.weight_packed": ((n, k // 2), ("U8",)),
            f"{name}.weight_scale": ((n, k // 32), ("U8", "F8_E8M0")),
        }

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        from engine.quantization.mxfp4 import from_blocks

        return from_blocks(get(f"{name}.weight_packed"), get(f"{name}.weight_scale"))

    return Scheme("MXFP4", 4 + 32 / 32, stored, read)
