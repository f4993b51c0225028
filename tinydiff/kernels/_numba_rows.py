"""Softmax and SiLU, sixteen numbers at a time.

What is left over at the end of a row, or of the array, goes through the same vector code in a small array
of its own, filled up with what does not count.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _linear
from tinydiff.kernels._linear import PARALLEL_SIZE
from tinydiff.kernels._numba_exp import exp, sigmoid
from tinydiff.kernels._numba_jit import fits, jit
from tinydiff.kernels._numba_lanes import LANES, load, spread, store, zeros
from tinydiff.kernels._threads import in_parallel

__all__ = ["silu", "silu_backward", "softmax", "softmax_backward"]


@jit
def _softmax(x, start, stop, p):  # type: ignore[no-untyped-def]
    """Rows start … stop-1 of p (rows, L)."""
    length = x.shape[1]
    padded = (length + LANES - 1) // LANES * LANES
    row = np.full(padded, -np.inf).astype(x.dtype)  # what fills it up counts as exp(-inf) = 0
    lanes = np.empty(LANES, x.dtype)
    for i in range(start, stop):
        largest = x[i, 0]
        for k in range(length):
            row[k] = x[i, k]
            largest = max(largest, row[k])
        total = zeros(x)
        for k in range(0, padded, LANES):
            e = exp(load(row, k) - largest)
            store(row, k, e)
            total += e
        store(lanes, 0, total)
        scale = x.dtype.type(1) / lanes.sum()
        for k in range(length):
            p[i, k] = row[k] * scale
        row[length:] = -np.inf


@jit
def _softmax_backward(p, dp, start, stop, dx):  # type: ignore[no-untyped-def]
    """Rows start … stop-1 of dx (rows, L); all flat and L apart."""
    length = p.shape[1]
    product = np.zeros((length + LANES - 1) // LANES * LANES, p.dtype)
    lanes = np.empty(LANES, p.dtype)
    for i in range(start, stop):
        for k in range(length):
            product[k] = p[i, k] * dp[i, k]
        total = zeros(p)
        for k in range(0, product.size, LANES):
            total += load(product, k)
        store(lanes, 0, total)
        mean = lanes.sum()
        for k in range(length):
            dx[i, k] = p[i, k] * (dp[i, k] - mean)


@jit
def _silu(x, start, stop, y, s):  # type: ignore[no-untyped-def]
    """Elements start … stop-1 of y and s."""
    whole = start + (stop - start) // LANES * LANES
    for i in range(start, whole, LANES):
        v = load(x, i)
        e = sigmoid(v)
        store(s, i, e)
        store(y, i, v * e)
    if whole < stop:
        rest = np.zeros(LANES, x.dtype)
        rest[: stop - whole] = x[whole:stop]
        store(rest, 0, sigmoid(load(rest, 0)))
        for i in range(whole, stop):
            s[i] = rest[i - whole]
            y[i] = x[i] * s[i]


@jit
def _silu_backward(s, y, dy, start, stop, dx):  # type: ignore[no-untyped-def]
    """Elements start … stop-1 of dx."""
    one = s.dtype.type(1)
    for i in range(start, stop):
        dx[i] = dy[i] * (s[i] + y[i] * (one - s[i]))


def softmax(x: np.ndarray) -> np.ndarray:
    """As ``portable.softmax``."""
    if not fits(x):
        return _linear.softmax(x)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    p = np.empty(rows.shape, x.dtype)
    in_parallel(lambda start, stop: _softmax(rows, start, stop, p), len(rows), x.size >= PARALLEL_SIZE)
    return p.reshape(x.shape)


def softmax_backward(p: np.ndarray, dp: np.ndarray) -> np.ndarray:
    """As ``portable.softmax_backward``."""
    if not fits(p, dp):
        return _linear.softmax_backward(p, dp)
    rows, dp_rows = (np.ascontiguousarray(a).reshape(-1, p.shape[-1]) for a in (p, dp))
    dx = np.empty(rows.shape, p.dtype)
    in_parallel(
        lambda start, stop: _softmax_backward(rows, dp_rows, start, stop, dx),
        len(rows),
        p.size >= PARALLEL_SIZE,
    )
    return dx.reshape(p.shape)


def silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``portable.silu``."""
    if not fits(x):
        return _linear.silu(x)
    flat = np.ascontiguousarray(x).reshape(-1)
    y, s = np.empty_like(flat), np.empty_like(flat)
    in_parallel(lambda start, stop: _silu(flat, start, stop, y, s), flat.size, flat.size >= PARALLEL_SIZE)
    return y.reshape(x.shape), s.reshape(x.shape)


def silu_backward(s: np.ndarray, y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """As ``portable.silu_backward``."""
    if not fits(s, y, dy):
        return _linear.silu_backward(s, y, dy)
    flat = tuple(np.ascontiguousarray(a).reshape(-1) for a in (s, y, dy))
    dx = np.empty_like(flat[0])
    in_parallel(
        lambda start, stop: _silu_backward(*flat, start, stop, dx), dx.size, dx.size >= PARALLEL_SIZE
    )
    return dx.reshape(s.shape)
