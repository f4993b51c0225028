"""Whether a Fréchet distance of two sets of features is theirs.

The sets hide nothing: their features are correlated and not centred, and their covariances do not commute.
Some have features of very different sizes, where a root needs all its digits, or fewer samples than features,
where no covariance has an inverse; and, once all that is right, there are two sets of different lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from tinydiff import metrics
from tinydiff.testing._asked import Function, answer_of, check_tolerance
from tinydiff.testing._judge import distance, named

__all__ = ["assert_frechet_distance"]

Pairs: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]

ALIKE = "499 samples of 8 features of much the same size"
UNEQUAL = "499 samples and 307 of 8 features"
BATCHES = sorted({*range(2, 65), *range(72, 257, 8), *range(75, 401, 25)})  # sizes that are usual
LOST = (
    " It is right where features have much the same size, so digits may be lost: by float32, or by a root "
    "that stops too soon (E.25)."
)


def assert_frechet_distance(
    frechet_distance: Function, *, asarray: Function = np.asarray, tolerance: float = 1e-5
) -> None:
    """Raise unless ``frechet_distance(a, b)`` is that of two sets of features (docs: E.25).

    Parameters
    ----------
    frechet_distance : callable
        Takes features (n, D) and (m, D), and returns the squared distance of Gaussians with their means and
        covariances, divided by n - 1: `metrics.frechet_distance`, and the last part of a FID. If yours takes
        means and covariances, give ``lambda a, b: yours(mean(a), cov(a), mean(b), cov(b))``. It may refuse
        n ≠ m by an error.
    asarray : callable
        As in `assert_q_sample`.
    tolerance : float
        The largest difference that passes, relative to the distance.

    Raises
    ------
    AssertionError
        If it is something else. The message says how far off it is and for which features, and names the
        mistake that gives it, if it is known here; also if the function writes into the features.
    ValueError
        If `tolerance` is not a positive number.
    """
    check_tolerance(tolerance)
    pairs = _pairs()
    unequal = {UNEQUAL: pairs.pop(UNEQUAL)}

    def asked(yours: Function, some: Pairs) -> np.ndarray:
        return np.array(
            [number(yours, what, {"features a": a, "features b": b}) for what, (a, b) in some.items()]
        )

    def number(yours: Function, what: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        when = f", for {what}"
        return answer_of(yours, "frechet_distance(a, b)", given, asarray, (), "one number", when=when)

    def or_refuses(a: Any, b: Any) -> Any:
        try:
            return frechet_distance(a, b)
        except Exception as error:
            raise Refused from error

    came, right = asked(frechet_distance, pairs), _right(pairs)
    said = _said(pairs, came, right, tolerance)
    if said:
        raise AssertionError(f"{said}\n{_known(pairs, came, right, tolerance)}")
    try:
        said = _said(unequal, asked(or_refuses, unequal), _right(unequal), tolerance)
    except Refused:  # which misleads nobody
        return
    if said:
        raise AssertionError(f"{said}\nIt is right for sets of one length.")


class Refused(Exception):
    """An error of a function that is asked about sets of different lengths."""


def _right(pairs: Pairs) -> np.ndarray:
    return np.array([metrics.frechet_distance(*pair) for pair in pairs.values()])


def _said(pairs: Pairs, came: np.ndarray, right: np.ndarray, tolerance: float) -> str:
    """How far what came is off; nothing if it is right."""
    off = distance(came, right, right)
    if np.max(off) <= tolerance:
        return ""
    k = int(np.argmax(off))
    return (
        f"frechet_distance is {came[k]:.6g} for {list(pairs)[k]}, where {right[k]:.6g} is right; off by more "
        f"than {tolerance:.3g} of it for {np.count_nonzero(off > tolerance)} of {len(off)} pairs of sets. "
        "Expected |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)."
    )


def _known(pairs: Pairs, came: np.ndarray, right: np.ndarray, tolerance: float) -> str:
    """Which mistake gives the distances that came."""

    def apart(wrong: Function, some: Pairs = pairs) -> float:
        """How far it is from the first distances that came."""
        with np.errstate(all="ignore"):
            others = np.array([wrong(*pair) for pair in some.values()])
        return float(np.max(distance(came[: len(some)], others, right[: len(some)])))

    first = {ALIKE: pairs[ALIKE]}
    distances = {what: apart(wrong) for what, wrong in _mistakes().items()}
    for what, wrong in _mistakes_of_batches().items():
        of_first = [apart(partial(wrong, size), first) for size in BATCHES]
        near = [size for size, far in zip(BATCHES, of_first, strict=True) if far <= min(of_first) + tolerance]
        distances[what] = min(apart(partial(wrong, size)) for size in near)
    off = distance(came, right, right)
    return named(distances, float(np.max(off)), tolerance, LOST if off[0] <= 1e-3 else "")


def _pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two sets of features each, and what is special about them."""
    rng = np.random.default_rng(5)

    def near(n: int, m: int, deviations: np.ndarray, apart: float) -> tuple[np.ndarray, np.ndarray]:
        """Near each other, as samples are to data, with covariances that do not commute."""
        D = len(deviations)
        mix = deviations[:, None] * np.linalg.qr(rng.standard_normal((D, D)))[0]
        other = mix @ (np.eye(D) + apart * rng.standard_normal((D, D)) / np.sqrt(D))
        a, b = rng.standard_normal((n, D)) @ mix, rng.standard_normal((m, D)) @ other
        return a + 2.0, b + 2.0 + 0.1 * apart

    return {
        ALIKE: near(499, 499, np.linspace(1, 0.5, 8), 0.5),
        "499 samples of 64 features of very different sizes": near(499, 499, np.arange(1, 65) ** -2.0, 0.1),
        "43 samples of 64 features": near(43, 43, np.ones(64), 0.5),
        UNEQUAL: near(499, 307, np.linspace(1, 0.5, 8), 0.5),
    }


# Distances that are none: of the parts of the right one, with one of them wrong


def _roots(numbers: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(numbers.real, 0.0))


def _overlap(S_a: np.ndarray, S_b: np.ndarray, roots: Function = _roots) -> float:
    """The trace of the root of S_a S_b."""
    return float(np.sum(roots(np.linalg.eigvals(S_a @ S_b))))


def _distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    covariance: Function = lambda x: np.cov(x, rowvar=False),
    overlap: Function = _overlap,
    of_means: Function = lambda apart: np.sum(apart**2),
) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 overlap(S_a, S_b)."""
    S_a, S_b = covariance(a), covariance(b)
    of_both = of_means(np.mean(a, 0) - np.mean(b, 0)) + np.trace(S_a) + np.trace(S_b)
    return float(of_both - 2 * overlap(S_a, S_b))


def _root(S: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix."""
    eigenvalues, vectors = np.linalg.eigh(S)
    return (vectors * _roots(eigenvalues)) @ vectors.T


def _stopped(product: np.ndarray) -> float:
    """The trace of the root by Newton and Schulz's iteration, once its square is right to 1e-5."""
    size, one = np.linalg.norm(product), np.eye(len(product))
    y, z = product / size, one
    for _ in range(100):
        step = (3 * one - z @ y) / 2
        y, z = y @ step, step @ z
        if np.linalg.norm(y @ y - product / size) <= 1e-5:
            break
    return float(np.sqrt(size) * np.trace(y))


def _by_singular_values(product: np.ndarray) -> float:
    u, s, v = np.linalg.svd(product)
    return float(np.trace((u * np.sqrt(s)) @ v))


def _mistakes() -> dict[str, Function]:
    """What is mistaken for the distance of two sets."""
    right = metrics.frechet_distance

    def but(**part: Any) -> Function:
        return partial(_distance, **part)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return {
        "its root, the 2-Wasserstein distance": lambda a, b: np.sqrt(right(a, b)),
        "S_a S_b taken for symmetric: eigvalsh for eigvals": but(
            overlap=lambda S_a, S_b: np.sum(_roots(np.linalg.eigvalsh(S_a @ S_b)))
        ),
        "the singular values of S_a S_b for its eigenvalues": but(
            overlap=lambda S_a, S_b: np.sum(np.sqrt(np.linalg.svdvals(S_a @ S_b)))
        ),
        "S_a S_b taken for symmetric: its root is U s^(1/2) V' by a singular value decomposition": but(
            overlap=lambda S_a, S_b: _by_singular_values(S_a @ S_b)
        ),
        "a root by Newton and Schulz that stops at 1e-5 (E.25)": but(
            overlap=lambda S_a, S_b: _stopped(S_a @ S_b)
        ),
        "the root of each number of S_a S_b, not of the matrix": but(
            overlap=lambda S_a, S_b: np.sum(np.sqrt(np.diag(S_a @ S_b)))
        ),
        "the root of S_a times that of S_b, not the root of S_a S_b": but(
            overlap=lambda S_a, S_b: np.trace(_root(S_a) @ _root(S_b))
        ),
        "the root of the trace, not the trace of the root": but(
            overlap=lambda S_a, S_b: np.sqrt(np.trace(S_a @ S_b))
        ),
        "S_a S_b without its root": but(overlap=lambda S_a, S_b: np.trace(S_a @ S_b)),
        "the root's trace once, not twice": but(overlap=lambda S_a, S_b: _overlap(S_a, S_b) / 2),
        "the root's trace left out": but(overlap=lambda S_a, S_b: 0.0),
        "the root's trace added, not subtracted": but(overlap=lambda S_a, S_b: -_overlap(S_a, S_b)),
        "eigenvalues below 1e-10 without their root, as in TF-GAN": but(
            overlap=lambda S_a, S_b: _overlap(
                S_a, S_b, lambda x: np.where(x.real < 1e-10, np.maximum(x.real, 0.0), _roots(x))
            )
        ),
        "1e-6 added to the variances within the root": but(
            overlap=lambda S_a, S_b: _overlap(*(S + 1e-6 * np.eye(len(S)) for S in (S_a, S_b)))
        ),
        "the variances alone, as if nothing were correlated": but(
            covariance=lambda x: np.diag(np.var(x, axis=0, ddof=1))
        ),
        "correlations for covariances": but(covariance=lambda x: np.corrcoef(x, rowvar=False)),
        "rows taken for variables: covariances of samples": but(covariance=np.cov),
        "covariances divided by n, not by n - 1": but(
            covariance=lambda x: np.cov(x, rowvar=False, bias=True)
        ),
        "covariances divided by nothing": but(covariance=lambda x: (len(x) - 1) * np.cov(x, rowvar=False)),
        "covariances of features that are not centred": but(covariance=lambda x: x.T @ x / (len(x) - 1)),
        "covariances of features that are not centred, divided by n": but(
            covariance=lambda x: x.T @ x / len(x)
        ),
        "1e-6 added to the variances": but(
            covariance=lambda x: np.cov(x, rowvar=False) + 1e-6 * np.eye(x.shape[1])
        ),
        "the distance of the means without its square": but(of_means=np.linalg.norm),
        "the mean of the squares between the means, not their sum": but(
            of_means=lambda apart: np.mean(apart**2)
        ),
        "the means left out": but(of_means=lambda apart: 0.0),
        "the means alone": lambda a, b: np.sum((np.mean(a, axis=0) - np.mean(b, axis=0)) ** 2),
        "features divided by their length": lambda a, b: right(unit(a), unit(b)),
    }


def _mistakes_of_batches() -> dict[str, Function]:
    """The same, of (size, a, b), for batches of one size or another."""

    def mean(ends: Function) -> Function:
        def distance(size: int, a: np.ndarray, b: np.ndarray) -> float:
            batches = [(a[end - size : end], b[end - size : end]) for end in ends(size, len(a))]
            if not batches or len(batches[-1][0]) < 2:  # one sample has no covariance
                return np.nan
            return float(np.mean([metrics.frechet_distance(*batch) for batch in batches]))

        return distance

    def of_full_ones(size: int, a: np.ndarray, b: np.ndarray) -> float:
        n = len(a) // size * size
        return metrics.frechet_distance(a[:n], b[:n]) if n else np.nan

    return {
        "the mean of the distances of batches": mean(lambda size, n: range(size, n + 1, size)),
        "the mean of the distances of batches, the rest among them": mean(
            lambda size, n: range(size, n + size, size)
        ),
        "a last batch that is not full is left out": of_full_ones,
    }
