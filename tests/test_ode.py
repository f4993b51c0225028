"""The probability-flow ODE, to its true error: orders of the samplers, inversion, and log-likelihood.

For data N(m, S^2 I) the ODE has a closed solution. x_t stays as many deviations from its mean as it was:
x_t = a m + D_t (x_T - a_T m) / D_T with D_t^2 = a^2 S^2 + s^2. For mixtures scipy solves it, written down
anew.
"""

import itertools
import math
import re
from pathlib import Path

import array_api_strict as strict
import numpy as np
import pytest
from gradients import randomise
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.integrate import solve_ivp

import tinydiff as td
from tinydiff.backend import to_numpy
from tinydiff.likelihood import ode_log_likelihood
from tinydiff.mixture import GaussianMixture
from tinydiff.samplers import SAMPLERS, invert

PREDICTIONS = ["eps", "x0", "v", "flow"]
M, S = 0.7, 0.4
GAUSSIAN = GaussianMixture([1.0], [[M]], S**2)
MIXTURE = GaussianMixture([0.3, 0.4, 0.3], [[-1.0, 0.5], [1.0, 0.0], [0.3, -1.2]], [0.09, 0.04, 0.0625])
COUNTS = (32, 64, 128, 256)
SCHEDULES = {"linear": td.linear_schedule, "cosine": td.cosine_schedule}


def taus(T, count):
    """`count` + 1 times, exactly evenly spaced: with T - 1 = 4096, a power of two."""
    return range(0, T, (T - 1) // count)


def log_snr_schedule(T):
    """Half the log-SNR falls evenly from 4 to -4."""
    lam = np.linspace(4, -4, T)
    abar = 1 / (1 + np.exp(-2 * lam))
    return td.NoiseSchedule(1 - abar / np.concat([[1.0], abar[:-1]]))


def order(errors):
    """The slope of log error against log steps, fitted, with its sign turned."""
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


def at_first_time(denoise, diffusion, sampler, steps, x_T):
    """The state at t = 0, before the last step, which leaves the ODE and takes the estimate of the data."""
    states = td.iterate_samples(
        denoise, diffusion, x_T.shape, sampler, steps, rng=np.random.default_rng(0), x_T=x_T
    )
    return next(state.x for state in states if state.t == 0)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def exact_flow(schedule, x_T):
    """Of N(M, S^2 I), from T-1 to 0."""
    a = np.sqrt(schedule.alphas_cumprod)
    deviation = np.sqrt(schedule.alphas_cumprod * S**2 + schedule.one_minus_alphas_cumprod)
    return a[0] * M + deviation[0] * (x_T - a[-1] * M) / deviation[-1]


# Orders. docs: R.12


def errors_of_the_page():
    """Chapter 6's table: by schedule and sampler, the errors and the fitted order."""
    page = (Path(__file__).parents[1] / "docs" / "06-sampling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (linear|cosine|even).* \| `(.+)` \| [12] \| (0\..+) \|$", page, re.M)
    name = {"linear": "linear", "cosine": "cosine", "even": "log_snr"}
    return {(name[kind], sampler): [float(x) for x in row.split("|")] for kind, sampler, row in rows}


@pytest.mark.parametrize(
    ("sampler", "kind", "prediction", "low", "high"),
    [
        ("ddim", "log_snr", "eps", 0.95, 1.05),
        ("ddim", "linear", "x0", 0.93, 1.05),
        ("ddim", "cosine", "v", 0.95, 1.05),
        ("dpm++", "log_snr", "x0", 1.95, 2.05),
        # Its steps in log-SNR are uneven there: the order comes in later.
        ("dpm++", "linear", "v", 1.65, 2.05),
        ("dpm++", "cosine", "eps", 1.8, 2.05),
        ("heun", "log_snr", "v", 1.95, 2.05),
        ("heun", "linear", "eps", 1.95, 2.05),
        ("heun", "cosine", "x0", 1.95, 2.05),
        ("edm", "log_snr", "eps", 1.95, 2.1),
        ("edm", "linear", "x0", 1.95, 2.05),
        ("edm", "cosine", "v", 2.95, 3.05),  # not yet where its order shows
    ],
)
def test_error_falls_at_the_order_of_the_method(sampler, kind, prediction, low, high):
    """Each with every prediction, on one schedule or another.  docs: R.10, R.11, R.12"""
    schedule = {**SCHEDULES, "log_snr": log_snr_schedule}[kind](4097)
    diffusion = td.GaussianDiffusion(schedule, prediction)
    x_T = np.linspace(-2, 2, 9)[:, None]
    truth = exact_flow(schedule, x_T)
    denoise = GAUSSIAN.denoiser(diffusion)
    errors = [rms(at_first_time(denoise, diffusion, sampler, taus(4097, n), x_T) - truth) for n in COUNTS]
    *stated, fitted = errors_of_the_page()[kind, sampler]
    assert_array_equal([float(f"{error:.2g}") for error in errors], stated)
    assert abs(order(errors) - fitted) < 0.006
    assert low < fitted < high
    assert errors[-1] < (1e-2 if sampler == "ddim" else 3e-3)


@pytest.mark.parametrize(
    ("sampler", "bound"), [("ddim", 2e-2), ("dpm++", 1e-2), ("heun", 2e-4), ("edm", 2e-4)]
)
def test_samplers_follow_the_ode_of_a_mixture(sampler, bound):
    """Against an adaptive Runge-Kutta method of order 8 in another clock, log s/a.  docs: R.7"""
    schedule = td.linear_schedule(T=513)
    diffusion = td.GaussianDiffusion(schedule, "eps")
    x_T = np.random.default_rng(0).standard_normal((20, 2))
    log_sigma = np.log(np.sqrt(schedule.one_minus_alphas_cumprod / schedule.alphas_cumprod))

    def slope(u, y):  # d(x/a) / du = -sigma^2 score of x/a, whose density is the mixture blurred by sigma
        y, variance = y.reshape(20, 2), np.exp(2 * u)
        blurred = GaussianMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances + variance * np.eye(2))
        return (-variance * blurred.score(y)).ravel()

    a = np.sqrt(schedule.alphas_cumprod)
    solved = solve_ivp(
        slope, (log_sigma[-1], log_sigma[0]), (x_T / a[-1]).ravel(), "DOP853", rtol=1e-10, atol=1e-10
    )
    truth = a[0] * solved.y[:, -1].reshape(20, 2)
    assert rms(at_first_time(MIXTURE.denoiser(diffusion), diffusion, sampler, None, x_T) - truth) < bound


# The first order of all of them, from the formulas of each paper


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_is_the_first_order_of_dpm_solver(kind, prediction):  # docs: R.4, R.10
    """x' = (s'/s) x - a' (exp(-h) - 1) x0 (Lu et al. 2022, order 1), the last step with exp(-h) = 0."""
    diffusion = td.GaussianDiffusion(SCHEDULES[kind](100), prediction)
    denoise = MIXTURE.denoiser(diffusion)
    x = x_T = np.random.default_rng(0).standard_normal((10, 2))
    timesteps = np.round(np.linspace(0, 99, 9)).astype(int)
    a = np.sqrt(diffusion.schedule.alphas_cumprod)
    s = np.sqrt(diffusion.schedule.one_minus_alphas_cumprod)
    for t, t_next in itertools.pairwise([*timesteps[::-1], None]):
        x0 = MIXTURE.posterior_mean(diffusion, x, int(t))
        if t_next is None:
            x = x0
        else:
            h = math.log(a[t_next] / s[t_next]) - math.log(a[t] / s[t])
            x = s[t_next] / s[t] * x - a[t_next] * math.expm1(-h) * x0
    rng = np.random.default_rng(0)
    ddim = td.sample(denoise, diffusion, x.shape, "ddim", 9, rng=rng, x_T=x_T, progress=False)
    assert_allclose(ddim, x, rtol=0, atol=1e-12)
    # With two steps 2M has nothing to extrapolate from, and then nothing to extrapolate to.
    short = [
        td.sample(denoise, diffusion, x.shape, sampler, 2, rng=rng, x_T=x_T, progress=False)
        for sampler in ("ddim", "dpm++")
    ]
    assert_array_equal(*short)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_predicted_does_not_matter(sampler):
    x_T = np.random.default_rng(0).standard_normal((10, 2))
    ends = []
    for prediction in PREDICTIONS:
        diffusion = td.GaussianDiffusion(td.linear_schedule(200), prediction)
        rng = np.random.default_rng(1)
        denoise = MIXTURE.denoiser(diffusion)
        how = dict(rng=rng, eta=0.3 * (sampler == "ddim"), x_T=x_T, progress=False)
        ends.append(td.sample(denoise, diffusion, (10, 2), sampler, 20, **how))
    assert_allclose(ends[1:], [ends[0]] * 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_the_data(sampler):
    """300 steps, 2000 samples: Kolmogorov-Smirnov on three projections, each a false alarm of 1e-4."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(300), "v")
    n = 2000
    rng = np.random.default_rng(3)
    denoise = MIXTURE.denoiser(diffusion)
    x = to_numpy(
        td.sample(
            denoise, diffusion, (n, 2), sampler, 300, rng=rng, progress=False, x_T=rng.normal(size=(n, 2))
        )
    )
    deviations = np.sqrt(MIXTURE.covariances[:, 0, 0])
    for direction in np.array([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]]):
        cdf = lambda u, d=direction: sum(  # noqa: E731
            w * stats.norm.cdf(u, m @ d, s) for w, m, s in zip(MIXTURE.weights, MIXTURE.means, deviations)
        )
        assert stats.kstest(x @ direction, cdf).pvalue > 1e-4


# Learned variances


def test_a_learned_variance_lies_between_the_fixed_ones():
    schedule = td.linear_schedule(50)

    def ends(variance, second):
        diffusion = td.GaussianDiffusion(schedule, "eps", variance)

        def denoise(x, t):
            eps = np.tanh(x)
            return eps if second is None else np.concat([eps, np.broadcast_to(second, x.shape)], axis=-1)

        rng = np.random.default_rng(0)
        return td.sample(denoise, diffusion, (6, 2), "ddpm", 10, rng=rng, x_T=np.ones((6, 2)), progress=False)

    assert_allclose(ends("learned_range", -1.0), ends("fixed_small", None), rtol=1e-10)
    assert_allclose(ends("learned_range", 1.0), ends("fixed_large", None), rtol=1e-10)
    by_element = ends("learned_range", np.array([-1.0, 1.0]))
    assert_allclose(by_element[:, 0], ends("fixed_small", None)[:, 0], rtol=1e-10)
    assert_allclose(by_element[:, 1], ends("fixed_large", None)[:, 1], rtol=1e-10)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun", "edm"])
def test_the_others_take_no_notice_of_a_learned_variance(sampler):
    schedule = td.linear_schedule(50)
    ends = []
    for variance in ("fixed_small", "learned_range"):
        diffusion = td.GaussianDiffusion(schedule, "v", variance)
        denoise, rng = MIXTURE.denoiser(diffusion), np.random.default_rng(0)
        how = dict(rng=rng, eta=0.5 * (sampler == "ddim"), x_T=np.ones((6, 2)), progress=False)
        ends.append(td.sample(denoise, diffusion, (6, 2), sampler, 10, **how))
        code = invert(denoise, diffusion, np.ones((6, 2)), 10, progress=False)
        ends[-1] = np.stack([ends[-1], code])
    assert_array_equal(*ends)


# Inversion


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_inversion_and_back_at_first_order(kind, prediction):  # docs: R.9
    schedule = SCHEDULES[kind](4097)
    diffusion = td.GaussianDiffusion(schedule, prediction)
    denoise = GAUSSIAN.denoiser(diffusion)
    x0 = np.linspace(-0.5, 1.9, 9)[:, None]
    a, s2 = np.sqrt(schedule.alphas_cumprod[-1]), schedule.one_minus_alphas_cumprod[-1]
    exact_code = a * M + np.sqrt(a**2 * S**2 + s2) * (x0 - M) / S
    off_code, off_trip = [], []
    for count in COUNTS:
        code = invert(denoise, diffusion, x0, taus(4097, count), progress=False)
        back = td.sample(
            denoise,
            diffusion,
            x0.shape,
            "ddim",
            taus(4097, count),
            rng=np.random.default_rng(0),
            x_T=code,
            progress=False,
        )
        off_code.append(rms(code - exact_code))
        off_trip.append(rms(back - x0))
    assert 0.9 < order(off_code) < 1.1
    assert 0.9 < order(off_trip) < 1.1
    assert off_trip[-1] < 0.03


def test_every_step_of_the_inversion():
    """The step of DDIM, upwards; the first goes to sqrt(abar_0) x_0, and reads eps there (docs: R.9)."""
    schedule, taus = td.linear_schedule(10), [0, 4, 9]
    a, s = np.sqrt(schedule.alphas_cumprod[taus]), np.sqrt(schedule.one_minus_alphas_cumprod[taus])
    x0 = np.linspace(-2, 2, 5)[:, None]

    def denoise(x, t):
        return np.tanh(x + t[:, None] / 10)

    x = a[0] * x0
    x = x + s[0] * denoise(x, np.zeros(5))
    for i in (1, 2):
        eps = denoise(x, np.full(5, taus[i - 1]))
        x = a[i] * (x - s[i - 1] * eps) / a[i - 1] + s[i] * eps
    code = invert(denoise, td.GaussianDiffusion(schedule), x0, taus, progress=False)
    assert_allclose(code, x, rtol=1e-12)


def test_inverted_data_is_standard_normal():
    """Two chi^2 tests and two z tests, each a false alarm of 1e-5."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(1000), "v")
    x0 = MIXTURE.sample(2000, np.random.default_rng(5))
    code = invert(MIXTURE.denoiser(diffusion), diffusion, x0, progress=False)
    assert code.shape == x0.shape
    for column in code.T:
        assert stats.kstest(column, "norm").pvalue > 1e-5
        assert 1e-5 < stats.chi2.cdf(np.sum(column**2), 2000) < 1 - 1e-5


def test_inversion_of_every_kind_of_array(capsys):
    diffusion = td.GaussianDiffusion(td.linear_schedule(20), "eps")
    x0 = np.random.default_rng(0).standard_normal((4, 3, 3, 1)).astype(np.float32)
    numpy_code, strict_code = (
        invert(lambda x, t: 0.5 * x, diffusion, xp.asarray(x0), 5, progress=False) for xp in (np, strict)
    )
    assert numpy_code.dtype == np.float32
    assert strict_code.dtype == strict.float32
    assert_allclose(to_numpy(strict_code), numpy_code, rtol=1e-6)
    assert capsys.readouterr().err == ""
    model = td.MLP(in_features=2, hidden=4, blocks=1, time_features=4)
    assert invert(model, diffusion, np.zeros((3, 2), np.float32)).shape == (3, 2)
    assert "inverting" in capsys.readouterr().err
    with pytest.raises(ValueError, match="steps is 21"):
        invert(model, diffusion, np.zeros((3, 2), np.float32), 21)
    with pytest.raises(ValueError, match=r"^x0 has shape \(0, 2\); expected"):
        invert(model, diffusion, np.zeros((0, 2), np.float32))
    with pytest.raises(ValueError, match=r"^x0 has shape \(\); expected"):
        invert(model, diffusion, np.zeros((), np.float32))
    assert invert(lambda x, t: x, diffusion, np.zeros((1, 1))).shape == (1, 1)


# Log-likelihood


def with_backward(mixture, diffusion):
    """The mixture's denoiser, called like a model. The derivative of E[x0 | x] is a / s^2 Cov[x0 | x]."""
    denoise = mixture.denoiser(diffusion)

    def model(x, t):
        a = np.sqrt(diffusion.schedule.alphas_cumprod[t])[:, None]
        s = np.sqrt(diffusion.schedule.one_minus_alphas_cumprod[t])[:, None]
        covariance = mixture.posterior_covariance(diffusion, x, t)

        def backward(dy):
            dy = dy[:, : x.shape[1]]
            of_x0 = a / s**2 * (covariance @ dy[:, :, None])[:, :, 0]
            of_eps = (dy - a * of_x0) / s
            of_v, of_flow = (a * dy - of_x0) / s, of_eps - of_x0
            return {"x0": of_x0, "eps": of_eps, "v": of_v, "flow": of_flow}[diffusion.prediction]

        return denoise(x, t), backward

    return model


@pytest.mark.parametrize(
    ("prediction", "variance"), [(p, "fixed_small") for p in PREDICTIONS] + [("eps", "learned_range")]
)
def test_log_likelihood_of_a_mixture(prediction, variance):
    """Within 1e-3 nats of the truth at each of 100 points.  docs: R.13"""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(1000), prediction, variance)
    x = MIXTURE.sample(100, np.random.default_rng(0))
    found = ode_log_likelihood(with_backward(MIXTURE, diffusion), diffusion, x, 300, progress=False)
    assert found.shape == (100,)
    assert found.dtype == np.float64
    assert_allclose(found, MIXTURE.log_prob(x), rtol=0, atol=1e-3)


def test_log_likelihood_at_second_order_in_the_number_of_steps():
    """And with nothing of the signal left at the end, where only v and x0 say what to do."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(4097, max_beta=1.0), "v")
    x = np.linspace(-0.5, 1.9, 9)[:, None]
    model = with_backward(GAUSSIAN, diffusion)
    errors = [
        rms(ode_log_likelihood(model, diffusion, x, taus(4097, n), progress=False) - GAUSSIAN.log_prob(x))
        for n in COUNTS
    ]
    assert 1.9 < order(errors) < 2.1
    assert errors[-1] < 2e-4


def test_a_density_of_grey_levels_is_told_in_bits():
    """Noise of a level's width, and D log(127.5) to minus the log-density: the code length of the level."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(100), "v")
    levels = 2 * np.array([[200, 230], [180, 215], [217, 255]]) / 255 - 1
    width = (np.linspace(-1, 1, 5)[:-1] + 0.25) / 255  # of a smooth density four points tell the mean
    noisy = levels + np.stack(np.meshgrid(width, width), axis=-1).reshape(-1, 1, 2)
    data = GaussianMixture([1.0], [[M, M]], S**2)
    found = ode_log_likelihood(
        with_backward(data, diffusion), diffusion, noisy.reshape(-1, 2), progress=False
    )
    nats = 2 * math.log(127.5) - np.mean(found.reshape(-1, 3), axis=0)
    interval = stats.norm(M, S).cdf(levels + 1 / 255) - stats.norm(M, S).cdf(levels - 1 / 255)
    assert_allclose(nats, -np.sum(np.log(interval), axis=1), atol=1e-3)


class AllSigns:
    """Draws every one of the 2^D sign vectors in turn, where a numpy.random.Generator is expected."""

    def __init__(self, D):
        self.signs = itertools.product([-1.0, 1.0], repeat=D)

    def standard_normal(self, shape, dtype):
        return np.broadcast_to(np.array(next(self.signs), dtype), shape)


def test_hutchinson_is_exact_over_all_signs_and_unbiased_over_random_ones():  # docs: R.14
    full = np.array([[0.3, 0.2, 0.1], [0.2, 0.4, 0.0], [0.1, 0.0, 0.2]])
    mixture = GaussianMixture(
        [0.5, 0.5], [[0.5, 0.0, 1.0], [-0.5, 0.3, -0.5]], np.stack([full, 0.3 * np.eye(3)])
    )
    diffusion = td.GaussianDiffusion(td.linear_schedule(30), "v")
    model = with_backward(mixture, diffusion)
    x = mixture.sample(3, np.random.default_rng(0))
    exact = ode_log_likelihood(model, diffusion, x, progress=False)
    every = ode_log_likelihood(model, diffusion, x, probes=8, rng=AllSigns(3), progress=False)
    assert_allclose(every, exact, rtol=1e-12)
    many = np.repeat(x[:1], 5000, axis=0)
    draws = ode_log_likelihood(
        model, diffusion, many, 10, probes=1, rng=np.random.default_rng(1), progress=False
    )
    exact = ode_log_likelihood(model, diffusion, x[:1], 10, progress=False)
    error = np.std(draws) / math.sqrt(5000)
    assert error > 1e-4  # else nothing is random
    assert abs(np.mean(draws) - exact[0]) < 5 * error  # a false alarm of 6e-7


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_traces_of_a_network_are_those_of_central_differences(prediction, variance):
    """Heun's rule written anew; the trace of dv/dx from v alone."""
    rng = np.random.default_rng(0)
    out = 4 if variance == "learned_range" else 2
    model = randomise(td.MLP(2, out, hidden=8, blocks=1, time_features=4, rng=rng).to(np, np.float64), rng)
    diffusion = td.GaussianDiffusion(td.linear_schedule(12), prediction, variance)
    x = rng.standard_normal((3, 2))
    before = {name: rng.standard_normal(p.shape) for name, p in model.named_parameters().items()}
    for name, p in model.named_parameters().items():
        p.grad = before[name]

    def velocity(y, i):
        return diffusion.predict_v(y, i, model.predict(y, np.full(len(y), i)))

    def trace(y, i, delta=1e-5):
        ahead, back = (
            [velocity(y + sign * delta * unit, i)[:, j] for j, unit in enumerate(np.eye(2))]
            for sign in (1, -1)
        )
        return sum(ahead[j] - back[j] for j in range(2)) / (2 * delta)

    y, expected, phi_before = x, np.zeros(3), 0.0
    for i, phi in enumerate(np.arccos(np.sqrt(diffusion.schedule.alphas_cumprod))):
        v, tr = (velocity(y, i - 1), trace(y, i - 1)) if i else (0.0, 0.0)
        ahead = y + (phi - phi_before) * v
        expected += (phi - phi_before) / 2 * (tr + trace(ahead, i))
        y, phi_before = y + (phi - phi_before) / 2 * (v + velocity(ahead, i)), phi
    expected += np.sum(stats.norm.logpdf(y), axis=1)
    found = ode_log_likelihood(model, diffusion, x, progress=False)
    assert_allclose(found, expected, rtol=1e-7)
    for name, p in model.named_parameters().items():
        assert_array_equal(p.grad, before[name])  # left as they were


def test_one_probe_is_exact_where_no_number_depends_on_another():  # docs: R.14
    """A sign squared is 1: of a diagonal derivative each draw gives the trace, as no other numbers would."""
    slopes = np.array([0.9, -0.5, 0.2])

    def model(x, t):
        return np.sin(slopes * x), lambda dy: dy * slopes * np.cos(slopes * x)

    diffusion, x = td.GaussianDiffusion(td.linear_schedule(12)), np.random.default_rng(0).normal(size=(4, 3))
    exact = ode_log_likelihood(model, diffusion, x, progress=False)
    rng = np.random.default_rng(1)
    found = ode_log_likelihood(model, diffusion, x, probes=1, rng=rng, progress=False)
    assert_allclose(found, exact, rtol=1e-12)


def test_gradients_are_left_as_they_were_when_it_is_interrupted():
    class Interrupted(td.MLP):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls > 3:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    rng = np.random.default_rng(0)
    model = randomise(Interrupted(2, 2, hidden=8, blocks=1, time_features=4, rng=rng), rng)
    before = {name: rng.standard_normal(p.shape) for name, p in model.named_parameters().items()}
    for name, p in model.named_parameters().items():
        p.grad = before[name].copy()
    with pytest.raises(KeyboardInterrupt):
        ode_log_likelihood(
            model, td.GaussianDiffusion(td.linear_schedule(9)), np.ones((3, 2)), progress=False
        )
    for name, p in model.named_parameters().items():
        assert_array_equal(p.grad, before[name])


def test_the_learned_variance_of_images_plays_no_part_in_their_likelihood():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 1))

    def alone(x, t):
        return np.sin(x), lambda dy: dy * np.cos(x)

    def with_variance(x, t):
        return np.concat([np.sin(x), x**2], axis=-1), lambda dy: dy[..., :1] * np.cos(x) + dy[..., 1:] * 2 * x

    found = [
        ode_log_likelihood(model, diffusion, x, progress=False)
        for variance, model in (("fixed_small", alone), ("learned_range", with_variance))
        for diffusion in [td.GaussianDiffusion(td.linear_schedule(6), "eps", variance)]
    ]
    assert_array_equal(*found)
    in_a_row = ode_log_likelihood(
        alone, td.GaussianDiffusion(td.linear_schedule(6)), x.reshape(2, 9), progress=False
    )
    assert_allclose(found[0], in_a_row, rtol=1e-12)  # it is a density of as many numbers, in whatever shape


def test_log_likelihood_of_images():
    model = td.UNet(1, 1, (4,), 1, attention=(True,), norm_groups=2, head_dim=4)
    randomise(model, np.random.default_rng(0), np.float32)
    diffusion = td.GaussianDiffusion(td.linear_schedule(20), "v")
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    exact = ode_log_likelihood(model, diffusion, x, 2, progress=False)
    rng = np.random.default_rng(0)
    estimate = ode_log_likelihood(model, diffusion, x, 2, probes=60, rng=rng, progress=False)
    assert_allclose(estimate, exact, rtol=0.05)
    assert np.all(estimate != exact)
    assert all(not np.any(p.grad) for p in model.named_parameters().values())


def test_log_likelihood_under_array_api_strict():
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), "v", "learned_range")

    def model(x, t):
        xp = x.__array_namespace__() if hasattr(x, "__array_namespace__") else np
        return xp.concat([0.1 * x, x], axis=-1), lambda dy: 0.1 * dy[:, :2]

    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    for probes in (None, 2):
        found, under_strict = (
            ode_log_likelihood(
                model, diffusion, xp.asarray(x), probes=probes, rng=np.random.default_rng(1), progress=False
            )
            for xp in (np, strict)
        )
        assert isinstance(under_strict, np.ndarray)
        assert_allclose(under_strict, found, rtol=1e-6)


def test_log_likelihood_refuses_and_shows_progress(capsys):
    diffusion = td.GaussianDiffusion(td.linear_schedule(10))
    model = with_backward(GAUSSIAN, diffusion)
    x = np.zeros((2, 1))
    for probes in (0, 1.5, True):
        bad = dict(probes=probes, rng=np.random.default_rng(0))
        with pytest.raises(ValueError, match="probes is"):
            ode_log_likelihood(model, diffusion, x, **bad)
    with pytest.raises(TypeError, match="rng is a NoneType; expected a numpy"):
        ode_log_likelihood(model, diffusion, x, probes=1)
    with pytest.raises(ValueError, match=r"^x has shape \(0, 1\); expected"):
        ode_log_likelihood(model, diffusion, x[:0])
    with pytest.raises(ValueError, match="steps is 11"):
        ode_log_likelihood(model, diffusion, x, 11)
    with pytest.raises(ValueError, match=r"x is a numpy array of float64; .* float32"):
        ode_log_likelihood(td.MLP(1, hidden=4, blocks=1, time_features=4), diffusion, x)
    dark = td.GaussianDiffusion(td.cosine_schedule(10, max_beta=1.0))
    with pytest.raises(ValueError, match="says nothing of x0 at t = 9"):
        ode_log_likelihood(model, dark, x)
    denoise = GAUSSIAN.denoiser(diffusion)
    for answer in (denoise, lambda x, t: (denoise(x, t), None), lambda x, t: (denoise(x, t), len, 0)):
        with pytest.raises(TypeError, match=r"model\(x, t\) is .*; expected \(output, backward\)"):
            ode_log_likelihood(answer, diffusion, x, progress=False)
    assert capsys.readouterr().err == ""
    ode_log_likelihood(model, diffusion, x)
    assert "likelihood" in capsys.readouterr().err


@pytest.mark.parametrize(("sampler", "prediction"), [("heun", "v"), ("heun", "eps"), ("edm", "eps")])
def test_slopes_keep_their_digits_where_there_is_little_noise(sampler, prediction):
    """float32 by way of x_0, whose rounding is divided by s, would be off by 1e-7 / 3e-7."""
    diffusion = td.GaussianDiffusion(td.LearnedSchedule(-30.0, 5.0).schedule(1000), prediction)
    rng = np.random.default_rng(0)
    x_T = rng.standard_normal((50, 2))

    def network(x, t):
        return np.sin(2 * x).astype(x.dtype)

    single, double = (
        td.sample(network, diffusion, (50, 2), sampler, 2, rng=rng, x_T=x_T.astype(dtype), progress=False)
        for dtype in (np.float32, np.float64)
    )
    assert np.max(np.abs(single - double)) < 1e-5 * np.max(np.abs(double))


# What is degenerate


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("T", "steps"), [(1, None), (2, None), (100, 1), (100, 7), (100, None)])
def test_point_data_is_found_exactly(sampler, kind, T, steps):
    """Zero variance, one step, T = 1: the estimate is right wherever one stands, so is every sampler."""
    diffusion = td.GaussianDiffusion(SCHEDULES[kind](T), "x0")
    point = np.array([0.3, -2.0])
    rng = np.random.default_rng(0)
    how = dict(rng=rng, eta=0.5 * (sampler == "ddim"), progress=False)
    x = td.sample(lambda x, t: point + 0 * x, diffusion, (3, 2), sampler, steps, **how)
    assert_allclose(x, np.broadcast_to(point, (3, 2)), rtol=1e-6)


def test_from_pure_noise():
    """alphas_cumprod ends in 0: the clock s/a is infinite there, the others are not."""
    for schedule in (
        td.cosine_schedule(20, max_beta=1.0),
        td.NoiseSchedule([0.1, 0.5, 1.0, 0.3]),
        td.NoiseSchedule([0.5, 1.0]),
        td.NoiseSchedule([1.0]),
    ):
        for prediction in ("x0", "v", "flow"):
            diffusion = td.GaussianDiffusion(schedule, prediction)
            denoise = MIXTURE.denoiser(diffusion)
            for sampler in ("dpm++", "heun"):
                x = td.sample(
                    denoise, diffusion, (5, 2), sampler, rng=np.random.default_rng(0), progress=False
                )
                assert np.all(np.isfinite(x))
            with pytest.raises(ValueError, match=r"sampler is 'edm'.*'heun'"):
                td.sample(denoise, diffusion, (5, 2), "edm", rng=np.random.default_rng(0), progress=False)


# Steps, by name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_times_can_be_given(sampler):
    diffusion = td.GaussianDiffusion(td.linear_schedule(41), "v")
    asked = []

    def denoise(x, t):
        asked.append(int(t[0]))
        return MIXTURE.denoiser(diffusion)(x, t)

    x_T = np.ones((2, 2))
    ends = []
    for steps in (5, [0, 10, 20, 30, 40], np.arange(0, 41, 10), range(0, 41, 10)):
        rng = np.random.default_rng(0)
        ends.append(td.sample(denoise, diffusion, (2, 2), sampler, steps, rng=rng, x_T=x_T, progress=False))
        assert_array_equal(ends[-1], ends[0])
    asked.clear()
    states = list(td.iterate_samples(denoise, diffusion, (2, 2), sampler, [3, 7, 20], rng=rng, x_T=x_T))
    assert [state.t for state in states] == [20, 7, 3, -1]
    assert asked == ([20, 7, 7, 3, 3] if sampler in ("heun", "edm") else [20, 7, 3])
    with pytest.raises(ValueError, match=r"^steps\[1\] is 3, after 3"):
        td.sample(denoise, diffusion, (2, 2), sampler, [3, 3], rng=rng, progress=False)
