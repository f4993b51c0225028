"""The exact judge: data from a Gaussian mixture, for which everything is known.

If the data is a mixture, q(x_0) = sum_k pi_k N(m_k, C_k), it stays one at every step of the forward process,
with a = sqrt(abar_t) and s^2 = 1 - abar_t:

    q(x_t) = sum_k pi_k N( a m_k,  a^2 C_k + s^2 I )

and given x_t, the data is a mixture again. Component k, of weight r_k ~ pi_k N(x_t; a m_k, a^2 C_k + s^2 I),
has in the axes U of its covariance C_k = U diag(lambda) U', with y = U'(x_t - a m_k), V = a^2 lambda + s^2:

    E[x_0 | x_t, k]   = m_k + U (a lambda / V) y          Cov[x_0 | x_t, k] = U diag(lambda s^2 / V) U'
    E[eps | x_t, k]   = s U y / V                         grad log q(x_t)   = -sum_k r_k U y / V

So the best possible network, the conditional expectation of what it is to predict, is a closed form
(`GaussianMixture.denoiser`), and so is the best reverse variance. Samplers and bounds can be held against the
truth, with no network in the way.

References
----------
Ho, Jain & Abbeel 2020, *Denoising diffusion probabilistic models*.
Efron 2011, *Tweedie's formula and selection bias*.
Bao et al. 2022, *Analytic-DPM* (the best reverse variance).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff._checks import check_array, check_counts, check_rng, class_or_kind
from tinydiff.backend import Array, array_namespace, asarray_like, to_numpy
from tinydiff.bound import Bound, prior_term
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.kernels import portable

__all__ = ["GaussianMixture"]

REACH = 9.0  # of quadrature, in standard deviations: a normal has 2e-19 of its mass beyond
FINEST = 10.0  # how many times more closely a wide component may be looked at for the sake of a narrow one


class GaussianMixture:
    """sum_k weights_k N(means_k, covariances_k).

    Parameters
    ----------
    weights : array_like, shape (K,)
        Not negative, and not all zero; divided by their sum. A component of weight 0 is left out.
    means : array_like, shape (K, D)
        Centres.
    covariances : float, array_like of shape (K,), or of shape (K, D, D)
        One variance for all components and axes, one for each component, or full covariance matrices. They
        may be singular, as those of single points are; only the density does not exist then.

    Attributes
    ----------
    weights, means, covariances : ndarray, shapes (K,), (K, D), (K, D, D)
        float64 and read-only.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, a weight is negative, or a covariance is not symmetric
        and positive semidefinite.

    Notes
    -----
    In all methods, x is a floating array of shape (N, D) of any library that follows the array API standard.
    The result is of its library, device and dtype. Methods with a `diffusion` take t as it does: an integer
    array of shape (N,), or one integer. An x or a t that does not fit is a ValueError; an x that
    is not an array, or a `diffusion` that is not a `GaussianDiffusion`, is a TypeError.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        weights = _finite("weights", weights)
        means = _finite("means", means)
        if weights.ndim != 1 or weights.size == 0 or np.any(weights < 0) or not np.sum(weights) > 0:
            raise ValueError(f"weights is {weights}; expected (K,) numbers, none negative, not all 0.")
        K = weights.size
        if means.ndim != 2 or means.shape[0] != K or means.shape[1] == 0:
            raise ValueError(f"means has shape {means.shape}; expected ({K}, D), one for each weight.")
        D = means.shape[1]
        covariances = _finite("covariances", covariances)
        if covariances.shape in ((), (K,)):
            covariances = np.broadcast_to(covariances, (K,))[:, None, None] * np.eye(D)
        if covariances.shape != (K, D, D):
            raise ValueError(
                f"covariances has shape {covariances.shape}; expected (), ({K},) or ({K}, {D}, {D})."
            )
        size = np.max(np.abs(covariances), axis=(1, 2), keepdims=True)
        if np.any(np.abs(covariances - covariances.mT) > 1e-10 * size):
            raise ValueError("covariances holds a matrix that is not symmetric.")
        filled = weights > 0
        weights, means, covariances = weights[filled], means[filled], covariances[filled]
        variances, axes = np.linalg.eigh(covariances)  # lambda (K, D), U (K, D, D)
        largest = np.max(variances, axis=1, keepdims=True, initial=0)
        if np.any(variances < -1e-12 * largest):
            raise ValueError(
                f"covariances holds a matrix with the negative eigenvalue {np.min(variances):.3g}; "
                "expected positive semidefinite ones."
            )
        rounding = 4 * D * np.finfo(np.float64).eps * largest  # what eigh may find for a 0
        self._variances = np.where(variances > rounding, variances, 0.0)
        self._axes = axes
        # So that one product takes points into the axes of all components, (D, K D), or back, (K D, D).
        self._into, self._back = axes.transpose(1, 0, 2).reshape(D, -1), axes.mT.reshape(-1, D)
        self._means = means.copy()  # writable: PyTorch, which shares the memory, warns of a read-only array
        self.weights = weights / np.sum(weights)
        self.means = means
        self.covariances = covariances
        self._freeze()

    def _freeze(self) -> None:
        for table in (self.weights, self.means, self.covariances):
            table.flags.writeable = False

    @property
    def K(self) -> int:
        """Number of components."""
        return self.means.shape[0]

    @property
    def D(self) -> int:
        """Dimension of the points."""
        return self.means.shape[1]

    def __repr__(self) -> str:
        return f"GaussianMixture(K={self.K}, D={self.D})"

    # The density itself

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw n independent points.

        Parameters
        ----------
        n : int
            How many, at least 1.
        rng : numpy.random.Generator
            Where the randomness comes from.

        Returns
        -------
        ndarray of float64, shape (n, D)

        Raises
        ------
        ValueError
            If `n` is not a count.
        TypeError
            If `rng` is not a generator.
        """
        check_counts(n=n)
        check_rng(rng)
        k = rng.choice(self.K, size=n, p=self.weights)
        y = np.sqrt(self._variances[k]) * rng.standard_normal((n, self.D))
        return self.means[k] + (self._axes[k] @ y[:, :, None])[:, :, 0]

    def log_prob(self, x: Array) -> Array:
        """Log q(x), in nats.

        Parameters
        ----------
        x : array of shape (N, D)
            Points.

        Returns
        -------
        array of shape (N,)

        Raises
        ------
        ValueError
            If `x` does not fit, or a component's covariance is singular: there is no density.
        """
        self._require_density()
        log_joint, _, _ = self._components(*self._at_rest(x))
        return _logsumexp(log_joint)

    def score(self, x: Array) -> Array:
        """Grad log q(x) = -sum_k r_k C_k^{-1} (x - m_k), the score.  (docs: R.5)

        Parameters
        ----------
        x : array of shape (N, D)
            Points.

        Returns
        -------
        array of shape (N, D)

        Raises
        ------
        ValueError
            If `x` does not fit, or a component's covariance is singular: there is no density.
        """
        self._require_density()
        log_joint, y, variance = self._components(*self._at_rest(x))
        return -self._combine(portable.softmax(log_joint), y / variance)

    def entropy(self, nodes: int = 121) -> float:
        """-E log q(x), in nats: the least that a model's negative log-likelihood can be.  (docs: N.7, N.8)

        Of a single Gaussian in closed form. Otherwise, in one or two dimensions, by the trapezoid rule in
        each component's own axes, which for smooth functions converges faster than any power. It is accurate
        where no component is more than ten times narrower than another that it lies in.

        Parameters
        ----------
        nodes : int
            Of quadrature, along each axis of the narrowest component; wider ones have more.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If there is no density; or, with several components, if `nodes` is not an integer of at least 2,
            or if D > 2 (there take ``-mean(log_prob(sample(n, rng)))``).
        """
        self._require_density()
        if self.K == 1:
            return float(np.sum(np.log(2 * math.pi * math.e * self._variances)) / 2)
        x, weights = self._quadrature(nodes)
        return float(-np.sum(weights * self.log_prob(x)))

    # The mixture in a diffusion process

    def marginal(self, diffusion: GaussianDiffusion, t: int) -> GaussianMixture:
        """Return q(x_t), a mixture of the same weights.  (docs: N.4)

        Parameters
        ----------
        diffusion : GaussianDiffusion
            The forward process.
        t : int
            0 … T-1.

        Returns
        -------
        GaussianMixture

        Raises
        ------
        ValueError
            If `t` is out of range.
        """
        check_diffusion(diffusion)
        mean, variance = diffusion.q_mean_variance(np.ones((1, 1)), t)
        a, s2 = float(mean[0, 0]), float(variance[0, 0])
        # The axes stay: eigh of the new covariance would lose a variance of s2 beside large ones to rounding.
        marginal = copy.copy(self)
        marginal.means, marginal.covariances = a * self.means, a**2 * self.covariances + s2 * np.eye(self.D)
        marginal._means, marginal._variances = a * self._means, a**2 * self._variances + s2
        marginal._freeze()
        return marginal

    def posterior_mean(self, diffusion: GaussianDiffusion, x_t: Array, t: Array | int) -> Array:
        """E[x_0 | x_t], the best estimate of the data.  (docs: L.8, R.5)

        Tweedie's formula (Efron 2011): equal to (x_t + s^2 grad log q(x_t)) / a; computed without the
        division, so that a may be 0.

        Parameters
        ----------
        diffusion : GaussianDiffusion
            The forward process.
        x_t : array of shape (N, D)
            Noisy points.
        t : integer array of shape (N,), or int
            Their steps.

        Returns
        -------
        array of shape (N, D)
        """
        return self._posterior_means(diffusion, x_t, t)[0]

    def posterior_covariance(self, diffusion: GaussianDiffusion, x_t: Array, t: Array | int) -> Array:
        """Cov[x_0 | x_t]: sum_k r_k ( Cov_k + (mu_k - mu)(mu_k - mu)' ), of each point.  (docs: N.12)

        Its trace is the squared error that no network can get below.

        Parameters
        ----------
        diffusion : GaussianDiffusion
            The forward process.
        x_t : array of shape (N, D)
            Noisy points.
        t : integer array of shape (N,), or int
            Their steps.

        Returns
        -------
        array of shape (N, D, D)
        """
        x_t, a, s2 = self._at_time(diffusion, x_t, t)
        xp = array_namespace(x_t)
        log_joint, y, variance = self._components(x_t, a, s2)
        r = portable.softmax(log_joint)[:, :, None, None]
        axes, lambdas, means = (asarray_like(v, x_t) for v in (self._axes, self._variances, self._means))
        mean_k = means + xp.matmul(axes, (a[:, :, None] * lambdas / variance * y)[..., None])[..., 0]
        apart = mean_k - xp.sum(r[..., 0] * mean_k, axis=1, keepdims=True)
        within = xp.matmul(
            axes * (lambdas * s2[:, :, None] / variance)[:, :, None, :], xp.matrix_transpose(axes)
        )
        return xp.sum(r * (within + apart[..., :, None] * apart[..., None, :]), axis=1)

    def denoiser(self, diffusion: GaussianDiffusion) -> Callable[[Array, Array], Array]:
        """Return the best possible network, ``denoise(x_t, t)``.  (docs: L.8, V.2)

        It is the conditional expectation of what `diffusion` wants predicted, given x_t, which has the least
        squared error. With learned variances the second half is the nu of the best variance (Bao et al.
        2022), that of each coordinate of x_{t-1} given x_t; nu may lie outside [-1, 1]. Where that variance
        is 0, for point data at t = 0, it is the lower end, -1.

        Parameters
        ----------
        diffusion : GaussianDiffusion
            The process; `denoise` takes times of its schedule.

        Returns
        -------
        callable
            From x_t (N, D) and t (N,) to (N, D), or (N, 2 D) with learned variances.
        """
        check_diffusion(diffusion)

        def denoise(x_t: Array, t: Array) -> Array:
            x0, eps = self._posterior_means(diffusion, x_t, t)
            prediction = diffusion.training_target(x0, t, eps)  # linear in both: so is its expectation
            if diffusion.variance != "learned_range":
                return prediction
            return array_namespace(x_t).concat([prediction, self._best_nu(diffusion, x_t, t)], axis=-1)

        return denoise

    def optimal_bound(self, diffusion: GaussianDiffusion, nodes: int = 121) -> Bound:
        """The variational bound that `denoiser` attains in expectation, the least.  (docs: L.13, L.14)

        The terms are those of `tinydiff.bound`; the mean of (x_0 - x_0^)^2 given x_t is now the variance of
        x_0 given x_t, coordinate by coordinate. The mean over x_t is a closed form for a single Gaussian;
        otherwise, in one or two dimensions, it is taken by quadrature as in `entropy`.

        Parameters
        ----------
        diffusion : GaussianDiffusion
            The process, with fixed or learned variance (the best one, then).
        nodes : int
            Of quadrature, as in `entropy`.

        Returns
        -------
        Bound
            In nats, with the decoder ``"density"``; ``exact``, with no standard error.

        Raises
        ------
        ValueError
            If there are several components, and `nodes` is not an integer of at least 2, or D > 2.
        """
        denoise = self.denoiser(diffusion)
        schedule = diffusion.schedule
        L_t = np.zeros(schedule.T)
        for t in range(schedule.T):
            marginal = self.marginal(diffusion, t)
            if self.K == 1:
                x_t, weights = marginal.means, self.weights  # what follows is the same for every x_t
            else:
                x_t, weights = marginal._quadrature(nodes)
            covariance = np.diagonal(self.posterior_covariance(diffusion, x_t, t), axis1=1, axis2=2)
            log_variance = diffusion.model_log_variance(x_t, t, denoise(x_t, np.full(len(x_t), t)))
            if t == 0:
                with np.errstate(divide="ignore"):  # points: log 0 = -inf, and the ratio is 0
                    ratio = np.exp(np.log(covariance) - log_variance)
                terms = math.log(2 * math.pi) + log_variance + ratio
            else:
                c, _ = diffusion.q_posterior_mean_variance(1 + 0 * x_t, 0 * x_t, t)
                log_r = diffusion.log_variance_range[0][t] - log_variance
                terms = np.expm1(log_r) - log_r + c**2 * covariance * np.exp(-log_variance)
            L_t[t] = weights @ np.sum(terms + 0 * x_t, axis=1) / 2
        second = np.sum(np.square(self.means), axis=1) + np.sum(self._variances, axis=1)
        # The prior's term asks only for |x_0|^2, and is linear in it.
        points = np.sqrt(second / self.D)[:, None] * np.ones(self.D)
        L_T = float(self.weights @ prior_term(diffusion, points))
        value = float(L_T + np.sum(L_t))
        return Bound(value=value, standard_error=0.0, L_T=L_T, L_t=L_t, exact=True, unit="nats")

    # What the methods share

    def _at_rest(self, x: Array) -> tuple[Array, Array, Array]:
        """x with a = 1 and s^2 = 0."""
        x = self._checked("x", x)
        one = array_namespace(x).ones_like(x[:, :1])
        return x, one, 0 * one

    def _at_time(
        self, diffusion: GaussianDiffusion, x_t: Array, t: Array | int
    ) -> tuple[Array, Array, Array]:
        """x_t with a and s^2, each (N, 1)."""
        check_diffusion(diffusion)
        x_t = self._checked("x_t", x_t)
        a, s2 = diffusion.q_mean_variance(array_namespace(x_t).ones_like(x_t[:, :1]), t)
        return x_t, a, s2

    def _components(self, x: Array, a: Array, s2: Array) -> tuple[Array, Array, Array]:
        """log pi_k N(x; a m_k, V) (N, K); y in each component's axes and its variance V (N, K, D)."""
        xp = array_namespace(x)
        log_weights = asarray_like(np.log(self.weights), x)
        centres = asarray_like((self.means[:, None, :] @ self._axes)[:, 0, :], x)
        there = xp.reshape(xp.matmul(x, asarray_like(self._into, x)), (x.shape[0], self.K, self.D))
        y = there - a[:, :, None] * centres
        variance = (a * a)[:, :, None] * asarray_like(self._variances, x) + s2[:, :, None]
        log_joint = log_weights - xp.sum(y * y / variance + xp.log(2 * math.pi * variance), axis=2) / 2
        return log_joint, y, variance

    def _combine(self, r: Array, y: Array) -> Array:
        """sum_k r_k U_k y_k, from (N, K) and (N, K, D) to (N, D)."""
        xp = array_namespace(y)
        N, K, D = y.shape
        return xp.matmul(xp.reshape(r[:, :, None] * y, (N, K * D)), asarray_like(self._back, y))

    def _posterior_means(
        self, diffusion: GaussianDiffusion, x_t: Array, t: Array | int
    ) -> tuple[Array, Array]:
        """E[x_0 | x_t] and E[eps | x_t], each (N, D)."""
        x_t, a, s2 = self._at_time(diffusion, x_t, t)
        xp = array_namespace(x_t)
        log_joint, y, variance = self._components(x_t, a, s2)
        r = portable.softmax(log_joint)
        lambdas, means = asarray_like(self._variances, x_t), asarray_like(self._means, x_t)
        x0 = xp.matmul(r, means) + self._combine(r, a[:, :, None] * lambdas / variance * y)
        return x0, xp.sqrt(s2) * self._combine(r, y / variance)

    def _best_nu(self, diffusion: GaussianDiffusion, x_t: Array, t: Array) -> Array:
        """The nu whose variance is that of x_{t-1} given x_t, for each coordinate: beta~ + c^2 Cov_ii."""
        xp = array_namespace(x_t)
        covariance = self.posterior_covariance(diffusion, x_t, t)
        diagonal = xp.sum(covariance * asarray_like(np.eye(self.D), x_t), axis=2)
        c, posterior = diffusion.q_posterior_mean_variance(xp.ones_like(x_t), xp.zeros_like(x_t), t)
        variance = posterior + c * c * diagonal
        # The range is read off at nu = 0 and 1: half-way, and the upper end.
        zeros, ones = xp.zeros_like(x_t), xp.ones_like(x_t)
        middle = diffusion.model_log_variance(x_t, t, xp.concat([zeros, zeros], axis=-1))
        half = diffusion.model_log_variance(x_t, t, xp.concat([zeros, ones], axis=-1)) - middle
        known = xp.logical_and(variance > 0, half > 0)
        nu = (xp.log(xp.where(known, variance, ones)) - middle) / xp.where(known, half, ones)
        return xp.where(known, nu, xp.where(half > 0, -ones, zeros))

    def _quadrature(self, nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes (n, D) and weights (n,), so that sum(weights * f(nodes)) is E f(x)."""
        if isinstance(nodes, bool) or not isinstance(nodes, (int, np.integer)) or nodes < 2:
            raise ValueError(f"nodes is {nodes!r}; expected an integer of at least 2.")
        if self.D > 2:
            raise ValueError(f"D is {self.D} and K {self.K}; quadrature is for at most two dimensions.")
        # In a component's own axes and standard deviations; more closely if it may hold narrower ones.
        deviations = np.sqrt(self._variances)
        finer = np.minimum(deviations / np.min(deviations), FINEST)
        points, weights = [], []
        for k in range(self.K):
            lines = [np.linspace(-REACH, REACH, math.ceil(nodes * f)) for f in finer[k]]
            grid = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, self.D)
            density = np.exp(-np.sum(np.square(grid), axis=1) / 2)
            inside = density > 1e-20 * np.max(density)  # not the corners, unless there is nothing else
            points.append(self.means[k] + (deviations[k] * grid[inside]) @ self._axes[k].T)
            weights.append(self.weights[k] * density[inside] / np.sum(density[inside]))
        return np.concat(points), np.concat(weights)

    def _require_density(self) -> None:
        if np.any(self._variances == 0):
            raise ValueError("a component's covariance is singular: the mixture has no density.")

    def _checked(self, name: str, x: Array) -> Array:
        check_array(name, x)
        xp = array_namespace(x)
        if not xp.isdtype(x.dtype, "real floating"):
            raise ValueError(f"{name} has dtype {x.dtype}; expected a real floating one.")
        if x.ndim != 2 or x.shape[1] != self.D:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, {self.D}).")
        return x


def _logsumexp(x: Array) -> Array:
    """log sum exp over axis 1."""
    xp = array_namespace(x)
    largest = xp.max(x, axis=1, keepdims=True)
    return largest[:, 0] + xp.log(xp.sum(xp.exp(x - largest), axis=1))


def _finite(name: str, values: Any) -> np.ndarray:
    """`values` as a fresh float64 array on the host, or ValueError."""
    try:
        array = np.array(to_numpy(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {class_or_kind(values)} ({error}); expected numbers.") from None
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} holds a number that is not finite.")
    return array
