"""``cupy.cuda.device``."""

import contextlib

from cupy._stream import synchronize_all

__all__ = ["Device"]


class Device(contextlib.nullcontext):
    compute_capability = "90"

    def __init__(self, number=None):
        super().__init__(self)
        self.id = 0
        self.attributes = {"MaxSharedMemoryPerBlockOptin": 232_448}  # bytes, of an H100

    def __eq__(self, other):
        return isinstance(other, Device)

    __hash__ = None

    def __repr__(self):
        return "<CUDA Device 0>"

    def use(self):
        return self

    def synchronize(self):
        synchronize_all()
