"""Keeping the memory of one step for the next.

By default glibc hands large arrays back to the system as soon as they are freed and asks for them again,
page by page, on the next step. Measured on 300 training steps of the plane's MLP: 266,027 page faults and
0.54 s in the kernel beside 1.9 s of arithmetic; with freed memory kept, 16 and 0.0 s. The most memory held
at a time did not change (it cannot: what is kept is what was used).
"""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["keep_freed_memory"]

# The parameters of glibc's mallopt, from malloc.h, and its largest threshold for mmap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed; returns whether it could be told."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, NEVER))
