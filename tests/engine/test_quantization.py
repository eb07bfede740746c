"""Weights that stay quantised: formats bit for bit against their reference, and whole models against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize as reference_values
from transformers import AutoModelForCausalLM

from engine.checkpoint import count_weights, load_model, open_checkpoint
from engine.convert import convert_weights
from engine.errors import CheckpointError
from engine.llm import LLM
from engine.messages import SamplingParams
from engine.quantization import find_schemes
from engine.quantization.gguf import TYPES, from_blocks
from kernels import choose
from kernels.cpu import threads
from kernels.linear import rows
from kernels.quantized import PackedQuantized, dequantize
from tests.engine.gguf_files import tiny_model, write_gguf

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_dequantise_bit_for_bit_as_the_gguf_package_does(kind: str) -> None:
    per_block, block_bytes, *_ = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[Type[kind]] == (per_block, block_bytes)
    rng = np.random.default_rng()
    raw = rng.integers(0, 256, (5, 3 * block_bytes), dtype=np.uint8)
    blocks = raw.reshape(-1, block_bytes)
    for at in HALVES[kind]:  # finite scales
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    found = dequantize(from_blocks(torch.from_numpy(raw), kind))
    assert torch.equal(found, torch.from_numpy(reference_values(raw, Type[kind])))


@pytest.fixture(params=[("llama", Type.Q4_1), ("llama", Type.Q8_0), ("qwen2", Type.Q4_0), ("qwen3", Type.Q5_1)])
def packed_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A GGUF file's blocks in a folder, beside the same model dequantised to float32."""
    architecture, kind = request.param
    config: dict[str, Any] = {"head_dim": 128} if architecture == "qwen3" else {}
    file = write_gguf(tmp_path / "m.gguf", tiny_model(architecture, 5, **config), kind)
    convert_weights(file, tmp_path / "packed", "packed")
    convert_weights(file, tmp_path / "float32", "float32")
    return tmp_path


def greedy(folder: Path, **options: Any) -> tuple[list[int], list[float]]:
    prompt = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    llm = LLM(folder, max_context=128, **options)
    [found] = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=0))
    assert found.prompt_logprobs is not None
    return found.tokens, [entry.logprob for entry in found.prompt_logprobs if entry is not None]


def test_a_model_of_blocks_gives_the_logprobs_of_its_dequantised_weights(packed_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_folder / "float32", dtype=torch.float32).eval()
    prompt = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(3))[None]
    with torch.no_grad():
        expected = model(prompt).logits[0].log_softmax(-1)
    wanted = expected[:-1].gather(1, prompt[0, 1:, None])[:, 0]
    config = json.loads((packed_folder / "packed" / "config.json").read_text())
    config["torch_dtype"] = "float32"  # so that the cache rounds nothing
    (packed_folder / "packed" / "config.json").write_text(json.dumps(config))
    tokens, logprobs = greedy(packed_folder / "packed")
    assert (torch.tensor(logprobs) - wanted).abs().max() < 2e-3  # activations have 16 bits
    for options in ({}, {"kernels": "torch"}):  # dequantised at load
        same, exact = greedy(packed_folder / "packed", dtype="float32", **options)
        assert same == tokens
        assert (torch.tensor(exact) - wanted).abs().max() < 1e-4


def test_quantised_layers_compute_from_exactly_the_stored_weights(packed_folder: Path) -> None:
    threads.set_threads(2)
    cpu = torch.device("cpu")
    checkpoint = open_checkpoint(packed_folder / "packed")
    plain = open_checkpoint(packed_folder / "float32")
    packed = load_model(checkpoint, cpu, torch.bfloat16, choose("cpu"), "numba", packs_quantized=True)
    exact = load_model(plain, cpu, torch.float32, choose("cpu"), "numba")
    for ours, theirs in zip(packed.weights.linears(), exact.weights.linears(), strict=True):
        assert all(isinstance(weight, PackedQuantized) for weight in ours.weights)
        found = torch.cat([rows(weight, torch.arange(weight.out_features)) for weight in ours.weights])
        assert torch.equal(found, rows(theirs.weights[0], torch.arange(theirs.weights[0].out_features)))
        x = torch.randn(5, ours.in_features)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)


def test_a_layer_of_differently_stored_parts_gives_its_columns_in_their_order(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2", 5), Type.Q8_0)
    convert_weights(file, tmp_path / "packed", "packed")
    convert_weights(file, tmp_path / "float32", "float32")
    # one of q, k, v becomes plain: its blocks are replaced by the numbers they stand for
    name = "model.layers.0.self_attn.k_proj.weight"
    from safetensors.torch import load_file, save_file

    tensors, values = load_file(tmp_path / "packed" / "model.safetensors"), load_file(
        tmp_path / "float32" / "model.safetensors"
    )  # fmt: skip
    tensors[name] = values[name]
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    del config["quantization_config"]["tensors"][name]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    cpu = torch.device("cpu")
    mixed = load_model(
        open_checkpoint(tmp_path / "packed"), cpu, torch.float32, choose("cpu"), "numba", packs_quantized=True
    )
    exact = load_model(open_checkpoint(tmp_path / "float32"), cpu, torch.float32, choose("cpu"), "numba")
    ours, theirs = mixed.weights.linears()[0], exact.weights.linears()[0]
    assert len(ours.weights) == 3
    x = torch.randn(4, ours.in_features)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)


def test_the_count_of_weights_is_what_they_take_in_memory(packed_folder: Path) -> None:
    checkpoint = open_checkpoint(packed_folder / "packed")
    count = count_weights(checkpoint, packs_quantized=True)
    model = load_model(checkpoint, torch.device("cpu"), torch.bfloat16, choose("cpu"), "numba", packs_quantized=True)
    taken = sum(weight.nbytes for layer in model.weights.linears() for weight in layer.weights)  # type: ignore[union-attr]
    embedding = model.embed_tokens.weight
    taken += embedding.nbytes if isinstance(embedding, PackedQuantized) else 0
    assert count.packed_bytes <= taken <= 1.35 * count.packed_bytes  # tiny matrices are rounded up to whole panels
    plain = count_weights(open_checkpoint(packed_folder / "float32"), packs_quantized=True)
    assert count_weights(checkpoint, packs_quantized=False).numbers == plain.numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("int4", "should be an object"),
        ({}, "with a quant_method"),
        ({"quant_method": "made-up"}, "'made-up' is not supported"),
        ({"quant_method": "gguf"}, "should map names to types"),
        ({"quant_method": "gguf", "tensors": {"a.weight": "IQ9_X"}}, "should map names to types"),
        ({"quant_method": "gguf", "tensors": {"a.weight": 4}}, "should map names to types"),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(settings: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_schemes({"quantization_config": settings}, {})
