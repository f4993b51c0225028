"""A forward process that is learned: gamma(u) = -log SNR, a monotone network of the time u in [0, 1].

All that a schedule does to the data is in its signal-to-noise ratio. Kingma et al. (2021) learn it,

    gamma(u) = gamma_0 + (gamma_1 - gamma_0) eta(u),       abar = sigmoid(-gamma),  1 - abar = sigmoid(gamma)

with two end points and, between them, an eta that rises from 0 to 1 (their appendix H; docs: S.14):

    m(u)   = u + sum_k w_k sigmoid(v_k u + b_k),           w_k, v_k > 0
    eta(u) = (m(u) - m(0)) / (m(1) - m(0))

Positive weights are softplus of free ones. So are -gamma_0 and gamma_1: whatever the parameters, signal
prevails at the beginning and noise at the end, and the SNR only falls. As m' >= 1, nothing is divided by 0.
(The paper has an affine layer before and a bias behind; both drop out, docs: S.14.)

The continuous-time bound needs gamma'(u), too, so the derivative of the network by its parameters is that of
m and of m'. With S = sigmoid(v u + b), P = S (1 - S) and P' = P (1 - 2 S) (docs: S.15):

              m          m' = 1 + sum w v P          m'' = sum w v^2 P'
    d/dw      S          v P
    d/dv      w u P      w P + w v u P'
    d/db      w P        w v P'

Time
----
Level u of the process is the code's time t = (T - 1) u: real in training, 0 … T-1 afterwards. Then
``learned.schedule(T)`` has ``alphas_cumprod[t] = sigmoid(-gamma(t / (T - 1)))``, from gamma_0 at t = 0 to
gamma_1 at t = T - 1, and a network that was trained on real t with that T knows these integer times. The
schedule goes with ``GaussianDiffusion``, ``sample`` and ``bits_per_dim`` like any other. For fewer steps,
respace it. For a chain of another length S, tell the network the times that it knows:
``lambda x, t: model.predict(x, t * (T - 1) / (S - 1))``.

References
----------
Kingma, Salimans, Poole & Ho 2021, *Variational diffusion models*.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts, check_number
from tinydiff.backend import Array, array_namespace, asarray_like, to_float64, to_numpy
from tinydiff.nn.module import Module, Parameter, once
from tinydiff.schedules import NoiseSchedule

__all__ = ["LearnedSchedule"]

FARTHEST = 80.0  # exp(80) and exp(-80), the extremes of the SNR, are normal float32 numbers


class Rise(Module):
    """eta: from [0, 1] onto [0, 1], rising, whatever the weights.  (docs: S.14)

    Parameters
    ----------
    units : int
        Number of sigmoids. They begin evenly spaced and alike, so that eta begins almost as a straight line.

    Notes
    -----
    The parameters `height`, `slope` and `bias` hold, for each unit, softplus^-1 of w_k and of v_k, and b_k.
    """

    def __init__(self, units: int) -> None:
        centres = (np.arange(units) + 0.5) / units
        steepness = np.full(units, max(4.0, units / 2))
        self.height = Parameter(_inverse_softplus(np.full(units, 1 / units)))
        self.slope = Parameter(_inverse_softplus(steepness))
        self.bias = Parameter(-steepness * centres)

    def __call__(
        self, u: Array
    ) -> tuple[tuple[Array, Array, Array], Callable[[Array, Array], tuple[Array, Array]]]:
        """u (N,) to eta, eta' and eta'', (N,); backward takes those of eta and eta'.  (docs: S.14, S.15)"""
        xp = array_namespace(u)
        w, v, b = _softplus(self.height.value), _softplus(self.slope.value), self.bias.value
        # The ends go through the same lines as the rest, so that eta(0) = 0 and eta(1) = 1 to the last bit.
        ends = asarray_like([0.0, 1.0], u)
        u_all = xp.concat([ends, u])[:, None]
        S = _sigmoid(v * u_all + b)
        P = S * (1 - S)
        dP = P * (1 - 2 * S)
        m = u_all[:, 0] + xp.sum(w * S, axis=1)
        m_slope = 1 + xp.sum(w * v * P, axis=1)
        m_curvature = xp.sum(w * v * v * dP, axis=1)
        delta = m[1] - m[0]
        eta, eta_slope, eta_curvature = (m[2:] - m[0]) / delta, m_slope[2:] / delta, m_curvature[2:] / delta

        @once
        def backward(deta: Array, dslope: Array) -> Array:
            """The quotient's derivative; then that of m(0), m(1), m and m' by the table above; returns du."""
            dm_at_1 = -xp.sum(deta * eta + dslope * eta_slope) / delta
            dm_at_0 = -xp.sum(deta) / delta - dm_at_1
            dm = xp.concat([xp.stack([dm_at_0, dm_at_1]), deta / delta])[:, None]
            dm_slope = xp.concat([xp.zeros_like(ends), dslope / delta])[:, None]
            dw = xp.sum(dm * S + dm_slope * (v * P), axis=0)
            dv = xp.sum(dm * (w * u_all * P) + dm_slope * (w * P + w * v * u_all * dP), axis=0)
            db = xp.sum(dm * (w * P) + dm_slope * (w * v * dP), axis=0)
            self.height.accumulate(dw * _sigmoid(self.height.value))
            self.slope.accumulate(dv * _sigmoid(self.slope.value))
            self.bias.accumulate(db)
            return deta * eta_slope + dslope * eta_curvature

        return (eta, eta_slope, eta_curvature), backward


class LearnedSchedule(Module):
    """gamma(u) = -log SNR of a forward process that is learned; u in [0, 1].

    Parameters
    ----------
    gamma_0, gamma_1 : float
        Where the end points begin: in [-80, 0) and (0, 80]. The defaults are those of the authors' code, for
        8-bit images.
    units : int
        Number of sigmoids in the network between them.

    Raises
    ------
    ValueError
        If an argument is out of range; the message names it.

    Notes
    -----
    Parameters are float64 NumPy arrays until moved with ``to``: one time for each sample of a batch costs
    nothing, and a schedule wants the digits. The parameter of an end point is softplus^-1 of its size.

    ``checkpoint.save_arrays(path, learned.state_dict(), {"config": learned.config})`` keeps one on disk, and
    with ``arrays, metadata = checkpoint.load_arrays(path)`` it comes back as
    ``LearnedSchedule(**metadata["config"])`` after ``load_state_dict(arrays)``. (`save_model` keeps the chain
    ``learned.schedule(T)`` beside the network that it is for, as any process.)
    """

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0, units: int = 32) -> None:
        check_counts(units=units)
        check_number("gamma_0", gamma_0, lambda gamma: -FARTHEST <= gamma < 0, "a number in [-80, 0)")
        check_number("gamma_1", gamma_1, lambda gamma: 0 < gamma <= FARTHEST, "a number in (0, 80]")
        self.config = dict(gamma_0=float(gamma_0), gamma_1=float(gamma_1), units=int(units))
        self.start = Parameter(_inverse_softplus(np.array([-float(gamma_0)])))
        self.end = Parameter(_inverse_softplus(np.array([float(gamma_1)])))
        self.rise = Rise(units)

    @property
    def gamma_0(self) -> float:
        """-log SNR at u = 0, where the data is almost clean.  (docs: S.14)"""
        return -float(_softplus(self.start.value)[0])

    @property
    def gamma_1(self) -> float:
        """-log SNR at u = 1, where it is almost noise.  (docs: S.14)"""
        return float(_softplus(self.end.value)[0])

    def __repr__(self) -> str:
        return (
            f"LearnedSchedule(gamma={self.gamma_0:.4g} ... {self.gamma_1:.4g}, units={self.config['units']})"
        )

    def __call__(self, u: Array) -> tuple[tuple[Array, Array], Callable[[Array, Array], Array]]:
        """Return gamma(u) and gamma'(u), and their derivative.  (docs: S.14, S.15)

        Parameters
        ----------
        u : array of shape (N,)
            Times in [0, 1], cast to the parameters' library and dtype.

        Returns
        -------
        (gamma, slope) : arrays of shape (N,)
            gamma(u), and gamma'(u) > 0.
        backward : callable
            ``du = backward(dgamma, dslope)``; adds to every parameter's gradient. To be called at most once.

        Raises
        ------
        ValueError
            If `u` is not of shape (N,), or holds a number outside [0, 1].
        """
        (eta, eta_slope, _), rise_backward = self.rise(self._times(u))
        (gamma, slope), ends_backward = self._between(eta, eta_slope)

        @once
        def backward(dgamma: Array, dslope: Array) -> Array:
            return rise_backward(*ends_backward(dgamma, dslope))

        return (gamma, slope), backward

    def separate(self, u: Array) -> tuple[tuple[Array, Array], Callable[[Array, Array, Array], None]]:
        """Return gamma(u) and gamma'(u), and the gradients that they are to be trained by.  (docs: S.13)

        The end points decide the bound; what is between them, only the variance of its estimate. So the end
        points get the gradient of the bound. The others get that of sum(term^2), term = 1/2 gamma' r, with
        the level gamma and what belongs to it, r, held fixed while the time at which it is visited moves:

            d sum(term^2) = sum( term^2 (deta' / eta' - eta'' deta / eta'^2) )        in expectation over u

        Parameters
        ----------
        u : array of shape (N,)
            Times in [0, 1].

        Returns
        -------
        (gamma, slope) : arrays of shape (N,)
            As in the call.
        backward : callable
            ``backward(dgamma, dslope, terms)``, each of shape (N,): the gradient of the bound's estimate, and
            the samples' terms of its integral. Adds to every parameter's gradient. To be called at most once.

        Raises
        ------
        ValueError
            As in the call.
        """
        (eta, eta_slope, eta_curvature), rise_backward = self.rise(self._times(u))
        (gamma, slope), ends_backward = self._between(eta, eta_slope)

        @once
        def backward(dgamma: Array, dslope: Array, terms: Array) -> None:
            ends_backward(asarray_like(dgamma, eta), asarray_like(dslope, eta))
            ratio = asarray_like(terms, eta) / eta_slope
            rise_backward(-ratio * ratio * eta_curvature, ratio * ratio * eta_slope)

        return (gamma, slope), backward

    def _between(
        self, eta: Array, eta_slope: Array
    ) -> tuple[tuple[Array, Array], Callable[[Array, Array], tuple[Array, Array]]]:
        """gamma and gamma' from eta and eta'.  (docs: S.15)

        dgamma_0 = sum (1 - eta) dgamma - eta' dslope,  dgamma_1 = sum eta dgamma + eta' dslope.
        """
        xp = array_namespace(eta)
        low, high = -_softplus(self.start.value), _softplus(self.end.value)

        @once
        def backward(dgamma: Array, dslope: Array) -> tuple[Array, Array]:
            dlow = xp.sum((1 - eta) * dgamma - eta_slope * dslope, keepdims=True)
            dhigh = xp.sum(eta * dgamma + eta_slope * dslope, keepdims=True)
            self.start.accumulate(-dlow * _sigmoid(self.start.value))
            self.end.accumulate(dhigh * _sigmoid(self.end.value))
            return (high - low) * dgamma, (high - low) * dslope

        # Not low + (high - low) eta: this is exact at both ends.
        return ((1 - eta) * low + eta * high, (high - low) * eta_slope), backward

    def schedule(self, T: int = 1000) -> NoiseSchedule:
        """Return the chain of T levels, ``alphas_cumprod[t] = sigmoid(-gamma(t / (T - 1)))``.  (docs: S.9)

        With d the rise of gamma in a step, beta_t = sigmoid(gamma_t) (1 - exp(-d)), and beta_0 =
        sigmoid(gamma_0). A chain of one step ends in noise: its only level is gamma_1.

        Parameters
        ----------
        T : int
            Number of steps, at least 1.

        Returns
        -------
        NoiseSchedule

        Raises
        ------
        ValueError
            If `T` is not a count; if an end point is not finite, or beyond 80, where the signal-to-noise
            ratio is no float32; or if gamma rises in some step by less than float64 resolves.

        Notes
        -----
        Where 1 - beta is below 1e-16, beta rounds to 1, and abar to 0: ``alphas_cumprod`` is right to about
        1e-16 absolute, not relative, as in `NoiseSchedule.respace`.
        """
        check_counts(T=T)
        if not (-self.gamma_0 <= FARTHEST and self.gamma_1 <= FARTHEST):  # NaN compares false: refused, too
            raise ValueError(
                f"gamma_0 is {self.gamma_0:.4g} and gamma_1 {self.gamma_1:.4g}; expected both within ±80, "
                "where the signal-to-noise ratio is a float32."
            )
        gamma = np.full(1, self.gamma_1) if T == 1 else to_float64(self(np.arange(T) / (T - 1))[0][0])
        rises = np.diff(gamma)
        stuck = np.flatnonzero(~(rises > 0))
        if stuck.size:
            t = stuck[0] + 1
            raise ValueError(
                f"T is {T}: gamma does not rise from step {t - 1} to {t} in floating point; expected fewer."
            )
        grow = np.concat([[1.0], -np.expm1(-rises)])
        return NoiseSchedule(np.exp(-np.logaddexp(0, -gamma)) * grow)

    def _times(self, u: Array) -> Array:
        """`u` beside the parameters, or ValueError."""
        if len(getattr(u, "shape", ())) != 1:
            raise ValueError(f"u has shape {getattr(u, 'shape', None)}; expected (N,).")
        host = to_numpy(u)
        if not np.all((host >= 0) & (host <= 1)):
            raise ValueError("u holds a number outside [0, 1].")
        return asarray_like(host, self.start.value)


def _softplus(x: Array) -> Array:
    """log(1 + exp x), whose derivative is the sigmoid."""
    xp = array_namespace(x)
    return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(x: Array) -> Array:
    """By its logarithm: nothing overflows, and small values keep their digits."""
    return array_namespace(x).exp(-_softplus(-x))


def _inverse_softplus(y: np.ndarray) -> np.ndarray:
    return y + np.log(-np.expm1(-y))
