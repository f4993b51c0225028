"""A GPU that is not there: as much of CuPy as tinydiff asks for, with the CPU in the GPU's place.

``pytest -m gpu --emulated`` puts it in CuPy's place, so that tests that need a GPU can be run without one.
It is slow, and made to be strict:

- NumPy computes what CuPy would; arrays of the two do not mix, and nothing crosses to the host unasked.
- g++ compiles kernels in CUDA (``_build.py``, ``_ptx.py``). A block's threads take turns, in a random order
  between barriers (``_threads.cpp``). Shared memory begins as NaN, and so does what is copied to it in the
  background until it is waited for. An address out of reach, a wrong alignment and the like end the launch.
- Where NVIDIA's own compiler is installed, which needs no GPU, it has to take them, too (``_nvrtc.py``).
- Memory begins as NaN, ends at pages that may not be touched, and is NaN again when let go (``_memory.py``).
- cuBLAS is a loop over its arguments (``cublas.cpp``), a CUDA graph a list of what is to be done.
- A stream other than the null one does nothing until the host waits for it (``_stream.py``).

What it cannot show: how fast a GPU is, how its tensor cores and its libraries round, and what the drivers do.
"""

# ruff: noqa: F401

import types

import numpy as np

from cupy import cuda, fft, linalg, random
from cupy._array import (
    array,
    asarray,
    ascontiguousarray,
    device_function,
    elementwise,
    empty,
    empty_like,
    ndarray,
)
from cupy._elements import ElementwiseKernel
from cupy._kernel import RawKernel
from cupy._memory import default_pool
from cupy._stream import not_while_capturing

__version__ = "14.0 (emulated)"


def _not_recorded(function, what):
    on_device = device_function(function)

    def call(*args, **kwargs):
        not_while_capturing(what)
        return on_device(*args, **kwargs)

    return call


@device_function
def take(a, indices, axis):
    return np.take(a, np.mod(indices, a.shape[axis]), axis)  # CuPy's does not ask whether an index fits


def get_default_memory_pool():
    return default_pool


def get_default_pinned_memory_pool():
    return types.SimpleNamespace(free_all_blocks=lambda: None)


_LIKE = ("zeros_like", "ones_like", "full_like")
for _name in {*np.__all__} - {*globals()}:
    _found = getattr(np, _name)
    if isinstance(_found, np.ufunc):
        _found = elementwise(_found)
    elif callable(_found) and not isinstance(_found, type):
        _found = device_function(_found, empty_like if _name in ("copy", *_LIKE) else None)
    if not isinstance(_found, types.ModuleType):
        globals()[_name] = _found
for _name in ("matmul", "dot", "tensordot", "vdot", "inner", "einsum"):
    globals()[_name] = _not_recorded(getattr(np, _name), "ask CuPy for a product")
for _name in ("nonzero", "argwhere", "flatnonzero", "unique", "extract"):
    globals()[_name] = _not_recorded(getattr(np, _name), "take a shape from numbers")
ndarray.__matmul__ = globals()["matmul"]

__all__ = sorted(name for name in globals() if not name.startswith("_") and name not in ("np", "types"))
