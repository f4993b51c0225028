"""How the time of a training step grows: the exponent p of time ~ batch^p, and of time ~ pixels^p.

The least-squares slope of log time on log size. If it is 1, time grows in proportion to size; if less, the
fixed cost of a step still weighs; if more, a step falls out of a cache, or attention (pixels squared) tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from _bench.networks import CONFIGS, Config
from _bench.rounds import in_turn

BATCHES = (8, 16, 32, 64, 128)
SIDES = (16, 32, 64)


def exponent(sizes: Any, seconds: Any) -> float:
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float)), 1)[0])


def growth(
    sides_of: Callable[[Config], dict[str, Any]], rounds: int, quick: bool = False
) -> dict[str, dict[str, Any]]:
    """For batch and pixels: the sizes, and for each side the median seconds and the exponent.

    Pixels grow at the configuration's own batch. `sides_of` builds the sides of a configuration by name; they
    are closed here.
    """
    config = CONFIGS["mnist"].quick() if quick else CONFIGS["mnist"]
    square = replace(config, shape=(32, 32, config.shape[2]))
    own = config.training[0]
    batches, edges = (BATCHES[:2], SIDES[:2]) if quick else (BATCHES, SIDES)
    works = {
        "batch": [(config, n, n) for n in batches],
        "pixels": [(replace(square, shape=(s, s, config.shape[2])), own, s * s) for s in edges],
    }
    grown = {}
    for along, points in works.items():
        seconds: dict[str, list[float]] = {}
        for each, n, _ in points:
            sides = sides_of(each)
            try:
                steps = {name: side.training(each.batch(n)) for name, side in sides.items()}
                times = in_turn(steps, {name: side.clock for name, side in sides.items()}, rounds)
            finally:
                for side in sides.values():
                    side.close()
            for name, of in times.items():
                seconds.setdefault(name, []).append(float(np.median(of)))
        sizes = [size for _, _, size in points]
        grown[along] = {
            "sizes": sizes,
            "sides": {k: {"seconds": v, "exponent": exponent(sizes, v)} for k, v in seconds.items()},
        }
    return grown
