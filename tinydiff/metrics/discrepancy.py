"""Maximum mean discrepancy, energy distance, and whether either is more than chance.

Both are one formula. For a symmetric k, and x, x' independent draws of one density, y, y' of another ::

    D = E k(x, x') + E k(y, y') - 2 E k(x, y)

is the squared maximum mean discrepancy for the kernel k(x, y) = exp(-|x - y|^2 / (2 h^2)) (Gretton et al.
2012, eq. 1 and lemma 6), and the energy distance for k(x, y) = -|x - y| (Székely & Rizzo 2013; Sejdinovic et
al. 2013). Either is 0 if and only if the densities are the same. Expectations become means over all pairs of
*different* points (a U-statistic: Gretton et al., eq. 3): unbiased, hence below 0 about half of the time when
the densities are equal.

The permutation test asks how often a random division of all points into sets of the same two sizes gives
at least the D observed. With a the 0/1 indicator of the first set and K the matrix of k without its
diagonal, the three sums that D needs are a'Ka, a'K1 - a'Ka and 1'K1 - 2 a'K1 + a'Ka: one product of matrices
for all permutations together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tinydiff._checks import check_choice, check_counts, check_number, check_rng
from tinydiff.metrics._checks import two_sets

__all__ = ["PermutationResult", "energy_distance", "mmd_squared", "permutation_test"]

BATCH = 256  # permutations per product of matrices


@dataclass(frozen=True, eq=False)
class PermutationResult:
    """What a permutation test found.

    Attributes
    ----------
    statistic : float
        The discrepancy of the two sets.
    p_value : float
        The share of divisions, the observed one among them, that are at least as discrepant. Where the two
        densities are the same, it is at most alpha with probability at most alpha, whatever alpha.
    null : ndarray of shape (permutations,)
        The discrepancies of the random divisions.
    """

    statistic: float
    p_value: float
    null: np.ndarray = field(repr=False)


def mmd_squared(x: np.ndarray, y: np.ndarray, *, bandwidth: float | None = None) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3).

    Parameters
    ----------
    x, y : array of shape (n, D) and (m, D)
        Two sets of points on the host, n, m ≥ 2. Memory grows with (n + m)^2: 32 bytes for each pair.
    bandwidth : float, optional
        h > 0 of k(x, y) = exp(-|x - y|^2 / (2 h^2)). Default: the median distance between two of all
        n + m points (the "median heuristic"), pairs that coincide left out. That is as wide as the cloud: it
        sees where the points lie and how far they spread, but hardly anything finer.

    Returns
    -------
    float
        May be below 0: it is unbiased.

    Raises
    ------
    ValueError
        If a shape does not fit, there are fewer than two points in a set, a value is masked, complex or not
        finite, or the bandwidth is not positive.
    """
    x, y = two_sets(x=x, y=y)
    return float(_discrepancies(_gaussian(_distances(x, y), bandwidth), _first(x, y), len(x))[0])


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of the energy distance 2 E|x - y| - E|x - x'| - E|y - y'| (Székely & Rizzo 2013).

    On the line it is twice the integral of the squared difference of the distribution functions. (SciPy's
    ``energy_distance`` is the root of that for the empirical distributions, pairs of a point with itself
    included: never below 0, and biased.)

    Parameters
    ----------
    x, y : array of shape (n, D) and (m, D)
        Two sets of points on the host, n, m ≥ 2. Memory grows with (n + m)^2: 12 bytes for each pair.

    Returns
    -------
    float
        In the points' units. May be below 0: it is unbiased.

    Raises
    ------
    ValueError
        If a shape does not fit, there are fewer than two points in a set, or a value is masked, complex or
        not finite.
    """
    x, y = two_sets(x=x, y=y)
    return float(_discrepancies(-_distances(x, y), _first(x, y), len(x))[0])


def permutation_test(
    x: np.ndarray,
    y: np.ndarray,
    *,
    statistic: str = "mmd",
    permutations: int = 999,
    bandwidth: float | None = None,
    rng: np.random.Generator | None = None,
) -> PermutationResult:
    """Test whether two sets are of one density by permutations (Phipson & Smyth 2010).

    Parameters
    ----------
    x, y : array of shape (n, D) and (m, D)
        Two sets of points on the host, n, m ≥ 2, each of independent draws.
    statistic : {"mmd", "energy"}
        Which discrepancy.
    permutations : int
        Random divisions. The smallest p-value is 1 / (permutations + 1).
    bandwidth : float, optional
        As in `mmd_squared`, whose default depends on the points but not on their division, so that the
        test is exact.
    rng : numpy.random.Generator, optional
        Draws the divisions. Default: seed 0.

    Returns
    -------
    PermutationResult

    Raises
    ------
    ValueError
        As in `mmd_squared`; or if `statistic` is unknown, there is a bandwidth without a kernel, or
        `permutations` is not an integer of at least 1.
    TypeError
        If `rng` is not a generator.
    """
    check_choice("statistic", statistic, ("mmd", "energy"))
    if statistic == "energy" and bandwidth is not None:
        raise ValueError(f"bandwidth is {bandwidth}; expected None, the energy distance has no kernel.")
    check_counts(permutations=permutations)
    x, y = two_sets(x=x, y=y)
    rng = np.random.default_rng(0) if rng is None else rng
    check_rng(rng)
    distances = _distances(x, y)
    K = _gaussian(distances, bandwidth) if statistic == "mmd" else -distances
    observed = _first(x, y)
    value = float(_discrepancies(K, observed, len(x))[0])
    null = np.empty(permutations)
    for i in range(0, permutations, BATCH):
        count = min(BATCH, permutations - i)
        null[i : i + count] = _discrepancies(K, rng.permuted(np.repeat(observed, count, 0), axis=1), len(x))
    # Divisions that are equally discrepant, such as the observed one itself, differ by rounding.
    rounding = 1e-12 * np.max(np.abs(K))
    p_value = (1 + np.count_nonzero(null >= value - rounding)) / (1 + permutations)
    return PermutationResult(value, float(p_value), null)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|z_i - z_j| for all points z, those of x before those of y, (n + m, n + m)."""
    from scipy.spatial.distance import pdist, squareform

    return squareform(pdist(np.concat([x, y])))


def _gaussian(distances: np.ndarray, bandwidth: float | None) -> np.ndarray:
    """The kernel's matrix, with a diagonal of 0."""
    if bandwidth is None:
        apart = distances[distances > 0]
        bandwidth = float(np.median(apart)) if apart.size else 1.0  # all points coincide: any kernel says so
    check_number("bandwidth", bandwidth, lambda h: 0 < h < np.inf, "a positive number")
    K = np.exp(-0.5 * (distances / bandwidth) ** 2)
    np.fill_diagonal(K, 0.0)
    return K


def _first(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the points are x's, as one division (1, n + m) of 0 and 1."""
    return np.concat([np.ones(len(x)), np.zeros(len(y))])[np.newaxis]


def _discrepancies(K: np.ndarray, divisions: np.ndarray, n: int) -> np.ndarray:
    """D of each row of `divisions` (P, n + m), with n ones each, for K with a diagonal of 0."""
    m = len(K) - n
    within = np.sum(divisions @ K * divisions, axis=1)
    from_first = divisions @ np.sum(K, axis=1)
    across = from_first - within
    rest = np.sum(K) - 2.0 * from_first + within
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2.0 * across / (n * m)
