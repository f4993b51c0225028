"""The few array routines worth tuning, behind one interface.

``portable.py`` is the definition: readable, in the array API standard, right for every library.
``numpy.py`` is a faster twin of the same functions for NumPy arrays, tested against the definition over
random shapes. A layer asks for the module that fits its input::

    kernels = kernels_for(x)
    y = kernels.conv2d(x, weight, bias, stride, padding)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinydiff.backend import Array, is_numpy_array
from tinydiff.kernels import numpy as numpy_kernels
from tinydiff.kernels import portable
from tinydiff.kernels._memory import keep_freed_memory
from tinydiff.kernels._threads import alone, blas_on_one_thread, threads_in_reach

__all__ = ["alone", "kernels_for", "many_steps", "threads_in_reach"]


def kernels_for(x: Array) -> Any:
    """Return the kernel module for arrays like `x`: ``kernels.numpy`` or ``kernels.portable``."""
    return numpy_kernels if is_numpy_array(x) else portable


@contextmanager
def many_steps() -> Iterator[None]:
    """Set this process up for a loop of many steps alike: training, sampling.

    Freed memory is kept for the next step (from now on), and BLAS is held to one thread while the kernels
    share out what is worth sharing (until the loop ends). A product that BLAS would have split between
    threads may round differently; nothing else changes.
    """
    keep_freed_memory()
    with blas_on_one_thread():
        yield
