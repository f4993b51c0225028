"""The tables of a noise schedule against exact arithmetic, and what each schedule promises.

A float64 is a fraction, so a chain of float64 betas has exact tables: they are computed with Python's
integers here, and the schedule's must agree to rounding.
"""

import copy
import math
import pickle
from fractions import Fraction

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tinydiff.schedules import (
    NoiseSchedule,
    cosine_schedule,
    evenly_spaced_timesteps,
    flow_schedule,
    linear_schedule,
)


def lists_of_betas(low, high, max_size=30):
    """Betas spread over the orders of magnitude, not only over the values."""
    exponents = st.floats(math.log10(low), math.log10(high))
    return st.lists(exponents.map(lambda e: min(10.0**e, high)), min_size=1, max_size=max_size)


def exact_abar(betas):
    abar, product = [], Fraction(1)
    for beta in betas:
        product *= 1 - Fraction(float(beta))
        abar.append(product)
    return abar


# The tables


@settings(deadline=None, max_examples=100)
@given(lists_of_betas(1e-17, 1.0))
def test_tables_are_those_of_exact_arithmetic(betas):
    schedule = NoiseSchedule(betas)
    abar = exact_abar(betas)
    abar_prev = [Fraction(1), *abar[:-1]]
    posterior = [
        Fraction(b) * (1 - before) / (1 - after)
        for b, before, after in zip(betas, abar_prev, abar, strict=True)
    ]
    expected = {
        "betas": betas,
        "alphas": [float(1 - Fraction(b)) for b in betas],
        "alphas_cumprod": [float(x) for x in abar],
        "alphas_cumprod_prev": [float(x) for x in abar_prev],
        "one_minus_alphas_cumprod": [float(1 - x) for x in abar],
        "one_minus_alphas_cumprod_prev": [float(1 - x) for x in abar_prev],
        "snr": [float(x / (1 - x)) for x in abar],
        "posterior_variance": [float(x) for x in posterior],
    }
    assert len(betas) == schedule.T
    for name, values in expected.items():
        table = getattr(schedule, name)
        assert table.dtype == np.float64 and table.shape == (len(betas),)
        # Each log(1 - beta) is off by 1e-16 of itself; when abar is 1e-13 the sum of them is 30.
        assert_allclose(table, values, rtol=1e-13, atol=0, err_msg=name)


def test_tiny_betas_keep_their_digits():
    # 1 - cumprod(1 - beta) has four digits left here.
    schedule = NoiseSchedule(np.full(1000, 1e-12))
    steps = np.arange(1, 1001)
    assert_allclose(schedule.one_minus_alphas_cumprod, steps * 1e-12, rtol=1e-9)
    assert_allclose(schedule.snr, 1 / (steps * 1e-12), rtol=2e-9)
    assert_allclose(schedule.posterior_variance, 1e-12 * (steps - 1) / steps, rtol=2e-9)


def test_smallest_float_is_a_beta():
    schedule = NoiseSchedule([5e-324, 5e-324])
    assert_array_equal(schedule.alphas_cumprod, [1, 1])
    assert_array_equal(schedule.one_minus_alphas_cumprod, [5e-324, 1e-323])
    assert_array_equal(schedule.snr, [np.inf, np.inf])


@settings(deadline=None, max_examples=100)
@given(lists_of_betas(1e-6, 0.999))
def test_snr_falls_strictly(betas):
    schedule = NoiseSchedule(betas)
    assert np.all(np.diff(schedule.snr) < 0)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)


@pytest.mark.parametrize(
    "schedule",
    [linear_schedule(), cosine_schedule(), flow_schedule(), linear_schedule(7)],
    ids=["linear", "cosine", "flow", "short"],
)
def test_snr_of_a_named_schedule_falls_strictly(schedule):
    assert np.all(np.diff(schedule.snr) < 0)
    assert_allclose(schedule.snr, schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), rtol=1e-10)


def test_beta_of_one_erases_the_signal_for_good():
    schedule = NoiseSchedule([0.5, 1.0, 0.25, 1])
    assert_array_equal(schedule.alphas_cumprod, [0.5, 0, 0, 0])
    assert_array_equal(schedule.alphas_cumprod_prev, [1, 0.5, 0, 0])
    assert_array_equal(schedule.snr, [1, 0, 0, 0])
    assert_array_equal(schedule.posterior_variance, [0, 0.5, 0.25, 1])


def test_tables_are_read_only_and_apart_from_the_input():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    for one in (schedule, copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        tables = [value for value in vars(one).values() if isinstance(value, np.ndarray)]
        assert len(tables) == 8
        for table in tables:
            with pytest.raises(ValueError, match="read-only"):
                table[0] = 0.5


@pytest.mark.parametrize(
    "betas",
    [(0.25, 0.5), np.array([0.25, 0.5], np.float32), array_api_strict.asarray([0.25, 0.5])],
    ids=["tuple", "float32", "strict"],
)
def test_betas_may_be_any_array(betas):
    assert_array_equal(NoiseSchedule(betas).betas, [0.25, 0.5])
    assert NoiseSchedule(betas).betas.dtype == np.float64


def test_repr_says_where_the_chain_ends():
    assert (
        repr(NoiseSchedule([0.25, 0.5])) == "NoiseSchedule(T=2, betas=0.25 ... 0.5, alphas_cumprod[-1]=0.375)"
    )


# Linear


def test_linear_is_the_papers_at_a_thousand_steps():
    schedule = linear_schedule()
    assert schedule.T == 1000
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 0.02
    assert_allclose(np.diff(schedule.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    # By Python's own product, not by this package's sum of logarithms.
    product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * t / 999) for t in range(1000))
    assert_allclose(schedule.alphas_cumprod[-1], product, rtol=1e-12)
    assert_allclose(product, 4.0358e-5, rtol=1e-4)


def test_linear_ends_in_noise_for_every_length():
    for T in range(1, 2001):
        schedule = linear_schedule(T)
        assert schedule.T == T
        assert schedule.alphas_cumprod[-1] <= 1e-3 * (1 + 1e-12), T
        assert np.all(np.diff(schedule.betas) > 0), T
        assert_allclose(schedule.betas[-1], min(20 / T, 0.999), rtol=1e-15, err_msg=f"T = {T}")
        if T > 1:
            assert_allclose(schedule.betas[0], 0.1 / T, rtol=1e-15, err_msg=f"T = {T}")


def test_linear_takes_explicit_betas_as_they_are():
    schedule = linear_schedule(100, beta_start=1e-4, beta_end=0.02)
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 0.02
    assert 0.36 < schedule.alphas_cumprod[-1] < 0.37  # the trap that the defaults avoid, on request
    assert linear_schedule(3, 0.25, 1).betas.tolist() == [0.25, 0.625, 1.0]
    assert linear_schedule(3, 0.75, 0.25).betas.tolist() == [0.75, 0.5, 0.25]


def test_linear_scales_only_what_is_not_given():
    assert linear_schedule(100, beta_start=0.01).betas[[0, -1]].tolist() == [0.01, 0.2]
    assert linear_schedule(100, beta_end=0.5).betas[[0, -1]].tolist() == [0.001, 0.5]


def test_linear_with_one_step_takes_the_last():
    assert linear_schedule(1).betas.tolist() == [0.999]
    assert linear_schedule(1, 0.1, 0.5).betas.tolist() == [0.5]


# Cosine


def test_cosine_has_its_exact_values():
    # cos^2 of 0, 30, 60, 90 degrees is 1, 3/4, 1/4, 0. Without the square the first beta would be 0.134.
    schedule = cosine_schedule(3, s=0.0, max_beta=1.0)
    assert_allclose(schedule.betas, [1 / 4, 2 / 3, 1], rtol=1e-15)
    assert_allclose(schedule.alphas_cumprod, [3 / 4, 1 / 4, 0], rtol=1e-15, atol=0)
    # With s = 1 the angle runs from 45 to 90 degrees, and cos^2(67.5 deg) / cos^2(45 deg) = 1 - sqrt(1/2).
    assert_allclose(cosine_schedule(2, s=1.0).betas, [math.sqrt(0.5), 0.999], rtol=1e-15)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 1500), st.floats(0, 0.5), st.floats(0.05, 1.0))
def test_cosine_follows_its_formula_up_to_the_cap(T, s, max_beta):
    schedule = cosine_schedule(T, s, max_beta)
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    betas = np.array([1 - f[t + 1] / f[t] for t in range(T)])
    assert schedule.T == T
    assert np.max(schedule.betas) <= max_beta
    capped = schedule.betas == max_beta
    assert np.all(betas[capped] >= max_beta - 1e-12)
    uncapped = T if not capped.any() else int(np.argmax(capped))
    expected = np.array(f[1 : uncapped + 1]) / f[0]
    # Near the end f is the square of a small cosine; with max_beta = 1 its last value is 0 but for rounding.
    assert_allclose(schedule.alphas_cumprod[:uncapped], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("T", [10, 1000, 100_000])
def test_cosine_keeps_the_digits_of_small_betas(T):
    # Without an offset the signal-to-noise ratio is the square of a cotangent (S.5).
    sines = np.sin(np.arange(1, T) / T * math.pi / 2)
    schedule = cosine_schedule(T, s=0.0, max_beta=1.0)
    assert_allclose(schedule.snr[:-1], (sines[::-1] / sines) ** 2, rtol=1e-12)
    assert_allclose(schedule.betas[0], sines[0] ** 2, rtol=1e-14)
    # With an endless offset sines are their arguments (S.4).
    k = np.arange(T, 0, -1)
    assert_allclose(cosine_schedule(T, 1e17, max_beta=1.0).betas, (2 * k - 1) / k**2, rtol=1e-14)


def test_cosine_caps_only_its_last_beta_by_default():
    schedule = cosine_schedule()
    assert schedule.betas[-1] == 0.999 and np.sum(schedule.betas == 0.999) == 1
    assert_allclose(schedule.betas[-2], 0.75, rtol=1e-4)  # close to the end f is parabolic: 1 - (1/2)^2


@pytest.mark.parametrize("T", [1, 2, 10, 100, 1000, 4000])
def test_cosine_ends_in_noise(T):
    assert cosine_schedule(T).alphas_cumprod[-1] <= 1e-3 * (1 + 1e-12)


# Flow matching


@given(st.integers(1, 1500), st.floats(1e-3, 1e3))
def test_flow_has_its_formula_in_exact_arithmetic(T, shift):
    schedule, factor = flow_schedule(T, shift), Fraction(shift)
    for t in {0, T // 3, T // 2, T - 2, T - 1} - {-1}:
        r, r_before = (factor * n / (T + (factor - 1) * n) for n in (t + 1, t))
        abar, before = ((1 - x) ** 2 / ((1 - x) ** 2 + x**2) for x in (r, r_before))
        assert_allclose(schedule.betas[t], float(1 - abar / before), rtol=1e-14)
        assert_allclose(schedule.alphas_cumprod[t], float(abar), rtol=1e-11, atol=1e-15)
        assert_allclose(schedule.one_minus_alphas_cumprod[t], float(1 - abar), rtol=1e-12)
    assert schedule.alphas_cumprod[-1] == 0


def test_flow_is_a_straight_line_from_data_to_noise():
    schedule = flow_schedule(10)
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    assert_allclose(a / (a + s), np.linspace(0.9, 0.0, 10), atol=1e-15)
    assert_allclose(s / (a + s), np.linspace(0.1, 1.0, 10), rtol=1e-15)


@pytest.mark.parametrize(("shift", "rtol"), [(1e-6, 1e-13), (0.5, 1e-12), (3.0, 1e-12), (1e6, 1e-7)])
def test_shift_moves_all_of_log_snr_alike(shift, rtol):
    moved = np.log(flow_schedule(50, shift).snr[:-1]) - np.log(flow_schedule(50).snr[:-1])
    assert_allclose(moved, -2 * np.log(shift), rtol=rtol)


# Respacing


@st.composite
def chains_and_timesteps(draw):
    betas = draw(lists_of_betas(1e-9, 0.5))
    tau = draw(st.sets(st.integers(0, len(betas) - 1), min_size=1))
    return NoiseSchedule(betas), sorted(tau)


@settings(deadline=None, max_examples=100)
@given(chains_and_timesteps())
def test_respacing_keeps_the_marginals(case):
    schedule, tau = case
    respaced = schedule.respace(tau)
    assert len(tau) == respaced.T
    assert_allclose(respaced.alphas_cumprod, schedule.alphas_cumprod[tau], rtol=1e-12)
    assert_allclose(respaced.one_minus_alphas_cumprod, schedule.one_minus_alphas_cumprod[tau], rtol=1e-12)
    # The posterior variance is that of the long jump, not the old one looked up.
    abar = schedule.alphas_cumprod[tau]
    abar_prev = np.concat([[1.0], abar[:-1]])
    long_jump = (1 - abar / abar_prev) * (1 - abar_prev)
    assert_allclose(respaced.posterior_variance * (1 - abar), long_jump, rtol=1e-6, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(lists_of_betas(1e-12, 1.0))
def test_respacing_to_every_timestep_changes_nothing(betas):
    schedule = NoiseSchedule(betas)
    assert_allclose(schedule.respace(range(schedule.T)).betas, schedule.betas, rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(chains_and_timesteps(), st.data())
def test_respacing_twice_is_respacing_once(case, data):
    schedule, tau = case
    i = sorted(data.draw(st.sets(st.integers(0, len(tau) - 1), min_size=1)))
    once = schedule.respace([tau[j] for j in i])
    assert_allclose(schedule.respace(tau).respace(i).betas, once.betas, rtol=1e-12)


def test_respacing_passes_over_erased_signal():
    schedule = NoiseSchedule([0.5, 1.0, 0.5, 1.0, 0.5])
    assert schedule.respace([0, 2, 4]).betas.tolist() == [0.5, 1.0, 1.0]
    assert schedule.respace([1, 2]).betas.tolist() == [1.0, 0.5]


def test_respacing_the_papers_chain_to_one_step():
    schedule = linear_schedule()
    one = schedule.respace(evenly_spaced_timesteps(1000, 1))
    assert_allclose(one.betas, [1 - schedule.alphas_cumprod[-1]], rtol=1e-14)


def test_evenly_spaced_timesteps_span_the_chain():
    for T in range(1, 60):
        assert evenly_spaced_timesteps(T, T).tolist() == list(range(T))
        for steps in range(1, T + 1):
            tau = evenly_spaced_timesteps(T, steps)
            assert tau.shape == (steps,) and tau.dtype == np.int64
            assert tau[-1] == T - 1
            if steps > 1:
                assert tau[0] == 0
                assert np.all(np.diff(tau) > 0)
                ideal = np.arange(steps) * (T - 1) / (steps - 1)
                assert np.max(np.abs(tau - ideal)) <= 0.5 + 1e-12
    assert evenly_spaced_timesteps(1000, 5).tolist() == [0, 250, 500, 749, 999]


# Bad input


@pytest.mark.parametrize(
    ("betas", "says"),
    [
        ([], r"betas has shape \(0,\)"),
        (0.1, r"betas has shape \(\)"),
        ([[0.1, 0.2]], r"betas has shape \(1, 2\)"),
        ([0.1, [0.2]], "betas is a list"),
        ([0.1, math.nan], r"betas\[1\] is nan"),
        ([0.1, math.inf], r"betas\[1\] is inf"),
        ([0.1, 0.2, 0.0], r"betas\[2\] is 0\.0"),
        ([-0.1, 0.2], r"betas\[0\] is -0\.1"),
        ([0.1, np.nextafter(1, 2)], r"betas\[1\] is 1\.00"),
        ([0.1, 2, 3], r"betas\[1\] is 2\.0 \(2 of 3 wrong\)"),
        ([True, True], "betas has dtype bool"),
        (["0.1"], "betas has dtype [<>]U3"),
        ([0.1 + 0j], "betas has dtype complex128"),
        ([None], "betas has dtype object"),
        (None, r"betas has shape \(\)"),
    ],
)
def test_bad_betas_are_named(betas, says):
    with pytest.raises(ValueError, match=says + ".*expected a non-empty"):
        NoiseSchedule(betas)


def test_what_a_mask_hides_is_not_used():
    with pytest.raises(ValueError, match=r"^betas is a masked array"):
        NoiseSchedule(np.ma.masked_greater([0.1, 0.2], 0.15))
    with pytest.raises(ValueError, match=r"^timesteps is a masked array"):
        linear_schedule(10).respace(np.ma.masked_equal([0, 3, 9], 3))


@pytest.mark.parametrize("value", [0, -1.0, 9e-7, 1.1e6, math.nan, math.inf, True, "3", None, [3.0]])
def test_bad_shift_of_flow_is_named(value):
    with pytest.raises(ValueError, match=r"^shift is .*; expected a real number from 1e-6 to 1e6\.$"):
        flow_schedule(10, value)


@pytest.mark.parametrize(
    "make",
    [linear_schedule, cosine_schedule, flow_schedule, lambda T: evenly_spaced_timesteps(T, 1)],
)
@pytest.mark.parametrize("T", [0, -1, 1.0, 2.5, True, "10", None, np.True_])
def test_bad_T_is_named(make, T):
    with pytest.raises(ValueError, match=r"^T is .*expected an integer"):
        make(T)


def test_T_may_be_a_numpy_integer():
    assert linear_schedule(np.int32(5)).T == 5


@pytest.mark.parametrize("name", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [0, 0.0, -1e-4, 1.5, math.nan, math.inf, True, "0.1", [0.1], 10**400])
def test_bad_ends_of_linear_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*expected a real number in"):
        linear_schedule(10, **{name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "0.008", None])
def test_bad_offset_of_cosine_is_named(value):
    with pytest.raises(ValueError, match=r"^s is .*expected a real number of at least 0"):
        cosine_schedule(10, s=value)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, True, None])
def test_bad_cap_of_cosine_is_named(value):
    with pytest.raises(ValueError, match=r"^max_beta is .*expected a real number in"):
        cosine_schedule(10, max_beta=value)


@pytest.mark.parametrize("steps", [0, -1, 11, 2.0, True, None])
def test_bad_steps_are_named(steps):
    with pytest.raises(ValueError, match=r"^steps is .*expected"):
        evenly_spaced_timesteps(10, steps)


@pytest.mark.parametrize(
    ("timesteps", "says"),
    [
        ([], r"timesteps has shape \(0,\)"),
        (3, r"timesteps has shape \(\)"),
        ([[0, 1]], r"timesteps has shape \(1, 2\)"),
        ([0, [1]], "timesteps is a list"),
        ([0.0, 1.0], "timesteps has dtype float64"),
        ([True, False], "timesteps has dtype bool"),
        ([0, 10], r"timesteps\[1\] is 10"),
        ([-1, 3], r"timesteps\[0\] is -1"),
        ([0, 3, 3], r"timesteps\[2\] is 3, after 3"),
        ([5, 3], r"timesteps\[1\] is 3, after 5"),
        (np.array([5, 3], np.uint8), r"timesteps\[1\] is 3, after 5"),
    ],
)
def test_bad_timesteps_are_named(timesteps, says):
    with pytest.raises(ValueError, match=says + ".*expected a non-empty"):
        linear_schedule(10).respace(timesteps)
