"""Matrix products over rows, shared out to threads, and SiLU, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tinydiff.kernels._threads import in_parallel, sums

__all__ = [
    "column_sums",
    "linear",
    "linear_backward",
    "silu",
    "silu_backward",
    "sum_pixels",
    "taps_and_bias",
]

# Fewer multiplications than this are not worth a second thread.
PARALLEL_PRODUCTS = 2**23


@functools.lru_cache(maxsize=16)
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    ones = np.ones(n, dtype)
    ones.flags.writeable = False
    return ones


def column_sums(rows: np.ndarray) -> np.ndarray:
    """The sum over rows (n, D)  ->  (D,), as a product: BLAS adds rows faster than NumPy."""
    return _ones(len(rows), rows.dtype) @ rows


def taps_and_bias(dy: np.ndarray, taps: Callable[[int, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a convolution's taps and bias from dy (N, H', W', D), its images shared out to threads.

    ``taps(start, stop)`` returns the share of images start … stop-1 in the first.
    """

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return taps(start, stop), column_sums(dy[start:stop].reshape(-1, dy.shape[3]))

    return sums(in_parallel(work, dy.shape[0]))


def sum_pixels(x: np.ndarray) -> np.ndarray:
    """As ``portable.sum_pixels``, as a product for each image."""
    n, h, w, c = x.shape
    return _ones(h * w, x.dtype) @ x.reshape(n, h * w, c)


def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As ``portable.linear``."""
    rows = x.reshape(-1, w.shape[0])
    if rows.size * w.shape[1] < PARALLEL_PRODUCTS:
        y = rows @ w
        y += b
        return y.reshape(*x.shape[:-1], w.shape[1])
    y = np.empty((rows.shape[0], w.shape[1]), x.dtype)

    def work(start: int, stop: int) -> None:
        np.matmul(rows[start:stop], w, out=y[start:stop])
        y[start:stop] += b

    in_parallel(work, rows.shape[0])
    return y.reshape(*x.shape[:-1], w.shape[1])


def linear_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.linear_backward``."""
    rows = x.reshape(-1, w.shape[0])
    dy_rows = np.ascontiguousarray(dy).reshape(-1, w.shape[1])
    if rows.size * w.shape[1] < PARALLEL_PRODUCTS:
        return (dy_rows @ w.T).reshape(x.shape), rows.T @ dy_rows, column_sums(dy_rows)
    dx = np.empty(rows.shape, x.dtype)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        share = dy_rows[start:stop]
        np.matmul(share, w.T, out=dx[start:stop])
        return rows[start:stop].T @ share, column_sums(share)

    dw, db = sums(in_parallel(work, rows.shape[0]))
    return dx.reshape(x.shape), dw, db


def silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``portable.silu``.  Where exp overflows, 1 / (1 + exp(-x)) is rightly 0.  (docs: A.12)"""
    s = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(s, out=s)
    s += 1.0
    np.divide(1.0, s, out=s)
    return x * s, s


def silu_backward(s: np.ndarray, y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """As ``portable.silu_backward``."""
    dx = 1.0 - s
    dx *= y
    dx += s
    dx *= dy
    return dx
