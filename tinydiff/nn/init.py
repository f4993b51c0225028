"""How weights begin: uniform with variance 1 / mean(fan_in, fan_out) (docs: B.26)."""

from __future__ import annotations

import math

import numpy as np

from tinydiff._checks import check_number, check_rng
from tinydiff.nn.module import Parameter

__all__ = ["ones", "uniform", "zeros"]


def uniform(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> Parameter:
    """Draw U(-b, b) with variance `scale` / mean(fan_in, fan_out); (..., in, out).  (docs: B.26)

    Glorot & Bengio 2010, with the numbers of the code that Ho et al. 2020 released.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the draw.
    shape : tuple of int
        ``(..., in, out)``; leading axes (the taps of a convolution) multiply both fans.
    scale : float
        Variance scale; 0 gives zeros, with which the last layer of a residual branch begins.
    """
    check_rng(rng)
    check_number("scale", scale, lambda scale: 0 <= scale < math.inf, "a number of at least 0")
    taps = math.prod(shape[:-2])
    fan = taps * (shape[-2] + shape[-1]) / 2
    bound = math.sqrt(3.0 * scale / fan)
    return Parameter(rng.uniform(-bound, bound, shape).astype(np.float32))


def zeros(*shape: int) -> Parameter:
    """A parameter of zeros (biases)."""
    return Parameter(np.zeros(shape, np.float32))


def ones(*shape: int) -> Parameter:
    """A parameter of ones (the gain of a normalisation)."""
    return Parameter(np.ones(shape, np.float32))
