"""Which array library, on which device, with which random numbers.

Code that computes never asks this module where it runs. It asks the array::

    xp = array_namespace(x)

and then uses only functions of the array API standard (2023.12 and later), so that NumPy, CuPy and
array-api-strict arrays go through the same lines. The backend (``TINYDIFF_BACKEND``, or an argument)
decides one thing only: where *new* arrays are made.
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array, is_numpy_array

__all__ = [
    "Array",
    "BackendError",
    "array_namespace",
    "asarray_like",
    "device",
    "get_backend",
    "is_cupy_array",
    "is_numpy_array",
    "standard_normal",
    "to_numpy",
]

# An array of any library that follows the array API standard; no static type names that yet.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

BACKENDS = ("numpy", "cupy")


class BackendError(RuntimeError):
    """The chosen array library cannot be used; the message is one sentence that says what to do."""


def get_backend(name: str | None = None) -> Namespace:
    """Return the array namespace in which new arrays are made.

    Parameters
    ----------
    name : {"numpy", "cupy"}, optional
        The library. Default: the environment variable ``TINYDIFF_BACKEND``, or ``"numpy"``.

    Returns
    -------
    module
        ``array_api_compat.numpy`` or ``array_api_compat.cupy``.

    Raises
    ------
    BackendError
        If the name is unknown, CuPy is not installed, or CuPy finds no usable GPU.
    """
    source = "backend" if name is not None else "TINYDIFF_BACKEND"
    chosen = (name if name is not None else os.environ.get("TINYDIFF_BACKEND") or "numpy").strip().lower()
    if chosen == "numpy":
        import array_api_compat.numpy as numpy_namespace

        return numpy_namespace
    if chosen == "cupy":
        return _cupy_namespace()
    raise BackendError(f"{source} is {chosen!r}: set it to one of {', '.join(map(repr, BACKENDS))}.")


def _cupy_namespace() -> Namespace:
    """CuPy's namespace, or one sentence on what is missing."""
    install = "pip install 'tinydiff[cuda12]' (CUDA 12) or 'tinydiff[cuda13]' (CUDA 13)"
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            f"The cupy backend needs CuPy, which could not be imported ({_first_line(error)}): "
            f"{install}, or set TINYDIFF_BACKEND=numpy."
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        if count:
            cupy.zeros(1) + 1  # compiles and launches a kernel: a driver that is too old fails here
    except Exception as error:  # CuPy raises its own classes for driver, runtime and compiler faults
        raise BackendError(
            f"CuPy {cupy.__version__} is installed but finds no usable GPU ({_first_line(error)}): check "
            "nvidia-smi and that the CuPy package matches the CUDA version, or set TINYDIFF_BACKEND=numpy."
        ) from None
    if not count:
        raise BackendError(
            f"CuPy {cupy.__version__} is installed but sees no GPU: check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or set TINYDIFF_BACKEND=numpy."
        )
    import array_api_compat.cupy as cupy_namespace

    return cupy_namespace


def _first_line(error: BaseException) -> str:
    """The first line that says something (CuPy's ImportError opens with a row of equals signs)."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next((line for line in lines if any(map(str.isalpha, line))), type(error).__name__)


def to_numpy(x: Array) -> np.ndarray:
    """Copy an array of any backend to the host as a NumPy array (no copy if it is one already)."""
    if isinstance(x, np.ndarray):
        return x
    if is_cupy_array(x):
        return x.get()
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)


def asarray_like(values: Any, like: Array, dtype: Any = None) -> Array:
    """Make `values` (host data, or an array) an array beside `like`: its library, device and dtype.

    Parameters
    ----------
    values : array_like
        Numbers on the host, or an array already of `like`'s library.
    like : array
        Decides library, device and, unless `dtype` is given, dtype.
    dtype : dtype, optional
        dtype of the result, of `like`'s library.
    """
    xp = array_namespace(like)
    return xp.asarray(values, dtype=like.dtype if dtype is None else dtype, device=device(like))


def standard_normal(rng: np.random.Generator, shape: tuple[int, ...], like: Array) -> Array:
    """Draw standard normal numbers beside `like` (its library, device and dtype).

    `rng` is a ``numpy.random.Generator``, which draws on the host (so that every backend sees the same
    numbers for the same seed), or a ``cupy.random.Generator``, which draws on the GPU.

    Parameters
    ----------
    rng : numpy.random.Generator or cupy.random.Generator
        Where the randomness comes from; there is no hidden global generator.
    shape : tuple of int
        Shape of the result.
    like : array
        Decides library, device and dtype of the result.
    """
    dtype = np.float32 if "float32" in str(like.dtype) else np.float64
    return asarray_like(rng.standard_normal(shape, dtype=dtype), like)
