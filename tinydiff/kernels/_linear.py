"""Matrix products over rows, shared out to threads, and SiLU, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tinydiff.kernels._memory import empty, ones
from tinydiff.kernels._threads import in_parallel, sums

__all__ = [
    "linear",
    "linear_backward",
    "silu",
    "silu_backward",
    "sum_pixels",
    "taps_and_bias",
    "worth_sharing",
]

# Fewer multiplications than this are not worth a second thread, which has to be woken for them.
PARALLEL_PRODUCTS = 2**23


@functools.cache
def _largest(dtype: np.dtype) -> float:
    """Less than the largest x for which exp(x) is finite, and so large that 1 + exp(x) rounds to exp(x)."""
    return float(np.log(np.finfo(dtype).max)) - 1.0


def worth_sharing(pixels: int, w: np.ndarray) -> bool:
    """Whether so many pixels, each of which meets every weight once, are work for several threads."""
    return pixels * w.size >= PARALLEL_PRODUCTS


def column_sums(rows: np.ndarray) -> np.ndarray:
    """The sum over rows (n, D)  ->  (D,), as a product: BLAS adds rows faster than NumPy."""
    return ones(len(rows), rows.dtype) @ rows


def taps_and_bias(
    dy: np.ndarray, w: np.ndarray, taps: Callable[[int, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a convolution's taps and bias from dy (N, H', W', D), its images shared out to threads.

    ``taps(start, stop)`` returns the share of images start … stop-1 in the gradient of the taps.
    """

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return taps(start, stop), column_sums(dy[start:stop].reshape(-1, dy.shape[3]))

    return sums(in_parallel(work, dy.shape[0], worth_sharing(dy[..., 0].size, w)))


def sum_pixels(x: np.ndarray) -> np.ndarray:
    """As ``portable.sum_pixels``, as a product for each image."""
    n, h, w, c = x.shape
    return ones(h * w, x.dtype) @ x.reshape(n, h * w, c)


def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As ``portable.linear``."""
    if x.ndim != 2:
        rows = linear(x.reshape(-1, w.shape[0]), w, b)
        return rows.reshape(*x.shape[:-1], w.shape[1])
    if not worth_sharing(x.shape[0], w):
        y = x @ w
        y += b
        return y
    y = empty((x.shape[0], w.shape[1]), x.dtype)

    def work(start: int, stop: int) -> None:
        np.matmul(x[start:stop], w, out=y[start:stop])
        y[start:stop] += b

    in_parallel(work, x.shape[0])
    return y


def linear_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.linear_backward``."""
    if x.ndim != 2:
        dy_rows = np.ascontiguousarray(dy).reshape(-1, w.shape[1])
        dx, dw, db = linear_backward(x.reshape(-1, w.shape[0]), w, dy_rows)
        return dx.reshape(x.shape), dw, db
    if not worth_sharing(x.shape[0], w):
        return dy @ w.T, x.T @ dy, column_sums(dy)
    dx = empty(x.shape, x.dtype)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        share = dy[start:stop]
        np.matmul(share, w.T, out=dx[start:stop])
        return x[start:stop].T @ share, column_sums(share)

    dw, db = sums(in_parallel(work, x.shape[0]))
    return dx, dw, db


def silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``portable.silu``, by exp(x) / (1 + exp(x)) with x held where exp is finite.  (docs: A.12)"""
    s = np.minimum(x, _largest(x.dtype))
    np.exp(s, out=s)
    y = 1.0 + s
    s /= y
    return np.multiply(x, s, out=y), s


def silu_backward(s: np.ndarray, y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """As ``portable.silu_backward``."""
    dx = 1.0 - s
    dx *= y
    dx += s
    dx *= dy
    return dx
