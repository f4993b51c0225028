"""The activation SiLU, x sigmoid(x) (Elfwing et al. 2018; "swish" in Ho et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

from tinydiff._checks import check_floating
from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn.module import derivative_of

__all__ = ["silu"]


def silu(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """y = x s,  s = sigmoid(x),  element by element; one axis or more.  (docs: B.3)"""
    check_floating(x)
    kernels = kernels_for(x)
    y, s = kernels.silu(x)

    @derivative_of(y)
    def backward(dy: Array) -> Array:
        """dx = dy (s + y (1 - s)).  (docs: B.3)"""
        return kernels.silu_backward(s, y, dy)

    return y, backward
