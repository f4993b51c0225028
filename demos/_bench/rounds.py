"""Timing in turn, A B A B, and what is reported: medians, and the ratio of each round."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

WARM_UP = 3  # steps; the first compiles, plans and allocates


def in_turn(
    steps: Mapping[str, Callable[[], Any]],
    clocks: Mapping[str, Callable[[Callable[[], Any], int], float]],
    rounds: int,
    seconds_a_turn: float = 0.2,
) -> dict[str, list[float]]:
    """Seconds a step of each, round by round.

    A turn is as many steps as fill `seconds_a_turn`, at least one. Where it has several, one that does not
    count is taken first: it brings back to the caches what the others' turns drove out. Python's garbage
    collector runs between turns only.
    """
    counts = {}
    for name, step in steps.items():
        warm = [clocks[name](step, 1) for _ in range(WARM_UP)]
        counts[name] = max(1, math.ceil(seconds_a_turn / max(min(warm), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            gc.collect()
            gc.disable()
            try:
                if counts[name] > 1:
                    step()
                times[name].append(clocks[name](step, counts[name]))
            finally:
                gc.enable()
    return times


def wall_clock(step: Callable[[], Any], n: int) -> float:
    """Seconds a step, over n of them."""
    began = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - began) / n


def compared(times: Mapping[str, list[float]], ours: str = "tinydiff") -> dict[str, Any]:
    """Medians; and for every other, the ratio of medians ours/theirs and the quartiles of rounds' ratios."""
    medians = {name: float(np.median(of)) for name, of in times.items()}
    ratios = {}
    for name, of in times.items():
        if name != ours:
            low, high = np.quantile(np.divide(times[ours], of), [0.25, 0.75])
            ratios[name] = {
                "ratio": medians[ours] / medians[name],
                "lower_quartile": float(low),
                "upper_quartile": float(high),
            }
    return {"seconds": medians, "ratio": ratios, "rounds": {k: list(v) for k, v in times.items()}}
