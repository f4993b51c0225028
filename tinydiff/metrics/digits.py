"""How far generated digits are from MNIST's: what a small classifier sees, and the nearest copies.

The classifier is made of tinydiff's own layers and travels with the package;
``tools/train_digit_classifier.py`` trained it on MNIST's 60,000 training digits. Its features, the means over
pixels that its last layer sees, take the place that an Inception network's have in the FID: the numbers can
be compared with each other, but with no published FID.

Four questions, since no one number answers all of them: are the digits distributed as MNIST's are (Fréchet
distance), is each one legible (confidence), are all ten there (class shares), and are they new (distance to
the nearest training digit)? `digit_report` answers each for samples and for real held-out digits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff._checks import check_rng, check_unmasked
from tinydiff.checkpoint import load_arrays
from tinydiff.metrics._checks import finite_numbers
from tinydiff.metrics.frechet import frechet_distance
from tinydiff.models.classifier import Classifier

__all__ = [
    "WEIGHTS",
    "class_shares",
    "digit_classifier",
    "digit_features",
    "digit_frechet_distance",
    "digit_probabilities",
    "digit_report",
    "nearest_distances",
]

WEIGHTS = Path(__file__).parent / "digit_classifier.safetensors"

BATCH = 500  # images through the classifier together
BLOCK = 10_000  # training digits compared with a batch together
TOO_NEAR = 0.01  # the quantile of real digits' nearest distances below which a sample looks like a copy


@functools.cache
def digit_classifier() -> Classifier:
    """Return the shipped classifier, on the host; its weights are read once.

    Returns
    -------
    Classifier
        From (N, 28, 28, 1) images in [-1, 1] to ten logits; one object for all, not to be trained.
    """
    arrays, metadata = load_arrays(WEIGHTS)
    model = Classifier(**metadata["config"], backend="numpy")
    model.load_state_dict(arrays)
    return model


def digit_features(images: np.ndarray) -> np.ndarray:
    """Return what the classifier's last layer sees.

    Parameters
    ----------
    images : array of float, shape (N, 28, 28, 1)
        Digits in [-1, 1], on the host.

    Returns
    -------
    ndarray of float32, shape (N, 64)

    Raises
    ------
    TypeError
        If the images are not of a floating dtype.
    ValueError
        If their shape does not fit, there is none, or a value is masked or outside [-1, 1].
    """
    images = _images("images", images)
    model = digit_classifier()
    return np.concat([model.features(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def digit_probabilities(images: np.ndarray) -> np.ndarray:
    """Return the classifier's probability of each class.

    Parameters
    ----------
    images : array of float, shape (N, 28, 28, 1)
        Digits in [-1, 1], on the host.

    Returns
    -------
    ndarray of float64, shape (N, 10)
        Rows sum to 1.

    Raises
    ------
    TypeError, ValueError
        As `digit_features`.
    """
    return _probabilities(digit_features(images))


def digit_frechet_distance(samples: np.ndarray, data: np.ndarray) -> float:
    """Fréchet distance between two sets of digits in the classifier's feature space.

    It falls as either set grows: compare only numbers for equally many.

    Parameters
    ----------
    samples, data : array of float, shape (n, 28, 28, 1) and (m, 28, 28, 1)
        Digits in [-1, 1], on the host; n, m ≥ 2.

    Returns
    -------
    float
        The squared distance, as `frechet_distance` returns it.

    Raises
    ------
    TypeError, ValueError
        As `digit_features`; or if a set has fewer than two digits.
    """
    samples, data = _images("samples", samples, 2), _images("data", data, 2)
    return frechet_distance(digit_features(samples), digit_features(data))


def class_shares(probabilities: np.ndarray) -> np.ndarray:
    """Return the share of images whose most probable class is each of the K.

    Parameters
    ----------
    probabilities : array of shape (N, K)
        As `digit_probabilities` returns them.

    Returns
    -------
    ndarray of shape (K,)
        Sums to 1.

    Raises
    ------
    ValueError
        If the shape does not fit, there is no image, or a value is masked, complex or not finite.
    """
    probabilities = finite_numbers("probabilities", probabilities)
    if probabilities.ndim != 2 or probabilities.size == 0:
        raise ValueError(f"probabilities has shape {probabilities.shape}; expected (N, K), not empty.")
    predicted = np.argmax(probabilities, axis=1)
    return np.bincount(predicted, minlength=probabilities.shape[1]) / len(predicted)


def nearest_distances(images: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Return each image's Euclidean distance, over its 784 pixels, to the nearest of `data`.

    The nearest is sought in float32, by |a|^2 - 2 a.b; the distance to the one found is then taken from the
    difference itself, so that a copy is at distance 0 exactly.

    Parameters
    ----------
    images, data : array of float, shape (n, 28, 28, 1) and (m, 28, 28, 1)
        Digits in [-1, 1], on the host.

    Returns
    -------
    ndarray of float64, shape (n,)

    Raises
    ------
    TypeError, ValueError
        As `digit_features`.
    """
    # Moved so that the background is 0: smaller numbers, less rounding.
    a = _images("data", data).reshape(len(data), -1) + 1.0
    b = _images("images", images).reshape(len(images), -1) + 1.0
    a_squared = np.sum(a * a, axis=1)
    distances = np.empty(len(b))
    for i in range(0, len(b), BATCH):
        part = b[i : i + BATCH]
        smallest = np.full(len(part), np.inf, np.float32)
        nearest = np.zeros(len(part), np.int64)
        for j in range(0, len(a), BLOCK):
            score = a_squared[j : j + BLOCK] - 2.0 * (part @ a[j : j + BLOCK].T)
            best = np.argmin(score, axis=1)
            value = np.take_along_axis(score, best[:, None], axis=1)[:, 0]
            closer = value < smallest
            smallest[closer], nearest[closer] = value[closer], best[closer] + j
        distances[i : i + BATCH] = np.linalg.norm(part.astype(np.float64) - a[nearest], axis=1)
    return distances


def digit_report(
    samples: np.ndarray,
    data: np.ndarray,
    heldout: np.ndarray | None = None,
    *,
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """Judge samples, and beside them as many real digits: the floor.

    Parameters
    ----------
    samples : array of float, shape (n, 28, 28, 1)
        Generated digits in [-1, 1], on the host; n ≥ 2.
    data : array of float, shape (m, 28, 28, 1)
        The digits the generator was trained on, or some of them: a copy of a digit left out is not noticed.
    heldout : array of float, shape (k, 28, 28, 1), optional
        Real digits it was not trained on, k ≥ n, of which n are drawn. Default: n of `data`, m ≥ 2 n, are set
        aside and the others take the place of `data`. (The nearest to a sample is still sought in all of
        `data`, so that no copy goes unseen; that brings samples slightly nearer than the floor.)
    rng : numpy.random.Generator, optional
        Draws the digits of the floor. Default: seed 0.

    Returns
    -------
    dict
        ``n``, ``data`` (how many digits samples and floor are compared with), ``heldout`` ("given" or "set
        aside from data"), and under ``samples`` and ``floor`` alike: ``frechet_distance`` to the data;
        ``confidence``, the mean probability of the most probable class; ``class_shares``, the share of each
        digit; ``effective_classes``, exp of their entropy, 1 … 10; ``least_class_share``;
        ``nearest_distance`` and ``least_nearest_distance``, mean and minimum of `nearest_distances`; and
        ``share_too_near``, the share nearer to a digit of the data than 99% of the floor's digits are: for
        new digits 0.01 + 0.98 / (n + 1) on average, 0.011 of 1000 and 0.025 of 64; for copies 1. All are
        numbers that JSON can hold.

    Raises
    ------
    TypeError, ValueError
        As `digit_features`; or if there are too few digits.
    """
    samples, data = _images("samples", samples, 2), _images("data", data, 2)
    n = len(samples)
    rng = np.random.default_rng(0) if rng is None else rng
    check_rng(rng)
    if heldout is None:
        if len(data) < 2 * n:
            raise ValueError(f"data has {len(data)} digits; expected at least {2 * n}, or heldout digits.")
        order = rng.permutation(len(data))
        real, rest = data[order[:n]], data[order[n:]]
    else:
        heldout = _images("heldout", heldout)
        if len(heldout) < n:
            raise ValueError(f"heldout has {len(heldout)} digits; expected at least {n}, as many as samples.")
        real, rest = heldout[rng.permutation(len(heldout))[:n]], data
    data_features = digit_features(rest)
    nearest_of_real = nearest_distances(real, rest)
    too_near = float(np.quantile(nearest_of_real, TOO_NEAR))
    return {
        "n": n,
        "data": len(rest),
        "heldout": "set aside from data" if heldout is None else "given",
        "samples": _statistics(samples, data_features, nearest_distances(samples, data), too_near),
        "floor": _statistics(real, data_features, nearest_of_real, too_near),
    }


def _statistics(
    images: np.ndarray, data_features: np.ndarray, nearest: np.ndarray, too_near: float
) -> dict[str, Any]:
    features = digit_features(images)
    probabilities = _probabilities(features)
    shares = class_shares(probabilities)
    present = shares[shares > 0]
    return {
        "frechet_distance": frechet_distance(features, data_features),
        "confidence": float(np.mean(np.max(probabilities, axis=1))),
        "class_shares": shares.tolist(),
        "effective_classes": float(np.exp(-np.sum(present * np.log(present)))),
        "least_class_share": float(np.min(shares)),
        "nearest_distance": float(np.mean(nearest)),
        "least_nearest_distance": float(np.min(nearest)),
        "share_too_near": float(np.mean(nearest < too_near)),
    }


def _probabilities(features: np.ndarray) -> np.ndarray:
    """softmax of the classifier's last layer, in float64 so that rows sum to 1."""
    from scipy.special import softmax

    logits, _ = digit_classifier().linear(features)
    return softmax(logits.astype(np.float64), axis=1)


def _images(name: str, images: np.ndarray, least: int = 1) -> np.ndarray:
    """The images in float32, or an error that says what does not fit."""
    check_unmasked(name, images)
    images = np.asarray(images)
    if images.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {images.dtype}; expected floating-point numbers in [-1, 1].")
    if images.ndim != 4 or images.shape[1:] != (28, 28, 1) or len(images) == 0:
        raise ValueError(f"{name} has shape {images.shape}; expected (N, 28, 28, 1), not empty.")
    if len(images) < least:
        raise ValueError(f"{name} has {len(images)} digits; expected at least {least}.")
    lowest, highest = float(np.min(images)), float(np.max(images))
    if np.isnan(lowest):
        raise ValueError(f"{name} contains NaN; expected numbers in [-1, 1].")
    if not (lowest >= -1.0 and highest <= 1.0):
        raise ValueError(
            f"{name} has values from {lowest:.4g} to {highest:.4g}; expected [-1, 1]: clip samples first."
        )
    return images.astype(np.float32, copy=False)
