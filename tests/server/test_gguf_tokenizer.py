"""Tokenizers out of GGUF files against transformers; the whole conversion; what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from engine.errors import CheckpointError
from server.gguf_tokenizer import GPT2, LLAMA3, QWEN2, SPLITS, ConvertError, convert, write_tokenizer
from server.tokenizer import byte_alphabet, load_tokenizer
from tests.server.texts import random_text, toy_spec

SEED = 20261127
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def write_gguf_tokenizer(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF file with these tokenizer.ggml.* keys (others where the name has a dot) and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}
    for name, value in keys.items():
        name = name if "." in name else f"tokenizer.ggml.{name}"
        adders.get(type(value), writer.add_array)(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_keys(pre: str | None = "gpt-2", **keys: Any) -> dict[str, Any]:
    """The toy byte-level vocabulary as llama.cpp's converter writes it."""
    spec = json.loads(toy_spec("byte_level"))
    ids = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    special = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in spec["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    return {
        "model": "gpt2",
        **({} if pre is None else {"pre": pre}),
        "tokens": tokens,
        "token_type": [special.get(token, NORMAL) for token in tokens],
        "merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "bos_token_id": ids["<|start|>"],
        "eos_token_id": ids["<|endoftext|>"],
        **keys,
    }


def sentencepiece_keys(**keys: Any) -> dict[str, Any]:
    """The toy Llama-like vocabulary; scores fall with the rank of the merge that makes the token."""
    spec = json.loads(toy_spec("fallback"))
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    rank = {"".join(pair): rank for rank, pair in reversed(list(enumerate(spec["model"]["merges"])))}
    scores = [-float(rank.get(token, 10_000)) for token in tokens]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, **ids, **keys}


@pytest.fixture(scope="module")
def in_gguf(smollm2_gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def test_smollm2_ids_equal_transformers_on_1000_texts(smollm2_dir: Path, in_gguf: Any):
    """As transformers reads the file itself, on 1,000 texts; and on those where digits matter, too.

    transformers' reader does not know the pre-tokenizer that the file names, "smollm", which splits digits apart as the
    model's authors (and llama.cpp) do. Where that makes a difference its copy is told to split them.
    """
    ours, converted = load_tokenizer(smollm2_dir), AutoTokenizer.from_pretrained(smollm2_dir)
    rng = random.Random(SEED)
    texts: list[str] = []
    plain: list[int] = []
    while len(plain) < 1000:
        texts.append(random_text(rng))
        plain += [] if splits_digits(texts[-1]) else [len(texts) - 1]
    ids = [ours.encode(text) for text in texts]
    assert ids == converted(texts)["input_ids"]
    as_loaded = in_gguf(texts)["input_ids"]
    assert [ids[i] for i in plain] == [as_loaded[i] for i in plain], SEED
    in_gguf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert ids == in_gguf(texts)["input_ids"], SEED


def splits_digits(text: str) -> bool:
    """Whether it matters that digits stand apart: a numeral after white space, or several outside ASCII in a row."""
    numeral = [unicodedata.category(char)[0] == "N" for char in text]
    return any(numeral[i + 1] and (text[i].isspace() or not text[i + 1].isascii()) for i in range(len(text) - 1))


def test_smollm2_brings_its_names_and_its_template(smollm2_dir: Path, in_gguf: Any):
    converted = AutoTokenizer.from_pretrained(smollm2_dir)
    assert converted.special_tokens_map == in_gguf.special_tokens_map
    assert converted.chat_template == in_gguf.chat_template
    assert set(converted.all_special_ids) == set(in_gguf.all_special_ids)
    assert len(converted) == len(in_gguf)
    generation = json.loads((smollm2_dir / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smaug-bpe"])
def test_byte_level_vocabularies_split_as_their_pre_tokenizer_says(tmp_path: Path, pre: str):
    file = write_gguf_tokenizer(tmp_path / "t.gguf", byte_level_keys(pre))
    write_tokenizer(file, tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    backend = reference.backend_tokenizer
    if pre == "qwen2":  # as in Qwen's tokenizer.json; transformers' reader leaves it out
        backend.normalizer = tokenizers.normalizers.NFC()
    rng = random.Random(SEED)
    for _ in range(300):
        text = random_text(rng) + rng.choice(["", "<|end|>", " don't we'LL", "<tool>"]) + random_text(rng)
        ids = ours.encode(text, add_special_tokens=False)
        if pre in ("llama-bpe", "tekken"):  # a whole word that is a token is taken as it is
            backend.model.ignore_merges = True
        assert ids == reference(text, add_special_tokens=False)["input_ids"], (SEED, text)


def split(pre: str, text: str) -> list[str]:
    parts = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]]
    return [part for part, _ in tokenizers.pre_tokenizers.Sequence(parts).pre_tokenize_str(text)]


def test_how_numbers_and_words_are_split():
    """By each model's published pattern: the digits apart, by threes, or together."""
    text = "we've 12345 x"
    assert split("smollm", text) == ["we", "'ve", " ", "1", "2", "3", "4", "5", " x"]
    assert split("gpt-2", text) == ["we", "'ve", " 12345", " x"]
    assert split("llama-bpe", text) == ["we", "'ve", " ", "123", "45", " x"]
    assert split("qwen2", text) == ["we", "'ve", " ", "1", "2", "3", "4", "5", " x"]
    assert split("tekken", "HelloWorld a\n/b") == ["Hello", "World", " a", "\n", "/b"]
    assert split("default", "a=12345") == ["a", "=", "123", "45"]
    assert len({GPT2, LLAMA3, QWEN2}) == 3


def test_a_llama_vocabulary_merges_by_score_with_byte_fallback(tmp_path: Path):
    file = write_gguf_tokenizer(tmp_path / "t.gguf", sentencepiece_keys())
    write_tokenizer(file, tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    toy = tokenizers.Tokenizer.from_str(toy_spec("fallback"))
    rng = random.Random(SEED)
    for _ in range(300):
        text = random_text(rng).strip()
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == toy.encode(text, add_special_tokens=False).ids, (SEED, text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"], (SEED, text)
        assert ours.decode(ids) == text.replace("▁", " ")
    assert ours.encode("the dog")[0] == 1, "bos, where the file does not say otherwise"


def test_the_best_score_wins_over_the_leftmost_pair(tmp_path: Path):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 5
    for scores, expected in (([0, 0, 0, -9, -9, -9, -2, -1], [3, 7]), ([0, 0, 0, -9, -9, -9, -1, -2], [6, 5])):
        keys = {"tokens": tokens, "token_type": kinds, "scores": [float(s) for s in scores], "add_space_prefix": False}
        file = write_gguf_tokenizer(tmp_path / "t.gguf", sentencepiece_keys() | keys)
        write_tokenizer(file, tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").encode("abc", add_special_tokens=False) == expected


def test_no_merge_leads_to_a_control_token(tmp_path: Path):
    """SentencePiece never makes one of text; merges derived from the vocabulary must not either."""
    tokens = ["<unk>", "<s>", "</s>", "<", "s", ">", "<s", "▁"]
    keys = {"tokens": tokens, "token_type": [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 5, "scores": [0.0] * 8}
    write_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", sentencepiece_keys() | keys), tmp_path / "out")
    merges = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["<", "s"]]


@pytest.mark.parametrize(("prefix", "text"), [(True, "▁the"), (False, "the")])
def test_the_space_prefix_is_as_the_file_says(tmp_path: Path, prefix: bool, text: str):
    keys = sentencepiece_keys(add_space_prefix=prefix, add_bos_token=False)
    write_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", keys), tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    ids = ours.encode("the")
    assert b"".join(map(ours.token_bytes, ids)).decode() == text.replace("▁", " ")
    assert ours.decode(ids) == "the"


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path):
    write_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", byte_level_keys()), tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    id = ours.token_id("<tool>")
    assert ours.encode("<tool>", allow_special=False) == [id]
    assert id not in ours.special_ids
    assert ours.special_spellings.keys() == {"<|start|>", "<|end|>", "<|endoftext|>", "<|trim|>"}


def test_named_templates_defaults_and_ends_of_turn_are_kept(tmp_path: Path):
    keys = byte_level_keys(
        **{
            "tokenizer.chat_template": "{{ messages }}<|end|>",
            "tokenizer.chat_template.tool_use": "{{ tools }}",
            "general.sampling.temp": 0.5,
            "llama.context_length": 4096,
        }
    )
    write_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", keys), tmp_path / "out")
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    templates = {entry["name"]: entry["template"] for entry in config["chat_template"]}
    assert templates == {"default": "{{ messages }}<|end|>", "tool_use": "{{ tools }}"}
    assert config["model_max_length"] == 4096
    ids = {token: id for id, token in enumerate(keys["tokens"])}
    assert generation["eos_token_id"] == [ids["<|endoftext|>"], ids["<|end|>"]]
    assert generation["temperature"] == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "bert"}, "its tokenizer is 'bert'"),
        (byte_level_keys("jais-13b"), r"'jais-13b', which is not known.*(\n.*)*safetensors"),
        (byte_level_keys(None), "is None, which is not known"),
        (byte_level_keys(tokens=["a", "a"], token_type=[1, 1]), "same spelling"),
        (byte_level_keys(token_type=[1]), "token_type does not hold one value"),
        (byte_level_keys(merges=["Ġ nowhere"]), "not in the vocabulary"),
        (byte_level_keys(bos_token_id=1_000_000), "bos_token_id is 1000000"),
        (byte_level_keys(tokens=[1, 2]), "list of strings"),
    ],
)
def test_what_cannot_be_converted_is_said_by_name(tmp_path: Path, keys: dict[str, Any], message: str):
    file = write_gguf_tokenizer(tmp_path / "t.gguf", keys)
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(file, tmp_path / "out")


def test_a_folder_with_files_is_not_touched(smollm2_gguf: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConvertError, match="exists already"):
        convert(smollm2_gguf, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_error_of_a_child_is_one_message_and_leaves_nothing(tmp_path: Path):
    file = write_gguf_tokenizer(tmp_path / "t.gguf", byte_level_keys())
    with pytest.raises(ConvertError, match=r"llama\.attention\.head_count is None"):
        convert(file, tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConvertError, match="not a usable GGUF file"):
        convert(tmp_path / "bad.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "t.gguf"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path, smollm2_gguf: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, 1):
        (tmp_path / f".out.{pid}.partial").mkdir()
    with pytest.raises(ConvertError):
        convert(tmp_path / "missing.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.1.partial"]


def test_importing_it_loads_neither_numpy_nor_tokenizers():
    code = "import sys, server.gguf_tokenizer; print({'numpy', 'torch', 'gguf', 'tokenizers'} & set(sys.modules))"
    home = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, check=True)
    assert result.stdout.strip() == "set()"


def test_the_byte_alphabet_is_gpt2s():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in ("é", "\n", " ", "~", "中", "\x7f"):
        (piece, _), *_ = encoder.pre_tokenize_str(char)
        assert bytes(byte_alphabet()[c] for c in piece) == char.encode()
