"""Convolution as one matrix product: the k x k neighbourhood of every output pixel gathered into a row.

For any kernel size, stride and padding; in chunks of a few images, whose rows stay in cache. The derivative
with respect to the input is the transpose of the same two steps: a product, then the rows are scattered
back and added.

A convolution to fewer channels than it comes from (the last of a U-Net goes from 32 to 1) is done the other
way about. With stride 1 it is itself the transpose of a convolution back from y to x, with the taps turned
round; so the rows are made of the few channels of y, not of the many of x.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tinydiff.kernels._threads import chunks, scratch

__all__ = ["gather_conv", "gather_conv_backward", "narrow_conv", "narrow_conv_backward", "transposed_taps"]

# Bytes of the gathered rows of a chunk.
CHUNK_BYTES = 2**19


def _gather(x: np.ndarray, k: int, stride: int, before: int, h_out: int, w_out: int) -> np.ndarray:
    """R x of A.4: rows (m, H', W', k, k, C) of the images x (m, H, W, C) padded with zeros."""
    m, h, w, c = x.shape
    shape = (m, max(before + h, stride * (h_out - 1) + k), max(before + w, stride * (w_out - 1) + k), c)
    xpad = scratch("xpad", shape, x.dtype)
    xpad[...] = 0.0
    xpad[:, before : before + h, before : before + w] = x
    image, row, col, channel = xpad.strides
    windows = as_strided(
        xpad, (m, h_out, w_out, k, k, c), (image, stride * row, stride * col, row, col, channel)
    )
    rows = scratch("rows", windows.shape, x.dtype)
    rows[...] = windows
    return rows


def _scatter(rows: np.ndarray, stride: int, before: int, dx: np.ndarray) -> None:
    """The transpose of R (A.5): every element of `rows` added where `_gather` would have read it, into dx."""
    m, h_out, w_out, k, _, c = rows.shape
    _, h, w, _ = dx.shape
    shape = (m, max(before + h, stride * (h_out - 1) + k), max(before + w, stride * (w_out - 1) + k), c)
    dxpad = scratch("xpad", shape, rows.dtype)
    dxpad[...] = 0.0
    for i in range(k):
        for j in range(k):
            dxpad[:, i : i + stride * h_out : stride, j : j + stride * w_out : stride][:, :h_out, :w_out] += (
                rows[:, :, :, i, j]
            )
    dx[...] = dxpad[:, before : before + h, before : before + w]


def gather_conv(
    x: np.ndarray, w: np.ndarray, stride: int, before: int, y: np.ndarray, start: int, stop: int
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C), no bias.  (docs: A.4)"""
    k, _, c, d = w.shape
    _, h_out, w_out, _ = y.shape
    pixels = h_out * w_out
    for chunk in chunks(start, stop, pixels * k * k * c * x.itemsize, CHUNK_BYTES):
        rows = _gather(x[chunk], k, stride, before, h_out, w_out).reshape(-1, k * k * c)
        np.matmul(rows, w.reshape(k * k * c, d), out=y[chunk].reshape(-1, d))


def gather_conv_backward(
    x: np.ndarray,
    w: np.ndarray,
    dy: np.ndarray,
    stride: int,
    before: int,
    dx: np.ndarray,
    start: int,
    stop: int,
) -> np.ndarray:
    """Write images start … stop-1 of dx (N, H, W, C); returns their share of dw (k, k, C, D).  (docs: A.5)"""
    k, _, c, d = w.shape
    _, h_out, w_out, _ = dy.shape
    dw = np.zeros((k * k * c, d), w.dtype)
    part = scratch("dw", dw.shape, w.dtype)
    for chunk in chunks(start, stop, h_out * w_out * k * k * c * x.itemsize, CHUNK_BYTES):
        gathered = _gather(x[chunk], k, stride, before, h_out, w_out)
        rows = gathered.reshape(-1, k * k * c)
        dy_rows = dy[chunk].reshape(-1, d)
        dw += np.matmul(rows.T, dy_rows, out=part)
        np.matmul(dy_rows, w.reshape(k * k * c, d).T, out=rows)
        _scatter(gathered, stride, before, dx[chunk])
    return dw.reshape(w.shape)


def transposed_taps(w: np.ndarray) -> np.ndarray:
    """Weights (k, k, D, C) of the transposed convolution, with the taps turned round.  (docs: A.6, A.9)"""
    return w[::-1, ::-1].swapaxes(2, 3)


def narrow_conv(x: np.ndarray, w: np.ndarray, before: int, y: np.ndarray, start: int, stop: int) -> None:
    """As `gather_conv` with stride 1, for D < C: products with `taps`, scattered to y.  (docs: A.6)"""
    k, _, c, d = w.shape
    _, h, width, _ = x.shape
    taps = np.ascontiguousarray(transposed_taps(w)).reshape(k * k * d, c).T
    for chunk in chunks(start, stop, h * width * k * k * d * x.itemsize, CHUNK_BYTES):
        rows = scratch("rows", (chunk.stop - chunk.start, h, width, k, k, d), x.dtype)
        np.matmul(x[chunk].reshape(-1, c), taps, out=rows.reshape(-1, k * k * d))
        _scatter(rows, 1, k - 1 - before, y[chunk])


def narrow_conv_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, before: int, dx: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """As `gather_conv_backward` with stride 1, for D < C: rows of dy, gathered.  (docs: A.6)"""
    k, _, c, d = w.shape
    _, h, width, _ = x.shape
    taps = np.ascontiguousarray(transposed_taps(w)).reshape(k * k * d, c)
    dtaps = np.zeros_like(taps)
    for chunk in chunks(start, stop, h * width * k * k * d * x.itemsize, CHUNK_BYTES):
        rows = _gather(dy[chunk], k, 1, k - 1 - before, h, width).reshape(-1, k * k * d)
        np.matmul(rows, taps, out=dx[chunk].reshape(-1, c))
        dtaps += rows.T @ x[chunk].reshape(-1, c)
    return np.ascontiguousarray(transposed_taps(dtaps.reshape(k, k, d, c)))
