"""How the families' files are read: keys that are absent, text parts of models that also see, GPT-2's bare names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from engine.checkpoint import load_model, open_checkpoint
from engine.errors import CheckpointError
from engine.model_config import read_model_config
from kernels import choose
from tests.engine.families import CONFIGS, family_config, make_family

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("architecture", CONFIGS)
def test_absent_keys_mean_what_transformers_assumes(architecture: str) -> None:
    model_type, _ = CONFIGS[architecture]
    sizes = (500, 640, 64, 12, 160)
    theirs = {"model_type": model_type, **dict(zip(SIZES, sizes, strict=True))}
    if architecture == "GPT2LMHeadModel":
        theirs = {"model_type": model_type, "vocab_size": 500, "n_embd": 576}
    ours = read_model_config({**theirs, "architectures": [architecture]})
    want = AutoConfig.for_model(**theirs)
    assert ours.num_kv_heads == getattr(want, "num_key_value_heads", want.num_attention_heads)
    assert ours.head_dim == (getattr(want, "head_dim", None) or want.hidden_size // want.num_attention_heads)
    assert (ours.num_layers, ours.num_heads) == (want.num_hidden_layers, want.num_attention_heads)
    assert ours.max_position_embeddings == want.max_position_embeddings
    assert ours.tie_word_embeddings == want.tie_word_embeddings
    eps = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
    assert ours.norm_eps == next(getattr(want, name) for name in eps if hasattr(want, name))
    types = getattr(want, "layer_types", None) or ["sliding_attention"] * want.num_hidden_layers
    window = getattr(want, "sliding_window", None) or 0
    assert ours.windows == tuple(window if kind == "sliding_attention" else 0 for kind in types)
    ropes = getattr(want, "rope_parameters", None)
    for rope, kind in zip(ours.ropes, types, strict=True):
        if rope is not None:
            parameters = ropes.get(kind, ropes)
            assert (rope.theta, rope.kind) == (parameters["rope_theta"], parameters["rope_type"])
            assert rope.rotary == int(ours.head_dim * parameters.get("partial_rotary_factor", 1.0))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Of a loaded model: each layer's tensors, under the names of what they were read from."""
    checkpoint = open_checkpoint(path)
    model = load_model(
        checkpoint, torch.device("cpu"), torch.float32, choose("cpu", "torch"), "torch", max_positions=64
    )
    assert model.config.architecture == checkpoint.model_config.architecture
    return {name: torch.tensor(info.shape) for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("style", ["language_model.{}", "model.language_model.{}"])
@pytest.mark.parametrize(
    ("outer", "family"),
    [
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    ],
)
def test_the_text_part_of_a_model_that_also_sees_is_that_text_model(
    tmp_path: Path, outer: str, family: str, style: str
) -> None:
    make_family(tmp_path, family, 0)
    alone = weights_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text_only = read_model_config(config)
    del config["architectures"]
    whole = {"architectures": [outer], "model_type": "any", "text_config": config, "vision_config": {"hidden_size": 8}}
    whole["eos_token_id"] = [7, 9]
    (tmp_path / "config.json").write_text(json.dumps(whole))

    def renamed(name: str) -> str:
        if style.startswith("model."):
            return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        return style.format(name)

    tensors = {renamed(name): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"vision_tower.patch.weight": torch.ones(3, 3), "multi_modal_projector.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = weights_of(tmp_path)
    assert found.keys() == alone.keys()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_config.eos_token_ids[-2:] == (7, 9)  # after generation_config.json's
    assert checkpoint.model_config.ropes == text_only.ropes
    assert any("text part" in note for note in checkpoint.notes)


def test_a_text_part_of_another_kind_is_refused() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    with pytest.raises(CheckpointError, match='model_type is "llama"; expected one of gemma3_text'):
        read_model_config(config)


def test_gpt2_files_without_a_prefix_and_with_masks_are_read(tmp_path: Path) -> None:
    make_family(tmp_path, "GPT2LMHeadModel", 0)
    alone = weights_of(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_of(tmp_path).keys() == alone.keys()


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("CohereForCausalLM", {"use_qk_norm": True}, "use_qk_norm is true"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "see later ones cannot generate"),
        ("Gemma3ForCausalLM", {"rope_scaling": None, "rope_parameters": {"rope_type": "linear"}}, "no object for"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "encoder"),
        ("GPT2LMHeadModel", {"activation_function": "relu"}, "expected one of gelu_new"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "short_factor",
        ),
        ("GlmForCausalLM", {"partial_rotary_factor": 0.01}, "even number of features"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "expected 5 numbers"),
        ("Olmo3ForCausalLM", {"sliding_window": None}, "no sliding_window"),
    ],
)
def test_what_a_family_does_not_do_is_named(architecture: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(family_config(architecture, 0) | keys)


def test_which_longrope_factors_serve_is_said_where_there_is_a_choice(tmp_path: Path) -> None:
    make_family(tmp_path / "long", "Phi3ForCausalLM", 0)
    make_family(tmp_path / "short", "Phi3ForCausalLM", 1)
    assert "--max-context 4 or less" in "".join(open_checkpoint(tmp_path / "long").notes)
    assert open_checkpoint(tmp_path / "short").notes == ()
