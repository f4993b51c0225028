"""Eight shapes in the plane, each with population mean 0 and population standard deviation 1.

A shape is a skeleton (a curve, a set of centres, a set of squares) plus isotropic Gaussian noise of
standard deviation sigma that gives it thickness. Its points are independent and identically distributed,
and are standardised with the moments of the *distribution*, which are closed forms stated beside each
shape: with s the skeleton,

    x = (s + sigma z - E[s]) / sqrt(Var[s] + sigma^2),      z ~ N(0, I),

coordinate by coordinate. Standardising with the moments of the *sample* instead would make every draw come
from a slightly different distribution, and comparing samples with fresh data would measure that difference,
too.

Two facts serve most shapes. A variance in a mixture is the mean of the variances plus the variance of the
means. And a distribution that a rotation by less than 180 degrees leaves unchanged has mean 0 and
covariance E[|s|^2]/2 I.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinydiff._checks import check_choice, check_counts, class_or_kind

__all__ = ["SHAPES", "sample"]

Skeleton = Callable[[int, np.random.Generator], np.ndarray]


class _Shape(NamedTuple):
    skeleton: Skeleton
    mean: np.ndarray  # (2,), E[s]
    std: np.ndarray  # (2,), sqrt(Var[s] + sigma^2)
    sigma: float


_REGISTRY: dict[str, _Shape] = {}


def _shape(
    mean: tuple[float, float], variance: tuple[float, float], sigma: float
) -> Callable[[Skeleton], Skeleton]:
    """Register a skeleton under its function's name, with its exact moments and the noise to add."""

    def register(skeleton: Skeleton) -> Skeleton:
        std = np.sqrt(np.add(variance, sigma**2))
        _REGISTRY[skeleton.__name__.lstrip("_")] = _Shape(skeleton, np.array(mean), std, sigma)
        return skeleton

    return register


def sample(name: str, n: int, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Draw `n` fresh, independent points of a shape.

    Parameters
    ----------
    name : str
        One of `SHAPES`.
    n : int
        How many points, at least 1.
    rng : numpy.random.Generator
        Where the randomness comes from.
    dtype : {float32, float64}, optional
        dtype of the result. The draw itself is made in float64, so both hold the same points.

    Returns
    -------
    ndarray, shape (n, 2)
        Points; each coordinate has population mean 0 and population standard deviation 1.

    Raises
    ------
    ValueError
        If `name` is not one of `SHAPES`, `n` is not a positive integer, or `dtype` is neither of the two.
    TypeError
        If `rng` is not a ``numpy.random.Generator``.
    """
    check_choice("name", name, SHAPES)
    check_counts(n=n)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng is {class_or_kind(rng)}; expected a numpy.random.Generator.")
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype is {np.dtype(dtype)}; expected float32 or float64.")
    shape = _REGISTRY[name]
    points = shape.skeleton(int(n), rng)
    if shape.sigma:
        points += shape.sigma * rng.standard_normal(points.shape)
    return ((points - shape.mean) / shape.std).astype(dtype)


def _xy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([x, y], axis=1)


def _polar(radius: npt.ArrayLike, angle: np.ndarray) -> np.ndarray:
    return _xy(radius * np.cos(angle), radius * np.sin(angle))


# Upper moon: mean (0, 2/pi) and variance (1/2, 1/2 - (2/pi)^2). The lower is its half turn about (1/2, 1/4).
@_shape(
    mean=(1 / 2, 1 / 4),
    variance=(1 / 2 + 1 / 4, 1 / 2 - (2 / pi) ** 2 + (2 / pi - 1 / 4) ** 2),
    sigma=0.08,
)
def _moons(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two interleaved half circles."""
    angle = rng.uniform(0, pi, n)
    turn = np.where(rng.random(n) < 0.5, 1.0, -1.0)  # a half turn is the offsets' change of sign
    return _xy(1 / 2 + turn * (np.cos(angle) - 1 / 2), 1 / 4 + turn * (np.sin(angle) - 1 / 4))


# With t uniform on [a, b] = [3 pi/2, 9 pi/2]: E[t cos t] = 2, E[t sin t] = 2/(3 pi), E[t^2] = 39 pi^2/4,
# E[t^2 cos 2t] = -1/2, and cos^2, sin^2 = (1 +- cos 2t)/2.
@_shape(
    mean=(2, 2 / (3 * pi)),
    variance=(39 * pi**2 / 8 - 1 / 4 - 2**2, 39 * pi**2 / 8 + 1 / 4 - (2 / (3 * pi)) ** 2),
    sigma=0.5,
)
def _swiss_roll(n: int, rng: np.random.Generator) -> np.ndarray:
    """A spiral of one and a half turns whose radius is its angle."""
    t = rng.uniform(1.5 * pi, 4.5 * pi, n)
    return _polar(t, t)


# Unchanged by an eighth of a turn, |s| = 1.
@_shape(mean=(0, 0), variance=(1 / 2, 1 / 2), sigma=0.1)
def _eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight Gaussians with their centres on a circle."""
    return _polar(1.0, rng.integers(8, size=n) * (pi / 4))


# Every row and every column holds two black squares: each coordinate alone is uniform on [-2, 2].
@_shape(mean=(0, 0), variance=(4 / 3, 4 / 3), sigma=0.0)
def _checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """The black squares, sharp-edged, of a board of 4 x 4 unit squares."""
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    return _xy(column, row) - 2 + rng.random((n, 2))


# With density 2t/b^2 on [0, b], b = 3 pi: E[t^2] = b^2/2, E[t^2 cos 2t] = 3/2. Two arms, opposite: mean 0.
@_shape(mean=(0, 0), variance=(9 * pi**2 / 4 + 3 / 4, 9 * pi**2 / 4 - 3 / 4), sigma=0.3)
def _two_spirals(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two intertwined arms of one and a half turns, about evenly dense along their length."""
    t = 3 * pi * np.sqrt(rng.random(n))
    return _polar(np.where(rng.random(n) < 0.5, t, -t), t)


# Ring r = 1, 2, 3 with probability r/6: E[r^2] = (1 + 8 + 27)/6 = 6.
@_shape(mean=(0, 0), variance=(3, 3), sigma=0.1)
def _rings(n: int, rng: np.random.Generator) -> np.ndarray:
    """Three concentric circles, all equally dense along their length."""
    radius = np.array([1, 2, 2, 3, 3, 3])[rng.integers(6, size=n)]
    return _polar(radius, rng.uniform(0, 2 * pi, n))


# Blades of standard deviations 0.3 along and 0.1 across, centred at radius 1; unchanged by a fifth of a turn.
# Bending keeps |s|, so E[|s|^2] = 1 + 0.3^2 + 0.1^2.
@_shape(mean=(0, 0), variance=(0.55, 0.55), sigma=0.0)
def _pinwheel(n: int, rng: np.random.Generator) -> np.ndarray:
    """Five Gaussian blades, bent the more the further out (Johnson et al. 2016)."""
    along = 1 + 0.3 * rng.standard_normal(n)
    across = 0.1 * rng.standard_normal(n)
    angle = rng.integers(5, size=n) * (2 * pi / 5) + np.exp(along) / 4
    cos, sin = np.cos(angle), np.sin(angle)
    return _xy(cos * along - sin * across, sin * along + cos * across)


# E[sin^6] = 5/16; and y is a Fourier series: its mean is 0, its variance half the sum of the squared
# coefficients.
@_shape(mean=(0, 0), variance=(16**2 * 5 / 16, (13**2 + 5**2 + 2**2 + 1) / 2), sigma=0.7)
def _heart(n: int, rng: np.random.Generator) -> np.ndarray:
    """A heart."""
    t = rng.uniform(0, 2 * pi, n)
    return _xy(16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))


SHAPES: tuple[str, ...] = tuple(_REGISTRY)
"""The names `sample` knows, in the order in which this file introduces them."""
