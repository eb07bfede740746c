"""A GGUF file's tokenizer as tokenizer.json, tokenizer_config.json and generation_config.json; and `convert`, which
turns a whole GGUF file into a model folder in two child processes.

    python -m server.gguf_tokenizer FILE.gguf FOLDER

Knows llama.cpp's names for vocabularies and pre-tokenizers; not weights (engine.convert). Needs no numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from engine.errors import CheckpointError
from engine.gguf_file import read_gguf

SPACE_MARK = "\u2581"  # SentencePiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")

Json = dict[str, Any]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")

# tokenizer.ggml.pre -> the patterns that split the text, one after another.
SPLITS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-r1-qwen": (QWEN2,),
    "gpt-2": (GPT2,),
    "gpt2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "llama3": (LLAMA3,),
    "minerva-7b": (r"\p{N}", GPT2),
    "phi-2": (GPT2,),
    "qwen2": (QWEN2,),
    "refact": (r"\p{N}", GPT2),
    "smaug-bpe": (LLAMA3,),
    "smollm": (r"\p{N}", GPT2),
    "starcoder": (r"\p{N}", GPT2),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = {"llama-bpe", "llama-v3", "llama3", "tekken"}  # a word that is a token is taken without merging
WITH_BOS = {"llama-bpe", "llama-v3", "llama3", "tekken"}  # where the file does not say
NFC = {"qwen2"}


class ConvertError(ValueError):
    """A GGUF file that cannot become a model folder; the message is for the user."""


def convert(
    file: str | Path, folder: str | Path, dtype: str = "auto", report: Callable[[float, float], None] | None = None
) -> None:
    """Turn FILE.gguf into a model folder. Blocks; report(bytes written, bytes in all) is called now and then.

    Everything is written next to `folder` and renamed at the end: a folder that exists is complete.
    Raises ConvertError, OSError.
    """
    file, folder = Path(file).absolute(), Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvertError(f"{folder} exists already. Name another folder, or delete that one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _run("server.gguf_tokenizer", [str(file), str(partial)], None)
        _run("engine.convert", [str(file), str(partial), "--dtype", dtype], report)
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What conversions into `folder` left whose process was killed."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster: the same content
            raise


def _run(module: str, arguments: list[str], report: Callable[[float, float], None] | None) -> None:
    """`python -m module` in this code's folder; its stderr is the error."""
    command = [sys.executable, "-m", module, *arguments]
    home = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(home), "PYTHONIOENCODING": "utf-8"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, encoding="utf-8") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            _follow(child.stdout, report)
            error = child.stderr.read().strip()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
        last = error.splitlines()[-1] if "Traceback" in error else error
        raise ConvertError(last or f"The conversion was ended by {name}; there may be too little memory.")


def _follow(lines: IO[str], report: Callable[[float, float], None] | None) -> None:
    for line in lines:
        words = line.split()
        if report is not None and len(words) == 3 and words[0] == "progress":
            report(float(words[1]), float(words[2]))


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the three files into `folder`. Raises CheckpointError, OSError."""
    metadata = read_gguf(file).metadata
    try:
        vocabulary = _Vocabulary(metadata)
        files = {
            "tokenizer.json": tokenizer_json(vocabulary),
            "tokenizer_config.json": _tokenizer_config(vocabulary, metadata),
            "generation_config.json": _generation_config(vocabulary, metadata),
        }
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be converted: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(partial, folder / name)


class _Vocabulary:
    """tokenizer.ggml.*, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        def get(key: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{key}", default)

        self.model = get("model")
        self.pre = get("pre")
        self.tokens: list[str] = get("tokens", [])
        if self.model not in ("gpt2", "llama"):
            raise ValueError(f"its tokenizer is {self.model!r:.40}; gpt2 (byte-level BPE) and llama are supported.")
        if not isinstance(self.tokens, list) or not all(isinstance(token, str) for token in self.tokens):
            raise ValueError("tokenizer.ggml.tokens is not a list of strings.")
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            raise ValueError("tokenizer.ggml.tokens is missing, or two tokens have the same spelling.")
        self.types = self._column(get("token_type"), "token_type", NORMAL)
        self.scores = self._column(get("scores"), "scores", 0.0)
        self.merges = get("merges")
        self.named = {
            name: self._id(get(f"{key}_token_id"), key)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot"))
        }
        with_bos = self.model == "llama" or self.pre in WITH_BOS
        self.add_bos = bool(get("add_bos_token", with_bos)) and self.named["bos"] is not None
        self.add_eos = bool(get("add_eos_token", False)) and self.named["eos"] is not None
        self.space_prefix = bool(get("add_space_prefix", True))

    def _column(self, values: Any, name: str, default: Any) -> list[Any]:
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise ValueError(f"tokenizer.ggml.{name} does not hold one value for each token.")
        return values

    def _id(self, value: Any, key: str) -> int | None:
        if value is None or value == 0xFFFFFFFF:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ValueError(f"tokenizer.ggml.{key}_token_id is {value!r:.40}, outside the vocabulary.")
        return value

    def spelling(self, name: str) -> str | None:
        id = self.named[name]
        return None if id is None else self.tokens[id]


def tokenizer_json(vocabulary: _Vocabulary) -> Json:
    """The content of tokenizer.json. Raises ValueError."""
    shape = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary)
    added = [
        _added(id, token, special=kind != USER_DEFINED)
        for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, USER_DEFINED) or id == vocabulary.named["unk"]
    ]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, "post_processor": _post_processor(vocabulary), **shape}


def _added(id: int, content: str, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **flags, "special": special}


def _post_processor(vocabulary: _Vocabulary) -> Json | None:
    bos = vocabulary.spelling("bos") if vocabulary.add_bos else None
    eos = vocabulary.spelling("eos") if vocabulary.add_eos else None
    if bos is None and eos is None:
        return None

    def around(part: str, type_id: int) -> list[Json]:
        inner: list[Json] = [{"Sequence": {"id": part, "type_id": type_id}}]
        before = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        after = [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else []
        return before + inner + after

    special = {t: {"id": t, "ids": [vocabulary.ids[t]], "tokens": [t]} for t in (bos, eos) if t}
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}


def _byte_level(vocabulary: _Vocabulary) -> Json:
    if vocabulary.pre not in SPLITS:
        raise ValueError(
            f"its pre-tokenizer (tokenizer.ggml.pre) is {vocabulary.pre!r:.60}, which is not known here.\n"
            f"Known: {', '.join(SPLITS)}. Use the model's original safetensors folder instead."
        )
    if not isinstance(vocabulary.merges, list):
        raise ValueError("tokenizer.ggml.merges is missing.")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[vocabulary.pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [merge.split(" ", 1) if isinstance(merge, str) else [] for merge in vocabulary.merges]
    ids = vocabulary.ids
    if not all(len(pair) == 2 and pair[0] in ids and pair[1] in ids and "".join(pair) in ids for pair in merges):
        raise ValueError("tokenizer.ggml.merges names a token that is not in the vocabulary.")
    return {
        "normalizer": {"type": "NFC"} if vocabulary.pre in NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**_bpe(vocabulary, merges), "ignore_merges": vocabulary.pre in WHOLE_WORDS},
    }


def _bpe(vocabulary: _Vocabulary, merges: Sequence[Sequence[str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _sentencepiece(vocabulary: _Vocabulary) -> Json:
    """SentencePiece BPE as llama.cpp runs it: the space prefix comes before each stretch between special tokens."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prefix = [{"type": "Prepend", "prepend": SPACE_MARK}] if vocabulary.space_prefix else []
    restore = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.space_prefix else []
    decoders = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    model = _bpe(vocabulary, list(_merges_of_scores(vocabulary)))
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**model, "unk_token": vocabulary.spelling("unk"), "fuse_unk": True, "byte_fallback": True},
    }


def _merges_of_scores(vocabulary: _Vocabulary) -> Iterable[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score: as merges, best first."""
    parts = {t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind not in (UNKNOWN, CONTROL)}
    ids = vocabulary.ids
    ranked = []
    for token in parts:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts:
                ranked.append((-vocabulary.scores[ids[token]], ids[token], ids[left], ids[right], left, right))
    return ((left, right) for *_, left, right in sorted(ranked))


def _tokenizer_config(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Json:
    architecture = metadata.get("general.architecture")
    names = {f"{name}_token": vocabulary.spelling(name) for name in ("bos", "eos", "unk", "pad")}
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: spelling for name, spelling in names.items() if spelling is not None},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length", 1 << 30),
    }
    if (template := _chat_template(metadata)) is not None:
        config["chat_template"] = template
    return config


def _chat_template(metadata: Mapping[str, Any]) -> Any:
    """One template, or a list of named ones as transformers writes it."""
    key = "tokenizer.chat_template"
    templates = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if not templates:
        return metadata.get(key)
    if key in metadata:
        templates = {"default": metadata[key], **templates}
    return [{"name": name, "template": text} for name, text in templates.items()]


def _generation_config(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Json:
    """Ids that begin and end; also the control tokens with which the chat template ends a turn."""
    template = json.dumps(_chat_template(metadata) or "", ensure_ascii=False)
    ends = [vocabulary.named["eos"], vocabulary.named["eot"]]
    for spelling in END_OF_TURN:
        id = vocabulary.ids.get(spelling)
        if id is not None and vocabulary.types[id] == CONTROL and spelling in template:
            ends.append(id)
    eos = list(dict.fromkeys(id for id in ends if id is not None))
    config: Json = {
        "bos_token_id": vocabulary.named["bos"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": vocabulary.named["pad"],
    }
    for ours, theirs in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        if (value := metadata.get(f"general.sampling.{theirs}")) is not None:
            config |= {"do_sample": True, ours: value}
    return {name: value for name, value in config.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """An error goes to stderr, with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m server.gguf_tokenizer", description="GGUF tokenizer to JSON files")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        write_tokenizer(args.file, args.folder)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
