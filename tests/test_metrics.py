"""The sliced Wasserstein distance: a metric, exact where the answer is known, and its sampling floor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import wasserstein_distance

from tinydiff.metrics import sliced_wasserstein


def clouds(seed, count, n, D):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.5, 2) * rng.standard_normal((n, D)) + rng.uniform(-1, 1, D) for _ in range(count)]


SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 40), st.integers(1, 4))
def test_is_a_metric(seed, n, D):
    x, y, z = clouds(seed, 3, n, D)
    xy = sliced_wasserstein(x, y)
    assert sliced_wasserstein(x, x[np.random.default_rng(seed).permutation(n)]) == 0
    assert xy > 0
    assert sliced_wasserstein(y, x) == xy
    assert sliced_wasserstein(x, z) <= xy + sliced_wasserstein(y, z) + 1e-12
    assert_allclose(sliced_wasserstein(-3 * x, -3 * y), 3 * xy, rtol=1e-10)


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
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x, y)
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


def test_projections_at_least_one():
    with pytest.raises(ValueError, match="projections is 0"):
        sliced_wasserstein(np.zeros((1, 2)), np.zeros((1, 2)), projections=0)
