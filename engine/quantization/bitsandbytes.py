"""bitsandbytes: NF4 and FP4 in blocks, perhaps with scales that are quantised themselves, and LLM.int8.

4 bits (Dettmers et al. 2023, arXiv 2305.14314): `weight` uint8 [N * K / 2, 1], the earlier code in the high half of a
byte; a block is of `blocksize` weights that follow each other in the flattened matrix, `weight.absmax` its scale. Where
that is uint8 it stands for weight.nested_quant_map[absmax] * weight.nested_absmax[block of 256] + nested_offset.
8 bits (Dettmers et al. 2022, arXiv 2208.07339): `weight` int8 [N, K], `SCB` [N]: w = weight * SCB / 127. Outliers among
activations need no care here, since activations are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.errors import CheckpointError
from engine.quantization import FLOATS, Headers, Scheme, Stored, refuse_unknown
from engine.quantization.integers import codes_of
from engine.tensor_file import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE_BYTES = 10_000
STATE = "weight.quant_state.bitsandbytes__"
INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
UNDERSTOOD = {"quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
              "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"}  # fmt: skip
# which layers are quantised is seen from the tensors; the rest is how others compute
IRRELEVANT = {"bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
              "llm_int8_skip_modules", "llm_int8_threshold", "modules_to_not_convert", "target_parameters"}  # fmt: skip


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`: what has a quantisation state or an SCB is packed."""
    refuse_unknown(fields, UNDERSTOOD | IRRELEVANT)
    fields.only("bnb_4bit_quant_storage", "uint8", "only bytes are supported, as which to store the weights")
    made = {kind: _four_bits(kind, tensors) for kind in ("nf4", "fp4")}
    eight = _eight_bits(tensors)

    def scheme_of(name: str) -> Scheme | None:
        if f"{name}.SCB" in tensors:
            return eight
        return next((scheme for kind, scheme in made.items() if f"{name}.{STATE}{kind}" in tensors), None)

    return scheme_of


def _four_bits(kind: str, tensors: Headers) -> Scheme:
    def stored(name: str, n: int, k: int) -> Stored:
        absmax = f"{name}.weight.absmax"
        blocks = tensors[absmax].shape[0] if absmax in tensors and len(tensors[absmax].shape) == 1 else 0
        if blocks not in {-(-n * k // size) for size in BLOCK_SIZES}:
            blocks = -(-n * k // 64)
        state = tensors[f"{name}.{STATE}{kind}"]
        length = min(state.shape[0] if state.shape else 0, MAX_STATE_BYTES)
        found: Stored = {
            f"{name}.weight": ((-(-n * k // 2), 1), ("U8",)),
            absmax: ((blocks,), ("F32",)),
            f"{name}.weight.quant_map": ((16,), ("F32",)),
            f"{name}.{STATE}{kind}": ((length,), ("U8",)),
        }
        nested = f"{name}.weight.nested_absmax"
        if nested in tensors:
            found[absmax] = ((blocks,), ("U8",))
            found[nested] = ((-(-blocks // 256),), ("F32",))
            found[f"{name}.weight.nested_quant_map"] = ((256,), ("F32",))
        return found

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        import torch

        from kernels.quantized import Quantized, value_table

        state = parse_json(bytes(get(f"{name}.{STATE}{kind}").numpy()), f"{name}.{STATE}{kind}")
        size = Fields(state, f"{name}.weight.quant_state").integer("blocksize", 1, 1 << 20)
        scales = _scales(name, Fields(state, f"{name}.weight.quant_state"), get)
        if len(scales) != -(-n * k // size) or list(state.get("shape") or []) != [n, k]:
            raise CheckpointError(f"{name}.weight.quant_state: blocksize or shape do not fit a weight of {[n, k]}.")
        if not torch.equal(get(f"{name}.weight.quant_map"), value_table(kind, 4)):
            raise CheckpointError(f"{name}.weight.quant_map: it is not the table of {kind}.")
        data = get(f"{name}.weight").flatten()
        codes = torch.stack([data >> 4, data & 15], dim=-1).flatten()[: n * k].view(n, k)
        group = math.gcd(size, k)  # blocks go on from row to row; these parts of them do not
        return Quantized(
            codes, scales.repeat_interleave(size // group)[: n * k // group].view(n, -1), None, group, 4, kind
        )

    return Scheme(f"bitsandbytes {kind.upper()}", 4 + 32 / 64, stored, read)


def _scales(name: str, state: Fields, get: Callable[[str], Tensor]) -> Tensor:
    """float32 [blocks]."""
    import torch

    absmax = get(f"{name}.weight.absmax")
    if absmax.dtype is torch.float32:
        return absmax
    size = state.integer("nested_blocksize", 256, 256)
    nested = get(f"{name}.weight.nested_absmax").repeat_interleave(size)[: len(absmax)]
    found = get(f"{name}.weight.nested_quant_map")[absmax.long()] * nested
    return found + state.number("nested_offset", -1e30, 1e30)


def _eight_bits(tensors: Headers) -> Scheme:
    def stored(name: str, n: int, k: int) -> Stored:
        found: Stored = {f"{name}.weight": ((n, k), ("I8",)), f"{name}.SCB": ((n,), FLOATS)}
        if f"{name}.weight_format" in tensors:
            found[f"{name}.weight_format"] = ((), ("U8",))
        return found

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        from kernels.quantized import Quantized

        if f"{name}.weight_format" in tensors and int(get(f"{name}.weight_format")) != 0:
            raise CheckpointError(f"{name}.weight_format: only rows (0) are supported.")
        scales = get(f"{name}.SCB").float() * INT8_STEP
        return Quantized(codes_of(get(f"{name}.weight")), scales[:, None], None, k, 8, "signed")

    return Scheme("bitsandbytes LLM.int8", 8.0, stored, read)
