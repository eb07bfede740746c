"""GGUF weights and config, converted and compared with transformers; hostile files; what a killed conversion leaves."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine import convert
from engine.convert import convert_weights
from engine.errors import CheckpointError
from engine.gguf_config import llama3_factors, shortest
from tests.engine.gguf_files import add_tensor, finish, tiny_model, write_gguf

SEED = 20261126
HOME = Path(__file__).parent.parent.parent


def logits(model: Any, seed: int = SEED) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_model_written_as_gguf_comes_back_with_the_same_logits(tmp_path: Path, architecture: str, config: dict):
    model = tiny_model(architecture, SEED, **config)
    convert_weights(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.config.architectures == [type(model).__name__]
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0])
def test_float32_weights_equal_what_transformers_dequantises(tmp_path: Path, architecture: str, kind: Type):
    # transformers takes the head size of every qwen3 file to be 128
    model = tiny_model(architecture, SEED, **({"head_dim": 128} if architecture == "qwen3" else {}))
    file = write_gguf(tmp_path / "m.gguf", model, kind)
    convert_weights(file, tmp_path / "out", "float32")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    back = load(tmp_path / "out")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(logits(back), logits(reference))


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rope_scaling_survives(tmp_path: Path, architecture: str, rope: dict, metadata: dict):
    model = tiny_model(architecture, SEED, rope_scaling=rope)
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()}
    convert_weights(write_gguf(tmp_path / "m.gguf", model, metadata=metadata), tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_model(architecture, SEED)), atol=1e-3)


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 0.5, 8.0, 512)])  # fmt: skip  # noqa: E501
def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path, factor, low, high, original):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope["original_max_position_embeddings"] = original
    model = tiny_model("llama", SEED, rope_scaling=rope, max_position_embeddings=131072)
    factors = np.array(llama3_factors(10000.0, 16, factor, low, high, original), np.float32)
    file = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors})
    convert_weights(file, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=1e-4)


def test_factors_that_follow_no_rule_are_refused(tmp_path: Path):
    factors = np.array([1, 3, 2, 5, 1, 1, 8, 8], np.float32)
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), extra={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="rope_freqs"):
        convert_weights(file, tmp_path / "out")


def test_a_sliding_window_makes_it_a_mistral(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), metadata={"llama.attention.sliding_window": 32})
    convert_weights(file, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32


QUANTISED = [kind for kind in Type if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_gguf_can_dequantise_is_read_slice_by_slice(tmp_path: Path, kind: Type, monkeypatch):
    """Random blocks: what comes out in slices of a few rows equals what gguf makes of the whole."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns, rows = max(block, 64), 96
    rng = np.random.default_rng(SEED)
    raw = rng.integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    model = tiny_model("llama", hidden_size=columns)
    file = write_gguf(tmp_path / "m.gguf", model)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    reader = gguf.GGUFReader(file)
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        data = raw if tensor.name == "token_embd.weight" else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind if data is raw else None)
    finish(writer)
    monkeypatch.setattr(convert, "SLICE_BYTES", 4 * columns * 7)
    convert_weights(tmp_path / "q.gguf", tmp_path / "out", "float32")
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    written = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ([Type.F32], "float32"),
        ([Type.F16], "float16"),
        ([Type.BF16], "bfloat16"),
        ([Type.Q8_0], "bfloat16"),
        ([Type.F16, Type.Q4_1], "bfloat16"),
        ([Type.BF16, Type.BF16, Type.F32], "bfloat16"),
    ],
)
def test_auto_keeps_what_is_not_quantised_and_makes_the_rest_bfloat16(tmp_path: Path, kinds: list, dtype: str):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for i, kind in enumerate(kinds):
        add_tensor(writer, f"t{i}", np.ones((4, 64), np.float32), kind)
    add_tensor(writer, "norm", np.ones(64, np.float32), Type.F32)
    finish(writer)
    assert convert._Source(convert.read_gguf(tmp_path / "m.gguf")).main_dtype() == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_equals_torchs(dtype: str):
    rng = np.random.default_rng(SEED)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)])
    if dtype == "float16":
        values = values[~(np.abs(values) > 65000) | ~np.isfinite(values)]
    ours = torch.from_numpy(convert._as_dtype(values, dtype, "t").copy()).view(getattr(torch, dtype))
    theirs = torch.from_numpy(values).to(getattr(torch, dtype))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


def test_a_value_beyond_float16_is_refused_with_the_way_out(tmp_path: Path):
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = 70000.0
    with pytest.raises(CheckpointError, match=r"output_norm\.weight.*--dtype bfloat16"):
        convert_weights(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out", "float16")


def test_large_models_are_sharded_and_nothing_unfinished_stays(tmp_path: Path):
    model = tiny_model("qwen3", SEED)
    seen = []
    file = write_gguf(tmp_path / "m.gguf", model)
    convert_weights(file, tmp_path / "out", report=lambda done, total: seen.append((done, total)), max_shard=50_000)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert not [name for name in names if "partial" in name]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_smollm2_has_the_logits_transformers_computes_from_the_gguf_file(smollm2_gguf: Path, tmp_path: Path):
    convert_weights(smollm2_gguf, tmp_path, "float32")
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    assert torch.equal(logits(load(tmp_path)), logits(reference))


def test_decimals_are_the_shortest_that_mean_the_same_float32():
    for value in (1e-5, 1e-6, 10000.0, 500000.0, 1000000.0, 0.1, 3.25):
        assert shortest(float(np.float32(value))) == value


# Files that are damaged or hostile.


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = write_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", tiny_model("llama"), Type.Q8_0)
    return file.read_bytes()


def refused(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        convert_weights(tmp_path / "bad.gguf", tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    return str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, sound: bytes):
    rng = random.Random(SEED)
    for cut in [0, 1, 4, 8, 23, 24, len(sound) - 1, *(rng.randrange(len(sound)) for _ in range(150))]:
        refused(tmp_path, sound[:cut])


def test_a_file_with_random_bytes_changed_is_refused_or_converted_but_never_crashes(tmp_path: Path, sound: bytes):
    rng = random.Random(SEED)
    head = sound.index(b"token_embd.weight") + 2000
    for i in range(250):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(head)
            data[at : at + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])])
        (tmp_path / "bad.gguf").write_bytes(data)
        message = "converted"
        try:
            convert_weights(tmp_path / "bad.gguf", tmp_path / f"out{i}")
        except CheckpointError as error:
            message = str(error)
        assert 0 < len(message.splitlines()) <= 6, (SEED, i)


def head(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
        (head(version=1), "version 1"),
        (head(version=3 << 24), "big-endian"),
        (head(tensors=1 << 60), "claims 1152921504606846976 tensors"),
        (head(keys=1 << 60), "claims 1152921504606846976 keys"),
        (head(keys=1, rest=text(b"", 1 << 62)), "a string has"),
        (head(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61)), "items in an array"),
        (head(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 21)), "bytes more than"),
        (head(keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "type 9"),
        (head(keys=1, rest=text(b"a") + struct.pack("<I", 99)), "type 99"),
        (head(keys=1, rest=text(b"\xff") + struct.pack("<IB", 0, 1)), "utf-8"),
        (head(keys=2, rest=2 * (text(b"a") + struct.pack("<IB", 0, 1))), "appears twice"),
        (head(tensors=1, rest=text(b"t") + struct.pack("<I", 1 << 31)), "dimensions"),
        (head(tensors=1, rest=text(b"t") + struct.pack("<IQQ", 2, 1 << 62, 1 << 62) + bytes(12)), "has the shape"),
        (head(tensors=1, rest=text(b"t") + struct.pack("<IQIQ", 1, 8, 0, 1 << 62)), "outside the file"),
    ],
)
def test_absurd_heads_are_refused_at_once(tmp_path: Path, data: bytes, message: str):
    began = time.process_time()
    assert message in refused(tmp_path, data)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": 1 << 23}, "fewer tensors than layers"),
        ({"llama.block_count": 1}, "unknown: blk.1."),
        ({"llama.block_count": 3}, "missing: blk.2."),
        ({"llama.embedding_length": 0}, "embedding_length is 0"),
        ({"llama.embedding_length": 128}, "expected"),
        ({"llama.attention.head_count": 3_000_000_000}, "head_count is 3000000000"),
        ({"llama.attention.head_count_kv": "two"}, "head_count_kv is 'two'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"llama.attention.key_length": 15}, "value_length differs"),
        ({"llama.rope.dimension_count": 8}, "dimension_count differs"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"general.architecture": "gpt2"}, "supported are llama, qwen2, qwen3"),
    ],
)
def test_what_cannot_be_converted_is_said_by_name(tmp_path: Path, sound: bytes, metadata: dict, message: str):
    (tmp_path / "sound.gguf").write_bytes(sound)
    reader = gguf.GGUFReader(tmp_path / "sound.gguf")
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "llama")
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(key, value, kind[type(value)])
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in metadata and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        quantised = tensor.tensor_type not in (Type.F32, Type.F16)
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type if quantised else None)
    finish(writer)
    assert message in refused(tmp_path, (tmp_path / "changed.gguf").read_bytes())


def test_the_command_says_one_clear_thing_and_exits_with_1(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"no")
    command = [sys.executable, "-m", "engine.convert", str(tmp_path / "bad.gguf"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert result.returncode == 1
    assert "bad.gguf is not a usable GGUF file" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_conversion_that_is_killed_leaves_no_folder_and_the_next_one_cleans_up(smollm2_gguf: Path, tmp_path: Path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "server.cli", "convert", str(smollm2_gguf), str(folder)]
    process = subprocess.Popen(command, cwd=HOME, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/model.safetensors.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    subprocess.run(command, cwd=HOME, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert math.isclose((folder / "model.safetensors").stat().st_size, 269e6, rel_tol=0.01)
