"""Stop ids and default sampling parameters, from files that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.model_info import ModelInfo, read_model_info


def folder(path: Path, config: object, generation: object = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_all_eos_ids_of_both_files_are_honoured(tmp_path: Path) -> None:
    info = read_model_info(folder(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [7, 2, 9]}))
    assert info.eos_token_ids == [7, 2, 9]


def test_a_model_that_also_sees_has_the_facts_of_its_text_part(tmp_path: Path) -> None:
    config = {"eos_token_id": [1, 106], "text_config": {"eos_token_id": 5, "vocab_size": 300}}
    info = read_model_info(folder(tmp_path, config))
    assert (info.eos_token_ids, info.vocab_size) == ([1, 106], 300)
    assert read_model_info(folder(tmp_path, {"text_config": [3]})) == ModelInfo()


def test_the_authors_sampling_parameters_are_taken_or_ignored_as_told(tmp_path: Path) -> None:
    where = folder(tmp_path, {}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "num_beams": 4})
    assert read_model_info(where).defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert read_model_info(where, "none").defaults == {}


@pytest.mark.parametrize("bad", ["1", True, -1, None, [0.5], 1e300, {}])
def test_a_value_of_the_wrong_type_or_range_is_left_out(tmp_path: Path, bad: object) -> None:
    where = folder(tmp_path, {"eos_token_id": [bad]}, {"temperature": bad, "top_k": bad})
    info = read_model_info(where)
    assert info.defaults == {}
    assert info.eos_token_ids == []


def test_a_broken_file_gives_no_facts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert read_model_info(tmp_path) == ModelInfo()
