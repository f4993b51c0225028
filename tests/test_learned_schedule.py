"""Learned forward variances: the monotone network, the continuous-time bound, and the loop for both."""

import itertools
import math
import multiprocessing
import re
from pathlib import Path

import array_api_strict as strict
import numpy as np
import pytest
from gradients import Case, assert_central_differences_agree, normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import lines, raising

import tinydiff as td
from tinydiff import _loop, nn, schedule_training
from tinydiff._data import STEP
from tinydiff.checkpoint import load_arrays, save_arrays
from tinydiff.continuous_bound import (
    diffuse,
    draw_times,
    integral_term,
    learned_schedule_loss,
    prior_term,
    reconstruction_term,
)
from tinydiff.learned_schedule import LearnedSchedule

PREDICTIONS = ["eps", "x0", "v", "flow"]
LEVELS = 2 * np.arange(256) / 255 - 1
seeds = st.integers(0, 2**32 - 1)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def random_schedule(rng, units=5, spread=1.0):
    """Any weights, end points within a few units of the default's size."""
    learned = LearnedSchedule(-rng.uniform(0.5, 12), rng.uniform(0.5, 8), units)
    for p in learned.rise.named_parameters().values():
        p.value = p.value + spread * rng.standard_normal(p.shape)
    return learned


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def quadrature(n=200, pieces=4):
    """Gauss-Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    u = np.concat([(i + (x + 1) / 2) / pieces for i in range(pieces)])
    return u, np.tile(w / 2 / pieces, pieces)


# --- gamma


@settings(max_examples=100)
@given(seeds, st.sampled_from([0.1, 1.0, 10.0, 100.0]), st.integers(1, 20))
def test_gamma_rises_from_end_to_end_whatever_the_weights(seed, spread, units):
    """docs: S.14"""
    rng = np.random.default_rng(seed)
    learned = random_schedule(rng, units, spread)
    for p in (learned.start, learned.end):
        p.value = p.value + min(spread, 20) * rng.standard_normal(1)
    u = np.concat([[0.0], np.sort(rng.random(200)), [1.0]])
    (gamma, slope), _ = learned(u)
    assert gamma[0] == learned.gamma_0 < 0 < learned.gamma_1 == gamma[-1]
    assert np.all(slope > 0)
    rises = np.diff(gamma)
    assert np.all(rises >= -1e-14 * np.max(np.abs(gamma)))  # but for rounding
    # m' >= 1, so that it truly rises, by at least this much
    total = 1 + np.sum(np.logaddexp(0, learned.rise.height.value))
    assert np.all(slope * total >= (learned.gamma_1 - learned.gamma_0) * (1 - 1e-12))


@pytest.mark.parametrize("units", [1, 2, 8, 32, 100])
def test_it_begins_where_it_is_told_and_almost_straight(units):
    """A staircase from one end to the other would be near the line, too, but its slope would not."""
    learned = LearnedSchedule(-9.0, 4.0, units)
    assert abs(learned.gamma_0 + 9) < 1e-12 and abs(learned.gamma_1 - 4) < 1e-12
    u = np.linspace(0, 1, 1001)
    gamma, slope = learned(u)[0]
    assert np.max(np.abs(gamma - (-9 + 13 * u))) < 0.025 * 13
    assert np.max(np.abs(slope - 13)) < 0.25 * 13
    np.testing.assert_allclose(gamma + gamma[::-1], -9 + 4, rtol=1e-12)  # the same seen from either end
    assert repr(learned) == f"LearnedSchedule(gamma=-9 ... 4, units={units})"


@settings(max_examples=30)
@given(seeds, st.integers(1, 8))
def test_gradient_of_gamma_and_of_its_slope(seed, units):
    """docs: S.15"""
    rng = np.random.default_rng(seed)
    learned = random_schedule(rng, units)

    def stacked(u):
        (gamma, slope), backward = learned(u)
        return np.stack([gamma, slope]), lambda d: backward(*d)

    case = Case(stacked, [rng.uniform(0.01, 0.99, 4)], module=learned)
    assert_central_differences_agree(case, rng)


def test_slope_and_curvature_are_derivatives_of_gamma():
    """docs: S.15"""
    learned = random_schedule(np.random.default_rng(0))
    u, h = np.linspace(0.05, 0.95, 19), 1e-5
    ups, downs = learned.rise(u + h)[0], learned.rise(u - h)[0]
    _, slope, curvature = learned.rise(u)[0]
    np.testing.assert_allclose((ups[0] - downs[0]) / (2 * h), slope, rtol=1e-6)
    np.testing.assert_allclose((ups[1] - downs[1]) / (2 * h), curvature, rtol=1e-6, atol=1e-7)


def test_separate_gives_the_end_points_the_bounds_gradient():
    """docs: S.13"""
    rng = np.random.default_rng(0)
    learned, u = random_schedule(rng), rng.random(6)
    dgamma, dslope = rng.standard_normal((2, 6))
    _, backward = learned(u)
    backward(dgamma, dslope)
    whole = {name: p.grad for name, p in learned.named_parameters().items()}
    learned.zero_grad()
    values, backward = learned.separate(u)
    np.testing.assert_array_equal(values, learned(u)[0])
    backward(dgamma, dslope, np.zeros(6))
    for name, p in learned.named_parameters().items():
        np.testing.assert_array_equal(p.grad, whole[name] if name in ("start", "end") else np.zeros(p.shape))


@given(seeds)
def test_separate_gives_what_is_between_the_gradient_of_the_second_moment(seed):
    """Against central differences of E (1/2 gamma' r(gamma))^2, r the level's own (docs: S.13)."""
    rng = np.random.default_rng(seed)
    learned = random_schedule(rng, spread=0.5)
    u, weights = quadrature()

    def terms():
        gamma, slope = learned(u)[0]
        return slope / 2 * sigmoid(0.7 - gamma)  # r of N(0, e^0.7)

    learned.separate(u)[1](np.zeros_like(u), np.zeros_like(u), terms() * np.sqrt(weights))
    gradients = {name: p.grad for name, p in learned.rise.named_parameters().items()}
    scale = max(np.linalg.norm(g) for g in gradients.values())
    for name, p in learned.rise.named_parameters().items():
        kept = p.value
        for d in np.eye(p.value.size):
            moments = []
            for step in (1e-5, -1e-5):
                p.value = kept + step * d
                moments.append(np.sum(weights * terms() ** 2))
            p.value = kept
            assert abs((moments[0] - moments[1]) / 2e-5 - gradients[name] @ d) <= 1e-6 * scale, name


def test_parameters_are_a_modules():
    """state_dict there and back; Adam and the moving average move all of them."""
    learned, other = random_schedule(np.random.default_rng(0)), LearnedSchedule(units=5)
    other.load_state_dict(learned.state_dict())
    u = np.linspace(0, 1, 7)
    np.testing.assert_array_equal(other(u)[0], learned(u)[0])
    assert list(learned.named_parameters()) == ["start", "end", "rise.height", "rise.slope", "rise.bias"]
    adam, ema = td.Adam(other.named_parameters(), lr=0.1), td.EMA(other)
    other(u)[1](np.ones(7), np.ones(7))
    adam.step()
    ema.update()
    for name, p in ema.model.named_parameters().items():
        assert np.all(p.value != learned.named_parameters()[name].value), name


def test_one_comes_back_from_disk(tmp_path):
    learned = LearnedSchedule(-7.0, 3.0, units=5)
    randomise(learned, np.random.default_rng(0))
    save_arrays(tmp_path / "learned.safetensors", learned.state_dict(), {"config": learned.config})
    arrays, metadata = load_arrays(tmp_path / "learned.safetensors")
    again = LearnedSchedule(**metadata["config"])
    again.load_state_dict(arrays)
    np.testing.assert_array_equal(again.schedule(9).betas, learned.schedule(9).betas)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(gamma_0=0.0), r"gamma_0 is 0.0; expected a number in \[-80, 0\)"),
        (dict(gamma_0=-81), "gamma_0 is -81"),
        (dict(gamma_0=math.nan), "gamma_0 is nan"),
        (dict(gamma_1=-1.0), r"gamma_1 is -1.0; expected a number in \(0, 80\]"),
        (dict(gamma_1=math.inf), "gamma_1 is inf"),
        (dict(units=0), "units is 0"),
    ],
)
def test_refuses_what_is_no_schedule(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedSchedule(**arguments)


@pytest.mark.parametrize("u", [0.5, np.zeros((2, 2)), np.array([1.1]), np.array([-1e-9]), np.array([np.nan])])
def test_refuses_times_that_are_none(u):
    with pytest.raises(ValueError, match=r"^u "):
        LearnedSchedule()(u)


# --- the chain


@given(seeds, st.integers(1, 300))
def test_schedule_has_the_levels_of_gamma(seed, T):
    """docs: S.9"""
    learned = random_schedule(np.random.default_rng(seed))
    chain = learned.schedule(T)
    u = np.arange(T) / (T - 1) if T > 1 else np.ones(1)
    gamma = learned(u)[0][0]
    assert chain.T == T
    np.testing.assert_allclose(chain.alphas_cumprod, sigmoid(-gamma), rtol=1e-11, atol=1e-16)
    np.testing.assert_allclose(chain.one_minus_alphas_cumprod, sigmoid(gamma), rtol=1e-11)
    if T > 1:
        assert abs(np.log(chain.snr[0]) + learned.gamma_0) < 1e-10


@given(seeds, st.integers(2, 30), st.integers(1, 5))
def test_a_longer_chain_respaced_is_the_shorter(seed, T, factor):
    """The chains of all lengths are one process, looked at more or less often (docs: S.6, S.9)."""
    learned = random_schedule(np.random.default_rng(seed))
    respaced = learned.schedule(factor * (T - 1) + 1).respace(factor * np.arange(T))
    np.testing.assert_allclose(respaced.betas, learned.schedule(T).betas, rtol=1e-10)


@pytest.mark.parametrize("ends", [(-80.0, 80.0), (-80.0, 1e-6), (-1e-6, 80.0), (-1e-9, 1e-9)])
@pytest.mark.parametrize("T", [1, 2, 3, 1000])
def test_extreme_end_points_make_finite_tables(ends, T):
    """Where rates of signal and noise are at the edge of float32, in which is sampled."""
    chain = LearnedSchedule(*ends).schedule(T)
    for name in ("betas", "alphas_cumprod", "one_minus_alphas_cumprod", "snr", "posterior_variance"):
        assert np.all(np.isfinite(getattr(chain, name))), name
    assert np.all(chain.one_minus_alphas_cumprod > 0)
    process = td.GaussianDiffusion(chain, "v", "fixed_large")
    assert all(np.all(np.isfinite(table)) for table in process.log_variance_range)
    x = td.sample(lambda x, t: 0 * x, process, (2, 2), rng=np.random.default_rng(0), progress=False)
    assert np.all(np.isfinite(x))


def test_one_step_ends_in_noise():
    learned = LearnedSchedule(-10.0, 5.0)
    assert abs(learned.schedule(1).betas[0] - sigmoid(5.0)) < 1e-15


@pytest.mark.parametrize("size, message", [(81.0, "within ±80"), (np.inf, "within"), (np.nan, "within")])
@pytest.mark.parametrize("which", ["start", "end"])
def test_refuses_to_make_tables_of_nan(size, message, which):
    """End points that training, or a file, has carried away."""
    learned = LearnedSchedule()
    getattr(learned, which).value = np.array([size])
    for T in (1, 10):
        with pytest.raises(ValueError, match=message):
            learned.schedule(T)


def test_refuses_steps_without_noise():
    learned = LearnedSchedule(-80.0, 1.0, units=1)
    learned.rise.height.value = np.array([1e18])  # all of the rise within one step; elsewhere it is rounding
    learned.rise.slope.value = np.array([1e6])
    learned.rise.bias.value = np.array([-5e5])
    with pytest.raises(ValueError, match="T is 1000: gamma does not rise from step 0 to 1"):
        learned.schedule(1000)
    with pytest.raises(ValueError, match="T is 0"):
        learned.schedule(0)


# --- the terms


@settings(max_examples=20)
@given(seeds, st.sampled_from(PREDICTIONS), st.sampled_from(["density", "8bit"]))
def test_gradients_of_the_terms(seed, prediction, decoder):
    """docs: S.12"""
    rng = np.random.default_rng(seed)
    x0, noise = normal(rng, (3, 2, 2)), normal(rng, (3, 2, 2))
    gamma, slope = rng.uniform(-4, 3, 3), rng.uniform(0.5, 2, 3)
    v = np.sqrt(sigmoid(-gamma))[:, None, None] * noise - np.sqrt(sigmoid(gamma))[:, None, None] * x0
    target = {"eps": noise, "x0": x0, "v": v, "flow": noise - x0}[prediction]
    output = target + 0.3 * rng.standard_normal(x0.shape)
    case = Case(lambda o, g, s: integral_term(o, x0, noise, g, s, prediction), [output, gamma, slope])
    assert_central_differences_agree(case, rng)

    x0 = LEVELS[rng.choice([0, 1, 100, 254, 255], x0.shape)] if decoder == "8bit" else x0
    case = Case(lambda o, g: reconstruction_term(o, x0, noise, g, prediction, decoder), [output, gamma])
    assert_central_differences_agree(case, rng)
    assert_central_differences_agree(Case(lambda g: diffuse(x0, noise, g), [gamma]), rng)

    g = float(gamma[0])
    up, down = (np.sum(prior_term(x0, g + h)[0]) for h in (1e-5, -1e-5))
    slope = prior_term(x0, g)[1](np.ones(3))
    assert abs((up - down) / 2e-5 - slope) <= 1e-6 * abs(slope)


@pytest.mark.parametrize("gamma_0", [-13.3, -40.0, -80.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_reconstruction_has_a_gradient_however_little_noise_there_is(prediction, gamma_0):
    """x_0^ - x_0 is of the size of the noise, and is not to go by way of x_0."""
    rng = np.random.default_rng(0)
    x0, noise, output = rng.standard_normal((3, 4, 2)).astype(np.float32)
    gamma = np.full(4, gamma_0)
    value, backward = reconstruction_term(output, x0, noise, gamma, prediction)
    a, s = np.sqrt([1 / (1 + np.exp(gamma_0)), 1 / (1 + np.exp(-gamma_0))])
    exact = x0.astype(float), noise.astype(float), output.astype(float)
    # x_0^ - x_0 is this times what the output is short of
    scale = {"eps": s / a, "v": s, "flow": s / (a + s)}[prediction]
    data, eps, o = exact
    apart = {"eps": eps, "v": a * eps - s * data, "flow": eps - data}[prediction] - o
    log_variance = -np.logaddexp(0, -gamma_0)
    terms = (np.log(2 * np.pi) + log_variance + (scale / s) ** 2 * apart**2) / 2
    np.testing.assert_allclose(value, np.sum(terms, axis=1), rtol=1e-5)
    doutput, _ = backward(np.ones(4, np.float32))
    np.testing.assert_allclose(doutput, -((scale / s) ** 2) * apart, rtol=1e-4, atol=1e-5)


@predictions
def test_the_terms_are_those_of_the_chain(prediction):
    """Its L_T and, at t = 0, its L_0, with the variance fixed_large; and in between one step of L.7."""
    rng = np.random.default_rng(0)
    learned, T = random_schedule(rng), 4001
    process = td.GaussianDiffusion(learned.schedule(T), prediction, "fixed_large")
    x0, noise, output = rng.standard_normal((3, 5, 2))
    np.testing.assert_allclose(
        prior_term(x0, learned.gamma_1)[0], td.bound.prior_term(process, x0), rtol=1e-9
    )
    levels = np.full(5, learned.gamma_0)
    z, _ = diffuse(x0, noise, levels)
    start = np.zeros(5, dtype=int)
    np.testing.assert_allclose(z, process.q_sample(x0, start, noise), rtol=1e-12)
    for decoder, x in [("density", x0), ("8bit", LEVELS[rng.integers(256, size=(5, 2))])]:
        z, _ = diffuse(x, noise, levels)
        expected, _ = td.bound.step_term(process, output, x, z, start, decoder)
        value, _ = reconstruction_term(output, x, noise, levels, prediction, decoder)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
    t = rng.integers(1000, 3000, size=5)
    gamma, slope = learned(t / (T - 1))[0]
    z, _ = diffuse(x0, noise, gamma)
    step, _ = td.bound.step_term(process, output, x0, z, t)
    value, _ = integral_term(output, x0, noise, gamma, slope, prediction)
    np.testing.assert_allclose((T - 1) * step, value, rtol=0.05)


@predictions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_levels_have_finite_terms(prediction, dtype):
    x0, noise = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(dtype)
    gamma, slope = np.array([-80.0, -20.0, 20.0, 80.0]), np.ones(4)
    z, z_backward = diffuse(x0, noise, gamma)
    v = np.concat([noise[:2], -x0[2:]])
    target = {"eps": noise, "x0": x0, "v": v, "flow": noise - x0}[prediction]
    value, backward = integral_term(target, x0, noise, gamma, slope, prediction)
    results = [z, value, z_backward(z), *backward(np.ones(4))]
    value, backward = reconstruction_term(target, x0, noise, gamma, prediction)
    results += [value, *backward(np.ones(4))]
    for g in (-80.0, 80.0):
        value, prior_backward = prior_term(x0, g)
        results += [value, prior_backward(np.ones(4))]
    assert all(np.all(np.isfinite(r)) for r in results)


# --- the bound, against the truth


DATA = td.GaussianMixture([1], [[0.3, -0.2]], [[[0.5, 0.2], [0.2, 0.7]]])


def exact_denoiser(data, learned, T, prediction):
    """The best network of the mixture at any real time of [0, T-1]."""

    def denoise(z, t):
        u, place = np.unique(np.asarray(t) / (T - 1), return_inverse=True)
        gamma = learned(u)[0][0]
        betas = sigmoid(gamma) * np.append(1.0, -np.expm1(-np.diff(gamma)))
        return data.denoiser(td.GaussianDiffusion(td.NoiseSchedule(betas), prediction))(z, place)

    return denoise


def exact_bound(data, gamma_0, gamma_1):
    """Of Gaussian data and the best network, in closed form: |eps - eps^|^2 is c / (c + e^gamma) in an axis.

    Its integral over gamma is gamma - log(c + e^gamma); the reconstruction's error is e^gamma_0 of that.
    """
    c, axes = np.linalg.eigh(data.covariances[0])
    second = c + (data.means[0] @ axes) ** 2
    abar = sigmoid(-gamma_1)
    prior = (abar * second - abar + np.logaddexp(0, -gamma_1)) / 2
    error = c / (c + np.exp(gamma_0)) * np.exp(gamma_0)
    s2 = sigmoid(gamma_0)
    reconstruction = (np.log(2 * np.pi * s2) + error / s2) / 2
    integral = (gamma_1 - np.logaddexp(np.log(c), gamma_1) - gamma_0 + np.logaddexp(np.log(c), gamma_0)) / 2
    return np.sum(prior), np.sum(reconstruction), np.sum(integral)


@settings(max_examples=15)
@given(seeds, st.sampled_from(PREDICTIONS))
def test_the_bound_depends_on_the_end_points_only(seed, prediction):
    """The integral, by exact expectations at each u and quadrature over u, for any weights (docs: S.11)."""
    rng = np.random.default_rng(seed)
    learned = random_schedule(rng, spread=0.5)
    data = td.GaussianMixture([1], [[0.3]], 0.4)
    u, weights = quadrature()
    gamma, slope = learned(u)[0]
    denoise = exact_denoiser(data, learned, 1000, prediction)
    total = 0.0
    for x in (0.3 - 0.4**0.5, 0.3 + 0.4**0.5):  # of polynomials of degree 2 these two points give the mean
        for eps in (-1.0, 1.0):
            x0, noise = np.full((u.size, 1), x), np.full((u.size, 1), eps)
            output = denoise(diffuse(x0, noise, gamma)[0], 999 * u)
            total += np.sum(weights * integral_term(output, x0, noise, gamma, slope, prediction)[0]) / 4
    expected = exact_bound(data, learned.gamma_0, learned.gamma_1)[2]
    assert abs(total - expected) < 1e-7 * expected


@predictions
@pytest.mark.parametrize("even", [True, False])
def test_the_estimate_is_unbiased(prediction, even):
    """docs: S.10, S.16"""
    rng = np.random.default_rng(0)
    learned = random_schedule(rng)
    denoise = exact_denoiser(DATA, learned, 50, prediction)
    found = td.continuous_bound(
        denoise,
        learned,
        DATA.sample(4000, rng),
        rng=rng,
        T=50,
        prediction=prediction,
        t_samples=2,
        even=even,
        progress=False,
    )
    prior, reconstruction, integral = exact_bound(DATA, learned.gamma_0, learned.gamma_1)
    assert abs(found.value - (prior + reconstruction + integral)) < 4 * found.standard_error
    assert found.standard_error < 0.2
    assert abs(found.prior - prior) < 0.1 * abs(prior)
    assert abs(found.reconstruction - reconstruction) < 4 / 4000**0.5
    assert abs(found.prior + found.reconstruction + found.integral - found.value) < 1e-10


def test_it_is_the_limit_of_the_chains_bound():
    """The error falls like 1/T (docs: S.10)."""
    learned = random_schedule(np.random.default_rng(1))
    limit = sum(exact_bound(DATA, learned.gamma_0, learned.gamma_1))
    gaps = [
        DATA.optimal_bound(td.GaussianDiffusion(learned.schedule(T), "v", "fixed_large")).value - limit
        for T in (250, 500, 1000)
    ]
    assert abs(gaps[0]) < 0.05
    assert all(abs(a / b - 2) < 0.05 for a, b in itertools.pairwise(gaps))


@given(seeds, st.integers(1, 40))
def test_even_times_leave_no_stretch_out(seed, n):
    """docs: S.16"""
    u = np.sort(draw_times(n, np.random.default_rng(seed)))
    assert np.all((u >= 0) & (u < 1))
    assert len(set(np.floor(u * n - u[0] * n + 0.5).astype(int))) == n
    independent = draw_times(n, np.random.default_rng(seed), even=False)
    np.testing.assert_array_equal(independent, np.random.default_rng(seed).random(n))


def test_even_times_are_each_uniform_and_make_a_smaller_variance():
    """docs: S.16"""
    rng = np.random.default_rng(0)
    draws = np.stack([draw_times(8, rng) for _ in range(4000)])
    for column in draws.T:
        assert np.max(np.abs(np.sort(column) - (np.arange(4000) + 0.5) / 4000)) < 1.95 / 4000**0.5
    means = np.mean(draws**2, axis=1)  # of u^2, 1/3
    assert abs(np.mean(means) - 1 / 3) < 4 * np.std(means) / 4000**0.5
    assert np.var(means) < 0.2 * (1 / 5 - 1 / 9) / 8  # that of 8 independent draws


# --- the loss


class Linear(nn.Module):
    """A network that is linear in z and t, called like any other."""

    def __init__(self, rng, D=2):
        self.layer = nn.Linear(D + 1, D, rng)

    def __call__(self, z, t, rng=None):
        xp = td.backend.array_namespace(z)
        time = xp.astype(t, z.dtype)[(...,) + (None,) * (z.ndim - 1)] / 10 + xp.zeros_like(z[..., :1])
        y, backward = self.layer(xp.concat([z, time], axis=-1))
        return y, lambda dy: backward(dy)[..., :-1]


def linear_model(rng, D=2):
    return randomise(Linear(rng, D).to(np, np.float64), rng)


@settings(max_examples=10)
@given(seeds, st.sampled_from(PREDICTIONS), st.sampled_from(["density", "8bit"]))
def test_gradient_of_the_loss(seed, prediction, decoder):
    """By the network's parameters and the two end points, through everything (docs: S.12, S.13)."""
    rng = np.random.default_rng(seed)
    learned, model = random_schedule(rng), linear_model(rng)
    learned.start.value = np.array([3.0])  # so that terms are of one size
    learned.end.value = np.array([2.0])
    x0 = LEVELS[rng.integers(256, size=(6, 2))] if decoder == "8bit" else rng.standard_normal((6, 2))
    options = dict(T=20, prediction=prediction, decoder=decoder)

    def loss():
        return learned_schedule_loss(model, learned, x0, np.random.default_rng(1), **options)

    loss()[1]()
    parameters = model.named_parameters() | {"start": learned.start, "end": learned.end}
    gradients = {name: p.grad for name, p in parameters.items()}
    for name, p in parameters.items():
        kept = p.value
        for d in np.eye(kept.size).reshape(kept.size, *kept.shape):
            values = []
            for h in (1e-5, -1e-5):
                p.value = kept + h * d
                values.append(float(loss()[0]))
            p.value = kept
            error = abs((values[0] - values[1]) / 2e-5 - np.sum(gradients[name] * d))
            assert error <= 1e-6 * max(np.linalg.norm(g) for g in gradients.values()), name


def test_the_loss_is_the_bound_in_bits():
    """Its mean over draws is the closed form, however few reconstructions there are (docs: S.10)."""
    learned = random_schedule(np.random.default_rng(3))
    denoise = exact_denoiser(DATA, learned, 50, "v")

    def model(z, t, rng):
        return denoise(z, t), list  # a derivative that nobody asks

    rng = np.random.default_rng(4)
    for reconstructions in (None, 16):
        losses = [
            float(
                learned_schedule_loss(
                    model, learned, DATA.sample(16, rng), rng, T=50, reconstructions=reconstructions
                )[0]
            )
            for _ in range(300)
        ]
        expected = sum(exact_bound(DATA, learned.gamma_0, learned.gamma_1)) / (2 * math.log(2))
        assert abs(np.mean(losses) - expected) < 4 * np.std(losses) / 300**0.5


def test_what_is_between_learns_by_the_mean_square_in_bits():
    """A quarter of the batch is reconstructed; and the loss is its three terms, to rounding (docs: S.13)."""
    rng, T, N = np.random.default_rng(0), 20, 16
    learned, linear, x0, shown = random_schedule(rng), linear_model(rng), rng.standard_normal((N, 2)), []
    for_all = np.random.default_rng(1)

    def model(z, t, rng):
        assert rng is for_all  # a network may have dropout
        shown.append(t)
        return linear(z, t)

    loss, backward = learned_schedule_loss(model, learned, x0, for_all, T=T)
    backward()
    gradients = {name: p.grad for name, p in learned.rise.named_parameters().items()}
    rng = np.random.default_rng(1)
    u = draw_times(N, rng)
    np.testing.assert_array_equal(shown[0], (T - 1) * u)
    np.testing.assert_array_equal(shown[1], np.zeros(N // 4))  # the reconstructions, at u = 0
    (gamma, slope), backward = learned.separate(u)
    noise = rng.standard_normal(x0.shape)
    output, _ = linear(diffuse(x0, noise, gamma)[0], (T - 1) * u)
    terms, _ = integral_term(output, x0, noise, gamma, slope, "v")
    first, at_start = x0[: N // 4], np.full(N // 4, learned.gamma_0)
    noise = rng.standard_normal(first.shape)
    output, _ = linear(diffuse(first, noise, at_start)[0], np.zeros(N // 4))
    of_levels, _ = reconstruction_term(output, first, noise, at_start, "v")
    whole = np.mean(terms) + np.mean(of_levels) + np.mean(prior_term(x0, learned.gamma_1)[0])
    np.testing.assert_allclose(loss, whole / (2 * math.log(2)), rtol=1e-12)
    learned.zero_grad()
    backward(0 * u, 0 * u, terms / (2 * math.log(2)) / N**0.5)
    for name, p in learned.rise.named_parameters().items():
        np.testing.assert_allclose(gradients[name], p.grad, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(("even", "n"), [(True, 300), (True, 256 + 5), (False, 300), (False, 20)])
def test_standard_error_is_the_spread_of_the_bound_over_other_data_times_and_noise(even, n):
    """Of 40 dimensions: by the spread over samples it would be three times too large for even times."""
    learned, options = LearnedSchedule(-6.0, 6.0), dict(T=100, prediction="x0", batch_size=32, progress=False)
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, 40))
        found.append(td.continuous_bound(lambda z, t: 0 * z, learned, x, rng=rng, even=even, **options))
    spread = np.std([bound.value for bound in found], ddof=1)
    assert 0.75 < np.mean([bound.standard_error for bound in found]) / spread < 1.3


def test_standard_error_of_two_is_half_their_distance():
    """The second is found from the mean: of x_0 = 0, guessed right, no draw is seen in the bound."""
    learned, options = LearnedSchedule(-3.0, 2.0), dict(T=20, prediction="x0", progress=False)
    data = np.array([[0.0], [1.0]])
    both, first = (
        td.continuous_bound(lambda z, t: 0 * z, learned, points, rng=np.random.default_rng(0), **options)
        for points in (data, data[:1])
    )
    np.testing.assert_allclose(both.standard_error, abs(both.value - first.value), rtol=1e-12)


def test_the_end_points_learn_by_the_bound():
    """With the exact network, the mean gradient by the end points is the derivative of the closed form.

    The network is the one that knows the levels; moving an end point moves them under it. At the best
    network that costs nothing to first order, so the fixed network's gradient is the bound's (docs: S.12).
    """
    learned, data = LearnedSchedule(-3.0, 1.5, units=3), td.GaussianMixture([1], [[0.3]], 0.4)
    rng = np.random.default_rng(5)

    def network(z, t, rng):
        """eps^ = s (z - a m) / V, of the level that belongs to t; and its derivative by z."""
        gamma = frozen(np.asarray(t) / 49)[0][0][:, None]
        a, s = np.sqrt(sigmoid(-gamma)), np.sqrt(sigmoid(gamma))
        V = a * a * 0.4 + s * s
        return s * (z - a * 0.3) / V, lambda d: d * s / V

    frozen = LearnedSchedule(-3.0, 1.5, units=3)
    N, h = 400_000, 1e-5
    _, backward = learned_schedule_loss(
        network, learned, data.sample(N, rng), rng, T=50, prediction="eps", reconstructions=N
    )
    backward()
    unit = math.log(2)
    for which, ends in [
        ("start", ((-3.0 - h, 1.5), (-3.0 + h, 1.5))),
        ("end", ((-3.0, 1.5 + h), (-3.0, 1.5 - h))),
    ]:
        low, high = (sum(exact_bound(data, *e)) / unit for e in ends)
        derivative = (low - high) / (2 * h) * sigmoid(getattr(learned, which).value[0])
        assert abs(getattr(learned, which).grad[0] - derivative) < 0.005, which


def trained_between(learned, data, steps=600, lr=0.05):
    """Only what is between the end points, with the exact network."""
    denoise = exact_denoiser(data, learned, 1000, "eps")
    optimizer = td.Adam(learned.rise.named_parameters(), lr)
    for step in range(steps):
        rng = np.random.default_rng([7, step])
        u = draw_times(64, rng)
        (gamma, slope), backward = learned.separate(u)
        x0 = data.sample(64, rng)
        noise = rng.standard_normal(x0.shape)
        output = denoise(diffuse(x0, noise, gamma)[0], 999 * u)
        learned.zero_grad()
        backward(0 * u, 0 * u, integral_term(output, x0, noise, gamma, slope, "eps")[0])
        optimizer.lr = lr * td.warmup_cosine(step, steps)
        optimizer.step()
    return learned


def test_the_variance_falls_to_its_least():
    """E term^2 of Gaussian data is 3/4 gamma'^2 r^2; its least over all schedules is 3/4 (int r dgamma)^2.

    docs: S.13
    """
    data = td.GaussianMixture([1], [[0.0]], 0.05)
    u, weights = quadrature()

    def second_moment(learned):
        gamma, slope = learned(u)[0]
        r = 0.05 * sigmoid(-gamma) / (0.05 * sigmoid(-gamma) + sigmoid(gamma))
        return 0.75 * np.sum(weights * (slope * r) ** 2)

    learned = LearnedSchedule(-6.0, 6.0, units=16)
    before = second_moment(learned)
    after = second_moment(trained_between(learned, data))
    least = 3 * exact_bound(data, -6.0, 6.0)[2] ** 2
    assert least * (1 - 1e-6) < after < 1.2 * least
    assert before > 2.5 * least
    assert (learned.gamma_0, learned.gamma_1) == (
        LearnedSchedule(-6.0).gamma_0,
        LearnedSchedule(gamma_1=6).gamma_1,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(T=1), "T is 1"),
        (dict(T=2.0), "T is 2.0"),
        (dict(prediction="score"), "prediction is 'score'"),
        (dict(decoder="bits"), "decoder is 'bits'"),
        (dict(reconstructions=0), "reconstructions is 0"),
        (dict(reconstructions=9), "reconstructions is 9; expected at most 8"),
        (dict(decoder="8bit"), "x holds values that are not 8-bit levels"),
    ],
)
def test_the_loss_refuses(options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        learned_schedule_loss(linear_model(rng), LearnedSchedule(), rng.random((8, 2)), rng, **options)


def test_an_empty_batch_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^x0 has shape \(0, 2\)"):
        learned_schedule_loss(linear_model(rng), LearnedSchedule(), np.zeros((0, 2)), rng)


def test_a_network_without_a_derivative_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(TypeError, match=r"model\(x, t\) is an ndarray; expected \(output, backward\)"):
        learned_schedule_loss(lambda x, t, rng: x, LearnedSchedule(), rng.random((2, 2)), rng)


def test_two_times_are_enough():
    """What the network is told of time is (T - 1) u."""
    rng, told = np.random.default_rng(0), []
    td.continuous_bound(
        lambda x, t: told.append(t) or x, LearnedSchedule(), np.zeros((3, 2)), rng=rng, T=2, progress=False
    )
    assert 0 < np.max(told) < 1
    learned_schedule_loss(linear_model(rng), LearnedSchedule(), rng.random((8, 2)), rng, T=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(T=1), "T is 1"),
        (dict(t_samples=0), "t_samples is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(data=np.zeros(3)), r"data has shape \(3,\)"),
        (dict(data=np.zeros((0, 2))), r"data has shape \(0, 2\)"),
        (dict(data=np.zeros((3, 2), np.uint8)), "^data has dtype uint8"),
    ],
)
def test_the_bound_refuses(options, message):
    options = dict(data=np.zeros((3, 2))) | options
    with pytest.raises(ValueError, match=message):
        td.continuous_bound(
            lambda x, t: x, LearnedSchedule(), rng=np.random.default_rng(0), progress=False, **options
        )


@pytest.mark.parametrize("D, width", [(2, 1), (1, 2), (2, 4)])
def test_no_output_is_broadcast_against_the_data(D, width):
    """A network of another width, or with a learned variance, has no bound rather than a wrong one."""
    rng = np.random.default_rng(0)
    model, x0 = td.MLP(D, width, hidden=8, blocks=1, rng=rng), rng.random((8, D), np.float32)
    message = rf"output has shape \(8, {width}\); expected \(8, {D}\)"
    with pytest.raises(ValueError, match=message):
        learned_schedule_loss(model, LearnedSchedule(), x0, rng)
    with pytest.raises(ValueError, match=message):
        td.continuous_bound(model, LearnedSchedule(), x0, rng=rng, progress=False)


def test_a_schedule_that_is_not_learned_is_named():
    x, rng = np.zeros((4, 2), np.float32), np.random.default_rng(0)
    for call in (td.learned_schedule_loss, td.continuous_bound):
        with pytest.raises(TypeError, match=r"^learned is a NoiseSchedule; expected a LearnedSchedule"):
            call(td.MLP(hidden=4), td.linear_schedule(10), x, rng=rng)


@predictions
def test_the_terms_refuse_what_does_not_match(prediction):
    x0, gamma = np.zeros((4, 2)), np.full(4, -3.0)
    for spoil in (lambda x: x[:, :1], lambda x: x.astype(int)):
        with pytest.raises(ValueError, match="noise has"):
            diffuse(x0, spoil(x0), gamma)
        for noise, output, name in [(spoil(x0), x0, "noise"), (x0, spoil(x0), "output")]:
            with pytest.raises(ValueError, match=f"{name} has"):
                integral_term(output, x0, noise, gamma, -gamma, prediction)
            with pytest.raises(ValueError, match=f"{name} has"):
                reconstruction_term(output, x0, noise, gamma, prediction)
    for wrong in (gamma[:, None], gamma[:1], np.float64(-3)):  # with another's (4,) they would make (4, 4)
        with pytest.raises(ValueError, match=r"^gamma has shape \(.*\); expected \(4,\)"):
            diffuse(x0, x0, wrong)
        with pytest.raises(ValueError, match=r"^gamma has shape"):
            integral_term(x0, x0, x0, wrong, -gamma, prediction)
        with pytest.raises(ValueError, match=r"^slope has shape"):
            integral_term(x0, x0, x0, gamma, wrong, prediction)
        with pytest.raises(ValueError, match=r"^gamma has shape"):
            reconstruction_term(x0, x0, x0, wrong, prediction)
    with pytest.raises(ValueError, match="x0 has dtype"):
        prior_term(x0.astype(int), 5.0)


# --- under array-api-strict


@predictions
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_the_loss_under_array_api_strict(prediction, dtype, tolerance):
    """Value and all gradients are NumPy's, with the network there and the schedule on either side."""
    results, chains = [], []
    for xp, schedule_there in [(np, False), (strict, False), (strict, True)]:
        rng = np.random.default_rng(0)
        learned, model = random_schedule(rng), td.MLP(2, hidden=8, blocks=1, time_features=4, rng=rng)
        randomise(model, rng)
        model.to(xp, getattr(xp, dtype))
        if schedule_there:
            learned.to(strict)
        x0 = xp.asarray(rng.standard_normal((6, 2)), dtype=getattr(xp, dtype))
        loss, backward = learned_schedule_loss(model, learned, x0, rng, T=20, prediction=prediction)
        backward()
        assert isinstance(loss, type(x0)) or xp is np
        if schedule_there:
            assert isinstance(learned.start.grad, type(strict.zeros(1)))
        chains.append(learned.schedule(9).betas)
        groups = [[loss], *([p.grad for p in m.named_parameters().values()] for m in (model, learned.rise))]
        groups += [[learned.start.grad], [learned.end.grad]]
        results.append([np.concat([np.ravel(np.asarray(g)) for g in group]) for group in groups])
    np.testing.assert_allclose(chains[2], chains[0], rtol=1e-12)
    for other in results[1:]:
        for ours, numpys in zip(other, results[0]):
            assert np.linalg.norm(ours - numpys) <= tolerance * np.linalg.norm(numpys)


def test_the_loop_and_the_bound_under_array_api_strict():
    results = []
    for xp in (np, strict):
        rng = np.random.default_rng(0)
        model = randomise(td.MLP(2, hidden=8, blocks=1, time_features=4, rng=rng).to(np, np.float64), rng)
        for p in model.named_parameters().values():
            p.value = p.value.copy()  # to be written to
        model.to(xp)
        data = xp.asarray(DATA.sample(40, rng))
        options = dict(T=20, prediction="x0")
        result = td.train_learned_schedule(
            model, data, steps=3, batch_size=16, gamma_0=-6.0, progress=False, **options
        )
        assert type(result.model.linear_out.weight.value) is type(data)
        bound = td.continuous_bound(
            result.model, result.learned, data, rng=rng, batch_size=15, progress=False, **options
        )
        results.append(np.concat([result.losses, result.schedule.betas, [bound.value, bound.standard_error]]))
    np.testing.assert_allclose(*results, rtol=1e-9)


# --- the loop


def small(**options):
    """A short training in the plane."""
    rng = np.random.default_rng(0)
    model = td.MLP(2, hidden=16, blocks=1, time_features=8, rng=rng)
    data = DATA.sample(200, rng).astype(np.float32)
    options = dict(T=20, steps=6, batch_size=16, seed=3, gamma_0=-6.0, progress=False) | options
    return model, td.train_learned_schedule(model, options.pop("data", data), **options)


def test_the_norm_in_the_metrics_is_of_the_network_s_gradient_and_the_schedule_s_together(
    tmp_path, monkeypatch
):
    clip, norms = _loop.clip_grad_norm, []
    monkeypatch.setattr(_loop, "clip_grad_norm", lambda *given: norms.append(clip(*given)) or norms[-1])
    small(run_dir=tmp_path, log_every=1)
    of_network, of_schedule = np.array(norms).reshape(6, 2).T
    assert np.min(of_network) > 0 and np.min(of_schedule) > 0
    logged = [line["grad_norm"] for line in lines(tmp_path)]
    np.testing.assert_allclose(logged, np.sqrt(of_network**2 + of_schedule**2), rtol=1e-6)


def test_the_loop_is_a_function_of_its_seed():
    (model, one), (_, again), (_, other) = small(), small(), small(seed=4)
    np.testing.assert_array_equal(one.losses, again.losses)
    np.testing.assert_array_equal(one.schedule.betas, again.schedule.betas)
    for name, value in one.model.state_dict().items():
        np.testing.assert_array_equal(value, again.model.state_dict()[name])
    assert np.any(one.losses != other.losses) and one.losses.shape == (6,) and one.seconds > 0
    # the average is a copy; the model itself was trained
    assert one.model is not model
    assert np.any(model.linear_out.weight.value != one.model.linear_out.weight.value)
    np.testing.assert_array_equal(one.schedule.betas, one.learned.schedule(20).betas)
    assert one.learned.gamma_0 != -6.0
    assert small(ema_decay=0.0)[1].learned.gamma_0 < one.learned.gamma_0 - 1e-4  # the average lags behind


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_an_interrupted_and_resumed_run_is_the_same_run(at, tmp_path, monkeypatch):
    """Network and schedule, their averages and moments; whatever was under way."""
    _, whole = small(run_dir=tmp_path / "whole", checkpoint_every=2, log_every=2)
    loss = raising(schedule_training.learned_schedule_loss, at)
    files = dict(run_dir=tmp_path / "parts", checkpoint_every=2, log_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(schedule_training, "learned_schedule_loss", loss)
        with pytest.raises(KeyboardInterrupt):
            small(**files)
    _, parts = small(**files, resume=True)
    np.testing.assert_array_equal(parts.losses, whole.losses)
    np.testing.assert_array_equal(parts.schedule.betas, whole.schedule.betas)
    for name, value in whole.model.state_dict().items():
        np.testing.assert_array_equal(parts.model.state_dict()[name], value, err_msg=name)
    saved = [load_arrays(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys() and any(name.startswith("schedule.adam.v") for name in saved[0])
    for name, value in saved[0].items():
        np.testing.assert_array_equal(saved[1][name], value, err_msg=name)


def test_a_checkpoint_is_loaded_as_a_model_with_the_chain_learned_so_far(tmp_path, monkeypatch):
    """What `pretrained.load` makes of it is what the training returns; at the middle, what it then was."""
    file = tmp_path / "run" / "checkpoint.safetensors"
    _, result = small(run_dir=file.parent)
    model, diffusion, metadata = td.pretrained.load(file)
    np.testing.assert_array_equal(diffusion.schedule.betas, result.schedule.betas)
    assert diffusion.prediction == "v" and metadata["step"] == 6
    for name, value in result.model.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value)

    # End points that are no schedule's are no reason to lose a checkpoint.
    def beyond(learned, T):
        raise ValueError("beyond")

    monkeypatch.setattr(td.LearnedSchedule, "schedule", beyond)
    with pytest.raises(ValueError, match="beyond"):
        small(run_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="does not say the schedule"):
        td.pretrained.load(tmp_path / "other" / "checkpoint.safetensors")


def test_a_run_is_not_taken_for_another(tmp_path):
    small(run_dir=tmp_path)
    for change in (dict(schedule_lr=0.5), dict(gamma_0=-7.0), dict(T=21), dict(even=False)):
        with pytest.raises(ValueError, match=f"{next(iter(change))} was"):
            small(**change, run_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="loss was 'continuous bound'"):
        process = td.GaussianDiffusion(td.cosine_schedule(20))
        model, points = td.MLP(), np.zeros((4, 2), np.float32)
        td.train(model, process, points, steps=6, batch_size=4, run_dir=tmp_path, resume=True)


def test_the_loop_written_out():
    """Two optimizers, of which the network's is clipped; and the averages after the step."""
    draw = lambda n, rng: DATA.sample(n, rng).astype(np.float32)  # noqa: E731
    _, result = small(data=draw, clip_norm=1e-3, warmup=2)
    model = td.MLP(2, hidden=16, blocks=1, time_features=8, rng=np.random.default_rng(0))
    learned = LearnedSchedule(-6.0)
    optimizers = [td.Adam(m.named_parameters()) for m in (model, learned)]
    averages = [td.EMA(m) for m in (model, learned)]
    for step in range(6):
        rng = np.random.default_rng([3, STEP, step])
        loss, backward = learned_schedule_loss(model, learned, draw(16, rng), rng, T=20)
        backward()
        td.clip_grad_norm(model.named_parameters(), 1e-3)
        for optimizer, rate in zip(optimizers, (1e-3, 1e-2)):
            optimizer.lr = rate * td.warmup_cosine(step, 6, 2)
            optimizer.step()
            optimizer.zero_grad()
        for average in averages:
            average.update()
        assert result.losses[step] == float(loss)
    for average, expected in zip(averages, (result.model, result.learned)):
        for name, value in expected.state_dict().items():
            np.testing.assert_array_equal(average.model.state_dict()[name], value, err_msg=name)


LABELS = np.array([0, 1, 3, 2, 0, 1, 2, 2], np.uint8)


@pytest.mark.parametrize("drawn", [False, True])
def test_classes_are_told_of_all_of_a_batch_and_of_its_first(drawn, tmp_path):
    """In the integral and in the reconstruction; but where they are withheld."""
    told, rng = [], np.random.default_rng(0)

    class Noted(td.MLP):
        def __call__(self, x, t, rng=None, labels=None):
            told.append((x, labels))
            return super().__call__(x, t, rng, labels)

    x = np.tile(LABELS[:, None], (1, 2)).astype(np.float32)  # a sample's numbers are its label
    data = (lambda n, rng: (x[:n], LABELS[:n])) if drawn else x
    given = {} if drawn else dict(labels=LABELS)
    how = dict(T=20, steps=4, batch_size=8, gamma_0=-9.0, progress=False, run_dir=tmp_path)
    model = Noted(2, hidden=4, blocks=1, time_features=2, num_classes=3, rng=rng)
    td.train_learned_schedule(model, data, label_dropout=0.5, **given, **how)
    withheld = 0
    for (z, labels), (z_0, labels_0) in zip(told[::2], told[1::2]):
        assert z.shape == (8, 2) and z_0.shape == (2, 2)
        np.testing.assert_array_equal(labels_0, labels[:2])
        own = np.round(z_0[:, 0])  # at u = 0 there is next to no noise
        assert np.all((labels_0 == own) | (labels_0 == 3))
        withheld += np.sum(labels == 3)
    assert 8 < withheld < 28  # of 32, four of which are of none; half of the others
    with pytest.raises(ValueError, match=r"label_dropout was 0\.5, is 0\.1"):
        td.train_learned_schedule(model, data, **given, **how | dict(steps=5), resume=True)


def test_labels_of_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="labels are given, and model is an MLP without classes"):
        small(labels=np.zeros(64, int))


def test_what_comes_out_goes_with_everything():
    """Sampling in all and in fewer steps, the bound, a callable for data."""
    _, result = small(data=lambda n, rng: DATA.sample(n, rng), prediction="x0")
    process = td.GaussianDiffusion(result.schedule, "x0", "fixed_large")
    for steps in (None, 5):
        x = td.sample(
            result.model, process, (3, 2), steps=steps, rng=np.random.default_rng(0), progress=False
        )
        assert x.shape == (3, 2) and np.all(np.isfinite(x))
    points = DATA.sample(50, np.random.default_rng(1))
    bound = td.variational_bound(result.model, process, points, rng=np.random.default_rng(2), progress=False)
    assert math.isfinite(bound.value)


def test_images_and_bits():
    images = LEVELS[np.random.default_rng(0).integers(256, size=(8, 4, 4, 1))].astype(np.float32)
    unet = td.UNet(
        block_channels=(4,),
        attention=(False,),
        norm_groups=2,
        head_dim=4,
        layers_per_block=1,
        rng=np.random.default_rng(0),
    )
    result = td.train_learned_schedule(
        unet, images, T=10, steps=3, batch_size=4, decoder="8bit", progress=False
    )
    bits = td.bits_per_dim(
        result.model,
        td.GaussianDiffusion(result.schedule, "v", "fixed_large"),
        images,
        rng=np.random.default_rng(0),
        progress=False,
    )
    assert np.all(np.isfinite(result.losses)) and math.isfinite(bits.value)


class Interpolated(LearnedSchedule):
    """gamma of a chain of levels, straight between them; there is nothing in it to learn."""

    def __init__(self, chain):
        self.levels = -np.log(chain.snr)
        super().__init__(self.levels[0], self.levels[-1], units=1)

    def __call__(self, u):
        at = (len(self.levels) - 1) * u
        place = np.minimum(at.astype(int), len(self.levels) - 2)
        rise = np.diff(self.levels)[place]
        gamma = self.levels[place] + (at - place) * rise
        return (gamma, (len(self.levels) - 1) * rise), lambda *gradients: None

    separate = __call__


def trained_columns(name):
    """Chapter 14's table: deviation and bound of a row, for the seeds 0 and 1."""
    page = (Path(__file__).parents[1] / "docs" / "14-learned-schedules.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {name} \| [\d.]+ \| (.*), (.*) \| (.*), (.*) \|$", page, re.MULTILINE)
    return np.array(row, float).reshape(2, 2).T


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["linear", "cosine", "straight", "learned"])
def test_a_network_that_learns_is_where_chapter_14_says(monkeypatch, name, seed):
    """Eight Gaussians on a ring; the numbers are those of the table's columns on the right."""
    chains = {"linear": td.linear_schedule, "cosine": td.cosine_schedule}
    if name in chains:
        monkeypatch.setattr(schedule_training, "LearnedSchedule", lambda *_: Interpolated(chains[name]()))
    angles = np.pi * np.arange(8) / 4
    ring = td.GaussianMixture(np.ones(8), 1.3 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.01)
    points = lambda n, rng: ring.sample(n, rng).astype(np.float32)  # noqa: E731
    result = td.train_learned_schedule(
        td.MLP(2, hidden=64, blocks=2, rng=np.random.default_rng(seed)),
        points,
        steps=3000,
        batch_size=128,
        seed=seed,
        schedule_lr=1e-2 if name == "learned" else 0.0,
        gamma_0=-9.2,
        gamma_1=10.1,
        progress=False,
    )
    new = points(20_000, np.random.default_rng(1))
    options = dict(rng=np.random.default_rng(2), t_samples=200, batch_size=2000, progress=False)
    bound = td.continuous_bound(result.model, result.learned, new, **options)
    rng, terms = np.random.default_rng(3), []
    for _ in range(40):
        x0, noise, u = points(10_000, rng), normal(rng, (10_000, 2), np.float32), rng.random(10_000)
        (gamma, slope), _ = result.learned(u)
        output = result.model.predict(diffuse(x0, noise, gamma)[0], 999 * u)
        terms.append(integral_term(output, x0, noise, gamma, slope, "v")[0])
    print(f"{name}, seed {seed}: deviation {np.std(terms):.1f}, bound {bound.value:.2f}", end=" ")
    print(f"± {bound.standard_error:.2f}, gamma {result.learned.gamma_0:.1f} … {result.learned.gamma_1:.1f}")
    deviation, value = trained_columns(name)[seed]
    assert abs(np.std(terms) / deviation - 1) < 0.05
    assert abs(bound.value - value) < 0.05 + 4 * bound.standard_error


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(T=1), "T is 1"),
        (dict(steps=0), "steps is 0"),
        (dict(batch_size=1.5), "batch_size is 1.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(clip_norm=0), "clip_norm is 0"),
        (dict(warmup=7), "warmup is 7"),
        (dict(data=np.zeros((0, 2))), r"data has shape \(0, 2\)"),
        (dict(data=np.full((9, 2), np.inf)), "data holds numbers that are not finite"),
        (dict(prediction="score"), "prediction is 'score'"),
        (dict(decoder="8bit"), "x holds values"),
        (dict(gamma_0=1.0), "gamma_0 is 1.0"),
        (dict(units=-1), "units is -1"),
        (dict(schedule_lr=-1.0), "^schedule_lr is -1.0"),
    ],
)
def test_the_loop_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_list_is_no_data():
    with pytest.raises(TypeError, match="data is a list"):
        small(data=[1.0])


@pytest.mark.skipif(not td.parallel._can_fork(), reason="needs a system that forks")
def test_the_loop_is_the_same_shared_or_not(monkeypatch):
    calls = []

    class Noted(td.parallel.DataParallel):
        def __call__(self, *arguments):
            calls.append(len(self._workers))
            return super().__call__(*arguments)

    monkeypatch.setattr(td.parallel, "DataParallel", Noted)
    (_, alone), (_, shared) = small(workers=1), small(workers=2)
    assert set(calls) == {1} and len(calls) >= 6  # in every step
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=1e-4)
    np.testing.assert_allclose(shared.schedule.betas, alone.schedule.betas, rtol=1e-4)
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:data has a root mean square")
def test_a_loss_that_is_not_finite_stops_the_loop():
    data = np.full((16, 2), 1e30, dtype=np.float32)
    with pytest.raises(FloatingPointError, match="at step 0"):
        small(data=data)


@pytest.mark.parametrize("which", ["network", "schedule"])
def test_a_gradient_that_is_not_finite_stops_the_loop(monkeypatch, which):
    original = schedule_training.learned_schedule_loss

    def spoilt(model, learned, *args, **options):
        loss, backward = original(model, learned, *args, **options)

        def then():
            backward()
            p = model.linear_out.bias if which == "network" else learned.start
            p.grad = p.grad + p.grad.dtype.type(np.inf)

        return loss, then

    monkeypatch.setattr(schedule_training, "learned_schedule_loss", spoilt)
    with pytest.raises(FloatingPointError, match="at step 0"):
        small()
