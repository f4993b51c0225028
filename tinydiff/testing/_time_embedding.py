"""Whether sinusoids of the time are those of the convention that a network was trained with."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np

from tinydiff._checks import check_choice, check_counts, check_number
from tinydiff.nn import sinusoidal_embedding
from tinydiff.testing._asked import Function, answer_of, check_tolerance, in_bfloat16, times
from tinydiff.testing._judge import Claim, distance, moved_in_time

__all__ = ["assert_time_embedding"]

N = 8  # times in a batch


def assert_time_embedding(
    time_embedding: Function,
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
    T: int = 1000,
    asarray: Function = np.asarray,
    tolerance: float = 1e-3,
) -> None:
    """Raise unless ``time_embedding(t)`` are the sinusoids of t, at every t (docs: B.5).

    Parameters
    ----------
    time_embedding : callable
        Takes t (N,), 0 … T-1, and returns (N, dim). For code that is told t / T, ``lambda t: yours(t / T)``.
    dim : int
        Length of an embedding, at least 4.
    flip_sin_to_cos, freq_shift, max_period
        The convention, as in `nn.sinusoidal_embedding`. By default that of diffusers' `UNet2DModel`; False
        and 1 are Ho et al.'s. If yours has the two by turns, return its even columns, and then its odd ones.
    T : int
        How many times there are.
    asarray : callable
        As in `assert_q_sample`.
    tolerance : float
        The largest difference that passes, relative to the largest number of an embedding. The default passes
        angles in float32, which are off by 6e-5 at t = 1000 (A.15), and not those in half precision.

    Raises
    ------
    AssertionError
        If it is something else, as in `assert_q_sample`, or depends on a sample's place in its batch. The
        message says which other convention it is, or which mistake, or both, if they are known here.
    ValueError
        If `dim`, `flip_sin_to_cos`, `freq_shift`, `max_period`, `T` or `tolerance` is not as said above.
    """
    check_counts(dim=dim, T=T)
    check_tolerance(tolerance)
    half = dim // 2
    check_number("dim", dim, lambda dim: dim >= 4, "at least 4, for two frequencies")
    check_choice("flip_sin_to_cos", flip_sin_to_cos, (True, False))
    check_number(
        "freq_shift",
        freq_shift,
        lambda shift: -math.inf < shift < half,
        f"a number less than dim / 2, {half}",
    )
    check_number("max_period", max_period, lambda period: 0 < period < math.inf, "a positive number")
    _check_places(time_embedding, dim, T, asarray, tolerance)
    convention = dict(flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift, max_period=max_period)

    def ours(t: np.ndarray) -> np.ndarray:
        return sinusoidal_embedding(t, dim, like=np.empty(0), **convention)  # type: ignore[arg-type]

    expected = (
        f"{'[cos, sin]' if flip_sin_to_cos else '[sin, cos]'} of t max_period^(-k / (dim / 2 - freq_shift)), "
        f"freq_shift {freq_shift:g} (docs: B.5)"
    )
    order = cosines_first if flip_sin_to_cos else sines_first
    mistakes = _mistakes(ours, dim, order, freq_shift, max_period, T)
    batches = [(t,) for t in times(T, N, np.random.default_rng(0))]
    Claim("time_embedding", "t", expected, ours, mistakes).judge(time_embedding, batches, asarray, tolerance)


def _check_places(yours: Function, dim: int, T: int, asarray: Function, tolerance: float) -> None:
    """AssertionError if a batch the other way round gives something else."""
    t = np.linspace(0, T - 1, N).astype(np.int64)
    there, back = (
        answer_of(yours, "time_embedding(t)", {"t": shown}, asarray, (N, dim)) for shown in (t, t[::-1])
    )
    if np.max(distance(there, back[::-1], there)) > tolerance:
        raise AssertionError(
            f"time_embedding gives something else for t = {t} than for the same from the last to the first; "
            "expected that a sample's place does not count, as it does where sines are in every second row "
            "of a batch, and not in every second column (E.32), or where one t is taken for all."
        )


def _mistakes(
    ours: Function, dim: int, right: Function, freq_shift: float, max_period: float, T: int
) -> dict[str, Function]:
    """Embeddings that are mistaken for `ours`, which has this order."""
    half, numbers = dim // 2, np.arange(dim)

    def falling(shift: float, period: float = max_period, first: int = 0) -> np.ndarray:
        return period ** (-np.arange(first, first + half) / (half - shift))

    def sinusoids(order: Function, omega: np.ndarray) -> Function:
        """Of angles t omega, in this order; an odd `dim` ends in a zero."""

        def embedding(t: np.ndarray) -> np.ndarray:
            angles = t[:, None] * omega
            of_pairs = order(np.sin(angles), np.cos(angles))
            return np.concatenate([of_pairs, np.zeros((len(t), dim % 2))], axis=1)

        return embedding

    def angles(t: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Of numbers (., dim), each with a frequency of its own."""
        return t[:, None] * max_period**-exponents

    def of_table(cut: Function, exponents: np.ndarray) -> Function:
        table = cache(lambda: cut(angles(np.arange(T), exponents)))
        return lambda t: table()[t]

    def after(times: Function, embedding: Function) -> Function:
        return lambda t: embedding(times(t))

    omega = falling(freq_shift)
    conventions = {
        f"another convention: {name}, freq_shift {shift} (E.14)": sinusoids(order, falling(shift))
        for (name, order), shift in product(ORDERS.items(), (0, 1))
        if (order, shift) != (right, freq_shift)
    }
    shown = {
        **moved_in_time(lambda t: t, T),
        "T - 1 - t in the place of t": lambda t: T - 1 - t,
        "times in bfloat16 (E.14)": in_bfloat16,
        "t / T in the place of t": lambda t: t / T,
        "2 pi t in the place of t": lambda t: 2 * np.pi * t,
    }
    spacings = {
        "twice the exponent, as of a k that goes by twos and is doubled": falling(0) ** 2,
        "half the exponent, k / dim for k / half": np.sqrt(falling(0)),
    }
    exponents = {"i / dim": numbers / dim, "2 i / dim": 2 * numbers / dim}
    in_pairs = {"2 (i // 2) / dim": 2 * (numbers // 2) / dim}
    tables = {"rows of a table": by_rows, "rows of a table, half of them backwards": by_rows_backwards}
    return {
        **conventions,
        **{what: after(times, ours) for what, times in shown.items()},
        **{
            f"{convention}; and {what}": after(times, embedding)
            for (convention, embedding), (what, times) in product(conventions.items(), shown.items())
        },
        **{
            f"{name}, and {what}": sinusoids(order, frequencies)
            for (name, order), (what, frequencies) in product(ORDERS.items(), spacings.items())
        },
        **{
            f"sines and cosines by turns, each number with an exponent of its own, {what}": (
                lambda t, of_each=of_each: by_columns(angles(t, of_each))
            )
            for what, of_each in exponents.items()
        },
        **{
            f"sines and cosines by {rows}, with exponents {what} (E.32)": of_table(cut, of_each)
            for (rows, cut), (what, of_each) in product(tables.items(), {**exponents, **in_pairs}.items())
        },
        "cosines in the place of sines, too": sinusoids(lambda sin, cos: right(cos, cos), omega),
        "sines in the place of cosines, too": sinusoids(lambda sin, cos: right(sin, sin), omega),
        "the slowest frequency first": sinusoids(right, omega[::-1]),
        "frequencies that grow": sinusoids(right, 1 / omega),
        "exponents from k = 1 on": sinusoids(right, falling(freq_shift, first=1)),
        f"a max_period of T, {T}": sinusoids(right, falling(freq_shift, T)),
    }


# In which order sines and cosines (., half) come


def cosines_first(sin: np.ndarray, cos: np.ndarray) -> np.ndarray:
    return np.concatenate([cos, sin], axis=1)


def sines_first(sin: np.ndarray, cos: np.ndarray) -> np.ndarray:
    return np.concatenate([sin, cos], axis=1)


def by_turns(sin: np.ndarray, cos: np.ndarray) -> np.ndarray:
    return np.stack([sin, cos], axis=2).reshape(len(sin), -1)


ORDERS = {
    "cosines, then sines": cosines_first,
    "sines, then cosines": sines_first,
    "sines and cosines by turns": by_turns,
    "cosines and sines by turns": lambda sin, cos: by_turns(cos, sin),
}


# Of angles (., dim), of which each has its own place


def by_columns(angles: np.ndarray) -> np.ndarray:
    return np.where(np.arange(angles.shape[1]) % 2 == 0, np.sin(angles), np.cos(angles))


def by_rows(angles: np.ndarray) -> np.ndarray:
    return by_columns(angles.T).T


def by_rows_backwards(angles: np.ndarray) -> np.ndarray:
    """Sines in even rows; their cosines in row 1 - even, which is 1, -1, -3, and so on."""
    even = np.arange(0, len(angles), 2)
    angles[even] = np.sin(angles[even])
    angles[(1 - even) % len(angles)] = np.cos(angles[even])
    return angles
