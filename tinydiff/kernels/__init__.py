"""The few array routines worth tuning, behind one interface.

``portable.py`` is the definition: readable, in the array API standard, right for every library.
``numpy.py`` is a faster twin of the same functions for NumPy arrays, tested against the definition over
random shapes. A layer asks for the module that fits its input::

    kernels = kernels_for(x)
    y = kernels.conv2d(x, weight, bias, stride, padding)
"""

from __future__ import annotations

from typing import Any

from tinydiff.backend import Array, is_numpy_array
from tinydiff.kernels import numpy as numpy_kernels
from tinydiff.kernels import portable

__all__ = ["kernels_for"]


def kernels_for(x: Array) -> Any:
    """Return the kernel module for arrays like `x`: ``kernels.numpy`` or ``kernels.portable``."""
    return numpy_kernels if is_numpy_array(x) else portable
