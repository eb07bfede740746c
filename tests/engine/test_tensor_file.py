"""A safetensors header is believed only where the file bears it out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.tensor_file import MAX_HEADER_BYTES, read_header, read_tensor


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from its parts; `header` is JSON or bytes, `length` lies about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HOSTILE: list[tuple[str, Any, int]] = [
    ("its data_offsets lie outside", {"a": ENTRY | {"data_offsets": [0, 2**62]}}, 24),
    ("its data_offsets lie outside", {"a": ENTRY | {"data_offsets": [24, 0]}}, 24),
    ("its data_offsets lie outside", {"a": ENTRY | {"data_offsets": [-24, 0]}}, 24),
    ("its data_offsets lie outside", {"a": ENTRY | {"data_offsets": [0, 24, 48]}}, 24),
    ("its data_offsets lie outside", {"a": ENTRY | {"data_offsets": [0.0, 24.0]}}, 24),
    ("takes 24 bytes, but its data_offsets span 16", {"a": ENTRY | {"data_offsets": [0, 16]}}, 24),
    ("its shape is no list", {"a": ENTRY | {"shape": [-2, -3]}}, 24),
    ("its shape is no list", {"a": ENTRY | {"shape": [1] * 9}}, 24),
    ("its shape is no list", {"a": ENTRY | {"shape": [True, 6]}}, 24),
    ("takes 0 bytes", {"a": ENTRY | {"shape": [2**62, 2**62, 0]}}, 24),
    ("span 24", {"a": ENTRY | {"shape": [2**62] * 8}}, 24),
    ("its dtype is none of", {"a": ENTRY | {"dtype": "F99"}}, 24),
    ("its dtype is none of", {"a": ENTRY | {"dtype": ["F32"]}}, 24),
    ("expected exactly dtype, shape and data_offsets", {"a": {"dtype": "F32"}}, 24),
    ("expected exactly dtype, shape and data_offsets", {"a": ENTRY | {"extra": 1}}, 24),
    ("expected exactly dtype, shape and data_offsets", {"a": [1]}, 24),
    ("overlaps another", {"a": ENTRY, "b": ENTRY}, 24),
    ("overlaps another", {"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 44]}}, 44),
    ("leaves a gap of 8 bytes", {"a": ENTRY, "b": ENTRY | {"data_offsets": [32, 56]}}, 56),
    ("belong to no tensor", {"a": ENTRY}, 100),
    ("appears twice", b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(ENTRY).encode()}, 24),
    ("not valid JSON", b'{"a": ', 24),
    ("not valid JSON", b"\xff\xfe{}", 24),
    ("not valid JSON", b'{"a": ' + b"9" * 5000 + b"}", 24),
    ("nested too deeply", b"[" * 100_000, 24),
    ("expected a JSON object", b"[]", 24),
]


@pytest.mark.parametrize(("message", "header", "data"), HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, message: str, header: Any, data: int) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.safetensors: ")


@pytest.mark.parametrize("length", [0, 23, 2**31, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_absurd_header_lengths_are_refused(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": ENTRY}, bytes(24), length=length)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "model.safetensors")


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:  # a sparse file as large as a million tensors' header
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="headers may have 25,000,000"):
        read_header(tmp_path / "x")


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path: Path) -> None:
    drawn = torch.randn(6)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]},
    }
    write_raw(tmp_path / "x", header, b"\0" + drawn.numpy().tobytes())
    assert torch.equal(read_tensor(read_header(tmp_path / "x")["x"]), drawn.view(2, 3))
