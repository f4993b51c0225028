"""The bound: its terms against formulas and quadrature, its gradients, and the whole against the truth."""

import math

import array_api_strict as strict
import numpy as np
import pytest
from gradients import Case, assert_central_differences_agree, frozen, normal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, special, stats

from tinydiff.bound import (
    bits_per_dim,
    discretized_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
    prior_term,
    step_term,
    variational_bound,
)
from tinydiff.continuous_bound import reconstruction_term
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import vlb_loss
from tinydiff.mixture import GaussianMixture
from tinydiff.models import MLP
from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule

PREDICTIONS = ["eps", "x0", "v", "flow"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
LEVELS = 2 * np.arange(256) / 255 - 1
seeds = st.integers(0, 2**32 - 1)
every_kind = pytest.mark.parametrize("variance", VARIANCES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
both_decoders = pytest.mark.parametrize("decoder", ["density", "8bit"])


# KL between Gaussians


@settings(max_examples=30)
@given(*[st.floats(-2, 2)] * 4)
def test_kl_is_the_integral(mean1, log_variance1, mean2, log_variance2):
    p, q = stats.norm(mean1, np.exp(log_variance1 / 2)), stats.norm(mean2, np.exp(log_variance2 / 2))
    reach = 12 * p.std()
    expected, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean1 - reach, mean1 + reach, epsabs=1e-12
    )
    arguments = (np.array([v]) for v in (mean1, log_variance1, mean2, log_variance2))
    assert_allclose(gaussian_kl(*arguments)[0], [expected], rtol=1e-8, atol=1e-10)


def test_kl_of_almost_equal_variances_keeps_its_digits():
    e = 1e-6
    kl, _ = gaussian_kl(*(np.array([v]) for v in (0.0, 1.0 + e, 0.0, 1.0)))
    assert_allclose(kl, [e**2 / 4 + e**3 / 12], rtol=1e-9)  # (e^x - 1 - x) / 2; naively 1e-16 / 1e-12
    kl, _ = gaussian_kl(*(np.array([v]) for v in (0.5, 1.0, 0.5, 1.0)))
    assert_array_equal(kl, 0)


@settings(max_examples=20)
@given(seeds, st.sampled_from([(3, 1), (3, 4), (1, 4), (4,)]))
def test_gradient_of_kl(seed, narrow):
    rng = np.random.default_rng(seed)
    shapes = [(3, 4), narrow, (3, 4), narrow]
    assert_central_differences_agree(Case(gaussian_kl, [normal(rng, shape) for shape in shapes]), rng)


# Decoders


@pytest.mark.parametrize(("dtype", "log_variance"), [(np.float32, -120.0), (np.float64, -1000.0)])
def test_variances_whose_inverse_is_no_number(dtype, log_variance):
    """A precision of e^120 is none in float32; the squares it multiplies make a small number of it."""
    sigma = np.exp(log_variance / 2)
    x, same, off = (np.array([z * sigma], dtype) for z in (0.0, 0.0, 3.0))
    narrow = np.array([log_variance], dtype)
    nll, backward = gaussian_nll(x, off, narrow)
    assert_allclose(nll, (np.log(2 * np.pi) + log_variance + 9) / 2, rtol=1e-5)
    dmean, dlog_variance = backward(np.ones(1, dtype))
    assert_allclose(dmean, 3 / sigma, rtol=1e-4)
    assert_allclose(dlog_variance, (1 - 9) / 2, rtol=1e-4)
    assert gaussian_nll(x, same, narrow)[0] == (dtype(np.log(2 * np.pi)) + narrow) / 2
    kl, backward = gaussian_kl(x, narrow, off, narrow)
    assert_allclose(kl, 4.5, rtol=1e-4)
    assert_allclose(backward(np.ones(1, dtype))[2], 3 / sigma, rtol=1e-4)
    assert gaussian_kl(x, narrow, same, narrow)[0] == 0


@settings(max_examples=20)
@given(seeds)
def test_density_of_points(seed):
    rng = np.random.default_rng(seed)
    x, mean, log_variance = rng.standard_normal((3, 4, 2))
    nll, _ = gaussian_nll(x, mean, log_variance)
    assert_allclose(nll, -stats.norm(mean, np.exp(log_variance / 2)).logpdf(x), rtol=1e-12, atol=1e-12)
    case = Case(lambda m, v: gaussian_nll(x, m, v), [normal(rng, (4, 2)), normal(rng, (4, 1))])
    assert_central_differences_agree(case, rng)


@settings(max_examples=200)
@given(st.floats(-3, 3), st.floats(-10, 3))
def test_probabilities_of_all_levels_sum_to_1(mean, log10_variance):
    log_variance = np.full(256, log10_variance * math.log(10))
    nll, _ = discretized_gaussian_nll(LEVELS, np.full(256, mean), log_variance)
    assert np.all(np.isfinite(nll)) and np.all(nll >= 0)
    assert abs(np.sum(np.exp(-nll)) - 1) <= 1e-12


@settings(max_examples=100)
@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(-10, 2))
def test_probability_of_a_level_is_the_integral_over_its_bin(level, mean, log10_variance):
    sigma = 10 ** (log10_variance / 2)
    low = -np.inf if level == 0 else (LEVELS[level] - 1 / 255 - mean) / sigma
    high = np.inf if level == 255 else (LEVELS[level] + 1 / 255 - mean) / sigma
    # phi(peak), its largest value on the bin, goes in front of the integral, which then neither vanishes nor
    # overflows; u is the distance from there, so that it has all its digits.
    peak = low if low > 0 else high if high < 0 else 0.0
    reach = 40 / max(abs(peak), 4)
    inner, _ = integrate.quad(
        lambda u: math.exp(-u * (2 * peak + u) / 2),
        max(low - peak, -reach),
        min(high - peak, reach),
        epsrel=1e-11,
    )
    expected = peak**2 / 2 + math.log(2 * math.pi) / 2 - math.log(inner)
    nll, _ = discretized_gaussian_nll(LEVELS[[level]], np.array([mean]), np.array([2 * math.log(sigma)]))
    assert_allclose(nll, [expected], rtol=1e-9, atol=1e-10)


@settings(max_examples=50)
@given(seeds)
def test_gradient_of_the_discretised_decoder(seed):
    rng = np.random.default_rng(seed)
    x = LEVELS[rng.choice([0, 1, 60, 128, 254, 255], (3, 4))]
    mean = frozen(rng.uniform(-1.3, 1.3, (3, 4)))
    log_variance = frozen(rng.uniform(-5, 1, (3, 1) if rng.random() < 0.5 else (3, 4)))
    case = Case(lambda m, v: discretized_gaussian_nll(x, m, v), [mean, log_variance])
    assert_central_differences_agree(case, rng)


def test_gradient_of_the_discretised_decoder_where_probabilities_underflow():
    """A hundred standard deviations away, P is 1e-2000; the bin is a point to the gradient of its log."""
    x, mean, sigma = LEVELS[[200]], np.array([-1.0]), 0.015
    nll, backward = discretized_gaussian_nll(x, mean, np.array([2 * math.log(sigma)]))
    dmean, dlog_variance = backward(np.ones(1))
    near = (x[0] - 1 / 255 - mean[0]) / sigma  # the bin's near end, where nearly all of its mass is
    assert nll > 700 and 90 < near < 110
    mills = near + 1 / near - 2 / near**3  # phi / Phi-bar: asymptotic series, next term 10 / near^5 = 1e-9
    assert_allclose(dmean, [-mills / sigma], rtol=1e-9)
    assert_allclose(dlog_variance, [-mills * near / 2], rtol=1e-9)


@pytest.mark.parametrize(("mean", "sigma"), [(0.0, 0.01), (0.0, 0.0074), (0.3, 0.1), (-1.0, 0.01)])
def test_the_papers_decoder_is_this_one_near_the_mean_and_has_a_floor(mean, sigma):
    """Ho et al.'s code takes a tanh for Phi, and log of at least 1e-12; what chapter 13 says of it."""

    def cdf(x):
        z = (x - mean) / sigma
        return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    upper = np.where(LEVELS == 1, 1, cdf(LEVELS + 1 / 255))
    lower = np.where(LEVELS == -1, 0, cdf(LEVELS - 1 / 255))
    theirs = -np.log(np.maximum(upper - lower, 1e-12))
    ours, _ = discretized_gaussian_nll(LEVELS, np.full(256, mean), np.full(256, 2 * math.log(sigma)))
    assert np.max(np.abs(ours - theirs)[np.abs(LEVELS - mean) < 2 * sigma]) < 0.01
    assert abs(np.max(theirs) - 27.6) < 0.05 and np.max(ours) > 3 * np.max(theirs)


def test_only_levels_are_decoded():
    ones = np.ones(2)
    for x in ([0.0, 0.5], [1.1, 1.0], [np.nan, 1.0], [-1 - 2 / 255, -1.0], [1 + 2 / 255, 1.0], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="not 8-bit levels"):
            discretized_gaussian_nll(np.array(x), ones, ones)
    discretized_gaussian_nll(LEVELS.astype(np.float32), np.zeros(256), np.zeros(256))


# Terms


def batch(diffusion, shape, seed, decoder="density"):
    """(output, x0, x_t, t), the first and the last of t among them."""
    rng = np.random.default_rng(seed)
    x0 = LEVELS[rng.integers(256, size=shape)] if decoder == "8bit" else rng.standard_normal(shape)
    t = rng.integers(diffusion.T, size=shape[0])
    t[0], t[-1] = 0, diffusion.T - 1
    x_t = diffusion.q_sample(x0, t, rng.standard_normal(shape))
    wide = (*shape[:-1], shape[-1] * (2 if diffusion.variance == "learned_range" else 1))
    return rng.standard_normal(wide), x0, x_t, t


def terms_from_the_formulas(diffusion, output, x0, x_t, t, decoder):
    """Sample by sample, number by number, from Ho et al. (2020) and Nichol & Dhariwal (2021)."""
    schedule = diffusion.schedule
    abar = np.cumprod(1 - schedule.betas)
    beta = schedule.betas
    small = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    small = np.append(small[0] if len(small) else beta[0], small)
    values = []
    for o, x, z, i in zip(output, x0, x_t, t):
        C = x.shape[-1]
        a, s = abar[i] ** 0.5, (1 - abar[i]) ** 0.5
        y = o[..., :C]
        guesses = {"eps": (z - s * y) / a, "x0": y, "v": a * z - s * y, "flow": (z - s * y) / (a + s)}
        guess = guesses[diffusion.prediction]
        if diffusion.variance == "learned_range":
            f = (o[..., C:] + 1) / 2
            var = np.exp(f * np.log(beta[i]) + (1 - f) * np.log(small[i]))
        else:
            var = np.full(x.shape, small[i] if diffusion.variance == "fixed_small" else beta[i])
        if i > 0:
            # Both means have the same part of x_t. With r = small / var, log r and r - 1 can be almost equal.
            gap = abar[i - 1] ** 0.5 * beta[i] / (1 - abar[i]) * (x - guess)
            r_minus_1 = (small[i] - var) / var
            value = 0.5 * (r_minus_1 - np.log1p(r_minus_1) + gap**2 / var)
        elif decoder == "density":
            value = -stats.norm(guess, var**0.5).logpdf(x)
        else:
            upper = np.where(x > 0.999, np.inf, (x + 1 / 255 - guess) / var**0.5)
            lower = np.where(x < -0.999, -np.inf, (x - 1 / 255 - guess) / var**0.5)
            flip = upper + lower > 0
            upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
            log_u, log_l = special.log_ndtr(upper), special.log_ndtr(lower)
            value = -(log_u + np.log1p(-np.exp(log_l - log_u)))
        values.append(np.sum(value))
    return np.array(values)


@every_kind
@every_prediction
@both_decoders
@settings(max_examples=10)
@given(
    betas=st.lists(st.floats(0.01, 0.7), min_size=1, max_size=6),
    shape=st.sampled_from([(4, 3), (3, 2, 2, 1), (1, 2)]),
    seed=seeds,
)
@example(
    betas=[
        0.6261024661362171,
        0.6999999999999433,
        0.4380514705882207,
        0.6999999999999998,
        0.012710601091384907,
    ],
    shape=(1, 2),
    seed=180,
)  # two variances that are almost equal: the formula as it is written has an error of 1e-10
def test_terms_are_the_formulas(prediction, variance, decoder, betas, shape, seed):
    diffusion = GaussianDiffusion(NoiseSchedule(betas), prediction, variance)
    arguments = batch(diffusion, shape, seed, decoder)
    value, _ = step_term(diffusion, *arguments, decoder)
    assert value.shape == shape[:1]
    assert_allclose(value, terms_from_the_formulas(diffusion, *arguments, decoder), rtol=1e-10)


@every_kind
@every_prediction
@both_decoders
@settings(max_examples=8)
@given(seed=seeds, shape=st.sampled_from([(4, 2), (3, 2, 1, 2)]))
def test_gradients_of_terms(prediction, variance, decoder, seed, shape):
    diffusion = GaussianDiffusion(NoiseSchedule([0.05, 0.1, 0.2, 0.4]), prediction, variance)
    output, x0, x_t, t = batch(diffusion, shape, seed, decoder)
    case = Case(lambda o: step_term(diffusion, o, x0, x_t, t, decoder), [frozen(output)])
    assert_central_differences_agree(case, np.random.default_rng(seed))
    # Each sample's term is its own: one that shouts does not drown out the gradients of the others.
    for n in range(shape[0]):
        rows = slice(n, n + 1)
        alone = Case(
            lambda o: step_term(diffusion, o, x0[rows], x_t[rows], t[rows], decoder),  # noqa: B023
            [frozen(output[rows].copy())],
        )
        assert_central_differences_agree(alone, np.random.default_rng(seed))


@every_prediction
def test_clipped_estimates_have_no_gradient(prediction):
    diffusion = GaussianDiffusion(NoiseSchedule([0.05, 0.1, 0.2, 0.4]), prediction)
    output, x0, x_t, t = batch(diffusion, (40, 2), 0)
    value, backward = step_term(diffusion, output, x0, x_t, t, clip=True)
    guess = diffusion.predict_x0(x_t, t, output)
    outside = abs(guess) > 1
    assert 10 < np.sum(outside) < 70
    assert_array_equal(backward(np.ones(40)) == 0, outside)
    at_the_edge = GaussianDiffusion(diffusion.schedule, "x0")
    expected, _ = step_term(at_the_edge, np.clip(guess, -1, 1), x0, x_t, t)
    assert_allclose(value, expected, rtol=1e-12)
    _, backward = step_term(at_the_edge, np.clip(guess, -1, 1), x0, x_t, t, clip=True)
    assert np.all(backward(np.ones(40)) != 0)  # on the edge is not outside


@given(st.lists(st.floats(1e-6, 0.99), min_size=1, max_size=10), seeds)
def test_prior_term_is_the_divergence_from_the_prior(betas, seed):
    diffusion = GaussianDiffusion(NoiseSchedule(betas))
    x0 = np.random.default_rng(seed).standard_normal((3, 2, 2))
    abar = np.prod(1 - np.array(betas))
    expected = 0.5 * np.sum(abar * x0**2 + (1 - abar) - 1 - np.log(1 - abar), axis=(1, 2))
    assert_allclose(prior_term(diffusion, x0), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("betas", "expected"),
    [([1 - 1e-10] * 2, [5e-21, 0]), ([1e-20], [-math.log(1e-20) / 2, (-1 - math.log(1e-20)) / 2])],
)
def test_prior_term_keeps_its_digits_at_both_ends(betas, expected):
    """Where 1 - abar is 1, abar x_0^2 / 2 is left; where abar is 1, - 1/2 log(1 - abar)."""
    diffusion = GaussianDiffusion(NoiseSchedule(betas))
    assert_allclose(prior_term(diffusion, np.array([[1.0], [0.0]])), expected, rtol=1e-5, atol=1e-25)
    bounds = [GaussianMixture([1], [[x]], 0.0).optimal_bound(diffusion) for x in (1.0, 0.0)]
    assert_allclose([bound.L_T for bound in bounds], expected, rtol=1e-5, atol=1e-25)


# The bound of Gaussian data


def gauss_hermite(n=4):
    """Nodes and weights of the standard normal, exact for polynomials of degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / np.sum(weights)


@every_prediction
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("schedule", [linear_schedule(200), cosine_schedule(50), linear_schedule(1)])
def test_bound_on_a_gaussian_is_the_closed_form(prediction, variance, schedule):
    """Data N(m, c) and the exact denoiser; expectations of quadratic functions by Gauss-Hermite are exact."""
    m, c, T = 0.4, 0.3, schedule.T
    diffusion = GaussianDiffusion(schedule, prediction, variance)
    data = GaussianMixture([1], [[m]], c)

    z, weight = gauss_hermite()
    x0 = np.repeat(m + np.sqrt(c) * z, z.size)[:, None]
    noise = np.tile(z, z.size)[:, None]
    weights = np.outer(weight, weight).reshape(-1)
    code = weights @ prior_term(diffusion, x0)
    for i in range(T):
        t = np.full(x0.shape[0], i)
        x_t = diffusion.q_sample(x0, t, noise)
        code += weights @ step_term(diffusion, data.denoiser(diffusion)(x_t, t), x0, x_t, t)[0]

    beta, abar = schedule.betas, schedule.alphas_cumprod
    rest = schedule.one_minus_alphas_cumprod
    closed = 0.5 * (abar[-1] * (m**2 + c) - abar[-1] - np.log(rest[-1]))
    error = c * rest / (abar * c + rest)  # Var[x_0 | x_t]
    small = np.append(0, beta[1:] * rest[:-1] / rest[1:])
    small[0] = small[1] if T > 1 else beta[0]
    var = small if variance == "fixed_small" else beta
    closed += 0.5 * (np.log(2 * np.pi * var[0]) + error[0] / var[0])
    w = np.sqrt(abar[:-1]) * beta[1:] / rest[1:]
    r = small[1:] / var[1:]
    closed += 0.5 * np.sum(r - 1 - np.log(r) + w**2 * error[1:] / var[1:])
    assert_allclose(code, closed, rtol=1e-10)
    assert_allclose(data.optimal_bound(diffusion).value, closed, rtol=1e-10)


@pytest.mark.parametrize("T", [2, 5, 50])
def test_learned_variance_reaches_the_likelihood_of_a_round_gaussian(T):
    """Each reverse step is a Gaussian then; with the right variance only the prior's mismatch is left."""
    data = GaussianMixture([1], [[0.3, -0.1]], 0.6)
    diffusion = GaussianDiffusion(linear_schedule(T), "v", "learned_range")
    end = data.marginal(diffusion, T - 1)
    c, m = end.covariances[0, 0, 0], end.means[0]
    mismatch = 0.5 * (2 * (c - 1 - np.log(c)) + m @ m)  # KL( q(x_T) || N(0, I) )
    bound = data.optimal_bound(diffusion)
    assert_allclose(bound.value, data.entropy() + mismatch, rtol=1e-10)
    fixed = data.optimal_bound(GaussianDiffusion(diffusion.schedule, "v", "fixed_large"))
    assert bound.value < fixed.value
    assert np.all(bound.L_t <= fixed.L_t + 1e-12)


MOONLIKE = GaussianMixture([0.3, 0.7], [[-1.2], [0.5]], [0.1, 0.3])


@pytest.mark.parametrize(
    "data", [GaussianMixture([1], [[0, 0]], [[[0.5, 0.2], [0.2, 0.7]]]), MOONLIKE], ids=repr
)
def test_gap_to_the_likelihood_falls_like_1_over_T(data):
    """With the exact denoiser, from above.

    With fixed_large: the posterior's variance is wrong by a factor of its own in the last few steps, however
    many there are, so that with fixed_small the gap does not close.
    """
    T = np.array([100, 200, 400, 800])
    gaps = []
    for steps in T:
        diffusion = GaussianDiffusion(linear_schedule(int(steps)), "v", "fixed_large")
        gaps.append(data.optimal_bound(diffusion, nodes=81).value - data.entropy())
    assert np.all(np.array(gaps) > 0)
    slope = np.polyfit(np.log(T), np.log(gaps), 1)[0]
    assert abs(slope + 1) < 0.05, f"the gaps {gaps} fall like T^{slope:.3f}"
    assert abs(np.log2(gaps[-2] / gaps[-1]) - 1) < 0.02


# The bound of a data set


@every_kind
def test_bound_of_data_is_that_of_the_closed_form(variance):
    """In all, and term by term: within 5 standard errors (51 numbers: false alarm 3e-5; fixed seed)."""
    rng, n = np.random.default_rng(0), 4000
    diffusion = GaussianDiffusion(linear_schedule(25), "eps", variance)
    data, denoise = MOONLIKE.sample(n, rng), MOONLIKE.denoiser(diffusion)
    expected = MOONLIKE.optimal_bound(diffusion)
    bound = variational_bound(denoise, diffusion, data, rng=rng, progress=False, batch_size=1500)
    assert bound.exact and bound.unit == "nats" and expected.exact
    assert abs(bound.value - expected.value) < 5 * bound.standard_error
    assert_allclose(bound.value, bound.L_T + np.sum(bound.L_t), rtol=1e-12)
    for t in range(25):
        steps = np.full(n, t)
        x_t = diffusion.q_sample(data, steps, rng.standard_normal(data.shape))
        terms, _ = step_term(diffusion, denoise(x_t, steps), data, x_t, steps)
        error = 5 * np.std(terms) / np.sqrt(n)
        assert abs(np.mean(terms) - expected.L_t[t]) < error
        assert abs(bound.L_t[t] - expected.L_t[t]) < 1.5 * error
    estimate = variational_bound(denoise, diffusion, data, rng=rng, progress=False, t_samples=3)
    assert not estimate.exact
    assert abs(estimate.value - expected.value) < 5 * estimate.standard_error
    assert estimate.standard_error > bound.standard_error


class Script:
    """In the place of a generator: plays given t, and the same noise whenever asked."""

    def __init__(self, t):
        self.t = list(t)

    def integers(self, low, high, size):
        t = self.t.pop(0)
        assert low <= t < high
        return np.full(size, t)

    def standard_normal(self, shape, dtype):
        return np.random.default_rng(7).standard_normal(shape)


def test_estimate_over_random_t_is_unbiased():
    """Over all equally likely draws of t >= 1, one by one, its mean is the complete sum, to rounding."""
    T, n = 4, 5
    diffusion = GaussianDiffusion(NoiseSchedule([0.1, 0.3, 0.6, 0.7]))
    data = MOONLIKE.sample(n, np.random.default_rng(0))
    denoise = MOONLIKE.denoiser(diffusion)
    options = dict(progress=False)
    complete = variational_bound(denoise, diffusion, data, rng=Script([]), **options)
    estimates = [
        variational_bound(denoise, diffusion, data, rng=Script([i, j]), t_samples=2, **options)
        for i in range(1, T)
        for j in range(1, T)
    ]
    assert_allclose(np.mean([e.value for e in estimates]), complete.value, rtol=1e-12)
    assert np.ptp([e.value for e in estimates]) > 0.1
    assert_allclose(estimates[1].L_t[:3], complete.L_t[:3], rtol=1e-12)  # the draw (1, 2)
    assert np.isnan(estimates[1].L_t[3])
    assert estimates[0].L_T == complete.L_T


def test_a_chain_of_one_step_has_no_other_t_to_draw():
    diffusion, data = GaussianDiffusion(NoiseSchedule([0.5])), MOONLIKE.sample(5, np.random.default_rng(0))
    for t_samples in (None, 3):
        bound = variational_bound(
            MOONLIKE.denoiser(diffusion), diffusion, data, rng=Script([]), t_samples=t_samples, progress=False
        )
        assert bound.exact
        assert_allclose(bound.value, bound.L_T + bound.L_t[0], rtol=1e-12)


def test_standard_error_is_the_spread_over_data():
    diffusion = GaussianDiffusion(linear_schedule(4))
    rng, n = np.random.default_rng(0), 200
    denoise = MOONLIKE.denoiser(diffusion)
    bounds = [
        variational_bound(denoise, diffusion, MOONLIKE.sample(n, rng), rng=rng, progress=False, t_samples=2)
        for _ in range(200)
    ]
    spread = np.std([b.value for b in bounds])
    # The standard deviation of 200 has a relative standard error near 1/20, more for heavy tails.
    assert_allclose(np.mean([b.standard_error for b in bounds]), spread, rtol=0.3)
    alone = variational_bound(denoise, diffusion, MOONLIKE.sample(1, rng), rng=rng, progress=False)
    assert math.isnan(alone.standard_error) and math.isfinite(alone.value)


def test_an_estimate_over_random_t_does_not_miss_the_largest_term():
    """L_0 is most of the bound, and one of 1000 terms: of 1000 random t, every third draw has none at 0."""
    diffusion, rng = GaussianDiffusion(linear_schedule(1000), "v"), np.random.default_rng(0)
    narrow = GaussianMixture([1.0], [[0.0, 0.0]], 0.01)
    expected, denoise = narrow.optimal_bound(diffusion).value, narrow.denoiser(diffusion)
    bounds = [
        variational_bound(denoise, diffusion, narrow.sample(100, rng), rng=rng, progress=False, t_samples=10)
        for _ in range(100)
    ]
    off = np.array([bound.value - expected for bound in bounds])
    assert np.std(off) < 4  # 2.1; with L_0 at random t it is 6.7
    # Two standard errors hold the bound in 83% of tries; with L_0 at random t in 66%.
    assert np.mean(np.abs(off) < 2 * np.array([bound.standard_error for bound in bounds])) > 0.73


def test_standard_error_of_two_is_half_their_distance():
    """Of a constant guess of x_0 in one step, no draw is seen in the bound."""
    diffusion, data = GaussianDiffusion(NoiseSchedule([0.5]), "x0"), np.array([[0.0], [1.0]])

    def bound(data):
        rng = np.random.default_rng(0)
        return variational_bound(lambda x, t: 0 * x, diffusion, data, rng=rng, progress=False)

    first, second = bound(data[:1]).value, bound(data[1:]).value
    assert_allclose(bound(data).standard_error, abs(first - second) / 2, rtol=1e-12)


@pytest.mark.parametrize("t_samples", [None, 4])
@every_kind
def test_the_bound_is_its_terms_written_out(variance, t_samples):
    """A second writing, from the public parts, to rounding: statistics would let some percent pass."""
    diffusion, rng = GaussianDiffusion(linear_schedule(7), "v", variance), np.random.default_rng(0)
    mix = rng.standard_normal((2, 4 if variance == "learned_range" else 2))
    x0 = rng.standard_normal((5, 2))

    def denoise(x, t):
        return np.tanh(x + t[:, None]) @ mix

    found = variational_bound(
        denoise,
        diffusion,
        x0,
        rng=np.random.default_rng(1),
        t_samples=t_samples,
        batch_size=3,
        progress=False,
    )
    rng, expected = np.random.default_rng(1), np.zeros(5)
    for rows in (slice(0, 3), slice(3, 5)):
        batch = x0[rows]
        expected[rows] = prior_term(diffusion, batch)
        for i in range(7 if t_samples is None else 5):
            t = np.full(len(batch), i) if t_samples is None or i == 0 else rng.integers(1, 7, len(batch))
            x_t = diffusion.q_sample(batch, t, rng.standard_normal(batch.shape))
            term, _ = step_term(diffusion, denoise(x_t, t), batch, x_t, t)
            expected[rows] += term if t_samples is None or i == 0 else 6 / 4 * term
    assert_allclose(found.value, np.mean(expected), rtol=1e-12)
    assert_allclose(found.standard_error, np.std(expected, ddof=1) / math.sqrt(5), rtol=1e-10)


def test_bits_per_dim_is_the_bound_in_bits_and_dimensions():
    rng = np.random.default_rng(0)
    diffusion = GaussianDiffusion(cosine_schedule(6), "v")
    images = LEVELS[rng.integers(256, size=(10, 3, 3, 2))]
    denoise = lambda x, t: 0.3 * x  # noqa: E731
    nats = variational_bound(
        denoise, diffusion, images, rng=np.random.default_rng(1), decoder="8bit", clip=True, progress=False
    )
    bits = bits_per_dim(
        denoise, diffusion, images, rng=np.random.default_rng(1), progress=False, batch_size=256
    )
    assert bits.unit == "bits/dim" and bits.exact
    for name in ("value", "standard_error", "L_T", "L_t"):
        assert_allclose(getattr(bits, name), getattr(nats, name) / (18 * np.log(2)), rtol=1e-12)


def test_a_decoder_that_knows_the_image_needs_no_bits():
    rng = np.random.default_rng(0)
    diffusion = GaussianDiffusion(NoiseSchedule([1e-8, 0.1, 0.9, 0.9999]), "x0")
    images = np.repeat(LEVELS[rng.integers(256, size=(1, 4, 4, 1))], 3, axis=0)
    bits = bits_per_dim(lambda x, t: images, diffusion, images, rng=rng, progress=False)
    assert_allclose(bits.value, bits.L_T, rtol=1e-12)
    assert np.all(bits.L_t >= 0) and bits.standard_error < 1e-12


def test_networks_are_asked_in_their_own_dtype():
    model = MLP(2, 4, hidden=8, blocks=1, time_features=4)
    diffusion = GaussianDiffusion(linear_schedule(3), "eps", "learned_range")
    data = np.random.default_rng(0).standard_normal((5, 2))
    seen = []
    original = model.predict
    model.predict = lambda x, t: seen.append((x.dtype, t.dtype, t.shape)) or original(x, t)
    bound = variational_bound(model, diffusion, data, rng=np.random.default_rng(0), progress=False)
    assert set(seen) == {(np.dtype(np.float32), np.dtype(np.int64), (5,))}
    assert math.isfinite(bound.value)


def test_progress_goes_to_the_standard_error_stream(capsys):
    diffusion = GaussianDiffusion(linear_schedule(3), "x0")
    data = np.zeros((5, 2))
    for progress in (False, True):
        variational_bound(lambda x, t: x, diffusion, data, rng=np.random.default_rng(0), progress=progress)
        out, err = capsys.readouterr()
        assert out == "" and ("bound" in err) == progress


# Degenerate and wrong


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@every_kind
def test_a_chain_that_ends_in_noise_exactly(prediction, variance):
    diffusion = GaussianDiffusion(cosine_schedule(8, max_beta=1.0), prediction, variance)
    data = MOONLIKE.sample(20, np.random.default_rng(0))
    bound = variational_bound(
        MOONLIKE.denoiser(diffusion), diffusion, data, rng=np.random.default_rng(0), progress=False
    )
    assert bound.L_T == 0 and np.all(np.isfinite(bound.L_t))
    output, x0, x_t, t = batch(diffusion, (8, 2), 0)
    assert np.all(np.isfinite(step_term(diffusion, output, x0, x_t, t)[1](np.ones(8))))


def test_eps_where_there_is_no_signal_is_refused():
    diffusion = GaussianDiffusion(cosine_schedule(8, max_beta=1.0))
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        variational_bound(
            lambda x, t: x, diffusion, np.zeros((2, 2)), rng=np.random.default_rng(0), progress=False
        )


@every_kind
def test_one_step(variance):
    diffusion = GaussianDiffusion(linear_schedule(1), "x0", variance)
    bound = variational_bound(
        MOONLIKE.denoiser(diffusion),
        diffusion,
        MOONLIKE.sample(20, np.random.default_rng(0)),
        rng=np.random.default_rng(0),
        progress=False,
    )
    assert bound.L_t.shape == (1,) and math.isfinite(bound.value)


@every_kind
@both_decoders
def test_under_array_api_strict(variance, decoder):
    diffusion = GaussianDiffusion(linear_schedule(4), "v", variance)
    output, x0, x_t, t = batch(diffusion, (5, 2, 2, 1), 0, decoder)
    value, backward = step_term(diffusion, output, x0, x_t, t, decoder)
    gradient = backward(np.arange(5.0))
    there, backward_there = step_term(diffusion, *map(strict.asarray, (output, x0, x_t, t)), decoder)
    gradient_there = backward_there(strict.asarray(np.arange(5.0)))
    assert_allclose(np.from_dlpack(there), value, rtol=1e-13)
    assert_allclose(np.from_dlpack(gradient_there), gradient, rtol=1e-12, atol=1e-14)
    assert_allclose(
        np.from_dlpack(prior_term(diffusion, strict.asarray(x0))), prior_term(diffusion, x0), rtol=1e-13
    )
    bound = variational_bound(
        lambda x, t: strict.zeros(output.shape, dtype=strict.float32),
        diffusion,
        strict.asarray(x0.astype(np.float32)),
        rng=np.random.default_rng(0),
        decoder=decoder,
        clip=True,
        progress=False,
    )
    assert math.isfinite(bound.value)


@both_decoders
def test_float32_stays_float32(decoder):
    diffusion = GaussianDiffusion(linear_schedule(4), "v", "learned_range")
    output, x0, x_t, t = batch(diffusion, (5, 2, 2, 1), 0, decoder)
    single = (a.astype(np.float32) for a in (output, x0, x_t))
    value, backward = step_term(diffusion, *single, t, decoder)
    assert value.dtype == backward(np.ones(5, dtype=np.float32)).dtype == np.float32
    assert_allclose(value, step_term(diffusion, output, x0, x_t, t, decoder)[0], rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_data_without_levels_is_refused_whichever_t_are_drawn(seed):
    """Of 3 random t of 1000 hardly one is 0, where the decoder would meet the data."""
    diffusion, rng = GaussianDiffusion(cosine_schedule(1000), "v"), np.random.default_rng(seed)
    with pytest.raises(ValueError, match=r"^data holds values that are not 8-bit levels"):
        bits_per_dim(lambda x, t: 0 * x, diffusion, (LEVELS[:3, None] + 1) / 2, rng=rng, t_samples=1)


def test_what_does_not_fit_is_named():
    diffusion = GaussianDiffusion(linear_schedule(4))
    data, rng = np.zeros((3, 2)), np.random.default_rng(0)

    def bound(data=data, **options):
        variational_bound(lambda x, t: x, diffusion, data, rng=rng, progress=False, **options)

    for options, message in [
        (dict(decoder="16bit"), "decoder is '16bit'; expected one of 'density', '8bit'"),
        (dict(t_samples=0), "t_samples is 0"),
        (dict(t_samples=1.5), "t_samples is 1.5"),
        (dict(batch_size=-1), "batch_size is -1"),
        (dict(data=np.zeros(3)), r"data has shape \(3,\)"),
        (dict(data=np.zeros((0, 3))), r"data has shape \(0, 3\)"),
        (dict(data=data.astype(int)), "^data has dtype int64; expected a real floating one"),
        (dict(data=data + 0.3, decoder="8bit"), "not 8-bit levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            bound(**options)
    with pytest.raises(TypeError, match="rng is a NoneType; expected a numpy"):
        variational_bound(lambda x, t: x, diffusion, data, rng=None, progress=False)
    with pytest.raises(ValueError, match="output has shape"):
        variational_bound(lambda x, t: x[:, :1], diffusion, data, rng=rng, progress=False)


def test_a_term_without_such_a_decoder_is_refused():
    """It would be counted as the density's."""
    x, t = np.zeros((3, 2)), np.zeros(3, int)
    for of in (
        lambda decoder: step_term(GaussianDiffusion(linear_schedule(20)), x, x, x, t, decoder),
        lambda decoder: reconstruction_term(x, x, x, np.full(3, -5.0), "eps", decoder),
    ):
        with pytest.raises(ValueError, match="decoder is '8 bit'; expected one of 'density', '8bit'"):
            of("8 bit")


@pytest.mark.parametrize("name", ["output", "x0", "x_t"])
def test_arrays_of_a_term_are_of_one_library_and_shape(name):
    given = dict.fromkeys(["output", "x0", "x_t"], np.zeros((3, 2)))
    process = GaussianDiffusion(linear_schedule(20))
    for wrong, message in [
        ([[0.0, 0.0]] * 3, f"^{name} is a list; expected an array"),
        (strict.zeros((3, 2)), "is an array of "),
        (np.zeros((3, 1)), r"has shape \(3, [12]\); expected \(3, [12]\), like "),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            step_term(process, **{**given, name: wrong}, t=3)
    for t in (np.zeros(2, int), np.zeros((3, 1), int), np.zeros(1, int)):
        with pytest.raises(ValueError, match=r"^t has shape \(.*\); expected \(3,\)"):
            step_term(process, **given, t=t)
    with pytest.raises(TypeError, match=r"^output is a list; expected an array"):
        vlb_loss(process, [[0.0, 0.0]] * 3, given["x0"], 3, given["x0"])
