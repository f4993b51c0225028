"""Dropout (Srivastava et al. 2014), scaled so that the expectation is unchanged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_number, check_rng
from tinydiff.backend import Array, asarray_like
from tinydiff.nn.module import derivative_of

__all__ = ["dropout"]


def dropout(x: Array, rate: float, rng: np.random.Generator | None) -> tuple[Array, Callable[[Array], Array]]:
    """y = x m,  m = 0 with probability `rate`, else 1 / (1 - rate).  (docs: B.4)

    Parameters
    ----------
    x : array
        Any shape.
    rate : float
        Probability in [0, 1) that an element is dropped.
    rng : numpy.random.Generator or None
        Draws the mask. None (inference) drops nothing.

    Raises
    ------
    ValueError
        If `rate` is not in [0, 1).
    TypeError
        If `rng` is not a generator.
    """
    check_number("rate", rate, lambda rate: 0 <= rate < 1, "a probability in [0, 1)")
    if rate == 0.0 or rng is None:
        return x, derivative_of(x)(lambda dy: dy)
    check_rng(rng)
    keep = rng.random(x.shape, dtype=np.float32) >= rate
    mask = asarray_like(keep, x) * (1.0 / (1.0 - float(rate)))
    y = x * mask

    @derivative_of(y)
    def backward(dy: Array) -> Array:
        """dx = dy m.  (docs: B.4)"""
        return dy * mask

    return y, backward
