"""The NumPy twin of ``portable.py``: the same functions, the same results, less time and memory.

A convolution is one matrix product per chunk of a few images: the k x k neighbourhood of every pixel is
gathered into a row (im2col), in scratch that stays in cache. The derivative with respect to the input is
the transpose of the same two steps: a product, then the rows are scattered back and added.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tinydiff.kernels.portable import (
    Padding,
    adam_step,
    ema_step,
    group_norm,
    group_norm_backward,
    silu,
    silu_backward,
    softmax,
    softmax_backward,
)

__all__ = [
    "adam_step",
    "conv2d",
    "conv2d_backward",
    "ema_step",
    "group_norm",
    "group_norm_backward",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
]

# Gathered rows of one chunk, in bytes: a few MiB stay in the last cache, and amortise the calls.
CHUNK_BYTES = 2 * 2**20


def _chunks(n: int, bytes_per_image: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // max(1, bytes_per_image))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _windows(xpad: np.ndarray, k: int, stride: int, h_out: int, w_out: int) -> np.ndarray:
    """View (N, H', W', k, k, C) of the padded images: the neighbourhood of every output pixel."""
    n, row, col, channel = xpad.strides
    shape = (xpad.shape[0], h_out, w_out, k, k, xpad.shape[3])
    return as_strided(xpad, shape, (n, stride * row, stride * col, row, col, channel))


def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, padding: Padding) -> np.ndarray:
    """As ``portable.conv2d``."""
    k, _, c, d = w.shape
    n, height, width, _ = x.shape
    before, after = padding
    h_out = (height + before + after - k) // stride + 1
    w_out = (width + before + after - k) // stride + 1
    y = np.empty((n, h_out, w_out, d), x.dtype)
    if k == stride == 1 and before == after == 0:
        np.matmul(x.reshape(-1, c), w[0, 0], out=y.reshape(-1, d))
        y += b
        return y
    rows = h_out * w_out
    chunks = _chunks(n, rows * k * k * c * x.itemsize)
    size = chunks[0].stop if chunks else 0
    xpad = np.zeros((size, height + before + after, width + before + after, c), x.dtype)
    gathered = np.empty((size, h_out, w_out, k, k, c), x.dtype)
    matrix = w.reshape(k * k * c, d)
    for chunk in chunks:
        m = chunk.stop - chunk.start
        xpad[:m, before : before + height, before : before + width] = x[chunk]
        gathered[:m] = _windows(xpad[:m], k, stride, h_out, w_out)
        np.matmul(gathered[:m].reshape(m * rows, -1), matrix, out=y[chunk].reshape(m * rows, d))
        y[chunk] += b
    return y


def conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.conv2d_backward``."""
    k, _, c, d = w.shape
    n, height, width, _ = x.shape
    before, after = padding
    _, h_out, w_out, _ = dy.shape
    dy = np.ascontiguousarray(dy)
    db = np.ones(n * h_out * w_out, x.dtype) @ dy.reshape(-1, d)
    if k == stride == 1 and before == after == 0:
        dx = (dy.reshape(-1, d) @ w[0, 0].T).reshape(x.shape)
        dw = (x.reshape(-1, c).T @ dy.reshape(-1, d)).reshape(w.shape)
        return dx, dw, db
    rows = h_out * w_out
    chunks = _chunks(n, rows * k * k * c * x.itemsize)
    size = chunks[0].stop if chunks else 0
    xpad = np.zeros((size, height + before + after, width + before + after, c), x.dtype)
    dxpad = np.empty_like(xpad)
    gathered = np.empty((size, h_out, w_out, k, k, c), x.dtype)
    matrix = w.reshape(k * k * c, d)
    dx = np.empty(x.shape, x.dtype)
    dw = np.zeros_like(matrix)
    inside = np.s_[:, before : before + height, before : before + width]
    for chunk in chunks:
        m = chunk.stop - chunk.start
        flat = gathered[:m].reshape(m * rows, -1)
        dy_rows = dy[chunk].reshape(m * rows, d)
        xpad[:m][inside] = x[chunk]
        gathered[:m] = _windows(xpad[:m], k, stride, h_out, w_out)
        dw += flat.T @ dy_rows
        np.matmul(dy_rows, matrix.T, out=flat)
        dxpad[:m] = 0.0
        for i in range(k):
            for j in range(k):
                taps = np.s_[:, i : i + stride * h_out : stride, j : j + stride * w_out : stride]
                dxpad[:m][taps] += gathered[:m, :, :, i, j]
        dx[chunk] = dxpad[:m][inside]
    return dx, dw.reshape(w.shape), db
