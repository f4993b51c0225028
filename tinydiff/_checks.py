"""What several floors ask of an argument before they begin."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

Choice = TypeVar("Choice")

__all__ = ["check_choice", "check_counts", "check_seed"]


def check_counts(**counts: Any) -> None:
    """ValueError naming the first that is not an integer of at least 1 (True is none)."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected an integer of at least 1.")


def check_choice(name: str, value: Choice, choices: tuple[Choice, ...]) -> Choice:
    """`value`, or ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
    return value


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is in 0 … 2**32 - 1."""
    if not 0 <= seed < 2**32:  # NumPy splits a larger one in two words: two seeds would share a stream
        raise ValueError(f"seed is {seed}; expected an integer in 0 … 2**32 - 1.")
