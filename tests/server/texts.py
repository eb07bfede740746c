"""Random text of many scripts, and small tokenizers of each kind, written as model folders."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SCRIPTS = {
    "ascii": (0x20, 0x7E),
    "latin": (0xA0, 0x24F),
    "combining": (0x300, 0x36F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x52F),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE01, 0xE5B),
    "punctuation": (0x2000, 0x206F),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "emoji": (0x1F300, 0x1F6FF),
    "digits": (0x30, 0x39),
    "space": (0x20, 0x20),
    "newlines": (0x09, 0x0D),
}
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then it sleeps; the dog does not.",
    "Größe und Maß, à bientôt; naïve façade. Привет, мир! Как дела? Добрый день.",
    "日本語のテキストと中文文本。안녕하세요 세계. नमस्ते दुनिया. مرحبا بالعالم",
    "def f(x):\n    return x + 1\n\nfor i in range(10):\n    print(f(i))  # 12345 67.89",
] * 4
TEKKEN = (  # how Mistral's tokenizers cut text
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("byte_level", "fallback", "unigram", "wordpiece", "tekken", "gpt2", "smollm2")
SPECIALS = ("<|start|>", "<|end|>", "<|endoftext|>")


def random_text(rng: random.Random, pieces: int = 20) -> str:
    """Runs of one to eight characters from random scripts."""
    runs = []
    for _ in range(rng.randint(1, pieces)):
        low, high = SCRIPTS[rng.choice(list(SCRIPTS))]
        runs.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))))
    return "".join(runs)


@cache
def toy_spec(kind: str) -> str:
    """tokenizer.json of a small tokenizer: byte_level, fallback (Llama-like), unigram, gpt2, tekken or wordpiece."""
    if kind == "byte_level":
        toy = Tokenizer(models.BPE())
        toy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        toy.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        toy.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
        toy.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
        toy.add_special_tokens([AddedToken("<|trim|>", normalized=False, rstrip=True, lstrip=True)])
        toy.add_tokens([AddedToken("<tool>", normalized=False)])
        return toy.to_str()
    if kind == "fallback":
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        toy = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        toy.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        toy.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        words = [word for line in CORPUS[:2] for word in line.split()]
        toy.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, special_tokens=names))
        spec = json.loads(toy.to_str())
        spec["added_tokens"] = spec["added_tokens"][:3]
        return json.dumps(spec)
    if kind == "gpt2":
        toy = Tokenizer(models.BPE())
        toy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        toy.decoder = decoders.ByteLevel(add_prefix_space=True)
        toy.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        toy.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
        )
        return toy.to_str()
    if kind == "tekken":  # whole words first, digits one by one, special tokens before all others
        toy = Tokenizer(models.BPE(ignore_merges=True))
        toy.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(TEKKEN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        toy.decoder = decoders.ByteLevel()
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{i}>" for i in range(5, 20))]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        toy.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=names)
        )
        toy.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return toy.to_str()
    if kind == "wordpiece":
        toy = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        toy.normalizer = normalizers.BertNormalizer(lowercase=True)
        toy.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        toy.decoder = decoders.WordPiece()
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        toy.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=names))
        toy.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return toy.to_str()
    assert kind == "unigram"
    toy = Tokenizer(models.Unigram())
    toy.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    toy.decoder = decoders.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>"]
    toy.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=names, unk_token="<unk>", show_progress=False)
    )
    return toy.to_str()


def write_toy(folder: Path, kind: str, **config: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json (`config`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(toy_spec(kind), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
