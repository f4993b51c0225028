"""tinydiff.testing.assert_frechet_distance: what is right passes, and a mistake is called by its name."""

import sys
from functools import partial

import numpy as np
import pytest
from mistakes import refusal
from scipy.linalg import eigh, sqrtm, svd

from tinydiff import metrics, testing
from tinydiff.testing import _frechet


def root(S):
    return sqrtm(S).real


def frechet(  # Dowson & Landau 1982, with these parts
    a,
    b,
    moments=lambda x: (np.mean(x, axis=0), np.cov(x.T)),
    of_means=lambda apart: apart @ apart,
    of_root=np.trace,
    shared=lambda S_a, S_b: root(S_a @ S_b),
    twice=2,
):
    (m_a, S_a), (m_b, S_b) = moments(np.array(a)), moments(np.array(b))
    return of_means(m_a - m_b) + np.trace(S_a + S_b) - twice * of_root(shared(S_a, S_b))


def but(**parts):
    return lambda a, b: frechet(a, b, **parts)


def with_covariances(of):
    return but(moments=lambda x: (np.mean(x, axis=0), of(x)))


def root_of_each_number(S_a, S_b):
    with np.errstate(invalid="ignore"):
        return np.sqrt(S_a @ S_b)


def by_svd(S_a, S_b):
    u, s, v = svd(S_a @ S_b)
    return u @ np.diag(np.sqrt(s)) @ v


def newton_schulz(S_a, S_b):
    product = S_a @ S_b
    size = np.sqrt(np.sum(product**2))
    y, z = product / size, np.eye(len(product))
    while np.sqrt(np.sum((product - size * y @ y) ** 2)) > 1e-5 * size:
        y, z = 1.5 * y - y @ z @ y / 2, 1.5 * z - z @ y @ z / 2
    return np.sqrt(size) * y


def of_batches(rest, a, b, size):
    batches = [(a[i : i + size], b[i : i + size]) for i in range(0, len(a), size)]
    if len(a) % size and not rest:
        batches = batches[:-1]
    return np.mean([metrics.frechet_distance(*pair) for pair in batches]) if batches else np.nan


def without_the_last(a, b, size):
    n = len(a) - len(a) % size
    return frechet(a[:n], b[:n]) if n else np.nan


def of_tf_gan(S_a, S_b):
    def partly(S):
        eigenvalues, V = eigh(S)
        return V @ np.diag([x if x < 1e-10 else x**0.5 for x in np.maximum(eigenvalues, 0)]) @ V.T

    A = root(S_a)
    return partly(A @ S_b @ A)


def lengths(x):
    return np.sqrt(np.sum(x**2, axis=1))[:, None]


PLANTED = {
    "its root, the 2-Wasserstein distance": lambda a, b: frechet(a, b) ** 0.5,
    "S_a S_b taken for symmetric: eigvalsh for eigvals": but(
        shared=lambda S_a, S_b: eigh(S_a @ S_b, lower=True)[0],
        of_root=lambda eigenvalues: np.sum(np.sqrt(eigenvalues[eigenvalues > 0])),
    ),
    "the singular values of S_a S_b for its eigenvalues": but(
        shared=lambda S_a, S_b: svd(S_a @ S_b, compute_uv=False), of_root=lambda s: np.sum(s**0.5)
    ),
    "S_a S_b taken for symmetric: its root is U s^(1/2) V' by a singular value decomposition": but(
        shared=by_svd
    ),
    "a root by Newton and Schulz that stops at 1e-5 (E.25)": but(shared=newton_schulz),
    "the root of each number of S_a S_b, not of the matrix": but(shared=root_of_each_number),
    "the root of S_a times that of S_b, not the root of S_a S_b": but(
        shared=lambda S_a, S_b: root(S_a) @ root(S_b)
    ),
    "the root of the trace, not the trace of the root": but(
        shared=lambda S_a, S_b: S_a @ S_b, of_root=lambda S: np.trace(S) ** 0.5
    ),
    "S_a S_b without its root": but(shared=np.matmul),
    "the root's trace once, not twice": but(twice=1),
    "the root's trace left out": but(twice=0),
    "the root's trace added, not subtracted": but(twice=-2),
    "eigenvalues below 1e-10 without their root, as in TF-GAN": but(shared=of_tf_gan),
    "1e-6 added to the variances within the root": but(
        shared=lambda S_a, S_b: root((S_a + 1e-6 * np.eye(len(S_a))) @ (S_b + 1e-6 * np.eye(len(S_b))))
    ),
    "the variances alone, as if nothing were correlated": lambda a, b: np.sum(
        (np.mean(a, axis=0) - np.mean(b, axis=0)) ** 2
        + (np.std(a, axis=0, ddof=1) - np.std(b, axis=0, ddof=1)) ** 2
    ),
    "correlations for covariances": with_covariances(lambda x: np.corrcoef(x.T)),
    "rows taken for variables: covariances of samples": with_covariances(np.cov),
    "covariances divided by n, not by n - 1": with_covariances(lambda x: np.cov(x.T, ddof=0)),
    "covariances divided by nothing": with_covariances(lambda x: np.cov(x.T) * (len(x) - 1)),
    "covariances of features that are not centred": with_covariances(lambda x: x.T @ x / (len(x) - 1)),
    "covariances of features that are not centred, divided by n": with_covariances(
        lambda x: np.mean(x[:, :, None] * x[:, None, :], axis=0)
    ),
    "1e-6 added to the variances": with_covariances(lambda x: np.cov(x.T) + np.diag([1e-6] * x.shape[1])),
    "the distance of the means without its square": but(of_means=lambda apart: (apart @ apart) ** 0.5),
    "the mean of the squares between the means, not their sum": but(of_means=lambda apart: np.mean(apart**2)),
    "the means left out": but(of_means=lambda apart: 0),
    "the means alone": lambda a, b: np.sum((a.mean(0) - b.mean(0)) ** 2),
    "features divided by their length": lambda a, b: frechet(a / lengths(a), b / lengths(b)),
}


@pytest.mark.parametrize("yours", [metrics.frechet_distance, frechet], ids=["ours", "by sqrtm"])
def test_what_is_right_passes(yours):
    testing.assert_frechet_distance(yours)


@pytest.mark.parametrize("what", PLANTED)
def test_a_mistake_is_named(what):
    said = refusal(testing.assert_frechet_distance, PLANTED[what])
    assert said.endswith(f"It is what comes of this: {what}."), said


BATCHED = {
    "the mean of the distances of batches": partial(of_batches, False),
    "the mean of the distances of batches, the rest among them": partial(of_batches, True),
    "a last batch that is not full is left out": without_the_last,
}


@pytest.mark.parametrize("size", [4, 12, 25, 100, 256, 400])
@pytest.mark.parametrize("what", BATCHED)
def test_a_mistake_of_batches_is_named(what, size):
    said = refusal(testing.assert_frechet_distance, partial(BATCHED[what], size=size))
    assert f" of this: {what}" in said


def test_every_mistake_is_planted():
    assert PLANTED.keys() == _frechet._mistakes().keys()
    assert BATCHED.keys() == _frechet._mistakes_of_batches().keys()


def test_digits_that_are_lost_are_called_so():
    def in_float32(a, b):
        S_a, S_b = (np.cov(x.T, dtype=np.float32) for x in (a, b))
        roots = np.sqrt(np.linalg.eigvals(S_a @ S_b).astype(complex)).real
        return np.sum((np.mean(a, 0) - np.mean(b, 0)) ** 2) + np.trace(S_a + S_b) - 2 * np.sum(roots)

    said = refusal(testing.assert_frechet_distance, in_float32, asarray=np.float32)
    assert said.endswith(_frechet.LOST)
    assert _frechet.LOST not in refusal(testing.assert_frechet_distance, lambda a, b: 1.01 * frechet(a, b))


@pytest.mark.parametrize("which", [*_frechet._pairs()])
def test_one_pair_is_enough_and_the_tolerance_is_what_it_says(which):
    sets = _frechet._pairs()[which]

    def yours(a, b, factor):
        hit = a.shape == sets[0].shape and b.shape == sets[1].shape and np.array_equal(a, sets[0])
        return metrics.frechet_distance(a, b) * (factor if hit else 1)

    testing.assert_frechet_distance(lambda a, b: yours(a, b, 1 + 0.9e-5))
    said = refusal(testing.assert_frechet_distance, lambda a, b: yours(a, b, 1 + 1.1e-5))
    assert f" for {which}, where " in said and " for 1 of " in said
    testing.assert_frechet_distance(lambda a, b: yours(a, b, 1.09), tolerance=0.1)


def test_sets_of_other_lengths_are_asked_about_once_all_else_is_right():
    said = refusal(
        testing.assert_frechet_distance, lambda a, b: metrics.frechet_distance(a[: len(b)], b[: len(a)])
    )
    assert _frechet.UNEQUAL in said and said.endswith("\nIt is right for sets of one length.")


def test_sets_of_other_lengths_may_be_refused():
    def yours(a, b):
        assert a.shape == b.shape, "as many of each"
        return metrics.frechet_distance(a, b)

    testing.assert_frechet_distance(yours)
    odd = lambda a, b: metrics.frechet_distance(a, b) if len(a) == len(b) else np.zeros(3)  # noqa: E731
    assert "has shape (3,); expected one number." in refusal(testing.assert_frechet_distance, odd)


def test_an_error_says_for_which_features_it_came():
    def yours(a, b):
        np.linalg.inv(np.cov(a.T)) if len(a) > a.shape[1] else np.linalg.cholesky(np.cov(a.T))
        return frechet(a, b)

    with pytest.raises(np.linalg.LinAlgError) as caught:
        testing.assert_frechet_distance(yours)
    if sys.version_info >= (3, 11):
        assert (
            "called it as frechet_distance(a, b), for 43 samples of 64 features." in caught.value.__notes__[0]
        )


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda a, b: None, "frechet_distance is a NoneType"),
        (lambda a, b: np.ones(2), "frechet_distance has shape (2,); expected one number."),
        (lambda a, b: np.nan, "frechet_distance is nan for 499 samples of 8 features"),
        (
            lambda a, b: frechet(a.__isub__(2.0), b.__isub__(2.0)),
            "frechet_distance writes into the features a that it is given",
        ),
    ],
)
def test_what_is_no_distance_is_said(yours, said):
    assert refusal(testing.assert_frechet_distance, yours).startswith(said)


def test_a_distance_may_come_as_an_array_of_one():
    testing.assert_frechet_distance(lambda a, b: np.array([[metrics.frechet_distance(a, b)]]))


def test_the_tolerance_is_checked():
    with pytest.raises(ValueError, match=r"^tolerance is 0; expected a positive number"):
        testing.assert_frechet_distance(frechet, tolerance=0)
