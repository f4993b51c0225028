"""What every metric asks of its sets before it computes."""

from __future__ import annotations

import numpy as np

__all__ = ["two_sets"]


def two_sets(at_least: int, **sets: np.ndarray) -> list[np.ndarray]:
    """The two named sets in float64; ValueError unless they are finite (n, D) and (m, D) of enough rows."""
    arrays = {name: np.asarray(array, np.float64) for name, array in sets.items()}
    names, shapes = " and ".join(arrays), " and ".join(str(array.shape) for array in arrays.values())
    x, y = arrays.values()
    if x.ndim != 2 or y.ndim != 2 or x.shape[1:] != y.shape[1:] or x.shape[1] < 1:
        raise ValueError(f"{names} have shapes {shapes}; expected (n, D) and (m, D).")
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"{names} have shapes {shapes}; expected at least {at_least} rows in each.")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity; expected finite numbers.")
    return [x, y]
