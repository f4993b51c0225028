"""The exact judge, judged: against quadrature, finite differences, and itself at other times."""

import itertools

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, special, stats

from tinydiff.diffusion import GaussianDiffusion
from tinydiff.mixture import GaussianMixture
from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule

PREDICTIONS = ["eps", "x0", "v", "flow"]


@st.composite
def mixtures(draw, D=None):
    """Up to four components with full covariances."""
    D = draw(st.integers(1, 3)) if D is None else D
    K = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factors = rng.standard_normal((K, D, D))
    covariances = 0.1 * np.eye(D) + factors @ np.swapaxes(factors, 1, 2) / D
    return GaussianMixture(rng.uniform(0.1, 1, K), 2 * rng.standard_normal((K, D)), covariances)


seeds = st.integers(0, 2**32 - 1)
IN_THE_PLANE = GaussianMixture(
    [0.3, 0.5, 0.2],
    [[-1, 0], [1, 0.5], [0, 1]],
    [[[0.3, 0.1], [0.1, 0.2]], 0.05 * np.eye(2), 0.2 * np.eye(2)],
)


@settings(max_examples=30)
@given(mixtures(), seeds)
def test_density_is_the_weighted_sum_of_normal_densities(mixture, seed):
    x = 3 * np.random.default_rng(seed).standard_normal((20, mixture.D))
    parts = zip(mixture.weights, mixture.means, mixture.covariances)
    logs = [np.log(w) + stats.multivariate_normal(m, c).logpdf(x).reshape(-1) for w, m, c in parts]
    assert_allclose(mixture.log_prob(x), special.logsumexp(logs, axis=0), rtol=1e-10, atol=1e-10)


def test_density_far_from_everything_is_finite():
    # The nearest component decides: -1/2 (1000 - 1)^2 / 0.1 and its constant, below what exp can hold.
    mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.1)
    expected = stats.norm(1, np.sqrt(0.1)).logpdf(1000) + np.log(0.5)
    assert_allclose(mixture.log_prob(np.array([[1000.0]])), [expected], rtol=1e-12)
    assert_allclose(mixture.score(np.array([[1000.0]])), [[-9990]], rtol=1e-12)


@given(st.floats(-12, 12))
def test_a_narrow_component_keeps_its_width_beside_a_wide_one(log10):
    """Also where the one's whole variance would be rounding in the other's."""
    x, deviations = np.array([[0.0], [3e-6], [3e5]]), np.array([10.0**log10, 1e-6])
    mixture = GaussianMixture([0.5, 0.5], [[0.0], [0.0]], deviations**2)
    expected = special.logsumexp(stats.norm.logpdf(x, 0, deviations), axis=1) - np.log(2)
    assert_allclose(mixture.log_prob(x), expected, rtol=1e-12)


@settings(max_examples=30)
@given(mixtures(), seeds)
def test_score_is_the_gradient_of_log_prob(mixture, seed):
    x = mixture.sample(5, np.random.default_rng(seed))
    score, h = mixture.score(x), 1e-5
    for i, step in enumerate(h * np.eye(mixture.D)):
        slope = (mixture.log_prob(x + step) - mixture.log_prob(x - step)) / (2 * h)
        assert_allclose(score[:, i], slope, rtol=1e-6, atol=1e-6)


def test_samples_have_the_moments_and_the_distribution():
    """Means and covariances within 5 standard errors (6 numbers: false alarm 4e-6); in 1-D, Kolmogorov."""
    rng, n = np.random.default_rng(0), 50_000
    x = IN_THE_PLANE.sample(n, rng)
    w, m, c = IN_THE_PLANE.weights, IN_THE_PLANE.means, IN_THE_PLANE.covariances
    mean = w @ m
    covariance = np.einsum("k,kij->ij", w, c + m[:, :, None] * m[:, None, :]) - np.outer(mean, mean)
    assert np.all(abs(x.mean(0) - mean) < 5 * np.sqrt(np.diag(covariance) / n))
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert np.all(abs(products.mean(0) - covariance) < 5 * products.std(0) / np.sqrt(n))
    line = GaussianMixture([1, 3], [[-2.0], [1.0]], [0.1, 2.0])
    exact = lambda v: 0.25 * stats.norm.cdf(v, -2, 0.1**0.5) + 0.75 * stats.norm.cdf(v, 1, 2**0.5)  # noqa: E731
    assert stats.kstest(line.sample(n, rng)[:, 0], exact).pvalue > 1e-6


# Entropy


def minus_q_log_q(x, mixture):
    log_q = float(mixture.log_prob(np.array([[x]]))[0])
    return -np.exp(log_q) * log_q


@settings(max_examples=10)
@given(mixtures(D=1))
def test_entropy_on_the_line_is_the_integral(mixture):
    ends = 12 * np.sqrt(np.max(mixture.covariances))
    low, high = np.min(mixture.means) - ends, np.max(mixture.means) + ends
    # In pieces, of which none is so long that quad takes a peak in it for none.
    pieces = np.linspace(low, high, 42)[1:-1]
    expected, _ = integrate.quad(
        minus_q_log_q, low, high, args=(mixture,), points=pieces, epsabs=1e-10, limit=500
    )
    assert_allclose(mixture.entropy(), expected, rtol=1e-8, atol=1e-8)


def test_entropy_in_the_plane():
    """Within 5 standard errors of a Monte Carlo estimate, and converged in the number of nodes."""
    surprise = -IN_THE_PLANE.log_prob(IN_THE_PLANE.sample(50_000, np.random.default_rng(0)))
    entropy = IN_THE_PLANE.entropy()
    assert abs(entropy - surprise.mean()) < 5 * surprise.std() / np.sqrt(surprise.size)
    assert_allclose(entropy, IN_THE_PLANE.entropy(nodes=181), rtol=1e-10)


def test_entropy_with_a_component_ten_times_narrower_than_the_one_it_lies_in():
    """As the documentation promises; on the line it is told how close together to look."""
    mixture = GaussianMixture([0.5, 0.5], [[0.0], [0.3]], [1.0, 0.01])
    pieces = np.linspace(-0.3, 0.9, 7)
    expected, _ = integrate.quad(
        minus_q_log_q, -12, 12, args=(mixture,), points=pieces, epsabs=1e-12, limit=500
    )
    assert_allclose(mixture.entropy(), expected, rtol=1e-10)


def test_nodes_are_the_quadrature_s_and_by_default_enough():
    line, diffusion = (
        GaussianMixture([0.3, 0.7], [[-1.2], [0.5]], [0.1, 0.3]),
        GaussianDiffusion(linear_schedule(5)),
    )
    for method in (line.entropy, lambda nodes: line.optimal_bound(diffusion, nodes)):
        for nodes in (1, 0, True, 40.0, None):
            with pytest.raises(ValueError, match=f"nodes is {nodes}; expected an integer of at least 2"):
                method(nodes)
    enough, more = (line.optimal_bound(diffusion, *nodes).L_t for nodes in ((), (301,)))
    assert_allclose(enough, more, rtol=1e-10)


@pytest.mark.parametrize("D", [1, 2])
def test_the_fewest_nodes_are_the_corners(D):
    """Far too few; but some of them, though in the plane they lie where no other quadrature looks."""
    mixture = GaussianMixture([0.5, 0.5], [[0.0] * D, [1.0] * D], 0.25)
    corners = np.array(list(itertools.product([-4.5, 4.5], repeat=D)))  # nine deviations away
    x = (mixture.means[:, None, :] + corners).reshape(-1, D)
    assert_allclose(mixture.entropy(nodes=2), -np.mean(mixture.log_prob(x)), rtol=1e-12)


@given(mixtures())
def test_entropy_of_a_gaussian_is_a_closed_form(mixture):
    one = GaussianMixture([1], mixture.means[:1], mixture.covariances[:1])
    expected = stats.multivariate_normal(one.means[0], one.covariances[0]).entropy()
    assert_allclose(one.entropy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=10)
@given(mixtures(D=2))
def test_quadrature_and_closed_form_agree(mixture):
    one = GaussianMixture([1], mixture.means[:1], mixture.covariances[:1])
    twice = GaussianMixture([0.5, 0.5], *(np.repeat(v, 2, 0) for v in (one.means, one.covariances)))
    assert_allclose(twice.entropy(), one.entropy(), rtol=1e-12, atol=1e-12)
    diffusion = GaussianDiffusion(linear_schedule(5), "v", "fixed_large")
    assert_allclose(
        twice.optimal_bound(diffusion, nodes=41).L_t, one.optimal_bound(diffusion).L_t, rtol=1e-12
    )


# In the process


@settings(max_examples=30)
@given(mixtures(), st.integers(0, 9))
def test_marginal_has_the_moments_of_the_process(mixture, t):
    diffusion = GaussianDiffusion(linear_schedule(10))
    marginal, abar = mixture.marginal(diffusion, t), diffusion.schedule.alphas_cumprod[t]
    assert_allclose(marginal.weights, mixture.weights, rtol=1e-15)
    assert_allclose(marginal.means, np.sqrt(abar) * mixture.means, rtol=1e-14)
    assert_allclose(
        marginal.covariances, abar * mixture.covariances + (1 - abar) * np.eye(mixture.D), rtol=1e-13
    )


@settings(max_examples=20)
@given(mixtures(D=1), st.integers(0, 9), st.floats(-3, 3))
def test_posterior_is_bayes_rule_by_quadrature(mixture, t, z):
    diffusion = GaussianDiffusion(NoiseSchedule(np.linspace(0.01, 0.5, 10)))
    a, s = (
        table[t] ** 0.5
        for table in (diffusion.schedule.alphas_cumprod, 1 - diffusion.schedule.alphas_cumprod)
    )
    x_t = np.array([[z]])
    grid = np.linspace(-30, 30, 60_001)
    log_weight = mixture.log_prob(grid[:, None]) + stats.norm.logpdf(z, a * grid, s)
    weight = np.exp(log_weight - np.max(log_weight))
    weight /= np.sum(weight)
    mean = weight @ grid
    assert_allclose(mixture.posterior_mean(diffusion, x_t, t), [[mean]], rtol=1e-9, atol=1e-9)
    covariance = mixture.posterior_covariance(diffusion, x_t, np.array([t]))
    assert_allclose(covariance, [[[weight @ (grid - mean) ** 2]]], rtol=1e-8)


@settings(max_examples=30)
@given(mixtures(), seeds)
def test_posterior_is_tweedies_formula(mixture, seed):
    """Mean and covariance from the score of the marginal and its derivative, another way to both."""
    rng = np.random.default_rng(seed)
    diffusion = GaussianDiffusion(NoiseSchedule(np.linspace(0.01, 0.5, 10)))
    t = int(rng.integers(10))
    abar = diffusion.schedule.alphas_cumprod[t]
    a, s2 = np.sqrt(abar), 1 - abar
    marginal = mixture.marginal(diffusion, t)
    x_t = marginal.sample(4, rng)
    assert_allclose(
        mixture.posterior_mean(diffusion, x_t, t), (x_t + s2 * marginal.score(x_t)) / a, rtol=1e-9, atol=1e-9
    )
    h = 1e-5
    hessian = np.stack(
        [(marginal.score(x_t + e) - marginal.score(x_t - e)) / (2 * h) for e in h * np.eye(mixture.D)], axis=2
    )
    covariance = s2 / abar * (np.eye(mixture.D) + s2 * hessian)
    assert_allclose(mixture.posterior_covariance(diffusion, x_t, t), covariance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [linear_schedule(20), cosine_schedule(20, max_beta=1.0)])
def test_denoisers_of_all_predictions_say_the_same(prediction, schedule):
    diffusion = GaussianDiffusion(schedule, prediction)
    rng = np.random.default_rng(0)
    t = rng.integers(schedule.T - 1, size=200)  # at the cosine schedule's end eps says nothing of x0
    x_t = diffusion.q_sample(IN_THE_PLANE.sample(200, rng), t, rng.standard_normal((200, 2)))
    output = IN_THE_PLANE.denoiser(diffusion)(x_t, t)
    expected = IN_THE_PLANE.posterior_mean(diffusion, x_t, t)
    assert_allclose(diffusion.predict_x0(x_t, t, output), expected, rtol=1e-8, atol=1e-8)


def test_no_nearby_function_of_x_t_has_less_squared_error():
    """A conditional expectation's error is uncorrelated with functions of x_t (12 within 5 sigma)."""
    rng, n = np.random.default_rng(0), 100_000
    diffusion = GaussianDiffusion(linear_schedule(20), "v")
    t = np.full(n, 8)
    x0, noise = IN_THE_PLANE.sample(n, rng), rng.standard_normal((n, 2))
    x_t = diffusion.q_sample(x0, t, noise)
    error = diffusion.training_target(x0, t, noise) - IN_THE_PLANE.denoiser(diffusion)(x_t, t)
    functions = [
        np.ones(n),
        x_t[:, 0],
        x_t[:, 1],
        np.sin(3 * x_t[:, 0]),
        x_t[:, 0] * x_t[:, 1],
        np.abs(x_t[:, 1]),
    ]
    for f in functions:
        for e in error.T:
            assert abs(np.mean(f * e)) < 5 * np.std(f * e) / np.sqrt(n)


def test_one_call_serves_many_times():
    diffusion = GaussianDiffusion(linear_schedule(20), "eps", "learned_range")
    rng = np.random.default_rng(0)
    x_t, t = rng.standard_normal((20, 2)), np.arange(20)
    denoise = IN_THE_PLANE.denoiser(diffusion)
    together = denoise(x_t, t)
    assert together.shape == (20, 4)
    for i in range(20):
        assert_allclose(denoise(x_t[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_array_api_strict(dtype):
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((7, 2)).astype(dtype), rng.integers(20, size=7)
    foreign = strict.asarray(x)
    for variance in ("fixed_small", "learned_range"):
        for prediction in PREDICTIONS:
            diffusion = GaussianDiffusion(linear_schedule(20), prediction, variance)
            denoise = IN_THE_PLANE.denoiser(diffusion)
            there = denoise(foreign, strict.asarray(t))
            assert there.dtype == getattr(strict, dtype)
            assert_allclose(
                np.from_dlpack(there), denoise(x, t), rtol=1e-12 if dtype == "float64" else 1e-4, atol=1e-5
            )
    for method in (IN_THE_PLANE.log_prob, IN_THE_PLANE.score):
        assert method(x).dtype == dtype
        assert_allclose(np.from_dlpack(method(foreign)), method(x), rtol=1e-5)


def test_float32_is_as_good_as_float32_can_be():
    """eps is not the small difference of large numbers, divided by a small one."""
    diffusion = GaussianDiffusion(linear_schedule(1000), "eps")
    rng = np.random.default_rng(0)
    x, t = IN_THE_PLANE.sample(500, rng), np.zeros(500, dtype=np.int64)
    x = diffusion.q_sample(x, t, rng.standard_normal(x.shape)).astype(np.float32)
    denoise = IN_THE_PLANE.denoiser(diffusion)
    assert np.max(abs(denoise(x, t) - denoise(x.astype(np.float64), t))) < 1e-5


# Degenerate and wrong


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)])
def test_what_signs_eigenvectors_have_does_not_matter(signs, monkeypatch):
    """LAPACK's two in the plane are a symmetric matrix: one that is transposed by mistake looks the same."""
    diffusion, x = GaussianDiffusion(linear_schedule(20), "eps", "learned_range"), np.array([[0.3, -0.8]])
    w, m, c = IN_THE_PLANE.weights, IN_THE_PLANE.means, IN_THE_PLANE.covariances
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: (eigh(a)[0], eigh(a)[1] * np.array(signs)))
    turned = GaussianMixture(w, m, c)
    assert_allclose(turned.log_prob(x), IN_THE_PLANE.log_prob(x), rtol=1e-12)
    assert_allclose(turned.score(x), IN_THE_PLANE.score(x), rtol=1e-12)
    assert_allclose(turned.entropy(), IN_THE_PLANE.entropy(), rtol=1e-12)
    outputs = (mixture.denoiser(diffusion)(x, np.array([7])) for mixture in (turned, IN_THE_PLANE))
    assert_allclose(*outputs, rtol=1e-10)
    one = GaussianMixture([1], m[:1], c[:1])
    drawn = one.sample(50_000, np.random.default_rng(0))
    assert_allclose(np.cov(drawn.T), c[0], atol=0.01)  # 5 standard errors; 0.1 off the diagonal


def test_what_it_holds_is_a_copy_that_nobody_changes():
    given_arrays = np.ones(2), np.array([[-1.0], [1.0]]), np.ones((2, 1, 1))
    mixture = GaussianMixture(*given_arrays)
    for array, name in zip(given_arrays, ("weights", "means", "covariances")):
        held = getattr(mixture, name).copy()
        array[...] = 7
        assert_array_equal(getattr(mixture, name), held)
        with pytest.raises(ValueError, match="read-only"):
            getattr(mixture, name)[0] = 7


def test_empty_components_are_left_out():
    mixture = GaussianMixture([0.5, 0, 0.5], [[-1.0], [np.pi], [1.0]], [0.1, 0.0, 0.1])
    assert_array_equal(mixture.means, [[-1], [1]])
    same = GaussianMixture([1, 1], [[-1.0], [1.0]], 0.1)
    x = np.linspace(-3, 3, 9)[:, None]
    assert_array_equal(mixture.log_prob(x), same.log_prob(x))


@given(seeds, st.integers(2, 4))
def test_a_flat_component_has_no_density_in_whatever_direction(seed, D):
    """Its other eigenvalues are rounding, on either side of 0: not negative, and no density."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(D)
    flat = GaussianMixture([1], np.ones((1, D)), np.outer(u, u)[None])
    for call in (flat.entropy, lambda: flat.log_prob(np.ones((1, D))), lambda: flat.score(np.ones((1, D)))):
        with pytest.raises(ValueError, match="singular"):
            call()
    x = flat.sample(5, rng) - 1
    assert_allclose(x, np.outer(x @ u, u) / (u @ u), rtol=1e-7, atol=1e-7)


def test_a_direction_as_narrow_as_float64_can_tell_is_not_taken_for_flat():
    """Each coordinate by itself says the same, however much wider the other is."""
    both = GaussianMixture([1.0], [[0.0, 0.0]], [np.diag([1e4, 1e-9])])
    wide, narrow = (GaussianMixture([1.0], [[0.0]], [variance]) for variance in (1e4, 1e-9))
    x = np.array([[30.0, 2e-5], [-10.0, 0.0]])
    assert_allclose(both.log_prob(x), wide.log_prob(x[:, :1]) + narrow.log_prob(x[:, 1:]), rtol=1e-10)
    diffusion = GaussianDiffusion(NoiseSchedule([1e-10, 0.1]), "x0")
    for t in (0, 1):
        times = np.full(2, t)
        each = np.concat(
            [m.denoiser(diffusion)(x[:, i : i + 1], times) for i, m in enumerate((wide, narrow))], 1
        )
        assert_allclose(both.denoiser(diffusion)(x, times), each, rtol=1e-6)
        variance = narrow.posterior_covariance(diffusion, x[:, 1:], t)[:, 0, 0]
        assert_allclose(both.posterior_covariance(diffusion, x, t)[:, 1, 1], variance, rtol=1e-6)


@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_little_noise_over_flat_data_has_a_density_and_a_bound(turn):
    """Of two points on lines, thickened by 1e-13: found from the sum, that variance would be rounding."""
    U = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    flat = GaussianMixture([1, 1], [[0.0, 1.0], [2.0, 3.0]] @ U.T, [U @ np.diag([1.0, 0.0]) @ U.T] * 2)
    noise = np.geomspace(1e-13, 1 - 1e-5, 10)
    schedule = NoiseSchedule(np.append(noise[0], 1 - (1 - noise[1:]) / (1 - noise[:-1])))
    diffusion = GaussianDiffusion(schedule, "x0")
    at_the_mean = -np.log(2 * 2 * np.pi * np.sqrt(noise[0]))  # of one of two, the other far away
    found = flat.marginal(diffusion, 0).log_prob(np.sqrt(1 - noise[0]) * flat.means[:1])
    assert_allclose(found, at_the_mean, atol=1e-6)
    assert np.isfinite(flat.optimal_bound(diffusion, nodes=41).value)


def test_rounding_beside_a_zero_is_not_an_asymmetry():
    covariance = np.diag(np.full(5, 2.0)) + np.diag(np.full(4, -1.0), 1) + np.diag(np.full(4, -1.0), -1)
    covariance[0, 4] = 1e-16
    assert GaussianMixture([1], np.zeros((1, 5)), [covariance]).D == 5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("T", [1, 2, 30])
def test_points_have_denoisers_though_no_density(variance, T):
    points = GaussianMixture([1, 1], [[-1.0, 0], [1, 0]], 0)
    for call in (
        points.entropy,
        lambda: points.log_prob(np.ones((1, 2))),
        lambda: points.score(np.ones((1, 2))),
    ):
        with pytest.raises(ValueError, match="singular"):
            call()
    diffusion = GaussianDiffusion(linear_schedule(T), "x0", variance)
    x_t = np.array([[-1.0, 0.0], [1.0, 0.1], [0.0, 5.0]])
    output = points.denoiser(diffusion)(x_t, np.full(3, 0))
    assert np.all(np.isfinite(output))
    closer = np.tanh(diffusion.schedule.alphas_cumprod[0] ** 0.5 * x_t[:, 0] / (diffusion.schedule.betas[0]))
    assert_allclose(output[:, 0], closer, rtol=1e-12)
    assert_allclose(output[:, 1], 0, atol=1e-15)
    if variance == "learned_range" and T > 1:
        assert_array_equal(output[:, 3], -1)  # both points agree in it, its variance is 0: the lower end
    if variance == "learned_range" and T == 1:
        assert_array_equal(output[:, 2:], 0)  # both ends are one
    assert np.isfinite(points.optimal_bound(diffusion, nodes=21).value)
    assert set(np.unique(points.sample(50, np.random.default_rng(0)))) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1), "weights is"),
        (([-1, 2], [[0], [0]], 1), "weights is"),
        (([0, 0], [[0], [0]], 1), "not all 0"),
        (([1, np.nan], [[0], [0]], 1), "weights holds a number that is not finite"),
        (([1, 1], [0, 0], 1), r"means has shape \(2,\); expected \(2, D\)"),
        (([1, 1], [[0], [0]], [1, 2, 3]), r"covariances has shape \(3,\)"),
        (([1], [[0, 0]], [[[1, 0.5], [0.4, 1]]]), "not symmetric"),
        (([1], [[0, 0]], [[[1e-9, 5e-10], [4e-10, 1e-9]]]), "not symmetric"),
        (([1], [[0, 0]], [[[1, 2], [2, 1]]]), "negative eigenvalue -1"),
        (([1], [[0, 0]], -1.0), "negative eigenvalue -1"),
        (([1], [["a"]], -1.0), "means is a list"),
    ],
)
def test_what_is_no_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\); expected \(N, 2\)"):
        IN_THE_PLANE.log_prob(np.zeros((3, 4)))
    for call in (IN_THE_PLANE.log_prob, IN_THE_PLANE.score):
        with pytest.raises(TypeError, match=r"^x is a list; expected an array"):
            call([[0.0, 1.0]])
    with pytest.raises(ValueError, match="x has dtype int64"):
        IN_THE_PLANE.log_prob(np.zeros((3, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"t contains 5; expected 0 \.\.\. 4"):
        IN_THE_PLANE.posterior_mean(GaussianDiffusion(linear_schedule(5)), np.zeros((3, 2)), 5)
    with pytest.raises(ValueError, match="x has dtype complex128"):
        IN_THE_PLANE.log_prob(np.zeros((3, 2), dtype=complex))
    with pytest.raises(TypeError, match="rng is an int; expected a numpy"):
        IN_THE_PLANE.sample(3, 0)
    with pytest.raises(ValueError, match="n is 0"):
        IN_THE_PLANE.sample(0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at most two dimensions"):
        GaussianMixture([1, 1], np.eye(3)[:2], 1).entropy()
