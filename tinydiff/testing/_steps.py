"""Whether what is kept from step to step is, after each of them, what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tinydiff.testing._judge import named, single

__all__ = ["judge_steps", "rows"]


def rows(shape: tuple[int, ...]) -> str:
    """Which shape is expected."""
    return f"{shape}, a row after each step"


def judge_steps(
    name: str,
    came: np.ndarray,
    right: np.ndarray,
    start: np.ndarray,
    mistakes: Callable[[], Mapping[str, np.ndarray]],
    tolerance: float,
    expected: str,
    further: Mapping[str, float] | None = None,
) -> None:
    """AssertionError unless `came` (K, n) is `right`, as a part of the furthest that each number should move.

    Parameters
    ----------
    name, expected : str
        What to call it, and the formula, with its identifier.
    came, right : array of shape (K, n)
        After each step.
    start : array of shape (n,)
        Before the first.
    mistakes : callable
        Returns what it is with each mistake, arrays (K, n); called only if it is not right.
    tolerance : float
        The largest difference that passes.
    further : mapping of floats, optional
        How far it is from mistakes that are told in another way.
    """
    moves = np.max(np.abs(right - start), axis=0)

    def apart(other: np.ndarray) -> np.ndarray:
        """How far it is from another, after each step."""
        with np.errstate(all="ignore"):
            off = np.abs(came - other) / moves
        return np.max(np.where(np.isnan(off), np.inf, off), axis=1)

    off = apart(right)
    if np.max(off) <= tolerance:
        return
    with np.errstate(all="ignore"):
        others = dict(mistakes())
    others["each row is the last: it was kept without a copy"] = np.repeat(right[-1:], len(right), axis=0)
    distances = {what: float(np.max(apart(other))) for what, other in others.items()}
    distances |= dict(further or {})
    worst = float(np.max(off))
    unknown = (
        " In float32 what is right can be off by as much: give tolerance=1e-3." if single(worst, came) else ""
    )
    raise AssertionError(
        f"{name} is off by {worst:.3g} of the furthest that it should have moved; by more than "
        f"{tolerance:.3g} after {np.count_nonzero(off > tolerance)} of {len(off)} steps, first after step "
        f"{np.argmax(off > tolerance) + 1}. Expected {expected}.\n"
        f"{named(distances, worst, tolerance, unknown)}"
    )
