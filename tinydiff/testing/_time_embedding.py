"""Whether sinusoids of the time are those of the convention that a network was trained with."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from tinydiff._checks import check_counts, check_number
from tinydiff.nn import sinusoidal_embedding
from tinydiff.testing._asked import Function, in_bfloat16, times
from tinydiff.testing._judge import Claim, moved_in_time

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
        The convention, as in `nn.sinusoidal_embedding`. As they come they are diffusers' default; False and 1
        are Ho et al.'s.
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
        If it is something else, as in `assert_q_sample`. The message says which other convention it is, or
        which mistake, if it is known here.
    ValueError
        If `dim`, `freq_shift`, `max_period`, `T` or `tolerance` is not as said above.
    """
    check_counts(dim=dim, T=T)
    half = dim // 2
    check_number("dim", dim, lambda dim: dim >= 4, "at least 4, for two frequencies")
    check_number(
        "freq_shift",
        freq_shift,
        lambda shift: -math.inf < shift < half,
        f"a number less than dim / 2, {half}",
    )
    check_number("max_period", max_period, lambda period: 0 < period < math.inf, "a positive number")
    convention = dict(flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift, max_period=max_period)

    def ours(t: np.ndarray) -> np.ndarray:
        return sinusoidal_embedding(t, dim, like=np.empty(0), **convention)  # type: ignore[arg-type]

    def sinusoids(order: Function, omega: np.ndarray, scale: float = 1.0) -> Function:
        """Of angles scale t omega, in this order; an odd `dim` ends in a zero."""

        def embedding(t: np.ndarray) -> np.ndarray:
            angles = scale * t[:, None] * omega
            numbers = order(np.sin(angles), np.cos(angles))
            return np.concatenate([numbers, np.zeros((len(t), dim % 2))], axis=1)

        return embedding

    def falling(shift: float, period: float = max_period) -> np.ndarray:
        return period ** (-np.arange(half) / (half - shift))

    def each_number(t: np.ndarray, power: int) -> np.ndarray:
        """Angles (N, dim), each with a frequency of its own."""
        return t[:, None] * max_period ** (-power * np.arange(dim) / dim)

    orders = {
        "cosines, then sines": cosines_first,
        "sines, then cosines": sines_first,
        "sines and cosines by turns": by_turns,
        "cosines and sines by turns": lambda sin, cos: by_turns(cos, sin),
    }
    spacings = {
        "freq_shift 0": falling(0.0),
        "freq_shift 1": falling(1.0),
        "twice the exponent, as of a k that goes by twos and is doubled": falling(0.0) ** 2,
        "half the exponent, k / dim for k / half": np.sqrt(falling(0.0)),
    }
    right, omega = cosines_first if flip_sin_to_cos else sines_first, falling(freq_shift)
    mistakes = {
        **moved_in_time(ours, T),
        "times in bfloat16 (E.14)": lambda t: ours(in_bfloat16(t)),
        **{
            f"another convention: {order}, {spacing} (E.14)": sinusoids(orders[order], spacings[spacing])
            for order, spacing in product(orders, spacings)
        },
        "sines and cosines by turns, each number with an exponent of its own, i / dim": (
            lambda t: by_columns(each_number(t, 1))
        ),
        "sines and cosines by turns, each number with an exponent of its own, 2 i / dim": (
            lambda t: by_columns(each_number(t, 2))
        ),
        "sines for every second sample of a batch, not in every second number (E.32)": (
            lambda t: by_rows(each_number(t, 2))
        ),
        "sines at every second t of a table, not in every second number; between them cosines of those "
        "sines, backwards (E.32)": lambda t: _half_of_the_rows(each_number(np.arange(T), 2))[t],
        "cosines in the place of sines, too": sinusoids(lambda sin, cos: right(cos, cos), omega),
        "sines in the place of cosines, too": sinusoids(lambda sin, cos: right(sin, sin), omega),
        "the slowest frequency first": sinusoids(right, omega[::-1]),
        "frequencies that grow": sinusoids(right, 1 / omega),
        "a max_period of T": sinusoids(right, falling(freq_shift, T)),
        "t / T in the place of t": sinusoids(right, omega, 1 / T),
        "2 pi t in the place of t": sinusoids(right, omega, 2 * np.pi),
    }
    expected = (
        f"{'[cos, sin]' if flip_sin_to_cos else '[sin, cos]'} of t max_period^(-k / (dim / 2 - freq_shift)), "
        f"freq_shift {freq_shift:g} (docs: B.5)"
    )
    batches = [(t,) for t in times(T, N, np.random.default_rng(0))]
    Claim("time_embedding", "t", expected, ours, mistakes).judge(time_embedding, batches, asarray, tolerance)


# In which order sines and cosines (., half) come


def cosines_first(sin: np.ndarray, cos: np.ndarray) -> np.ndarray:
    return np.concatenate([cos, sin], axis=1)


def sines_first(sin: np.ndarray, cos: np.ndarray) -> np.ndarray:
    return np.concatenate([sin, cos], axis=1)


def by_turns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=2).reshape(len(first), -1)


def by_columns(angles: np.ndarray) -> np.ndarray:
    return np.where(np.arange(angles.shape[1]) % 2 == 0, np.sin(angles), np.cos(angles))


def by_rows(angles: np.ndarray) -> np.ndarray:
    return by_columns(angles.T).T


def _half_of_the_rows(table: np.ndarray) -> np.ndarray:
    """Of angles (T, dim) sines in even rows; their cosines in row 1 - even, which is 1, -1, -3, and so on."""
    even = np.arange(0, len(table), 2)
    table[even] = np.sin(table[even])
    table[(1 - even) % len(table)] = np.cos(table[even])
    return table
