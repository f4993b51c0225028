"""Arrays laid end to end on a GPU: as a view where they lie so already, else by one launch.  (docs: A.27)

The launch is told where the arrays are by a table of addresses, which the host sends. In a recording the
addresses are those of every replay, and the table is filled when the recording is done (`late`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from tinydiff.backend import constant_like
from tinydiff.kernels._cupy_compile import THREADS, compiled, kind_of

__all__ = ["end_to_end", "late"]

CHUNK = 4096  # elements of a block

SOURCE = r"""
extern "C" __global__ void lay(const long long* addresses, const long long* chunks, REAL* flat) {
  const long long* chunk = chunks + 4 * (long long)blockIdx.x;
  const REAL* from = (const REAL*)addresses[chunk[0]] + chunk[1];
  REAL* to = flat + chunk[2];
  for (int i = threadIdx.x; i < chunk[3]; i += THREADS) to[i] = from[i];
}
"""

_of_this_thread = threading.local()  # what `late` has put off: another may train meanwhile


@contextmanager
def late() -> Iterator[list[tuple[Any, np.ndarray]]]:
    """Within it nothing is sent: the list gets (array there, what to send), to be sent when it may be."""
    before = getattr(_of_this_thread, "unsent", None)
    unsent: list[tuple[Any, np.ndarray]] = []
    _of_this_thread.unsent = unsent
    try:
        yield unsent
    finally:
        _of_this_thread.unsent = before


def _sent(numbers: np.ndarray) -> Any:
    unsent = getattr(_of_this_thread, "unsent", None)
    if unsent is None:
        return cupy.asarray(numbers)
    # Not of the recording's memory: at a replay, launches before this one would write there.
    memory = cupy.get_default_memory_pool().malloc(numbers.nbytes)
    there = cupy.ndarray(numbers.shape, numbers.dtype, memptr=memory)
    unsent.append((there, numbers))
    return there


def _chunks(*sizes: int) -> np.ndarray:
    """(blocks, 4): which array, where in it, where in all, how many."""
    rows = []
    place = 0
    for which, size in enumerate(sizes):
        starts = np.arange(0, size, CHUNK)
        counts = np.minimum(CHUNK, size - starts)
        rows.append(np.stack([np.full_like(starts, which), starts, place + starts, counts], axis=1))
        place += size
    return np.concatenate(rows)


def end_to_end(arrays: Sequence[Any]) -> Any:
    """The arrays' elements in a row, (size,), only to be read: it may be a view.  All are of one dtype."""
    arrays = [cupy.ascontiguousarray(array) for array in arrays]
    first, sizes = arrays[0], [array.size for array in arrays]
    addresses = np.asarray([array.data.ptr for array in arrays], np.int64)
    one_memory = all(array.data.mem is first.data.mem for array in arrays)
    ends = addresses + np.asarray(sizes, np.int64) * first.itemsize
    if one_memory and np.array_equal(ends[:-1], addresses[1:]):
        return cupy.ndarray((sum(sizes),), first.dtype, memptr=first.data)
    flat = cupy.empty(sum(sizes), first.dtype)
    chunks = constant_like(_chunks, *sizes, like=first, dtype=np.int64)
    if len(chunks):
        args = (_sent(addresses), chunks, flat)
        compiled(SOURCE, "lay", kind_of(first))((len(chunks),), (THREADS,), args)
    return flat
