"""A device's memory, and CuPy's pool of it: it begins as NaN, and to leave it ends the launch.

Before and behind every piece are pages that may not be touched; what lies between it and them stays NaN.
"""

import contextlib
import ctypes
import functools
import mmap
import sys
import threading
import weakref

from cupy._stream import Stream, get_current_stream, is_capturing, place, synchronize_all, turn

__all__ = [
    "Memory",
    "MemoryPointer",
    "MemoryPool",
    "OutOfMemoryError",
    "current_allocator",
    "is_untouched",
    "using_allocator",
]

ROUND = 512  # bytes, as CuPy's pool
GUARD = 16 * mmap.PAGESIZE  # bytes that may not be touched, on either side
NAN = 0xFF  # every byte: a NaN in float32 and float64, -1 in integers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutOfMemoryError(MemoryError):
    pass


class Memory:
    """`size` bytes from `ptr` on, a multiple of `ROUND`."""

    def __init__(self, size):
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._mapped = mmap.mmap(-1, GUARD + pages + GUARD)  # let go after all that is in the same cycle
        except OSError as error:
            raise OutOfMemoryError(f"the host has no {size} bytes for the emulated device.") from error
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        self.first, self.ptr = begin + GUARD, begin + GUARD + pages - size
        ctypes.memset(self.first, NAN, pages)
        for guarded in (begin, begin + GUARD + pages):
            _libc.mprotect(guarded, GUARD, 0)

    def __del__(self):
        if not sys.is_finalizing():
            synchronize_all()  # as CUDA does before it takes memory away


class MemoryPointer:
    """An address, and the memory that it keeps."""

    def __init__(self, mem, ptr):
        self.mem, self.ptr = mem, ptr


class Pooled:
    """What a pool has lent: it goes back by itself."""

    def __init__(self, pool, beneath, size, asked):
        self._pool, self._beneath, self.size, self._asked = weakref.ref(pool), beneath, size, asked
        self.ptr = beneath.ptr
        self._home = place()
        self._stream = Stream.null if is_capturing() else get_current_stream()  # in whose order it is used

    def __del__(self):
        first = getattr(self._beneath.mem, "first", self.ptr)
        end = self.ptr + self.size  # whoever still reads it, a graph say, reads NaN
        self._stream.do(functools.partial(ctypes.memset, first, NAN, end - first))
        pool = self._pool()
        if pool is not None:
            pool._back(self._beneath, (self._home, self.size))

    def beside(self):
        """Where nobody may write. (Of a recording's memory, cut anew at every replay: unknown.)"""
        of, end = self._beneath.mem, self.ptr + self._asked
        if not isinstance(of, Memory):
            return ()
        return (of.first, self.ptr - of.first), (end, self.ptr + self.size - end)


def is_untouched(beside):
    return not any(ctypes.string_at(*where).strip(bytes([NAN])) for where in beside)


class MemoryPool:
    """As ``cupy.cuda.MemoryPool``: it keeps what comes back, by stream and size."""

    def __init__(self, allocator=None):
        self._allocator = allocator or (lambda size: MemoryPointer(found := Memory(size), found.ptr))
        self._free, self._used, self._limit = {}, 0, 0

    def malloc(self, size):
        rounded = max(1, -(-size // ROUND)) * ROUND
        with turn:
            kept = self._free.get((place(), rounded))
            if kept:
                beneath = kept.pop()
            else:
                if self._limit and self.total_bytes() + rounded > self._limit:
                    self.free_all_blocks()
                if self._limit and self.total_bytes() + rounded > self._limit:
                    raise OutOfMemoryError(
                        f"Out of memory allocating {rounded:,} bytes (allocated so far: {self._used:,} "
                        f"bytes, limit set to: {self._limit:,} bytes)."
                    )
                beneath = self._allocator(rounded)
            self._used += rounded
        lent = Pooled(self, beneath, rounded, size)
        return MemoryPointer(lent, lent.ptr)

    def _back(self, beneath, where):
        with turn:
            self._free.setdefault(where, []).append(beneath)
            self._used -= where[1]

    def free_all_blocks(self, stream=None):
        with turn:
            self._free.clear()

    def free_bytes(self):
        return sum(size * len(kept) for (_, size), kept in self._free.items())

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._used + self.free_bytes()

    def set_limit(self, size=0):
        self._limit = size


default_pool = MemoryPool()
_of_this_thread = threading.local()


def current_allocator():
    return getattr(_of_this_thread, "allocator", default_pool.malloc)


@contextlib.contextmanager
def using_allocator(allocator):
    before = current_allocator()
    _of_this_thread.allocator = allocator
    try:
        yield
    finally:
        _of_this_thread.allocator = before
