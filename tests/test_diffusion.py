"""The Gaussian process, proved: by composition, simulation, Bayes' rule and changes of variable."""

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from tinydiff.backend import to_numpy
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule

PREDICTIONS = ["eps", "x0", "v", "flow"]
VARIANCES = ["fixed_small", "fixed_large"]


@st.composite
def processes(draw, low=1e-6, high=1.0, min_T=1, max_T=20):
    """A diffusion with random T and betas."""
    betas = draw(st.lists(st.floats(low, high), min_size=min_T, max_size=max_T))
    return GaussianDiffusion(NoiseSchedule(betas))


@st.composite
def batches(draw, diffusion):
    """(x0, eps, t): random data of random shape, batch first, and a step for each."""
    shape = draw(array_shapes(min_dims=1, max_dims=4, max_side=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t = rng.integers(0, diffusion.T, shape[0])
    return rng.uniform(-2, 2, shape), rng.standard_normal(shape), t


def column(values, x):
    return np.reshape(values, (-1,) + (1,) * (x.ndim - 1))


# q: the chain and its marginals


@settings(deadline=None, max_examples=100)
@given(processes(), st.data())
def test_composing_the_links_gives_the_marginals(diffusion, data):
    x0, eps, _ = data.draw(batches(diffusion))
    zeros, ones = np.zeros_like(x0), np.ones_like(x0)
    mean, variance = x0, zeros
    for t in range(diffusion.T):
        # A link is x -> k x + d noise; its k and d are read off by showing it 1 and 0.
        k, d = diffusion.q_step(ones, t, zeros), diffusion.q_step(zeros, t, ones)
        assert np.all(k >= 0) and np.all(d >= 0)  # a variance hides the sign
        mean, variance = k * mean, k**2 * variance + d**2
        closed_mean, closed_variance = diffusion.q_mean_variance(x0, t)
        assert closed_variance.shape == (x0.shape[0],) + (1,) * (x0.ndim - 1)
        assert_allclose(closed_mean, mean, rtol=1e-12, atol=1e-12)
        assert_allclose(np.broadcast_to(closed_variance, x0.shape), variance, rtol=1e-12, atol=1e-12)
        assert_allclose(
            diffusion.q_sample(x0, t, eps), mean + np.sqrt(variance) * eps, rtol=1e-12, atol=1e-12
        )
        assert_allclose(diffusion.q_step(x0, t, eps), k * x0 + d * eps, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(processes())
def test_unit_variance_stays_unit_variance(diffusion):
    one = np.ones(1)
    variance = one
    for t in range(diffusion.T):
        k, d = diffusion.q_step(one, t, 0 * one), diffusion.q_step(0 * one, t, one)
        variance = k**2 * variance + d**2
        a, remaining = diffusion.q_mean_variance(one, t)
        assert_allclose(variance, 1, rtol=1e-13)
        assert_allclose(a**2 + remaining, 1, rtol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_simulated_chains_have_the_marginals(seed):
    """Each of three tests at each of three steps of each chain alarms falsely once in 1e6: 45 in all, 5e-5.

    The seeds are fixed, so an alarm is not by chance twice.
    """
    rng = np.random.default_rng(seed)
    diffusion = GaussianDiffusion(NoiseSchedule(rng.uniform(0.001, 0.4, rng.integers(3, 25))))
    n, false_alarms = 50_000, 1e-6
    x0 = np.full(n, rng.uniform(-3, 3))
    watched = {0, diffusion.T // 2, diffusion.T - 1}
    x = x0
    for t in range(diffusion.T):
        x = diffusion.q_step(x, t, rng.standard_normal(n))
        if t not in watched:
            continue
        mean, variance = diffusion.q_mean_variance(x0[:1], t)
        z = (x - mean) / np.sqrt(variance)  # standard normal, if the closed form is right
        assert stats.kstest(z, "norm").pvalue > false_alarms
        assert 2 * stats.norm.sf(abs(np.sum(z)) / np.sqrt(n)) > false_alarms
        assert 2 * min(stats.chi2.cdf(np.sum(z**2), n), stats.chi2.sf(np.sum(z**2), n)) > false_alarms


def test_simulated_chain_keeps_the_variance_of_the_data():
    """Two-point data of unit variance; the sum of squares is within 5 standard errors (false alarm 6e-7)."""
    rng = np.random.default_rng(0)
    n = 100_000
    diffusion = GaussianDiffusion(linear_schedule(20))
    x = rng.choice([-1.0, 1.0], n)
    for t in range(diffusion.T):
        x = diffusion.q_step(x, t, rng.standard_normal(n))
        assert abs(np.mean(x**2) - 1) < 5 * np.sqrt(2 / n)  # Var x^2 is at most that of a normal, 2


# The posterior


@settings(deadline=None, max_examples=50)
@given(processes(low=0.02, high=0.98, min_T=2), st.data())
def test_posterior_is_bayes_rule_on_a_grid(diffusion, data):
    t = data.draw(st.integers(1, diffusion.T - 1))
    x0 = np.array([data.draw(st.floats(-2, 2))])
    x_t = diffusion.q_sample(x0, t, np.array([data.draw(st.floats(-3, 3))]))

    prior_mean, prior_variance = diffusion.q_mean_variance(x0, t - 1)
    width = np.sqrt(prior_variance)
    grid = np.linspace(prior_mean - 15 * width, prior_mean + 15 * width, 20_001)[:, 0]  # x_{t-1}
    link_mean = diffusion.q_step(grid, t, np.zeros_like(grid))
    log_density = stats.norm.logpdf(grid, prior_mean, width)
    log_density += stats.norm.logpdf(x_t, link_mean, np.sqrt(diffusion.schedule.betas[t]))
    weights = np.exp(log_density - np.max(log_density))
    weights /= np.sum(weights)
    mean = np.sum(weights * grid)
    variance = np.sum(weights * (grid - mean) ** 2)

    posterior_mean, posterior_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    assert_allclose(posterior_mean, mean, rtol=1e-9, atol=1e-9)
    assert_allclose(posterior_variance, variance, rtol=1e-9)


def test_posterior_before_the_first_step_is_the_data_itself():
    rng = np.random.default_rng(0)
    x0, x_t = rng.standard_normal((2, 5, 3))
    for beta in 10 ** rng.uniform(-6, 0, 300):
        diffusion = GaussianDiffusion(NoiseSchedule([beta, 0.5]))
        mean, variance = diffusion.q_posterior_mean_variance(x0, x_t, 0)
        assert_array_equal(mean, x0)  # to the last bit: what was clipped to [-1, 1] stays there
        assert_array_equal(variance, 0)


# Changes of variable


def changes(diffusion):
    """From what a network predicts to each of the four."""
    return {name: getattr(diffusion, f"predict_{name}") for name in PREDICTIONS}


@settings(deadline=None, max_examples=100)
@given(processes(low=1e-3, high=0.9, max_T=6), st.data())
def test_each_of_eps_x0_v_and_flow_gives_the_others(diffusion, data):
    x0, eps, t = data.draw(batches(diffusion))
    x_t = diffusion.q_sample(x0, t, eps)
    truth = {}
    for name in PREDICTIONS:
        network = GaussianDiffusion(diffusion.schedule, prediction=name)
        truth[name] = network.training_target(x0, t, eps)
    assert_array_equal(truth["eps"], eps)
    assert_array_equal(truth["x0"], x0)
    # v is orthogonal to x_t in the plane of (x0, eps), and as long: a rotation by a quarter turn.
    abar = column(diffusion.schedule.alphas_cumprod[t], x0)
    assert_allclose(truth["v"], np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0, rtol=1e-12, atol=1e-12)
    assert_allclose(truth["v"] ** 2 + x_t**2, x0**2 + eps**2, rtol=1e-12, atol=1e-12)
    assert_array_equal(truth["flow"], eps - x0)
    for name in PREDICTIONS:
        network = GaussianDiffusion(diffusion.schedule, prediction=name)
        output = truth[name]
        # a is at least sqrt(0.1)^6 = 1e-3 and s at least 0.03, by which 1e-15 is divided.
        for expected in PREDICTIONS:
            estimate = changes(network)[expected](x_t, t, output)
            assert_allclose(
                estimate, truth[expected], rtol=1e-11, atol=1e-11, err_msg=f"{name} -> {expected}"
            )
            assert_array_equal(changes(diffusion)[expected](x_t, t, output, given=name), estimate)


@settings(deadline=None, max_examples=100)
@given(
    processes(low=1e-3, high=0.9, max_T=6),
    st.sampled_from(PREDICTIONS),
    st.sampled_from(PREDICTIONS),
    st.data(),
)
def test_changes_of_variable_are_mutually_inverse(diffusion, here, there, data):
    output, x_t, t = data.draw(batches(diffusion))  # any x_t and any output, not only consistent ones
    change = changes(diffusion)
    back = change[here](x_t, t, change[there](x_t, t, output, given=here), given=there)
    assert_allclose(back, output, rtol=1e-9, atol=1e-9)  # there and back divides by a s and s: down to 1e-6


def test_erased_signal_is_refused_from_eps_and_fine_from_the_others():
    diffusion = GaussianDiffusion(cosine_schedule(4, max_beta=1.0))
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 2))
    t = np.array([0, 1, 3])
    x_t = diffusion.q_sample(x0, t, eps)
    assert_array_equal(x_t[2], eps[2])
    for method in (
        diffusion.predict_x0,
        diffusion.predict_v,
        diffusion.predict_flow,
        diffusion.p_mean_variance,
    ):
        with pytest.raises(ValueError, match=r"t contains 3, where alphas_cumprod is 0.*'x0', 'v' or 'flow'"):
            method(x_t, t, eps)
        method(x_t[:2], t[:2], eps[:2])
    for name in ("x0", "v", "flow"):
        network = GaussianDiffusion(diffusion.schedule, prediction=name)
        output = network.training_target(x0, t, eps)
        assert_allclose(network.predict_x0(x_t, t, output), x0, rtol=1e-12)
        assert_allclose(network.predict_eps(x_t, t, output), eps, rtol=1e-12)
        mean, variance = network.p_mean_variance(x_t, t, output)
        assert np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))


def test_signal_that_the_dtype_cannot_divide_by_is_refused():
    """Of abar = 1e-39 float32 holds 1/a; of 1e-78 it does not, but float64 does."""
    diffusion = GaussianDiffusion(NoiseSchedule([1 - 1e-13] * 6))
    x_t = np.ones((1, 2))
    for method in (diffusion.predict_x0, diffusion.predict_v, diffusion.predict_flow):
        for dtype, t in [(np.float32, 2), (np.float64, 5)]:
            assert np.all(np.isfinite(method(x_t.astype(dtype), t, 0.5 * x_t.astype(dtype))))
        with pytest.raises(ValueError, match=r"t contains 5, where alphas_cumprod is .*e-78: in float32"):
            method(x_t.astype(np.float32), 5, 0.5 * x_t.astype(np.float32))


# p: the reverse process


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(deadline=None, max_examples=30)
@given(process=processes(low=1e-3, high=0.9, max_T=6), data=st.data())
def test_reverse_step_with_the_truth_is_the_posterior(prediction, variance, process, data):
    diffusion = GaussianDiffusion(process.schedule, prediction, variance)
    x0, eps, t = data.draw(batches(diffusion))
    x_t = diffusion.q_sample(x0, t, eps)
    output = diffusion.training_target(x0, t, eps)
    mean, p_variance = diffusion.p_mean_variance(x_t, t, output)
    posterior_mean, posterior_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    assert_allclose(mean, posterior_mean, rtol=1e-11, atol=1e-11)
    betas = column(diffusion.schedule.betas[t], x0)
    assert_array_equal(p_variance, posterior_variance if variance == "fixed_small" else betas)
    assert_array_equal(diffusion.model_variance[t], p_variance.reshape(-1))


@settings(deadline=None, max_examples=50)
@given(processes(low=1e-3, high=0.9, max_T=6), st.data())
def test_reverse_mean_in_eps_is_equation_11(diffusion, data):
    x_t, eps, t = data.draw(batches(diffusion))
    s = diffusion.schedule
    alpha, beta, abar = (column(table[t], x_t) for table in (s.alphas, s.betas, s.alphas_cumprod))
    mean, _ = diffusion.p_mean_variance(x_t, t, eps)
    assert_allclose(mean, (x_t - beta / np.sqrt(1 - abar) * eps) / np.sqrt(alpha), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [linear_schedule(50), cosine_schedule(50)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_reverse_chain_is_exact_where_its_variance_is(prediction, schedule):
    """With the exact denoiser, fixed_small reverses point data and fixed_large standard normal data."""
    one = np.ones(1)
    point = 0.7 * one
    for variance, denoise, marginal in [
        ("fixed_small", lambda x, a: point, lambda d, t: d.q_mean_variance(point, t)),
        ("fixed_large", lambda x, a: a * x, lambda d, t: (0 * one, one)),
    ]:
        diffusion = GaussianDiffusion(schedule, prediction, variance)

        def reverse(x, t, diffusion=diffusion, denoise=denoise):
            x0 = denoise(x, np.sqrt(schedule.alphas_cumprod[t]))
            return diffusion.p_mean_variance(x, t, changes(diffusion)[prediction](x, t, x0, given="x0"))

        mean, var = marginal(diffusion, diffusion.T - 1)
        for t in range(diffusion.T - 1, 0, -1):
            # The step is affine in x: x -> shift + slope x, plus noise.
            shift, p_variance = reverse(0 * one, t)
            slope = reverse(one, t)[0] - shift
            mean, var = shift + slope * mean, slope**2 * var + p_variance
            expected_mean, expected_var = marginal(diffusion, t - 1)
            assert_allclose(mean, expected_mean, rtol=1e-9, atol=1e-9)
            assert_allclose(var, expected_var, rtol=1e-9)
        assert_allclose(reverse(one, 0)[0], denoise(one, np.sqrt(schedule.alphas_cumprod[0])), rtol=1e-12)


def test_clipping_clips_the_estimate_of_x0_and_nothing_else():
    x_t = np.array([[3.0, -3.0, 0.1]])
    output = np.array([[1.7, -1.2, 0.5]])
    diffusion = GaussianDiffusion(linear_schedule(10), prediction="x0")
    for t in range(10):
        clipped, variance = diffusion.p_mean_variance(x_t, t, output, clip=True)
        by_hand, same = diffusion.q_posterior_mean_variance(np.array([[1.0, -1.0, 0.5]]), x_t, t)
        assert_array_equal(clipped, by_hand)
        assert_array_equal(variance, same)
        free, _ = diffusion.p_mean_variance(x_t, t, output)
        assert_array_equal(free, diffusion.q_posterior_mean_variance(output, x_t, t)[0])
    assert_array_equal(diffusion.p_mean_variance(x_t, 0, output, clip=True)[0], [[1.0, -1.0, 0.5]])


# t, dtypes and libraries


def calls(diffusion, x, y, t):
    """Every method on one pair of arrays, by name."""
    return {
        "q_step": diffusion.q_step(x, t, y),
        "q_sample": diffusion.q_sample(x, t, y),
        "q_mean": diffusion.q_mean_variance(x, t)[0],
        "q_variance": diffusion.q_mean_variance(x, t)[1],
        "posterior_mean": diffusion.q_posterior_mean_variance(x, y, t)[0],
        "posterior_variance": diffusion.q_posterior_mean_variance(x, y, t)[1],
        "target": diffusion.training_target(x, t, y),
        "x0": diffusion.predict_x0(x, t, y),
        "eps": diffusion.predict_eps(x, t, y),
        "v": diffusion.predict_v(x, t, y),
        "flow": diffusion.predict_flow(x, t, y),
        "p_mean": diffusion.p_mean_variance(x, t, y, clip=True)[0],
        "p_variance": diffusion.p_mean_variance(x, t, y)[1],
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_of_the_batch_has_its_own_t(prediction):
    # Every axis has the batch's length, so that a coefficient along the wrong axis would go unnoticed.
    diffusion = GaussianDiffusion(linear_schedule(10), prediction)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 3, 3, 3))
    t = np.array([9, 0, 4])
    together = calls(diffusion, x, y, t)
    for n in range(3):
        for given_t in (int(t[n]), t[n], t[n : n + 1]):
            alone = calls(diffusion, x[n : n + 1], y[n : n + 1], given_t)
            for name, value in alone.items():
                assert_array_equal(together[name][n : n + 1], value, err_msg=name)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_libraries_and_float32(dtype, variance, prediction):
    diffusion = GaussianDiffusion(linear_schedule(50), prediction, variance)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 4, 3, 2, 1))
    t = np.array([0, 1, 25, 49])
    exact = calls(diffusion, x, y, t)
    # a is 0.006 at the end of the chain; dividing by it costs float32 two of its seven digits.
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    x_np, y_np = x.astype(dtype), y.astype(dtype)
    for name, value in calls(diffusion, x_np, y_np, t).items():
        assert isinstance(value, np.ndarray) and value.dtype == dtype, name
        assert_allclose(value, exact[name], rtol=tolerance, atol=tolerance, err_msg=name)
    x_strict, y_strict = strict.asarray(x_np), strict.asarray(y_np)
    for strict_t in (t, strict.asarray(t)):
        for name, value in calls(diffusion, x_strict, y_strict, strict_t).items():
            assert isinstance(value, type(x_strict)) and value.dtype == getattr(strict, dtype), name
            assert_allclose(to_numpy(value), exact[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_result_has_the_dtype_of_the_first_array():
    diffusion = GaussianDiffusion(linear_schedule(10))
    x, y = np.ones((2, 3), np.float32), np.ones((2, 3), np.float64)
    for name, value in calls(diffusion, x, y, 3).items():
        assert value.dtype == np.float32, name
    for name, value in calls(diffusion, y, x, 3).items():
        assert value.dtype == np.float64, name


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_t_may_be_any_integer_dtype(dtype):
    diffusion = GaussianDiffusion(linear_schedule(10))
    x = np.ones((2, 3))
    t = np.array([3, 9])
    assert_array_equal(diffusion.q_sample(x, t.astype(dtype), x), diffusion.q_sample(x, t, x))


def test_arguments_are_not_changed():
    diffusion = GaussianDiffusion(linear_schedule(10))
    x, y, t = np.full((2, 3), 2.0), np.full((2, 3), 3.0), np.array([0, 9])
    for array in (x, y, t):
        array.flags.writeable = False
    calls(diffusion, x, y, t)


# Bad input

GOOD = np.zeros((3, 2))
METHODS = {
    "q_step": ("x_prev", "noise"),
    "q_sample": ("x0", "noise"),
    "training_target": ("x0", "noise"),
    "predict_x0": ("x_t", "output"),
    "predict_eps": ("x_t", "output"),
    "predict_v": ("x_t", "output"),
    "predict_flow": ("x_t", "output"),
    "p_mean_variance": ("x_t", "output"),
    "q_posterior_mean_variance": ("x0", "x_t"),
    "q_mean_variance": ("x0", None),
}


def call(method, **changes):
    """The method on good arguments but for the changes, all by name."""
    first, second = METHODS[method]
    arguments = {first: GOOD, "t": np.zeros(3, int)} | ({second: GOOD} if second else {}) | changes
    return getattr(GaussianDiffusion(linear_schedule(10)), method)(**arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("t", "says"),
    [
        (-1, r"t contains -1; expected 0 \.\.\. 9"),
        (10, r"t contains 10; expected 0 \.\.\. 9"),
        (np.array([0, 1, 10]), r"t contains 10; expected 0 \.\.\. 9"),
        (strict.asarray([0, -3, 10]), r"t contains -3; expected 0 \.\.\. 9"),
        (1.0, "t has dtype float64; expected integers"),
        (np.zeros(3), "t has dtype float64; expected integers"),
        (True, "t has dtype bool; expected integers"),
        (np.zeros(3, bool), "t has dtype bool; expected integers"),
        (None, "t has dtype object; expected integers"),
        (np.zeros(2, int), r"t has shape \(2,\); expected \(3,\)"),
        (np.zeros(1, int), r"t has shape \(1,\); expected \(3,\)"),
        (np.zeros((3, 1), int), r"t has shape \(3, 1\); expected \(3,\)"),
        (np.ma.masked_equal([0, 1, 2], 1), "t is a masked array"),
    ],
)
def test_bad_t_is_named(method, t, says):
    with pytest.raises(ValueError, match="^" + says):
        call(method, t=t)
    for prediction in PREDICTIONS if method == "training_target" else ():
        with pytest.raises(ValueError, match="^" + says):
            GaussianDiffusion(linear_schedule(10), prediction).training_target(GOOD, t, GOOD)


@pytest.mark.parametrize("method", METHODS)
def test_bad_first_array_is_named(method):
    name = METHODS[method][0]
    with pytest.raises(TypeError, match=f"^{name} is a list; expected an array"):
        call(method, **{name: [[0.0, 0.0]] * 3})
    with pytest.raises(ValueError, match=f"^{name} has dtype int64; expected a real floating"):
        call(method, **{name: GOOD.astype(np.int64)})
    with pytest.raises(ValueError, match=f"^{name} has shape \\(\\); expected a batch axis"):
        call(method, **{name: np.zeros(())})
    with pytest.raises(ValueError, match=f"^{name} is a masked array; expected one in which every number"):
        call(method, **{name: np.ma.masked_less(GOOD, 0)})


@pytest.mark.parametrize("method", [method for method, (_, second) in METHODS.items() if second])
def test_bad_second_array_is_named(method):
    first, name = METHODS[method]
    with pytest.raises(ValueError, match=f"^{name} has shape \\(3, 1\\); expected \\(3, 2\\), like {first}"):
        call(method, **{name: np.zeros((3, 1))})  # would broadcast
    with pytest.raises(ValueError, match=f"^{name} has dtype complex128; expected a real floating"):
        call(method, **{name: GOOD.astype(complex)})
    with pytest.raises(
        TypeError, match=f"^{name} is an array of array_api_strict; expected numpy, like {first}"
    ):
        call(method, **{name: strict.zeros((3, 2))})
    with pytest.raises(TypeError, match=f"^{name} is a float; expected an array"):
        call(method, **{name: 0.0})


def test_bad_choices_are_named():
    schedule = linear_schedule(10)
    with pytest.raises(ValueError, match=r"^prediction is 'epsilon'; expected one of 'eps', 'x0', 'v'"):
        GaussianDiffusion(schedule, prediction="epsilon")
    with pytest.raises(
        ValueError, match=r"^variance is 'small'; expected one of 'fixed_small', 'fixed_large'"
    ):
        GaussianDiffusion(schedule, variance="small")
    with pytest.raises(ValueError, match=r"^given is 'score'; expected one of 'eps', 'x0', 'v'"):
        GaussianDiffusion(schedule).predict_x0(GOOD, 0, GOOD, given="score")
    with pytest.raises(TypeError, match=r"^schedule is an ndarray; expected a NoiseSchedule"):
        GaussianDiffusion(schedule.betas)


def test_repr_shows_the_choices():
    diffusion = GaussianDiffusion(NoiseSchedule([0.25]), "v", "fixed_large")
    assert repr(diffusion).endswith("prediction='v', variance='fixed_large')")
