"""Group normalisation, alone or with the SiLU that follows it in a residual block, in one pass.

Element-wise chains are bound by memory: here every step of the chain is done on a block of a few images
that stays in cache, in place. Nothing is kept for the backward but the input, its mean and 1/sqrt(var + eps);
the rest is cheaper to compute again than to write and read.

Written per channel, with xc = x - mean and a = rstd weight (docs: A.10, A.11)::

    z = a xc + bias      y = z, or z sigmoid(z)
    dbias = sum dz       dweight = sum dz xhat,  xhat = rstd xc
    dx = a dz - rstd mean(weight dz) - rstd xhat mean(weight dz xhat)

so the two means over a group are sums over its channels of weight times each image's share of dbias and
dweight. SiLU's sigmoid comes from a hyperbolic tangent, which overflows nowhere: with u = z / 2 and
T = tanh u::

    z sigmoid(z) = u (1 + T)      dz = dy (1 + T) (1 + u (1 - T)) / 2

(Or from exp, where that is faster: ``_exponential.py``.)

Sums over pixels are products with a row of ones; the variance is that of the centred values
(docs: A.14).

An image is seen as H rows of W C numbers and a vector of channels is repeated W times to match: loops
over rows are long, loops over a few channels are not.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from tinydiff.kernels._exponential import one_plus_tanh
from tinydiff.kernels._memory import empty, ones
from tinydiff.kernels._threads import PARALLEL_SIZE, chunks, in_parallel, scratch, sums

__all__ = [
    "Saved",
    "group_norm",
    "group_norm_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
]

# Bytes of a block; three or four blocks are in use at a time.
BLOCK_BYTES = 2**19

# Input, mean and rstd per image and channel, the bias if SiLU followed, and the number of groups.
Saved: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, "np.ndarray | None", int]


def _rows(x: np.ndarray) -> np.ndarray:
    """View of (N, H, W, C) as (N, H, W C)."""
    n, h, w, c = x.shape
    return np.ascontiguousarray(x).reshape(n, h, w * c)


def _repeat(channels: np.ndarray, width: int) -> np.ndarray:
    """Repeat (m, C) along a row of pixels: (m, 1, W C)."""
    m, c = channels.shape
    return channels[:, None].repeat(width, axis=1).reshape(m, 1, width * c)


def _pixel_sums(rows: np.ndarray, channels: int) -> np.ndarray:
    """Sum over the pixels of each image and channel, columns first: (m, H, W C)  ->  (m, C)."""
    m, h, wc = rows.shape
    width = wc // channels
    columns = ones(h, rows.dtype) @ rows
    return ones(width, rows.dtype) @ columns.reshape(m, width, channels)


def _group_means(sums: np.ndarray, groups: int, pixels: int) -> np.ndarray:
    """Mean over each group from the sums over pixels, repeated for its channels: (m, C)  ->  (m, C)."""
    m, c = sums.shape
    per_group = c // groups
    means = np.add.reduce(sums.reshape(m, groups, per_group), axis=2)
    means *= 1.0 / (pixels * per_group)
    return means.repeat(per_group, axis=1)


def _forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float, with_silu: bool
) -> tuple[np.ndarray, Saved]:
    n, h, w, c = x.shape
    x_rows = _rows(x)
    y = empty(x_rows.shape, x.dtype)
    mean, rstd = np.empty((n, c), x.dtype), np.empty((n, c), x.dtype)

    def work(start: int, stop: int) -> None:
        for block in chunks(start, stop, h * w * c * x.itemsize, BLOCK_BYTES):
            xb, out = x_rows[block], y[block]
            temp = scratch("norm", out.shape, x.dtype)
            mean[block] = _group_means(_pixel_sums(xb, c), groups, h * w)
            np.subtract(xb, _repeat(mean[block], w), out=out)
            np.multiply(out, out, out=temp)
            variance = _group_means(_pixel_sums(temp, c), groups, h * w)
            rstd[block] = 1.0 / np.sqrt(variance + eps)
            half = 0.5 if with_silu else 1.0
            out *= _repeat(half * rstd[block] * weight, w)
            out += _repeat(half * bias[None], w)
            if with_silu:  # out is u = z / 2
                one_plus_tanh(out, temp)
                out *= temp

    in_parallel(work, n, x.size >= PARALLEL_SIZE)
    return y.reshape(x.shape), (x, mean, rstd, bias if with_silu else None, groups)


def group_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float
) -> tuple[np.ndarray, Saved]:
    """As ``portable.group_norm``; what it saves is for ``group_norm_backward`` of this module."""
    return _forward(x, weight, bias, groups, eps, with_silu=False)


def group_norm_silu(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float
) -> tuple[np.ndarray, Saved]:
    """As ``portable.group_norm_silu``; what it saves is for ``group_norm_silu_backward`` of this module."""
    return _forward(x, weight, bias, groups, eps, with_silu=True)


def group_norm_backward(
    saved: Saved, weight: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.group_norm_backward``."""
    x, mean, rstd, bias, groups = saved
    n, h, w, c = x.shape
    x_rows, dy_rows = _rows(x), _rows(dy)
    dx = empty(x_rows.shape, x.dtype)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        dweight, dbias = np.zeros_like(weight), np.zeros_like(weight)
        for block in chunks(start, stop, h * w * c * x.itemsize, BLOCK_BYTES):
            r = rstd[block]
            xc = scratch("xc", dx[block].shape, x.dtype)
            np.subtract(x_rows[block], _repeat(mean[block], w), out=xc)
            temp, out = scratch("norm", xc.shape, x.dtype), dx[block]
            if bias is None:
                half, dz = 1.0, dy_rows[block]
            else:  # from here on dz is twice that of the formulas
                half, dz = 0.5, scratch("dz", xc.shape, x.dtype)
                np.multiply(xc, _repeat(half * r * weight, w), out=temp)
                temp += _repeat(half * bias[None], w)
                one_plus_tanh(temp, out)
                np.subtract(2.0, out, out=dz)
                dz *= temp
                dz += 1.0
                dz *= out
                dz *= dy_rows[block]
            dbias_images = half * _pixel_sums(dz, c)
            np.multiply(dz, xc, out=temp)
            dweight_images = half * r * _pixel_sums(temp, c)
            dbias += dbias_images.sum(axis=0)
            dweight += dweight_images.sum(axis=0)
            np.multiply(dz, _repeat(half * r * weight, w), out=out)
            xc *= _repeat(r * r * _group_means(weight * dweight_images, groups, h * w), w)
            xc += _repeat(r * _group_means(weight * dbias_images, groups, h * w), w)
            out -= xc
        return dweight, dbias

    dweight, dbias = sums(in_parallel(work, n, x.size >= PARALLEL_SIZE))
    return dx.reshape(x.shape), dweight, dbias


group_norm_silu_backward = group_norm_backward
