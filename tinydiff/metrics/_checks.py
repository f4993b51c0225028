"""What every metric asks of its sets before it computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff._checks import check_unmasked

__all__ = ["finite_numbers", "two_sets"]


def finite_numbers(name: str, values: Any) -> np.ndarray:
    """The values in float64; ValueError unless they are real and finite, and none is masked."""
    check_unmasked(name, values)
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {values.dtype}; expected real numbers.")
    values = values.astype(np.float64, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} contains NaN or infinity; expected finite numbers.")
    return values


def two_sets(**sets: np.ndarray) -> list[np.ndarray]:
    """The two named sets in float64; ValueError unless they are finite (n, D) and (m, D) with n, m ≥ 2."""
    arrays = {name: finite_numbers(name, array) for name, array in sets.items()}
    names, shapes = " and ".join(arrays), " and ".join(str(array.shape) for array in arrays.values())
    x, y = arrays.values()
    if x.ndim != 2 or y.ndim != 2 or x.shape[1:] != y.shape[1:] or x.shape[1] < 1:
        raise ValueError(f"{names} have shapes {shapes}; expected (n, D) and (m, D).")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{names} have shapes {shapes}; expected at least 2 rows in each.")
    return [x, y]
