"""Where new arrays are made, and the sentences that say why they cannot be."""

import ctypes
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import array_api_compat
import array_api_strict as strict
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import tinydiff as td
from tinydiff import backend
from tinydiff.backend import (
    BackendError,
    asarray_like,
    clip_to_unit,
    generator_beside,
    get_backend,
    standard_normal,
    to_numpy,
)


def test_numpy_arrays_are_told_at_sight_and_others_as_ever():
    class Sub(np.ndarray):
        pass

    x, s = np.zeros(2), strict.zeros(2)
    sub = x.view(Sub)
    for arrays in [(x,), (x, x), (sub,), (x, sub), (x[0],), (x, x[0])]:
        assert backend.array_namespace(*arrays) is np
    for arrays in [(s,), (s, s)]:
        assert backend.array_namespace(*arrays) is array_api_compat.array_namespace(*arrays)
    assert [backend.is_numpy_array(a) for a in (x, sub, s, 1.0, [x])] == [True, True, False, False, False]
    for wrong in [(), (x, s), ([1.0],), ("x",)]:
        with pytest.raises(TypeError):
            backend.array_namespace(*wrong)


def fake_cupy(count=0, count_error=None, launch_error=None, product_error=None):
    """A module that fails as CuPy does: by finding nothing, in the driver, in its first kernel or product."""
    current = [0]

    class Device:
        def __init__(self, number):
            self.number = number

        def use(self):
            current[0] = self.number

    def getDeviceCount():
        if count_error is not None:
            raise count_error
        return count

    def zeros(shape):
        if launch_error is not None:
            raise launch_error
        return np.zeros(shape)

    class Ones:
        __array_ufunc__ = None  # so that NumPy leaves the product to it

        def __init__(self, shape):
            pass

        def __rmatmul__(self, other):
            if product_error is not None:
                raise product_error

    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.0.0"
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDeviceCount=getDeviceCount), Device=Device, current=current
    )
    cupy.zeros, cupy.ones = zeros, Ones
    return cupy


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Call it to say what this machine has, whatever it has: ``machine(driver=12040, packages=[...])``."""

    def has(driver=0, packages=()):
        def version(package):
            if package not in packages:
                raise metadata.PackageNotFoundError(package)
            return "14.0.0"

        monkeypatch.setattr(backend, "_driver_version", lambda: driver)
        monkeypatch.setattr(metadata, "version", version)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    has()
    return has


def importable_as_cupy_namespace(monkeypatch, cupy):
    """Stands in for array-api-compat's wrapper, whose import needs more of CuPy than the fake has."""
    wrapper = types.ModuleType("array_api_compat.cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", wrapper)
    monkeypatch.setattr(array_api_compat, "cupy", wrapper, raising=False)
    return wrapper


def message_of(call, *args, **kwargs):
    """The BackendError's message: one line, one sentence, no traceback chained to it."""
    with pytest.raises(BackendError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not re.search(r"\.\s+[A-Z]", message)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def name_of(xp):
    return xp.__name__.removeprefix("array_api_compat.")


def test_numpy_is_the_default():
    assert name_of(get_backend()) == "numpy"
    assert isinstance(get_backend().zeros(2), np.ndarray)


@pytest.mark.parametrize("value", ["numpy", "NumPy", " numpy ", ""])
def test_the_environment_chooses(monkeypatch, value):
    monkeypatch.setenv("TINYDIFF_BACKEND", value)
    assert name_of(get_backend()) == "numpy"


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("TINYDIFF_BACKEND", "tensorflow")
    assert name_of(get_backend("numpy")) == "numpy"
    assert "TINYDIFF_BACKEND is 'tensorflow'" in message_of(get_backend)


@pytest.mark.parametrize("name", ["torch", "", "numpy1", 0, b"numpy"])
def test_an_unknown_name_is_refused(name):
    message = message_of(get_backend, name)
    assert f"backend is {str(name)!r}" in message
    assert "'numpy', 'cupy'" in message


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (
            0,
            'no NVIDIA driver was found either; where there is one, pip install "cupy-cuda12x[ctk]>=14"',
        ),
        (11040, "the NVIDIA driver knows CUDA 11.4 only, so update it first"),
        (12040, 'pip install "cupy-cuda12x[ctk]>=14" fits the driver (CUDA 12.4)'),
        (13000, 'pip install "cupy-cuda13x[ctk]>=14" fits the driver (CUDA 13.0)'),
        (14010, 'pip install "cupy-cuda13x[ctk]>=14" fits the driver (CUDA 14.1)'),
    ],
)
def test_cupy_is_not_installed(monkeypatch, machine, driver, says):
    machine(driver)
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = message_of(get_backend, "cupy")
    assert says in message
    assert "TINYDIFF_BACKEND=numpy" in message


def test_the_command_names_what_the_extras_install():
    extras = (Path(__file__).resolve().parents[1] / "setup.cfg").read_text()
    for cuda, package in backend.CUPY_PACKAGES.items():
        wanted = re.search(r'"(.*)"', backend._pip(package)).group(1)
        assert f"cuda{cuda} =\n    {wanted}\n" in extras


def test_cupy_is_broken(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text(
        'raise ImportError("\\n====\\nFailed to import CuPy.\\n\\nOriginal error: libcudart\\n====\\n")\n'
    )
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = message_of(get_backend, "cupy")
    assert "(Failed to import CuPy)" in message
    assert "pip install" in message


NO_DRIVER = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient.")


@pytest.mark.parametrize(
    ("fault", "driver", "packages", "says"),
    [
        (
            {"count": 0},
            12040,
            ["cupy-cuda12x"],
            ["sees no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or"],
        ),
        (
            {"count_error": NO_DRIVER},
            0,
            ["cupy-cuda12x"],
            ["(cudaErrorInsufficientDriver: ", "no NVIDIA driver was"],
        ),
        (
            {"count_error": NO_DRIVER},
            12040,
            ["cupy-cuda13x"],
            [
                "cupy-cuda13x needs a newer driver than this one (CUDA 12.4)",
                'pip uninstall cupy-cuda13x and then pip install "cupy-cuda12x[ctk]>=14"',
            ],
        ),
        (
            {"count": 1, "launch_error": RuntimeError("libnvrtc.so.12: cannot open it.\nmore")},
            13000,
            ["cupy-cuda12x"],  # older than the driver: that works, and is kept
            [
                "cannot use the GPU (libnvrtc.so.12: cannot open it)",
                'pip install "cupy-cuda12x[ctk]>=14" (it brings',
            ],
        ),
        (
            {"count": 1, "product_error": RuntimeError('Failure finding "libcublasLt.so.12": No such file')},
            12040,
            ["cupy-cuda12x"],
            ["libcublasLt", "cannot use the GPU", "cupy-cuda12x[ctk]"],
        ),
        ({"count": 1, "launch_error": RuntimeError()}, 13000, [], ["(RuntimeError)", "cupy-cuda13x"]),
        (
            {"count": 1, "launch_error": RuntimeError("no kernel image")},
            12040,
            ["cupy-cuda12x", "cupy-cuda13x"],
            [
                "cupy-cuda12x and cupy-cuda13x are both installed, where only one may be",
                'pip uninstall cupy-cuda12x cupy-cuda13x and then pip install "cupy-cuda12x[ctk]>=14" fits',
            ],
        ),
        (
            {"count_error": NO_DRIVER},
            11040,
            ["cupy-cuda12x"],
            ["): the NVIDIA driver knows CUDA 11.4 only, so update it first, to CUDA 12 or newer, or set"],
        ),
    ],
)
def test_cupy_without_a_usable_gpu(monkeypatch, machine, fault, driver, packages, says):
    machine(driver, packages)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**fault))
    monkeypatch.setenv("TINYDIFF_BACKEND", "cupy")
    message = message_of(get_backend)
    for part in says:
        assert part in message
    assert "CuPy 14.0.0 is installed" in message
    assert "TINYDIFF_BACKEND=numpy" in message


def test_hidden_devices_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES, which is ''" in message_of(get_backend, "cupy")


def test_a_device_becomes_the_current_one(monkeypatch):
    cupy = fake_cupy(count=2)
    wrapper = importable_as_cupy_namespace(monkeypatch, cupy)
    assert get_backend("cupy") is wrapper
    assert cupy.cuda.current == [0]
    assert get_backend("cupy", device=1) is wrapper
    assert cupy.cuda.current == [1]
    for device in (-1, 2):
        assert f"device is {device}, but CuPy sees 2 GPUs: expected 0 … 1" in message_of(
            get_backend, "cupy", device
        )
    assert cupy.cuda.current == [1]


def test_numpy_has_no_devices():
    assert "device is 0, but the backend is numpy" in message_of(get_backend, "numpy", 0)


def test_the_driver_is_asked_for_its_version(monkeypatch):
    monkeypatch.undo()  # of what `machine` put in its place

    class Driver:
        @staticmethod
        def cuDriverGetVersion(pointer):
            pointer._obj.value = 12040
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    assert backend._driver_version() == 12040
    assert backend._version_of_cuda() == "12.4"

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert backend._driver_version() == 0


def test_whoever_makes_arrays_says_the_same(monkeypatch, tmp_path):
    td.save_model(tmp_path / "model.safetensors", td.MLP(hidden=4, blocks=1, time_features=4))
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("TINYDIFF_BACKEND", "cupy")
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    rng = np.random.default_rng(0)
    for call in (
        td.MLP,
        td.UNet,
        lambda: td.load_model(tmp_path / "model.safetensors"),
        lambda: td.sample(lambda x, t: x, diffusion, (1, 2), rng=rng, progress=False),
    ):
        assert "needs CuPy" in message_of(call)


def test_asarray_like_takes_library_and_dtype():
    for like in (np.zeros(1, np.float32), strict.zeros(1, dtype=strict.float32)):
        made = asarray_like(np.arange(3.0), like)
        assert type(made) is type(like)
        assert made.dtype == like.dtype
        assert_array_equal(to_numpy(made), [0, 1, 2])
    assert asarray_like([1, 2], np.zeros(1), np.int64).dtype == np.int64


def test_to_numpy():
    x = np.arange(3.0)
    assert to_numpy(x) is x
    assert_array_equal(to_numpy(strict.asarray(x)), x)
    assert_array_equal(to_numpy([1, 2]), [1, 2])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_standard_normal_is_the_same_numbers_everywhere(dtype):
    expected = np.random.default_rng(3).standard_normal((4, 2), dtype=dtype)
    for xp in (np, strict):
        like = xp.zeros((), dtype=getattr(xp, dtype))
        drawn = standard_normal(np.random.default_rng(3), (4, 2), like)
        assert type(drawn) is type(xp.zeros(1))
        assert drawn.dtype == like.dtype
        assert_array_equal(to_numpy(drawn), expected)


def test_clip_to_unit_is_clip():
    x = np.array([-np.inf, -1.5, -1.0, -0.0, 0.25, 1.0, 2.0, np.nan], np.float32)
    for xp in (np, strict):
        clipped = clip_to_unit(xp.asarray(x))
        assert clipped.dtype == xp.float32
        assert_array_equal(to_numpy(clipped), np.clip(x, -1, 1))


def test_off_the_gpu_a_generator_stays_as_it_is():
    rng = np.random.default_rng(3)
    for xp in (np, strict):
        assert generator_beside(xp.zeros(1), rng) is rng
    assert rng.random() == np.random.default_rng(3).random()  # nothing was drawn


def test_on_a_gpu_the_generator_is_seeded_by_the_one_on_the_host(monkeypatch):
    cupy = types.ModuleType("cupy")
    cupy.random = types.SimpleNamespace(
        Philox4x3210=lambda seed: seed, Generator=lambda bits: ("on the GPU", bits)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(backend, "is_cupy_array", lambda x: True)
    seeds = [generator_beside(np.zeros(1), np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[0] == ("on the GPU", np.random.default_rng(3).integers(2**63))
    assert generator_beside(np.zeros(1), "already there") == "already there"


@pytest.mark.parametrize(
    ("rng", "what"),
    [
        (None, "a NoneType"),
        (0, "an int"),
        (np.random, "a module"),
        (np.random.RandomState(0), "a RandomState"),
        (np.random.Generator, "the class Generator"),
    ],
)
def test_there_is_no_hidden_generator(rng, what):
    with pytest.raises(TypeError, match=f"^rng is {what}; expected a numpy"):
        standard_normal(rng, (2,), np.zeros(2))
