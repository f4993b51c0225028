"""How far along something is, on the standard error stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(shown: bool, over: Iterable[Any] | None = None, **how: Any) -> Any:
    """tqdm's bar; silent unless `shown`, and where there is no such stream (in a program without a console).

    Parameters
    ----------
    shown : bool
        Whether it is wanted.
    over : iterable, optional
        What the bar hands on, one after the other. Default: it is moved by its ``update``.
    **how
        As tqdm takes it: total, desc, unit, initial, leave.
    """
    from tqdm import tqdm

    return tqdm(over, disable=not shown or sys.stderr is None, **how)
