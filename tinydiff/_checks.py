"""What several floors ask of an argument before they begin."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_counts"]


def check_counts(**counts: Any) -> None:
    """ValueError naming the first that is not an integer of at least 1 (True is none)."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected an integer of at least 1.")
