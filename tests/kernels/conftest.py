"""Triton's kernels run in its interpreter where there is no GPU; each test draws fresh numbers from a printed seed."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for name, module in list(sys.modules.items()):
        # Triton reads the variable when it decorates a kernel: what other tests imported before is imported anew.
        if name.startswith("kernels.") and getattr(module, "tl", None) is not None:
            del sys.modules[name]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Numbers on the CPU, the same for every device. PENSTOCK_SEED=… replays a failure."""
    seed = int(os.environ.get("PENSTOCK_SEED") or random.randrange(2**31))
    print(f"PENSTOCK_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"
