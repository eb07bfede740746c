"""Folders are read without trust: one clear error for whatever is wrong, nothing run, nothing large allocated."""

from __future__ import annotations

import json
import random
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import Checkpoint, load_model, open_checkpoint
from engine.errors import CheckpointError
from engine.models.llama import LlamaForCausalLM
from engine.tensor_file import read_tensor
from kernels import choose
from tests.engine.tiny import make_checkpoint, random_config, write_weights

CPU = torch.device("cpu")


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    positions = min(checkpoint.model_config.context_length, 4096)
    return load_model(checkpoint, CPU, dtype, choose("cpu", "torch"), max_positions=positions, **options)


def fault(directory: Path) -> str:
    """The error that opening and loading a folder gives."""
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(directory))
    message = str(caught.value)
    assert len(message.splitlines()) <= 6
    assert len(message) < 1500
    assert message.isprintable() or "\n" in message
    return message


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of model.safetensors."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def rewrite_config(directory: Path, **keys: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | keys))


# What is in the folder


def test_single_and_sharded_checkpoints_hold_the_same_tensors(tmp_path: Path) -> None:
    single = open_checkpoint(make_checkpoint(tmp_path / "a", seed=1))
    sharded = open_checkpoint(make_checkpoint(tmp_path / "b", seed=1, shards=3))
    assert single.tensors.keys() == sharded.tensors.keys()
    assert len({info.file for info in sharded.tensors.values()}) == 3
    for name in single.tensors:
        assert torch.equal(read_tensor(single.tensors[name]), read_tensor(sharded.tensors[name]))


def test_bytes_and_stored_dtype_come_from_the_headers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, dtype=torch.bfloat16))
    weights = load_file(tmp_path / "model.safetensors")
    assert checkpoint.checkpoint_bytes == sum(w.nbytes for w in weights.values())
    assert checkpoint.stored_dtype == "bfloat16"


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    code = f"""
import sys
from engine.checkpoint import open_checkpoint
open_checkpoint({str(tmp_path)!r})
assert not {{"torch", "numpy", "transformers", "safetensors"}} & sys.modules.keys(), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_progress_counts_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, tie_word_embeddings=False))
    load(checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (checkpoint.checkpoint_bytes, checkpoint.checkpoint_bytes)
    assert len(seen) > 5


def test_a_link_into_the_hub_cache_is_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc123"
    make_checkpoint(blobs, seed=2)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    load(open_checkpoint(snapshot))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "model")
    (tmp_path / "model" / name).rename(tmp_path / name)
    (tmp_path / "model" / name).symlink_to(tmp_path / name)
    assert f"{name} is a link that leads out of the model folder" in fault(tmp_path / "model")


# Folders that are no model


def test_what_is_no_model_folder_is_said(tmp_path: Path) -> None:
    assert fault(tmp_path / "absent").endswith("absent does not exist.")
    (tmp_path / "file").touch()
    assert "is a file, not a model folder" in fault(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert fault(tmp_path / "empty").endswith("config.json is missing; it is empty.")
    (tmp_path / "empty" / "notes.txt").touch()
    assert fault(tmp_path / "empty").endswith("it holds notes.txt.")
    (tmp_path / "empty" / "x.gguf").touch()
    assert "penstock serve" in fault(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert "LoRA adapter" in fault(tmp_path / "empty")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "consolidated.00.pth", "weights.pkl"])
def test_pickle_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = fault(tmp_path)
    assert name in message
    assert "can run code" in message
    assert "save_pretrained" in message


def test_pickle_beside_safetensors_is_not_looked_at(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    load(open_checkpoint(tmp_path))


def test_no_weights_names_what_there_is(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert "expected model.safetensors or model.safetensors.index.json; it holds consolidated" in fault(tmp_path)


def plant_code(directory: Path, architecture: str) -> Path:
    """A folder whose auto_map asks for its own code; returns the file that appears if it runs."""
    make_checkpoint(directory)
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    rewrite_config(directory, auto_map=auto_map, architectures=[architecture])
    for name in ("modeling.py", "configuration.py", "__init__.py", "sitecustomize.py"):
        (directory / name).write_text(f"open({str(directory / 'canary')!r}, 'w')")
    return directory / "canary"


def test_code_of_the_folder_never_runs(tmp_path: Path) -> None:
    canary = plant_code(tmp_path / "known", "LlamaForCausalLM")
    checkpoint = open_checkpoint(tmp_path / "known")
    load(checkpoint)
    assert checkpoint.notes == ("The folder brings its own code (auto_map); it is not run.",)
    assert not canary.exists()
    canary = plant_code(tmp_path / "unknown", "EvilForCausalLM")
    assert "own code (auto_map); Penstock never runs it" in fault(tmp_path / "unknown")
    assert not canary.exists()


def test_code_of_the_folder_never_runs_without_asserts(tmp_path: Path) -> None:
    canary = plant_code(tmp_path, "LlamaForCausalLM")
    code = f"""
import torch
from engine.checkpoint import open_checkpoint, load_model
from kernels import choose
checkpoint = open_checkpoint({str(tmp_path)!r})
load_model(checkpoint, torch.device("cpu"), torch.float32, choose("cpu", "torch"), max_positions=16)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, check=True, cwd=root, timeout=120)
    assert not canary.exists()


# Tensors that do not fit


def test_missing_unexpected_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=1, tie_word_embeddings=False, attention_bias=False)

    def change(weights: dict[str, torch.Tensor]) -> None:
        up = weights.pop("model.layers.0.mlp.up_proj.weight")
        weights["model.layers.1.mlp.up_proj.weight"] = up.T.contiguous()
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
        weights["model.norm.weight"] = torch.ones_like(weights["model.norm.weight"], dtype=torch.int8)

    shape = list(load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape)
    rewrite(tmp_path, change)
    message = fault(tmp_path)
    assert f"missing: model.layers.0.mlp.up_proj.weight {shape}" in message
    assert f"misshapen: model.layers.1.mlp.up_proj.weight: expected {shape}, found {shape[::-1]}" in message
    assert "unsupported type: model.norm.weight: expected F32, F16, BF16, found I8" in message
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in message


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    rewrite_config(tmp_path, num_hidden_layers=900)
    message = fault(tmp_path)
    assert "missing: model.layers.2." in message
    assert re.fullmatch(r"  and [\d,]+ more\.", message.splitlines()[-1])


def test_buffers_that_old_files_carry_are_tolerated(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(open_checkpoint(tmp_path))


def test_names_from_the_file_are_printed_harmlessly(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"\x1b[2J\u202eevil\n" + "x" * 500: torch.ones(4)}))
    message = fault(tmp_path)
    assert "\x1b" not in message
    assert "\u202e" not in message


# The head


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    model = load(open_checkpoint(make_checkpoint(tmp_path, tie_word_embeddings=True)))
    assert model.lm_head == model.embed_tokens.project


def test_an_absent_head_is_tied_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite_config(tmp_path, tie_word_embeddings=None)
    assert load(open_checkpoint(tmp_path)).config.tie_word_embeddings
    rewrite_config(tmp_path, tie_word_embeddings=False)
    assert "missing: lm_head.weight" in fault(tmp_path)


def test_a_head_in_the_file_is_used_where_it_differs_from_the_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=False)
    rewrite_config(tmp_path, tie_word_embeddings=True)
    assert not load(open_checkpoint(tmp_path)).config.tie_word_embeddings
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert load(open_checkpoint(tmp_path)).config.tie_word_embeddings


# Hostile files


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        fault(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "sub/model.safetensors", "\ud800", "x" * 300],
)
def test_the_index_names_plain_files_of_the_folder(tmp_path: Path, file: str) -> None:
    make_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "outside.safetensors").write_bytes(b"")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    fault(tmp_path / "model")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "model-00001-of-00002.safetensors"}}))
    assert "1 tensors are not in the files it names: extra" in fault(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "absent.safetensors"}}))
    assert "absent.safetensors is missing" in fault(tmp_path)
    path.write_text(json.dumps({"weight_map": [1]}))
    assert "weight_map should map" in fault(tmp_path)
    path.write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    write_weights(tmp_path, {"model.norm.weight": torch.ones(3), "b": torch.ones(1)}, 2)
    save_file({"model.norm.weight": torch.ones(3), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "is in another shard too" in fault(tmp_path)


# 200 random mutations

SCALARS: list[Any] = [
    -1,
    0,
    1,
    3,
    7,
    10**12,
    2**63,
    10**30,
    "64",
    "",
    None,
    True,
    False,
    0.5,
    -2.5,
    1e300,
    [],
    {},
    [1],
    "x" * 9999,
]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON object: a value replaced, a key dropped, added or renamed."""
    target = value
    while True:
        key = rng.choice(list(target))
        if not (isinstance(target[key], dict) and target[key] and rng.random() < 0.9):
            break
        target = target[key]
    kind = rng.choice(["replace", "replace", "replace", "drop", "rename"])
    if kind == "replace":
        target[key] = rng.choice(SCALARS)
    elif kind == "drop":
        del target[key]
    else:
        target[key[::-1] + "\ud800"] = target.pop(key)
    return value


def mutate_bytes(data: bytes, rng: random.Random, within: int) -> bytes:
    """A few bytes of the first `within` changed, inserted or deleted."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(within, len(changed)))
        kind = rng.choice(["set", "insert", "delete"])
        if kind == "set":
            changed[at] = rng.randrange(256)
        elif kind == "insert":
            changed.insert(at, rng.randrange(256))
        else:
            del changed[at]
    return bytes(changed)


@contextmanager
def at_most_one_more_gigabyte() -> Iterator[None]:
    """A larger allocation fails, so that the test does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations_give_a_checkpoint_error_or_a_model(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    architecture = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"][seed]
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    make_checkpoint(tmp_path, architecture, seed, rope_scaling=scaling, **windows)
    config, weights = (tmp_path / "config.json").read_bytes(), (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    outcomes = {"refused": 0, "loaded": 0}
    for round_ in range(75):
        new_config, new_weights = config, weights
        if round_ % 3 == 0:
            new_config = json.dumps(mutate_json(json.loads(config), rng)).encode()
        elif round_ % 3 == 1:
            header = json.dumps(mutate_json(json.loads(weights[8 : 8 + length]), rng)).encode()
            new_weights = struct.pack("<Q", len(header)) + header + weights[8 + length :]
        elif rng.random() < 0.5:
            new_config = mutate_bytes(config, rng, len(config))
        else:
            new_weights = mutate_bytes(weights, rng, 8 + length)
        (tmp_path / "config.json").write_bytes(new_config)
        (tmp_path / "model.safetensors").write_bytes(new_weights)
        message = ""
        try:
            with at_most_one_more_gigabyte():
                load(open_checkpoint(tmp_path))
        except CheckpointError as error:
            message = str(error)
        assert len(message.splitlines()) <= 6, (seed, round_)
        outcomes["refused" if message else "loaded"] += 1
    print(outcomes)
    assert outcomes["refused"] > 40


# Memory


def test_loading_peaks_at_the_model_and_one_layer(tmp_path: Path) -> None:
    """Peak resident memory of a process that loads 300 MB, over what it had before."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 24000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    make_checkpoint(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=False, **sizes, **heads)
    code = f"""
import resource, torch
from engine.checkpoint import open_checkpoint, load_model
from kernels import choose
import engine.models.llama
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(1000).bfloat16().float()
checkpoint = open_checkpoint({str(tmp_path)!r})
before = peak()
load_model(checkpoint, torch.device("cpu"), torch.bfloat16, choose("cpu", "torch"), "torch", max_positions=16)
print(peak() - before, checkpoint.checkpoint_bytes)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    used, size = map(int, done.stdout.split())
    largest = 24000 * 512 * 2
    assert size > 5 * largest / 2
    assert used < size + largest + 20_000_000


def test_the_config_alone_is_checked_before_the_weights_are_looked_for(tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(json.dumps(random_config("LlamaForCausalLM", 0, hidden_size=-1)))
    assert "hidden_size is -1" in fault(tmp_path)
