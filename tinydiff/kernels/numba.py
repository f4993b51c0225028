"""The Numba twin of ``portable.py``: the same functions for NumPy arrays, compiled for this processor.

Optional, and chosen by ``TINYDIFF_KERNELS=numba`` or ``kernels.use("numba")``. NumPy goes on doing what it
does well: matrix products, and convolutions that are little else. What it can only do in many passes over
memory is compiled: the transforms of Winograd's convolution (``_numba_winograd.py``), normalisation with
SiLU (``_numba_norm.py``), SiLU alone (``_numba_silu.py``), attention's exponential (``_numba_attention.py``)
and the optimiser's step (``_numba_optim.py``). They are written with vectors as values
(``_numba_lanes.py``), of which ``_numba_exp.py`` takes the exponential.

Arrays that are neither all float32 nor all float64 go to the NumPy twin, as does what gains nothing here.
The results equal the NumPy twin's up to rounding, not in their bits (docs: A.3, A.24).
"""

from __future__ import annotations

import math

import numpy as np

from tinydiff.kernels import numpy as numpy_twin
from tinydiff.kernels._attention import attention_backward
from tinydiff.kernels._linear import linear, linear_backward, sum_pixels, taps_and_bias, worth_sharing
from tinydiff.kernels._memory import empty
from tinydiff.kernels._numba_attention import attention
from tinydiff.kernels._numba_jit import fits
from tinydiff.kernels._numba_norm import (
    group_norm,
    group_norm_backward,
    group_norm_silu,
    group_norm_silu_backward,
)
from tinydiff.kernels._numba_optim import adam_step, ema_step
from tinydiff.kernels._numba_silu import silu, silu_backward
from tinydiff.kernels._numba_winograd import (
    winograd_conv,
    winograd_conv_backward,
    winograd_weight,
    winograd_weight_backward,
)
from tinydiff.kernels._threads import in_parallel
from tinydiff.kernels._winograd import count_patches, worth_cutting
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

# The weight's gradient sums over patches. Over fewer than this its rounding is up to 5 times PyTorch's, so
# rows are gathered instead (docs: A.4, A.24); after a doubling the NumPy twin does it its own way.
BACKWARD_PATCHES = 128


def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, padding: Padding) -> np.ndarray:
    """As ``portable.conv2d``."""
    size = numpy_twin.output_size(x, w, stride, padding)
    if not (worth_cutting(w, stride, padding, size) and fits(x, w, b)):
        return numpy_twin.conv2d(x, w, b, stride, padding)
    return _winograd(x, w, b, padding[0], size, doubled=False)


def conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.conv2d_backward``."""
    size = dy.shape[:3]
    if not (worth_cutting(w, stride, padding, size) and fits(x, w, dy)):
        return numpy_twin.conv2d_backward(x, w, dy, stride, padding)
    if count_patches(*size) < BACKWARD_PATCHES:
        return numpy_twin.gathered_backward(x, w, dy, stride, padding)
    return _winograd_backward(x, w, dy, padding[0], doubled=False)


def upsample_conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As ``portable.upsample_conv2d``.  (docs: A.26)"""
    n, h, width, _ = x.shape
    size = (n, 2 * h, 2 * width)
    if not (worth_cutting(w, 1, (1, 1), size) and fits(x, w, b)):
        return numpy_twin.upsample_conv2d(x, w, b)
    return _winograd(x, w, b, 1, size, doubled=True)


def upsample_conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.upsample_conv2d_backward``.  (docs: A.26)"""
    size = dy.shape[:3]
    many = worth_cutting(w, 1, (1, 1), size) and count_patches(*size) >= BACKWARD_PATCHES
    if not (many and fits(x, w, dy)):
        return numpy_twin.upsample_conv2d_backward(x, w, dy)
    return _winograd_backward(x, w, dy, 1, doubled=True)


def _winograd(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, before: int, size: tuple[int, int, int], doubled: bool
) -> np.ndarray:
    x, b, u = np.ascontiguousarray(x), np.ascontiguousarray(b), winograd_weight(w)
    y = empty((*size, w.shape[3]), x.dtype)

    def work(start: int, stop: int) -> None:
        winograd_conv(x, u, b, before, y, start, stop, doubled=doubled)

    in_parallel(work, size[0], worth_sharing(math.prod(size), w))
    return y


def _winograd_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, before: int, doubled: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)
    ut = winograd_weight(np.ascontiguousarray(w.swapaxes(2, 3)))
    dx = empty(x.shape, x.dtype)
    dx[...] = 0.0

    def taps(start: int, stop: int) -> np.ndarray:
        return winograd_conv_backward(x, ut, dy, before, dx, start, stop, doubled=doubled)

    du, db = taps_and_bias(dy, w, taps)
    return dx, winograd_weight_backward(du), db
