"""What every network asks of its sizes and inputs before it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinydiff._checks import check_array, check_labels, class_or_kind
from tinydiff.backend import (
    Array,
    array_namespace,
    integers_like,
    is_cupy_array,
    is_numpy_array,
    library_of,
)
from tinydiff.nn.module import Module, Parameter, config_of, weight_of

__all__ = [
    "answer_of",
    "changes",
    "check_like_model",
    "check_like_weights",
    "check_model",
    "check_own_layers",
    "check_times",
    "check_told",
    "exchanged_layers",
    "labels_for",
    "num_classes_of",
    "plain",
    "without_rng",
]


def plain(**config: Any) -> dict[str, Any]:
    """The configuration in types that JSON has: NumPy's scalars as Python's, arrays and tuples as lists."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple, np.ndarray)):
            return [one(item) for item in value]
        return value.item() if isinstance(value, np.generic) else value

    return {name: one(value) for name, value in config.items()}


def answer_of(model: Any, x: Array, t: Array, *more: Any) -> tuple[Array, Callable[[Array], Array]]:
    """The model's output and its derivative; TypeError if it returns no derivative (a `denoise`, say).

    `more` is a generator, and the labels if there are any.
    """
    answer = model(x, t, *more)
    if not (isinstance(answer, tuple) and len(answer) == 2 and callable(answer[1])):
        raise TypeError(f"model(x, t) is {class_or_kind(answer)}; expected (output, backward).")
    return answer


def without_rng(x: Array, t: Array, *labels: Array) -> tuple[Any, ...]:
    """The arguments of a call that draws nothing: labels, if there are any, come after the generator."""
    return (x, t, None, *labels) if labels else (x, t)


def check_like_weights(x: Any, weight: Array, name: str = "x") -> None:
    """TypeError unless x is an array, ValueError unless it is of the weights' library, device and dtype.

    The dtype must be float32 or float64: in float16 a sum over the pixels of an image overflows, and what a
    group normalisation makes of an infinite variance is finite and wrong. `name` is what x is called in
    messages.
    """
    check_array(name, x)
    if array_namespace(x) is not array_namespace(weight) or x.dtype != weight.dtype:
        raise ValueError(
            f"{name} is a {library_of(x)} array of {x.dtype}; the model's weights are {library_of(weight)} "
            f"arrays of {weight.dtype}."
        )
    if array_namespace(weight).finfo(weight.dtype).bits not in (32, 64):
        raise ValueError(f"the model's weights are of {weight.dtype}; expected float32 or float64.")
    if is_cupy_array(x):
        _check_device(name, x.device, weight.device)


def _check_device(name: str, of_x: Any, of_weights: Any) -> None:
    """ValueError unless both are the current GPU: kernels run there, and may not reach another's memory."""
    here = type(of_x)()
    if not of_x == of_weights == here:
        raise ValueError(
            f"{name} is on {of_x}, the model's weights are on {of_weights}, and this thread launches on "
            f"{here}; expected one device (get_backend('cupy', device=...) chooses a thread's)."
        )


def check_like_model(model: Any, name: str, x: Any) -> None:
    """TypeError unless x is an array; if `model` is a network, ValueError unless it is like its weights.

    `name` is what the caller's argument is called.
    """
    first = next(model._named(), None) if isinstance(model, Module) else None
    if first is None:
        check_array(name, x)
    else:
        check_like_weights(x, first[1].value, name)


def check_model(model: Any) -> None:
    """TypeError unless it is a `Module`: a class is refused, and a model of another framework."""
    if not isinstance(model, Module):
        expected = "a UNet, an MLP, or another network derived from nn.Module"
        raise TypeError(f"model is {class_or_kind(model)}; expected {expected}.")


def check_own_layers(model: Any) -> None:
    """TypeError unless one of tinydiff's networks is what its config makes: the same layers and settings.

    A file holds the config and each weight once. Any other change would be lost in silence.
    """
    for name, found, expected in changes(model):
        raise TypeError(
            f"model has {found} as {name}; expected {expected}, which its config makes again (what "
            "state_dict() returns is kept by checkpoint.save_arrays)."
        )


def changes(model: Any) -> Iterator[tuple[str, str, str]]:
    """Where one of tinydiff's networks is not what its config makes: name, what is there, what should be."""
    made, has = dict(type(model)(**model.config, backend="numpy")._parts()), dict(model._parts())
    first = {id(parameter): name for name, parameter in model.named_parameters().items()}
    layers = {name: part for name, part in has.items() if isinstance(part, (Module, Parameter))}
    for name in made | layers:
        part = has.get(name)
        other = first.get(id(part), name)
        if other != name or not _alike(part, made.get(name)):
            found = repr(part) if other == name else f"{other} again"
            yield name, found, repr(made[name]) if name in made else "nothing"


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Parameter):
        return isinstance(other, Parameter) and one.shape == other.shape
    return type(one) is type(other) if isinstance(one, Module) else np.array_equal(one, other)


def exchanged_layers(model: Any) -> dict[str, Module]:
    """The layers by name, in one of tinydiff's own networks, that are of somebody else's class.

    Neither the network's config nor what its class says of itself holds for them.
    """
    parts = model._parts() if _is_own(model) else ()
    return {name: part for name, part in parts if isinstance(part, Module) and not _is_own(part)}


def _is_own(part: Any) -> bool:
    return type(part).__module__.startswith("tinydiff.")


def check_times(t: Any, x: Array) -> None:
    """TypeError unless t is an array, ValueError unless it has one time for each sample of x."""
    check_array("t", t)
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"t has shape {tuple(t.shape)}; expected ({x.shape[0]},), one time for each of x.")


def num_classes_of(model: Any, name: str = "model") -> int:
    """How many classes the network can be told; ValueError if none. `name` is the caller's argument."""
    classes = config_of(model).get("num_classes")
    if classes is None:
        raise ValueError(
            f"labels are given, and {name} is {class_or_kind(model)} without classes; expected None, or a "
            "network made with num_classes."
        )
    return int(classes)


def labels_for(model: Any, labels: Any, n: int, name: str = "model") -> Array | None:
    """The labels beside the model's weights; None if there are none.

    ValueError or TypeError unless they are n classes that it has. `name` is the caller's argument.
    """
    if labels is None:
        return None
    check_labels(labels, num_classes_of(model, name) + 1, n)
    if not is_numpy_array(labels):
        return labels
    return integers_like(labels.astype(np.int64), weight_of(model))  # sent once, not at every call


def check_told(model: Any, labels: Any, n: int) -> None:
    """Nothing without labels; else ValueError or TypeError unless they are n classes that the network has."""
    if labels is not None:
        check_labels(labels, num_classes_of(model) + 1, n)
