"""Checks of entries in diffusers' configurations, and errors that name an entry that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinydiff._checks import class_or_kind

__all__ = ["check_mapping", "is_count", "is_number", "require", "require_fixed"]


def require(config: Mapping[str, Any], key: str, fits: bool, expected: str) -> None:
    """ValueError with what came and what was expected, unless the entry fits."""
    if not fits:
        raise ValueError(
            f"config[{key!r}] = {config[key]!r} is not supported by tinydiff; expected {expected}."
        )


def require_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError naming an entry that is there with a value that is not accepted."""
    for key, accepted in fixed.items():
        if key in config:
            require(config, key, config[key] in accepted, " or ".join(map(repr, accepted)))


def check_mapping(name: str, value: Any) -> None:
    """TypeError naming what is no mapping; for a scheduler or a model it says that its config is one."""
    if not isinstance(value, Mapping):
        inside = isinstance(getattr(value, "config", None), Mapping)
        within = "; its attribute config is one" if inside else ""
        raise TypeError(f"{name} is {class_or_kind(value)}; expected a mapping{within}.")


def is_count(value: Any) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether it is a number as JSON has them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
