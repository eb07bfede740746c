"""A GGUF file's weights as an ordinary Hugging Face folder: config.json and safetensors.

    python -m engine.convert FILE.gguf FOLDER [--dtype auto|float32|float16|bfloat16|packed]

Knows weights and config, not tokenizers (server.gguf_tokenizer writes those). No torch: numpy, and the `gguf` package
to dequantise. Tensors go through in slices of rows, so memory does not grow with the model. Files get their names at
the end and config.json comes last: a folder with a config.json is complete.

`--dtype auto` keeps F32, F16 and BF16 files as they are (mixtures: what most values have). Quantised files become
bfloat16: rounding to its 8 bits errs by at most 2^-9 of a value, well below what the quantisation itself lost (Q8_0:
half a step is 2^-8 of a block's largest value, 4-bit types: 2^-4), while float16's range would be a risk for
activations of models that were trained in bfloat16, and a few large values could not be held at all. With
`--dtype float32` every value is exactly what `gguf` dequantises. `--dtype packed` keeps the blocks of quantised
matrices byte for byte, for engine/quantization/gguf.py: a folder that only Penstock reads, at the file's own size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.errors import CheckpointError
from engine.gguf_config import Target, checkpoint_tensors, model_config
from engine.gguf_file import GgufFile, TensorInfo, read_gguf
from engine.quantization.gguf import TYPES as PACKABLE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLICE_BYTES = 1 << 26  # of float32 at a time
MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}  # safetensors' name, bytes
KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Report = Callable[[float, float], None]  # bytes written, bytes in all


def convert_weights(
    file: Path, folder: Path, dtype: str = "auto", report: Report | None = None, max_shard: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and model*.safetensors into `folder`. Raises CheckpointError, OSError."""
    gguf = read_gguf(file)
    source = _Source(gguf)
    factors = source.values("rope_freqs.weight") if "rope_freqs.weight" in gguf.tensors else None
    config = model_config(gguf, factors)
    targets = checkpoint_tensors(gguf, config)
    packed = {target.name: kind for target in targets if dtype == "packed" and (kind := source.packable(target))}
    dtype = source.main_dtype() if dtype in ("auto", "packed") else dtype
    vectors = "float32" if packed else dtype
    layouts = [source.layout(target, dtype, vectors, target.name in packed) for target in targets]
    shards = _shards(layouts, max_shard)
    sizes = [sum(layout.nbytes for layout in shard) for shard in shards]
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < sum(sizes):
        raise CheckpointError(f"{folder} has no room for {sum(sizes) / 1e9:.1f} GB of {dtype} weights.")
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    done = 0
    for name, shard, size in zip(names, shards, sizes, strict=True):
        with (folder / f"{name}.partial").open("wb") as out:
            _write_shard(out, shard, source, _from(done, sum(sizes), report))
        done += size
    for name in names:
        os.replace(folder / f"{name}.partial", folder / name)
    if len(shards) > 1:
        weight_map = {part.target.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    quantization = {"quantization_config": {"quant_method": "gguf", "tensors": packed}} if packed else {}
    write_json(folder / "config.json", {**config, "torch_dtype": dtype, **quantization})


def write_json(path: Path, content: object) -> None:
    """Under a temporary name first, so that a file with the right name is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _from(done: int, total: int, report: Report | None) -> Callable[[int], None]:
    return lambda written: report(done + written, total) if report else None


@dataclass(frozen=True)
class _Layout:
    """A tensor as it will be written."""

    target: Target
    dtype: str  # of DTYPES, or "packed"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (1 if self.dtype == "packed" else DTYPES[self.dtype][1])


def _shards(layouts: Sequence[_Layout], limit: int) -> list[list[_Layout]]:
    shards: list[list[_Layout]] = [[]]
    size = 0
    for layout in layouts:
        if shards[-1] and size + layout.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(layout)
        size += layout.nbytes
    return shards


def _write_shard(out: IO[bytes], shard: Sequence[_Layout], source: _Source, report: Callable[[int], None]) -> None:
    """One safetensors file: 8 bytes of header length, the header, the tensors' bytes one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for layout in shard:
        begin, end = end, end + layout.nbytes
        dtype = "U8" if layout.dtype == "packed" else DTYPES[layout.dtype][0]
        header[layout.target.name] = {"dtype": dtype, "shape": layout.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for layout in shard:
        target = layout.target
        packed = layout.dtype == "packed"
        values = (_as_dtype(rows, layout.dtype, target.source) for rows in source.slices(target))
        for data in source.bytes_of(target) if packed else values:
            out.write(data.data)
            written += data.nbytes
            report(written)


def _as_dtype(values: NDArray[np.float32], dtype: str, name: str | None) -> NDArray[np.uint8]:
    """The values' bytes in the checkpoint, little-endian."""
    import numpy as np

    if dtype == "float32":
        return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        if bool(np.any(np.isinf(halves) & np.isfinite(values))):
            raise CheckpointError(f"{name} has values that float16 cannot hold. Use --dtype bfloat16.")
        data: NDArray[np.uint8] = halves.reshape(-1).view(np.uint8)
        return data
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")  # to nearest, ties to even
    rounded[np.isnan(values)] = 0x7FC0
    packed: NDArray[np.uint8] = rounded.reshape(-1).view(np.uint8)
    return packed


class _Source:
    """The file's tensors as float32, slice by slice."""

    def __init__(self, gguf: GgufFile) -> None:
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.gguf = gguf
        self._types = {int(kind): kind for kind in GGMLQuantizationType}
        self._blocks: dict[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        self._data = np.memmap(gguf.path, dtype=np.uint8, mode="r")
        for tensor in gguf.tensors.values():
            self._check(tensor)

    def _check(self, tensor: TensorInfo) -> None:
        if tensor.type not in self._types or tensor.type not in self._blocks:
            raise CheckpointError(f"{self.gguf.path}: {tensor.name} has the type {tensor.type}, which is not known.")
        per_block, _ = self._blocks[tensor.type]
        if tensor.shape[-1] % per_block:
            raise CheckpointError(
                f"{self.gguf.path}: {tensor.name} has rows of {tensor.shape[-1]} values, not a multiple of {per_block}."
            )
        end = tensor.offset + _num_rows(tensor.shape) * self._row_bytes(tensor)
        if end > self.gguf.size:
            raise CheckpointError(
                f"{self.gguf.path} ends at byte {self.gguf.size}, but {tensor.name} ends at {end}.\n"
                "The file is cut off: fetch it again."
            )

    def _row_bytes(self, tensor: TensorInfo) -> int:
        per_block, block_bytes = self._blocks[tensor.type]
        return tensor.shape[-1] // per_block * block_bytes

    def main_dtype(self) -> str:
        """The dtype for `auto`; see the module's docstring."""
        weights: Counter[str] = Counter()
        for tensor in self.gguf.tensors.values():
            if len(tensor.shape) > 1:
                weights[self._types[tensor.type].name] += _num_rows(tensor.shape) * tensor.shape[-1]
        if any(name not in KEPT for name in weights):
            return "bfloat16"
        return KEPT[weights.most_common(1)[0][0]] if weights else "float32"

    def packable(self, target: Target) -> str:
        """The type of a quantised matrix whose blocks can be kept; "" for other tensors."""
        if target.source is None or len(target.shape) != 2:
            return ""
        kind = self._types[self.gguf.tensors[target.source].type].name
        return kind if kind in PACKABLE else ""

    def layout(self, target: Target, dtype: str, vectors: str, packed: bool) -> _Layout:
        if not packed:
            exact = dtype if len(target.shape) > 1 else vectors
            return _Layout(target, exact, target.shape)
        assert target.source is not None, "what is packed has a source"
        return _Layout(target, "packed", (target.shape[0], self._row_bytes(self.gguf.tensors[target.source])))

    def bytes_of(self, target: Target) -> Iterator[NDArray[np.uint8]]:
        """The blocks of a matrix, row by row, in slices of at most about SLICE_BYTES."""
        import numpy as np

        assert target.source is not None, "what is packed has a source"
        tensor = self.gguf.tensors[target.source]
        row_bytes, head = self._row_bytes(tensor), target.permuted_head
        step = max(1, SLICE_BYTES // (row_bytes * (head or 1))) * (head or 1)
        for first in range(0, tensor.shape[0], step):
            last = min(first + step, tensor.shape[0])
            rows = self._data[tensor.offset + first * row_bytes : tensor.offset + last * row_bytes]
            rows = rows.reshape(last - first, row_bytes)
            yield np.ascontiguousarray(_halves(rows, head) if head else rows)

    def values(self, name: str) -> list[float]:
        """All values of a small tensor."""
        tensor = self.gguf.tensors[name]
        if len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
            raise CheckpointError(f"{self.gguf.path}: {name} has the shape {list(tensor.shape)}.")
        return [float(value) for value in self._rows(tensor, 0, 1)[0]]

    def _rows(self, tensor: TensorInfo, first: int, last: int) -> NDArray[np.float32]:
        """Rows first to last as float32 [rows, columns]."""
        import numpy as np
        from gguf.quants import dequantize

        kind, row_bytes = self._types[tensor.type], self._row_bytes(tensor)
        raw = self._data[tensor.offset + first * row_bytes : tensor.offset + last * row_bytes]
        try:
            with np.errstate(all="ignore"):  # a damaged file's scales may be infinite
                values: NDArray[np.float32] = dequantize(raw.reshape(last - first, row_bytes), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.gguf.path}: {tensor.name} has the type {kind.name}, which the gguf package cannot dequantise.\n"
                "Get the file in another quantisation, for instance Q8_0."
            ) from None
        return values.reshape(last - first, tensor.shape[-1])

    def slices(self, target: Target) -> Iterator[NDArray[np.float32]]:
        """`target` from its first row to its last, as float32 blocks of at most about SLICE_BYTES."""
        import numpy as np

        if target.source is None:
            yield np.zeros(target.shape, np.float32)
            return
        tensor = self.gguf.tensors[target.source]
        if target.permuted_head:
            yield from self._permuted(tensor, target.permuted_head)
            return
        step = max(1, SLICE_BYTES // (4 * tensor.shape[-1]))
        count = _num_rows(tensor.shape)
        for first in range(0, count, step):
            yield self._rows(tensor, first, min(first + step, count))

    def _permuted(self, tensor: TensorInfo, head_dim: int) -> Iterator[NDArray[np.float32]]:
        """Undo llama.cpp's order: it pairs rotated features as neighbours, Hugging Face as halves of a head."""
        if len(tensor.shape) == 1:
            yield _halves(self._rows(tensor, 0, 1).reshape(-1, 1), head_dim)
            return
        step = max(1, SLICE_BYTES // (4 * tensor.shape[-1] * head_dim)) * head_dim
        for first in range(0, tensor.shape[0], step):
            yield _halves(self._rows(tensor, first, min(first + step, tensor.shape[0])), head_dim)


def _halves(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """[heads * head_dim, columns]: within each head, rows 0 2 4 ... then 1 3 5 ..."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _num_rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _print_progress() -> Report:
    last = 0.0

    def report(done: float, total: float) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > 0.1:
            last = time.monotonic()
            print(f"progress {done:.0f} {total:.0f}", flush=True)

    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Progress goes to stdout as lines `progress DONE TOTAL`, an error to stderr with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m engine.convert", description="GGUF weights to safetensors")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["auto", *DTYPES, "packed"], default="auto")
    args = parser.parse_args(argv)
    try:
        convert_weights(args.file, args.folder, args.dtype, _print_progress())
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
