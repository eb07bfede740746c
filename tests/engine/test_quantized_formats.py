"""The quantised formats: weights bit for bit as their library has them, tiny checkpoints served end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.checkpoint import count_weights, load_model, open_checkpoint
from engine.errors import CheckpointError
from engine.llm import LLM
from engine.messages import SamplingParams
from engine.quantization import find_schemes
from engine.quantization.mxfp4 import from_blocks
from engine.tensor_file import TensorInfo
from kernels import choose
from kernels.linear import rows
from kernels.quantized import PackedQuantized, dequantize
from tests.engine.gguf_files import tiny_model
from tests.engine.quantized_files import FORMATS, write_quantized

CPU = torch.device("cpu")


@pytest.fixture(params=FORMATS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A folder in a format, and transformers' model with the weights that it stands for."""
    model = tiny_model("llama", torch.seed() % 2**31, tie_word_embeddings=False)
    return tmp_path / "m", write_quantized(tmp_path / "m", model, request.param)


def logprobs(folder: Path, prompt: list[int], **options: Any) -> torch.Tensor:
    llm = LLM(folder, max_context=64, kv_cache_bytes=1 << 20, **options)
    [found] = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    assert found.prompt_logprobs is not None
    return torch.tensor([entry.logprob for entry in found.prompt_logprobs if entry is not None])


def test_a_checkpoint_is_served_from_exactly_the_weights_it_stores(served: tuple[Path, PreTrainedModel]) -> None:
    folder, model = served
    checkpoint = open_checkpoint(folder)
    ours = load_model(checkpoint, CPU, torch.float32, choose("cpu"), "numba", packs_quantized=True)
    count, taken = count_weights(checkpoint, packs_quantized=True), 0
    # bitsandbytes gives its 8-bit weights in float16; others' last bit depends on the order of their products
    rounding = 2**-11 if count.schemes == ("bitsandbytes LLM.int8",) else 2**-23
    for layer in ours.weights.linears():
        start = 0
        for weight in layer.weights:
            found = rows(weight, torch.arange(weight.out_features))
            meant = torch.cat([model.get_parameter(f"{part}.weight").detach() for part in layer.parts])
            meant = meant[start : start + weight.out_features]
            start += weight.out_features
            assert (found - meant).abs().max() <= rounding * meant.abs().max()
            assert isinstance(weight, PackedQuantized) == ("lm_head" not in layer.parts)
            taken += weight.nbytes if isinstance(weight, PackedQuantized) else 0
    assert 0.7 * count.packed_bytes <= taken <= 1.5 * count.packed_bytes  # whole panels; rows of 64 with their scale
    assert count_weights(checkpoint, packs_quantized=False).numbers == sum(p.numel() for p in model.parameters())
    prompt = torch.randint(0, 96, (40,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    wanted = expected.gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    exact = 1e-4 if rounding < 1e-6 else 1e-2
    assert (logprobs(folder, prompt, dtype="float32") - wanted).abs().max() < exact  # dequantised at load
    assert (logprobs(folder, prompt) - wanted).abs().max() < 3e-3  # packed: activations of 16 bits


def test_mxfp4_blocks_stand_for_what_transformers_makes_of_them() -> None:
    blocks, scales = torch.randint(0, 256, (3, 6, 2, 16)).byte(), torch.randint(110, 140, (3, 6, 2)).byte()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [X, K, N]
    for ours, theirs in zip(zip(blocks, scales, strict=True), expected, strict=True):
        assert torch.equal(dequantize(from_blocks(*ours)), theirs.T)


def test_a_bias_of_zeros_beside_a_weight_that_has_none_is_no_fault(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", tiny_model("llama", 1), "gptq-4")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: torch.zeros(64)}, tmp_path / "m" / "model.safetensors")
    load_model(open_checkpoint(tmp_path / "m"), CPU, torch.float32, choose("cpu"), "numba", packs_quantized=True)
    save_file(tensors | {bias: torch.ones(64)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"unexpected: {bias}"):
        load_model(open_checkpoint(tmp_path / "m"), CPU, torch.float32, choose("cpu"), "numba", packs_quantized=True)


def compressed(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(FORMATS["w4a16-group"][0]))
    settings["config_groups"]["group_0"]["weights"] |= changes
    return settings


AWQ, FP8, GPTQ = FORMATS["awq"][0], FORMATS["fp8-blocks"][0], FORMATS["gptq-4"][0]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (GPTQ | {"bits": 3}, "bits is 3; expected 4 or 8"),
    (GPTQ | {"bits": "4"}, "bits is \"4\""),
    (GPTQ | {"group_size": 8}, "group_size is 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is \"marlin\""),
    (GPTQ | {"dynamic": {"-:.*": {}}}, "\"dynamic\" is dict of 1, which is not understood"),
    (AWQ | {"version": "gemv"}, "version is \"gemv\"; expected gemm"),
    (AWQ | {"bits": 8}, "bits is 8"),
    (AWQ | {"zero_point": False}, "zero_point is false"),
    (FP8 | {"fmt": "e5m2"}, "fmt is \"e5m2\""),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size is list of 1"),
    (FORMATS["bnb-nf4"][0] | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
    (FORMATS["bnb-nf4"][0] | {"rotated": True}, "\"rotated\" is true, which is not understood"),
    (compressed(num_bits=3), "pack-quantized with symmetric 3-bit int weights per group is not supported"),
    (compressed(actorder="group"), "actorder is \"group\""),
    (compressed(dynamic=True), "dynamic is true"),
    (compressed() | {"transform_config": {"a": 1}}, "\"transform_config\" is dict of 1"),
    (compressed() | {"format": "marlin-24"}, "format is \"marlin-24\""),
    (compressed() | {"config_groups": {"W4A16": ["Linear"]}}, "presets are not supported"),
    (compressed() | {"ignore": ["re:(a+)+$"]}, r"ignore: \(a\+\)\+\$ is no pattern that is tried"),
    (compressed() | {"ignore": [3]}, "ignore should be a list of names"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_not_understood_is_refused_with_its_field(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_schemes({"quantization_config": settings}, {})


def test_groups_with_ragged_columns_are_refused() -> None:
    scheme = find_schemes({"quantization_config": GPTQ}, {"a.qweight": NO_TENSOR, "a.g_idx": NO_TENSOR})("a")
    assert scheme is not None
    parts = {"a.qweight": torch.zeros(8, 8, dtype=torch.int32), "a.qzeros": torch.zeros(2, 1, dtype=torch.int32),
             "a.scales": torch.ones(2, 8), "a.g_idx": torch.zeros(64, dtype=torch.int32)}  # fmt: skip
    with pytest.raises(CheckpointError, match="groups are not all of 32 columns"):
        scheme.read("a", 8, 64, parts.__getitem__)


def test_a_group_is_chosen_by_name_pattern_or_class_unless_the_weight_is_ignored() -> None:
    settings = compressed()
    group = settings["config_groups"]["group_0"]
    eight = json.loads(json.dumps(group))
    eight["weights"]["num_bits"] = 8
    settings["config_groups"] = {"a": group | {"targets": ["re:.*self_attn.*"]}, "b": eight | {"targets": ["mlp.up"]}}
    names = ("self_attn.q", "mlp.up", "mlp.down", "lm_head", "x.router")
    scheme_of = find_schemes({"quantization_config": settings}, {f"{n}.weight_packed": NO_TENSOR for n in names})
    found = [scheme.name if (scheme := scheme_of(name)) else None for name in names]
    assert found == ["compressed-tensors W4A16", "compressed-tensors W8A16", None, None, None]
    assert scheme_of("self_attn.plain") is None  # it is not stored so


NO_TENSOR = TensorInfo(Path("none"), "I32", (), 0, 0)
