"""How every kernel of the Numba twin is compiled.

``nogil``: the threads of ``_threads.py`` run side by side. ``error_model="numpy"``: dividing by zero gives
infinity, not an exception. Of the fast-math flags only ``contract``: a product and a sum may become one
fused instruction, which rounds once where the definition rounds twice. Nothing is reordered, and NaN and
infinity are what they are elsewhere: the trainer looks for them in the loss.

What is compiled is kept on disk, beside this file or, where that cannot be written, in the user's cache
directory (``NUMBA_CACHE_DIR`` names another). Where neither can be written it is compiled in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

__all__ = ["OPTIONS", "fits", "inlined", "jit"]

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def jit(function: Callable[..., Any]) -> Any:
    """Compile at the first call for each new combination of dtypes; from the cache where there is one."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # "no locator available": nowhere to write
        return njit(**OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile as part of each caller, so that lengths known there are known here."""
    return njit(forceinline=True, **OPTIONS)(function)


def fits(*arrays: np.ndarray) -> bool:
    """Whether the kernels are written for these: all float32 or all float64."""
    dtype = arrays[0].dtype
    return dtype in (np.float32, np.float64) and all(array.dtype == dtype for array in arrays)
