"""The variational bound in continuous time, and its gradients by the network and by the schedule.

With ever more steps the bound becomes an integral over the time u in [0, 1] (Kingma et al. 2021, eq. 11
and 17; docs: S.10). With gamma = -log SNR, a^2 = sigmoid(-gamma), s^2 = sigmoid(gamma) and z = a x_0 + s eps,

    -log p(x_0) <= KL( q(z_1 | x_0) || N(0, I) )                        the prior's term
                   - E log p(x_0 | z_0)                                 the reconstruction
                   + 1/2 E_{u, eps} [ gamma'(u) |eps - eps^(z_u)|^2 ]   the integral

The network may predict eps, x_0, v or the flow: the error of the noise is e^{-gamma/2} times that of x_0,
a times that of v, and a / (a + s) times that of the flow. The reconstruction is that of `tinydiff.bound`, L_0
with the variance ``"fixed_large"``, s_0^2.

If gamma moves, the state turns from x_0 towards eps (docs: S.12),

    da/dgamma = -a s^2 / 2,    ds/dgamma = s a^2 / 2,    dz/dgamma = a s / 2 v,    dv/dgamma = -a s / 2 z

so the gradient by gamma is that of the weights in front, plus what comes back through the network's input.

Each sample has its own gamma. They are float64 on the host, like a schedule's tables, and cast at the moment
of use.

References
----------
Kingma, Salimans, Poole & Ho 2021, *Variational diffusion models*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from tinydiff._checks import (
    check_array,
    check_batch,
    check_choice,
    check_counts,
    check_network,
    check_rng,
    class_or_kind,
)
from tinydiff._progress import progress_bar
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    column_like,
    standard_normal,
    sum_samples,
    to_float64,
)
from tinydiff.bound import Decoder, check_decoder, discretized_gaussian_nll, gaussian_nll
from tinydiff.diffusion import Prediction, matching
from tinydiff.learned_schedule import LearnedSchedule
from tinydiff.models._checks import answer_of, check_like_model, labels_for
from tinydiff.nn.module import Module, once, weight_of

__all__ = [
    "ContinuousBound",
    "continuous_bound",
    "diffuse",
    "draw_times",
    "integral_term",
    "learned_schedule_loss",
    "prior_term",
    "reconstruction_term",
]


def draw_times(n: int, rng: np.random.Generator, even: bool = True) -> np.ndarray:
    """Draw n times, each uniform on [0, 1).  (docs: S.16)

    Parameters
    ----------
    n : int
        How many, at least 1.
    rng : numpy.random.Generator
        Where the randomness comes from.
    even : bool
        True: evenly spaced, from one draw, u_i = (u_0 + i / n) mod 1 (Kingma et al. 2021, appendix I.1).
        Each is uniform, so the estimate is unbiased as ever; together they leave no stretch of time out.
        False: independent.

    Returns
    -------
    ndarray of float64, shape (n,)

    Raises
    ------
    ValueError
        If `n` is not a count.
    TypeError
        If `rng` is not a generator.
    """
    check_counts(n=n)
    check_rng(rng)
    return (rng.random() + np.arange(n) / n) % 1.0 if even else rng.random(n)


# The terms of each sample, and their derivatives


def diffuse(x0: Array, noise: Array, gamma: Array) -> tuple[Array, Callable[[Array], np.ndarray]]:
    """z = a x_0 + s eps.  dz/dgamma = a s / 2 v,  v = a eps - s x_0.  (docs: S.12)

    Parameters
    ----------
    x0, noise : array of shape (N, ...)
        Data and standard normal noise.
    gamma : array of shape (N,)
        -log SNR of each sample.

    Returns
    -------
    z : array of shape (N, ...)
    backward : callable
        From dL/dz to dL/dgamma (N,), float64 on the host.

    Raises
    ------
    TypeError, ValueError
        If `x0` and `noise` are not floating arrays of one library and shape, or `gamma` is not (N,).
    """
    x0, noise = matching(x0=x0, noise=noise)
    a, s = _rates(_of_samples("gamma", gamma, x0))
    a_, s_ = column_like(a, x0), column_like(s, x0)

    @once
    def backward(dz: Array) -> np.ndarray:
        return a * s / 2 * _dot(dz, a_ * noise - s_ * x0)

    return a_ * x0 + s_ * noise, backward


def integral_term(
    output: Array, x0: Array, noise: Array, gamma: Array, slope: Array, prediction: Prediction = "eps"
) -> tuple[Array, Callable[[Array], tuple[Array, np.ndarray, np.ndarray]]]:
    """1/2 gamma' |eps - eps^|^2 of each sample, in nats.  (docs: S.10, S.12)

    With o the output and its target, of `prediction`:

        eps: 1/2 gamma' |o - eps|^2    x0: 1/2 gamma' e^{-gamma} |o - x_0|^2    v: 1/2 gamma' a^2 |o - v|^2

        flow: 1/2 gamma' (a / (a + s))^2 |o - (eps - x_0)|^2

    Parameters
    ----------
    output : array of shape (N, ...)
        What the network returned for z = a x_0 + s eps.
    x0, noise : array of shape (N, ...)
        Data and the eps in z.
    gamma, slope : array of shape (N,)
        gamma and gamma' of each sample.
    prediction : {"eps", "x0", "v", "flow"}
        What `output` is an estimate of.

    Returns
    -------
    value : array of shape (N,)
    backward : callable
        From dL/dvalue (N,) to the gradients of `output`, `gamma` and `slope`; the latter two float64 on the
        host, that of `gamma` without the part that goes through the network's input (see `diffuse`).

    Raises
    ------
    TypeError, ValueError
        If the arrays do not match, as in `diffuse`; or if `prediction` is none of these.
    """
    x0, noise, output = matching(x0=x0, noise=noise, output=output)
    gamma, slope = _of_samples("gamma", gamma, x0), _of_samples("slope", slope, x0)
    a, s = _rates(gamma)
    a_, s_ = column_like(a, x0), column_like(s, x0)
    if check_choice("prediction", prediction, get_args(Prediction)) == "eps":
        target, weight, dlog_weight = noise, np.ones_like(gamma), np.zeros_like(gamma)
    elif prediction == "x0":
        target, weight, dlog_weight = x0, np.exp(-gamma), -np.ones_like(gamma)
    elif prediction == "v":
        target, weight, dlog_weight = a_ * noise - s_ * x0, a * a, -s * s
    else:
        target, weight, dlog_weight = noise - x0, (a / (a + s)) ** 2, -s / (a + s)
    error = output - target
    squares = sum_samples(error * error)
    value = squares * asarray_like(slope * weight / 2, x0)

    @once
    def backward(dvalue: Array) -> tuple[Array, np.ndarray, np.ndarray]:
        d = to_float64(dvalue)
        doutput = column_like(d * slope * weight, x0) * error
        dslope = d * weight / 2 * to_float64(squares)
        dgamma = slope * dslope * dlog_weight
        if prediction == "v":  # the target moves: dv/dgamma = -a s / 2 z
            dgamma = dgamma + a * s / 2 * _dot(doutput, a_ * x0 + s_ * noise)
        return doutput, dgamma, dslope

    return value, backward


def reconstruction_term(
    output: Array,
    x0: Array,
    noise: Array,
    gamma: Array,
    prediction: Prediction = "eps",
    decoder: Decoder = "density",
) -> tuple[Array, Callable[[Array], tuple[Array, np.ndarray]]]:
    """-log p(x_0 | z_0) of each sample, in nats: a Gaussian about x_0^ of variance s^2.  (docs: S.10, S.12)

    With o the output and v that of z_0; the derivatives by gamma are at fixed o:

        eps: x_0^ = x_0 + e^{gamma/2} (eps - o)     dx_0^/dgamma = (x_0^ - x_0) / 2
        x0:  x_0^ = o                                              0
        v:   x_0^ = x_0 + s (v - o)                                a^2 (x_0^ - x_0) / 2 - a s^2 / 2 z_0
        flow: x_0^ = x_0 + s / (a + s) (eps - x_0 - o)             a / (a + s) (x_0^ - x_0) / 2
        log s^2                                     dlog s^2/dgamma = a^2

    Parameters
    ----------
    output : array of shape (N, ...)
        What the network returned for z_0 = a x_0 + s eps.
    x0, noise : array of shape (N, ...)
        Data and the eps in z_0.
    gamma : array of shape (N,)
        gamma_0 for each sample.
    prediction : {"eps", "x0", "v", "flow"}
        What `output` is an estimate of.
    decoder : {"density", "8bit"}
        The density of points, or the probability of 8-bit levels.

    Returns
    -------
    value : array of shape (N,)
    backward : callable
        From dL/dvalue (N,) to the gradients of `output` and of `gamma`, float64 on the host and without the
        part that goes through the network's input.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not match, as in `diffuse`; if `prediction` or `decoder` is none of these; or, with
        ``"8bit"``, if `x0` is not 8-bit data.
    """
    x0, noise, output = matching(x0=x0, noise=noise, output=output)
    check_decoder(decoder)
    gamma = _of_samples("gamma", gamma, x0)
    a, s = _rates(gamma)
    a_, s_ = column_like(a, x0), column_like(s, x0)
    if check_choice("prediction", prediction, get_args(Prediction)) == "eps":
        apart, scale, dlog_scale = noise - output, np.exp(gamma / 2), np.full_like(gamma, 0.5)
    elif prediction == "x0":
        apart, scale, dlog_scale = output - x0, np.ones_like(gamma), np.zeros_like(gamma)
    elif prediction == "v":
        apart, scale, dlog_scale = a_ * noise - s_ * x0 - output, s, a * a / 2
    else:
        apart, scale, dlog_scale = noise - x0 - output, s / (a + s), a / (a + s) / 2
    off = column_like(scale, x0) * apart  # x_0^ - x_0
    log_variance = column_like(-np.logaddexp(0, -gamma), x0)
    if decoder == "density":  # which depends on the difference only: x_0 + off would round it away
        nll, nll_backward = gaussian_nll(0 * x0, off, log_variance)
    else:
        nll, nll_backward = discretized_gaussian_nll(x0, x0 + off, log_variance)

    @once
    def backward(dvalue: Array) -> tuple[Array, np.ndarray]:
        dmean, dlog_variance = nll_backward(column_like(to_float64(dvalue), x0) + 0 * x0)
        dgamma = a * a * to_float64(sum_samples(dlog_variance))
        doutput = column_like(scale if prediction == "x0" else -scale, x0) * dmean
        if np.any(dlog_scale):
            dgamma = dgamma + dlog_scale * _dot(dmean, off)
        if prediction == "v":  # which moves, by -a s / 2 z_0
            dgamma = dgamma - a * s * s / 2 * _dot(dmean, a_ * x0 + s_ * noise)
        return doutput, dgamma

    return sum_samples(nll), backward


def prior_term(x0: Array, gamma_1: float) -> tuple[Array, Callable[[Array], float]]:
    """KL( q(z_1 | x_0) || N(0, I) ) of each sample, in nats.  (docs: S.10, S.12)

    1/2 sum( a^2 x_0^2 - a^2 - log s^2 ), whose derivative by gamma_1 is -1/2 a^2 sum( a^2 + s^2 x_0^2 ).

    Parameters
    ----------
    x0 : array of shape (N, ...)
        Data.
    gamma_1 : float
        -log SNR at the end.

    Returns
    -------
    value : array of shape (N,)
    backward : callable
        From dL/dvalue (N,) to dL/dgamma_1.

    Raises
    ------
    TypeError, ValueError
        If `x0` is not a floating array.
    """
    (x0,) = matching(x0=x0)
    a2, s2, log_s2 = (float(f) for f in _squares(np.asarray(gamma_1, dtype=np.float64)))
    squares = sum_samples(x0 * x0)
    D = math.prod(x0.shape[1:])

    @once
    def backward(dvalue: Array) -> float:
        return float(-a2 / 2 * np.sum(to_float64(dvalue) * (D * a2 + s2 * to_float64(squares))))

    return (a2 * squares - D * (a2 + log_s2)) / 2, backward


# The loss


def learned_schedule_loss(
    model: Any,
    learned: LearnedSchedule,
    x0: Array,
    rng: np.random.Generator,
    *,
    T: int = 1000,
    prediction: Prediction = "v",
    decoder: Decoder = "density",
    even: bool = True,
    reconstructions: int | None = None,
    labels: Array | None = None,
) -> tuple[Array, Callable[[], None]]:
    """The bound of a batch in bits per dimension, and what it teaches network and schedule.  (docs: S.13)

    An estimate: the integral's term of every sample at one random time, and the reconstruction of the first
    samples. (Kingma et al. 2021, appendix I.) It is unbiased if the samples' order says nothing about them,
    as with independent draws or shuffled data.

    Parameters
    ----------
    model : UNet or MLP, or another callable
        Called as ``model(z, (T - 1) * u, rng)``, with labels as ``model(z, (T - 1) * u, rng, labels)``;
        returns (output, backward).
    learned : LearnedSchedule
        The forward process.
    x0 : array of shape (N, ...)
        A batch of data.
    rng : numpy.random.Generator
        Draws times, noise, and dropout masks.
    T : int
        The length of the chain whose times the network is told, at least 2.
    prediction : {"eps", "x0", "v", "flow"}
        What the network predicts.
    decoder : {"density", "8bit"}
        The reconstruction: the density of points, or the probability of 8-bit levels.
    even : bool
        Times evenly spaced, as in `draw_times`.
    reconstructions : int, optional
        From how many samples, the first ones, the reconstruction is estimated, 1 … N. Default: a quarter.
    labels : integer array of shape (N,), optional
        The classes that the network is told. Default: it is called without.

    Returns
    -------
    loss : array, 0-d
    backward : callable
        Without argument. Adds the loss's gradient to those of the model's parameters and of the two end
        points. To those of the schedule's other parameters it adds the gradient of the mean squared term
        (`LearnedSchedule.separate`).

    Raises
    ------
    TypeError
        If `learned` is not a `LearnedSchedule`, `x0` is not an array, `rng` is not a generator, or `model` is
        not callable or returns no derivative.
    ValueError
        If an argument does not fit; the message names it.
    """
    _check_clock(T)
    _check_learned(learned)
    check_network("model", model)
    check_like_model(model, "x0", x0)
    check_batch("x0", x0)
    N = x0.shape[0]
    n = max(1, N // 4) if reconstructions is None else reconstructions
    check_counts(reconstructions=n)
    if n > N:
        raise ValueError(f"reconstructions is {n}; expected at most {N}, the batch.")
    xp = array_namespace(x0)
    u = draw_times(N, rng, even)
    # The two ends are evaluated along with the rest: their gradients go the same way back.
    (gamma_all, slope_all), schedule_backward = learned.separate(np.concat([[0.0, 1.0], u]))
    gamma_all, slope = to_float64(gamma_all), to_float64(slope_all)[2:]
    gamma_0, gamma_1, gamma = gamma_all[0], gamma_all[1], gamma_all[2:]

    noise = standard_normal(rng, x0.shape, x0)
    z, z_backward = diffuse(x0, noise, gamma)
    told = () if labels is None else (labels,)
    output, model_backward = answer_of(model, z, asarray_like((T - 1) * u, x0, xp.float64), rng, *told)
    terms, terms_backward = integral_term(output, x0, noise, gamma, slope, prediction)

    first, at_start = x0[:n, ...], np.full(n, gamma_0)
    noise_0 = standard_normal(rng, first.shape, x0)
    z_0, z_0_backward = diffuse(first, noise_0, at_start)
    at_0, told_0 = asarray_like(np.zeros(n), x0, xp.float64), [y[:n, ...] for y in told]
    output_0, model_0_backward = answer_of(model, z_0, at_0, rng, *told_0)
    losses_0, losses_0_backward = reconstruction_term(output_0, first, noise_0, at_start, prediction, decoder)
    priors, priors_backward = prior_term(x0, gamma_1)

    unit = math.log(2) * math.prod(x0.shape[1:])
    loss = (xp.mean(terms) + xp.mean(losses_0) + xp.mean(priors)) / unit

    @once
    def backward() -> None:
        each = np.full(N, 1 / (N * unit))
        doutput, dgamma, dslope = terms_backward(each)
        dgamma = dgamma + z_backward(model_backward(doutput))
        doutput_0, dgamma_0 = losses_0_backward(np.full(n, 1 / (n * unit)))
        dgamma_0 = dgamma_0 + z_0_backward(model_0_backward(doutput_0))
        zeros = np.zeros(2)
        schedule_backward(
            np.concat([[np.sum(dgamma_0), priors_backward(each)], dgamma]),
            np.concat([zeros, dslope]),
            np.concat([zeros, to_float64(terms) / (unit * math.sqrt(N))]),
        )

    return loss, backward


# The bound of a data set


@dataclass(frozen=True)
class ContinuousBound:
    """The continuous-time bound on the negative log-likelihood, averaged over data; in nats per sample.

    Attributes
    ----------
    value : float
        prior + reconstruction + integral.
    standard_error : float
        Of `value`. From the spread over the data if the times were drawn one by one; nan for a single sample.
        `even` times make up for one another within a batch, so then it is from the spread over batches, if
        there are at least 8. With fewer batches it is from the spread over the data, and too large: several
        times for data of many dimensions, whose terms differ by their times above all.
    prior, reconstruction, integral : float
        Its three terms.
    """

    value: float
    standard_error: float
    prior: float
    reconstruction: float
    integral: float


def continuous_bound(
    denoise: Callable[[Array, Array], Array],
    learned: LearnedSchedule,
    data: Array,
    *,
    rng: np.random.Generator,
    labels: Array | None = None,
    T: int = 1000,
    prediction: Prediction = "v",
    decoder: Decoder = "density",
    t_samples: int = 1,
    even: bool = True,
    batch_size: int = 256,
    progress: bool = True,
) -> ContinuousBound:
    """Estimate the continuous-time bound of data, without bias.  (docs: S.10)

    (Kingma et al. 2021, eq. 11 and 17.) It is the limit of ``variational_bound`` with
    ``GaussianDiffusion(learned.schedule(S), prediction, "fixed_large")`` for many levels S, and a network
    that is told the times of T levels.

    Parameters
    ----------
    denoise : callable or UNet or MLP
        ``denoise(z, t)`` with real t in [0, T-1]. Of a tinydiff model ``predict`` is called, in its dtype.
    learned : LearnedSchedule
        The forward process.
    data : array of shape (n, ...)
        The data set.
    rng : numpy.random.Generator
        Draws times and noise.
    labels
        As in `variational_bound`.
    T, prediction, decoder, even
        As in `learned_schedule_loss`.
    t_samples : int
        How many random times for each sample.
    batch_size : int
        How many samples to show the network at a time.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    ContinuousBound

    Raises
    ------
    TypeError
        If `learned` is not a `LearnedSchedule`, `data` is not an array, or `rng` is not a generator.
    ValueError
        If an argument is out of range or does not fit; the message names it.
    """
    _check_clock(T)
    _check_learned(learned)
    check_counts(t_samples=t_samples, batch_size=batch_size)
    check_network("denoise", denoise)
    check_array("data", data)
    check_rng(rng)
    if data.ndim < 2 or data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected (n, ...) with n at least 1.")
    predict = denoise.predict if isinstance(denoise, Module) else denoise
    like = weight_of(denoise) if isinstance(denoise, Module) else data
    n = data.shape[0]
    labels = labels_for(denoise, labels, n, "denoise")
    parts = np.zeros((3, n))
    with progress_bar(progress, total=n * (t_samples + 1), desc="bound", unit="term", leave=False) as bar:
        for begin in range(0, n, batch_size):
            rows = slice(begin, min(n, begin + batch_size))
            (x0,) = matching(data=asarray_like(data[rows, ...], like))
            xp, N = array_namespace(x0), x0.shape[0]
            told = {} if labels is None else {"labels": labels[rows, ...]}
            parts[0, rows] = to_float64(prior_term(x0, learned.gamma_1)[0])
            for i in range(t_samples + 1):  # the first is the reconstruction, at u = 0
                u = draw_times(N, rng, even) if i > 0 else np.zeros(N)
                gamma, slope = (to_float64(g) for g in learned(u)[0])
                noise = standard_normal(rng, x0.shape, x0)
                t = asarray_like((T - 1) * u, x0, xp.float64)
                output = predict(diffuse(x0, noise, gamma)[0], t, **told)
                if i == 0:
                    parts[1, rows] = to_float64(
                        reconstruction_term(output, x0, noise, gamma, prediction, decoder)[0]
                    )
                else:
                    terms = integral_term(output, x0, noise, gamma, slope, prediction)[0]
                    parts[2, rows] += to_float64(terms) / t_samples
                bar.update(N)
    values, means = np.sum(parts, axis=0), np.mean(parts, axis=1)
    return ContinuousBound(
        value=float(np.mean(values)),
        standard_error=_standard_error(values, batch_size if even and n > 7 * batch_size else 1),
        prior=float(means[0]),
        reconstruction=float(means[1]),
        integral=float(means[2]),
    )


def _standard_error(values: np.ndarray, size: int) -> float:
    """Of the mean of `values`, from the means of batches of `size`; the last may be shorter."""
    n = len(values)
    if n <= size:
        return math.nan
    starts = np.arange(0, n, size)
    counts = np.diff(np.append(starts, n))
    off = np.add.reduceat(values, starts) - counts * np.mean(values)  # of each batch's sum
    return math.sqrt(np.sum(off * off) * len(starts) / (len(starts) - 1)) / n


def _squares(gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a^2, s^2 and log s^2, each with all its digits."""
    log_s2 = -np.logaddexp(0, -gamma)
    return np.exp(-np.logaddexp(0, gamma)), np.exp(log_s2), log_s2


def _of_samples(name: str, values: Array, x0: Array) -> np.ndarray:
    """A number for each sample, (N,) in float64 on the host; or ValueError: terms of (N, 1) are (N, N)."""
    host = to_float64(values)
    if host.shape != (x0.shape[0],):
        raise ValueError(
            f"{name} has shape {host.shape}; expected ({x0.shape[0]},), one for each of the batch."
        )
    return host


def _rates(gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rates of signal and noise, a and s."""
    a2, s2, _ = _squares(gamma)
    return np.sqrt(a2), np.sqrt(s2)


def _dot(x: Array, y: Array) -> np.ndarray:
    """The product of each sample's x with its y, (N,) on the host."""
    return to_float64(sum_samples(x * y))


def _check_learned(learned: Any) -> None:
    if not isinstance(learned, LearnedSchedule):
        raise TypeError(f"learned is {class_or_kind(learned)}; expected a LearnedSchedule.")


def _check_clock(T: int) -> None:
    check_counts(T=T)
    if T < 2:
        raise ValueError(f"T is {T}; expected at least 2: one time tells a network nothing.")
