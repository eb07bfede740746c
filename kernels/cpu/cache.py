"""Where compiled code is kept on disk: under NUMBA_CACHE_DIR, else beside these files; importing this sets it.

The folder is named by a digest of all sources here, since Numba looks only at the file that a function is written in
and would run old code after a change in another.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba


def folder() -> Path:
    """The folder of this version of the sources."""
    here = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {os.environ.get('PENSTOCK_SIMD_WIDTH', '')}".encode())
    for source in sorted(here.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(os.environ.get("NUMBA_CACHE_DIR") or here / "__pycache__") / f"penstock-{digest.hexdigest()[:12]}"


numba.config.CACHE_DIR = str(folder())
