"""Whether a layer's backward is the derivative of its forward, and keeps what a backward promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinydiff._checks import check_seed, class_or_kind
from tinydiff.backend import to_numpy
from tinydiff.nn.module import Module, Parameter
from tinydiff.testing._asked import Function, check_tolerance

__all__ = ["assert_backward"]

# Of central differences: rounding, 1e-16 / STEP, and truncation, STEP**2, are both near 1e-11, the latter
# times the third derivative. From two steps the truncation can be taken out (Richardson's extrapolation).
STEP = 1e-5
DIRECTIONS = 2  # that every array is moved along: an error is seen by each that is not at right angles to it
LOOKED_AT = 200  # numbers of a gradient that is wrong
SPREAD = 0.3  # by which parameters are moved, so that none is zero

Key = int | str  # an input by its position, a parameter by its name
Arrays = dict[Key, np.ndarray]


def assert_backward(
    layer: Function,
    *inputs: Any,
    parameters: Mapping[str, Parameter] | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Raise unless ``backward``, of ``y, backward = layer(*inputs)``, is the layer's derivative (docs: B.24).

    The gradients of the scalar sum(y dy), with a random dy, are held against central differences, in float64.
    Inputs are copied. Parameters are moved by small random numbers, because those that are zero hide errors
    of the layers before them; afterwards they and their gradients are what they were.

    Parameters
    ----------
    layer : callable
        A layer, a network, or a function: returns an array y and its derivative, which takes the gradient of
        y, adds to the gradients of the parameters, and returns the gradient of the input, or of several a
        tuple.
    *inputs
        What the layer is called with. Arrays of floating numbers have gradients. Everything else, times or
        classes say, is passed on; a `numpy.random.Generator` as a copy, so that each call draws the same.
        Some hundred numbers will do. Where the layer has kinks keep their number small: differences across
        a kink are no derivative.
    parameters : mapping, optional
        Name -> `tinydiff.nn.Parameter`. Default: those of the layer, if it is a `tinydiff.nn.Module`.
    tolerance : float
        The largest error that passes, relative to the norm of the largest of the gradients.
    seed : int
        Of dy, and of the directions of the differences.

    Raises
    ------
    AssertionError
        If a gradient is wrong, is missing, or has another shape or dtype than its array; if gradients are not
        added to those that are there; if a call spoils the backward of an earlier one; if inputs, parameters
        or dy are written to; if y is not the same at every call; if a `Module` makes float64 of float32.
        What is wrong with a gradient is said where it can be told: its sign, a factor, a transpose.
    TypeError
        If the layer cannot be called or does not return an array and a function.
    ValueError
        If there is nothing to differentiate, or `tolerance` or `seed` is no such number.
    """
    check_tolerance(tolerance)
    check_seed(seed)
    if isinstance(layer, type) or not callable(layer):
        raise TypeError(f"layer is {class_or_kind(layer)}; expected a function that returns y, backward.")
    if parameters is None:
        parameters = layer.named_parameters() if isinstance(layer, Module) else {}
    before = {name: (p.value, p.grad) for name, p in parameters.items()}
    try:
        asked = _Asked(layer, inputs, parameters, np.random.default_rng(seed))
        asked.check_gradients(tolerance)
        asked.check_promises()
        if isinstance(layer, Module):
            asked.check_float32()
    finally:
        for name, (value, gradient) in before.items():
            parameters[name].value, parameters[name].grad = value, gradient


class _Asked:
    """A layer as a function of the arrays that it is differentiated by.

    Attributes
    ----------
    at : dict of arrays
        Where it is asked: copies of the inputs, and the parameters, moved; float64.
    dy : array
        The gradient of its output.
    gradients : dict of arrays
        Those that its backward gives.
    allowed : float
        How far a gradient may be off.
    """

    def __init__(
        self,
        layer: Function,
        inputs: tuple[Any, ...],
        parameters: Mapping[str, Parameter],
        rng: np.random.Generator,
    ) -> None:
        self.layer, self.inputs, self.parameters, self.rng = layer, inputs, parameters, rng
        self.at: Arrays = {i: np.array(x, np.float64) for i, x in enumerate(inputs) if _is_floating(x)}
        for name, p in parameters.items():
            fan_in = math.prod(p.shape[:-1]) if len(p.shape) > 1 else 1
            moved = rng.standard_normal(p.shape) * (SPREAD / math.sqrt(fan_in))
            self.at[name] = to_numpy(p.value).astype(np.float64) + moved
        if not self.at:
            raise ValueError("no input is an array of floats and there is no parameter; expected one.")
        y = self.called(self.at)[0]
        if y.dtype != np.float64:
            raise AssertionError(f"y is of {y.dtype} where inputs and parameters are of float64.")
        if not np.all(np.isfinite(y)):
            raise AssertionError("y is not finite.")
        self.dy = np.asarray(rng.standard_normal(y.shape))

    def called(self, at: Arrays) -> tuple[np.ndarray, Callable[..., Any]]:
        """y, and backward, at these arrays; the parameters' gradients are zero."""
        for name, p in self.parameters.items():
            p.value = at[name]
            p.zero_grad()
        given = [at[i] if i in at else _again(x) for i, x in enumerate(self.inputs)]
        answer = self.layer(*given)
        parts = answer if isinstance(answer, tuple) else (answer,)
        if len(parts) != 2 or not (isinstance(parts[0], (np.ndarray, np.generic)) and callable(parts[1])):
            came = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"layer returns ({came}); expected (y, backward), a NumPy array and a function.")
        return answer

    def given_by(self, backward: Callable[..., Any], at: Arrays, dy: np.ndarray) -> Arrays:
        """The gradients that backward returns, and the parameters' as they are then."""
        returned, expected = backward(dy), [key for key in at if isinstance(key, int)]
        came = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        if len(came) != len(expected):
            each = "one for each input of floating numbers"
            raise AssertionError(f"backward returns {len(came)} gradients; expected {len(expected)}, {each}.")
        found = dict(zip(expected, came, strict=True)) | {n: p.grad for n, p in self.parameters.items()}
        for key, gradient in found.items():
            shape, dtype = at[key].shape, at[key].dtype
            if getattr(gradient, "shape", None) != shape or gradient.dtype != dtype:
                what = f"{gradient.dtype} {gradient.shape}" if hasattr(gradient, "shape") else repr(gradient)
                raise AssertionError(f"the gradient of {_name(key)} is {what}; expected {dtype} {shape}.")
            if not np.all(np.isfinite(gradient)):
                raise AssertionError(f"the gradient of {_name(key)} is not finite.")
        return found

    def check_gradients(self, tolerance: float) -> None:
        """They are the slopes of sum(y dy); on the way to them nothing is written to."""
        before = {key: array.copy() for key, array in self.at.items()}
        dy = self.dy.copy()
        y, backward = self.called(self.at)
        y = y.copy()
        found = self.given_by(backward, self.at, self.dy)
        self.gradients = {key: gradient.copy() for key, gradient in found.items()}
        self.allowed = tolerance * max(float(np.linalg.norm(g)) for g in found.values())
        written = [_name(key) for key in before if not np.array_equal(self.at[key], before[key])]
        written += [] if np.array_equal(self.dy, dy) else ["dy"]
        if written:
            raise AssertionError(f"{' and '.join(written)} is written to, which others may still need.")
        if not _close(y, self.called(self.at)[0], 1e-9 * float(np.linalg.norm(y))):
            raise AssertionError("y is another at a second call with the same inputs; expected the same.")
        for key in self.at:
            for _ in range(DIRECTIONS):
                self._check_slope(key, self.rng.standard_normal(self.at[key].shape))

    def _check_slope(self, key: Key, direction: np.ndarray) -> None:
        claimed = float(np.sum(self.gradients[key] * direction))
        error = abs(self.slope(key, direction, claimed) - claimed)
        if not error <= self.allowed:
            raise AssertionError(
                f"the gradient of {_name(key)} is off by {error:.3g} along a random direction; "
                f"{self.allowed:.1g} would pass.\n{self.what_it_is(key)}"
            )

    def slope(self, key: Key, direction: np.ndarray, claimed: float = math.inf) -> float:
        """How fast sum(y dy) changes as the array moves; without truncation, if that may be what differs."""

        def difference(step: float) -> float:
            ends = [self.called(self.at | {key: self.at[key] + s * direction})[0] for s in (step, -step)]
            return float(np.sum((ends[0] - ends[1]) * self.dy)) / (2 * step)

        coarse = difference(STEP)
        return coarse if abs(coarse - claimed) <= self.allowed else (4 * difference(STEP / 2) - coarse) / 3

    def what_it_is(self, key: Key) -> str:
        """What came in the gradient's place, as far as some of its numbers say."""
        gradient = self.gradients[key]
        some = self.rng.permutation(gradient.size)[:LOOKED_AT]
        came = gradient.reshape(-1)[some]
        right = np.array([self.slope(key, _unit(i, gradient.shape)) for i in some])

        def is_it(other: np.ndarray) -> bool:
            return _close(other, right, 1e-5 * float(np.linalg.norm(right)))

        if not np.any(came):
            return "It is 0." if isinstance(key, int) else "It is 0: backward adds nothing to its grad."
        if not np.any(right):
            return "Expected 0: y does not depend on it."
        factor = float(came @ right) / float(came @ came)
        if abs(factor - 1) > 1e-4 and is_it(factor * came):
            if math.isclose(factor, -1, rel_tol=1e-4):
                return "It is what comes of this: the sign."
            mean = self.dy.ndim > 0 and math.isclose(factor, self.dy.shape[0], rel_tol=1e-4)
            return (
                f"It is what comes of this: a factor of {1 / factor:.4g}"
                f"{', of a mean over the batch where there is a sum' if mean else ''}."
            )
        if gradient.T.shape == gradient.shape and is_it(gradient.T.reshape(-1)[some]):
            return "It is what comes of this: a transpose."
        for other, of_other in self.gradients.items():
            if other != key and of_other.shape == gradient.shape and is_it(of_other.reshape(-1)[some]):
                return f"It is the gradient of {_name(other)}."
        off = np.abs(came - right)
        worst = int(np.argmax(off))
        count = np.count_nonzero(off > self.allowed / math.sqrt(gradient.size))
        place = tuple(int(i) for i in np.unravel_index(some[worst], gradient.shape))
        said = f"{came[worst]:.6g}, expected {right[worst]:.6g}"
        return f"Of {len(some)} of its numbers {count} are off, most that at {place}: {said}."

    def check_promises(self) -> None:
        """A backward adds to what is there, and belongs to its own call."""
        _, backward = self.called(self.at)
        for p in self.parameters.values():
            p.grad = np.ones_like(p.value)
        for key, gradient in self.given_by(backward, self.at, self.dy).items():
            more = gradient - 1 if isinstance(key, str) else gradient
            if not _close(more, self.gradients[key], self.allowed + 1e-12 * gradient.size):
                raise AssertionError(f"the grad of {_name(key)} that is there is not added to (docs: B.25).")
        _, backward = self.called(self.at)
        self.called({key: array if isinstance(key, str) else 0.75 * array for key, array in self.at.items()})
        for key, gradient in self.given_by(backward, self.at, self.dy).items():
            if not _close(gradient, self.gradients[key], self.allowed):
                raise AssertionError(
                    f"the gradient of {_name(key)} is another if the layer is called again before backward. "
                    "What backward needs should be kept in backward, not on the layer."
                )

    def check_float32(self) -> None:
        """Of float32 comes float32."""
        at: Arrays = {key: array.astype(np.float32) for key, array in self.at.items()}
        y, backward = self.called(at)
        if y.dtype != np.float32:
            raise AssertionError(
                f"y is of {y.dtype} where inputs and parameters are of float32. A number of NumPy's, such as "
                "np.sqrt(2), makes float64 of float32; one of Python's, such as math.sqrt(2), does not."
            )
        self.given_by(backward, at, np.ones_like(y))


def _close(a: np.ndarray, b: np.ndarray, allowed: float) -> bool:
    return bool(np.linalg.norm(a - b) <= allowed)


def _unit(i: int, shape: tuple[int, ...]) -> np.ndarray:
    unit = np.zeros(shape)
    unit.flat[i] = 1.0
    return unit


def _is_floating(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "f"


def _again(x: Any) -> Any:
    """A generator as it was at first; all else as it is."""
    return copy.deepcopy(x) if isinstance(x, np.random.Generator) else x


def _name(key: Key) -> str:
    return f"input {key}" if isinstance(key, int) else f"parameter {key!r}"
