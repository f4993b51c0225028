"""The NumPy twin of every kernel against the portable definition, over random shapes.

In float64 the two must agree to rounding; in float32 to a few units in the last place of the largest
numbers summed. The twin shares images out to threads and reuses scratch memory, so here too: the same
call gives the same bits, an earlier result is never overwritten, and no input is touched.
"""

import functools
import importlib.util
import operator
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinydiff.kernels import _attention, _gather, _norm, _threads, _winograd, kernels_for, portable
from tinydiff.kernels import numpy as twin

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
    patch.setattr(_gather, "CHUNK_BYTES", 2**14)
    patch.setattr(_norm, "BLOCK_BYTES", 2**12)
    patch.setattr(_norm, "PARALLEL_SIZE", 0)
    patch.setattr(_attention, "BLOCK_BYTES", 2**11)
    patch.setattr(_attention, "PARALLEL_SIZE", 0)
    yield
    patch.undo()


@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_conv2d(arguments):
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


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_winograd_loses_few_digits(channels):
    """In float32, y and dx are off by at most 3 times as much as the direct sum in order.  (docs: A.16)

    And by at most 7 times as much as the definition, whose sums are added up by the same BLAS. The points
    0, 1, -1, 2, -2 would lose 3.7 to 5.0 and 11 times as much.
    """
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


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    h=st.integers(1, 8),
    w=st.integers(1, 8),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 5),
    offset=st.sampled_from([0.0, 30.0]),
    with_silu=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_group_norm(n, h, w, groups, per_group, offset, with_silu, dtype, seed):
    """Also far from zero: a variance taken as E x^2 - (E x)^2 would lose its digits at mean 30 sigma."""
    assume(h * w * per_group > 1)  # a single number has no variance: its gradient is rounding only
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
    xhat, rstd = xhat.reshape(x.shape), np.repeat(rstd[:, :, :, 0], per_group, axis=2)[:, :, None]
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


@settings(deadline=None, max_examples=60)
@given(
    lead=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    c=st.integers(1, 40),
    d=st.integers(1, 40),
    dtype=dtypes,
    seed=seeds,
)
def test_linear_silu_softmax(lead, c, d, dtype, seed):
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
    p, p64 = twin.softmax(8 * x), portable.softmax(8 * x64)
    assert_close(p, p64, p64, dtype, 100)
    ds, ds64 = twin.softmax_backward(p, dx), portable.softmax_backward(p64, dx64)
    assert_close(ds, ds64, np.abs(p64) * np.linalg.norm(dx64), dtype, 100)


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 12),
    d=st.integers(1, 9),
    size=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_attention(n, heads, length, d, size, dtype, seed):
    """docs: A.23.  At size 30 whole rows of exp vanish under the bound, and the maximum must take its place.

    A score is rounded relative to the bound on it, and p by as much as its score is off.
    """
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


def test_a_score_that_is_not_a_number_stays_none():
    """The trainer relies on seeing it; and the search for a smaller shift ends."""
    q, k, v = (normal(np.random.default_rng(0), (1, 2, 3, 4), np.float32) for _ in range(3))
    q[0, 1, 2, 3] = np.nan
    o, saved = twin.attention(q, k, v, 0.5)
    assert np.isnan(o[0, 1, 2]).all() and np.isfinite(o[0, 0]).all() and np.isfinite(o[0, 1, :2]).all()
    assert np.isnan(twin.attention_backward(saved, v)[1][0, 1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_activations_are_finite_and_silent(dtype):
    """Where exp overflows, sigmoid is 0, softmax does not care, and nothing warns."""
    x = np.array([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], dtype)
    with np.errstate(all="raise", under="ignore"):
        y, s = twin.silu(x)
        p = twin.softmax(x)
    np.testing.assert_allclose(s, [0, 0, 0, 0.5, 1, 1, 1], atol=1e-40)
    np.testing.assert_allclose(y, [0, 0, 0, 0, 100, 1e4, 1e30], rtol=1e-6, atol=1e-40)
    np.testing.assert_array_equal(p, [0, 0, 0, 0, 0, 0, 1])
    image = np.zeros((1, 1, 2, 1), dtype)
    image[0, 0, 0, 0] = 1.0
    with np.errstate(all="raise", under="ignore"):
        y, saved = twin.group_norm_silu(image, np.full(1, 1e4, dtype), np.zeros(1, dtype), 1, 1e-5)
        dx, _, _ = twin.group_norm_silu_backward(saved, np.full(1, 1e4, dtype), np.ones_like(image))
    assert y[0, 0, 1, 0] == 0.0
    assert np.isfinite(dx).all()


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

    def norm(name):
        def call(rng, kernels):
            both = normal(rng, (7, 6, 9, 20), np.float32)
            weight, bias = normal(rng, 12, np.float32), normal(rng, 12, np.float32)
            inputs = [both, weight, bias]
            y, saved = getattr(kernels, name)(both[..., :12], weight, bias, 4, 1e-5)
            return inputs, [y, *getattr(kernels, name + "_backward")(saved, weight, both[..., 8:])]

        return call

    def rows(rng, kernels):
        x, w, b = (normal(rng, s, np.float32) for s in ((5, 9, 11), (11, 8), (8,)))
        both = normal(rng, (5, 9, 12), np.float32)
        inputs = [x, w, b, both]
        p = kernels.softmax(both[..., :8])
        y = kernels.linear(both[..., 1:], w, b)
        parts = kernels.linear_backward(x, w, both[..., 4:])
        return inputs, [p, y, *parts, kernels.softmax_backward(p, both[..., 4:])]

    return {
        "winograd": conv(3, 1, (1, 1), 16, 18),
        "gather": conv(3, 1, (1, 1), 4, 5),
        "strided": conv(3, 2, (0, 1), 16, 18),
        "pointwise": conv(1, 1, (0, 0), 16, 18),
        "group_norm": norm("group_norm"),
        "group_norm_silu": norm("group_norm_silu"),
        "rows": rows,
    }


@pytest.mark.parametrize("name", calls())
def test_calls_do_not_disturb_one_another(name):
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


def test_kernels_called_from_several_threads_at_once():
    """Scratch belongs to a thread, and one parallel region runs at a time."""
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


@pytest.mark.skipif(importlib.util.find_spec("array_api_strict") is None, reason="needs array-api-strict")
@settings(deadline=None, max_examples=30)
@given(convolutions())
def test_definition_is_portable(arguments):
    """The definition under array-api-strict: the same numbers as under NumPy, and its own module."""
    import array_api_strict as strict

    x, w, b, stride, padding, dy, _ = arguments
    sx, sw, sb, sdy = (strict.asarray(a) for a in (x, w, b, dy))
    assert kernels_for(sx) is portable
    assert kernels_for(x) is twin
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
