"""Threads: a kernel's images are shared out to as many as BLAS would use, or as a container allows.

NumPy and BLAS release Python's lock while they compute, so ordinary threads run side by side. Each takes
one contiguous share of the images and goes through it in chunks that stay in its own cache, gathering,
multiplying and adding; BLAS is held to one thread meanwhile. That beats threads inside BLAS, which speed
up the products alone and, between products, spin on the core that the rest of the work needs.

The shares depend on the number of threads only, and what the threads return is combined in their order:
the same inputs give the same bits on every run (docs: A.18).

OpenBLAS, which NumPy's own wheels bring, is told its number of threads through its C interface. Where
NumPy was built with another BLAS there is one share, and that BLAS threads as it likes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinydiff._control_groups import processors
from tinydiff.kernels._memory import empty

__all__ = [
    "PARALLEL_SIZE",
    "alone",
    "blas_on_one_thread",
    "chunks",
    "forget_scratch",
    "in_parallel",
    "scratch",
    "sums",
    "threads_in_reach",
]

T = TypeVar("T")

# Fewer elements than this, in a chain of element-wise steps, are not worth a second thread.
PARALLEL_SIZE = 2**16

# More threads than this find too few images each, and queue for Python's lock.
MAX_THREADS = 8


class _Local(threading.local):
    """What is true of a thread."""

    alone = False
    holds = 0  # how often it holds BLAS to one thread, by `blas_on_one_thread`


_local = _Local()
_scratch = threading.local()
_one_region = threading.Lock()
_executor: ThreadPoolExecutor | None = None

# How many hold BLAS to one thread, and how many threads it had before the first of them.
_holding = threading.Lock()
_holders = _before_hold = 0


def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """OpenBLAS's functions that get and set its number of threads, found in what NumPy has loaded.

    They are found through NumPy's own module, which is linked to them; on Windows, where a module does not
    hand on what it is linked to, in the library that NumPy's wheels bring beside it.
    """
    module = getattr(sys.modules.get("numpy._core._multiarray_umath"), "__file__", None)
    files = [] if module is None else [module]
    files += map(str, (Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*"))
    for file in files:
        try:
            library: Any = ctypes.CDLL(file)
        except OSError:
            continue
        for prefix in ("scipy_", ""):
            for suffix in ("64_", "_64", ""):
                get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    put.restype = None
                    return get, put
    return None


_blas = _openblas()


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Hold BLAS to one thread for a while; kernels go on sharing work out as if it were not held.

    For a loop of many small products: two threads inside BLAS gain little on each, and between them spin on
    a core that others need. On a busy machine they make a small network's training ten times slower. Several
    threads may hold it, and end in any order: the last gives BLAS back the number that the first found.
    """
    global _holders, _before_hold
    if _blas is None:
        yield
        return
    held = 0
    try:  # Ctrl-C comes where something is called: never between the count and the notes of it
        with _holding:
            if not _holders:
                _before_hold = _blas[0]()
            _holders += 1
            _local.holds += 1
            held = 1
            if _holders == 1:
                _blas[1](1)
        yield
    finally:
        with _holding:
            _holders -= held
            _local.holds -= held
            if held and not _holders:
                _blas[1](_before_hold)


@contextmanager
def alone() -> Iterator[None]:
    """Within it this thread's kernels do not share work out: other processes are on the other cores."""
    before = _local.alone
    try:
        _local.alone = True
        with blas_on_one_thread():
            yield
    finally:
        _local.alone = before


@functools.cache
def _most_threads() -> int:
    """As many as get a processor's time: of many processors, a container may be given the time of a few."""
    return processors() or sys.maxsize


def threads_in_reach() -> int:
    """How many threads BLAS would use, if they may run at once; 1 where there is no way to ask."""
    if _blas is None or _local.alone:
        return 1
    with _holding:
        return min(_before_hold if _holders else _blas[0](), _most_threads())


def _threads() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(MAX_THREADS - 1, thread_name_prefix="tinydiff")
    return _executor


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that one of them held."""
    global _executor, _one_region, _holding
    _executor, _one_region, _holding = None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _begin(work: Callable[[int, int], T], start: int, stop: int) -> Future[T]:
    """``work(start, stop)`` in a thread, in the caller's context; or here, if the program starts no more."""
    try:
        return _threads().submit(copy_context().run, work, start, stop)
    except RuntimeError as error:
        if "shutdown" not in str(error):
            raise
    done: Future[T] = Future()
    try:
        done.set_result(work(start, stop))
    except Exception as error:
        done.set_exception(error)
    return done


def in_parallel(work: Callable[[int, int], T], n: int, parallel: bool = True) -> list[T]:
    """Call ``work(start, stop)`` for consecutive shares of ``range(n)``, at once; results in order.

    With ``parallel=False``, for work too small to share, there is one share and it runs here; BLAS does not
    share it either. What cannot be shared, a single image, is left to BLAS.
    """
    if n < 2 or _blas is None:
        return [work(0, n)]
    # Within a loop that holds it already there is nothing to do, and nothing for Ctrl-C to leave half done.
    held = nullcontext() if _local.holds > 0 else blas_on_one_thread()
    if not parallel:
        with held:
            return [work(0, n)]
    shares = min(threads_in_reach(), MAX_THREADS, n)
    if shares < 2:  # without the lock: a program's own threads may be side by side here
        return [work(0, n)]
    edges = [n * i // shares for i in range(shares + 1)]
    with _one_region, held:
        others = [_begin(work, *edges[i : i + 2]) for i in range(1, shares)]
        try:
            first = work(*edges[:2])
        finally:  # nobody may still be writing when an error leaves this function
            for other in others:
                other.exception()
        return [first] + [other.result() for other in others]


def chunks(start: int, stop: int, bytes_each: int, most: int) -> list[slice]:
    """Slices of start … stop-1, each of as many images (or heads) as fit into `most` bytes, at least one."""
    size = max(1, most // max(1, bytes_each))
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def sums(shares: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The two sums of what the threads return, in their order."""
    first, second = shares[0]
    for one, other in shares[1:]:
        first, second = first + one, second + other
    return first, second


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return this thread's array `name`, uninitialised, its memory reused from call to call.

    Not for what a thread returns from `in_parallel`: it may be at work for another caller by then.
    """
    own = _scratch  # which `forget_scratch` may replace meanwhile
    try:
        return own.views[name, dtype, shape]
    except AttributeError:
        own.arrays, own.views = {}, {}
    except KeyError:
        pass
    size = math.prod(shape)
    flat = own.arrays.get((name, dtype))
    if flat is None or flat.size < size:
        flat = own.arrays[name, dtype] = empty((size,), dtype)
        own.views = {key: view for key, view in own.views.items() if key[:2] != (name, dtype)}
    view = own.views[name, dtype, shape] = flat[:size].reshape(shape)
    return view


def forget_scratch() -> None:
    """Let go of what `scratch` has kept for all threads; what one of them still uses goes when it is done."""
    global _scratch
    _scratch = threading.local()
