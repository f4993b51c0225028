"""Halving and doubling the pixels: a strided convolution down, nearest neighbours and a convolution up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_choice, check_images
from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn.conv import Conv2d
from tinydiff.nn.module import Module, derivative_of

__all__ = ["Downsample", "Upsample", "upsample_nearest"]


class Downsample(Module):
    """A 3x3 convolution with stride 2.

    Parameters
    ----------
    channels : int
        Channels, before and after.
    padding : {0, 1}
        1: one zero on every side (diffusers' default). 0: one zero at the bottom and right only, the
        asymmetric padding of Ho et al.'s released code and the published DDPM checkpoints.
    rng : numpy.random.Generator
        Draws the initial weight.

    Raises
    ------
    ValueError
        If `padding` is neither of the two.
    """

    def __init__(self, channels: int, padding: int, rng: np.random.Generator) -> None:
        check_choice("padding", padding, (0, 1))
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(int(padding), 1), rng=rng)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (N, H, W, C)  ->  y (N, H/2, W/2, C); H and W even.  (docs: B.7)"""
        return self.conv(x)


def upsample_nearest(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Repeat every pixel 2 x 2: y[n, p, q, :] = x[n, p // 2, q // 2, :].  (docs: B.15)

    x (N, H, W, C)  ->  y (N, 2H, 2W, C)
    """
    kernels = kernels_for(x)
    y = kernels.upsample(x)

    @derivative_of(y)
    def backward(dy: Array) -> Array:
        """dx = the sum of dy over the four copies.  (docs: B.15)"""
        return kernels.upsample_backward(dy)

    return y, backward


class Upsample(Module):
    """Nearest neighbour, then a 3x3 convolution, in one: `conv` is not called, only its weights are read.

    Parameters
    ----------
    channels : int
        Channels, before and after.
    rng : numpy.random.Generator
        Draws the initial weight.
    """

    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        self.conv = Conv2d(channels, channels, 3, rng=rng)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (N, H, W, C)  ->  y (N, 2H, 2W, C).  (docs: B.15, B.7)"""
        kernels = kernels_for(x)
        weight = self.conv.weight.value
        check_images(x, weight.shape[2])
        y = kernels.upsample_conv2d(x, weight, self.conv.bias.value)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """Through the convolution, then the doubling, which need not be two steps.  (docs: A.26)"""
            dx, dw, db = kernels.upsample_conv2d_backward(x, weight, dy)
            self.conv.weight.accumulate(dw)
            self.conv.bias.accumulate(db)
            return dx

        return y, backward
