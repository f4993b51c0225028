"""Whether a table of alphas_cumprod is that of a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.schedules import NoiseSchedule, check_schedule, cosine_schedule, flow_schedule, linear_schedule
from tinydiff.testing._asked import check_tolerance, on_host
from tinydiff.testing._judge import FLOAT32, named, single

__all__ = ["assert_schedule"]

# An abar_t at which nothing of the data is left, whatever the rounding.
NOTHING = 1e-16


def assert_schedule(alphas_cumprod: Any, schedule: NoiseSchedule, *, tolerance: float = 0.01) -> None:
    """Raise unless `alphas_cumprod` has the schedule's log-SNR at every t (docs: F.4, S.1).

    That is all a network sees of a schedule. Two float32 tables of the linear or the cosine schedule of 1000
    steps differ in it by less than 0.001; those of longer chains, whose ends are nearer to 0 and 1, by more.
    They do so at the first t: in float64 the second half agrees to a tenth of that, even if the betas were
    float32.

    Parameters
    ----------
    alphas_cumprod : array_like of any library, shape (T,)
        Your table; its first entry has had one step of noise.
    schedule : NoiseSchedule
        What it should be the table of.
    tolerance : float
        The largest difference of log(abar / (1 - abar)) that passes; in the second half of a float64 table, a
        tenth of it.

    Raises
    ------
    AssertionError
        If it is another table. The message says where, and names the mistake that gives it, if it is known.
    TypeError, ValueError
        If `schedule` or `tolerance` is not as said above.
    """
    check_schedule(schedule)
    check_tolerance(tolerance)
    T, right = schedule.T, schedule.alphas_cumprod
    given = on_host("alphas_cumprod", alphas_cumprod)
    table = given.astype(np.float64)
    if table.shape == (T + 1,) and table[0] == 1:
        raise AssertionError(
            f"alphas_cumprod has {T + 1} entries, the first is 1, the data itself; expected the other {T}."
        )
    if table.shape != (T,):
        raise AssertionError(f"alphas_cumprod has shape {table.shape}; expected ({T},).")
    wrong = _apart(table, right, schedule.one_minus_alphas_cumprod)
    line, stricter = np.full(T, float(tolerance)), ""
    if np.any(table != table.astype(np.float32)):  # else it may be cast from float32
        line[T // 2 :] = tolerance / 10
        stricter = f", {tolerance / 10:.3g} from t = {T // 2} on,"
    over = np.where(wrong > line, wrong, 0.0)
    worst = float(np.max(over))
    if worst == 0:
        return
    with np.errstate(all="ignore"):
        distances = {
            what: float(np.max(_apart(table, abar, 1 - abar))) for what, abar in _mistakes(schedule).items()
        }
    unknown = FLOAT32 if single(worst, given) else ""
    raise AssertionError(
        f"alphas_cumprod has a log-SNR that is off by {worst:.3g} at t = {np.argmax(over)}; by more than "
        f"{tolerance:.3g}{stricter} at {np.count_nonzero(over)} of {T} t. Expected that of {schedule!r} "
        f"(docs: F.4, S.1).\n{named(distances, worst, min(tolerance, worst / 2), unknown)}"
    )


def _apart(table: np.ndarray, abar: np.ndarray, one_minus_abar: np.ndarray) -> np.ndarray:
    """How far apart two tables are in log-SNR, at each t; what is not in [0, 1] is infinitely far."""
    table, abar = (np.where(x >= 0, np.maximum(x, NOTHING), np.nan) for x in (table, abar))
    with np.errstate(all="ignore"):
        difference = np.log(table) - np.log1p(-table) - np.log(abar) + np.log(one_minus_abar)
    return np.where(table == abar, 0.0, np.where(np.isnan(difference), np.inf, np.abs(difference)))


def _mistakes(schedule: NoiseSchedule) -> dict[str, np.ndarray]:
    """Tables that are mistaken for that of `schedule`, or for those of the three schedules with a name."""
    T, betas, abar = schedule.T, schedule.betas, schedule.alphas_cumprod
    ends = 0.1 / T, min(20 / T, 0.999)

    def of_betas(betas: np.ndarray) -> np.ndarray:
        return np.cumprod(1 - betas)

    def of_share(r: np.ndarray) -> np.ndarray:
        return (1 - r) ** 2 / ((1 - r) ** 2 + r**2)

    def cosine(points: int = T + 1, power: int = 2, s: float = 0.008) -> np.ndarray:
        return np.cos((np.linspace(0, 1, points) + s) / (1 + s) * np.pi / 2) ** power

    def capped(f: np.ndarray, least: float = 0.0, cap: float = 0.999) -> np.ndarray:
        return of_betas(np.clip(1 - f[1:] / f[:-1], least, cap))

    f, r = cosine(), np.sqrt(abar)
    return {
        "the cosine schedule without its square (E.1)": capped(cosine(power=1)),
        "the cosine schedule without its offset s": capped(cosine(s=0.0)),
        "the cosine schedule with betas up to 0.9999": capped(f, cap=0.9999),
        "the cosine schedule with betas from 1e-4 to 0.9999": capped(f, 1e-4, 0.9999),
        "the cosine schedule with betas from 1e-4 to 0.02, the ends of the linear one (E.4)": capped(
            f, 1e-4, 0.02
        ),
        "the cosine schedule without a cap on its betas": f[1:] / f[0],
        "the cosine at T points for T + 1 (E.2)": cosine(T) / cosine(T)[0],
        "the cosine at T points for T + 1, not divided by the first (E.2)": cosine(T),
        "the cosine schedule": cosine_schedule(T).alphas_cumprod,
        "the linear schedule, its betas times 1000 / T": linear_schedule(T).alphas_cumprod,
        "flow matching's schedule, r = (t + 1) / T": flow_schedule(T).alphas_cumprod,
        "flow matching's schedule, r = linspace(0, 1, T)": of_share(np.linspace(0, 1, T)),
        "flow matching's schedule with a shift of 3": flow_schedule(T, 3.0).alphas_cumprod,
        "flow matching's schedule with a shift of 3, made twice": flow_schedule(T, 9.0).alphas_cumprod,
        "linear betas of linspace(..., T, endpoint=False)": of_betas(np.linspace(*ends, T, endpoint=False)),
        "linear betas of linspace(..., T + 1), without the first": of_betas(np.linspace(*ends, T + 1)[1:]),
        "linear betas at T + 1 points, the first of which is in all abar_t, but is no step (E.26)": of_betas(
            np.linspace(betas[0], betas[-1], T + 1)
        )[1:],
        "linear betas from 1e-4 to 0.02, whatever T is (E.4)": of_betas(np.linspace(1e-4, 0.02, T)),
        "linear betas from 8.5e-4 to 0.012": of_betas(np.linspace(8.5e-4, 0.012, T)),
        "betas even in their root, 8.5e-4 to 0.012 ('scaled_linear')": of_betas(
            np.linspace(8.5e-4**0.5, 0.012**0.5, T) ** 2
        ),
        "betas even in their root, 1e-4 to 0.02": of_betas(np.linspace(0.01, 0.02**0.5, T) ** 2),
        "rescaled to end in noise (Lin et al. 2023)": ((r - r[-1]) * r[0] / (r[0] - r[-1])) ** 2,
        "betas from the last to the first": of_betas(betas[::-1]),
        "1 minus the sum of the betas": 1 - np.cumsum(betas),
        "the betas multiplied up, not the alphas": np.cumprod(betas),
        "alphas_cumprod a step late, from 1 on": schedule.alphas_cumprod_prev,
        "alphas_cumprod from its end to its beginning": abar[::-1],
        "the root of alphas_cumprod, a rate": r,
        "the square of alphas_cumprod": abar**2,
        "1 - alphas_cumprod": schedule.one_minus_alphas_cumprod,
        "alphas, not multiplied up": schedule.alphas,
        "betas": betas,
    }
