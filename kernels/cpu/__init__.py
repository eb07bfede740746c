"""The operations compiled for this CPU by Numba: no compiler is needed on the user's machine.

Knows tensors (addresses and shapes); no request, no model. All operations share one pool of threads (`threads.py`),
and each gives a row the same bits whatever rows are beside it.

Importing this package imports Numba. Compiled code is kept on disk under NUMBA_CACHE_DIR, else beside these files, in
a folder named by a digest of the sources: Numba itself looks only at the file that a function is written in.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba


def _cache_folder() -> str:
    """Where this version of the sources keeps its compiled code."""
    here = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {os.environ.get('PENSTOCK_SIMD_WIDTH', '')}".encode())
    for source in sorted(here.glob("*.py")):
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or here / "__pycache__"
    return str(Path(base) / f"penstock-{digest.hexdigest()[:12]}")


numba.config.CACHE_DIR = _cache_folder()

from kernels.cpu.attention import paged_attention  # noqa: E402  (after the cache folder is set)
from kernels.cpu.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from kernels.cpu.rope_kv import rope_kv  # noqa: E402
from kernels.cpu.sample import sample  # noqa: E402
from kernels.cpu.silu_mul import silu_mul  # noqa: E402
from kernels.cpu.threads import set_threads  # noqa: E402

__all__ = ["add_rms_norm", "paged_attention", "rms_norm", "rope_kv", "sample", "set_threads", "silu_mul"]
