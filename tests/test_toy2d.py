"""The eight shapes: exact population moments, independent draws, and the geometry that each is named for."""

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.stats import norm, qmc

from tinydiff.datasets import toy2d
from tinydiff.datasets.toy2d import SHAPES, sample

EIGHT = (
    "moons",
    "swiss_roll",
    "eight_gaussians",
    "checkerboard",
    "two_spirals",
    "rings",
    "pinwheel",
    "heart",
)

# All z-tests of this file together reject a correct implementation once in a million choices of the seeds.
Z_TESTS = 2 * len(EIGHT)
Z_MAX = norm.isf(1e-6 / (2 * Z_TESTS))


def z_score(values, expected):
    """Standardised deviation of the mean of independent `values`, along axis 0, from `expected`."""
    return (values.mean(0) - expected) / (values.std(0) / np.sqrt(len(values)))


def raw(name, n=20_000, seed=0):
    """A draw in the units in which the shape is written, undone with moments stated by the test."""
    mean, std = {
        "moons": (
            (0.5, 0.25),
            np.sqrt((0.75 + 0.0064, 0.5 - 4 / np.pi**2 + (2 / np.pi - 0.25) ** 2 + 0.0064)),
        ),
        "eight_gaussians": (0, np.sqrt(0.51)),
        "checkerboard": (0, 2 / np.sqrt(3)),
        "rings": (0, np.sqrt(3.01)),
        "pinwheel": (0, np.sqrt(0.55)),
    }[name]
    return sample(name, n, np.random.default_rng(seed), np.float64) * std + mean


def test_there_are_eight_shapes_in_this_order():
    assert SHAPES == EIGHT


class Even(np.random.Generator):
    """In the place of random numbers those of a Sobol sequence, a coordinate for each call."""

    def __init__(self, log2_n):
        super().__init__(np.random.PCG64(0))
        points = qmc.Sobol(4, scramble=False).random_base2(log2_n) + 0.5 ** (log2_n + 1)
        self.columns = iter(points.T)

    def random(self, size):
        columns = [next(self.columns) for _ in range(math.prod(np.atleast_1d(size)[1:]))]
        return np.stack(columns, axis=-1).reshape(size)

    def uniform(self, low, high, size):
        return low + (high - low) * self.random(size)

    def integers(self, high, size):
        return np.floor(high * self.random(size)).astype(int)

    def standard_normal(self, size):
        return norm.ppf(self.random(size))


@pytest.mark.parametrize("name", SHAPES)
def test_population_mean_is_zero_and_population_variance_one(name):
    """An error of 2e-4 is found; a million points at random would let 0.006 pass."""
    x = sample(name, 2**17, Even(17), np.float64)
    np.testing.assert_allclose(x.mean(0), 0, atol=2e-4)
    np.testing.assert_allclose(x.var(0), 1, rtol=2e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_points_are_independent(name):
    # The mean of 4 independent points of variance 1 has variance 1/4. It would be 0 if a draw were
    # standardised with its own moments, and too small if half of a draw came from each half of a shape.
    rng = np.random.default_rng(2)
    means = np.stack([sample(name, 4, rng, np.float64).mean(0) for _ in range(4000)])
    assert np.abs(z_score(means**2, 0.25)).max() < Z_MAX, f"mean square {(means**2).mean(0)}"


@pytest.mark.parametrize("name", SHAPES)
def test_rng_alone_decides_and_is_advanced(name):
    rng, twin = np.random.default_rng(3), np.random.default_rng(3)
    first = sample(name, 50, rng)
    np.testing.assert_array_equal(first, sample(name, 50, twin))
    assert not np.any(np.all(first == sample(name, 50, rng), axis=1)), "the second draw repeats points"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [1, 7, np.int64(3)])
def test_shape_dtype_and_finiteness(name, n):
    single = sample(name, n, np.random.default_rng(4))
    double = sample(name, n, np.random.default_rng(4), np.float64)
    assert single.shape == double.shape == (n, 2)
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert np.isfinite(double).all()
    np.testing.assert_array_equal(single, double.astype(np.float32))


def curves():
    """The shapes that are curves, at evenly probable points, and the noise that gives each its thickness."""
    u = np.linspace(0, 1, 20_000)
    half, roll, arm, heart = np.pi * u, np.pi * (1.5 + 3 * u), 3 * np.pi * np.sqrt(u), 2 * np.pi * u
    moon = np.stack([np.cos(half), np.sin(half)], axis=1)
    spiral = arm[:, None] * np.stack([np.cos(arm), np.sin(arm)], axis=1)
    waves = 13 * np.cos(heart) - 5 * np.cos(2 * heart) - 2 * np.cos(3 * heart) - np.cos(4 * heart)
    return {
        "moons": (np.concat([moon, (1, 0.5) - moon]), 0.08),
        "swiss_roll": (roll[:, None] * np.stack([np.cos(roll), np.sin(roll)], axis=1), 0.5),
        "two_spirals": (np.concat([spiral, -spiral]), 0.3),
        "heart": (np.stack([16 * np.sin(heart) ** 3, waves], axis=1), 0.7),
    }


@pytest.mark.parametrize("name", curves())
def test_a_curve_is_as_thick_as_its_noise(name):
    curve, sigma = curves()[name]
    x = sample(name, 20_000, np.random.default_rng(0), np.float64)
    x = x * np.sqrt(curve.var(0) + sigma**2) + curve.mean(0)
    distance, _ = cKDTree(curve).query(x)
    # A square's mean is known to 1%; of the heart some points at its cusp are nearer to the other side.
    np.testing.assert_allclose(np.mean(distance**2), sigma**2, rtol=0.05)


def test_moons_are_two_arcs_that_a_half_turn_exchanges():
    x = raw("moons")
    upper = np.hypot(*(x - (0, 0)).T), x[:, 1] > -0.4
    lower = np.hypot(*(x - (1, 0.5)).T), x[:, 1] < 0.9
    on_upper, on_lower = ((np.abs(radius - 1) < 0.4) & half for radius, half in (upper, lower))
    assert np.all(on_upper | on_lower)
    assert abs(np.mean(x[:, 1] > 0.25) - 0.5) < 0.02
    # The tip of each lies inside the other's arc: what makes the shape hard to split with a line.
    assert np.any((x[:, 0] > 0.9) & (np.abs(x[:, 1]) < 0.1) & (upper[0] < 1.2))
    assert np.any((x[:, 0] < 0.1) & (np.abs(x[:, 1] - 0.5) < 0.1) & (lower[0] < 1.2))


def test_swiss_roll_radius_is_its_angle():
    std = np.sqrt((39 * np.pi**2 / 8 - 4.25 + 0.25, 39 * np.pi**2 / 8 + 0.25 - (2 / (3 * np.pi)) ** 2 + 0.25))
    x = sample("swiss_roll", 20_000, np.random.default_rng(0), np.float64) * std + (2, 2 / (3 * np.pi))
    radius, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    turns = np.round((radius - angle) / (2 * np.pi))
    off = radius - (angle + 2 * np.pi * turns)
    assert np.mean(np.abs(off) < 1.5) > 0.99  # 3 sigma; a wrong spiral gives 2 * 1.5 / (2 pi) = 0.48
    assert set(np.unique(turns)) >= {1.0, 2.0}


def test_eight_gaussians_are_eight_round_equal_and_separate():
    x = raw("eight_gaussians")
    centres = np.exp(0.25j * np.pi * np.arange(8))
    distance = np.abs((x[:, 0] + 1j * x[:, 1])[:, None] - centres)
    nearest = distance.argmin(1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=8) / len(x), 1 / 8, atol=0.02)
    np.testing.assert_allclose(np.mean(distance.min(1) ** 2), 2 * 0.1**2, rtol=0.05)
    assert distance.min(1).max() < 0.6


def test_checkerboard_is_on_black_squares_only_and_on_each_equally():
    x = raw("checkerboard")
    assert np.abs(x).max() <= 2
    column, row = np.floor(x).astype(int).T
    assert np.all((column + row) % 2 == 0)
    squares, counts = np.unique(4 * column + row, return_counts=True)
    assert len(squares) == 8
    np.testing.assert_allclose(counts / len(x), 1 / 8, atol=0.02)


def test_two_spirals_are_two_opposite_arms_between_which_there_is_a_gap():
    scale = np.sqrt((9 * np.pi**2 / 4 + 0.75 + 0.09, 9 * np.pi**2 / 4 - 0.75 + 0.09))
    x = sample("two_spirals", 20_000, np.random.default_rng(0), np.float64) * scale
    radius, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    # On the arms radius = angle modulo pi: the second arm is the first, half a turn on.
    half_turns = (radius - angle) / np.pi
    off = np.pi * np.abs(half_turns - np.round(half_turns))
    away = radius > 2
    assert np.mean(off[away] < 0.9) > 0.99  # 3 sigma; a wrong spiral gives 2 * 0.9 / pi = 0.57
    arm = np.round(half_turns[away]) % 2
    assert abs(arm.mean() - 0.5) < 0.02


def test_rings_are_near_their_radii_in_proportion_to_them():
    radius = np.hypot(*raw("rings").T)
    nearest = np.clip(np.round(radius), 1, 3)
    assert np.abs(radius - nearest).max() < 0.5
    np.testing.assert_allclose(np.mean((radius - nearest) ** 2), 0.1**2, rtol=0.05)
    np.testing.assert_allclose(
        np.bincount(nearest.astype(int))[1:] / len(radius), [1 / 6, 1 / 3, 1 / 2], atol=0.02
    )


def test_pinwheel_unbends_into_five_equal_blades():
    z = raw("pinwheel") @ (1, 1j)
    z = z[np.abs(z) > 0.5]  # near the hub the blades meet
    angle = np.angle(z) - np.exp(np.abs(z)) / 4
    blade = angle / (2 * np.pi / 5)
    off = (2 * np.pi / 5) * np.abs(blade - np.round(blade)) * np.abs(z)
    assert np.mean(off < 0.35) > 0.98  # a few times 0.1; without blades 5 * 0.7 / (2 pi) = 0.56
    np.testing.assert_allclose(np.bincount(np.round(blade).astype(int) % 5) / len(z), 1 / 5, atol=0.02)


def test_heart_is_symmetric_pointed_below_notched_above_and_hollow():
    x = sample("heart", 20_000, np.random.default_rng(0), np.float64)
    right, left = x[x[:, 0] > 0], x[x[:, 0] < 0]
    assert abs(len(right) / len(x) - 0.5) < 0.02
    np.testing.assert_allclose(right[:, 1].mean(), left[:, 1].mean(), atol=0.05)
    middle = x[np.abs(x[:, 0]) < 0.1, 1]
    assert middle.min() < -1.4 and x[np.abs(np.abs(x[:, 0]) - 1.5) < 0.1, 1].min() > -1
    assert middle.max() < x[:, 1].max() - 0.1
    assert not np.any(np.hypot(x[:, 0], x[:, 1] + 0.3) < 0.4)


@pytest.mark.parametrize("name", ["moon", "", "Moons", None, 3])
def test_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match=r"name is .*expected one of 'moons', .*'heart'"):
        sample(name, 10, np.random.default_rng(0))


@pytest.mark.parametrize("n", [0, -1, 2.0, 2.5, True, "3", None, float("nan")])
def test_bad_n(n):
    with pytest.raises(ValueError, match=r"^n is .*; expected an integer of at least 1"):
        sample("moons", n, np.random.default_rng(0))


@pytest.mark.parametrize("rng", [None, 0, np.random, np.random.RandomState(0)])
def test_bad_rng(rng):
    with pytest.raises(TypeError, match=r"^rng is an? .*; expected a numpy.random.Generator"):
        sample("moons", 10, rng)


@pytest.mark.parametrize("dtype", [np.int32, np.float16, bool])
def test_bad_dtype(dtype):
    with pytest.raises(ValueError, match=r"^dtype is .*; expected float32 or float64"):
        toy2d.sample("moons", 10, np.random.default_rng(0), dtype)
