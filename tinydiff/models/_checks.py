"""What every network asks of its sizes and inputs before it computes."""

from __future__ import annotations

from typing import Any

from tinydiff.backend import Array, array_namespace

__all__ = ["check_like_weights", "check_positive", "check_times"]


def check_positive(**sizes: int) -> None:
    """ValueError naming the first size that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1.")


def check_like_weights(x: Any, weight: Array) -> None:
    """TypeError unless x is an array, ValueError unless it is of the weights' library and dtype."""
    if not hasattr(x, "shape"):
        raise TypeError(f"x is a {type(x).__name__}; expected an array.")
    if array_namespace(x) is not array_namespace(weight) or x.dtype != weight.dtype:
        raise ValueError(
            f"x is a {_library(x)} array of {x.dtype}; the model's weights are {_library(weight)} arrays of "
            f"{weight.dtype}."
        )


def check_times(t: Any, x: Array) -> None:
    """TypeError unless t is an array, ValueError unless it has one time for each of x."""
    if not hasattr(t, "shape"):
        raise TypeError(f"t is a {type(t).__name__}; expected an array.")
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"t has shape {tuple(t.shape)}; expected ({x.shape[0]},), one time for each of x.")


def _library(x: Array) -> str:
    return type(x).__module__.partition(".")[0]
