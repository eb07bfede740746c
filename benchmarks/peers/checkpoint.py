"""Write the checkpoint that all servers are given: a shape of ours with random weights, and its GGUF forms.

    python benchmarks/peers/checkpoint.py qwen2.5-0.5b FOLDER
    python benchmarks/peers/checkpoint.py qwen2.5-0.5b FOLDER --llama-cpp PEERS/llama.cpp --gguf bf16 f16 q8_0

The weights are those of --load-format dummy, the tokenizer is its stand-in: a word of the load test is one token in
every server. GGUF files are written beside FOLDER by llama.cpp's own converter (which needs torch, transformers, gguf).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engine import CONFIGS
from engine.checkpoint import open_checkpoint
from engine.dummy import draw
from engine.tensor_file import WEIGHT_DTYPES
from server.dummy_tokenizer import write_tokenizer

# llama.cpp's converter knows a pre-tokenizer by the hash of what it makes of one text; ours has none there.
CONVERT = """
import runpy, sys
home, *sys.argv = sys.argv[1:]
sys.path[:0] = [home, home + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_checkpoint(shape: str, folder: Path) -> None:
    """config.json, tokenizer and model.safetensors, as any Hugging Face folder."""
    folder.mkdir(parents=True)
    shutil.copyfile(CONFIGS / shape / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    write_tokenizer(folder, config["vocab_size"])
    tensors = {}
    for name, info in open_checkpoint(folder, "dummy").tensors.items():
        tensors[name] = torch.empty(info.shape, dtype=getattr(torch, WEIGHT_DTYPES[info.dtype]))
        draw(name, tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(folder: Path, kind: str, llama_cpp: Path) -> Path:
    """FOLDER-KIND.gguf, by llama.cpp's converter."""
    out = folder.with_name(f"{folder.name}-{kind}.gguf")
    script = llama_cpp / "convert_hf_to_gguf.py"
    arguments = [str(llama_cpp), str(script), str(folder), "--outfile", str(out), "--outtype", kind]
    subprocess.run([sys.executable, "-c", CONVERT, *arguments], check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(folder.name for folder in CONFIGS.iterdir()))
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument(
        "--gguf", nargs="*", default=[], choices=("bf16", "f16", "q8_0"), help="forms to write beside it"
    )
    parser.add_argument("--llama-cpp", type=Path, default=None, help="its source, for --gguf")
    options = parser.parse_args()
    if options.gguf and options.llama_cpp is None:
        parser.error("--gguf needs --llama-cpp, the folder that install.sh made")
    if not (options.folder / "model.safetensors").exists():
        write_checkpoint(options.shape, options.folder)
    for kind in options.gguf:
        print(write_gguf(options.folder, kind, options.llama_cpp))


if __name__ == "__main__":
    main()
