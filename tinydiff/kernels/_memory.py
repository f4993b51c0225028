"""Where arrays lie: in memory that is kept from one step for the next, at whole lines of the cache.

By default glibc hands large arrays back to the system as soon as they are freed and asks for them again,
page by page, on the next step. Measured on 300 training steps of the plane's MLP: 266,027 page faults and
0.54 s in the kernel beside 1.9 s of arithmetic; with freed memory kept, 16 and 0.0 s. The most memory held
at a time did not change (it cannot: what is kept is what was used).

What NumPy asks for begins at any multiple of 16 bytes. A vector of 64 that is stored across two lines takes
twice the time: adding two arrays into a third of 128 KiB goes at 10.5 billion float32 numbers a second where
the third begins with a line, and otherwise at 5.3. So arrays that kernels go through many times are made by
`empty`. Finding the address takes one or two microseconds, so small arrays are left where they are.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from contextlib import suppress

import numpy as np

__all__ = ["empty", "keep_freed_memory", "ones"]

LINE = 64  # bytes of a line of cache, and of the longest vector


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As ``np.empty``, but beginning with a line of the cache."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + LINE, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.ctypes.data % LINE)


@functools.lru_cache(maxsize=32)
def ones(n: int, dtype: np.dtype) -> np.ndarray:
    """A row of ones, to sum by a product; kept, and not to be written to."""
    row = np.ones(n, dtype)
    row.flags.writeable = False
    return row


# The parameters of glibc's mallopt, from malloc.h, and its largest threshold for mmap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator, where there is one, to keep what is freed."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            if mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD):
                mallopt(M_TRIM_THRESHOLD, NEVER)
