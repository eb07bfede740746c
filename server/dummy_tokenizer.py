"""A tokenizer for a folder that has none, under --load-format dummy, whose random weights say nothing anyhow.

Knows how long the prompts of a load test must come out: each word of `benchmarks.workload`, with the space before it,
is one token; every other text is bytes. Each id up to the model's vocab_size has a text of its own, so an answer
streams as a real one does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from benchmarks.workload import WORDS
from server.paths import cache_dir
from server.tokenizer import byte_alphabet

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # with ChatML's, so that chat requests can be timed too
SMALLEST, LARGEST = 1024, 1 << 20  # entries
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VERSION = "2"  # raise it when what is written changes, so that old folders are not used


def completed_folder(folder: Path, vocab_size: int) -> Path:
    """A folder in the cache with `folder`'s JSON files and a tokenizer; made once for each content. Raises OSError."""
    files = sorted(folder.glob("*.json"))
    digest = hashlib.sha256(VERSION.encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    made = cache_dir() / "dummy" / f"{folder.name}-{digest.hexdigest()[:12]}"
    if (made / "tokenizer.json").is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as place:
        for file in files:
            shutil.copyfile(file, Path(place) / file.name)
        write_tokenizer(Path(place), vocab_size)
        target = tempfile.mkdtemp(dir=made.parent)
        for file in Path(place).iterdir():
            os.replace(file, Path(target) / file.name)
        try:
            os.rename(target, made)
        except OSError:  # another server made it meanwhile
            shutil.rmtree(target)
    return made


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json and tokenizer_config.json, for transformers too. ValueError as `spec`."""
    (folder / "tokenizer.json").write_bytes(orjson.dumps(spec(vocab_size)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[-1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))


def spec(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE with vocab_size ids. ValueError outside SMALLEST to LARGEST."""
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ValueError(f"a stand-in tokenizer has {SMALLEST} to {LARGEST} entries, not {vocab_size}")
    tokens = dict.fromkeys(byte_alphabet())
    merges = list(dict.fromkeys(_merges(WORDS)))
    tokens |= dict.fromkeys("".join(pair) for pair in merges)
    filled = vocab_size - len(SPECIAL)
    tokens |= dict.fromkeys(f"\u0120t{i}" for i in range(filled - len(tokens)))
    assert len(tokens) == filled, "a filler spells a word"
    added = [
        {"id": filled + i, "content": text, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, text in enumerate(SPECIAL)
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": GPT2_SPLIT,
        "post_processor": None,
        "decoder": GPT2_SPLIT,
        "model": model,
    }


def _merges(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Letter by letter, each pair from the space before the word on: no merge can take letters from its middle."""
    for word in (f"\u0120{word}" for word in words):
        for end in range(1, len(word)):
            yield word[:end], word[end]
