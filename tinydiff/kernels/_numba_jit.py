"""How every kernel of the Numba twin is compiled.

``nogil``: the threads of ``_threads.py`` run side by side. ``error_model="numpy"``: dividing by zero gives
infinity, not an exception. Of the fast-math flags only ``contract`` is set: a product and a sum may become
one fused instruction, which rounds once where the definition rounds twice. Nothing is reordered, and NaN and
infinity are what they are elsewhere: the trainer looks for them in the loss.

What is compiled is kept on disk, beside this file or, where that cannot be written, in the user's cache
directory (``NUMBA_CACHE_DIR`` names another). Where neither can be written it is compiled in every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core.compiler_lock import global_compiler_lock

__all__ = ["OPTIONS", "fits", "inlined", "jit"]

# A fork has none of its parent's threads, and would wait in vain for one that was compiling.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def _sources() -> list[tuple[str, float, int]]:
    """The names, times and sizes of the files that may be compiled into one another."""
    files = sorted(Path(__file__).parent.glob("_numba_*.py"))
    return [(file.name, file.stat().st_mtime, file.stat().st_size) for file in files]


def jit(function: Callable[..., Any]) -> Any:
    """Compile at the first call for each new combination of dtypes; from the cache where there is one."""
    try:
        compiled = njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # "no locator available": nowhere to write
        return njit(**OPTIONS)(function)
    # Numba trusts its cache as long as the function's own file is unchanged. But the other files of this twin
    # are compiled into it. Should a later Numba keep this stamp elsewhere, only those who edit them notice.
    with suppress(AttributeError):
        compiled._cache._cache_file._source_stamp = _sources()
    return compiled


def inlined(function: Callable[..., Any]) -> Any:
    """Compile as part of each caller, so that lengths known there are known here."""
    return njit(forceinline=True, **OPTIONS)(function)


def fits(*arrays: np.ndarray) -> bool:
    """Whether the kernels are written for these: all float32 or all float64."""
    dtype = arrays[0].dtype
    return dtype in (np.float32, np.float64) and all(array.dtype == dtype for array in arrays)
