"""The array libraries under which one test body runs: what is proved under one of them is run under all.

- ``numpy``: the fast twins of the kernels.
- ``strict``: array-api-strict, which has only what the array API standard promises, on a device that is not
  the host. Arrays of two libraries or devices do not mix there, as on a GPU.
- ``cupy``: a GPU, with ``pytest -m gpu``; skipped, with the reason, where there is none.

All are compared with one reference: NumPy in float64, by the definitions in ``kernels/portable.py``.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import array_api_strict
import numpy as np
import pytest

import tinydiff as td
from tinydiff import kernels
from tinydiff.backend import BackendError, array_namespace, device, get_backend, to_numpy

NAMES = ["numpy", "strict", pytest.param("cupy", marks=pytest.mark.gpu)]
named = pytest.mark.parametrize("name", NAMES)
elsewhere = pytest.mark.parametrize("name", NAMES[1:])  # than in NumPy
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])

# Relative to the norm. What a GPU must keep is looser: its libraries add in other orders.
TOLERANCE = {
    "numpy": {"float64": 1e-12, "float32": 2e-5},
    "strict": {"float64": 1e-12, "float32": 2e-5},
    "cupy": {"float64": 1e-9, "float32": 1e-4},
}


@dataclass(frozen=True)
class Space:
    """A library, and the device on which a test makes its arrays."""

    name: str
    xp: Any
    device: Any = None

    def array(self, x, dtype=None):
        """`x` there; if `dtype` is given and x is floating, in that dtype."""
        x = np.asarray(x)
        floating = dtype is not None and x.dtype.kind == "f"
        return self.xp.asarray(x, dtype=getattr(self.xp, dtype) if floating else None, device=self.device)

    def module(self, module, dtype):
        """Move a module there; returns it."""
        return module.to(self.xp, getattr(self.xp, dtype), self.device)


@cache
def _cupy():
    try:
        return Space("cupy", get_backend("cupy"))
    except BackendError as error:
        return str(error)


def space(name):
    """The space of that name, or the test is skipped."""
    if name == "numpy":
        return Space(name, np)
    if name == "strict":
        return Space(name, array_api_strict, array_api_strict.Device("device1"))
    found = _cupy()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@contextmanager
def definitions():
    """Within it NumPy arrays go through the definitions of the kernels, not their twins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "is_numpy_array", lambda x: False)
        yield


def representable(x):
    """The nearest numbers of float32, in x's dtype: so that both precisions are given the same."""
    x = np.asarray(x)
    return x.astype(np.float32).astype(x.dtype) if x.dtype.kind == "f" else x


def assert_there(x, where, dtype, what):
    """An array of that library, device and dtype."""
    like = where.xp.zeros((), dtype=getattr(where.xp, dtype), device=where.device)
    assert array_namespace(x) is array_namespace(like), f"{what} is a {type(x)}"
    assert device(x) == device(like), what
    assert x.dtype == like.dtype, what


def assert_same(ours, expected, where, dtype, what, *, scale=None, factor=1.0):
    """`ours` is there, in that dtype, and has the reference's numbers, relative to their norm or `scale`."""
    assert_there(ours, where, dtype, what)
    expected = np.asarray(expected)
    assert tuple(ours.shape) == expected.shape, what
    scale = max(np.linalg.norm(expected) if scale is None else scale, 1e-30)
    error = np.linalg.norm(to_numpy(ours).astype(np.float64) - expected)
    tolerance = factor * TOLERANCE[where.name][dtype]
    assert error <= tolerance * scale, f"{what} is off by {error:.1e}, of {scale:.1e}"


def training_step(model, diffusion, x0, **how):
    """What takes a step of training as `td.train` does, given a generator, and returns the loss."""
    parameters = model.named_parameters()
    optimizer, ema = td.Adam(parameters), td.EMA(model)

    def step(rng):
        optimizer.zero_grad()
        loss, backward = td.training_loss(model, diffusion, x0, rng, **how)
        backward()
        td.clip_grad_norm(parameters, 1.0)
        optimizer.step()
        ema.update()
        return loss

    return step


# The functions of the standard, by name.
FUNCTIONS = {
    name: function
    for name in array_api_strict.__all__
    if isinstance(function := getattr(array_api_strict, name), FunctionType)
}

# What would leave the device. CuPy waits for all work to be done before it answers any of these.
CROSSINGS = ["__array__", "__buffer__", "__dlpack__", "__bool__", "__int__", "__float__", "__complex__"]
CROSSINGS += ["__index__", "to_device"]


@contextmanager
def transfers():
    """A list that grows by a name whenever an array-api-strict array goes from its device to the host.

    What takes a shape from an array's values is an error within: it needs them on the host, unseen.
    """
    seen = []

    def counting(name, original):
        def call(self, *args, **kwargs):
            if self.device != array_api_strict.Device("CPU_DEVICE"):
                seen.append(name)
            return original(self, *args, **kwargs)

        return call

    Array = type(array_api_strict.zeros(1))
    flags = array_api_strict.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False)
    with pytest.MonkeyPatch.context() as patch, flags:
        for name in CROSSINGS:
            patch.setattr(Array, name, counting(name, getattr(Array, name)))
        yield seen


@contextmanager
def launches():
    """A list that grows by (name, shape) with every call of array-api-strict that computes or copies.

    A GPU would be given work then, at some microseconds a call however small the arrays. Views are free.
    """
    seen, within = [], []

    def is_view(result, args):
        given = (a._array for a in args if isinstance(a, Array))
        return any(np.may_share_memory(result._array, a) for a in given)

    def counting(name, original, in_place):
        def call(*args, **kwargs):
            within.append(name)
            try:
                result = original(*args, **kwargs)
            finally:
                within.pop()
            out = args[0] if in_place else result
            if not within and isinstance(out, Array) and (in_place or not is_view(out, args)):
                seen.append((name, tuple(out.shape)))
            return result

        return call

    Array = type(array_api_strict.zeros(1))
    operators = "add sub mul truediv floordiv mod pow matmul neg pos abs invert lt le eq ne ge gt and or xor"
    names = [f"__{p}{name}__" for name in operators.split() for p in ("", "r", "i")]
    with pytest.MonkeyPatch.context() as patch:
        for name in [*names, "__getitem__", "__setitem__"]:
            if hasattr(Array, name):
                in_place = name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__")
                patch.setattr(Array, name, counting(name, getattr(Array, name), in_place))
        for name, function in FUNCTIONS.items():
            patch.setattr(array_api_strict, name, counting(name, function, False))
        yield seen


class OnDevice:
    """array-api-strict with another default device: it stands in for CuPy's namespace."""

    def __init__(self, device):
        self._device = device

    def __getattr__(self, name):
        function = getattr(array_api_strict, name)
        if name not in {"asarray", "empty", "full", "ones", "zeros"}:
            return function

        def make(*args, device=None, **kwargs):
            return function(*args, device=self._device if device is None else device, **kwargs)

        return make
