"""How far along something is, on the standard error stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(shown: bool, over: Iterable[Any] | None = None, **how: Any) -> Any:
    """tqdm's bar; silent unless `shown`, and where there is no such stream (in a program without a console).

    Parameters
    ----------
    shown : bool
        Whether it is wanted.
    over : iterable, optional
        What the bar hands on, one after the other. Default: the bar is moved by its ``update``.
    **how
        As tqdm takes it: total, desc, unit, initial, leave.
    """
    from tqdm import tqdm

    disable = not shown or sys.stderr is None
    return tqdm(over, disable=disable, file=_Stderr(), dynamic_ncols=True, **how)


class _Stderr:
    """The standard error stream, on which writing never fails: a bar must not end the work it is about.

    It would where nobody reads any more, as with ``2>&1 | head -3``, or a disk is full.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
