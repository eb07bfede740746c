"""The stand-in tokenizer of --load-format dummy."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.workload import prompt
from server.chat_template import ChatTemplates
from server.detokenizer import Detokenizer
from server.dummy_tokenizer import spec
from server.model_source import Located, SourceError, locate, with_tokenizer
from server.tokenizer import Tokenizer, TokenizerFiles, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_folder(tmp_path: Path, vocab_size: object) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return folder


def complete(folder: Path) -> Located:
    return with_tokenizer(locate(str(folder), load_format="dummy"))


def test_a_load_tests_prompt_has_as_many_tokens_as_words_and_other_text_survives() -> None:
    tokenizer = Tokenizer(TokenizerFiles(spec(4096), {}, {}))
    rng = random.Random(4)
    for count in (1, 7, 200):
        assert len(tokenizer.encode(prompt(rng, count))) == count
    text = " größer \n\t→ 0123 <|im_end|>"
    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not tokenizer.special_ids & set(ids)


def test_every_id_streams_a_text_of_its_own() -> None:
    tokenizer = Tokenizer(TokenizerFiles(spec(2000), {}, {}))
    assert tokenizer.vocab_size == 2000
    words = range(256, 1997)
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push([id]) for id in words]
    assert all(pieces)
    assert len(set(pieces)) == len(words)


def test_a_folder_without_a_tokenizer_is_completed_once_for_each_content(tmp_path: Path, cache: Path) -> None:
    folder = model_folder(tmp_path, 3000)
    located = complete(folder)
    assert located.folder.is_relative_to(cache)
    assert "stand-in" in located.how
    assert (located.folder / "config.json").read_text() == (folder / "config.json").read_text()
    assert load_tokenizer(located.folder).vocab_size == 3000
    assert ChatTemplates.load(located.folder).source == "family chatml"
    assert complete(folder).folder == located.folder
    assert [path.name for path in (cache / "dummy").iterdir()] == [located.folder.name]
    (folder / "config.json").write_text('{"vocab_size": 3001}')
    assert complete(folder).folder != located.folder
    assert locate(str(folder)).folder == folder


def test_a_folder_with_a_tokenizer_or_a_broken_config_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "many")
    assert complete(folder).folder == folder
    (folder / "config.json").write_text('{"vocab_size": 3000}')
    (folder / "tokenizer.json").write_text("{}")
    assert complete(folder).folder == folder


def test_a_vocabulary_that_no_stand_in_can_have_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"not 300\.\nPut the model's own there"):
        complete(model_folder(tmp_path, 300))
