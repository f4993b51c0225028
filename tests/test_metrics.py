"""Distances between sets of points and of features: exact where the answer is known, unbiased, and the
permutation test's rate of false alarms."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.linalg import sqrtm
from scipy.stats import binom, chisquare, norm, wasserstein_distance

from tinydiff.metrics import (
    energy_distance,
    frechet_distance,
    mmd_squared,
    permutation_test,
    sliced_wasserstein,
)


def clouds(seed, count, n, D):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.5, 2) * rng.standard_normal((n, D)) + rng.uniform(-1, 1, D) for _ in range(count)]


SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 40), st.integers(1, 4))
def test_is_a_metric(seed, n, D):
    distance = functools.partial(sliced_wasserstein, projections=16)
    x, y, z = clouds(seed, 3, n, D)
    xy = distance(x, y)
    assert distance(x, x[np.random.default_rng(seed).permutation(n)]) == 0
    assert xy > 0
    assert distance(y, x) == xy
    assert distance(x, z) <= xy + distance(y, z) + 1e-12
    assert_allclose(distance(-3 * x, -3 * y), 3 * xy, rtol=1e-10)


@given(SEEDS, st.integers(1, 50))
def test_on_the_line_it_is_scipy_s(seed, n):
    x, y = clouds(seed, 2, n, 1)
    assert_allclose(sliced_wasserstein(x, y), wasserstein_distance(x[:, 0], y[:, 0]), rtol=1e-12)


@given(SEEDS, st.integers(2, 5), st.integers(1, 5))
def test_elsewhere_it_is_the_mean_of_scipy_s_over_directions(seed, D, projections):
    x, y = clouds(seed, 2, 7, D)
    rng = np.random.default_rng(seed)
    if D == 2:
        angles = np.pi * (np.arange(projections) + rng.random()) / projections
        u = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        u = rng.standard_normal((projections, D))
        u /= np.sqrt(np.sum(u**2, axis=1, keepdims=True))
    expected = np.mean([wasserstein_distance(x @ d, y @ d) for d in u])
    distance = sliced_wasserstein(x, y, projections=projections, rng=np.random.default_rng(seed))
    assert_allclose(distance, expected, rtol=1e-10)


@given(SEEDS, st.floats(-10, 10), st.floats(-10, 10))
def test_a_shift_in_the_plane_is_two_over_pi_of_its_length(seed, dx, dy):
    # mean |d . u| over directions u: |d| mean |cos| = 2 |d| / pi; evenly spaced directions err by O(1/K^2).
    (x,) = clouds(seed, 1, 20, 2)
    d = np.array([dx, dy])
    K = 256
    distance = sliced_wasserstein(x, x + d, projections=K, rng=np.random.default_rng(seed))
    assert_allclose(distance, 2 / np.pi * np.hypot(dx, dy), rtol=(np.pi / K) ** 2 / 2, atol=1e-12)


@pytest.mark.parametrize("D", [3, 5])
def test_a_shift_in_space(D):
    # The mean of |u_1| on the sphere is Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)): 1/2 for D = 3, 3/8 for D = 5.
    (x,) = clouds(0, 1, 20, D)
    d = np.arange(1.0, D + 1)
    K = 20_000
    distance = sliced_wasserstein(x, x + d, projections=K)
    mean = {3: 1 / 2, 5: 3 / 8}[D]
    deviation = np.sqrt(1 / D - mean**2)
    assert abs(distance / np.linalg.norm(d) - mean) < 5 * deviation / np.sqrt(K)  # false alarm 6e-7


@given(SEEDS, st.integers(0, 63))
def test_turning_the_plane_changes_nothing(seed, turns):
    # Turned by a multiple of the angle between two of the 64 directions, they are the same directions.
    x, y = clouds(seed, 2, 30, 2)
    angle = turns * np.pi / 64
    R = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    assert_allclose(
        sliced_wasserstein(x @ R, y @ R, projections=64), sliced_wasserstein(x, y, projections=64), rtol=1e-10
    )


def test_the_floor_falls_with_the_root_of_n():
    rng = np.random.default_rng(0)

    def floor(n):
        pairs = [(rng.standard_normal((n, 2)), rng.standard_normal((n, 2))) for _ in range(40)]
        return np.mean([sliced_wasserstein(x, y, projections=16) for x, y in pairs])

    small, large = floor(100), floor(1600)
    assert 3.2 < small / large < 4.8  # 4; each floor is known to about 5%


def test_directions_are_the_same_unless_given():
    x, y = clouds(1, 2, 10, 3)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x, y, projections=256)
    assert sliced_wasserstein(x, y) != sliced_wasserstein(x, y, rng=np.random.default_rng(1))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), r"\(3, 2\) and \(4, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 1)), r"\(3, 2\) and \(3, 1\)"),
        (np.zeros(3), np.zeros(3), r"\(3,\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "not empty"),
        (np.full((1, 2), np.nan), np.zeros((1, 2)), "^x contains NaN"),
        (np.zeros((1, 2)), np.full((1, 2), np.inf), "^y contains NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_named(x, y, match):
    with pytest.raises(ValueError, match=match):
        sliced_wasserstein(x, y)


@pytest.mark.parametrize("function", [sliced_wasserstein, mmd_squared, energy_distance, frechet_distance])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_sets_of_whatever_dtype_are_measured_in_float64(function, dtype):
    x, y = (np.asarray(100 + 20 * z, dtype) for z in clouds(0, 2, 50, 3))
    assert function(x, y) == function(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize("function", [sliced_wasserstein, permutation_test])
def test_a_seed_is_no_generator(function):
    with pytest.raises(TypeError, match="rng is an int; expected a numpy"):
        function(np.zeros((3, 2)), np.ones((3, 2)), rng=0)


def test_projections_at_least_one():
    with pytest.raises(ValueError, match="projections is 0"):
        sliced_wasserstein(np.zeros((1, 2)), np.zeros((1, 2)), projections=0)


# --- MMD and energy distance -----------------------------------------------------------------------------

DISCREPANCIES = {"mmd": lambda x, y: mmd_squared(x, y, bandwidth=0.8), "energy": energy_distance}


def kernel(name, x, y):
    r = np.sqrt(np.sum((x - y) ** 2))
    return np.exp(-(r**2) / (2 * 0.8**2)) if name == "mmd" else -r


@pytest.mark.parametrize("name", DISCREPANCIES)
@given(SEEDS, st.integers(2, 6), st.integers(2, 6), st.integers(1, 3))
def test_discrepancy_is_the_mean_over_pairs_of_different_points(name, seed, n, m, D):
    x, y = clouds(seed, 1, n, D)[0], clouds(seed + 1, 1, m, D)[0]
    within = [np.mean([kernel(name, a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    across = np.mean([kernel(name, a, b) for a in x for b in y])
    assert_allclose(DISCREPANCIES[name](x, y), sum(within) - 2 * across, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", DISCREPANCIES)
@pytest.mark.parametrize("same", [True, False])
def test_discrepancy_is_unbiased(name, same):
    """Its mean over *all* samples of two densities on three points is the densities' own."""
    points = np.array([[0.0], [1.0], [2.5]])
    p = np.array([0.2, 0.5, 0.3])
    q = p if same else np.array([0.6, 0.1, 0.3])
    K = np.array([[kernel(name, a, b) for b in points] for a in points])
    expected = (p - q) @ K @ (p - q)
    mean = 0.0
    for *i, j, k in itertools.product(range(3), repeat=5):
        mean += np.prod(p[i]) * q[j] * q[k] * DISCREPANCIES[name](points[i], points[[j, k]])
    assert_allclose(mean, expected, atol=1e-12)
    assert (abs(expected) < 1e-15) == same


def test_mmd_between_gaussians():
    # E k(x, y) = (h^2 / (h^2 + s^2 + r^2))^(D/2) exp(-|mu|^2 / 2 (h^2 + s^2 + r^2)).
    h, s, r, mu, n, m, repeats = 1.5, 1.0, 0.5, np.array([1.0, -0.5]), 20, 30, 400

    def mean_kernel(variance, shift):
        total = h**2 + variance
        return h**2 / total * np.exp(-np.sum(shift**2) / (2 * total))

    expected = (
        mean_kernel(2 * s**2, 0 * mu) + mean_kernel(2 * r**2, 0 * mu) - 2 * mean_kernel(s**2 + r**2, mu)
    )
    rng = np.random.default_rng(0)
    found = [
        mmd_squared(s * rng.standard_normal((n, 2)), mu + r * rng.standard_normal((m, 2)), bandwidth=h)
        for _ in range(repeats)
    ]
    error = np.std(found) / np.sqrt(repeats)
    assert abs(np.mean(found) - expected) < 5 * error < 0.1 * expected  # false alarm 6e-7


@given(SEEDS, st.integers(2, 12), st.integers(2, 12))
def test_energy_distance_on_the_line_is_an_integral_of_distribution_functions(seed, n, m):
    """2 int (F - G)^2 counts pairs of a point with itself; without them each mean grows by n / (n - 1)."""
    x, y = clouds(seed, 1, n, 1)[0], clouds(seed + 1, 1, m, 1)[0]
    at = np.sort(np.concat([x, y])[:, 0])
    F, G = (np.searchsorted(np.sort(z[:, 0]), at[:-1], side="right") / len(z) for z in (x, y))
    integral = 2 * np.sum((F - G) ** 2 * np.diff(at))
    # Gini's mean difference: E|x - x'| = 2 int F (1 - F).
    spread = [2 * np.sum(H * (1 - H) * np.diff(at)) / (len(z) - 1) for H, z in ((F, x), (G, y))]
    assert_allclose(energy_distance(x, y), integral - sum(spread), rtol=1e-9, atol=1e-12)


def test_energy_distance_between_gaussians_is_the_quadrature():
    n, repeats = 25, 1000
    F, G = norm(0, 1), norm(0.8, 1.5)
    expected = 2 * quad(lambda t: (F.cdf(t) - G.cdf(t)) ** 2, -12, 12, epsabs=1e-12)[0]
    rng = np.random.default_rng(0)
    found = [
        energy_distance(F.rvs((n, 1), random_state=rng), G.rvs((n, 1), random_state=rng))
        for _ in range(repeats)
    ]
    error = np.std(found) / np.sqrt(repeats)
    assert abs(np.mean(found) - expected) < 5 * error < 0.2 * expected  # false alarm 6e-7


@given(SEEDS, st.integers(1, 3))
def test_discrepancies_ignore_order_and_motion_and_the_bandwidth_follows_the_scale(seed, D):
    x, y = clouds(seed, 2, 6, D)
    c, shift = 7.0, np.arange(D)
    assert_allclose(energy_distance(y, x[::-1]), energy_distance(x, y), rtol=1e-9, atol=1e-12)
    assert_allclose(mmd_squared(y, x[::-1]), mmd_squared(x, y), rtol=1e-9, atol=1e-12)
    assert_allclose(energy_distance(shift - c * x, shift - c * y), c * energy_distance(x, y), atol=1e-11)
    assert_allclose(mmd_squared(shift - c * x, shift - c * y), mmd_squared(x, y), atol=1e-11)


def test_the_default_bandwidth_is_the_median_of_distances_between_different_points():
    x, y = np.array([[0.0], [0.0], [1.0]]), np.array([[3.0], [3.0]])
    # Distances above 0: 1, 1, 2, 2, 3, 3, 3, 3.
    assert mmd_squared(x, y) == mmd_squared(x, y, bandwidth=2.5)
    assert mmd_squared(x[:2], x[:2]) == 0  # every point the same


# --- The permutation test --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISCREPANCIES)
def test_p_values_are_uniform_where_the_densities_are_equal(name):
    permutations, repeats = 19, 600
    rng = np.random.default_rng(0)
    ranks = np.zeros(permutations + 1)
    for _ in range(repeats):
        x, y = rng.standard_normal((8, 2)), rng.standard_normal((12, 2))
        p = permutation_test(x, y, statistic=name, permutations=permutations, rng=rng).p_value
        ranks[round(p * (permutations + 1)) - 1] += 1
    assert chisquare(ranks).pvalue > 1e-6  # the test's own rate of false alarms
    assert ranks[0] < binom(repeats, 0.05).isf(1e-6)  # p <= 0.05 in 5% of cases, no more


@pytest.mark.parametrize("name", DISCREPANCIES)
def test_different_densities_are_told_apart(name):
    """One of the same mean and covariance among them, which a kernel as wide as the cloud would not see."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    shifted, corners = np.array([1, 0]) + rng.standard_normal((150, 2)), rng.choice([-1.0, 1.0], (150, 2))
    for y, bandwidth in ((shifted, None), (corners, 0.3 if name == "mmd" else None)):
        result = permutation_test(x, y, statistic=name, permutations=499, bandwidth=bandwidth, rng=rng)
        assert result.p_value == 1 / 500
        assert result.statistic > result.null.max()


@given(SEEDS, st.integers(2, 5), st.integers(2, 5))
def test_the_null_is_the_discrepancies_of_random_divisions(seed, n, m):
    x, y = clouds(seed, 1, n, 2)[0], clouds(seed + 1, 1, m, 2)[0]
    z = np.concat([x, y])
    every = set()
    for chosen in itertools.combinations(range(n + m), n):
        rest = [i for i in range(n + m) if i not in chosen]
        every.add(energy_distance(z[list(chosen)], z[rest]))
    result = permutation_test(x, y, statistic="energy", permutations=50, rng=np.random.default_rng(seed))
    assert result.statistic == energy_distance(x, y)
    assert len(result.null) == 50
    nearest = np.min(np.abs(result.null[:, None] - np.array(sorted(every))), axis=1)
    assert_allclose(nearest, 0, atol=1e-12)


def test_divisions_as_discrepant_as_the_observed_count_against_it():
    # 2 + 2 points: the observed division and its mirror image are the most discrepant, 2 of 6.
    x, y = np.array([[0.0], [0.1]]), np.array([[1.0], [1.1]])
    for name in DISCREPANCIES:
        p = permutation_test(x, y, statistic=name, permutations=6000).p_value
        assert abs(p - 1 / 3) < 5 * np.sqrt(2 / 9 / 6000)
        assert permutation_test(np.zeros((3, 2)), np.zeros((4, 2)), statistic=name).p_value == 1


def test_a_result_is_printed_in_one_line():
    result = permutation_test(*np.random.default_rng(0).normal(size=(2, 5, 2)))
    assert repr(result) == f"PermutationResult(statistic={result.statistic}, p_value={result.p_value})"


def test_more_permutations_than_a_batch_and_the_seed():
    x, y = clouds(0, 2, 10, 2)
    first = permutation_test(x, y, permutations=700)
    assert first.null.shape == (700,) and np.all(np.isfinite(first.null))
    assert permutation_test(x, y, permutations=700).p_value == first.p_value
    assert permutation_test(x, y).null.shape == (999,)  # by default
    assert np.any(permutation_test(x, y, permutations=700, rng=np.random.default_rng(1)).null != first.null)


@pytest.mark.parametrize("function", [mmd_squared, energy_distance, permutation_test])
@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), r"x and y have shapes \(3, 2\) and \(3, 1\)"),
        (np.zeros(3), np.zeros(3), r"expected \(n, D\)"),
        (np.zeros((3, 0)), np.zeros((3, 0)), r"expected \(n, D\)"),
        (np.zeros((1, 2)), np.zeros((3, 2)), "at least 2 rows"),
        (np.zeros((2, 2)), np.full((2, 2), np.nan), "^y contains NaN"),
    ],
)
def test_points_that_do_not_fit_are_named(function, x, y, match):
    with pytest.raises(ValueError, match=match):
        function(x, y)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"statistic": "t"}, "statistic is 't'"),
        ({"permutations": 0}, "permutations is 0"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
        ({"bandwidth": np.inf}, "bandwidth is inf"),
        ({"bandwidth": "median"}, "bandwidth is 'median'; expected a positive number"),
        ({"statistic": "energy", "bandwidth": 1.0}, "bandwidth is 1.0; expected None"),
    ],
)
def test_settings_that_do_not_fit_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        permutation_test(np.zeros((2, 1)), np.ones((2, 1)), **arguments)


# --- The Fréchet distance --------------------------------------------------------------------------------


def sample_with(rng, n, mean, covariance):
    """n samples whose own mean and covariance are exactly these."""
    z = rng.standard_normal((n, len(mean)))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T).reshape(2 * (len(mean),)))).T
    eigenvalues, V = np.linalg.eigh(covariance)
    return mean + z @ (V * np.sqrt(np.maximum(eigenvalues, 0))).T


@given(SEEDS, st.integers(1, 5))
def test_frechet_distance_is_dowson_and_landau_s_formula(seed, D):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((2, D))
    factors = rng.standard_normal((2, D, D))
    S, R = factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(D)
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(S + R - 2 * np.real(sqrtm(S @ R)))
    a, b = sample_with(rng, 3 * D + 2, means[0], S), sample_with(rng, 2 * D + 7, means[1], R)
    assert_allclose(frechet_distance(a, b), expected, rtol=1e-7, atol=1e-9)
    assert_allclose(frechet_distance(b, a), frechet_distance(a, b), rtol=1e-10)


def test_frechet_distance_between_gaussians_on_the_axes():
    # |mu|^2 + sum (s_i - r_i)^2, also where a deviation is 0: covariances without full rank.
    rng = np.random.default_rng(0)
    s, r, mu = np.array([1.0, 2.0, 0.0, 0.0]), np.array([3.0, 0.0, 0.5, 0.0]), np.array([0.0, 1.0, 0.0, 2.0])
    a, b = sample_with(rng, 50, 0 * mu, np.diag(s**2)), sample_with(rng, 40, mu, np.diag(r**2))
    assert_allclose(frechet_distance(a, b), np.sum(mu**2) + np.sum((s - r) ** 2), rtol=1e-12)


@given(SEEDS, st.integers(2, 6), st.integers(2, 6))
def test_frechet_distance_of_fewer_samples_than_features(seed, n, m):
    """In 40 dimensions, against eigenvalues in the few directions that occur; a set from itself is at 0."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, 40)), 2 * rng.standard_normal((m, 40))
    S, R = np.cov(a.T), np.cov(b.T)
    fidelity = np.sum(np.sqrt(np.sort(np.abs(np.linalg.eigvals(S @ R)))[-min(n, m) + 1 :]))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(S) + np.trace(R) - 2 * fidelity
    assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)
    assert 0 <= frechet_distance(a, a[::-1]) < 1e-12
    assert_allclose(frechet_distance(a, a + 0.5), 40 * 0.25, rtol=1e-12)


def test_frechet_distance_by_other_conventions_is_what_chapter_13_says():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30, 4)) * np.logspace(0, -3, 4) + 1

    def other(epsilon=0.0, **how):
        S_a, S_b = (np.cov(x.T, **how) + epsilon * np.eye(4) for x in (a, b))
        apart = np.sum((a.mean(0) - b.mean(0)) ** 2)
        return apart + np.trace(S_a + S_b) - 2 * np.sum(np.sqrt(np.linalg.eigvals(S_a @ S_b).real))

    by_n = [mean + np.sqrt(1 - 1 / 30) * (x - mean) for x in (a, b) for mean in [x.mean(0)]]
    assert_allclose(frechet_distance(*by_n), other(bias=True), rtol=1e-9)
    for epsilon in (1e-8, 1e-6, 1e-3, 1.0):
        lower = np.sqrt(frechet_distance(a, b)) - np.sqrt(other(epsilon))
        assert 0 < lower < 2 * np.sqrt(4 * epsilon)


def test_frechet_distance_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"features_a and features_b have shapes \(3, 2\) and \(3, 1\)"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.zeros((3, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"^features_b contains NaN"):
        frechet_distance(np.zeros((3, 2)), np.full((3, 2), np.nan))
    assert frechet_distance(np.ones((3, 2)), np.ones((2, 2))) == 0  # points, not clouds


# --- All of them -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "function", [sliced_wasserstein, mmd_squared, energy_distance, permutation_test, frechet_distance]
)
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            lambda x: np.ma.masked_greater(x, 1),
            "is a masked array; expected one in which every number counts",
        ),
        (lambda x: x + 0j, "has dtype complex128; expected real numbers"),
        (lambda x: x.astype(object), "has dtype object; expected real numbers"),
    ],
)
def test_only_real_numbers_that_count_are_taken(function, wrong, match):
    x = np.arange(6.0).reshape(3, 2)
    first, second = ("features_a", "features_b") if function is frechet_distance else ("x", "y")
    with pytest.raises(ValueError, match=f"^{first} {match}"):
        function(wrong(x), x)
    with pytest.raises(ValueError, match=f"^{second} {match}"):
        function(x, wrong(x))


def test_integers_and_lists_are_numbers():
    x, y = [[0, 0], [1, 2], [3, 1]], [[1, 1], [2, 5], [0, 4]]
    for function in (sliced_wasserstein, mmd_squared, energy_distance, frechet_distance):
        assert function(x, np.asarray(y)) == function(np.asarray(x, float), np.asarray(y, np.float32))
