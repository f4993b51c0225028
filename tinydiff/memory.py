"""Whether a batch fits in memory, and how large one may be.

A step of training keeps what its backward needs, so its memory is a part that does not depend on the batch
and one in proportion to it:

    need(n) = fixed + n * per_sample

On a GPU an allocation that does not fit fails at once, and to try is the surest estimate. On a host it may
succeed and bring the machine to a halt when the memory is used. There two small steps are measured instead,
and the line through them is followed up to half of what is free.
"""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tinydiff._control_groups import memory_left
from tinydiff.backend import Array, is_cupy_array, is_numpy_array
from tinydiff.kernels import forget_scratch

__all__ = ["attempted", "available_memory", "is_out_of_memory", "largest_batch", "let_go", "what_fits"]

# What CuPy calls it when the driver or a library of CUDA, not its own pool, was refused.
REFUSED = (
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # by cublasCreate, for want of memory
    "CUDNN_STATUS_ALLOC_FAILED",
)
UNKNOWN = 2 * 2**30  # bytes taken to be free where the system does not say


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory (CuPy's OutOfMemoryError is a MemoryError)."""
    return isinstance(error, MemoryError) or any(name in str(error) for name in REFUSED)


def attempted(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return what `work` returns, and ""; if memory runs out, None and the reason, as part of a sentence.

    By then the exception is gone, and with it the arrays that its traceback holds.
    """
    try:
        return work(), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, " ".join(str(error).split()).rstrip(".") or type(error).__name__


def what_fits(step: Callable[[int], None], like: Array, batch_size: int, refused: str) -> str:
    """What to say where a step of `batch_size` ran out of memory; `refused` is what `attempted` says of it.

    Halves of the batch are tried until one fits; on the host, none that would take more than half of what is
    free.
    """
    let_go(like)
    smaller = batch_size // 2
    if is_numpy_array(like) and smaller > 2 and _runs(step, like, 2):
        harmless = _by_two_steps(step)
        while smaller > 2 and not harmless(smaller):
            smaller //= 2
    while smaller and not _runs(step, like, smaller):
        smaller //= 2
    advice = f"a step of {smaller} fits, so try batch_size={smaller}" if smaller else "not even one of 1 fits"
    return f"a step of batch_size={batch_size} does not fit in memory ({refused}); {advice}."


def let_go(like: Array) -> None:
    """Give back what CuPy's pools hold unused, if `like` is on a GPU: it may be needed in one piece."""
    if is_cupy_array(like):
        import cupy

        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def largest_batch(step: Callable[[int], None], like: Array, most: int) -> int:
    """Return the largest power of two, `most` at most, of which a step fits in memory; 0 if 1 does not.

    Parameters
    ----------
    step : callable
        ``step(n)`` makes a step of batch n and keeps nothing of it.
    like : array
        Where the step is made.
    most : int
        At least 1.

    Returns
    -------
    int
        On the host by need(n) and half of `available_memory`; elsewhere by doubling n until a step with a
        quarter more samples fails.
    """
    if is_numpy_array(like):
        fits = _by_two_steps(step)
    else:

        def fits(n: int) -> bool:
            # A trial has CuPy's pool in one piece; a training has cut it up, and needs more of it.
            return _runs(step, like, n + n // 4)

    largest, n = 0, 1
    while n <= most and fits(n):
        largest, n = n, 2 * n
    return largest


def _by_two_steps(step: Callable[[int], None]) -> Callable[[int], bool]:
    """fits(n): whether need(n), the line through two small steps, is at most half of what is free."""
    step(1)  # so that what is made once and kept is not counted
    one, two = _peak(step, 1), _peak(step, 2)
    free = available_memory()
    allowed = (UNKNOWN if free is None else free) / 2
    return lambda n: one + (n - 1) * max(0, two - one) <= allowed


def _runs(step: Callable[[int], None], like: Array, n: int) -> bool:
    """Whether ``step(n)`` ends without running out of memory."""
    _, refused = attempted(partial(step, n))
    let_go(like)
    return not refused


def _peak(step: Callable[[int], None], n: int) -> int:
    """The most bytes that a step of batch n holds at a time (NumPy tells tracemalloc of its arrays).

    The kernels' scratch counts, from nothing: larger steps take more of it.
    """
    forget_scratch()
    traced_already = tracemalloc.is_tracing()
    if not traced_already:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step(n)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced_already:
            tracemalloc.stop()


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process may still take, or None where the system does not say.

    On Linux the least of what the kernel estimates to be free without swapping, and what is left of the
    limits of this process' control group (a container's, or a cluster job's) and of those around it.
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        if sys.platform != "win32" and "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    found += memory_left(root)
    return max(0, min(found)) if found else None
