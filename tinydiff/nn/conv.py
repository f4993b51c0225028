"""Convolution over pixels, channels last: 3x3 and 1x1, stride 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, check_images
from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn import init
from tinydiff.nn.module import Module, derivative_of

__all__ = ["Conv2d"]


class Conv2d(Module):
    """y = b + sum over taps of the shifted image times the tap's matrix.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before and after.
    kernel_size : int
        Taps per side; the weight is (kernel_size, kernel_size, in_channels, out_channels).
    stride : int
        Step between outputs.
    padding : int or tuple of (int, int), optional
        Zeros ``(before, after)`` along rows and columns alike; one number is for both. Default:
        ``kernel_size // 2``, which keeps the size at stride 1 if `kernel_size` is odd.
    rng : numpy.random.Generator
        Draws the initial weight.
    scale : float
        Variance scale of the initial weight; 0 begins at zero.

    Raises
    ------
    ValueError
        If a size or `stride` is not a positive integer, `padding` not as said above, or `scale` below 0.
    TypeError
        If `rng` is not a generator.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        rng: np.random.Generator,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        scale: float = 1.0,
    ) -> None:
        check_counts(in_channels=in_channels, out_channels=out_channels)
        check_counts(kernel_size=kernel_size, stride=stride)
        self.stride = stride
        padding = kernel_size // 2 if padding is None else padding
        self.padding = (padding, padding) if isinstance(padding, (int, np.integer)) else padding
        if not _is_pair(self.padding):
            raise ValueError(f"padding is {padding!r}; expected one number of zeros, or (before, after).")
        self.weight = init.uniform(rng, (kernel_size, kernel_size, in_channels, out_channels), scale)
        self.bias = init.zeros(out_channels)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (N, H, W, C)  ->  y (N, H', W', D).  (docs: B.7)"""
        kernels = kernels_for(x)
        weight, stride, padding = self.weight.value, self.stride, self.padding
        check_images(x, weight.shape[2])
        y = kernels.conv2d(x, weight, self.bias.value, stride, padding)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """dx: scatter dy through the taps; dW: correlate x with dy; db: sum dy.  (docs: B.8, B.9)"""
            dx, dw, db = kernels.conv2d_backward(x, weight, dy, stride, padding)
            self.weight.accumulate(dw)
            self.bias.accumulate(db)
            return dx

        return y, backward


def _is_pair(padding: Any) -> bool:
    pair = padding if isinstance(padding, (tuple, list)) else ()
    return len(pair) == 2 and all(isinstance(n, (int, np.integer)) and n >= 0 for n in pair)
