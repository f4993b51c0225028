"""The Fréchet distance between two sets of features, each taken for a Gaussian.

Between Gaussians the squared 2-Wasserstein distance is, with means mu and covariances S (Dowson & Landau
1982; the "FID" of Heusel et al. 2017 when the features are an Inception network's) ::

    d^2 = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^(1/2) S_b S_a^(1/2))^(1/2)

The last trace needs no square root of a matrix. For any factors S_a = R_a' R_a, S_b = R_b' R_b it is the sum
of the singular values of R_a R_b': the eigenvalues of S_a S_b = R_a' (R_a R_b') R_b are those of
(R_a R_b') (R_a R_b')', and the trace is the sum of their roots. A factor comes from the centred features
themselves by a QR decomposition, so that no covariance is formed and none need have full rank: fewer samples
than features, or features that are constant, lose no digits.
"""

from __future__ import annotations

import math

import numpy as np

from tinydiff.metrics._checks import two_sets

__all__ = ["frechet_distance"]


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance between the Gaussians with the two sets' means and covariances.

    Covariances are the unbiased ones (divided by n - 1). The distance itself is biased upwards, the more the
    fewer the samples: compare only numbers from equally many.

    Parameters
    ----------
    features_a, features_b : array of shape (n, D) and (m, D)
        On the host; n, m ≥ 2, not necessarily as many as D.

    Returns
    -------
    float
        d^2, in the units of the features squared; at least 0.

    Raises
    ------
    ValueError
        If a shape does not fit, there are fewer than two samples in a set, or a value is masked, complex or
        not finite.
    """
    a, b = two_sets(features_a=features_a, features_b=features_b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    R_a, R_b = (np.asarray(np.linalg.qr(x, mode="r")) for x in (a, b))
    spread = np.sum(a * a) + np.sum(b * b) - 2.0 * np.sum(np.linalg.svdvals(R_a @ R_b.T))
    return float(np.sum((mean_a - mean_b) ** 2) + max(0.0, spread))  # rounding may fall below 0
