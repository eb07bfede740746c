"""Incremental decoding against the library's decoding of the whole."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from server.detokenizer import Detokenizer
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.texts import KINDS, random_text, write_toy

SEED = 20261124


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "smollm2":
        return load_tokenizer(request.getfixturevalue("smollm2_dir"))
    return load_tokenizer(write_toy(tmp_path_factory.mktemp(request.param), request.param))


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Ids of any kind; runs of fallback bytes are whole characters or bytes that begin none (see detokenizer.py)."""
    table = tokenizer.pieces.table
    has_fallback = table is not None and not tokenizer.pieces.byte_level
    ids: list[int] = []
    for _ in range(rng.randint(0, 30)):
        id = rng.randrange(tokenizer.vocab_size + 5)
        if not has_fallback or id >= len(table) or isinstance(table[id], str):
            ids.append(id)
            continue
        character = chr(rng.choice([0x41, 0xE9, 0x4E2D, 0x1F600])).encode()
        run = [character, bytes([0x80] * rng.randint(1, 5)), character[:-1]][rng.randrange(3)]
        if len(run) and not (ids and ids[-1] < len(table) and isinstance(table[ids[-1]], bytes)):
            ids += [table.index(bytes([byte])) for byte in run]
            ids.append(tokenizer.token_id("▁") or 300)
    return ids


def push_in_pieces(detokenizer: Detokenizer, ids: list[int], rng: random.Random) -> str:
    text, at = "", 0
    while at < len(ids):
        step = rng.randint(1, 4)
        text += detokenizer.push(ids[at : at + step])
        at += step
    return text + detokenizer.push([], final=True)


@pytest.mark.parametrize("skip_special", [True, False])
def test_pushed_in_any_pieces_it_equals_decoding_the_whole(tokenizer: Tokenizer, skip_special: bool):
    rng = random.Random(SEED)
    for _ in range(1000):
        ids = random_ids(tokenizer, rng)
        text = push_in_pieces(Detokenizer(tokenizer, skip_special=skip_special), ids, rng)
        assert text == tokenizer.decode(ids, skip_special), (SEED, ids)


def test_no_broken_character_is_ever_shown(tokenizer: Tokenizer):
    rng = random.Random(SEED + 1)
    for _ in range(200):
        ids = tokenizer.encode(random_text(rng), add_special_tokens=False, allow_special=False)
        whole, shown = tokenizer.decode(ids), ""
        detokenizer = Detokenizer(tokenizer)
        for id in ids:
            shown += detokenizer.push([id])
            assert whole.startswith(shown), (SEED, ids)
        assert shown + detokenizer.push([], final=True) == whole


def test_at_most_three_bytes_are_held_back(tokenizer: Tokenizer):
    if tokenizer.pieces.table is None:
        pytest.skip("only where ids are bytes")
    rng = random.Random(SEED + 2)
    ids = tokenizer.encode(random_text(rng, 200), add_special_tokens=False, allow_special=False)
    detokenizer, pushed, shown = Detokenizer(tokenizer), 0, 0
    for id in ids:
        pushed += len(tokenizer.token_bytes(id))
        shown += len(detokenizer.push([id]).encode())
        assert 0 <= pushed - shown <= 3 + tokenizer.pieces.strip


def test_a_new_one_over_prompt_and_output_goes_on_where_the_first_stopped(tokenizer: Tokenizer):
    rng = random.Random(SEED + 3)
    for _ in range(200):
        ids = tokenizer.encode(random_text(rng), add_special_tokens=False, allow_special=False)
        cut = rng.randint(0, len(ids))
        before = Detokenizer(tokenizer).push(ids[:cut])
        after = Detokenizer(tokenizer, ids[:cut]).push(ids[cut:], final=True)
        assert before + after == tokenizer.decode(ids), (SEED, ids, cut)


def test_the_first_word_after_a_prompt_keeps_its_space(tmp_path: Path):
    tokenizer = load_tokenizer(write_toy(tmp_path, "fallback"))
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(ids) == "the dog"
    assert Detokenizer(tokenizer, ids).push(ids) == " the dog"
    assert Detokenizer(tokenizer, [tokenizer.special_spellings["<s>"]]).push(ids) == "the dog"


def test_a_run_of_fallback_bytes_that_breaks_keeps_the_characters_already_shown(tmp_path: Path):
    tokenizer = load_tokenizer(write_toy(tmp_path, "fallback"))
    table = tokenizer.pieces.table
    assert table is not None
    ids = [table.index(bytes([byte])) for byte in "é".encode() + b"\xff"]
    assert Detokenizer(tokenizer, [5]).push(ids, final=True) == "é\ufffd"


def test_time_is_linear(tokenizer: Tokenizer):
    few = 100 if tokenizer.pieces.table is None else 1000

    def seconds(n: int) -> float:
        ids = [i % tokenizer.vocab_size for i in range(7, n + 7)]
        detokenizer = Detokenizer(tokenizer)
        began = time.thread_time()
        for id in ids:
            detokenizer.push([id])
        return time.thread_time() - began

    # sixteen times the ids: 16 if linear, 256 if quadratic; 2.5 for a busy machine
    assert min(seconds(16 * few) for _ in range(3)) <= 2.5 * 16 * min(seconds(few) for _ in range(3))
