"""The NumPy twin of ``portable.py``: the same functions, the same results, less time and memory.

A convolution takes one of these ways, all of them in cache-sized chunks of a few images, shared out to
threads: 1x1 is a matrix product; 3x3 with stride 1 and enough channels and pixels is Winograd's
(``_winograd.py``); the rest is gathered rows and a product, or, to fewer channels, its transpose
(``_gather.py``).

What each idea was expected to save, and what it saved, is in ``docs/10-speed.md``.
"""

from __future__ import annotations

import math

import numpy as np

from tinydiff.kernels._attention import attention, attention_backward
from tinydiff.kernels._gather import (
    PLANES,
    gather_conv,
    gather_conv_backward,
    narrow_conv,
    narrow_conv_backward,
    transposed_taps,
)
from tinydiff.kernels._linear import (
    linear,
    linear_backward,
    silu,
    silu_backward,
    sum_pixels,
    taps_and_bias,
    worth_sharing,
)
from tinydiff.kernels._memory import empty
from tinydiff.kernels._norm import (
    group_norm,
    group_norm_backward,
    group_norm_silu,
    group_norm_silu_backward,
)
from tinydiff.kernels._optim import adam_step, ema_step
from tinydiff.kernels._threads import in_parallel
from tinydiff.kernels._winograd import (
    winograd_conv,
    winograd_conv_taps,
    winograd_weight,
    winograd_weight_backward,
    worth_cutting,
)
from tinydiff.kernels.portable import Padding, upsample, upsample_backward

__all__ = [
    "adam_step",
    "attention",
    "attention_backward",
    "conv2d",
    "conv2d_backward",
    "ema_step",
    "group_norm",
    "group_norm_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "linear",
    "linear_backward",
    "silu",
    "silu_backward",
    "sum_pixels",
    "upsample",
    "upsample_backward",
    "upsample_conv2d",
    "upsample_conv2d_backward",
]


def _is_product(w: np.ndarray, stride: int, padding: Padding) -> bool:
    return w.shape[0] == 1 and stride == 1 and padding == (0, 0)


def _is_narrow(w: np.ndarray, stride: int, padding: Padding) -> bool:
    k, _, c, d = w.shape
    return d < c and stride == 1 and padding[0] < k


def output_size(x: np.ndarray, w: np.ndarray, stride: int, padding: Padding) -> tuple[int, int, int]:
    """The images, rows and columns of a convolution's output."""
    n, h, width, _ = x.shape
    h_out, w_out = ((size + sum(padding) - w.shape[0]) // stride + 1 for size in (h, width))
    return n, h_out, w_out


def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, padding: Padding) -> np.ndarray:
    """As ``portable.conv2d``."""
    if _is_product(w, stride, padding):
        return linear(x, w[0, 0], b)
    size = output_size(x, w, stride, padding)
    if worth_cutting(w, stride, padding, size):
        return _winograd(x, w, b, padding[0], size, doubled=False)
    return _gathered(x, w, b, stride, padding, size)


def _gathered(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, padding: Padding, size: tuple[int, int, int]
) -> np.ndarray:
    before, d = padding[0], w.shape[3]
    narrow = _is_narrow(w, stride, padding) and d < PLANES  # more channels are scattered too slowly
    y = empty((*size, d), x.dtype)

    def work(start: int, stop: int) -> None:
        if narrow:
            narrow_conv(x, w, before, y, start, stop)
        else:
            gather_conv(x, w, stride, before, y, start, stop)
        y[start:stop] += b

    in_parallel(work, size[0], worth_sharing(math.prod(size), w))
    return y


def _winograd(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, before: int, size: tuple[int, int, int], doubled: bool
) -> np.ndarray:
    u = winograd_weight(w)
    y = empty((*size, w.shape[3]), x.dtype)

    def work(start: int, stop: int) -> None:
        winograd_conv(x, u, b, before, y, start, stop, doubled=doubled)

    in_parallel(work, size[0], worth_sharing(math.prod(size), w))
    return y


def conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.conv2d_backward``."""
    if _is_product(w, stride, padding):
        dx, dw, db = linear_backward(x, w[0, 0], dy)
        return dx, dw.reshape(w.shape), db
    if worth_cutting(w, stride, padding, dy.shape[:3]):
        return _winograd_backward(x, w, dy, padding[0], doubled=False)
    return gathered_backward(x, w, dy, stride, padding)


def gathered_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.conv2d_backward``, without patches."""
    dy = np.ascontiguousarray(dy)
    dx, narrow = empty(x.shape, x.dtype), _is_narrow(w, stride, padding)

    def taps(start: int, stop: int) -> np.ndarray:
        if narrow:
            return narrow_conv_backward(x, w, dy, padding[0], dx, start, stop)
        return gather_conv_backward(x, w, dy, stride, padding[0], dx, start, stop)

    return dx, *taps_and_bias(dy, w, taps)


def _winograd_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, before: int, doubled: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dy = np.ascontiguousarray(dy)
    dx = empty(x.shape, x.dtype)
    turned = winograd_weight(transposed_taps(w))

    def taps(start: int, stop: int) -> np.ndarray:
        winograd_conv(dy, turned, None, 2 - before, dx, start, stop, in_pairs=doubled)
        return winograd_conv_taps(x, dy, before, start, stop, doubled=doubled)

    du, db = taps_and_bias(dy, w, taps)
    return dx, winograd_weight_backward(du), db


def upsample_conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As ``portable.upsample_conv2d``.  (docs: A.26)"""
    n, h, width, _ = x.shape
    size = (n, 2 * h, 2 * width)
    if not worth_cutting(w, 1, (1, 1), size):
        return conv2d(upsample(x), w, b, 1, (1, 1))
    return _winograd(x, w, b, 1, size, doubled=True)


def upsample_conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.upsample_conv2d_backward``.  (docs: A.26)"""
    if worth_cutting(w, 1, (1, 1), dy.shape[:3]):
        return _winograd_backward(x, w, dy, 1, doubled=True)
    dx, dw, db = conv2d_backward(upsample(x), w, dy, 1, (1, 1))
    return upsample_backward(dx), dw, db
