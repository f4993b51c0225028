"""``cupy.random``: the generators that draw on the device."""

import numpy as np

from cupy._array import device_function

__all__ = ["Generator", "Philox4x3210"]

Philox4x3210 = np.random.Philox


class Generator:
    def __init__(self, bits):
        self._rng = np.random.Generator(bits)

    def random(self, size=None, dtype=np.float64):
        return self._drawn(self._rng.random, size, dtype)

    def standard_normal(self, size=None, dtype=np.float64):
        return self._drawn(self._rng.standard_normal, size, dtype)

    def _drawn(self, draw, size, dtype):
        return device_function(lambda: draw(size, np.dtype(dtype).type))()
