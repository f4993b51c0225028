"""The few array routines worth tuning, behind one interface.

``portable.py`` is the definition: readable, in the array API standard, right for every library.
``numpy.py`` is a faster twin of the same functions for NumPy arrays, tested against the definition over
random shapes; ``numba.py`` is another, faster still, for those who install the extra ``fast`` and ask for it
(``TINYDIFF_KERNELS=numba``, or `use`). ``cupy.py`` is the twin for CuPy's arrays, in CUDA; with
``TINYDIFF_CUPY_KERNELS=portable``, or `use_on_gpu`, these go through the definition, too. A layer asks for
the module that fits its input::

    kernels = kernels_for(x)
    y = kernels.conv2d(x, weight, bias, stride, padding)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinydiff.backend import Array, BackendError, is_cupy_array, is_numpy_array
from tinydiff.kernels import numpy as numpy_kernels
from tinydiff.kernels import portable
from tinydiff.kernels._memory import keep_freed_memory
from tinydiff.kernels._threads import alone, blas_on_one_thread, forget_scratch, threads_in_reach

__all__ = ["alone", "forget_scratch", "kernels_for", "many_steps", "threads_in_reach", "use", "use_on_gpu"]

TWINS = ("numpy", "numba")
ON_GPU = ("cupy", "portable")

# The modules for NumPy arrays and for CuPy's; None until they are asked for.
_twin: Any = None
_on_gpu: Any = None


def kernels_for(x: Array) -> Any:
    """Return the kernel module for arrays like `x`: the twin chosen for its library, or the definition.

    Raises
    ------
    BackendError
        If ``TINYDIFF_KERNELS`` names a twin that is unknown or cannot be imported, or
        ``TINYDIFF_CUPY_KERNELS`` one that is unknown.
    """
    if is_numpy_array(x):
        return use() if _twin is None else _twin
    if is_cupy_array(x):
        return use_on_gpu() if _on_gpu is None else _on_gpu
    return portable


def use(name: str | None = None) -> Any:
    """Choose the twin for NumPy arrays, from now on in this process; returns its module.

    What one twin's forward pass has kept is for the same twin's backward: layers see to that.

    Parameters
    ----------
    name : {"numpy", "numba"}, optional
        The twin. Default: the environment variable ``TINYDIFF_KERNELS``, or ``"numpy"``.

    Raises
    ------
    BackendError
        If the name is unknown, or Numba cannot be imported.
    """
    global _twin
    source = "name" if name is not None else "TINYDIFF_KERNELS"
    asked = name if name is not None else os.environ.get("TINYDIFF_KERNELS") or "numpy"
    chosen = str(asked).strip().lower()
    if chosen not in TWINS:
        raise BackendError(f"{source} is {chosen!r}: set it to one of {', '.join(map(repr, TWINS))}.")
    if chosen == "numpy":
        _twin = numpy_kernels
    else:
        try:
            _twin = importlib.import_module("tinydiff.kernels.numba")
        except ImportError as error:
            raise BackendError(
                f"The numba kernels need Numba, which could not be imported ({error}): "
                'pip install "tinydiff[fast]", or set TINYDIFF_KERNELS=numpy.'
            ) from None
    return _twin


def use_on_gpu(name: str | None = None) -> Any:
    """Choose the module for CuPy arrays, from now on in this process; returns it.

    Parameters
    ----------
    name : {"cupy", "portable"}, optional
        Kernels in CUDA, or the definition. Default: the environment variable ``TINYDIFF_CUPY_KERNELS``, or
        ``"cupy"``; for a CuPy built for AMD's GPUs ``"portable"``.

    Raises
    ------
    BackendError
        If the name is unknown.
    """
    global _on_gpu
    source = "name" if name is not None else "TINYDIFF_CUPY_KERNELS"
    asked = name if name is not None else os.environ.get("TINYDIFF_CUPY_KERNELS", "")
    chosen = str(asked).strip().lower() or ("portable" if _is_for_amd() else "cupy")
    if chosen not in ON_GPU:
        raise BackendError(f"{source} is {chosen!r}: set it to one of {', '.join(map(repr, ON_GPU))}.")
    _on_gpu = portable if chosen == "portable" else importlib.import_module("tinydiff.kernels.cupy")
    return _on_gpu


def _is_for_amd() -> bool:
    cupy = sys.modules.get("cupy")  # imported already: whoever asks has its arrays
    return cupy is not None and bool(cupy.cuda.runtime.is_hip)


@contextmanager
def many_steps() -> Iterator[None]:
    """Set this process up for a loop of many similar steps: training, sampling.

    Freed memory is kept for the next step (from now on), and BLAS is held to one thread while the kernels
    share out what is worth sharing (until the loop ends). A product that BLAS would have split between
    threads may round differently. A number too small for its dtype is no error here, whatever NumPy was told
    to do about underflow: exp(x) in a SiLU is meant to vanish. Nothing else changes.
    """
    keep_freed_memory()
    with blas_on_one_thread(), np.errstate(under="ignore"):
        yield
