"""Streams, and what is recorded of them.

What the null stream is asked for is done at once. What another is asked for is put off until the host waits
for that stream: whoever should wait, and does not, reads what is not there yet. In a recording it is kept,
and asked for when the graph is launched. Either knows addresses only: it keeps no array alive.
"""

import collections
import itertools
import sys
import threading
import weakref

__all__ = [
    "PER_THREAD",
    "Graph",
    "Stream",
    "get_current_stream",
    "is_capturing",
    "is_put_off",
    "not_while_capturing",
    "place",
    "run",
    "synchronize_all",
    "turn",
]

turn = threading.RLock()  # threads of the host take turns
PER_THREAD = 2  # by this name each thread has another
_numbers = itertools.count(PER_THREAD + 1)
_of_this_thread = threading.local()
_streams = weakref.WeakValueDictionary()  # by number, and which of them, where each thread has another


class Graph:
    def __init__(self, work):
        self._work = work

    def launch(self, stream=None):
        for each in self._work:
            run(each)


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False):
        if not null and not non_blocking and not ptds:
            raise NotImplementedError("A stream that the null stream waits for is not emulated.")
        self.ptr = 0 if null else PER_THREAD if ptds else next(_numbers)
        self._captured, self._broken, self._before = None, False, []
        self._asked = collections.deque()
        _streams[self.ptr, id(self) if ptds else 0] = self

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

    def __del__(self):
        if not sys.is_finalizing():
            self._finish()  # as CUDA does

    def ask(self, work):
        """Let it do something, or, in a recording, keep it."""
        if self._captured is not None:
            self._captured.append(work)
        else:
            self.do(work)

    def do(self, work):
        """Let it do something that is not recorded."""
        if self.ptr == 0:
            with turn:
                work()
        else:
            self._asked.append(work)

    def _finish(self):
        with turn:
            while self._asked:
                self._asked.popleft()()

    def synchronize(self):
        if self._captured is not None:
            self.refuse("synchronise")
        self._finish()

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


def is_put_off():
    """Whether what is asked for now is done later."""
    return is_capturing() or get_current_stream().ptr != 0


def not_while_capturing(what):
    """What waits for the device, or copies from or to the host, is refused in a recording."""
    if is_capturing():
        get_current_stream().refuse(what)


def run(work, on=None):
    """Ask the current stream for it, or that of a number."""
    current = get_current_stream()
    (current if on in (None, current.ptr) else _streams[on, 0]).ask(work)


def place():
    """By what a pool keeps what comes back: the stream, and the thread, if each has another of that name."""
    ptr = get_current_stream().ptr
    return ptr, threading.get_ident() if ptr == PER_THREAD else 0


def synchronize_all():
    for stream in list(_streams.values()):
        if stream._captured is None:
            stream.synchronize()
