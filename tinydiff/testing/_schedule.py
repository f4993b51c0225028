"""Whether a table of alphas_cumprod is that of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule
from tinydiff.testing._judge import check_tolerance, named, on_host

__all__ = ["assert_schedule"]


def assert_schedule(alphas_cumprod: Any, schedule: NoiseSchedule, *, tolerance: float = 0.01) -> None:
    """Raise unless `alphas_cumprod` has the schedule's log-SNR at every t (docs: F.4, S.1).

    That is all a network sees of a schedule. Two tables of float32 differ in it by less than 0.001.

    Parameters
    ----------
    alphas_cumprod : array_like of any library, shape (T,)
        Your table; its first entry has had one step of noise.
    schedule : NoiseSchedule
        What it should be the table of.
    tolerance : float
        The largest difference of log(abar / (1 - abar)) that is none.

    Raises
    ------
    AssertionError
        If it is another table. The message says where, and names the mistake that gives it, if it is known.
    TypeError, ValueError
        If `schedule` or `tolerance` is not as said above.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}; expected a NoiseSchedule.")
    check_tolerance(tolerance)
    T, right = schedule.T, schedule.alphas_cumprod
    table = on_host("alphas_cumprod", alphas_cumprod).astype(np.float64)
    if table.shape == (T + 1,) and table[0] == 1:
        raise AssertionError(
            f"alphas_cumprod has {T + 1} entries, the first is 1, the data itself; expected the others."
        )
    if table.shape != (T,):
        raise AssertionError(f"alphas_cumprod has shape {table.shape}; expected ({T},).")
    wrong = _apart(table, right, schedule.one_minus_alphas_cumprod)
    worst = float(np.max(wrong))
    if worst <= tolerance:
        return
    given = {what: make() for what, make in _mistakes(schedule).items()}
    raise AssertionError(
        f"alphas_cumprod has a log-SNR that is off by {worst:.3g}, at t = {np.argmax(wrong)}; by more than "
        f"{tolerance:.3g} at {np.sum(wrong > tolerance)} of {T} t. Expected that of {schedule!r} "
        "(docs: F.4, S.1).\n"
        + named({what: float(np.max(_apart(table, abar, 1 - abar))) for what, abar in given.items()}, worst)
    )


def _apart(table: np.ndarray, abar: np.ndarray, one_minus_abar: np.ndarray) -> np.ndarray:
    """How far apart two tables are in log-SNR, at each t; what is no part of a variance is infinitely far."""
    with np.errstate(all="ignore"):
        difference = np.log(table) - np.log1p(-table) - np.log(abar) + np.log(one_minus_abar)
    return np.where(table == abar, 0.0, np.where(np.isnan(difference), np.inf, np.abs(difference)))


def _mistakes(schedule: NoiseSchedule) -> dict[str, Callable[[], np.ndarray]]:
    """Tables that are taken for that of `schedule`, or for those of the two that have a name."""
    T, abar = schedule.T, schedule.alphas_cumprod
    u = np.arange(T + 1) / T

    def cosine(power: int = 2, s: float = 0.008, cap: float = 0.999) -> np.ndarray:
        f = np.cos((u + s) / (1 + s) * np.pi / 2) ** power
        return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], cap))

    def at_T_points() -> np.ndarray:
        f = np.cos((np.linspace(0, 1, T) + 0.008) / 1.008 * np.pi / 2) ** 2
        return f / f[0]

    def of_betas(start: float, end: float, power: int = 1) -> np.ndarray:
        return np.cumprod(1 - np.linspace(start ** (1 / power), end ** (1 / power), T) ** power)

    return {
        "the cosine schedule without its square (E.1)": lambda: cosine(power=1),
        "the cosine schedule without its offset s": lambda: cosine(s=0.0),
        "the cosine schedule with betas up to 0.9999": lambda: cosine(cap=0.9999),
        "the cosine schedule without a cap on its betas": lambda: cosine(cap=1.0),
        "the cosine at T points for T + 1 (E.2)": at_T_points,
        "the cosine at T points for T + 1, not divided by the first (E.2)": lambda: (
            at_T_points() * np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        ),
        "the cosine schedule": lambda: cosine_schedule(T).alphas_cumprod,
        "the linear schedule, its betas times 1000 / T": lambda: linear_schedule(T).alphas_cumprod,
        "linear betas from 1e-4 to 0.02, whatever T is (E.4)": lambda: of_betas(1e-4, 0.02),
        "betas even in their root, 8.5e-4 to 0.012 ('scaled_linear')": lambda: of_betas(
            8.5e-4, 0.012, power=2
        ),
        "alphas_cumprod a step late, from 1 on": lambda: schedule.alphas_cumprod_prev,
        "alphas_cumprod from its end to its beginning": lambda: abar[::-1],
        "the root of alphas_cumprod, a rate": lambda: np.sqrt(abar),
        "the square of alphas_cumprod": lambda: abar**2,
        "1 - alphas_cumprod": lambda: schedule.one_minus_alphas_cumprod,
        "alphas, not multiplied up": lambda: schedule.alphas,
        "betas": lambda: schedule.betas,
    }
