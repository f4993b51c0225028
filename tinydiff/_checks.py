"""Checks of arguments that modules throughout the package share."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

Choice = TypeVar("Choice")

__all__ = [
    "check_array",
    "check_batch",
    "check_betas",
    "check_choice",
    "check_counts",
    "check_features",
    "check_floating",
    "check_images",
    "check_labels",
    "check_network",
    "check_number",
    "check_rng",
    "check_seed",
    "check_unmasked",
    "class_or_kind",
]


def check_array(name: str, array: Any) -> None:
    """TypeError unless it is an array, of whatever library; ValueError if it is masked."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):  # a table of pandas' has only a shape
        raise TypeError(f"{name} is {class_or_kind(array)}; expected an array.")
    check_unmasked(name, array)


def check_batch(name: str, x: Any) -> None:
    """ValueError unless the array has a batch axis, and no axis of size 0."""
    if min(x.shape, default=0) < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, ...) with every size at least 1.")


def check_betas(betas: Any) -> None:
    """ValueError unless `betas` are two numbers in [0, 1), the decays of Adam's moments."""
    two = np.shape(betas) == (2,) and all(isinstance(beta, numbers.Real) for beta in betas)
    if not (two and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas is {betas!r}; expected two numbers in [0, 1).")


def check_counts(**counts: Any) -> None:
    """ValueError naming the first that is not an integer of at least 1 (a bool is refused)."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected an integer of at least 1.")


def check_features(x: Any, features: int) -> None:
    """ValueError unless the last axis has this size: a kernel reads as many as its weights have.

    TypeError unless it is an array.
    """
    check_array("x", x)
    if tuple(x.shape[-1:]) != (features,):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {features}).")


def check_floating(x: Any) -> None:
    """TypeError unless x is an array of real floating numbers: others have no derivative."""
    check_array("x", x)
    if getattr(x.dtype, "kind", "f") in "biucO":  # not every library has a kind
        raise TypeError(f"x has dtype {x.dtype}; expected a real floating one.")


def check_images(x: Any, channels: int) -> None:
    """ValueError unless x is images with that many channels: a kernel reads as many as its weights have.

    TypeError unless they are of real floating numbers.
    """
    check_floating(x)
    if len(x.shape) != 4 or x.shape[3] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, H, W, {channels}).")


def check_choice(name: str, value: Choice, choices: tuple[Choice, ...]) -> Choice:
    """`value`, or ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
    return value


def check_labels(labels: Any, classes: int, n: int | None = None) -> None:
    """TypeError unless the array is of integers, ValueError unless (n,) and, on the host, 0 … classes - 1."""
    check_array("labels", labels)
    shape = tuple(labels.shape)
    if len(shape) != 1 or n not in (None, *shape):
        raise ValueError(f"labels has shape {shape}; expected ({'N' if n is None else n},).")
    if getattr(labels.dtype, "kind", "i") not in "iu":
        raise TypeError(f"labels has dtype {labels.dtype}; expected integers.")
    if isinstance(labels, np.ndarray) and labels.size and (labels.min() < 0 or labels.max() >= classes):
        came = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels has values {came}; expected 0 to {classes - 1}.")


def check_network(name: str, network: Any) -> None:
    """TypeError unless it can be called; for a training's result, the message names the model in it."""
    if isinstance(network, type) or not callable(network):
        within = "; its attribute model is one" if callable(getattr(network, "model", None)) else ""
        expected = f"a network, or another function of x and t{within}"
        raise TypeError(f"{name} is {class_or_kind(network)}; expected {expected}.")


def check_number(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    """ValueError unless `value` is a real number for which ``fits(value)`` is true (a bool is refused)."""
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) and fits(value)):
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


def check_rng(rng: Any) -> None:
    """TypeError unless `rng` draws as NumPy's and CuPy's generators do.

    Neither a seed does, nor a RandomState, the module ``numpy.random``, or a class of generators.
    """
    if isinstance(rng, (np.random.RandomState, ModuleType, type)) or not hasattr(rng, "standard_normal"):
        raise TypeError(f"rng is {class_or_kind(rng)}; expected a numpy.random.Generator.")


def check_seed(seed: Any) -> None:
    """ValueError unless `seed` is an integer in 0 … 2**32 - 1."""
    # NumPy splits a larger one into two words, so that two seeds could share a stream.
    integer = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not (integer and 0 <= seed < 2**32):
        raise ValueError(f"seed is {seed!r}; expected an integer in 0 … 2**32 - 1.")


def check_unmasked(name: str, values: Any) -> None:
    """ValueError if `values` is a masked array: the numbers that its mask hides would be used, too."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array; expected one in which every number counts.")


def class_or_kind(value: Any) -> str:
    """What came, for a message: "a dict", or "the class UNet", which a caller has forgotten to call."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeio" or name in ("ndarray", "MLP") else f"a {name}"
