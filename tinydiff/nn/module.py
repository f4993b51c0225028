"""Parameters, and the modules that own them.

The contract of every layer: it is called and returns its output and its own derivative ::

    y, backward = layer(x)
    dx = backward(dy)

``backward`` takes the gradient of the loss with respect to the output, adds to the gradients of the
parameters it touched, and returns the gradient with respect to the input. Nothing is kept on the layer
itself, so a layer can be called twice before either backward, and parameters can be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np

from tinydiff._checks import check_array, class_or_kind
from tinydiff.backend import Array, Namespace, array_namespace, asarray_like, to_numpy

__all__ = [
    "M",
    "Module",
    "Parameter",
    "check_state",
    "config_of",
    "derivative_of",
    "inference",
    "keeping",
    "on_the_host",
    "once",
    "weight_of",
]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="Module")


class Parameter:
    """A trainable array and the gradient of the loss with respect to it.

    Parameters
    ----------
    value : array
        The current value, any shape.
    grad : array, optional
        Gradient, of `value`'s shape. It is zero until a backward has run, and takes no memory until
        it is read or added to.

    Raises
    ------
    TypeError
        If `value` or `grad` is not an array.
    ValueError
        If `grad` has another shape than the value, or one of them is masked.
    """

    __slots__ = ("_grad", "value")

    def __init__(self, value: Array, grad: Array | None = None) -> None:
        check_array("value", value)
        self.value = value
        self._grad = None if grad is None else self._checked(grad)

    @property
    def grad(self) -> Array:
        """Gradient of the loss, an array of `value`'s shape."""
        if self._grad is None:
            self._grad = array_namespace(self.value).zeros_like(self.value)
        return self._grad

    @grad.setter
    def grad(self, grad: Array) -> None:
        self._grad = self._checked(grad)

    def accumulate(self, grad: Array) -> None:
        """Add to the gradient (never in place: `grad` may be somebody else's array).

        Raises
        ------
        ValueError
            If `grad` has another shape than the value.
        TypeError
            If it is not an array.
        """
        grad = self._checked(grad)
        self._grad = grad if self._grad is None else self._grad + grad

    def _checked(self, grad: Array) -> Array:
        """`grad`; ValueError for another shape: laid end to end with others, it would shift the rest."""
        check_array("grad", grad)
        if tuple(grad.shape) != tuple(self.shape):
            expected = f"{tuple(self.shape)}, the value's"
            raise ValueError(f"grad has shape {tuple(grad.shape)}; expected {expected}.")
        return grad

    def zero_grad(self) -> None:
        """Make the gradient zero."""
        self._grad = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    def __repr__(self) -> str:
        return f"Parameter(shape={tuple(self.shape)}, dtype={self.value.dtype})"


class Module:
    """Owns parameters and other modules as attributes; names them by their path, as diffusers does.

    They may be in lists, tuples and mappings. A subclass is called as the models are: it returns its output
    and its derivative. A derivative may hold the input and the output themselves, not copies: they must not
    be written to until it has been called.

    Attributes
    ----------
    recordable : bool
        Set on the class itself, not inherited: says that what it launches on a GPU depends only on the shape
        of its input, and that it looks at no number on the host. `tinydiff.train` and `tinydiff.sample` then
        record it.
    config : mapping, optional
        What it was made with, as JSON can hold it: shown by ``repr``; a run resumes only with the same.
    """

    recordable: ClassVar[bool] = False

    def __repr__(self) -> str:
        choices = ", ".join(f"{name}={value!r}" for name, value in config_of(self).items())
        made_with = f"({choices})" if choices else ""
        return f"{type(self).__name__}{made_with} of {self.num_parameters():,} parameters"

    def _named(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, part) for name, part in self._parts() if isinstance(part, Parameter))

    def _parts(self, path: str = "") -> Iterator[tuple[str, Any]]:
        """What it holds: parameters, settings, and modules with what these hold; names begin with `path`."""
        return _walk(path, vars(self).items())

    def named_parameters(self) -> dict[str, Parameter]:
        """Return name -> Parameter in order of construction; a shared parameter has its first name only.

        Raises
        ------
        ValueError
            If two parameters have the same name, as keys with dots may bring about.
        """
        seen: set[int] = set()
        unique = {}
        for name, parameter in self._named():
            if id(parameter) not in seen:
                if name in unique:
                    raise ValueError(f"two parameters are called {name!r}; expected a name for each.")
                seen.add(id(parameter))
                unique[name] = parameter
        return unique

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return name -> value as NumPy arrays on the host, in tinydiff's layout (views if there already)."""
        return {name: to_numpy(p.value) for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values in by name; the dtype and device stay those of the module.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, a shape differs, or a value is not an array of real numbers
            that NumPy can read; nothing is changed then.
        TypeError
            If `state` is not a mapping.
        """
        parameters = self.named_parameters()
        check_state(state, {name: parameter.shape for name, parameter in parameters.items()}, "the model")
        values = {name: on_the_host(name, state[name]) for name in parameters}
        for name, parameter in parameters.items():
            value = asarray_like(values[name], parameter.value)
            parameter.value = array_namespace(value).asarray(value, copy=True)

    def to(self: M, xp: Namespace, dtype: Any = None, device: Any = None) -> M:
        """Move every parameter to `xp` and, if given, to its `dtype` and its `device`; returns self.

        Gradients become zero. Weights can be stored in float16, but networks compute in float32 or float64
        only.

        Raises
        ------
        TypeError
            If `xp` is not the namespace of an array library, as `tinydiff.get_backend` returns it.
        """
        if not hasattr(xp, "asarray"):
            expected = "the namespace of an array library, as get_backend returns it"
            raise TypeError(f"xp is {xp!r}; expected {expected}.")
        for parameter in self.named_parameters().values():
            value = to_numpy(parameter.value)
            target = dtype if dtype is not None else getattr(xp, str(value.dtype))
            parameter.value = xp.asarray(value, dtype=target, device=device)
            parameter.zero_grad()
        return self

    def zero_grad(self) -> None:
        """Make every parameter's gradient zero."""
        for parameter in self.named_parameters().values():
            parameter.zero_grad()

    def num_parameters(self) -> int:
        """Return the number of scalar parameters."""
        return sum(int(np.prod(p.shape)) for p in self.named_parameters().values())

    def predict(self, *inputs: Array, **named: Any) -> Array:
        """Return what a call with these inputs returns first, its output; nothing is kept for a backward."""
        before = _keeping.get()
        try:  # not `with inference()`: Ctrl-C may come between its end and that of the with statement
            _keeping.set(False)
            return self(*inputs, **named)[0]  # type: ignore[operator]
        finally:
            _keeping.set(before)


def _walk(path: str, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    for key, value in items:
        name = f"{path}{key}"
        if isinstance(value, Module):
            yield name, value
            yield from value._parts(f"{name}.")
        elif isinstance(value, (list, tuple, Mapping)):
            yield from _walk(f"{name}.", value.items() if isinstance(value, Mapping) else enumerate(value))
        else:
            yield name, value


def config_of(model: Any) -> Mapping[str, Any]:
    """What the model says it was made with, its ``config``; empty, if that is no mapping."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def weight_of(model: Any) -> Array:
    """One of the model's weights, to put things beside: all are of one library, device and dtype.

    Raises
    ------
    ValueError
        If the model has none.
    """
    for _, parameter in model._named():
        return parameter.value
    raise ValueError(f"model is {class_or_kind(model)} without parameters; expected at least one.")


def check_state(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """TypeError unless `state` is a mapping; ValueError unless it has just these names and shapes."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {class_or_kind(state)}; expected a mapping, what state_dict() returns.")
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    if missing or unexpected:
        raise ValueError(
            f"state does not fit {whose}: missing {_some(missing)}; unexpected {_some(unexpected)}."
        )
    for name, expected in shapes.items():
        if (shape := np.shape(state[name])) != tuple(expected):
            raise ValueError(f"state[{name!r}] has shape {shape}; expected {tuple(expected)}.")


def on_the_host(name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array of real numbers; what is not, or lies elsewhere, is refused by name."""
    dtype, why = getattr(value, "dtype", "no dtype"), ""
    try:
        array = to_numpy(value)
        if hasattr(value, "dtype") and array.dtype != bool and np.can_cast(array.dtype, float, "same_kind"):
            return array
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        why = f" ({str(error).rstrip('.')})"
    raise ValueError(
        f"state[{name!r}] is {class_or_kind(value)} of {dtype}{why}; expected an array of real numbers on "
        "the host, as in model.float().cpu().state_dict()."
    )


def _some(names: list[str], show: int = 3) -> str:
    if not names:
        return "none"
    return ", ".join(names[:show]) + (f", … ({len(names)} in all)" if len(names) > show else "")


_keeping: ContextVar[bool] = ContextVar("keeping", default=True)


@contextmanager
def inference() -> Iterator[None]:
    """Within it a layer lets go of its derivative, and of what that holds, as soon as it returns.

    For the ``predict`` of a model. A context variable, so that one thread may predict while another trains.
    """
    before = _keeping.get()
    try:
        _keeping.set(False)
        yield
    finally:
        _keeping.set(before)


def keeping() -> bool:
    """Whether derivatives are kept: True except within `inference`."""
    return _keeping.get()


def _not_kept(*args: Any) -> Any:
    raise RuntimeError(
        "this output came from inference, which keeps nothing for a backward: sample and the bounds ask a "
        "model by its predict. To differentiate inside, give them a function that calls the model."
    )


def once(backward: F, shape: tuple[int, ...] | None = None, dtype: Any = None) -> F:
    """Let a backward be called once: gradients add up, so a second call would count them twice.

    What it held is let go as soon as it returns; in `inference`, at once. With `shape`, its argument must be
    of that shape: a kernel may read that far. It is cast to `dtype`: the gradient of a loss written by hand
    may well be signs, which are integers.
    """
    if not keeping():
        return _not_kept  # type: ignore[return-value]
    held: list[F] = [backward]

    def call(*args: Any) -> Any:
        if not held:
            raise RuntimeError("backward was called a second time; call the layer again to get a new one.")
        if shape is not None:
            args = (_gradient(args[0], shape, dtype),)
        return held.pop()(*args)

    return call  # type: ignore[return-value]


def _gradient(dy: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """dy in the dtype of the output; TypeError unless of real numbers, ValueError for another shape."""
    if not hasattr(dy, "dtype"):
        raise TypeError(f"dy is {class_or_kind(dy)}; expected an array of shape {shape}.")
    if tuple(dy.shape) != shape:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; expected {shape}, that of the output.")
    if dy.dtype == dtype:
        return dy
    xp = array_namespace(dy)
    if not xp.isdtype(dy.dtype, ("real floating", "integral")):
        raise TypeError(f"dy has dtype {dy.dtype}; expected real numbers.")
    return xp.astype(dy, dtype)


def derivative_of(y: Array) -> Callable[[F], F]:
    """Decorate the backward of the layer whose output is `y`: called `once`, with a gradient like y."""
    return partial(once, shape=tuple(y.shape), dtype=y.dtype)
