"""The head of a GGUF file (version 2 or 3): metadata and the list of tensors, read with every length checked.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); not what keys or tensors mean, nor how
blocks are dequantised. Needs neither numpy nor the `gguf` package, whose reader trusts the file's counts.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_ITEMS = 1 << 22  # of one array; the largest vocabularies have 2^18 tokens
MAX_NAME_BYTES = 1 << 10
MAX_HEAD_BYTES = 1 << 28
MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. shape is [rows, ..., columns] as in numpy; type is ggml's number; offset counts from 0."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked head. Tensor offsets lie inside the file; whether the data fits depends on the type's block size."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads little-endian values one after another; whatever would lie beyond the end is an error."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, min(size, MAX_HEAD_BYTES), 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"at byte {self.at} it needs {count} bytes more than it can have")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def string(self, limit: int = MAX_HEAD_BYTES) -> str:
        length = self.scalar("Q")
        if length > limit:
            raise ValueError(f"at byte {self.at} a string has {length} bytes")
        return self.take(length).decode("utf-8")

    def count(self, limit: int, what: str) -> int:
        value: int = self.scalar("Q")
        if value > limit:
            raise ValueError(f"it claims {value} {what}; at most {limit} are taken")
        return value

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or nested:  # no key in use holds arrays of arrays
            raise ValueError(f"at byte {self.at} a value has the type {kind}, which is not read here")
        item, length = self.scalar("I"), self.count(MAX_ITEMS, "items in an array")
        if item in SCALARS:
            code = f"<{length}{SCALARS[item]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self.value(item, nested=True) for _ in range(length)]


def read_gguf(path: str | Path) -> GgufFile:
    """Raises CheckpointError for anything that is not a sound GGUF head."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _read(_Cursor(data, size), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a usable GGUF file: {error}.\nIt may be cut off or damaged: fetch it again."
        ) from None
    return GgufFile(path, size, metadata, tensors)


def _read(cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3" + (" (big-endian?)" if version & 0xFFFF == 0 else ""))
    num_tensors, num_keys = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise ValueError(f"the key {key} appears twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    heads = [_tensor_head(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in heads:
        if name in tensors:
            raise ValueError(f"the tensor {name} appears twice")
        if start + offset >= size or offset % alignment:
            raise ValueError(f"the tensor {name} begins at {start + offset}, outside the file's {size} bytes")
        tensors[name] = TensorInfo(name, shape, kind, start + offset)
    return metadata, tensors


def _tensor_head(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(MAX_NAME_BYTES)
    dimensions = cursor.scalar("I")
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    if not all(0 < length < 1 << 40 for length in shape):
        raise ValueError(f"the tensor {name} has the shape {list(shape)}")
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")
