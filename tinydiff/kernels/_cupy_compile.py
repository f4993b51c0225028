"""Kernels written in CUDA, compiled for one type of number by NVRTC when they are first called.

A source says REAL where it means float or double. Integers are passed as ``long long`` and numbers as
``double``, as CuPy passes Python's; arithmetic on images is in REAL.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

__all__ = ["THREADS", "blocks_of", "compiled", "kind_of"]

THREADS = 256  # of a block, where a kernel does not say otherwise; a power of two, and of warps
REALS = {"f": "float", "d": "double"}


@functools.cache
def compiled(source: str, name: str, kind: str, *defines: str) -> Any:
    """The kernel `name` of `source` for numbers of this kind ("f" or "d"): called as f(grid, block, args)."""
    if not any(define.startswith("THREADS=") for define in defines):
        defines = (f"THREADS={THREADS}", *defines)
    options = (f"-DREAL={REALS[kind]}", "-DTINYDIFF", *(f"-D{define}" for define in defines))
    return cupy.RawKernel("// TINYDIFF\n" + source, name, options=options)


def blocks_of(count: int) -> int:
    """How many blocks have a thread for each of `count` things."""
    return -(-count // THREADS)


def kind_of(x: Any) -> str:
    """The kind of x's numbers: "f" or "d"."""
    return str(np.dtype(x.dtype).char)
