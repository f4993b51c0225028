"""Where new arrays are made, and the sentences that say why they cannot be."""

import re
import sys
import types

import array_api_strict as strict
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import tinydiff as td
from tinydiff.backend import BackendError, asarray_like, get_backend, standard_normal, to_numpy


def fake_cupy(count=0, count_error=None, launch_error=None):
    """A module that fails as CuPy does: in the driver call, in the first kernel, or by finding nothing."""

    def getDeviceCount():
        if count_error is not None:
            raise count_error
        return count

    def zeros(shape):
        if launch_error is not None:
            raise launch_error
        return np.zeros(shape)

    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.0.0"
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=getDeviceCount))
    cupy.zeros = zeros
    return cupy


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


@pytest.mark.parametrize("name", ["torch", "", "numpy1"])
def test_an_unknown_name_is_refused(name):
    message = message_of(get_backend, name)
    assert f"backend is {name!r}" in message
    assert "'numpy', 'cupy'" in message


def test_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = message_of(get_backend, "cupy")
    assert "pip install 'tinydiff[cuda12]'" in message
    assert "tinydiff[cuda13]" in message
    assert "TINYDIFF_BACKEND=numpy" in message


def test_cupy_is_broken(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text(
        'raise ImportError("\\n====\\nFailed to import CuPy.\\n\\nOriginal error: libcudart\\n====\\n")\n'
    )
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = message_of(get_backend, "cupy")
    assert "(Failed to import CuPy)" in message
    assert "pip install" in message


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"count": 0}, "sees no GPU"),
        ({"count_error": RuntimeError("cudaErrorNoDevice: no CUDA-capable device")}, "cudaErrorNoDevice"),
        ({"count": 1, "launch_error": RuntimeError("driver too old.\nmore")}, "(driver too old)"),
        ({"count": 1, "launch_error": RuntimeError()}, "(RuntimeError)"),
    ],
)
def test_cupy_without_a_usable_gpu(monkeypatch, fault, says):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**fault))
    monkeypatch.setenv("TINYDIFF_BACKEND", "cupy")
    message = message_of(get_backend)
    assert says in message
    assert "CuPy 14.0.0 is installed" in message
    assert "nvidia-smi" in message
    assert "TINYDIFF_BACKEND=numpy" in message


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
