"""Joining a skip connection to the stream it returns to."""

from __future__ import annotations

from collections.abc import Callable

from tinydiff.backend import Array, array_namespace
from tinydiff.nn.module import derivative_of

__all__ = ["concat"]


def concat(a: Array, b: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """y = [a, b] along channels: (..., A), (..., B)  ->  (..., A + B).  (docs: B.16)"""
    split = a.shape[-1]
    y = array_namespace(a).concat([a, b], axis=-1)

    @derivative_of(y)
    def backward(dy: Array) -> tuple[Array, Array]:
        """Cut dy into da and db.  (docs: B.16)"""
        return dy[..., :split], dy[..., split:]

    return y, backward
