"""The twins of every kernel, NumPy's and Numba's, against the portable definition, over random shapes.

In float64 they must agree to rounding; in float32 to a few units in the last place of the largest
numbers summed. A twin shares images out to threads and reuses scratch memory, so here too: the same
call gives the same bits, an earlier result is never overwritten, and no input is touched.
"""

import functools
import importlib
import importlib.util
import math
import operator
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from namespaces import space

import tinydiff.kernels
from tinydiff.backend import BackendError
from tinydiff.kernels import (
    _attention,
    _exponential,
    _gather,
    _linear,
    _norm,
    _threads,
    _winograd,
    kernels_for,
    portable,
    use,
)
from tinydiff.kernels import numpy as numpy_twin
from tinydiff.kernels._memory import empty
from tinydiff.kernels._threads import forget_scratch, in_parallel, scratch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs Numba, the extra `fast`")
ON_THE_CPU = ["numpy", pytest.param("numba", marks=needs_numba)]
for_each_twin_on_the_cpu = pytest.mark.parametrize("twin", ON_THE_CPU)
for_each_twin = pytest.mark.parametrize("twin", [*ON_THE_CPU, pytest.param("cupy", marks=pytest.mark.gpu)])


def module(twin):
    if twin == "cupy":
        space("cupy")  # or the test is skipped, with the reason
        return OnTheGpu()
    return importlib.import_module(f"tinydiff.kernels.{twin}")


class OnTheGpu:
    """The twin for CuPy, given NumPy's arrays and giving them back; what is kept for a backward stays there.

    An array that is not contiguous is not there either, nor aligned. No input may be changed but those that
    are to be.
    """

    def __getattr__(self, name):
        import cupy

        function = getattr(importlib.import_module("tinydiff.kernels.cupy"), name)

        def there(x):
            if not isinstance(x, np.ndarray):
                return x
            if x.flags.c_contiguous or not x.ndim:
                return cupy.array(x)
            if x.ndim == 1:
                spread = cupy.full((x.size, 2), cupy.nan, x.dtype)
                spread[:, 0] = cupy.array(x)
                return spread[:, 0]
            wide = cupy.full((*x.shape[:-1], x.shape[-1] + 3), cupy.nan, x.dtype)
            wide[..., 1:-2] = cupy.array(x)
            return wide[..., 1:-2]

        def here(y):
            return y.get() if isinstance(y, cupy.ndarray) else y

        def call(*args):
            given = [there(x) for x in args]
            result = function(*given)
            for x, was in zip(given, args):
                if isinstance(was, np.ndarray) and name not in ("adam_step", "ema_step"):
                    np.testing.assert_array_equal(x.get(), was, err_msg=f"{name} changed what it was given")
            return tuple(map(here, result)) if type(result) is tuple else here(result)

        return call


@pytest.fixture(scope="module", autouse=True)
def blas_threads():
    """As many as BLAS finds."""


dtypes = st.sampled_from([np.float64, np.float32])
seeds = st.integers(0, 2**32 - 1)


def assert_close(actual, expected, magnitude, dtype, tolerance=8):
    """Norm of the error at most `tolerance` units of rounding of `magnitude`.

    `magnitude` is the result with every term taken positive: what is summed, before anything cancels.
    """
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected) / (np.finfo(dtype).eps * np.linalg.norm(magnitude) + 1e-300)
    assert error <= tolerance, f"off by {error:.1f} units of rounding"


def normal(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


@st.composite
def convolutions(draw):
    """Arguments of conv2d and a dy, all lengths odd and even, channels on both sides of Winograd's limit."""
    k, stride, padding = draw(
        st.sampled_from(
            [
                (3, 1, (1, 1)),
                (3, 1, (0, 1)),
                (3, 1, (1, 0)),
                (3, 1, (2, 2)),
                (3, 1, (0, 0)),
                (3, 2, (1, 1)),
                (3, 2, (0, 1)),
                (1, 1, (0, 0)),
                (1, 2, (0, 0)),
                (5, 1, (2, 2)),
                (2, 2, (0, 0)),
            ]
        )
    )
    n, h, w = draw(st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 11)))
    channels = st.one_of(st.integers(1, 5), st.sampled_from([15, 16, 17, 24, 33]))
    c, d = draw(channels), draw(channels)
    assume(min(h, w) + sum(padding) >= k)
    dtype = draw(dtypes)
    rng = np.random.default_rng(draw(seeds))
    x, weight, b = normal(rng, (n, h, w, c), dtype), normal(rng, (k, k, c, d), dtype), normal(rng, d, dtype)
    h_out, w_out = ((size + sum(padding) - k) // stride + 1 for size in (h, w))
    dy = normal(rng, (n, h_out, w_out, d), dtype)
    return x, weight, b, stride, padding, dy, dtype


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Chunks of a few of the small images below, or of a part of one, so that boundaries are crossed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(_winograd, "CHUNK", 128)
    patch.setattr(_winograd, "PATCHES", 2)
    patch.setattr(_gather, "CHUNK_BYTES", 2**14)
    patch.setattr(_norm, "BLOCK_BYTES", 2**12)
    patch.setattr(_norm, "PARALLEL_SIZE", 0)
    patch.setattr(_attention, "BLOCK_BYTES", 2**11)
    patch.setattr(_attention, "PARALLEL_SIZE", 0)
    patch.setattr(_linear, "PARALLEL_PRODUCTS", 2**10)
    if HAS_NUMBA:
        patch.setattr("tinydiff.kernels._numba_winograd.CHUNK_BYTES", 36 * 33 * 4 * 5)
        patch.setattr("tinydiff.kernels._numba_norm.PARALLEL_SIZE", 0)
        patch.setattr("tinydiff.kernels._numba_silu.PARALLEL_SIZE", 0)
        patch.setattr("tinydiff.kernels.numba.BACKWARD_PATCHES", 0)
    yield
    patch.undo()


@for_each_twin
@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_conv2d(twin, arguments):
    twin = module(twin)
    x, w, b, stride, padding, dy, dtype = arguments
    actual = [
        twin.conv2d(x, w, b, stride, padding),
        *twin.conv2d_backward(x, w, dy, stride, padding),
    ]
    x, w, b, dy = (a.astype(np.float64) for a in (x, w, b, dy))
    expected, magnitude = (
        [
            portable.conv2d(f(x), f(w), f(b), stride, padding),
            *portable.conv2d_backward(f(x), f(w), f(dy), stride, padding),
        ]
        for f in (np.asarray, np.abs)
    )
    for values in zip(actual, expected, magnitude):
        assert_close(*values, dtype)


@for_each_twin
@pytest.mark.parametrize("c, d", [(16, 16), (4, 2), (2, 4)])
def test_conv2d_in_a_margin_wider_than_the_taps(twin, c, d):
    check_margin(module(twin), 2, c, d)


@for_each_twin_on_the_cpu
@pytest.mark.parametrize("c, d", [(16, 16), (4, 2), (2, 4)])
def test_conv2d_of_no_images_has_no_gradient(twin, c, d):
    check_margin(module(twin), 0, c, d)


@for_each_twin
@pytest.mark.parametrize("c, d", [(16, 16), (4, 4), (5, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_image_smaller_than_the_taps_has_no_outputs(twin, c, d, dtype):
    """Of no blocks CuPy launches one."""
    twin, rng = module(twin), np.random.default_rng(0)
    x, w, b = (normal(rng, shape, dtype) for shape in ((2, 2, 5, c), (3, 3, c, d), d))
    y = twin.conv2d(x, w, b, 1, (0, 0))
    assert y.shape == (2, 0, 3, d) and y.dtype == dtype
    for gradient, like in zip(twin.conv2d_backward(x, w, y, 1, (0, 0)), (x, w, b)):
        assert gradient.shape == like.shape and not gradient.any()


@for_each_twin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_no_images_nothing_is_computed(twin, dtype):
    """Of no blocks CuPy launches one, and no array of size 0 has a length that is to be found out."""

    def results(kernels):
        x, dy, heads = (np.zeros((0, *shape), dtype) for shape in ((4, 6, 8), (4, 6, 12), (2, 5, 4)))
        w, b, gains = (np.ones(shape, dtype) for shape in ((3, 3, 8, 12), 12, 8))
        (norm, normed), (o, attended) = (
            kernels.group_norm(x, gains, gains, 4, 1e-5),
            kernels.attention(heads, heads, heads, 0.5),
        )
        return [
            kernels.conv2d(x, w, b, 1, (1, 1)),
            *kernels.conv2d_backward(x, w, dy, 1, (1, 1)),
            kernels.upsample_conv2d(x[:, :2, :3], w, b),
            *kernels.upsample_conv2d_backward(x[:, :2, :3], w, dy),
            kernels.linear(x[:, 0, 0], w[0, 0], b),
            *kernels.linear_backward(x[:, 0, 0], w[0, 0], dy[:, 0, 0]),
            norm,
            *kernels.group_norm_backward(normed, gains, x),
            o,
            *kernels.attention_backward(attended, heads),
            kernels.silu(x)[0],
            kernels.silu_backward(x, x, x),
            kernels.sum_pixels(x),
        ]

    for found, expected in zip(results(module(twin)), results(portable)):
        np.testing.assert_array_equal(found, expected, strict=True)


def check_margin(twin, n, c, d):
    rng = np.random.default_rng(0)
    x, w, b = (normal(rng, shape, np.float64) for shape in ((n, 5, 6, c), (3, 3, c, d), d))
    dy = normal(rng, (n, 10, 11, d), np.float64)
    for padding in ((4, 3), (3, 4)):
        actual, expected = (
            [kernels.conv2d(x, w, b, 1, padding), *kernels.conv2d_backward(x, w, dy, 1, padding)]
            for kernels in (twin, portable)
        )
        for values in zip(actual, expected):
            np.testing.assert_allclose(*values, rtol=1e-10, atol=1e-10)


@for_each_twin
@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(*[st.sampled_from([1, 3, 16, 17, 33])] * 2),
    dtype=dtypes,
    seed=seeds,
)
def test_upsample_conv2d(twin, shape, channels, dtype, seed):
    """docs: A.26.  The doubled image is never made, so at its edges the padding must still be one zero."""
    twin = module(twin)
    rng = np.random.default_rng(seed)
    (n, h, w), (c, d) = shape, channels
    x, weight, b = (normal(rng, s, dtype) for s in ((n, h, w, c), (3, 3, c, d), (d,)))
    dy = normal(rng, (n, 2 * h, 2 * w, d), dtype)
    actual = [twin.upsample_conv2d(x, weight, b), *twin.upsample_conv2d_backward(x, weight, dy)]
    x, weight, b, dy = (a.astype(np.float64) for a in (x, weight, b, dy))
    expected, magnitude = (
        [
            portable.upsample_conv2d(f(x), f(weight), f(b)),
            *portable.upsample_conv2d_backward(f(x), f(weight), f(dy)),
        ]
        for f in (np.asarray, np.abs)
    )
    for values in zip(actual, expected, magnitude):
        assert_close(*values, dtype)


@for_each_twin
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_winograd_loses_few_digits(twin, channels):
    """In float32, y and dx are off by at most 3 times as much as the direct sum in order.  (docs: A.16)

    And by at most 7 times as much as the definition, whose sums are added up by the same BLAS. The points
    0, 1, -1, 2, -2 would lose 3.7 to 5.0 and 11 times as much.
    """
    twin = module(twin)
    rng = np.random.default_rng(channels)
    x, dy = normal(rng, (2, 1, 16, 16, channels), np.float32)
    w, b = normal(rng, (3, 3, channels, channels), np.float32), np.zeros(channels, np.float32)
    y, dx = twin.conv2d(x, w, b, 1, (1, 1)), twin.conv2d_backward(x, w, dy, 1, (1, 1))[0]
    for by_winograd, image, taps in ((y, x, w), (dx, dy, _gather.transposed_taps(w).copy())):
        exact = portable.conv2d(image.astype(np.float64), taps.astype(np.float64), b, 1, (1, 1))
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        in_order = np.zeros_like(image)
        for i, j, k in np.ndindex(3, 3, channels):
            in_order += padded[:, i : i + 16, j : j + 16, k, None] * taps[i, j, k]
        error = np.linalg.norm(by_winograd - exact)
        assert by_winograd.dtype == np.float32
        assert error <= 3 * np.linalg.norm(in_order - exact)
        assert error <= 7 * np.linalg.norm(portable.conv2d(image, taps, b, 1, (1, 1)) - exact)


@for_each_twin_on_the_cpu
def test_few_patches_are_not_cut(twin, monkeypatch):
    """Rows of small whole numbers add up exactly in float32, patches do not: whose points are fractions."""
    monkeypatch.setattr(_winograd, "PATCHES", 8)
    twin, rng = module(twin), np.random.default_rng(0)

    def exact(n, size):
        x, dy = (rng.integers(-9, 10, (n, size, size, 16)).astype(np.float32) for _ in range(2))
        w = rng.integers(-9, 10, (3, 3, 16, 16)).astype(np.float32)
        b = np.zeros(16, np.float32)
        actual, expected = (
            [kernels.conv2d(x, w, b, 1, (1, 1)), *kernels.conv2d_backward(x, w, dy, 1, (1, 1))[:2]]
            for kernels in (twin, portable)
        )
        return [np.array_equal(a, e) for a, e in zip(actual, expected)]

    assert exact(1, 8) == exact(7, 4) == exact(30, 1) == exact(40, 2) == [True, True, True]
    assert exact(2, 8) == exact(8, 4) == exact(2, 5) == [False, False, False]


@for_each_twin
@settings(deadline=None, max_examples=30)
@given(shape=st.tuples(*[st.integers(1, 9)] * 4), dtype=dtypes, seed=seeds)
def test_sum_pixels(twin, shape, dtype, seed):
    x = normal(np.random.default_rng(seed), (*shape[:3], shape[3] + 2), dtype)[..., 2:]
    exact = portable.sum_pixels(x.astype(np.float64))
    assert_close(module(twin).sum_pixels(x), exact, portable.sum_pixels(np.abs(x)), dtype)


@for_each_twin
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    h=st.integers(1, 8),
    w=st.integers(1, 8),
    groups=st.integers(1, 5),
    per_group=st.one_of(st.integers(1, 5), st.sampled_from([8, 16])),  # Numba's goes by sixteen channels
    offset=st.sampled_from([0.0, 30.0]),
    with_silu=st.booleans(),
    tanh=st.sampled_from([_exponential._by_tanh, _exponential._by_exp]),
    dtype=dtypes,
    seed=seeds,
)
def test_group_norm(twin, n, h, w, groups, per_group, offset, with_silu, tanh, dtype, seed):
    """Also far from zero: a variance taken as E x^2 - (E x)^2 would lose its digits at mean 30 sigma."""
    assume(h * w * per_group > 1)  # a single number has no variance: its gradient is rounding only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_norm, "one_plus_tanh", tanh)
        check_group_norm(twin, n, h, w, groups, per_group, offset, with_silu, dtype, seed)


def check_group_norm(twin, n, h, w, groups, per_group, offset, with_silu, dtype, seed):
    twin = module(twin)
    rng = np.random.default_rng(seed)
    c = groups * per_group
    x = normal(rng, (n, h, w, c), dtype) + dtype(offset)
    weight, bias, dy = normal(rng, c, dtype), normal(rng, c, dtype), normal(rng, (n, h, w, c), dtype)
    name = "group_norm_silu" if with_silu else "group_norm"
    eps = 1e-1 if h * w * per_group < 8 else 1e-5  # few numbers can be almost equal by chance
    actual, expected = [], []
    for kernels, cast, results in ((twin, dtype, actual), (portable, np.float64, expected)):
        given_arrays = [a.astype(cast) for a in (x, weight, bias)]
        y, saved = getattr(kernels, name)(*given_arrays, groups, eps)
        backward = getattr(kernels, name + "_backward")
        results += [y, *backward(saved, weight.astype(cast), dy.astype(cast))]
    x64 = x.astype(np.float64)
    _, (xhat, rstd) = portable.group_norm(x64, weight.astype(np.float64), bias, groups, eps)
    xhat, rstd = xhat.reshape(x.shape), np.repeat(rstd[..., 0], per_group, axis=3)
    magnitude = [
        xhat * weight,
        rstd * weight * dy,
        np.sum(np.abs(xhat * dy), (0, 1, 2)),
        np.abs(dy).sum((0, 1, 2)),
    ]
    magnitude[0] = np.abs(magnitude[0]) + np.abs(bias)
    lost = 1.0 + np.max(np.abs(x64) * rstd)  # xhat inherits the rounding of x, in units of the deviation
    for values in zip(actual, expected, magnitude):
        assert_close(*values, dtype, 10 * lost)


@pytest.mark.parametrize("twin", ["portable", *ON_THE_CPU])
@pytest.mark.parametrize("offset, allowed", [(0, 4e-6), (1e4, 1e-2)])
def test_group_norm_of_a_large_image_far_from_zero(twin, offset, allowed):
    """Numbers near 10,000 are 1e-3 apart; the mean of one sum over all pixels is wrong by 13."""
    x = (np.random.default_rng(0).standard_normal((1, 512, 512, 16)) + offset).astype(np.float32)
    weight, bias = np.ones(16, np.float32), np.zeros(16, np.float32)
    y, _ = module(twin).group_norm(x, weight, bias, 8, 1e-5)
    groups = x.astype(np.float64).reshape(-1, 8, 2)
    centred = groups - groups.mean(axis=(0, 2), keepdims=True)
    expected = centred / np.sqrt(np.mean(centred**2, axis=(0, 2), keepdims=True) + 1e-5)
    assert np.max(np.abs(y - expected.reshape(x.shape))) < allowed


@for_each_twin
@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu"])
@pytest.mark.parametrize(
    "apart",
    [lambda v: np.repeat(v, 2)[::2], lambda v: v[::-1], lambda v: np.broadcast_to(v[:1], v.shape)],
    ids=["strided", "backwards", "one number"],
)
def test_gains_and_shifts_may_lie_apart_in_memory(twin, name, apart):
    twin, rng = module(twin), np.random.default_rng(0)
    x, dy = normal(rng, (2, 2, 3, 5, 16), np.float64)
    weight, bias = map(apart, normal(rng, (2, 16), np.float64))
    found = []
    for kernels in (twin, portable):
        y, saved = getattr(kernels, name)(x, weight, bias, 4, 1e-5)
        found.append([y, *getattr(kernels, name + "_backward")(saved, weight, dy)])
    for actual, expected in zip(*found):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@for_each_twin
@settings(deadline=None, max_examples=60)
@given(
    lead=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    c=st.integers(1, 40),
    d=st.integers(1, 40),
    dtype=dtypes,
    seed=seeds,
)
def test_linear_and_silu(twin, lead, c, d, dtype, seed):
    twin = module(twin)
    rng = np.random.default_rng(seed)
    x, w, b = normal(rng, (*lead, c), dtype), normal(rng, (c, d), dtype), normal(rng, d, dtype)
    dy, dx = normal(rng, (*lead, d), dtype), normal(rng, (*lead, c), dtype)
    x64, w64, b64, dy64, dx64 = (a.astype(np.float64) for a in (x, w, b, dy, dx))
    absolute = [np.abs(a) for a in (x64, w64, b64, dy64)]
    assert_close(twin.linear(x, w, b), portable.linear(x64, w64, b64), portable.linear(*absolute[:3]), dtype)
    expected = portable.linear_backward(x64, w64, dy64)
    magnitude = portable.linear_backward(absolute[0], absolute[1], absolute[3])
    for values in zip(twin.linear_backward(x, w, dy), expected, magnitude):
        assert_close(*values, dtype)
    (y, s), (y64, s64) = twin.silu(8 * x), portable.silu(8 * x64)
    assert_close(y, y64, y64, dtype, 100)
    assert_close(s, s64, s64, dtype, 100)  # exp(-x) carries the rounding of x: |x| < 45 units
    assert_close(twin.silu_backward(s, y, dx), portable.silu_backward(s64, y64, dx64), dx64, dtype, 100)


@for_each_twin
@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 12),
    d=st.integers(1, 9),
    size=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    power=st.sampled_from([_exponential.Power(np.exp, 1.0), _exponential.Power(np.exp2, math.log2(math.e))]),
    narrow=st.sampled_from([4, 64]),
    likely=st.sampled_from([0.0, 100.0, math.inf]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention(twin, n, heads, length, d, size, power, narrow, likely, dtype, seed):
    """docs: A.23.  At size 30 whole rows of exp vanish under the bound, and the maximum must take its place.

    A score is rounded relative to the bound on it, and p by as much as its score is off. Which exponential is
    faster is the processor's affair; each must do, and whether the maximum is taken at once or when it turns
    out to be needed.
    """
    with pytest.MonkeyPatch.context() as patch:
        if twin == "cupy":  # both ways
            space("cupy")
            patch.setattr("tinydiff.kernels._cupy_attention.WIDEST", 4 if narrow == 4 else 32)
        patch.setattr(_exponential, "POWER", power)
        if twin == "numba":
            compiled = "tinydiff.kernels._numba_attention"
            if power.log_e == 1:
                power = power._replace(of=importlib.import_module(compiled).compiled_exp)
            patch.setattr(f"{compiled}.POWER", power)
        patch.setattr(_attention, "LIKELY", likely)
        patch.setattr(_attention, "NARROW", narrow)
        check_attention(twin, n, heads, length, d, size, dtype, seed)


def check_attention(twin, n, heads, length, d, size, dtype, seed):
    twin = module(twin)
    rng = np.random.default_rng(seed)
    views = (normal(rng, (n, length, heads, d), dtype).transpose(0, 2, 1, 3) for _ in range(4))
    q, k, v, do = views
    q, k, scale = q * dtype(size), k * dtype(size), d**-0.5
    o, saved = twin.attention(q, k, v, scale)
    actual = [o, *twin.attention_backward(saved, do)]
    q, k, v, do = (a.astype(np.float64) for a in (q, k, v, do))
    o, saved = portable.attention(q, k, v, scale)
    expected = [o, *portable.attention_backward(saved, do)]
    p = portable.softmax(q @ k.swapaxes(2, 3) * scale)
    dp = np.abs(do) @ np.abs(v).swapaxes(2, 3)
    ds = p * (dp + np.sum(p * dp, axis=3, keepdims=True)) * scale
    magnitude = [p @ np.abs(v), ds @ np.abs(k), ds.swapaxes(2, 3) @ np.abs(q), p.swapaxes(2, 3) @ np.abs(do)]
    bound = scale * np.linalg.norm(q, axis=3).max() * np.linalg.norm(k, axis=3).max()
    for a, e, m in zip(actual, expected, magnitude):
        assert_close(a, e, m * (1 + bound), dtype)


@for_each_twin
def test_attention_far_below_the_bound_keeps_its_digits(twin):
    """Below 1e-38 float32 has few digits left: there, too, the maximum takes the bound's place."""
    v = np.array([[[[1.0, 1.0], [0.0, 0.0]]]], np.float32)
    for bound in range(80, 111):  # the scores are 0 and -1/2
        q = np.array([[[[bound, 0.0]] * 2]], np.float32)
        k = np.array([[[[0.0, 1.0], [-0.5 / bound, 1.0]]]], np.float32)
        o, _ = module(twin).attention(q, k, v, 1.0)
        np.testing.assert_allclose(o, 1 / (1 + math.exp(-0.5)), rtol=1e-4, err_msg=f"bound {bound}")


@pytest.mark.parametrize(
    "exp2, exp, power, tanh",
    [
        ("X86_V4", "X86_V4", np.exp2, _exponential._by_tanh),
        ("AVX512_SKX", "AVX512_SKX", np.exp2, _exponential._by_tanh),
        ("baseline(X86_V2)", "X86_V3", np.exp, _exponential._by_exp),
        ("baseline(SSE SSE2 SSE3)", "FMA3 AVX2", np.exp, _exponential._by_exp),
        ("baseline(NEON)", "baseline(NEON)", np.exp, _exponential._by_tanh),
        ("", "", np.exp, _exponential._by_tanh),
    ],
)
def test_the_exponential_with_vectors_is_chosen(exp2, exp, power, tanh):
    chosen, log_e = _exponential._choose_power(exp2)
    assert chosen is power and chosen(log_e) == pytest.approx(math.e, rel=1e-15)
    assert _exponential._choose_tanh(exp) is tanh


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", [_exponential._by_tanh, _exponential._by_exp])
def test_one_plus_tanh(form, dtype):
    """Without a warning where exp overflows."""
    u = np.concatenate([np.linspace(-12, 12, 1001), [-1e4, 1e4, -0.0]]).astype(dtype)
    out = np.empty_like(u)
    with np.errstate(all="raise", under="ignore"):
        form(u, out)
    exact = 1 + np.tanh(u.astype(np.longdouble))
    assert np.all(np.abs(out - exact) <= 4 * np.finfo(dtype).eps)
    nan = np.array([np.nan], dtype)
    form(nan, nan)
    assert np.isnan(nan[0])


@for_each_twin
def test_a_score_that_is_not_a_number_stays_none(twin):
    """The trainer relies on seeing it; and the search for a smaller shift ends."""
    twin = module(twin)
    q, k, v = (normal(np.random.default_rng(0), (1, 2, 3, 4), np.float32) for _ in range(3))
    q[0, 1, 2, 3] = np.nan
    o, saved = twin.attention(q, k, v, 0.5)
    assert np.isnan(o[0, 1, 2]).all() and np.isfinite(o[0, 0]).all() and np.isfinite(o[0, 1, :2]).all()
    assert np.isnan(twin.attention_backward(saved, v)[1][0, 1]).all()


@pytest.mark.parametrize("twin", ["portable", "numpy", pytest.param("numba", marks=needs_numba)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [7, 40])
@pytest.mark.parametrize("channels", [1, 16])
def test_extreme_activations_are_finite_and_silent(twin, dtype, length, channels):
    """Where exp would overflow, sigmoid is 0 or 1, and nothing warns."""
    twin = module(twin)
    x = np.array([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], dtype)
    x = np.concatenate([np.full(length - 7, -1e30, dtype), x])
    with np.errstate(all="raise", under="ignore"):
        y, s = twin.silu(x)
    np.testing.assert_allclose(s[-7:], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-40)
    np.testing.assert_allclose(y[-7:], [0, 0, 0, 0, 100, 1e4, 1e30], rtol=1e-6, atol=1e-40)
    image = np.zeros((1, 1, 2, channels), dtype)
    image[0, 0, 0] = 1.0
    weight = np.full(channels, 1e4, dtype)
    with np.errstate(all="raise", under="ignore"):
        y, saved = twin.group_norm_silu(image, weight, np.zeros(channels, dtype), channels, 1e-5)
        dx, _, _ = twin.group_norm_silu_backward(saved, weight, np.ones_like(image))
    assert (y[0, 0, 1] == 0.0).all()
    assert np.isfinite(dx).all()


@np.errstate(over="ignore", invalid="ignore")
@for_each_twin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_comes_out(twin, dtype, bad):
    """One such number and the result holds one: the trainer stops at a loss that is not finite."""
    twin = module(twin)
    rng = np.random.default_rng(0)
    image, w, b = normal(rng, (2, 8, 8, 16), dtype), normal(rng, (3, 3, 16, 16), dtype), np.ones(16, dtype)
    rows = normal(rng, (3, 40), dtype)
    broken_image, broken_rows = image.copy(), rows.copy()
    broken_image[1, 5, 6, 7], broken_rows[1, 37] = bad, bad
    _, saved = twin.group_norm_silu(image, b, b, 4, 1e-5)
    s = twin.silu(rows)[1]
    results = [
        twin.conv2d(broken_image, w, b, 1, (1, 1)),
        *twin.conv2d_backward(broken_image, w, image, 1, (1, 1))[1:2],
        *twin.conv2d_backward(image, w, broken_image, 1, (1, 1)),
        twin.group_norm_silu(broken_image, b, b, 4, 1e-5)[0],
        *twin.group_norm_silu_backward(saved, b, broken_image),
        twin.silu(broken_rows)[0],
        twin.silu_backward(s, rows * s, broken_rows),
        twin.adam_step(rows.copy(), broken_rows, 0 * rows, 0 * rows, 0.1, 0.9, 0.99, 1.0, 1e-8, 1.0)[0],
        twin.ema_step(rows.copy(), broken_rows, 0.5),
    ]
    for result in results:
        assert not np.isfinite(result).all()
    np.testing.assert_array_equal(np.isfinite(results[5][0]), True)  # the other image is not touched


@for_each_twin
@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 70),
    decay=st.sampled_from([1.0, 0.99]),
    transposed=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_adam_and_ema(twin, size, decay, transposed, dtype, seed):
    twin = module(twin)
    rng = np.random.default_rng(seed)
    value, grad, m, v = (normal(rng, (3, size), dtype) for _ in range(4))
    v *= v
    if transposed:
        value, grad, m, v = (np.asfortranarray(a) for a in (value, grad, m, v))
    numbers = (0.1, 0.9, 0.99, 0.5, 1e-8, decay)
    expected = portable.adam_step(*(a.astype(np.float64) for a in (value, grad, m, v)), *numbers)
    average, rate = normal(rng, (3, size), dtype), 0.3
    expected_average = portable.ema_step(average.astype(np.float64), value.astype(np.float64), rate)
    actual_average = twin.ema_step(average, value, rate)
    for a, e in zip(
        [*twin.adam_step(value, grad, m, v, *numbers), actual_average], [*expected, expected_average]
    ):
        assert_close(a, e, np.abs(e) + 1, dtype)


@for_each_twin_on_the_cpu
def test_the_rates_of_adam_are_rounded_once(twin):
    """1 - 0.999 of rounded numbers is off by 1.3e-5, and the mean square by as much for ever."""
    grad = np.arange(1, 6, dtype=np.float32)
    _, m, v = module(twin).adam_step(0 * grad, grad, 0 * grad, 0 * grad, 0.1, 0.9, 0.999, 1.0, 1e-8, 1.0)
    np.testing.assert_allclose(m, 0.1 * grad.astype(np.float64), rtol=3e-7)
    np.testing.assert_allclose(v, 0.001 * grad.astype(np.float64) ** 2, rtol=3e-7)


@pytest.mark.parametrize("twin", ["portable", *ON_THE_CPU, pytest.param("cupy", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("beta1, beta2", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.0), (1e-9, 0.3)])
def test_adam_forgets_a_large_gradient_as_fast_as_it_is_told(twin, beta1, beta2):
    """v + (g^2 - v) is 0 for v = 1, g = 1e-4 in float32: the step, m / eps, was 10,000 times too long."""
    w, m, v = (np.zeros(3, np.float32) for _ in range(3))
    m64, v64 = 0.0, 0.0
    for grad in (1.0, 1e-4, 1e-4, 3e2, 1e-3):
        w, m, v = module(twin).adam_step(
            w, np.full(3, grad, np.float32), m, v, 1e-3, beta1, beta2, 1.0, 1e-8, 1.0
        )
        m64, v64 = beta1 * m64 + (1 - beta1) * grad, beta2 * v64 + (1 - beta2) * grad**2
        np.testing.assert_allclose(m, m64, rtol=1e-5)
        np.testing.assert_allclose(v, v64, rtol=1e-5)


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from([np.float32, np.float64, np.int64]),
    beside=st.integers(1, 100),
)
def test_arrays_that_begin_with_a_line_of_the_cache(shape, dtype, beside):
    kept = [np.empty(beside, np.uint8)]  # so that what is asked for next lies elsewhere
    for array in (empty(shape, np.dtype(dtype)), scratch("test", shape, np.dtype(dtype))):
        assert array.ctypes.data % 64 == 0
        assert array.shape == shape and array.dtype == dtype
        assert array.flags.writeable and array.flags.c_contiguous and type(array) is np.ndarray
        array[...] = 7
        kept.append(array)
    assert np.all(kept[1] == 7)


def test_scratch_is_let_go_in_every_thread():
    kept = []
    in_parallel(lambda start, stop: kept.append(weakref.ref(scratch("test", (3,), np.dtype(int)))), 100)
    assert all(array() is not None for array in kept)
    forget_scratch()
    in_parallel(lambda start, stop: None, 100)  # a Python without a lock frees a thread's arrays as it runs
    assert kept and all(array() is None for array in kept)


def test_threads_warn_of_what_their_caller_would_be_warned_of(monkeypatch):
    monkeypatch.setattr(_threads, "threads_in_reach", lambda: 2)
    for over in ("ignore", "raise"):
        with np.errstate(over=over):
            seen = in_parallel(lambda start, stop: np.geterr()["over"], 100)
        assert seen == [over] * len(seen)


@for_each_twin_on_the_cpu
@pytest.mark.parametrize("name", ["winograd", "strided", "upsample", "group_norm_silu"])
def test_images_begin_with_a_line_of_the_cache(twin, name):
    """Of what is returned, y and dx: others go through them many times."""
    inputs, (y, dx, *_) = calls()[name](np.random.default_rng(0), module(twin))
    kept = [inputs, y, dx]
    for _ in range(4):  # one address in four is such by chance
        inputs, (y, dx, *_) = calls()[name](np.random.default_rng(0), module(twin))
        kept += [inputs, y, dx]
        assert y.ctypes.data % 64 == dx.ctypes.data % 64 == 0


def calls():
    """Every kernel that owns scratch or threads, as functions of one seed."""

    def conv(k, stride, padding, c, d):
        def call(rng, kernels):
            x, w, b = (normal(rng, s, np.float32) for s in ((7, 6, 9, c), (k, k, c, d), (d,)))
            h, v = ((size + sum(padding) - k) // stride + 1 for size in (6, 9))
            both = normal(rng, (7, h, v, d + 3), np.float32)  # dy: part of a concatenation, not contiguous
            inputs = [x, w, b, both]
            y = kernels.conv2d(x, w, b, stride, padding)
            return inputs, [y, *kernels.conv2d_backward(x, w, both[..., :d], stride, padding)]

        return call

    def upsample(rng, kernels):
        x, w, b = (normal(rng, s, np.float32) for s in ((7, 3, 5, 16), (3, 3, 16, 18), (18,)))
        both = normal(rng, (7, 6, 10, 20), np.float32)
        y = kernels.upsample_conv2d(x, w, b)
        return [x, w, b, both], [y, *kernels.upsample_conv2d_backward(x, w, both[..., 1:19])]

    def norm(name, c):
        def call(rng, kernels):
            both = normal(rng, (7, 6, 9, c + 8), np.float32)
            weight, bias = normal(rng, c, np.float32), normal(rng, c, np.float32)
            inputs = [both, weight, bias]
            y, saved = getattr(kernels, name)(both[..., :c], weight, bias, 4, 1e-5)
            return inputs, [y, *getattr(kernels, name + "_backward")(saved, weight, both[..., 8:])]

        return call

    def rows(rng, kernels):
        x, w, b = (normal(rng, s, np.float32) for s in ((5, 9, 21), (21, 18), (18,)))
        both = normal(rng, (5, 9, 22), np.float32)
        inputs = [x, w, b, both]
        y = kernels.linear(both[..., 1:], w, b)
        parts = kernels.linear_backward(x, w, both[..., 4:])
        parts += kernels.silu(both[..., :18])
        parts += (kernels.silu_backward(both[..., :18], both[..., 1:19], both[..., 4:]),)
        return inputs, [y, *parts]

    def attention(rng, kernels):
        q, k, v, do = (normal(rng, (3, 2, 20, 4), np.float32) for _ in range(4))
        y, saved = kernels.attention(q, k, v, 0.5)
        return [q, k, v, do], [y, *kernels.attention_backward(saved, do)]

    return {
        "winograd": conv(3, 1, (1, 1), 16, 18),
        "upsample": upsample,
        "gather": conv(3, 1, (1, 1), 4, 5),
        "narrow": conv(3, 1, (1, 1), 18, 4),
        "strided": conv(3, 2, (0, 1), 16, 18),
        "attention": attention,
        "pointwise": conv(1, 1, (0, 0), 16, 18),
        "group_norm": norm("group_norm", 16),
        "group_norm_silu": norm("group_norm_silu", 32),
        "group_norm_silu, odd": norm("group_norm_silu", 12),
        "rows": rows,
    }


@for_each_twin
@pytest.mark.parametrize("name", calls())
def test_calls_do_not_disturb_one_another(twin, name):
    twin = module(twin)
    call = calls()[name]
    inputs, first = call(np.random.default_rng(0), twin)
    before = [a.copy() for a in first]
    call(np.random.default_rng(1), twin)
    for a, e in zip(first, before):
        np.testing.assert_array_equal(a, e, err_msg="a later call overwrote an earlier result")
    _again_inputs, again = call(np.random.default_rng(0), twin)
    for a, e in zip(again, first):
        np.testing.assert_array_equal(a, e, err_msg="the same call gave other bits")
    rng = np.random.default_rng(0)
    for given_array in inputs:
        np.testing.assert_array_equal(given_array, normal(rng, given_array.shape, np.float32))
    _, expected = call(np.random.default_rng(0), portable)
    for a, e in zip(first, expected):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * np.abs(e).max())


@for_each_twin_on_the_cpu
@pytest.mark.parametrize("name", calls())
def test_nothing_is_read_from_a_thread_s_scratch_when_it_is_done(twin, name, monkeypatch):
    """By then the thread may be at work for another caller: here all it had is spoilt."""
    twin, handed_out = module(twin), []
    scratch, in_parallel = _threads.scratch, _threads.in_parallel

    def noted(*args):
        array = scratch(*args)
        handed_out.append((threading.get_ident(), array))
        return array

    def spoiling(*args, **kwargs):
        results = in_parallel(*args, **kwargs)
        for thread, array in handed_out:
            if thread != threading.get_ident():
                array[...] = np.nan
                spoilt.append(array.size)
        return results

    spoilt = []
    call = calls()[name]
    with monkeypatch.context() as patch:
        patch.setattr(_threads, "threads_in_reach", lambda: 3)
        expected = call(np.random.default_rng(0), twin)[1]
        for kernels in [m for key, m in sys.modules.items() if key.startswith("tinydiff.kernels.")]:
            for attribute, wrapped in (("scratch", noted), ("in_parallel", spoiling)):
                if hasattr(kernels, attribute):
                    patch.setattr(kernels, attribute, wrapped)
        results = call(np.random.default_rng(0), twin)[1]
    for actual, wanted in zip(results, expected):
        np.testing.assert_array_equal(actual, wanted)
    if name in ("winograd", "gather", "strided") and _threads._blas:
        assert spoilt  # there were other threads, and they had scratch


@for_each_twin_on_the_cpu
@pytest.mark.parametrize("name", calls())
def test_what_was_in_memory_before_does_not_matter(twin, name, monkeypatch):
    """Scratch and results begin with whatever lies there: here it is not a number."""
    twin, call = module(twin), calls()[name]
    expected = call(np.random.default_rng(0), twin)[1]

    def spoilt(make):
        def made(*args):
            array = make(*args)
            array[...] = np.nan
            handed_out.append(array.size)
            return array

        return made

    handed_out = []
    with monkeypatch.context() as patch:
        for kernels in [m for key, m in sys.modules.items() if key.startswith("tinydiff.kernels.")]:
            for attribute in ("scratch", "empty"):
                if hasattr(kernels, attribute):
                    patch.setattr(kernels, attribute, spoilt(getattr(kernels, attribute)))
        results = call(np.random.default_rng(0), twin)[1]
    assert handed_out
    for actual, wanted in zip(results, expected):
        np.testing.assert_array_equal(actual, wanted)


@for_each_twin_on_the_cpu
def test_kernels_called_from_several_threads_at_once(twin):
    """Scratch belongs to a thread, and one parallel region runs at a time."""
    twin = module(twin)
    call = calls()["winograd"]
    expected = [call(np.random.default_rng(seed), twin)[1] for seed in range(4)]
    results = [None] * 4

    def work(seed):
        for _ in range(20):
            results[seed] = call(np.random.default_rng(seed), twin)[1]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected):
        for a, e in zip(actual, wanted):
            np.testing.assert_array_equal(a, e)


def test_shares_cover_the_range_in_order_and_errors_come_out():
    for n in range(20):
        shares = _threads.in_parallel(lambda start, stop: list(range(start, stop)), n)
        assert functools.reduce(operator.iadd, shares, []) == list(range(n))

    def fail(start, stop):
        if stop == 10:
            raise MemoryError("no room")

    threads = _threads._blas[0]() if _threads._blas else 1
    with pytest.raises(MemoryError, match="no room"):
        _threads.in_parallel(fail, 10)
    if _threads._blas:
        assert _threads._blas[0]() == threads, "BLAS was not given its threads back"


def test_openblas_is_found_beside_numpy_where_its_module_does_not_lead_there(monkeypatch):
    """On Windows a module does not hand on what it is linked to."""
    if not list((Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")):
        pytest.skip("NumPy did not bring OpenBLAS in a folder beside it")
    before = _threads._blas[0]()
    for module in (SimpleNamespace(__file__="nowhere"), SimpleNamespace(__file__=None), None):
        monkeypatch.setitem(sys.modules, "numpy._core._multiarray_umath", module)
        get, put = _threads._openblas()
        put(before)  # the same library: what NumPy multiplies with
        assert get() == before == _threads._blas[0]()


def test_threads_of_a_program_go_side_by_side_where_each_kernel_has_one(monkeypatch):
    """They wait for each other where kernels share work out, and only there."""
    monkeypatch.setattr(_threads, "threads_in_reach", lambda: 1)
    met = threading.Barrier(2, timeout=20)
    calls = [threading.Thread(target=in_parallel, args=(lambda start, stop: met.wait(), 4)) for _ in "ab"]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    assert not met.broken


@pytest.mark.skipif(not _threads._blas, reason="needs a BLAS whose threads can be counted")
@for_each_twin_on_the_cpu
def test_a_layer_wakes_a_thread_where_it_has_work_for_one(twin, monkeypatch):
    """Neither it nor BLAS is given a second one where there is a multiplication too few."""
    K, rng = module(twin), np.random.default_rng(0)
    x, w, b = (normal(rng, shape, np.float32) for shape in [(3, 4, 4, 16), (3, 3, 16, 16), (16,)])
    rows, matrix, dy = normal(rng, (6, 144), np.float32), w.reshape(144, 16), normal(rng, (6, 16), np.float32)
    asked = []
    monkeypatch.setattr(_threads, "threads_in_reach", lambda: 2)
    begin, blas_threads = _threads._begin, _threads._blas[0]

    def noted(*args):
        asked.append(args)
        return begin(*args)

    monkeypatch.setattr(_threads, "_begin", noted)
    for call, pixels in [
        (lambda: K.conv2d(x, w, b, 1, (1, 1)), 48),
        (lambda: K.conv2d_backward(x, w, x, 1, (1, 1)), 48),
        (lambda: K.conv2d(x, w, b, 2, (1, 1)), 12),
        (lambda: K.conv2d(x[..., :8].copy(), w[:, :, :8, :4].copy(), b[:4], 1, (1, 1)), 6),
        (lambda: K.upsample_conv2d(x, w, b), 192),
        (lambda: K.upsample_conv2d_backward(x, w, x.repeat(2, 1).repeat(2, 2)), 192),
        (lambda: K.linear(rows, matrix, b), 6),
        (lambda: K.linear(rows.reshape(2, 3, 144), matrix, b), 6),
        (lambda: K.linear_backward(rows, matrix, dy), 6),
        (lambda: K.linear_backward(rows.reshape(2, 3, 144), matrix, dy.reshape(2, 3, 16)), 6),
    ]:
        for limit, woken in [(pixels * w.size, True), (pixels * w.size + 1, False)]:
            monkeypatch.setattr(_linear, "PARALLEL_PRODUCTS", limit)
            asked.clear()
            call()
            assert bool(asked) == woken
    # Of BLAS, too, while work that was not shared runs; what cannot be shared it may share itself.
    before = blas_threads()
    assert _threads.in_parallel(lambda start, stop: blas_threads(), 2, False) == [1]
    assert _threads.in_parallel(lambda start, stop: blas_threads(), 1, False) == [before]


@pytest.mark.skipif(importlib.util.find_spec("array_api_strict") is None, reason="needs array-api-strict")
@settings(deadline=None, max_examples=30)
@given(convolutions())
def test_definition_is_portable(arguments):
    """The definition under array-api-strict: the same numbers as under NumPy, and its own module."""
    import array_api_strict as strict

    x, w, b, stride, padding, dy, _ = arguments
    sx, sw, sb, sdy = (strict.asarray(a) for a in (x, w, b, dy))
    assert kernels_for(sx) is portable
    assert kernels_for(x) is use()
    np.testing.assert_array_equal(
        np.asarray(portable.conv2d(sx, sw, sb, stride, padding)), portable.conv2d(x, w, b, stride, padding)
    )
    results = zip(
        portable.conv2d_backward(sx, sw, sdy, stride, padding),
        portable.conv2d_backward(x, w, dy, stride, padding),
    )
    for a, e in results:
        np.testing.assert_array_equal(np.asarray(a), e)
    c = x.shape[3]
    y, saved = portable.group_norm_silu(sx, sw[0, 0, :, 0], sw[0, 0, :, 0], c, 1e-5)
    expected, _ = portable.group_norm_silu(x, w[0, 0, :, 0], w[0, 0, :, 0], c, 1e-5)
    np.testing.assert_array_equal(np.asarray(y), expected)
    assert portable.group_norm_silu_backward(saved, sw[0, 0, :, 0], sx)[0].dtype == sx.dtype


@pytest.fixture
def chosen_again(monkeypatch):
    """Forget which twin is in use, and remember it after the test."""
    monkeypatch.setattr(tinydiff.kernels, "_twin", None)
    monkeypatch.delenv("TINYDIFF_KERNELS", raising=False)


def test_numpy_is_the_default_and_an_unknown_twin_is_refused(chosen_again, monkeypatch):
    assert kernels_for(np.zeros(1)) is numpy_twin
    with pytest.raises(BackendError, match=r"name is 'fortran': set it to one of 'numpy', 'numba'\."):
        use("fortran")
    with pytest.raises(BackendError, match=r"name is '1': set it to one of 'numpy', 'numba'\."):
        use(1)
    assert kernels_for(np.zeros(1)) is numpy_twin
    monkeypatch.setattr(tinydiff.kernels, "_twin", None)
    monkeypatch.setenv("TINYDIFF_KERNELS", "fortran")
    with pytest.raises(BackendError, match="TINYDIFF_KERNELS is 'fortran'"):
        kernels_for(np.zeros(1))


def test_the_twin_for_a_gpu_is_the_default_there(monkeypatch):
    fake = object()
    monkeypatch.setitem(sys.modules, "tinydiff.kernels.cupy", fake)
    monkeypatch.setattr(tinydiff.kernels, "is_cupy_array", lambda x: x is fake)
    for said, expected in [("", fake), ("cupy", fake), (" Portable", portable)]:
        monkeypatch.setenv("TINYDIFF_CUPY_KERNELS", said)
        monkeypatch.setattr(tinydiff.kernels, "_on_gpu", None)
        assert kernels_for(fake) is expected


def test_an_unknown_twin_for_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(tinydiff.kernels, "_on_gpu", None)
    with pytest.raises(BackendError, match=r"name is 'cuda': set it to one of 'cupy', 'portable'\."):
        tinydiff.kernels.use_on_gpu("cuda")
    with pytest.raises(BackendError, match=r"name is '1': set it to one of 'cupy', 'portable'\."):
        tinydiff.kernels.use_on_gpu(1)
    monkeypatch.setenv("TINYDIFF_CUPY_KERNELS", "cuda")
    with pytest.raises(BackendError, match="TINYDIFF_CUPY_KERNELS is 'cuda'"):
        tinydiff.kernels.use_on_gpu()


@needs_numba
def test_numba_is_chosen_by_the_environment_or_by_name(chosen_again, monkeypatch):
    monkeypatch.setenv("TINYDIFF_KERNELS", "Numba")
    assert kernels_for(np.zeros(1)) is module("numba")
    assert use("numpy") is numpy_twin
    assert kernels_for(np.zeros(1)) is numpy_twin
    assert use() is module("numba")


def test_without_numba_the_message_says_what_to_do(chosen_again, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("tinydiff.kernels") and "numba" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r'pip install "tinydiff\[fast\]", or set TINYDIFF_KERNELS=numpy'):
        use("numba")
    assert kernels_for(np.zeros(1)) is numpy_twin


def test_numba_is_not_imported_unasked():
    code = "import sys, numpy, tinydiff; tinydiff.kernels.kernels_for(numpy.zeros(1)); "
    code += "print('numba' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "TINYDIFF_KERNELS"}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert shown.stdout.strip() == "False"


@needs_numba
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_and_sigmoid_of_vectors(dtype):
    """exp to 1 unit in the last place and over all its range, and the sigmoid made of it.  docs: A.25"""
    from tinydiff.kernels._numba_attention import compiled_exp

    low = float(np.log(np.finfo(dtype).tiny))
    x = np.concatenate([np.linspace(low, 0, 100_000), -np.logspace(-30, 0, 100_000)]).astype(dtype)
    y = np.empty_like(x)
    compiled_exp(x, y)
    exact = np.exp(x.astype(np.longdouble))
    error = np.abs(y - exact) / (np.finfo(dtype).eps * exact)
    # Apple's ARM and Windows have no longer numbers than float64: there `exact` is rounded itself.
    rounded = 0.5 if np.finfo(np.longdouble).eps == np.finfo(dtype).eps else 0
    assert error[y >= np.finfo(dtype).tiny].max() < 1 + rounded
    edges = np.array([-np.inf, -800, 800, np.inf, np.nan, 0] * 9, dtype)  # more than whole vectors
    compiled_exp(edges, edges)
    np.testing.assert_array_equal(edges, [0, 0, np.inf, np.inf, np.nan, 1] * 9)
    _, s = module("numba").silu(np.concatenate([x, -x]))
    exact = 1 / (1 + np.concatenate([1 / exact, exact]))
    assert (np.abs(s - exact) / (np.finfo(dtype).eps * exact)).max() < 3


@needs_numba
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (2, 0)])
def test_gradients_over_few_patches_are_gathered(padding, monkeypatch):
    """Whose sums Winograd's rounding would spoil (docs: A.24): another way, with the same numbers."""
    twin, rng = module("numba"), np.random.default_rng(0)
    monkeypatch.setattr(twin, "BACKWARD_PATCHES", 10**9)
    monkeypatch.setattr(twin, "_winograd_backward", None)
    x, w = normal(rng, (3, 9, 7, 16), np.float64), normal(rng, (3, 3, 16, 18), np.float64)
    dy = normal(rng, (3, 7 + sum(padding), 5 + sum(padding), 20), np.float64)[..., 1:19]  # not contiguous
    results = (kernels.conv2d_backward(x, w, dy, 1, padding) for kernels in (twin, portable))
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    x, dy = x[:, :4, :4], normal(rng, (3, 8, 8, 18), np.float64)
    results = (kernels.upsample_conv2d_backward(x, w, dy) for kernels in (twin, portable))
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


IMAGE, TWICE, TAPS = (2, 8, 8, 16), (2, 16, 16, 16), (3, 3, 16, 16)


@needs_numba
@pytest.mark.parametrize(
    ("name", "shapes", "numbers"),
    [
        ("conv2d", (IMAGE, TAPS, 16), (1, (1, 1))),
        ("conv2d_backward", (IMAGE, TAPS, IMAGE), (1, (1, 1))),
        ("upsample_conv2d", (IMAGE, TAPS, 16), ()),
        ("upsample_conv2d_backward", (IMAGE, TAPS, TWICE), ()),
        ("group_norm", (IMAGE, 16, 16), (4, 1e-5)),
        ("group_norm_silu", (IMAGE, 16, 16), (4, 1e-5)),
        ("group_norm_backward", (IMAGE, 16, IMAGE), ()),
        ("group_norm_silu_backward", (IMAGE, 16, IMAGE), ()),
        ("silu_backward", (IMAGE, IMAGE, IMAGE), ()),
        ("adam_step", (IMAGE, IMAGE, IMAGE, IMAGE), (0.1, 0.9, 0.99, 1.0, 1e-8, 1.0)),
        ("ema_step", (IMAGE, IMAGE), (0.3,)),
    ],
)
def test_arrays_of_two_precisions_go_to_the_numpy_twin(name, shapes, numbers):
    """The kernels are compiled for one. Each argument in turn is of the other."""
    twin = module("numba")

    def result(kernels, odd):
        rng = np.random.default_rng(0)
        x, *rest = (
            np.abs(normal(rng, shape, np.float64 if i == odd else np.float32))
            for i, shape in enumerate(shapes)
        )
        if name.startswith("group_norm") and name.endswith("backward"):
            forward, ones = getattr(numpy_twin, name.removesuffix("_backward")), np.ones(16, x.dtype)
            x = forward(x, ones, ones, 4, 1e-5)[1]  # what is saved has the same form in both
        found = getattr(kernels, name)(x, *rest, *numbers)
        return found if type(found) is tuple else (found,)

    for odd in range(len(shapes)):
        for actual, expected in zip(result(twin, odd), result(numpy_twin, odd)):
            if isinstance(actual, np.ndarray):  # not what is saved
                np.testing.assert_array_equal(actual, expected, strict=True)


@needs_numba
def test_vectors_are_of_neighbours_in_memory_or_not_compiled():
    import numba

    from tinydiff.kernels._numba_lanes import LANES, load, store

    @numba.njit
    def copy(x, y):
        store(y, 0, load(x, 0))

    x, y = np.arange(LANES, dtype=np.float32), np.zeros(2 * LANES, np.float32)
    copy(x, y)
    np.testing.assert_array_equal(y, np.append(x, 0 * x))
    for apart in ((y[::2], y), (x, y[::2]), (x, y.reshape(2, LANES))):
        with pytest.raises(numba.TypingError):
            copy(*apart)


@needs_numba
def test_dividing_by_zero_is_no_exception():
    image, one = np.ones((1, 2, 2, 16), np.float32), np.ones(16, np.float32)
    y, _ = module("numba").group_norm(image, one, one, 4, 0.0)  # 0 times 1/0
    assert np.isnan(y).all()


@needs_numba
def test_what_is_compiled_is_kept_until_any_file_of_it_changes():
    """Numba looks at a function's own file; the others are compiled into it."""
    from tinydiff.kernels import _numba_jit, _numba_norm

    stamp = _numba_norm._forward._cache._cache_file._source_stamp
    files = {name: rest for name, *rest in stamp}
    for name in ("exp", "jit", "lanes", "norm", "optim", "silu", "winograd"):
        file = Path(_numba_jit.__file__).with_name(f"_numba_{name}.py")
        assert files[file.name] == [file.stat().st_mtime, file.stat().st_size]


@needs_numba
def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch):
    from tinydiff.kernels import _numba_jit

    njit = _numba_jit.njit

    def nowhere(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(_numba_jit, "njit", nowhere)
    assert _numba_jit.jit(lambda x: x + 1)(2) == 3


# The CuPy twin's own


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1025, 3), (2600, 40), (5, 700, 33), (2, 3, 1100, 1)])
def test_sums_over_rows_on_the_gpu(shape, dtype):
    """Also where the rows are shared out between blocks; twice, the same bits."""
    space("cupy")
    import cupy

    from tinydiff.kernels._cupy_sums import over_rows

    x = normal(np.random.default_rng(0), shape, dtype)
    there = cupy.array(x)
    y = over_rows(there).get()
    assert_close(y, x.astype(np.float64).sum(axis=-2), np.abs(x).sum(axis=-2), dtype)
    np.testing.assert_array_equal(over_rows(there).get(), y)


@pytest.mark.gpu
@pytest.mark.parametrize("found", [True, False], ids=["asked directly", "not found"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_on_the_gpu(dtype, found, monkeypatch):
    """Of matrices and of many, transposed, without terms or rows; where cuBLAS is not found, by CuPy."""
    space("cupy")
    from tinydiff.kernels import _cupy_products

    if not found:
        monkeypatch.setattr(_cupy_products, "_library", lambda: None)
    rng = np.random.default_rng(0)
    for lead, (m, k, n) in [
        ((), (5, 7, 3)),
        ((4,), (6, 2, 9)),
        ((), (1, 33, 1)),
        ((), (3, 0, 2)),
        ((), (0, 3, 2)),
        ((2,), (3, 2, 0)),
        ((0,), (3, 2, 4)),
    ]:
        for ta, tb, scale in [
            (False, False, 1.0),
            (True, False, -2.0),
            (False, True, 0.5),
            (True, True, 1.0),
        ]:
            a = normal(rng, (*lead, k, m) if ta else (*lead, m, k), dtype)
            b = normal(rng, (*lead, n, k) if tb else (*lead, k, n), dtype)
            c = _cupy_products.product(there(a), there(b), ta=ta, tb=tb, scale=scale)
            factors = (np.swapaxes(x, -1, -2) if t else x for x, t in ((a, ta), (b, tb)))
            x, y = (factor.astype(np.float64) for factor in factors)
            assert_close(c.get(), scale * (x @ y), abs(scale) * (abs(x) @ abs(y)), dtype)
    other = np.float32 if dtype == np.float64 else np.float64
    for shape, shape_b, dtype_b in [
        ((2, 3), (4, 2), dtype),
        ((2, 3, 4), (3, 4, 3), dtype),
        ((2, 3), (3, 2), other),
    ]:
        with pytest.raises(ValueError, match="no product of"):
            _cupy_products.product(there(np.zeros(shape, dtype)), there(np.zeros(shape_b, dtype_b)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2**31, 1), (2**31, 1, 1)])
def test_a_product_that_cublas_cannot_count_is_refused(monkeypatch, shape):
    """Rows, or matrices; a number of 32 bits would be cut."""
    space("cupy")
    from tinydiff.kernels import _cupy_products

    monkeypatch.setattr(_cupy_products, "cupy", SimpleNamespace(ascontiguousarray=lambda x: x))
    a = SimpleNamespace(shape=shape, dtype=np.dtype(np.float32))
    b = SimpleNamespace(shape=(*shape[:-2], 1, 1), dtype=np.dtype(np.float32))
    with pytest.raises(MemoryError, match=rf"a product of \({2**31}, .*take a smaller batch"):
        _cupy_products.product(a, b)


@pytest.mark.gpu
def test_a_product_of_factors_that_lie_apart_in_memory():
    space("cupy")
    from tinydiff.kernels import _cupy_products

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((10, 7)), rng.standard_normal((7, 6))
    for rows, columns in [(slice(None, None, 2), slice(None)), (slice(5), slice(3))]:
        c = _cupy_products.product(there(a)[rows], there(b)[:, columns])
        np.testing.assert_allclose(c.get(), a[rows] @ b[:, columns], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_threads_take_the_cublas_handles_of_those_that_have_ended(monkeypatch):
    """A server may ask every time in a new thread, and a handle is never destroyed."""
    space("cupy")
    from tinydiff.kernels import _cupy_products

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product keeps CuPy's handles")
    monkeypatch.setattr(_cupy_products, "_idle", {})
    library, made, found, workspaces = _cupy_products._library(), [], [], []
    create, both = library.cublasCreate_v2, threading.Barrier(2, timeout=60)
    monkeypatch.setattr(library, "cublasCreate_v2", lambda handle: made.append(1) or create(handle))

    def ask():
        found.append(_cupy_products.product(there(np.ones((2, 3))), there(np.ones((3, 2)))).get())
        workspaces.append(len(_cupy_products._own().workspaces))
        both.wait()  # so that neither has ended before the other begins

    for _ in range(3):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6 and all((c == 3).all() for c in found)
    assert workspaces == [1] * 6
    assert len(made) == 2
    (idle,) = _cupy_products._idle.values()
    assert [handle.workspaces for handle in idle] == [{}, {}]  # their memory went back to CuPy's pool


@pytest.mark.gpu
def test_a_stream_whose_workspace_was_taken_gets_another():
    """It may be another stream by the same name."""
    space("cupy")
    import cupy

    from tinydiff.kernels import _cupy_products

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product keeps CuPy's handles")
    taken = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):
            _cupy_products.product(there(np.ones((2, 3))), there(np.ones((3, 2))))
            taken.append(_cupy_products.workspace_of(stream.ptr))
        stream.synchronize()
    assert None not in taken and _cupy_products.workspace_of(stream.ptr) is None


@pytest.mark.gpu
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize(
    ("dtype", "of_cupy", "name"),
    [
        (np.float32, 0, "COMPUTE_32F"),
        (np.float32, 7, "COMPUTE_32F_FAST_TF32"),
        (np.float64, 7, "COMPUTE_64F"),
    ],
)
def test_products_round_their_factors_if_cupy_is_told_so(monkeypatch, lead, dtype, of_cupy, name):
    """CUPY_TF32=1 is 7 in CuPy; whether cuBLAS makes use of it depends on the GPU and on the shape."""
    space("cupy")
    from tinydiff.kernels import _cupy_products

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product heeds CUPY_TF32 itself")
    monkeypatch.setattr(_cupy_products, "get_compute_type", lambda kind: of_cupy)
    library, routine = _cupy_products._library(), "cublasGemmStridedBatchedEx" if lead else "cublasGemmEx"
    asked, multiply = [], getattr(library, routine)
    monkeypatch.setattr(library, routine, lambda *args: asked.append(args[-2]) or multiply(*args))
    _cupy_products.product(*(there(np.ones((*lead, 4, 4), dtype)) for _ in range(2)))
    assert asked == [getattr(_cupy_products, name)]


@pytest.mark.gpu
@pytest.mark.parametrize(("status", "memory"), [(1, True), (3, True), (14, False)])
def test_a_cublas_that_finds_no_memory_says_so(status, memory, monkeypatch):
    """Asked directly, it returns a number; who looks for a smaller batch looks for a name."""
    space("cupy")
    from tinydiff.kernels import _cupy_products
    from tinydiff.memory import is_out_of_memory

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product says it itself")
    monkeypatch.setattr(_cupy_products, "_mine", threading.local())  # a thread without a handle
    monkeypatch.setattr(_cupy_products, "_idle", {})  # and none to be had
    monkeypatch.setattr(_cupy_products._library(), "cublasCreate_v2", lambda handle: status)
    with pytest.raises(RuntimeError, match=rf"^cublasCreate returned {status} ") as caught:
        _cupy_products.product(there(np.ones((2, 2))), there(np.ones((2, 2))))
    assert is_out_of_memory(caught.value) is memory


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_end_to_end_on_the_gpu(dtype, monkeypatch):
    """By one launch; and without one, as a view, where all lies so already."""
    space("cupy")
    import cupy

    from tinydiff.kernels import use_on_gpu
    from tinydiff.kernels.cupy import end_to_end

    monkeypatch.setattr(tinydiff.kernels, "_on_gpu", None)
    assert (
        use_on_gpu("cupy") is kernels_for(cupy.zeros(1)) is importlib.import_module("tinydiff.kernels.cupy")
    )
    assert use_on_gpu("portable") is kernels_for(cupy.zeros(1)) is portable
    rng = np.random.default_rng(0)
    arrays = [normal(rng, s, dtype) for s in ((3, 4), (), (5000,), (1,), (70, 70), (2, 0))]
    there = [cupy.array(a) for a in arrays]
    there[4] = cupy.array(arrays[4].T).T  # not contiguous
    flat = end_to_end(there)
    np.testing.assert_array_equal(flat.get(), np.concatenate([a.ravel() for a in arrays]))
    parts = [flat[:12].reshape(3, 4), flat[12:13].reshape(()), flat[13:]]
    assert end_to_end(parts).data.ptr == flat.data.ptr
    assert end_to_end(parts[1:]).size == flat.size - 12
    np.testing.assert_array_equal(end_to_end([parts[0], parts[2]]).get(), np.delete(flat.get(), 12))
    np.testing.assert_array_equal(end_to_end(parts[::-1])[-12:].get(), parts[0].ravel().get())


@pytest.mark.gpu
@pytest.mark.parametrize("with_silu", [False, True], ids=["alone", "with SiLU"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("h", "groups", "per_group"),
    [(2, 1, 130), (2, 2, 256), (2, 1, 257), (3, 131, 2), (23, 2, 4), (5, 1, 200)],
)
def test_wide_and_tall_groups_on_the_gpu(h, groups, per_group, dtype, with_silu):
    """Channels for one row of a block's threads, for all of them, for more than there are; many pixels.

    And so many narrow groups that a block cannot have all, nor, since they are a prime number, a part.
    """
    check_group_norm("cupy", 2, h, h, groups, per_group, 1.0, with_silu, dtype, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("odd", range(3))
@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu"])
def test_a_norm_of_two_precisions_on_the_gpu(name, odd):
    """The kernel is compiled for one, and would read past the end of the others."""
    rng, results = np.random.default_rng(0), []
    given_arrays = [
        normal(rng, shape, np.float64 if i == odd else np.float32)
        for i, shape in enumerate([(2, 3, 4, 8), 8, 8])
    ]
    dy = normal(rng, (2, 3, 4, 8), np.float64)
    for kernels in (module("cupy"), portable):
        y, saved = getattr(kernels, name)(*given_arrays, 4, 1e-5)
        results.append([y, *getattr(kernels, name + "_backward")(saved, given_arrays[1], dy)])
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def on_the_gpu_and_defined(compute, arrays, dtype, times=1):
    """Each result of `compute`, by CuPy's kernels in `dtype` and, last, by the definition in float64."""
    twins = [(module("cupy"), dtype)] * times + [(portable, np.float64)]
    return zip(*(compute(kernels, *(a.astype(cast) for a in arrays)) for kernels, cast in twins))


def attention_and_gradients(kernels, q, k, v, do, scale):
    o, saved = kernels.attention(q, k, v, scale)
    return [o, *kernels.attention_backward(saved, do)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("length", "d"), [(64, 8), (65, 8), (130, 3), (63, 32), (40, 33)])
def test_long_attention_on_the_gpu(length, d, dtype):
    """More queries and keys than a block has; and a head too wide for its threads.  Twice, the same bits."""
    rng, compute = np.random.default_rng(0), functools.partial(attention_and_gradients, scale=d**-0.5)
    arrays = [normal(rng, (2, length, 3, d), dtype).transpose(0, 2, 1, 3) for _ in range(4)]
    for actual, again, expected in on_the_gpu_and_defined(compute, arrays, dtype, times=2):
        error = np.linalg.norm(actual - expected)
        assert error <= 40 * np.finfo(dtype).eps * np.linalg.norm(expected)
        np.testing.assert_array_equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_keys_than_queries_on_the_gpu(dtype):
    """Of narrow heads, whose own kernel takes as many of both."""
    rng, compute = np.random.default_rng(0), functools.partial(attention_and_gradients, scale=0.5)
    arrays = [normal(rng, (2, 3, length, 4), dtype) for length in (5, 9, 9, 5)]
    for actual, expected in on_the_gpu_and_defined(compute, arrays, dtype):
        assert np.linalg.norm(actual - expected) <= 40 * np.finfo(dtype).eps * np.linalg.norm(expected)


@pytest.fixture
def tensor_cores(monkeypatch):
    """The file of convolutions by tensor cores, and how to set it up: float32 or TF32, and as on what GPU."""
    space("cupy")
    from tinydiff.kernels import _cupy_conv

    def set_up(tf32, enough, shared):
        monkeypatch.setattr(_cupy_conv, "is_tf32", lambda: tf32)
        monkeypatch.setattr(_cupy_conv, "ENOUGH", enough)
        monkeypatch.setattr(_cupy_conv, "_device", lambda number: (True, shared))
        kernel = _cupy_conv._kernel

        def within(device, source, name, size, **sizes):
            assert size <= shared
            return kernel(device, source, name, size, **sizes)

        monkeypatch.setattr(_cupy_conv, "_kernel", within)
        return _cupy_conv

    return set_up


LARGE, SMALL = 232_448, 101_376  # bytes of shared memory that a block may have: of an H100, of an RTX 4090


def convolution_and_gradients(kernels, x, w, b, dy, stride=1, padding=(1, 1), doubled=False):
    how = () if doubled else (stride, padding)
    name = "upsample_conv2d" if doubled else "conv2d"
    y = getattr(kernels, name)(x, w, b, *how)
    return [y, *getattr(kernels, name + "_backward")(x, w, dy, *how)]


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
@pytest.mark.parametrize(
    ("enough", "shared"), [(1, LARGE), (1, SMALL), (10**9, LARGE)], ids=["high", "two stages", "low"]
)
@pytest.mark.parametrize(
    ("shape", "d"), [((2, 5, 6, 8), 8), ((1, 9, 7, 36), 40), ((3, 4, 4, 64), 132), ((2, 17, 3, 4), 72)]
)
def test_convolutions_by_tensor_cores(tensor_cores, shape, d, enough, shared, tf32):
    """Every width and height of a block, edges of tiles, all that is asked of it; twice, the same bits."""
    conv, rng = tensor_cores(tf32, enough, shared), np.random.default_rng(0)
    c, tolerance = shape[3], 5e-4 if tf32 else 1e-6
    for k, stride, padding, doubled in [
        (3, 1, (1, 1), False),
        (1, 1, (0, 0), False),
        (3, 2, (0, 1), False),
        (5, 1, (2, 2), False),
        (3, 1, (1, 1), True),
    ]:
        compute = functools.partial(
            convolution_and_gradients, stride=stride, padding=padding, doubled=doubled
        )
        h, width = ((s * (1 + doubled) + sum(padding) - k) // stride + 1 for s in shape[1:3])
        shapes = shape, (k, k, c, d), (d,), (shape[0], h, width, d)
        single = [normal(rng, s, np.float32) for s in shapes]
        assert conv.fits(k, *map(there, single))
        for actual, again, expected in on_the_gpu_and_defined(compute, single, np.float32, times=2):
            assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)
            # Nor are they all too small, by the 3.5e-4 that a factor loses where digits are cut off.
            assert abs(np.sum(actual * expected) / np.sum(expected**2) - 1) <= 0.2 * tolerance + 4e-7
            np.testing.assert_array_equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "doubled"), [((2, 16, 17, 4), False), ((1, 29, 30, 8), False), ((2, 9, 12, 4), True)]
)
def test_a_weights_derivative_shared_out_between_blocks(tensor_cores, shape, doubled):
    """Two, three and three shares of so many outputs, the last one shorter; twice, the same bits."""
    conv, rng = tensor_cores(False, 1, LARGE), np.random.default_rng(0)
    places = tuple(s * (1 + doubled) for s in shape[1:3])
    x, dy = normal(rng, shape, np.float32), normal(rng, (shape[0], *places, 12), np.float32)
    found = [conv.weight_gradient(there(x), there(dy), 3, 1, (1, 1), doubled=doubled) for _ in range(2)]
    image = portable.upsample(x.astype(np.float64)) if doubled else x.astype(np.float64)
    w = np.zeros((3, 3, shape[3], 12))
    _, dw, db = portable.conv2d_backward(image, w, dy.astype(np.float64), 1, (1, 1))
    for actual, again, expected in zip(*found, (dw.reshape(-1, 12), db)):
        assert np.linalg.norm(actual.get() - expected) <= 1e-6 * np.linalg.norm(expected)
        np.testing.assert_array_equal(actual.get(), again.get())


def there(x):
    import cupy

    return cupy.asarray(x)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
def test_tensor_cores_leave_no_number_out_and_none_in(tensor_cores, tf32):
    """Of numbers of 11 digits nothing is lost; what is not finite shows where it is seen, and only there."""
    tensor_cores(tf32, 1, LARGE)
    twin, rng = module("cupy"), np.random.default_rng(0)
    x, w = (rng.integers(-1024, 1025, s).astype(np.float32) for s in ((2, 6, 6, 4), (3, 3, 4, 8)))
    b = np.zeros(8, np.float32)
    y, expected = (
        twin.conv2d(x, w, b, 1, (1, 1)),
        portable.conv2d(*(a.astype(np.float64) for a in (x, w, b)), 1, (1, 1)),
    )
    np.testing.assert_allclose(y, expected, rtol=2e-7, atol=4)
    for bad in (np.nan, np.inf):
        x[1, 2, 3, 1] = bad
        seen = ~np.isfinite(twin.conv2d(x, w, b, 1, (1, 1)))
        assert seen[1, 1:4, 2:5].any(axis=-1).all()
        seen[1, 1:4, 2:5] = False
        assert not seen.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("c", "d"), [(5, 8), (6, 8), (8, 5), (8, 6)])
def test_channels_that_tensor_cores_take_on_one_side_only(tensor_cores, c, d):
    tensor_cores(False, 1, LARGE)
    rng = np.random.default_rng(0)
    arrays = [normal(rng, s, np.float32) for s in ((2, 5, 6, c), (3, 3, c, d), (d,), (2, 5, 6, d))]
    for actual, expected in on_the_gpu_and_defined(convolution_and_gradients, arrays, np.float32):
        assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


def apart(x):
    import cupy

    spread = cupy.full((*x.shape, 2), cupy.nan, x.dtype)
    spread[..., 0] = there(x)
    return spread[..., 0]


def unaligned(x):
    import cupy

    flat = cupy.full(x.size + 1, cupy.nan, x.dtype)
    flat[1:] = there(x.ravel())
    return flat[1:].reshape(x.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("lying", [apart, unaligned])
@pytest.mark.parametrize(
    ("name", "shapes", "numbers"),
    [
        ("conv2d", ((2, 5, 6, 8), (3, 3, 8, 12), (12,)), (1, (1, 1))),
        ("conv2d_backward", ((2, 5, 6, 8), (3, 3, 8, 12), (2, 5, 6, 12)), (1, (1, 1))),
        ("upsample_conv2d", ((2, 3, 4, 8), (3, 3, 8, 12), (12,)), ()),
        ("upsample_conv2d_backward", ((2, 3, 4, 8), (3, 3, 8, 12), (2, 6, 8, 12)), ()),
        ("linear", ((5, 8), (8, 12), (12,)), ()),
        ("linear_backward", ((5, 8), (8, 12), (5, 12)), ()),
    ],
)
def test_tensor_cores_read_no_array_that_lies_otherwise(tensor_cores, name, shapes, numbers, lying):
    """Each argument in turn is not contiguous, or does not begin where 16 bytes do."""
    tensor_cores(False, 1, LARGE)
    twin, rng = importlib.import_module("tinydiff.kernels.cupy"), np.random.default_rng(0)
    arrays = [normal(rng, shape, np.float32) for shape in shapes]
    expected = getattr(portable, name)(*(a.astype(np.float64) for a in arrays), *numbers)
    for odd in range(len(arrays)):
        found = getattr(twin, name)(
            *(lying(a) if i == odd else there(a) for i, a in enumerate(arrays)), *numbers
        )
        for y, right in zip(found, expected) if type(found) is tuple else [(found, expected)]:
            assert np.linalg.norm(y.get() - right) <= 1e-6 * np.linalg.norm(right)


@pytest.mark.gpu
@pytest.mark.parametrize("doubled", [False, True])
def test_a_tall_image_at_uneven_distances(tensor_cores, doubled):
    """Doubled, or turned between strides: a pixel's place is kept in half a register for each axis."""
    tensor_cores(False, 1, LARGE)
    rng, h = np.random.default_rng(0), 2**15 + 2
    of_x, of_dy = ((1, h // 2, 1, 4), (1, h, 2, 4)) if doubled else ((1, h, 1, 4), (1, h // 2, 1, 4))
    arrays = [normal(rng, s, np.float32) for s in (of_x, (3, 3, 4, 4), (4,), of_dy)]
    compute = functools.partial(convolution_and_gradients, stride=2, doubled=doubled)
    for actual, expected in on_the_gpu_and_defined(compute, arrays, np.float32):
        assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "stride"), [(2**16, 2**12), (2**15, 1)])
def test_rows_or_an_image_that_a_thread_cannot_count_are_refused(monkeypatch, side, stride):
    """Few rows of a large image, too: its pixels' places are unsigned numbers of 32 bits."""
    space("cupy")
    from tinydiff.kernels import _cupy_gather

    image = SimpleNamespace(shape=(1, side, side, 1), size=side**2, itemsize=4, dtype=np.dtype(np.float32))
    image.data = SimpleNamespace(ptr=0)
    empty = SimpleNamespace(size=(side // stride) ** 2 * 4)
    names = SimpleNamespace(ascontiguousarray=lambda x: x, empty=lambda shape, dtype: empty)
    monkeypatch.setattr(_cupy_gather, "cupy", names)
    with pytest.raises(MemoryError, match="take a smaller batch"):
        _cupy_gather.seen_rows(image, 2, stride, (0, 0))


@pytest.mark.gpu
def test_what_tensor_cores_cannot_take_goes_by_rows(tensor_cores, monkeypatch):
    conv = tensor_cores(False, 1, LARGE)
    x = there(np.zeros((2, 3, 3, 8), np.float32))
    assert conv.fits(3, x) and conv.fits(5, x) and not conv.fits(6, x)
    assert not conv.fits(3, x.astype(np.float64)) and not conv.fits(3, x[..., :6]) and not conv.fits(3, x[:0])
    assert not conv.fits(3, there(np.zeros(73, np.float32))[1:].reshape(1, 3, 3, 8))  # not aligned
    assert not conv.fits(3, x[..., :4])  # not contiguous
    monkeypatch.setattr(conv, "_device", lambda number: (False, SMALL))  # older than Ampere
    assert not conv.fits(3, x)


@pytest.mark.gpu
def test_an_image_that_tensor_cores_cannot_count_goes_by_rows(tensor_cores):
    """Its pixels' places are numbers of 32 bits with a sign."""
    conv = tensor_cores(False, 1, LARGE)
    image = SimpleNamespace(dtype=np.dtype(np.float32), data=SimpleNamespace(ptr=0))
    image.flags = SimpleNamespace(c_contiguous=True)
    for height, fits in [(2**15 - 1, True), (2**15, False)]:
        image.shape, image.size = (1, height, 2**14, 4), height * 2**16
        assert conv.fits(3, image) is fits


@pytest.mark.gpu
@pytest.mark.parametrize(("capability", "known"), [("75", False), ("80", True), ("90", True), ("120", True)])
def test_tensor_cores_know_tf32_from_ampere_on(monkeypatch, capability, known):
    space("cupy")
    from tinydiff.kernels import _cupy_conv

    device = SimpleNamespace(
        compute_capability=capability, attributes={"MaxSharedMemoryPerBlockOptin": LARGE}
    )
    monkeypatch.setattr(_cupy_conv.cupy.cuda, "Device", lambda number: device)
    assert _cupy_conv._device.__wrapped__(0) == (known, LARGE)
