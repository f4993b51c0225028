"""The affine map y = x W + b."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts, check_features
from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn import init
from tinydiff.nn.module import Module, derivative_of

__all__ = ["Linear"]


class Linear(Module):
    """y = x W + b over the last axis.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis before and after.
    rng : numpy.random.Generator
        Draws the initial weight (in_features, out_features).
    scale : float
        Variance scale of the initial weight; 0 begins at zero.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or `scale` is below 0.
    TypeError
        If `rng` is not a generator.
    """

    def __init__(
        self, in_features: int, out_features: int, rng: np.random.Generator, scale: float = 1.0
    ) -> None:
        check_counts(in_features=in_features, out_features=out_features)
        self.weight = init.uniform(rng, (in_features, out_features), scale)
        self.bias = init.zeros(out_features)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (..., in)  ->  y (..., out).  (docs: B.1)"""
        kernels = kernels_for(x)
        weight = self.weight.value
        check_features(x, weight.shape[0])
        y = kernels.linear(x, weight, self.bias.value)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """dW = x.T dy,  db = sum dy,  dx = dy W.T,  with rows flattened.  (docs: B.2)"""
            dx, dw, db = kernels.linear_backward(x, weight, dy)
            self.weight.accumulate(dw)
            self.bias.accumulate(db)
            return dx

        return y, backward
