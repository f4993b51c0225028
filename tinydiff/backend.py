"""Which array library, on which device, with which random numbers.

Code that computes never asks this module where it runs. It asks the array::

    xp = array_namespace(x)

and then uses only functions of the array API standard (2024.12 and later), so that NumPy, CuPy and
array-api-strict arrays go through the same lines. NumPy has had all of them itself since 2.1;
array-api-compat supplies what others lack. The backend (``TINYDIFF_BACKEND``, or an argument) decides one
thing only: where *new* arrays are made.

What crosses from a device to the host goes through `to_numpy`, and waits for the device. Nothing in a step
needs to cross: times and tables stay on the host, and what is sent the other way does not wait.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from array_api_compat import device, is_cupy_array, is_jax_array, is_torch_array

from tinydiff._checks import check_rng

__all__ = [
    "Array",
    "BackendError",
    "Namespace",
    "array_namespace",
    "asarray_like",
    "backend_name",
    "clip_to_unit",
    "column_like",
    "constant_like",
    "device",
    "generator_beside",
    "get_backend",
    "integers_like",
    "is_cupy_array",
    "is_numpy_array",
    "library_of",
    "standard_normal",
    "sum_samples",
    "to_float64",
    "to_numpy",
]

# An array of any library that follows the array API standard; no static type names that yet.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

BACKENDS = ("numpy", "cupy")


def is_numpy_array(x: Any) -> bool:
    """Whether `x` is a NumPy array."""
    return type(x) is np.ndarray or array_api_compat.is_numpy_array(x)


def library_of(x: Any) -> str:
    """The name of the library whose array `x` is, for messages."""
    return type(x).__module__.partition(".")[0]


# Every namespace that has been asked for with arrays of a single type, by that type.
_namespaces: dict[type, Namespace] = {}


def array_namespace(*arrays: Array) -> Namespace:
    """Return the array API namespace of `arrays`: NumPy itself, or as array-api-compat does.

    A network of small layers asks several times for every product, so answers are kept by the array's type.
    """
    kind = type(arrays[0]) if arrays else None
    if kind is None or any(type(x) is not kind for x in arrays[1:]):
        return _namespace_of(*arrays)
    if kind not in _namespaces:
        _namespaces[kind] = _namespace_of(arrays[0])
    return _namespaces[kind]


def _namespace_of(*arrays: Array) -> Namespace:
    """array-api-compat's answer; for NumPy, NumPy itself, as array-api-compat's copy takes long to import."""
    of_numpy = arrays and all(map(array_api_compat.is_numpy_array, arrays))
    return np if of_numpy else array_api_compat.array_namespace(*arrays)


class BackendError(RuntimeError):
    """The chosen array library cannot be used; the message is one sentence that says what to do."""


def backend_name(name: str | None = None) -> str:
    """The backend that `name` means: for None, what ``TINYDIFF_BACKEND`` says, or else ``"numpy"``."""
    chosen = name if name is not None else os.environ.get("TINYDIFF_BACKEND") or "numpy"
    return str(chosen).strip().lower()  # an array library, say, is refused with the names that there are


def get_backend(name: str | None = None, device: int | None = None) -> Namespace:
    """Return the array namespace in which new arrays are made.

    Parameters
    ----------
    name : {"numpy", "cupy"}, optional
        The library. Default: the environment variable ``TINYDIFF_BACKEND``, or ``"numpy"``.
    device : int, optional
        Which GPU, of those that ``CUDA_VISIBLE_DEVICES`` leaves visible: it becomes CuPy's current one, on
        which this thread makes new arrays from now on. Default: the current one, which is 0 at the start.

    Returns
    -------
    module
        ``numpy`` or ``array_api_compat.cupy``.

    Raises
    ------
    BackendError
        If the name is unknown, CuPy is not installed, CuPy finds no usable GPU, or there is no such device.
    """
    source = "backend" if name is not None else "TINYDIFF_BACKEND"
    chosen = backend_name(name)
    if chosen == "numpy":
        if device is not None:
            raise BackendError(
                f"device is {device}, but the backend is numpy, which has none to choose from: set "
                "TINYDIFF_BACKEND=cupy, or leave the device out."
            )
        return np
    if chosen == "cupy":
        return _cupy_namespace(device)
    raise BackendError(f"{source} is {chosen!r}: set it to one of {', '.join(map(repr, BACKENDS))}.")


# CuPy's packages by the major version of CUDA; [ctk] brings CUDA's own libraries along.
CUPY_PACKAGES = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}
OR_NUMPY = "or set TINYDIFF_BACKEND=numpy."


def _cupy_namespace(number: int | None = None) -> Namespace:
    """CuPy's namespace, with GPU `number` the current one; or one sentence on what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            f"The cupy backend needs CuPy, which could not be imported ({_first_line(error)}): "
            f"{_how_to_install()}, {OR_NUMPY}"
        ) from None
    installed = f"CuPy {cupy.__version__} is installed but"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own classes for driver, runtime and compiler faults
        raise BackendError(f"{installed} finds no usable GPU ({_first_line(error)}): {_remedy()}") from None
    if not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        which = "" if visible is None else f", which is {visible!r}"
        raise BackendError(
            f"{installed} sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES{which}, {OR_NUMPY}"
        )
    if number is not None and not 0 <= number < count:
        raise BackendError(
            f"device is {number}, but CuPy sees {count} GPU{'s' * (count > 1)}: expected 0 … {count - 1}, of "
            "those that CUDA_VISIBLE_DEVICES leaves visible."
        )
    try:
        if number is not None:
            cupy.cuda.Device(number).use()
        # Missing libraries of CUDA are found out here: a kernel is compiled, and cuBLAS asked for a product
        # (in float64: for float32 CuPy would settle now whether TF32 is wanted).
        (cupy.zeros((2, 2)) + 1) @ cupy.ones((2, 2))
    except Exception as error:
        raise BackendError(f"{installed} cannot use the GPU ({_first_line(error)}): {_remedy()}") from None
    import array_api_compat.cupy as cupy_namespace

    return cupy_namespace


def _how_to_install() -> str:
    """The pip command for the CuPy that fits this machine's driver."""
    major = _driver_version() // 1000
    if major == 0:
        commands = [f"{_pip(package)} (CUDA {cuda})" for cuda, package in CUPY_PACKAGES.items()]
        return f"no NVIDIA driver was found either; where there is one, {' or '.join(commands)}"
    if major < min(CUPY_PACKAGES):
        return (
            f"the NVIDIA driver knows CUDA {_version_of_cuda()} only, so update it first, to CUDA 12 or newer"
        )
    return (
        f"{_pip(CUPY_PACKAGES[min(major, max(CUPY_PACKAGES))])} fits the driver (CUDA {_version_of_cuda()})"
    )


def _remedy() -> str:
    """What to do about a CuPy that is there and does not work."""
    major = _driver_version() // 1000
    if major == 0:
        return f"no NVIDIA driver was found (check nvidia-smi), so install one, {OR_NUMPY}"
    if major < min(CUPY_PACKAGES):
        return f"{_how_to_install()}, {OR_NUMPY}"
    ours = {cuda: package for cuda, package in CUPY_PACKAGES.items() if _is_installed(package)}
    if len(ours) > 1:  # the files of one have overwritten the other's
        return (
            f"{' and '.join(ours.values())} are both installed, where only one may be, so pip uninstall "
            f"{' '.join(ours.values())} and then {_how_to_install()}, {OR_NUMPY}"
        )
    if ours and min(ours) > major:
        wrong = ours[min(ours)]
        return (
            f"{wrong} needs a newer driver than this one (CUDA {_version_of_cuda()}), so update the driver, "
            f"or pip uninstall {wrong} and then {_how_to_install()}, {OR_NUMPY}"
        )
    package = next(iter(ours.values()), CUPY_PACKAGES[min(major, max(CUPY_PACKAGES))])
    return f"check nvidia-smi, {_pip(package)} (it brings CUDA's libraries), {OR_NUMPY}"


def _pip(package: str) -> str:
    """The command, in quotes that cmd.exe knows, too: without them > would write to a file."""
    return f'pip install "{package}[ctk]>=14"'


def _is_installed(package: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _driver_version() -> int:
    """The newest CUDA that the NVIDIA driver knows, 12040 for 12.4; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _version_of_cuda() -> str:
    major, rest = divmod(_driver_version(), 1000)
    return f"{major}.{rest // 10}"


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
    if is_jax_array(x) or is_torch_array(x):  # which may be on several devices, or being compiled
        try:
            return np.asarray(x)
        except RuntimeError:  # within torch.func, where DLPack has the numbers
            pass
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)


def to_float64(x: Array) -> np.ndarray:
    """Copy an array of any backend to the host, in float64."""
    return to_numpy(x).astype(np.float64)


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
    dtype = like.dtype if dtype is None else dtype
    if type(like) is np.ndarray:  # a step asks a dozen times: array-api-compat takes ten times as long
        return np.asarray(values, dtype)
    return array_namespace(like).asarray(values, dtype=dtype, device=device(like))


def integers_like(values: np.ndarray, like: Array) -> Array:
    """Integers from the host (times, indices), beside `like`: int64, or as wide as its library has them.

    No dtype is asked for: JAX would warn that it has no int64 (unless it is told to have).
    """
    return array_namespace(like).asarray(values, device=device(like))


# What `constant_like` has made, by where it is, what made it and from what.
_constants: dict[tuple[Any, ...], Array] = {}


def constant_like(make: Callable[..., np.ndarray], *of: Any, like: Array, dtype: Any) -> Array:
    """``make(*of)`` beside `like`: made and sent once, and kept there, because every step needs it again.

    Parameters
    ----------
    make : callable
        Makes the numbers on the host, the same for the same `of`, which must be hashable.
    like : array
        Decides library and device.
    dtype : dtype
        dtype of the result, of `like`'s library. The result is shared: it must not be written to.
    """
    key = (type(like), str(device(like)), make, *of, str(dtype))
    if key in _constants:
        return _constants[key]
    made = asarray_like(make(*of), like, dtype)
    if is_cupy_array(made):
        import cupy

        with made.device:  # wait for it this once: another thread's stream would not wait
            cupy.cuda.get_current_stream().synchronize()
    if not is_jax_array(made):  # what is made while JAX traces is good for that trace only
        _constants[key] = made
    return made


def column_like(values: np.ndarray, like: Array) -> Array:
    """Host values (N,), one for each sample of `like` (N, ...), as (N, 1, ..., 1) beside it."""
    return asarray_like(values.reshape((-1,) + (1,) * (like.ndim - 1)), like)


def sum_samples(x: Array) -> Array:
    """The sum of each sample: over all axes but the first, (N, ...)  ->  (N,)."""
    xp = array_namespace(x)
    return xp.sum(xp.reshape(x, (x.shape[0], -1)), axis=1)


def clip_to_unit(x: Array) -> Array:
    """x limited to [-1, 1], the range of images.

    Not ``xp.clip``, where array-api-compat selects by a mask: the host would wait to learn how many elements.
    """
    xp = array_namespace(x)
    return xp.minimum(xp.maximum(x, -1.0), 1.0)


def generator_beside(like: Array, rng: Any) -> Any:
    """Return a generator that makes its numbers beside `like`.

    That is `rng` itself, from which nothing is drawn, unless `like` is on a GPU and `rng` draws on the host.
    Then it is a ``cupy.random.Generator`` that one number of `rng` seeds: just as reproducible, and no noise
    crosses from the host. The numbers are not those that `rng` would have drawn.

    Parameters
    ----------
    like : array
        Decides where.
    rng : numpy.random.Generator or cupy.random.Generator
        Where the randomness comes from.

    Returns
    -------
    numpy.random.Generator or cupy.random.Generator
        For `standard_normal`, and for the masks of dropout.
    """
    if not (is_cupy_array(like) and isinstance(rng, np.random.Generator)):
        return rng
    import cupy

    return cupy.random.Generator(cupy.random.Philox4x3210(int(rng.integers(2**63))))


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

    Returns
    -------
    array of shape `shape`

    Raises
    ------
    TypeError
        If `rng` is neither of the two.
    """
    check_rng(rng)
    dtype = np.float32 if "float32" in str(like.dtype) else np.float64
    return asarray_like(rng.standard_normal(shape, dtype=dtype), like)
