"""SiLU, sixteen numbers at a time."""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _linear
from tinydiff.kernels._numba_exp import sigmoid
from tinydiff.kernels._numba_jit import fits, jit
from tinydiff.kernels._numba_lanes import LANES, load, store
from tinydiff.kernels._threads import PARALLEL_SIZE, in_parallel

__all__ = ["silu", "silu_backward"]


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
