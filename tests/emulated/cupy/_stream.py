"""Streams, and what is recorded of them.

Work is done at once, unless the current stream is being captured: then it is kept, and done when the graph is
launched. What is kept knows addresses only: it keeps no array alive.
"""

import itertools
import threading

__all__ = ["Graph", "Stream", "get_current_stream", "is_capturing", "not_while_capturing", "run"]

_numbers = itertools.count(1)
_of_this_thread = threading.local()


class Graph:
    def __init__(self, work):
        self._work = work

    def launch(self, stream=None):
        for each in self._work:
            run(each)


class Stream:
    def __init__(self, null=False, non_blocking=False):
        self.ptr = 0 if null else next(_numbers)
        self._captured, self._broken, self._before = None, False, []

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)

    def __enter__(self):
        self._before.append(get_current_stream())
        _of_this_thread.current = self
        return self

    def __exit__(self, *error):
        _of_this_thread.current = self._before.pop()

    def synchronize(self):
        if self._captured is not None:
            self.refuse("synchronise")

    def begin_capture(self):
        self._captured, self._broken = [], False

    def end_capture(self):
        work, self._captured = self._captured, None
        if self._broken:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated: the capture ended before.")
        return Graph(work)

    def refuse(self, what):
        self._broken = True
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: to {what} cannot be recorded.")


Stream.null = Stream(null=True)


def get_current_stream():
    return getattr(_of_this_thread, "current", Stream.null)


def is_capturing():
    return get_current_stream()._captured is not None


def not_while_capturing(what):
    """What waits for the device, or copies from or to the host, is refused in a recording."""
    if is_capturing():
        get_current_stream().refuse(what)


def run(work):
    """Do it, or, in a recording, keep it."""
    captured = get_current_stream()._captured
    if captured is None:
        work()
    else:
        captured.append(work)
