"""Messages between processes that share a step, and wait for one another several times in it.

Three things of `multiprocessing`'s own way cost a small network more than some of its layers. A process that
sleeps until a message comes takes tens of microseconds to wake: here it stays awake for a while, and gives
its core to whoever asks for it. Pickling an array takes several calls in Python: here its bytes are sent. And
a pipe for both directions is a socket, which is slower than two pipes for one direction each.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # there is none where there are no processes, in a browser say
    from multiprocessing.connection import Connection

__all__ = ["Line"]

# Seconds. Longer than a process computes between two messages in a small network's step; in a slower step the
# time to wake is not noticed.
AWAKE = 1e-3


class Line:
    """One of the two ends of a line between a process and its fork."""

    @classmethod
    def ends(cls) -> tuple[Line, Line]:
        """The ends of a new line; each process closes the one that is the other's."""
        (hear_1, say_1), (hear_2, say_2) = multiprocessing.Pipe(False), multiprocessing.Pipe(False)
        return cls(hear_1, say_2), cls(hear_2, say_1)

    def __init__(self, hear: Connection, say: Connection) -> None:
        self._hear, self._say = hear, say
        self._arrived = select.poll()
        self._arrived.register(hear.fileno(), select.POLLIN)

    def send(self, *parts: Any) -> None:
        """Send objects that can be pickled; no tuples, which stand for packed arrays on the way.

        Raises
        ------
        ConnectionError
            If the other end is closed.
        """
        self._say.send_bytes(pickle.dumps([_packed(part) for part in parts], pickle.HIGHEST_PROTOCOL))

    def receive(self) -> list[Any]:
        """Return what was sent, as soon as it comes; arrays are new and may be written to.

        Raises
        ------
        EOFError
            If the other end is closed.
        """
        asleep = time.perf_counter() + AWAKE
        while not self._arrived.poll(0) and time.perf_counter() < asleep:
            os.sched_yield()
        return [_unpacked(part) for part in pickle.loads(self._hear.recv_bytes())]

    def close(self) -> None:
        """End it: the other end hears of it when it next receives or sends."""
        self._hear.close()
        self._say.close()


def _packed(part: Any) -> Any:
    """An array of numbers as its dtype, shape and bytes; everything else as it is."""
    if type(part) is np.ndarray and part.dtype.kind in "biufc":
        return part.dtype.str, part.shape, bytearray(part.tobytes())
    return part


def _unpacked(part: Any) -> Any:
    if type(part) is tuple:
        dtype, shape, memory = part
        return np.ndarray(shape, dtype, memory)
    return part
