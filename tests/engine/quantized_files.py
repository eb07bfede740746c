"""Tiny checkpoints in every quantised format: what a format stores for a weight, and the weight that it stands for.

The format's own library writes and reads where it runs without a GPU; else the definition is written out here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

GROUP = 32
Stored = tuple[dict[str, Tensor], Tensor]  # suffix -> tensor; the float32 weight that they stand for
Writer = Callable[[Tensor], Stored]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Integers [..., M] as int32 [..., M * bits / 32], least significant first."""
    per = 32 // bits
    shifts = torch.arange(per, dtype=torch.int64) * bits
    words = (codes.long().unflatten(-1, (-1, per)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def affine(weight: Tensor, bits: int, group_of: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, K], scales float16 [N, groups], zeros [N, groups]) near a weight."""
    groups = int(group_of.max()) + 1
    scales, zeros = torch.empty(len(weight), groups), torch.empty(len(weight), groups)
    for g in range(groups):
        part = weight[:, group_of == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, g] = (part.abs().amax(1) * 2 if symmetric else high - low) / (2**bits - 1)
        zeros[:, g] = 2 ** (bits - 1) if symmetric else (-low / scales[:, g]).round().clamp(1, 2**bits - 1)
    scales = scales.half()
    codes = (weight / scales.float()[:, group_of] + zeros[:, group_of]).round().clamp(0, 2**bits - 1)
    return codes, scales, zeros


def gptq(bits: int, *, symmetric: bool, act_order: bool, version: int = 1) -> Writer:
    def write(weight: Tensor) -> Stored:
        k = weight.shape[1]
        group_of = torch.arange(k) // GROUP
        if act_order:  # the same for all weights of so many inputs, as for projections that share them
            group_of = group_of[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes, scales, zeros = affine(weight, bits, group_of, symmetric)
        tensors = {
            "qweight": pack_words(codes, bits).T.contiguous(),
            "qzeros": pack_words(zeros.T.contiguous() - (1 if version == 1 else 0), bits),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.int(),
        }
        return tensors, scales.float()[:, group_of] * (codes - zeros[:, group_of])

    return write


def awq(weight: Tensor) -> Stored:
    group_of = torch.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = affine(weight, 4, group_of, symmetric=False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # AutoAWQ packs column order[i] as the i-th of a word

    def pack(columns: Tensor) -> Tensor:
        return pack_words(columns.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales.T.contiguous()}
    return tensors, scales.float()[:, group_of] * (codes - zeros[:, group_of])


def fp8_blocks(rows: int, columns: int) -> Writer:
    def write(weight: Tensor) -> Stored:
        n, k = weight.shape
        scale = torch.rand(-(-n // rows), -(-k // columns)) * 0.01 + 0.002
        spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread

    return write


def fp8_tensor(weight: Tensor) -> Stored:
    scale = weight.abs().max() / 448
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, codes.float() * scale


def four_bits(kind: str, *, nested: bool) -> Writer:
    def write(weight: Tensor) -> Stored:
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return tensors, bnb.dequantize_4bit(packed, state)

    return write


def eight_bits(weight: Tensor) -> Stored:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    found = bnb.int8_vectorwise_dequant(codes, scales)
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, found


def compressed(format: str, **args: Any) -> Writer:
    """By compressed-tensors' own compressor."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(format)
    weights = scheme.weights
    assert weights is not None

    def write(weight: Tensor) -> Stored:
        n, k = weight.shape
        size = weights.group_size if weights.strategy == "group" else k
        assert size is not None
        parts = weight.unflatten(1, (-1, size))
        most = 448.0 if weights.type == "float" else 2.0 ** (weights.num_bits - 1) - 1
        state: dict[str, Tensor] = {"weight": weight}
        if weights.strategy == "block":
            assert weights.block_structure is not None
            rows, columns = weights.block_structure
            state["weight_scale"] = torch.rand(-(-n // rows), -(-k // columns)) * 0.01 + 0.002
        elif weights.strategy == "tensor":
            state["weight_scale"] = weight.abs().max().reshape(1) / most
        elif weights.symmetric:
            state["weight_scale"] = parts.abs().amax(-1) / most
        else:
            low, high = parts.amin(-1), parts.amax(-1)
            state["weight_scale"] = (high - low) / (2 * most + 1)
            zeros = (-low / state["weight_scale"]).round() - most - 1
            state["weight_zero_point"] = zeros.clamp(-most - 1, most).to(torch.int8)
        if format == "mxfp4-pack-quantized":
            state["weight_scale"] = 2.0 ** torch.randint(-6, 0, (n, k // 32))
        stored = compressor.compress(dict(state), scheme)
        again = compressor.decompress(dict(stored), scheme)
        return {name: part.contiguous() for name, part in stored.items()}, again["weight"].float()

    return write


def groups(format: str, **args: Any) -> dict[str, Any]:
    group = {"targets": ["re:.*self_attn.(q|k|v|o)_proj$", "Linear"], "weights": {"dynamic": False, **args}}
    group["input_activations"] = {"num_bits": 8, "type": args["type"], "dynamic": True, "strategy": "token"}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head", "re:.*router$"],
            "config_groups": {"group_0": group}, "quantization_status": "compressed"}  # fmt: skip


def _compressed(format: str, **args: Any) -> tuple[dict[str, Any], Writer]:
    return groups(format, **args), compressed(format, **args)


def _gptq(bits: int, **options: Any) -> tuple[dict[str, Any], Writer]:
    version = options.get("version", 1)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": options["symmetric"],
                "desc_act": options["act_order"], "damp_percent": 0.1}  # fmt: skip
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    return settings, gptq(bits, **options)


_BNB = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}
_INT = {"type": "int"}
_FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
# name -> quantization_config, and how a weight is stored
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq-4": _gptq(4, symmetric=True, act_order=False),
    "gptq-4-asymmetric": _gptq(4, symmetric=False, act_order=False),
    "gptq-8-desc_act": _gptq(8, symmetric=True, act_order=True),
    "gptq-4-desc_act-v2": _gptq(4, symmetric=False, act_order=True, version=2),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    "fp8-blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 128], "scale_fmt": "ue8m0",
                    "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}, fp8_blocks(64, 128)),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "bnb-nf4": ({**_BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, four_bits("nf4", nested=False)),
    "bnb-nf4-double": ({**_BNB, "bnb_4bit_use_double_quant": True}, four_bits("nf4", nested=True)),
    "bnb-fp4": ({**_BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, four_bits("fp4", nested=False)),
    "bnb-int8": ({**_BNB, "load_in_8bit": True}, eight_bits),
    "w4a16-group": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, **_INT),
    "w4a16-asymmetric": _compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False, **_INT
    ),
    "w4a16-channel": _compressed("pack-quantized", num_bits=4, strategy="channel", **_INT),
    "w8a16-packed": _compressed("pack-quantized", num_bits=8, strategy="group", group_size=GROUP, **_INT),
    "w8a8": _compressed("int-quantized", num_bits=8, strategy="channel", **_INT),
    "w8a8-asymmetric": _compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False, **_INT),
    "float8-tensor": _compressed("float-quantized", strategy="tensor", **_FP8),
    "float8-channel": _compressed("float-quantized", strategy="channel", **_FP8),
    "float8-block": _compressed("float-quantized", strategy="block", block_structure=[32, 16], **_FP8),
    "mxfp4": _compressed("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32),
}  # fmt: skip


def write_quantized(folder: Path, model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model's linear layers in a format, as a folder; the model itself gets the weights that are stored."""
    settings, write = FORMATS[name]
    tensors: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():
        if path.endswith("_proj.weight"):
            parts, meant = write(parameter.detach())
            tensors |= {f"{path.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
            parameter.data.copy_(meant)
        else:
            tensors[path] = parameter.detach().clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = model.config.to_dict() | {"torch_dtype": "float32", "quantization_config": settings}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    return model
