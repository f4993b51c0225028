"""``cupy.cuda``, of one device."""

from cupy._memory import MemoryPointer, MemoryPool, OutOfMemoryError, using_allocator
from cupy._stream import PER_THREAD, Graph, Stream, get_current_stream
from cupy.cuda.device import Device

__all__ = [
    "Device",
    "Graph",
    "MemoryPointer",
    "MemoryPool",
    "OutOfMemoryError",
    "Stream",
    "get_current_stream",
    "runtime",
    "using_allocator",
]


class runtime:
    is_hip = False
    streamPerThread = PER_THREAD

    @staticmethod
    def getDevice():
        return 0

    @staticmethod
    def getDeviceCount():
        return 1
