"""Softmax and SiLU, sixteen numbers at a time.

The last sixteen of a row begin before the block before them ends, where the row's length is no multiple of
sixteen. What is in both is computed twice, and counted once. Shorter rows are left to the NumPy twin.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _linear
from tinydiff.kernels._linear import PARALLEL_SIZE
from tinydiff.kernels._numba_exp import exp, sigmoid
from tinydiff.kernels._numba_jit import fits, inlined, jit
from tinydiff.kernels._numba_lanes import (
    LANES,
    larger,
    largest_of,
    load,
    store,
    total_of,
    zero_before,
    zeros,
)
from tinydiff.kernels._threads import in_parallel

__all__ = ["silu", "silu_backward", "softmax", "softmax_backward"]


@inlined
def _block(k, length):  # type: ignore[no-untyped-def]
    """Where block k of a row begins, and how many of its numbers the block before had already."""
    first = min(k * LANES, length - LANES)
    return first, k * LANES - first


@jit
def _softmax(x, start, stop, probabilities):  # type: ignore[no-untyped-def]
    """Rows start … stop-1 of the probabilities (rows, L), L >= LANES."""
    length = x.shape[1]
    blocks = (length + LANES - 1) // LANES
    flat, p = x.reshape(-1), probabilities.reshape(-1)
    row = np.empty(length, x.dtype)
    for i in range(start, stop):
        most = load(flat, i * length)
        for k in range(1, blocks):
            first, _ = _block(k, length)
            most = larger(most, load(flat, i * length + first))
        largest, total = largest_of(most), zeros(x)
        for k in range(blocks):
            first, done = _block(k, length)
            e = exp(load(flat, i * length + first) - largest)
            store(row, first, e)
            total += zero_before(e, done)
        scale = x.dtype.type(1) / total_of(total)
        for k in range(blocks):
            first, _ = _block(k, length)
            store(p, i * length + first, scale * load(row, first))


@jit
def _softmax_backward(probabilities, gradient, start, stop, result):  # type: ignore[no-untyped-def]
    """Rows start … stop-1 of the result (rows, L), L >= LANES."""
    length = probabilities.shape[1]
    blocks = (length + LANES - 1) // LANES
    p, dp, dx = probabilities.reshape(-1), gradient.reshape(-1), result.reshape(-1)
    for i in range(start, stop):
        total = zeros(p)
        for k in range(blocks):
            first, done = _block(k, length)
            total += zero_before(load(p, i * length + first) * load(dp, i * length + first), done)
        mean = total_of(total)
        for k in range(blocks):
            index = i * length + _block(k, length)[0]
            store(dx, index, load(p, index) * (load(dp, index) - mean))


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
    """Elements start … stop-1 of dx.  Indices from 0 cannot be negative, so LLVM vectorises the loop."""
    one = s.dtype.type(1)
    s, y, dy, dx = s[start:stop], y[start:stop], dy[start:stop], dx[start:stop]
    for i in range(dx.size):
        dx[i] = dy[i] * (s[i] + y[i] * (one - s[i]))


def softmax(x: np.ndarray) -> np.ndarray:
    """As ``portable.softmax``."""
    if x.shape[-1] < LANES or not fits(x):
        return _linear.softmax(x)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    p = np.empty(rows.shape, x.dtype)
    in_parallel(lambda start, stop: _softmax(rows, start, stop, p), len(rows), x.size >= PARALLEL_SIZE)
    return p.reshape(x.shape)


def softmax_backward(p: np.ndarray, dp: np.ndarray) -> np.ndarray:
    """As ``portable.softmax_backward``."""
    if p.shape[-1] < LANES or not fits(p, dp):
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
    in_parallel(lambda start, stop: _silu_backward(*flat, start, stop, dx), dx.size, dx.size >= PARALLEL_SIZE)
    return dx.reshape(s.shape)
