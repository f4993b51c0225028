"""The Numba twin of ``portable.py``: the same functions for NumPy arrays, compiled for this processor.

Optional, and chosen by ``TINYDIFF_KERNELS=numba`` or ``kernels.use("numba")``. What NumPy does well it goes
on doing: matrix products, and convolutions that are little else. Compiled is what NumPy can only do as many
passes over memory: the transforms of Winograd's convolution (``_numba_winograd.py``), normalisation with
SiLU (``_numba_norm.py``), softmax (``_numba_rows.py``) and the optimiser's step (``_numba_optim.py``). They
are written with vectors as values (``_numba_lanes.py``), of which ``_numba_exp.py`` takes the exponential.

Arrays that are neither all float32 nor all float64 go to the NumPy twin, as does what gains nothing here.
The results equal the NumPy twin's up to rounding, not in their bits (docs: A.3, A.24).
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import numpy as numpy_twin
from tinydiff.kernels._attention import attention, attention_backward
from tinydiff.kernels._gather import gather_conv_backward
from tinydiff.kernels._linear import column_sums, linear, linear_backward
from tinydiff.kernels._numba_jit import fits
from tinydiff.kernels._numba_norm import (
    group_norm,
    group_norm_backward,
    group_norm_silu,
    group_norm_silu_backward,
)
from tinydiff.kernels._numba_optim import adam_change, adam_step, ema_step
from tinydiff.kernels._numba_rows import silu, silu_backward, softmax, softmax_backward
from tinydiff.kernels._numba_winograd import (
    winograd_conv,
    winograd_conv_backward,
    winograd_weight,
    winograd_weight_backward,
)
from tinydiff.kernels._threads import in_parallel
from tinydiff.kernels.portable import Padding

__all__ = [
    "adam_change",
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
    "softmax",
    "softmax_backward",
]

# Winograd's transforms take 16 channels at a time, so there must be as many.
WINOGRAD_CHANNELS = 16

# The weight's gradient sums over patches. Over fewer than this its rounding is up to 5 times PyTorch's, so
# rows are gathered instead (docs: A.4, A.24).
BACKWARD_PATCHES = 128


def _patches(x: np.ndarray, padding: Padding) -> int:
    """How many 4x4 patches the output is cut into, those that stick out included."""
    h_out, w_out = (size + sum(padding) - 2 for size in x.shape[1:3])
    return x.shape[0] * -(-h_out // 4) * -(-w_out // 4)


def _is_winograd(x: np.ndarray, w: np.ndarray, stride: int, padding: Padding) -> bool:
    """Whether to cut the output into patches: each takes 36 products, however much of it sticks out."""
    h_out, w_out = (size + sum(padding) - 2 for size in x.shape[1:3])
    return (
        w.shape[0] == 3
        and stride == 1
        and min(w.shape[2:]) >= WINOGRAD_CHANNELS
        and 36 * _patches(x, padding) <= 5 * x.shape[0] * h_out * w_out
    )


def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, padding: Padding) -> np.ndarray:
    """As ``portable.conv2d``."""
    if not (_is_winograd(x, w, stride, padding) and fits(x, w, b)):
        return numpy_twin.conv2d(x, w, b, stride, padding)
    n, height, width, _ = x.shape
    before, after = padding
    x, b, u = np.ascontiguousarray(x), np.ascontiguousarray(b), winograd_weight(w)
    y = np.empty((n, height + before + after - 2, width + before + after - 2, w.shape[3]), x.dtype)
    in_parallel(lambda start, stop: winograd_conv(x, u, b, before, y, start, stop), n)
    return y


def conv2d_backward(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.conv2d_backward``."""
    if not (_is_winograd(x, w, stride, padding) and fits(x, w, dy)):
        return numpy_twin.conv2d_backward(x, w, dy, stride, padding)
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)
    ut = winograd_weight(np.ascontiguousarray(w.swapaxes(2, 3)))
    dx = np.zeros(x.shape, x.dtype)
    few = _patches(x, padding) < BACKWARD_PATCHES

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        db = column_sums(dy[start:stop].reshape(-1, w.shape[3]))
        if few:
            return gather_conv_backward(x, w, dy, stride, padding[0], dx, start, stop), db
        return winograd_conv_backward(x, ut, dy, padding[0], dx, start, stop), db

    shares = in_parallel(work, x.shape[0])
    du, db = (sum(parts[1:], parts[0]) for parts in zip(*shares, strict=True))
    return dx, du if few else winograd_weight_backward(du), db
