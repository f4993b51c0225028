"""Convolution as one matrix product: the k x k neighbourhood of every output pixel gathered into a row.

For any kernel size, stride and padding; in chunks of a few images, whose rows stay in cache. The derivative
with respect to the input is the transpose of the same two steps: a product, then the rows are scattered
back and added.

A convolution to fewer channels than it comes from (the last of a U-Net goes from 32 to 1) is done the other
way round. With stride 1 it is itself the transpose of a convolution back from y to x, with the taps turned
round; so the rows are made of the few channels of y, not of the many of x.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tinydiff.kernels._threads import chunks, scratch

__all__ = [
    "PLANES",
    "gather_conv",
    "gather_conv_backward",
    "narrow_conv",
    "narrow_conv_backward",
    "transposed_taps",
]

# Bytes of the gathered rows of a chunk.
CHUNK_BYTES = 2**19

# Images of fewer channels than this lie in planes while rows are gathered or scattered: what is copied or
# added in one go is then a line of the image, not the few numbers of a pixel.
PLANES = 12


def _margin(
    images: tuple[int, ...], k: int, stride: int, before: int, h_out: int, w_out: int, dtype: np.dtype
) -> np.ndarray:
    """Zeros in scratch for images (m, H, W, C) and for all that k x k windows see around them."""
    m, h, w, c = images
    down, right = (max(before + n, stride * (n_out - 1) + k) for n, n_out in ((h, h_out), (w, w_out)))
    if c < PLANES:
        zeros = scratch("xpad", (c, m, down, right), dtype).transpose(1, 2, 3, 0)
    else:
        zeros = scratch("xpad", (m, down, right, c), dtype)
    zeros[...] = 0.0
    return zeros


def _gather(x: np.ndarray, k: int, stride: int, before: int, h_out: int, w_out: int) -> np.ndarray:
    """R x of A.4: rows (m H' W', k k C) of the images x (m, H, W, C) padded with zeros."""
    m, h, w, c = x.shape
    xpad = _margin(x.shape, k, stride, before, h_out, w_out, x.dtype)
    xpad[:, before : before + h, before : before + w] = x
    image, row, col, channel = xpad.strides
    windows = as_strided(
        xpad, (m, h_out, w_out, k, k, c), (image, stride * row, stride * col, row, col, channel)
    )
    if c < PLANES:
        windows = windows.transpose(3, 4, 5, 0, 1, 2)
    rows = scratch("rows", windows.shape, x.dtype)
    rows[...] = windows
    return rows.reshape(k * k * c, -1).T if c < PLANES else rows.reshape(-1, k * k * c)


def _scatter(rows: np.ndarray, stride: int, before: int, dx: np.ndarray) -> None:
    """The transpose of R (A.5): every element of `rows` added where `_gather` would have read it, into dx."""
    _, h_out, w_out, k, _, c = rows.shape
    _, h, w, _ = dx.shape
    dxpad = _margin(dx.shape, k, stride, before, h_out, w_out, rows.dtype)
    order = (3, 0, 1, 2) if c < PLANES else (0, 1, 2, 3)  # of the axes, from the slowest to the fastest
    for i in range(k):
        for j in range(k):
            seen = dxpad[:, i : i + stride * h_out : stride, j : j + stride * w_out : stride]
            seen = seen[:, :h_out, :w_out].transpose(order)
            seen += rows[:, :, :, i, j].transpose(order)
    dx[...] = dxpad[:, before : before + h, before : before + w]


def gather_conv(
    x: np.ndarray, w: np.ndarray, stride: int, before: int, y: np.ndarray, start: int, stop: int
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C), no bias.  (docs: A.4)"""
    k, _, c, d = w.shape
    _, h_out, w_out, _ = y.shape
    pixels = h_out * w_out
    for chunk in chunks(start, stop, pixels * k * k * c * x.itemsize, CHUNK_BYTES):
        rows = _gather(x[chunk], k, stride, before, h_out, w_out)
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
        rows = _gather(x[chunk], k, stride, before, h_out, w_out)
        dy_rows = dy[chunk].reshape(-1, d)
        dw += np.matmul(rows.T, dy_rows, out=part)
        rows = scratch("rows", (*dy[chunk].shape[:3], k, k, c), x.dtype)
        np.matmul(dy_rows, w.reshape(k * k * c, d).T, out=rows.reshape(-1, k * k * c))
        _scatter(rows, stride, before, dx[chunk])
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
        rows = _gather(dy[chunk], k, 1, k - 1 - before, h, width)
        np.matmul(rows, taps, out=dx[chunk].reshape(-1, c))
        dtaps += rows.T @ x[chunk].reshape(-1, c)
    return np.ascontiguousarray(transposed_taps(dtaps.reshape(k, k, d, c)))
