"""Whether the average of the weights is the exponential moving one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tinydiff._checks import check_number
from tinydiff.testing._asked import Function, answer_of, check_tolerance
from tinydiff.testing._steps import judge_steps, rows

__all__ = ["assert_ema"]

UPDATES, WEIGHTS = 100, 32


def assert_ema(
    ema: Function,
    decay: float | Callable[[int], float] = 0.999,
    *,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``ema(weights)`` are the exponential moving averages of weights (docs: B.23).

    Parameters
    ----------
    ema : callable
        Takes weights (K + 1, n): those before the training, with which your average begins, and those after
        each of its K = 100 steps. Returns the averages (K, n), one after each step.
    decay : float or callable
        The share of the average that stays, in [0, 1). If it warms up, a function of the number k of the
        step, however large, which may say 1: `tinydiff.EMA`'s is
        ``lambda k: min(0.999, (1 + k) / (10 + k))``.
    asarray : callable
        As in `assert_q_sample`.
    tolerance : float
        The largest difference that passes, as a part of the furthest that an average should have moved. In
        float32 give 1e-3, and a decay of at most 0.9999: with a larger one nothing but rounding is left.

    Raises
    ------
    AssertionError
        If the averages are others. The message says by how much and since when, and names the mistake that
        gives them, if it is known; also if `ema` writes into the weights.
    ValueError
        If a decay is no such number, or `tolerance` is not a positive number.
    """
    check_tolerance(tolerance)
    decays, end = _checked(decay)
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.standard_normal((UPDATES + 1, WEIGHTS)), axis=0)
    shape = UPDATES, WEIGHTS
    came = answer_of(ema, "ema(weights)", {"weights": weights}, asarray, shape, rows(shape))
    right = _averages(weights, decays)
    with np.errstate(over="ignore"):
        rounded = came.astype(np.float16)  # which leaves bfloat16's numbers of this size as they are
    half = np.array_equal(came, rounded) and np.allclose(came[0], right[0], rtol=2**-6, atol=1e-3)
    judge_steps(
        "ema",
        came,
        right,
        weights[0],
        partial(_mistakes, weights, decays, end),
        tolerance,
        "decay average + (1 - decay) weights (docs: B.23)",
        {"kept in half precision (E.18)": 0.0 if half else np.inf},
    )


def _checked(decay: Any) -> tuple[np.ndarray, float]:
    """The decay of each update (K,), and in the end; ValueError unless each is a number in [0, 1)."""
    decays = [decay(k) if callable(decay) else decay for k in range(1, UPDATES + 1)]
    for k, value in enumerate(decays, 1):
        name = f"decay({k})" if callable(decay) else "decay"
        if callable(decay):  # 1: no update at this step
            check_number(name, value, lambda value: 0 <= value <= 1, "a number in [0, 1]")
        else:
            check_number(name, value, lambda value: 0 <= value < 1, "a number in [0, 1)")
    if min(decays) == 1:
        raise ValueError(f"decay(k) is 1 for k = 1 … {UPDATES}; expected an update in one step at least.")
    end = decay(10**9) if callable(decay) else decay  # which may be rounded to 1
    return np.array(decays, dtype=np.float64), min(float(end), 1 - 1e-9)


def _averages(weights: np.ndarray, decays: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The averages (K, n) of weights (K + 1, n), which begin with the first of them."""
    average = weights[0] if start is None else start
    return np.array([average := d * average + (1 - d) * w for d, w in zip(decays, weights[1:], strict=True)])


def _mistakes(weights: np.ndarray, decays: np.ndarray, end: float) -> dict[str, np.ndarray]:
    """Averages that are mistaken for those with these decays, which come to `end`."""
    k, zeros, kept = np.arange(1, UPDATES + 1), np.zeros(WEIGHTS), end
    rates = np.array([kept := 1 - min(kept, (1 + i) / (10 + i)) for i in k])
    wrong = {
        "decay and 1 - decay exchanged (E.30)": _averages(weights, 1 - decays),
        "the rate, 1 - min(decay, (1 + k) / (10 + k)), is kept as the next decay (E.30)": _averages(
            weights, 1 - rates
        ),
        "it begins with zeros": _averages(weights, decays, zeros),
        "it begins with zeros, and is divided by 1 - decay^k, as Adam's moments are": (
            _averages(weights, decays, zeros) / (1 - np.cumprod(decays))[:, None]
        ),
        "the weights before the step, not after it": _averages(weights[[0, *range(UPDATES)]], decays),
        "it is never updated": np.repeat(weights[:1], UPDATES, axis=0),
        "the weights themselves": weights[1:],
        "the mean of all weights": np.cumsum(weights, axis=0)[1:] / (k + 1)[:, None],
        "the mean of all weights after the first": np.cumsum(weights[1:], axis=0) / k[:, None],
        "it is updated only after every 10th step": _averages(weights, np.where(k % 10 == 0, decays, 1.0)),
        "the first update copies the weights, as that of PyTorch's AveragedModel": _averages(
            weights, np.where(k == 1, 0.0, decays)
        ),
        "a constant decay": _averages(weights, np.full(UPDATES, end)),
        "min(decay, (1 + k) / (10 + k)) at update k, tinydiff's": _averages(
            weights, np.minimum(end, (1 + k) / (10 + k))
        ),
        "min(decay, k / (9 + k)) at update k": _averages(weights, np.minimum(end, k / (9 + k))),
        "min(decay, k / (9 + k)) at update k, and 0 at the first, EMAModel's": _averages(
            weights, np.where(k == 1, 0.0, np.minimum(end, k / (9 + k)))
        ),
        "min(decay, 1 - k^(-2/3)) at update k, ema_pytorch's, and EMAModel's with use_ema_warmup": _averages(
            weights, np.minimum(end, 1 - k ** (-2 / 3))
        ),
    }
    for m in (2, 4, 8):
        wrong[f"it is updated {m} times a step, at each of {m} micro-batches (E.30)"] = _averages(
            weights, decays**m
        )
    return wrong
