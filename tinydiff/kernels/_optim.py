"""NumPy twins of the optimiser's element-wise chains: in place, in blocks that stay in cache.

The definition in ``portable.py`` makes a new array for every operator, each a pass through memory; here a
block of the weights goes through the whole chain before the next one is touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["BLOCK", "adam_step", "ema_step"]

BLOCK = 32_768  # elements: five float32 blocks are 640 KiB


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The same stretch of every array, block by block; views, so what is written in them stays."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


def _average(mean: np.ndarray, new: np.ndarray, beta: float, work: np.ndarray) -> None:
    """As ``portable._average``, into `mean`; `work` may be `new`."""
    if beta < 0.5:
        np.multiply(new, 1.0 - beta, out=work)
        mean *= beta
    else:
        np.subtract(new, mean, out=work)
        work *= 1.0 - beta
    mean += work


def adam_step(
    value: np.ndarray,
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    decay: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step `value`, `m` and `v` in place; see ``portable.adam_step``.

    Numerator and denominator of the change are both multiplied by root: one pass less.
    """
    value, m, v = (np.asarray(array, order="C") for array in (value, m, v))
    for w, g, m1, v1 in _blocks(value, np.ascontiguousarray(grad), m, v):
        a = np.empty_like(g)
        _average(m1, g, beta1, a)
        np.multiply(g, g, out=a)
        _average(v1, a, beta2, a)
        np.sqrt(v1, out=a)
        a += eps * root
        np.divide(m1, a, out=a)
        a *= step_size * root
        if decay != 1.0:
            w *= decay
        w -= a
    return value, m, v


def ema_step(average: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """Move `average` in place; see ``portable.ema_step``."""
    average = np.asarray(average, order="C")
    for a, w in _blocks(average, np.ascontiguousarray(value)):
        difference = w - a
        difference *= rate
        a += difference
    return average
