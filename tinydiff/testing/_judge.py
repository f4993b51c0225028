"""Whether a function gives what it should, at every t; and if not, which known mistake gives what came.

Yours, ours, and ours with each mistake planted are functions of the same arguments, and are asked the same
batches. That yours is wrong is its distance from ours; what is wrong with it is the mistake from which it has
none. So a mistake is named only where every number is the one that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tinydiff.backend import to_numpy

__all__ = [
    "SHAPE",
    "Claim",
    "Function",
    "Given",
    "check_shape",
    "check_tolerance",
    "moved_in_time",
    "named",
    "on_host",
    "times",
]

Function: TypeAlias = Callable[..., Any]
Given: TypeAlias = dict[str, np.ndarray]

# As many samples as a row has pixels: numbers (N,) that were not made a column then spread along the row
# without a word, and are seen.
SHAPE = (8, 3, 4, 8)

# A mistake is named if yours is this much nearer to it than to what is right: either may be in float32.
NEARER = 20.0

UNKNOWN = "None of the {} mistakes known here gives it, each alone."
FLOAT32 = " Right tables in float32 can be off by as much at the first t (E.6): compare in float64."


@dataclass(frozen=True)
class Claim:
    """What a function should give, and what it gives with each mistake that is known.

    Attributes
    ----------
    name, expected : str
        What to call the function; the formula, with its identifier.
    ours : callable
        Of NumPy arrays; returns arrays by name. Where one is NaN nothing is expected.
    mistakes : dict of callables
        By what each does wrong, the same as `ours`.
    """

    name: str
    expected: str
    ours: Function
    mistakes: dict[str, Function]

    def judge(
        self, yours: Function, batches: Sequence[tuple[np.ndarray, ...]], asarray: Function, tolerance: float
    ) -> None:
        """AssertionError unless `yours` gives what `ours` does.

        Parameters
        ----------
        yours : callable
            Of arrays as `asarray` makes them; returns an array, or a tuple in the order of `ours`. What has
            one number for each sample may come as (N,), (N, 1, ..., 1), or of the shape of the data.
        batches : sequence of tuples of arrays
            The arguments of each call; the one of integers is t.
        asarray : callable
            From a NumPy array to what `yours` takes.
        tolerance : float
            The largest difference that is none, as a part of the largest right number of its sample.
        """
        check_tolerance(tolerance)
        ours = [self.ours(*batch) for batch in batches]
        came = _gathered(
            self._fitted(yours(*(asarray(x.copy()) for x in batch)), right, len(batch[0]))  # yours may write
            for batch, right in zip(batches, ours, strict=True)
        )
        right = _gathered(ours)
        wrong = {key: _distances(came[key], right[key], right[key]) for key in right}
        worst_of = {key: float(np.max(wrong[key])) for key in wrong}
        key = max(worst_of, key=worst_of.__getitem__)
        worst = worst_of[key]
        if worst <= tolerance:
            return
        t = np.concatenate(
            [argument for batch in batches for argument in batch if argument.dtype.kind == "i"]
        )
        worst_t, where, T = t[np.argmax(wrong[key])], np.unique(t[wrong[key] > tolerance]), len(np.unique(t))
        at = f"all {T} t" if len(where) == T else f"{len(where)} of {T} t, {where[0]} to {where[-1]}"
        distances = {}
        for what, mistake in self.mistakes.items():
            with np.errstate(all="ignore"):
                given = _gathered(mistake(*batch) for batch in batches)
            distances[what] = max(float(np.max(_distances(came[k], given[k], right[k]))) for k in right)
        raise AssertionError(
            f"{self._called(key)} is off by {worst:.3g} of its largest number at t = {worst_t}, and by more "
            f"than {tolerance:.3g} at {at}. Expected {self.expected}.\n{named(distances, worst)}"
            + (FLOAT32 if worst < 1e-3 and worst_t < T / 10 else "")
        )

    def _called(self, key: str) -> str:
        return self.name if key == "" else f"the {key} of {self.name}"

    def _fitted(self, result: Any, right: Given, N: int) -> Given:
        """A batch of yours by the names of ours, each checked to have its shape."""
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if len(parts) != len(right):
            raise AssertionError(f"{self.name} returned {len(parts)} arrays; expected {len(right)}.")
        fitted = {}
        for (key, expected), part in zip(right.items(), parts, strict=True):
            part = on_host(self._called(key), part)
            column = expected.ndim > 1 and expected.size == N
            if column and part.shape == (N,):
                part = part.reshape(expected.shape)
            if part.shape != expected.shape and not (
                column and part.shape[:1] == (N,) and part.ndim == expected.ndim
            ):
                raise AssertionError(
                    f"{self._called(key)} has shape {part.shape}; expected {expected.shape}."
                )
            fitted[key] = part
        return fitted


def named(distances: dict[str, float], worst: float) -> str:
    """A sentence that names the mistakes from which yours has no distance, or says that there is none."""
    nearest = min(distances.values())
    if not nearest < worst / NEARER:
        return UNKNOWN.format(len(distances))
    found = [
        what for what, distance in distances.items() if distance <= max(2 * nearest, 1e-9 * min(worst, 1.0))
    ]
    return f"It is what comes of this: {'; or of this: '.join(found)}."


def times(T: int, N: int, rng: np.random.Generator) -> np.ndarray:
    """All of 0 … T-1 in mixed order, as batches (., N), and some of them again to fill the last one."""
    return rng.permutation(np.resize(np.arange(T), -(-T // N) * N)).reshape(-1, N)


def moved_in_time(ours: Function, T: int) -> dict[str, Function]:
    """Ours at the wrong t: a step early, and a step late."""

    def moved(by: int) -> Function:
        return lambda *given: ours(*(np.clip(x + by, 0, T - 1) if x.dtype.kind == "i" else x for x in given))

    return {"t a step early, t - 1": moved(-1), "t a step late, t + 1 (E.13)": moved(1)}


def on_host(name: str, array: Any) -> np.ndarray:
    """`array`, of whatever library, as NumPy's and without the graph of its gradients."""
    for leave in ("detach", "cpu"):  # PyTorch's
        if hasattr(array, leave):
            array = getattr(array, leave)()
    array = to_numpy(array)
    if array.dtype.kind not in "fiu":
        raise AssertionError(f"{name} has dtype {array.dtype}; expected real numbers.")
    return array


def check_tolerance(tolerance: Any) -> None:
    """ValueError unless `tolerance` is a positive number."""
    if not (isinstance(tolerance, (int, float)) and 0 < tolerance < np.inf):
        raise ValueError(f"tolerance is {tolerance!r}; expected a positive number.")


def check_shape(shape: Any) -> None:
    """ValueError unless `shape` is that of a batch of data."""
    sizes = shape if isinstance(shape, tuple) else ()
    if len(sizes) < 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in sizes):
        raise ValueError(f"shape is {shape!r}; expected (N, ...), two integers of at least 1 or more.")


def _gathered(parts: Iterable[Given]) -> Given:
    """The batches' arrays, end to end."""
    batches = list(parts)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def _distances(yours: np.ndarray, other: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each sample the largest difference of `yours` and `other`, as a part of its largest right number."""
    same = np.isnan(right) | (yours == other) | (np.isnan(yours) & np.isnan(other))
    with np.errstate(all="ignore"):
        difference = np.where(same, 0.0, np.abs(yours - other))
    difference = np.where(np.isnan(difference), np.inf, difference)
    largest = np.max(np.abs(np.nan_to_num(right)), axis=tuple(range(1, right.ndim)))
    return np.max(difference, axis=tuple(range(1, difference.ndim))) / np.where(largest > 0, largest, 1.0)
