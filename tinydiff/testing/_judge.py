"""Whether a function gives what it should, at every t; and if not, which known mistake gives what came.

Yours, ours, and ours with each mistake planted are functions of the same arguments, and are called with the
same batches. Yours is wrong if it is at some distance from ours; its mistake is the planted one at no
distance from it. A mistake is named only if it gives every number of every sample, to a thousandth at worst
(float32).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff.backend import column_like
from tinydiff.testing._asked import Function, called, check_tolerance, on_host

__all__ = ["FLOAT32", "Claim", "distance", "linear", "moved_in_time", "named", "single"]

FLOAT32 = (
    " In float32 what is right can be off by as much, at the first t above all (E.6): compare in float64, or "
    "with a larger tolerance."
)


@dataclass(frozen=True)
class Claim:
    """What a function should give, and what it gives with each mistake that is known.

    Attributes
    ----------
    name, arguments, expected : str
        What to call the function, what it takes, and the formula, with its identifier.
    ours : callable
        The right function, of NumPy arrays; returns an array, or a tuple of arrays.
    mistakes : dict of callables
        Functions like `ours`, each with one mistake, by the mistake's description.
    results : tuple of str
        The name of each array, where there are several.
    free_at_0 : tuple of str
        Those of `results` that are not compared at t = 0.
    rounding : float
        The error that float32 may leave where the right number is nearly 0.
    shown : callable, optional
        Turns the arguments of `ours` into those that the function is given.
    """

    name: str
    arguments: str
    expected: str
    ours: Function
    mistakes: dict[str, Function]
    results: tuple[str, ...] = ("",)
    free_at_0: tuple[str, ...] = ()
    rounding: float = 0.0
    shown: Function = lambda *given: given

    def judge(
        self,
        yours: Function,
        batches: Sequence[tuple[np.ndarray, ...]],
        asarray: Function,
        tolerance: float,
        further: Sequence[tuple[np.ndarray, ...]] = (),
    ) -> None:
        """AssertionError unless `yours` gives what `ours` does.

        Parameters
        ----------
        yours : callable
            Of arrays as `asarray` makes them; returns an array, or a tuple in the order of `ours`. One number
            for each sample may come as (N,), (N, 1, ..., 1), or in the shape of the data.
        batches : sequence of tuples of arrays
            The arguments of each call; that of integers is t.
        asarray : callable
            From a NumPy array to what `yours` takes.
        tolerance : float
            The largest difference that passes, relative to the largest number of its sample.
        further : sequence of tuples of arrays
            Batches that are compared too; the message speaks of them only if all of `batches` pass.

        Raises
        ------
        ValueError
            If `tolerance` is not a positive number.
        """
        found = self.refusal(yours, batches, asarray, tolerance, further)
        if found is not None:
            raise AssertionError(found[1])

    def refusal(
        self,
        yours: Function,
        batches: Sequence[tuple[np.ndarray, ...]],
        asarray: Function,
        tolerance: float,
        further: Sequence[tuple[np.ndarray, ...]] = (),
    ) -> tuple[float, str] | None:
        """How far off `yours` is on average, and `judge`'s message; None if it gives what `ours` does."""
        check_tolerance(tolerance)
        every = [*batches, *further]
        t = np.concatenate([x for batch in every for x in batch if x.dtype.kind == "i"])
        answers = [_parts(self.ours(*batch)) for batch in every]
        written: set[str] = set()
        came = _end_to_end(
            self._asked(yours, *pair, asarray, written) for pair in zip(every, answers, strict=True)
        )
        right = _end_to_end(answers)
        into = f"writes into {' and '.join(sorted(written))}, which others may still need"
        wrong = self._apart(t, came, right, right)
        if np.max(wrong) <= tolerance:
            if not written:
                return None
            return 0.0, f"{self.name} returns what it should, but {into}: expected to leave what it is given."
        distances = self._distances(every, t, came, right)
        asked_first = sum(len(batch[0]) for batch in batches)
        if np.max(wrong[:, :asked_first]) > tolerance:
            t, wrong = t[:asked_first], wrong[:, :asked_first]
        k = int(np.argmax(np.max(wrong, axis=1)))
        worst = float(np.max(wrong[k]))
        size = f"off by {worst:.3g} of its largest number" if np.isfinite(worst) else "not finite"
        unknown = FLOAT32 if self._rounded(t, wrong[k], came[k], right[k], tolerance) else ""
        return float(np.mean(np.minimum(wrong[k], 1.0))), (
            f"{self._called(k)} is {size} at t = {t[np.argmax(wrong[k])]}; off by more than "
            f"{tolerance:.3g} at {_where(t, wrong[k] > tolerance)}. Expected {self.expected}."
            f"{f' It {into}.' if written else ''}\n{named(distances, worst, tolerance, unknown)}"
        )

    def _apart(
        self, t: np.ndarray, came: list[np.ndarray], other: list[np.ndarray], right: list[np.ndarray]
    ) -> np.ndarray:
        """How far `came` is from `other`, for each result and sample; 0 where it is not compared."""
        compared = [(t > 0) | (name not in self.free_at_0) for name in self.results]
        each = zip(compared, came, other, right, strict=True)
        return np.stack([np.where(keep, distance(*arrays), 0.0) for keep, *arrays in each])

    def _distances(
        self,
        batches: Sequence[tuple[np.ndarray, ...]],
        t: np.ndarray,
        came: list[np.ndarray],
        right: list[np.ndarray],
    ) -> dict[str, float]:
        """How far `came` is from what each mistake gives."""
        if not any(np.any(np.isfinite(part)) for part in came):  # it would agree with whatever is not finite
            return dict.fromkeys(self.mistakes, np.inf)
        distances = {}
        for what, mistake in self.mistakes.items():
            with np.errstate(all="ignore"):
                given = _end_to_end(_parts(mistake(*batch)) for batch in batches)
            distances[what] = float(np.max(self._apart(t, came, given, right)))
        return distances

    def _rounded(
        self, t: np.ndarray, wrong: np.ndarray, came: np.ndarray, right: np.ndarray, tolerance: float
    ) -> bool:
        """Whether the error may be float32's rounding: small, or larger but at the first t; and at few t."""
        with np.errstate(all="ignore"):
            apart = _largest(came[: len(t)] - right[: len(t)])
        wrong = np.where(apart <= self.rounding, 0.0, wrong)
        few = 2 * len(np.unique(t[wrong > tolerance])) < len(np.unique(t))
        worst, first = float(np.max(wrong)), t[np.argmax(wrong)] < np.max(t) / 10
        return few and (worst < 2e-3 or (first and (worst < 1e-2 or single(worst, came))))

    def _called(self, k: int) -> str:
        return f"the {self.results[k]} of {self.name}" if len(self.results) > 1 else self.name

    def _asked(
        self,
        yours: Function,
        batch: tuple[np.ndarray, ...],
        right: tuple[np.ndarray, ...],
        asarray: Function,
        written: set[str],
    ) -> list[np.ndarray]:
        """What yours returns for a batch, each array checked to have the shape of ours.

        The arguments that it writes into are added to `written`, except a network's output, which is its own.
        """
        shown = [asarray(x.copy()) for x in self.shown(*batch)]  # a copy: yours may write into it
        to_keep = [name for name in self.arguments.split(", ") if name not in ("network", "output")]
        before = [on_host(name, x) for name, x in zip(to_keep, shown, strict=False)]
        result = called(yours, f"{self.name}({self.arguments})", *shown)
        several = isinstance(result, list) and len(right) > 1
        parts = tuple(result) if several else _parts(result)
        if len(parts) != len(right):
            names = f", {' and '.join(self.results)}" if len(right) > 1 else ""
            raise AssertionError(f"{self.name} returned {len(parts)} arrays; expected {len(right)}{names}.")
        for name, was, x in zip(to_keep, before, shown, strict=False):
            if not np.array_equal(was, on_host(name, x)):
                written.add(name)
        N, fitted = len(batch[0]), []
        for k, (expected, part) in enumerate(zip(right, parts, strict=True)):
            part = on_host(self._called(k), part)
            shapes = [expected.shape]
            if expected.ndim > 1 and expected.size == N:  # one number for each sample
                shapes += [(N,), batch[0].shape]
            if part.shape not in shapes:
                raise AssertionError(f"{self._called(k)} has shape {part.shape}; expected {expected.shape}.")
            fitted.append(part.reshape(expected.shape) if part.ndim == 1 < expected.ndim else part)
        return fitted


def single(worst: float, result: np.ndarray) -> bool:
    """Whether a result has less than float64's precision, and is off by no more than rounding may explain."""
    return worst < 0.05 and result.dtype.kind == "f" and result.dtype.itemsize < 8


def named(distances: dict[str, float], worst: float, tolerance: float, unknown: str = "") -> str:
    """A sentence that names the mistakes at no distance from yours, or says that there is none."""
    near = max(tolerance, min(1e-3, worst / 20))
    found = sorted((far, what) for what, far in distances.items() if far <= near)
    if not found:
        return f"None of the {len(distances)} mistakes known here gives it, each alone.{unknown}"
    same = [what for far, what in found if far <= max(2 * found[0][0], 1e-9)]
    return f"It is what comes of this: {'; or of this: '.join(same)}."


def linear(of_first: Any, of_second: Any) -> Function:
    """(first, t, second) -> of_first[t] first + of_second[t] second."""
    return lambda first, t, second: (
        column_like(of_first[t], first) * first + column_like(of_second[t], first) * second
    )


def moved_in_time(ours: Function, T: int) -> dict[str, Function]:
    """Ours at a wrong t."""

    def shown(times: np.ndarray) -> Function:
        return lambda *given: ours(*(times[x] if x.dtype.kind == "i" else x for x in given))

    every = np.arange(T)
    return {
        "t - 1 in the place of t": shown(np.maximum(every - 1, 0)),
        "t - 1 in the place of t, and T - 1 in that of 0": shown(np.roll(every, 1)),
        "t + 1 in the place of t (E.13)": shown(np.minimum(every + 1, T - 1)),
    }


def distance(yours: np.ndarray, other: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each sample the largest difference of `yours` and `other`, relative to `other`'s largest number.

    If that number is below a millionth of `right`'s largest, it is rounding, and the millionth replaces it.
    Where neither is finite they agree: 1 / 0 gives inf or nan, depending on the order of the factors.
    """
    agree = (yours == other) | ~(np.isfinite(yours) | np.isfinite(other))
    with np.errstate(all="ignore"):
        difference = np.where(agree, 0.0, np.abs(yours - other))
        sizes = np.maximum(_largest(np.where(np.isfinite(other), other, 0.0)), 1e-6 * _largest(right))
        return _largest(np.where(np.isnan(difference), np.inf, difference)) / np.where(sizes > 0, sizes, 1.0)


def _largest(array: np.ndarray) -> np.ndarray:
    """For each sample the largest absolute value."""
    return np.max(np.abs(array), axis=tuple(range(1, array.ndim)))


def _where(t: np.ndarray, wrong: np.ndarray) -> str:
    """At how many of the times something is wrong, and which."""
    at, T = np.unique(t[wrong]), len(np.unique(t))
    if len(at) == T:
        return f"all {T} t"
    return "no other t" if len(at) == 1 else f"{len(at)} of {T} t, between {at[0]} and {at[-1]}"


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _end_to_end(batches: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Each of the results, over all batches."""
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]
