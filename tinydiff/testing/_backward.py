"""Whether a layer's backward is the derivative of its forward, and keeps what a backward promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from tinydiff._checks import check_seed, class_or_kind
from tinydiff.backend import to_numpy
from tinydiff.nn.module import Module, Parameter
from tinydiff.testing._asked import Function, check_tolerance

__all__ = ["assert_backward"]

# Of central differences, relative to what is moved: rounding, 1e-16 / STEP, and truncation, STEP**2, are both
# near 1e-11, the latter times the third derivative. Where this step is not enough, the others are tried:
# small ones where y is curved or near a kink or a pole, large ones for a small change of a large number.
STEP = 1e-5
STEPS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
DIRECTIONS = 2  # along which every array is moved: each that is not at right angles to an error shows it
LOOKED_AT = 200  # numbers of a wrong gradient
# How far parameters are moved, so that none is zero: the first of these at which y is finite.
SPREADS = (0.3, 0.03, 0.003, 3e-4)
SMALL = 1e-3  # of the largest: anything smaller counts as this much, or only rounding would be seen

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

    The gradients of the scalar sum(y dy), with a random dy, are compared with central differences in float64.
    Steps are in proportion to the numbers, which may be large, small, or of several scales. Inputs are
    copied. Parameters are moved by small random numbers, because those that are zero hide errors of the
    layers before them; afterwards they and their gradients are what they were.

    Parameters
    ----------
    layer : callable
        A layer, a network, or a function: returns an array y and its derivative, which takes the gradient of
        y, adds to the gradients of the parameters, and returns the gradient of the input, or a tuple of them
        if there are several inputs.
    *inputs
        What the layer is called with. Arrays of floating numbers have gradients. Everything else, times or
        classes say, is passed on; a `numpy.random.Generator` as a copy, so that each call draws the same.
        The layer is also called with every input reversed. A few hundred numbers will do. None should be at
        a kink, such as 0 for ReLU: a difference across it is no derivative.
    parameters : mapping, optional
        Name -> `tinydiff.nn.Parameter`. Default: those of the layer, if it is a `tinydiff.nn.Module` or a
        method of one; for a function around one, none.
    tolerance : float
        The largest error that passes, relative to the norm of the gradient, or to a thousandth of the largest
        gradient's if that is more. For this, each number of a gradient is multiplied by the number that it is
        the derivative by.
    seed : int
        Of dy, and of the directions of the differences.

    Raises
    ------
    AssertionError
        If a gradient is wrong, is missing, or has another shape or dtype than its array; if gradients are not
        added to those that are there, or are not linear in dy; if a call spoils the backward or the arrays of
        an earlier one; if inputs, parameters or dy are written to; if y is not the same at every call; if a
        `Module` makes float64 of float32. What is wrong with a gradient is said where it can be told: its
        sign, a factor, a transpose, a kink. Also if y is so rough that differences tell nothing.
    TypeError
        If the layer cannot be called or does not return an array and a function, or `parameters` is not as
        said above.
    ValueError
        If there is nothing to differentiate, or `tolerance` or `seed` is not as said above.
    """
    check_tolerance(tolerance)
    check_seed(seed)
    if isinstance(layer, type) or not callable(layer):
        raise TypeError(f"layer is {class_or_kind(layer)}; expected a function that returns y, backward.")
    owner = getattr(layer, "__self__", layer)  # of a method
    if parameters is None:
        parameters = owner.named_parameters() if isinstance(owner, Module) else {}
    parameters = _each_once(parameters)
    before = {name: (p.value, p.grad) for name, p in parameters.items()}
    try:
        # Not from `seed` alone: dy would be equal to inputs drawn from default_rng(seed), and hide errors.
        asked = _Asked(layer, inputs, parameters, np.random.default_rng((seed, 1)))
        asked.check_gradients(tolerance)
        asked.check_promises()
        if isinstance(owner, Module):
            asked.check_float32()
    finally:
        for name, (value, gradient) in before.items():
            parameters[name].value, parameters[name].grad = value, gradient


def _copied(x: Any) -> Any:
    return copy.deepcopy(x) if isinstance(x, (np.ndarray, np.random.Generator)) else x


def _again(x: Any) -> Any:
    """A generator as it was at first; all else as it is."""
    return _copied(x) if isinstance(x, np.random.Generator) else x


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
    scale : dict of arrays
        How far each number is moved at a step of 1: about as far as it is from 0, so that none leaves its
        domain and none is lost beside others.
    sizes : dict of float
        The norms of the gradients, each number times its scale.
    """

    def __init__(
        self,
        layer: Function,
        inputs: tuple[Any, ...],
        parameters: Mapping[str, Parameter],
        rng: np.random.Generator,
    ) -> None:
        self.layer, self.parameters, self.rng = layer, parameters, rng
        self.inputs = [_copied(x) for x in inputs]
        self.at: Arrays = {i: np.array(x, np.float64) for i, x in enumerate(inputs) if _is_floating(x)}
        if not self.at and not parameters:
            raise ValueError("no input is an array of floats and there is no parameter; expected one.")
        for key, x in self.at.items():
            if not np.all(np.isfinite(x)):
                raise ValueError(f"{_name(key)} is not finite; expected finite numbers.")
        values = {name: to_numpy(p.value).astype(np.float64) for name, p in parameters.items()}
        moves = {name: _move(value.shape, rng) for name, value in values.items()}
        for spread in SPREADS:
            self.at |= {name: np.asarray(values[name] + spread * moves[name]) for name in values}
            with np.errstate(all="ignore"):  # a parameter may have left its domain: then a smaller move
                y = self.called({key: array.copy() for key, array in self.at.items()}, _copied)[0]
            if np.all(np.isfinite(y)):
                break
        if y.dtype != np.float64:
            raise AssertionError(f"y is of {y.dtype} where inputs and parameters are of float64.")
        if not np.all(np.isfinite(y)):
            raise AssertionError("y is not finite.")
        if y.size == 0:
            raise ValueError(f"y is empty, of shape {y.shape}; expected numbers to differentiate.")
        self.dy = np.asarray(rng.standard_normal(y.shape))
        self.size_of_y = float(np.linalg.norm(y) * np.linalg.norm(self.dy))

    def called(
        self, at: Arrays, others: Callable[[Any], Any] = _again
    ) -> tuple[np.ndarray, Callable[..., Any]]:
        """y, and backward, at these arrays; the parameters' gradients are set to zero."""
        for name, p in self.parameters.items():
            p.value = at[name]
            p.zero_grad()
        given = [at[i] if i in at else others(x) for i, x in enumerate(self.inputs)]
        answer = self.layer(*given)
        parts = answer if isinstance(answer, tuple) else (answer,)
        if len(parts) != 2 or not (isinstance(parts[0], (np.ndarray, np.generic)) and callable(parts[1])):
            came = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"layer returns ({came}); expected (y, backward), a NumPy array and a function.")
        return answer

    def call_another(self, then_backward: bool = False) -> None:
        """Call the layer with other inputs, if it takes them: it may want sorted ones, say."""
        at = {key: a if isinstance(key, str) else _another(a) for key, a in self.at.items()}
        with suppress(ValueError):
            _, backward = self.called(at, _another)
            if then_backward:
                backward(self.dy)

    def given_by(self, backward: Callable[..., Any], at: Arrays, dy: np.ndarray, where: str = "") -> Arrays:
        """The gradients that backward returns, and the parameters' as they are then."""
        returned, expected = backward(dy), [key for key in at if isinstance(key, int)]
        if isinstance(returned, (list, Mapping)):
            expects = "an array, or of several a tuple"
            raise AssertionError(f"backward returns {class_or_kind(returned)}; expected {expects}.")
        came = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        if len(came) != len(expected):
            raise AssertionError(
                f"backward returns {len(came)} gradients; expected {len(expected)}, one for each input of "
                "floating numbers. Where some have none, times say, give a function of the others."
            )
        found = dict(zip(expected, came, strict=True)) | {n: p.grad for n, p in self.parameters.items()}
        for key, gradient in found.items():
            shape, dtype = at[key].shape, at[key].dtype
            if getattr(gradient, "shape", None) != shape or gradient.dtype != dtype:
                what = f"{gradient.dtype} {gradient.shape}" if hasattr(gradient, "shape") else repr(gradient)
                raise AssertionError(f"the gradient of {_name(key)} is {what}; expected {dtype} {shape}.")
            if not np.all(np.isfinite(gradient)):
                raise AssertionError(f"the gradient of {_name(key)} is not finite{where}.")
        return found

    def check_gradients(self, tolerance: float) -> None:
        """Check that the gradients are the slopes of sum(y dy), and that nothing is written to on the way."""
        others = {i: x for i, x in enumerate(self.inputs) if isinstance(x, np.ndarray)}
        arrays = {_name(key): x for key, x in (others | self.at).items()} | {"dy": self.dy}
        before = {name: array.copy() for name, array in arrays.items()}
        y, backward = self.called(self.at)
        first = y.copy()
        found = self.given_by(backward, self.at, self.dy)
        self.gradients = {key: gradient.copy() for key, gradient in found.items()}
        self.scale = {key: _scale(array) for key, array in self.at.items()}
        self.sizes = {key: float(np.linalg.norm(g * self.scale[key])) for key, g in self.gradients.items()}
        self.tolerance, self.largest = tolerance, max(self.sizes.values())
        written = [name for name, array in arrays.items() if not np.array_equal(array, before[name])]
        if written:
            raise AssertionError(f"{' and '.join(written)} is written to, which others may still need.")
        second = self.called(self.at)[0].copy()
        if not _close(first, second, 1e-9 * float(np.linalg.norm(first))):
            raise AssertionError("y is another at a second call with the same inputs; expected the same.")
        self.call_another(then_backward=True)
        results = {"y": (y, first)}
        results |= {f"the gradient of {_name(k)}": (g, self.gradients[k]) for k, g in found.items()}
        for what, (now, then) in results.items():
            if not np.array_equal(now, then):
                raise AssertionError(f"{what} is written to by a later call; expected one for each call.")
        for key in self.at:
            for _ in range(DIRECTIONS):
                self._check_slope(key, self.scale[key] * self.rng.standard_normal(self.at[key].shape))

    def _check_slope(self, key: Key, direction: np.ndarray) -> None:
        claimed, allowed = float(np.sum(self.gradients[key] * direction)), self.allowed(key)
        if abs(self._difference(key, direction, STEP) - claimed) <= allowed:
            return
        slopes: list[float] = []
        for step in STEPS:
            slopes.append(self.slope(key, direction, step))
            if abs(slopes[-1] - claimed) <= allowed:
                return
        # The three neighbours that agree best say what the slope is, and how sure that is.
        apart = np.ptp(np.lib.stride_tricks.sliding_window_view(slopes, 3), axis=1)
        apart += 1e-16 * self.size_of_y / np.array(STEPS[1:-1])
        best = int(np.argmin(np.where(np.isfinite(apart), apart, np.inf)))
        unsure, error = float(apart[best]), abs(slopes[best + 1] - claimed)
        if error <= allowed + 10 * unsure:
            # Where only rounding differs, nothing could be found wrong.
            if unsure <= max(self.tolerance * self.largest, 1e-9 * self.size_of_y):
                return
            raise AssertionError(
                f"the gradient of {_name(key)} cannot be told from differences: those of different steps do "
                "not agree. Is y rounded to float32 on the way, is it a small change of a large number, or "
                "is there a kink?"
            )
        raise AssertionError(
            f"the gradient of {_name(key)} is off by {error:.3g} along a random direction; "
            f"{allowed:.1g} would pass.\n{self.what_it_is(key, STEPS[best + 1])}"
        )

    def _difference(self, key: Key, direction: np.ndarray, step: float) -> float:
        plus, minus = (self._moved(key, s * direction) for s in (step, -step))
        return float(np.sum((plus - minus) * self.dy)) / (2 * step)

    def _moved(self, key: Key, by: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # a step may leave the domain: then a smaller one is believed
            return self.called(self.at | {key: np.asarray(self.at[key] + by)})[0]

    def slope(self, key: Key, direction: np.ndarray, step: float) -> float:
        """How fast sum(y dy) changes as the array moves; without truncation (Richardson's extrapolation)."""
        coarse, fine = (self._difference(key, direction, s) for s in (step, step / 2))
        return (4 * fine - coarse) / 3

    def allowed(self, key: Key) -> float:
        """How far a gradient may be off."""
        return self.tolerance * max(self.sizes[key], SMALL * self.largest)

    def what_it_is(self, key: Key, step: float) -> str:
        """What came in the gradient's place, as far as some of its numbers say."""
        gradient = self.gradients[key]
        some = self.rng.permutation(gradient.size)[:LOOKED_AT]
        came = gradient.reshape(-1)[some]
        scale = self.scale[key].reshape(-1)[some]
        units = [_unit(i, gradient.shape, size) for i, size in zip(some, scale, strict=True)]
        right = np.array([self.slope(key, unit, step) for unit in units]) / scale

        def is_it(other: np.ndarray) -> bool:
            return _close(other * scale, right * scale, 1e-5 * float(np.linalg.norm(right * scale)))

        if not np.any(came):
            return "It is 0." if isinstance(key, int) else "It is 0: backward adds nothing to its grad."
        if not np.any(right):
            return "Expected 0: y does not depend on it."
        factor = float((came * scale) @ (right * scale)) / float((came * scale) @ (came * scale))
        if abs(factor - 1) > 1e-4 and is_it(factor * came):
            if math.isclose(factor, -1, rel_tol=1e-4):
                return "It is what comes of this: the sign."
            mean = self.dy.ndim > 0 and math.isclose(factor, self.dy.shape[0], rel_tol=1e-4)
            return (
                f"It is what comes of this: a factor of {1 / factor:.4g}"
                f"{', as of a mean over the batch where there is a sum' if mean else ''}."
            )
        if not is_it(came):  # a vector is its own transpose: a nearly right one would be called that
            if gradient.T.shape == gradient.shape and is_it(gradient.T.reshape(-1)[some]):
                return "It is what comes of this: a transpose."
            for other, of_other in self.gradients.items():
                if other != key and of_other.shape == gradient.shape and is_it(of_other.reshape(-1)[some]):
                    return f"It is the gradient of {_name(other)}."
        off = np.abs(came - right) * scale
        worst = int(np.argmax(off))
        count = np.count_nonzero(off > self.allowed(key) / math.sqrt(gradient.size))
        if not count:
            return f"It is not in {len(some)} of its {gradient.size} numbers: few are off, or all by little."
        place = tuple(int(i) for i in np.unravel_index(some[worst], gradient.shape))
        kink = self._kink(key, units[worst], came[worst])
        said = f"{came[worst]:.6g}, expected {right[worst]:.6g}"
        return f"Of {len(some)} of its numbers {count} are off, most that at {place}: {said}.{kink}"

    def _kink(self, key: Key, unit: np.ndarray, came: float) -> str:
        """Says that a number is at a kink, if what came is between different slopes on its two sides."""
        here, size = self._moved(key, 0 * unit), float(np.max(unit))
        ends = [(s * size, self._moved(key, s * unit)) for s in (-STEP, STEP)]
        left, right = (float(np.sum((end - here) * self.dy)) / s for s, end in ends)
        apart = abs(right - left)
        between = abs(came - left) + abs(came - right) < 1.01 * apart
        if not (between and apart > 1e-2 * max(abs(left), abs(right))):
            return ""
        return f" There is a kink: the slopes to both sides are {left:.3g} and {right:.3g}."

    def check_promises(self) -> None:
        """Check that a backward adds to what is there, is linear, and belongs to its own call."""
        _, backward = self.called(self.at)
        for p in self.parameters.values():
            p.grad = np.ones_like(p.value)
        for key, gradient in self.given_by(backward, self.at, self.dy).items():
            more = gradient - 1 if isinstance(key, str) else gradient
            if not self._as_before(key, more, 1e-12 * float(np.sum(self.scale[key]))):
                raise AssertionError(f"the grad of {_name(key)} that is there is not added to (docs: B.25).")
        for factor in (2.0**-20, 2.0**20):  # by a power of two, so that nothing is rounded
            _, backward = self.called(self.at)
            for key, gradient in self.given_by(backward, self.at, np.asarray(factor * self.dy)).items():
                if not self._as_before(key, gradient / factor):
                    raise AssertionError(
                        f"the gradient of {_name(key)} is not {factor:.3g} times as large for a dy that is; "
                        "expected a backward that is linear in dy (docs: B.24)."
                    )
        _, backward = self.called(self.at)
        self.call_another()
        for key, gradient in self.given_by(backward, self.at, self.dy).items():
            if not self._as_before(key, gradient):
                raise AssertionError(
                    f"the gradient of {_name(key)} is another if the layer is called again before backward. "
                    "What backward needs should be kept in backward, not on the layer."
                )

    def _as_before(self, key: Key, gradient: np.ndarray, more: float = 0.0) -> bool:
        scale = self.scale[key]
        return _close(gradient * scale, self.gradients[key] * scale, self.allowed(key) + more)

    def check_float32(self) -> None:
        """Check that float32 gives float32."""
        at: Arrays = {key: array.astype(np.float32) for key, array in self.at.items()}
        y, backward = self.called(at)
        if y.dtype != np.float32:
            raise AssertionError(
                f"y is of {y.dtype} where inputs and parameters are of float32. A number of NumPy's, such as "
                "np.sqrt(2), or an array, such as np.ones(3), makes float64 of float32; one of Python's, "
                "such as math.sqrt(2), does not."
            )
        self.given_by(backward, at, np.ones_like(y), " in float32")


def _close(a: np.ndarray, b: np.ndarray, allowed: float) -> bool:
    return bool(np.linalg.norm(a - b) <= allowed)


def _move(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """By how much a parameter is moved: a matrix by so much that its products change by about 1."""
    fan_in = math.prod(shape[:-1]) if len(shape) > 1 else 1
    return np.asarray(rng.standard_normal(shape)) / math.sqrt(fan_in)


def _each_once(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Shared ones under their first name only, as `Module` has them; TypeError if one is no parameter."""
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters is {class_or_kind(parameters)}; expected a mapping of names.")
    unique: dict[int, tuple[str, Parameter]] = {}
    for name, p in parameters.items():
        if not isinstance(p, Parameter):
            raise TypeError(f"parameters[{name!r}] is {class_or_kind(p)}; expected a tinydiff.nn.Parameter.")
        unique.setdefault(id(p), (name, p))
    return dict(unique.values())


def _scale(array: np.ndarray) -> np.ndarray:
    """The size of each number; for one that is very small beside the others, a thousandth of theirs."""
    usual = float(np.linalg.norm(array)) / math.sqrt(max(array.size, 1))
    return np.maximum(np.abs(array), SMALL * usual or 1.0)


def _unit(i: int, shape: tuple[int, ...], size: float) -> np.ndarray:
    unit = np.zeros(shape)
    unit.flat[i] = size
    return unit


def _is_floating(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "f"


def _another(x: Any) -> Any:
    """Another input that a layer will take: an array reversed, a generator that has been used."""
    if isinstance(x, np.random.Generator):
        x = _again(x)
        x.random(7)
    elif isinstance(x, np.ndarray):
        other = np.flip(x).copy()
        return np.asarray(0.75 * x) if _is_floating(x) and np.array_equal(other, x) else other
    return x


def _name(key: Key) -> str:
    return f"input {key}" if isinstance(key, int) else f"parameter {key!r}"
