"""Group normalisation, alone or with SiLU: the formulas of ``_norm.py`` (docs: A.10, A.11), image by image.

An image is read two or three times while it is in the second-level cache: for the mean, for the variance,
and for the result; backward once for dz and its sums, and once for dx. Between the loads and the store of
sixteen channels everything stays in registers, exp included. Four sums run side by side, so that one need
not wait for the other.

Where the channels are not a multiple of sixteen the NumPy twin is used; what it saves has the same form.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _norm
from tinydiff.kernels._memory import empty
from tinydiff.kernels._norm import Saved
from tinydiff.kernels._numba_exp import sigmoid
from tinydiff.kernels._numba_jit import fits, inlined, jit
from tinydiff.kernels._numba_lanes import LANES, load, store, zeros
from tinydiff.kernels._threads import PARALLEL_SIZE, in_parallel, sums

__all__ = ["group_norm", "group_norm_backward", "group_norm_silu", "group_norm_silu_backward"]

# Pixels that are added one after the other. Over all of a large image the rounding of the sums would show:
# in 512 x 512 pixels with a mean of 10,000 deviations the mean of four sums was off by three (docs: A.14).
STRETCH = 256


@inlined
def _group_means(sums, groups, pixels, means):  # type: ignore[no-untyped-def]
    """Mean over each group from its channels' sums over pixels, for every channel: both (C,)."""
    per_group = sums.size // groups
    for g in range(groups):
        total = sums[g * per_group]
        for c in range(g * per_group + 1, (g + 1) * per_group):
            total += sums[c]
        for c in range(g * per_group, (g + 1) * per_group):
            means[c] = total / sums.dtype.type(pixels * per_group)


@jit
def _forward(x, start, stop, pixels, groups, eps, weight, bias, with_silu, mean, rstd, y):  # type: ignore[no-untyped-def]
    """Images start … stop-1 of y, mean and rstd (N, C); x and y are flat (N, H, W, C)."""
    channels = weight.size
    sums = np.empty_like(weight)
    one = sums.dtype.type(1)
    stretch = STRETCH * channels
    for n in range(start, stop):
        image, end = n * pixels * channels, (n + 1) * pixels * channels
        for first in range(0, channels, LANES):
            total = zeros(x)
            for i in range(image + first, end, stretch):
                s0 = s1 = s2 = s3 = zeros(x)
                stretch_end = min(i + stretch, end)
                while i + 3 * channels < stretch_end:
                    s0 += load(x, i)
                    s1 += load(x, i + channels)
                    s2 += load(x, i + 2 * channels)
                    s3 += load(x, i + 3 * channels)
                    i += 4 * channels
                while i < stretch_end:
                    s0 += load(x, i)
                    i += channels
                total += (s0 + s1) + (s2 + s3)
            store(sums, first, total)
        _group_means(sums, groups, pixels, mean[n])
        for first in range(0, channels, LANES):
            m = load(mean[n], first)
            total = zeros(x)
            for i in range(image + first, end, stretch):
                s0 = s1 = s2 = s3 = zeros(x)
                stretch_end = min(i + stretch, end)
                while i + 3 * channels < stretch_end:
                    d0, d1 = load(x, i) - m, load(x, i + channels) - m
                    d2, d3 = load(x, i + 2 * channels) - m, load(x, i + 3 * channels) - m
                    s0 += d0 * d0
                    s1 += d1 * d1
                    s2 += d2 * d2
                    s3 += d3 * d3
                    i += 4 * channels
                while i < stretch_end:
                    d0 = load(x, i) - m
                    s0 += d0 * d0
                    i += channels
                total += (s0 + s1) + (s2 + s3)
            store(sums, first, total)
        _group_means(sums, groups, pixels, rstd[n])
        for c in range(channels):
            rstd[n, c] = one / np.sqrt(rstd[n, c] + eps)
        for first in range(0, channels, LANES):
            m, b = load(mean[n], first), load(bias, first)
            a = load(rstd[n], first) * load(weight, first)
            for i in range(image + first, end, channels):
                z = a * (load(x, i) - m) + b
                store(y, i, z * sigmoid(z) if with_silu else z)


@jit
def _backward(x, dy, start, stop, pixels, groups, weight, bias, with_silu, mean, rstd, dx):  # type: ignore[no-untyped-def]
    """Images start … stop-1 of dx (flat, as x and dy); returns their shares of dweight and dbias."""
    channels = weight.size
    one = weight.dtype.type(1)
    dweight, dbias = np.zeros_like(weight), np.zeros_like(weight)
    sums_w, sums_b = np.empty_like(weight), np.empty_like(weight)
    mean_w, mean_b = np.empty_like(weight), np.empty_like(weight)
    dz_or_dy = dx if with_silu else dy
    for n in range(start, stop):
        image, end = n * pixels * channels, (n + 1) * pixels * channels
        for first in range(0, channels, LANES):
            m, b = load(mean[n], first), load(bias, first)
            r = load(rstd[n], first)
            a = r * load(weight, first)
            sum_b = sum_w = zeros(x)
            for i in range(image + first, end, channels):
                xc, dz = load(x, i) - m, load(dy, i)
                if with_silu:
                    z = a * xc + b
                    s = sigmoid(z)
                    dz *= s * (z * (one - s) + one)
                    store(dx, i, dz)
                sum_b += dz
                sum_w += dz * xc
            sum_w *= r
            store(dbias, first, load(dbias, first) + sum_b)
            store(dweight, first, load(dweight, first) + sum_w)
            store(sums_b, first, load(weight, first) * sum_b)
            store(sums_w, first, load(weight, first) * sum_w)
        _group_means(sums_b, groups, pixels, mean_b)
        _group_means(sums_w, groups, pixels, mean_w)
        for first in range(0, channels, LANES):
            m, r = load(mean[n], first), load(rstd[n], first)
            a, shift, slope = r * load(weight, first), r * load(mean_b, first), r * r * load(mean_w, first)
            for i in range(image + first, end, channels):
                store(dx, i, a * load(dz_or_dy, i) - (slope * (load(x, i) - m) + shift))
    return dweight, dbias


def _norm_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float, with_silu: bool
) -> tuple[np.ndarray, Saved]:
    n, h, w, c = x.shape
    flat, weight, bias = np.ascontiguousarray(x).reshape(-1), *map(np.ascontiguousarray, (weight, bias))
    y = empty(x.shape, x.dtype)
    mean, rstd = np.empty((n, c), x.dtype), np.empty((n, c), x.dtype)
    flat_y, eps = y.reshape(-1), x.dtype.type(eps)

    def work(start: int, stop: int) -> None:
        _forward(flat, start, stop, h * w, groups, eps, weight, bias, with_silu, mean, rstd, flat_y)

    in_parallel(work, n, x.size >= PARALLEL_SIZE)
    return y, (x, mean, rstd, bias if with_silu else None, groups)


def group_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float
) -> tuple[np.ndarray, Saved]:
    """As ``portable.group_norm``; what it saves is for ``group_norm_backward`` of this module."""
    if weight.size % LANES or not fits(x, weight, bias):
        return _norm.group_norm(x, weight, bias, groups, eps)
    return _norm_forward(x, weight, bias, groups, eps, with_silu=False)


def group_norm_silu(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float
) -> tuple[np.ndarray, Saved]:
    """As ``portable.group_norm_silu``; what it saves is for ``group_norm_silu_backward`` of this module."""
    if weight.size % LANES or not fits(x, weight, bias):
        return _norm.group_norm_silu(x, weight, bias, groups, eps)
    return _norm_forward(x, weight, bias, groups, eps, with_silu=True)


def group_norm_backward(
    saved: Saved, weight: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.group_norm_backward``."""
    if weight.size % LANES or not fits(saved[0], weight, dy):
        return _norm.group_norm_backward(saved, weight, dy)
    x, mean, rstd, bias, groups = saved
    n, h, w, _ = x.shape
    weight = np.ascontiguousarray(weight)
    flat, flat_dy = np.ascontiguousarray(x).reshape(-1), np.ascontiguousarray(dy).reshape(-1)
    dx = empty(x.shape, x.dtype)
    with_silu, b, flat_dx = bias is not None, weight if bias is None else bias, dx.reshape(-1)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return _backward(flat, flat_dy, start, stop, h * w, groups, weight, b, with_silu, mean, rstd, flat_dx)

    dweight, dbias = sums(in_parallel(work, n, x.size >= PARALLEL_SIZE))
    return dx, dweight, dbias


group_norm_silu_backward = group_norm_backward
