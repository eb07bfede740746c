"""--quantize: weights rounded while they are read are near, and served as what they were rounded to."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import count_weights, load_model, open_checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.llm import LLM
from engine.quantization.on_the_fly import KINDS, quantize
from kernels import choose
from kernels.quantized import PackedQuantized, dequantize
from tests.engine.gguf_files import tiny_model
from tests.engine.quantized_files import write_quantized
from tests.engine.test_quantized_formats import logprobs

STEP = {"int8": 0.6 / 127, "int4": 1.2 / 15, "nf4": 0.16, "fp8": 1 / 16}  # of a group's largest magnitude, at most


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_are_within_half_a_step_and_zeros_stay_zeros(kind: str) -> None:
    weight = torch.randn(37, 200) * torch.rand(37, 1) * 3
    weight[5] = 0
    found = dequantize(quantize(weight, kind))
    assert ((found - weight).abs() <= STEP[kind] * weight.abs().amax(1, keepdim=True)).all()
    assert (found[5] == 0).all()
    in_bfloat16 = dequantize(quantize(weight.bfloat16(), kind))
    assert torch.equal(in_bfloat16, dequantize(quantize(weight.bfloat16().float(), kind)))


def test_nf4_is_bitsandbytes_but_for_scales_of_16_bits() -> None:
    weight = torch.randn(24, 128).clamp(-3.5, 3.5)
    weight[:, ::64] = 4.0 * torch.rand(24, 2).clamp(min=0.9).half().float()  # each block's largest fits in float16
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    found, theirs = dequantize(quantize(weight, "nf4")), bnb.dequantize_4bit(codes, state)
    torch.testing.assert_close((found - weight).abs(), (theirs - weight).abs(), rtol=0, atol=1e-5)
    assert (found != theirs).sum() <= 3  # a weight in the middle of two values may go either way


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_model_gives_the_logprobs_of_its_rounded_weights(kind: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3", torch.seed() % 2**31, tie_word_embeddings=False)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    config = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(dequantize(quantize(parameter, kind)))
    prompt = torch.randint(0, 96, (30,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    wanted = expected.gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    assert (logprobs(tmp_path, prompt, quantize=kind) - wanted).abs().max() < 3e-3
    assert (logprobs(tmp_path, prompt, quantize=kind, kernels="torch") - wanted).abs().max() < 1e-4
    said = {d.name: d.value for d in LLM(tmp_path, max_context=32, quantize=kind).ready.decisions}["weights"]
    assert f"quantised ({kind}, " in said
    assert "bits a weight" in said


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_take_what_was_counted(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    config = tiny_model("llama", 0).config.to_dict() | sizes | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path, "dummy", kind)
    count = count_weights(checkpoint, packs_quantized=True)
    model = load_model(
        checkpoint, torch.device("cpu"), torch.bfloat16, choose("cpu"), "numba", packs_quantized=True
    )  # fmt: skip
    weights = [w for layer in model.weights.linears() for w in layer.weights if isinstance(w, PackedQuantized)]
    assert sum(weight.out_features * weight.in_features for weight in weights) == count.packed_numbers
    assert sum(weight.nbytes for weight in weights) == pytest.approx(count.packed_bytes, rel=0.01)


def test_a_quantised_checkpoint_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", tiny_model("llama", 1), "awq")
    with pytest.raises(CheckpointError, match="quantised already"):
        open_checkpoint(tmp_path / "m", quantize="nf4")
    with pytest.raises(ConfigError, match="--quantize int3 is not known; use one of int8, int4, nf4, fp8"):
        open_checkpoint(tmp_path / "m", "dummy", quantize="int3")
