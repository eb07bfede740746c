"""AWQ's layout, as AutoAWQ writes it: 4-bit integers, N packed in words. Lin et al. 2023, arXiv 2306.00978.

    w[n, k] = scales[k // G, n] * (code[k, n] - zero[k // G, n])

`qweight` int32 [K, N / 8], `qzeros` int32 [K / G, N / 8], `scales` [K / G, N]. The eight codes of a word, least
significant first, are its columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.quantization import FLOATS, Headers, Scheme, Stored, check_group, refuse_unknown
from engine.quantization.integers import split_words, with_zeros

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word a column's code is
UNDERSTOOD = {"quant_method", "bits", "w_bit", "group_size", "q_group_size", "version", "zero_point",
              "checkpoint_format", "format", "desc_act", "sym", "pack_dtype", "lm_head"}  # fmt: skip
# which layers are quantised is seen from the tensors; the rest is how others compute
IRRELEVANT = {"modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
              "meta", "dynamic_bits", "quantizer", "method"}  # fmt: skip


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`: what has a `qweight` is packed."""
    refuse_unknown(fields, UNDERSTOOD | IRRELEVANT)
    fields = fields.renamed({"w_bit": "bits", "q_group_size": "group_size"})
    fields.only("bits", 4, "AWQ weights of 4 bits are supported")
    if fields.has("version"):
        version = str(fields.values["version"]).lower()
        if version != "gemm":
            raise fields.fault("version", fields.values["version"], "gemm")
    fields.only("zero_point", True, "only AWQ with zero points is supported")
    fields.only("desc_act", False, "AWQ's groups follow each other")
    group = check_group(fields, "group_size", fields.integer("group_size", -1, 1 << 20, default=128))

    def stored(name: str, n: int, k: int) -> Stored:
        groups = 1 if group == -1 else -(-k // group)
        return {
            f"{name}.qweight": ((k, n // 8), ("I32",)),
            f"{name}.qzeros": ((groups, n // 8), ("I32",)),
            f"{name}.scales": ((groups, n), FLOATS),
        }

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        codes = _columns(get(f"{name}.qweight")).T.contiguous()
        zeros = _columns(get(f"{name}.qzeros")).T.int()
        return with_zeros(codes, get(f"{name}.scales").T, zeros, k if group == -1 else group, 4)

    made = Scheme("AWQ 4-bit", 4 + (64 / group if group > 0 else 0.0), stored, read)
    return lambda name: made if f"{name}.qweight" in tensors else None


def _columns(words: Tensor) -> Tensor:
    """int32 [A, N / 8] -> uint8 [A, N]."""
    return split_words(words, 4)[..., list(PLACES)].flatten(1)
