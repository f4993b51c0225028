"""What the machine is, how fast it multiplies, and whether it is ours alone."""

from __future__ import annotations

import math
import os
import platform
import time
from pathlib import Path

import numpy as np

PRODUCT = 2048  # rows and columns of the matrices whose product is timed
ENOUGH = 0.9  # of the threads' time; with less, others compute here too


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def product_gflops(n: int = PRODUCT, times: int = 5) -> float:
    """The best rate of an n x n product in float32, on all the threads that BLAS has."""
    a, b = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
    out = a @ b
    best = math.inf
    for _ in range(times):
        began = time.perf_counter()
        np.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9


def share_given(threads: int, seconds: float = 0.3) -> float:
    """The processor time that BLAS's threads got, over what they could have had: 1 on a machine of one's own.

    Threads beyond the cores that this process may use could have had none.

    It matters more than it seems: threads that compute together wait for the last of them at every turn, so
    one busy neighbour on a core can cost them not half their speed but nearly all of it.
    """
    a = np.ones((1024, 1024), np.float32)
    out = a @ a
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        np.matmul(a, a, out=out)
    return (time.process_time() - used) / (time.perf_counter() - began) / min(threads, available_cores())
