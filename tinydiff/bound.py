"""The variational bound on the negative log-likelihood, term by term, with its gradients.

The chain's reverse p gives a bound that needs no integral (Ho et al. 2020, eq. 5 and appendix A):

    -log p(x_0) <= L_T + L_{T-1} + ... + L_0        in expectation over q, in the paper's numbering of steps

    L_T     = KL( q(x_T | x_0) || N(0, I) )                          nothing to learn here: `prior_term`
    L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) )
    L_0     = -log p(x_0 | x_1)

Here the last two are one function of the code's t = 0 ... T-1, `step_term`: at t = 0 the posterior is x_0
itself, and instead of a divergence there is the negative log-likelihood of x_0 under the last reverse step.
For points that is a density, and all terms are in nats of a density. For 8-bit images it is the probability
of a level (section 3.3), so that the bound counts bits.

Both the posterior and the reverse step are Gaussian, and their means have the same part in x_t. With x_0^ the
network's guess, c the weight of x_0 in the posterior's mean and sigma^2 the reverse step's variance, each
coordinate adds

    1/2 [ log sigma^2 - log beta~ + (beta~ + c^2 (x_0 - x_0^)^2) / sigma^2 - 1 ]       to L_{t-1}

The gradient reaches the network's output through x_0^ (its `prediction`) and, if the variance is learned,
through log sigma^2.

References
----------
Ho, Jain & Abbeel 2020, *Denoising diffusion probabilistic models*.
Nichol & Dhariwal 2021, *Improved denoising diffusion probabilistic models*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tinydiff._checks import check_array, check_choice, check_counts, check_network, check_rng
from tinydiff._progress import progress_bar
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    clip_to_unit,
    column_like,
    integers_like,
    standard_normal,
    sum_samples,
    to_float64,
    to_numpy,
)
from tinydiff.diffusion import GaussianDiffusion, check_diffusion, matching
from tinydiff.kernels import many_steps
from tinydiff.models._checks import labels_for
from tinydiff.nn.module import Module, once, weight_of
from tinydiff.parallel import shared_out

__all__ = [
    "Bound",
    "Decoder",
    "bits_per_dim",
    "check_decoder",
    "discretized_gaussian_nll",
    "gaussian_kl",
    "gaussian_nll",
    "prior_term",
    "step_term",
    "variational_bound",
]

Decoder: TypeAlias = Literal["density", "8bit"]


# The two kinds of term, element by element


def gaussian_kl(
    mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array]]]:
    """KL( N(mean1, variance1) || N(mean2, variance2) ), element by element, in nats.  (docs: L.3)

    With r = variance1 / variance2 and d = mean1 - mean2:

        KL            = 1/2 ( r - 1 - log r + d^2 / variance2 )
        dKL/dmean1    = d / variance2               = -dKL/dmean2
        dKL/dlog_var1 = (r - 1) / 2
        dKL/dlog_var2 = (1 - r - d^2 / variance2) / 2

    Parameters
    ----------
    mean1, log_variance1, mean2, log_variance2 : array
        Of shapes that broadcast against one another, of one dtype.

    Returns
    -------
    kl : array
        Of the broadcast shape, never negative but for rounding.
    backward : callable
        From dL/dkl to the gradients of the four arguments, each of its argument's shape.
    """
    xp = array_namespace(mean1)
    d = mean1 - mean2
    log_r = log_variance1 - log_variance2
    r_minus_1 = xp.expm1(log_r)  # r - 1 - log r keeps its digits where the two variances are almost equal
    rate2 = xp.exp(-log_variance2 / 2)  # the root of the precision: in float32 down to a variance of e^-176
    scaled = d * rate2
    squares = scaled * scaled
    kl = (r_minus_1 - log_r + squares) / 2

    @once
    def backward(dkl: Array) -> tuple[Array, Array, Array, Array]:
        dmean = dkl * scaled * rate2
        return (
            _sum_to(dmean, mean1.shape),
            _sum_to(dkl * r_minus_1 / 2, log_variance1.shape),
            _sum_to(-dmean, mean2.shape),
            _sum_to(-dkl * (r_minus_1 + squares) / 2, log_variance2.shape),
        )

    return kl, backward


def gaussian_nll(
    x: Array, mean: Array, log_variance: Array
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """-log of the density N(x; mean, variance), element by element, in nats.  (docs: L.4)

    With d = mean - x:

        nll              = 1/2 ( log(2 pi) + log_variance + d^2 / variance )
        dnll/dmean       = d / variance
        dnll/dlog_var    = (1 - d^2 / variance) / 2

    Parameters
    ----------
    x, mean, log_variance : array
        Of shapes that broadcast against one another, of one dtype.

    Returns
    -------
    nll : array
        Of the broadcast shape.
    backward : callable
        From dL/dnll to the gradients of `mean` and `log_variance`, each of its argument's shape.
    """
    xp = array_namespace(x)
    d = mean - x
    rate = xp.exp(-log_variance / 2)  # as in `gaussian_kl`
    scaled = d * rate
    squares = scaled * scaled
    nll = (math.log(2 * math.pi) + log_variance + squares) / 2

    @once
    def backward(dnll: Array) -> tuple[Array, Array]:
        return (
            _sum_to(dnll * scaled * rate, mean.shape),
            _sum_to(dnll * (1 - squares) / 2, log_variance.shape),
        )

    return nll, backward


def discretized_gaussian_nll(
    x: Array, mean: Array, log_variance: Array
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """-log of the probability that N(mean, variance) falls in the bin of the 8-bit level x.  (docs: L.11)

    In nats. The 256 levels 2 k / 255 - 1 have bins of width 2/255; the two outer bins go on to infinity, so
    that the probabilities sum to 1 (Ho et al. 2020, eq. 13). A bin whose ends are m < p, in standard
    deviations from the mean, has P = Phi(p) - Phi(m). For a bin above the mean the mirror image is taken, so
    that Phi is a small tail, and not a number next to 1; and with rho = log Phi(m) - log Phi(p),

        log P = log Phi(p) + log(1 - exp(rho))

    has no cancellation however far away the bin is. With h(z) = phi(z) / Phi(z):

        dlog P/dmean    = -(h(p)   - h(m)   exp(rho)) / (1 - exp(rho)) / sigma
        dlog P/dlog_var = -(h(p) p - h(m) m exp(rho)) / (1 - exp(rho)) / 2

    Parameters
    ----------
    x : array
        8-bit data, scaled to [-1, 1].
    mean, log_variance : array
        Of shapes that broadcast against `x`, of one dtype.

    Returns
    -------
    nll : array
        Of the broadcast shape, element by element.
    backward : callable
        From dL/dnll to the gradients of `mean` and `log_variance`, each of its argument's shape.

    Raises
    ------
    ValueError
        If `x` is not made of those levels.

    Notes
    -----
    Computed on the host in float64, with scipy's log Phi and scaled complementary error function, and brought
    back to `x`'s library, device and dtype.
    """
    from scipy.special import erfcx, log_ndtr

    level = _levels(x)
    mean_host = to_float64(mean)
    sigma = np.exp(to_float64(log_variance) / 2)
    # Two neighbours share an edge to the last bit, for it is a quotient of integers.
    low = ((2 * level - 256) / 255 - mean_host) / sigma
    high = ((2 * level - 254) / 255 - mean_host) / sigma
    mirrored = low + high > 0
    m, p = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    side = np.where(mirrored, -1.0, 1.0)
    # The outer bins' open ends, below m or, where the mean is beyond the bin, above p.
    lowest, highest = level == 0, level == 255
    below, above = np.where(mirrored, highest, lowest), np.where(mirrored, lowest, highest)

    def hazard(z: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # far above the mean erfcx is inf, and the hazard rightly 0
            return math.sqrt(2 / math.pi) / erfcx(-z / math.sqrt(2))

    log_upper = np.where(above, 0.0, log_ndtr(p))
    rho = np.where(below, -np.inf, log_ndtr(m) - log_upper)
    one_minus = -np.expm1(rho)
    log_P = log_upper + np.log(one_minus)

    @once
    def backward(dnll: Array) -> tuple[Array, Array]:
        at_p = np.where(above, 0.0, hazard(p)) / one_minus
        at_m = np.where(below, 0.0, hazard(m) * np.exp(rho)) / one_minus
        d = to_float64(dnll)
        dmean = d * side * (at_p - at_m) / sigma
        dlog_variance = d * (at_p * p - at_m * m) / 2
        return (
            asarray_like(_sum_to(dmean, mean.shape), mean),
            asarray_like(_sum_to(dlog_variance, log_variance.shape), log_variance),
        )

    return asarray_like(-log_P, x), backward


# The terms of the bound, one value for each sample


def prior_term(diffusion: GaussianDiffusion, x0: Array) -> Array:
    """L_T = KL( q(x_T | x_0) || N(0, I) ) of each sample, in nats.  (docs: L.5)

    1/2 sum( abar_T x_0^2 - abar_T - log(1 - abar_T) ): what the end of the chain still says of the data
    (Ho et al. 2020, eq. 5).

    Parameters
    ----------
    diffusion : GaussianDiffusion
        The process.
    x0 : array of shape (N, ...)
        The data.

    Returns
    -------
    array of shape (N,)

    Raises
    ------
    TypeError, ValueError
        If `diffusion` is not a `GaussianDiffusion`, or `x0` is not a floating array.
    """
    check_diffusion(diffusion)
    (x0,) = matching(x0=x0)
    abar = float(diffusion.schedule.alphas_cumprod[-1])
    # In a chain that ends in noise 1 - abar rounds to 1 and its logarithm to 0; log1p still sees abar.
    log_noise = math.log(diffusion.schedule.one_minus_alphas_cumprod[-1]) if abar > 0.5 else math.log1p(-abar)
    return sum_samples(abar * x0 * x0 - (abar + log_noise)) / 2


def step_term(
    diffusion: GaussianDiffusion,
    output: Array,
    x0: Array,
    x_t: Array,
    t: Array | int,
    decoder: Decoder = "density",
    clip: bool = False,
) -> tuple[Array, Callable[[Array], Array]]:
    """L_{t-1} of each sample where t > 0, and L_0 where t = 0, in nats.  (docs: L.5, V.3)

    Source: Ho et al. 2020, eq. 5.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        Says what `output` is. The variance ``"fixed_small"`` is 0 at t = 0, which would make L_0 infinite:
        there beta~_1 takes its place (``diffusion.log_variance_range``).
    output : array of shape (N, ...); with learned variance twice that on the last axis
        What the network returned for `x_t`.
    x0, x_t : array of shape (N, ...)
        Data, and ``diffusion.q_sample(x0, t, noise)``.
    t : integer array of shape (N,), or int
        Times, 0 … T-1.
    decoder : {"density", "8bit"}
        What L_0 is: ``"density"``, for points; ``"8bit"``, the probability of 8-bit levels, for images.
    clip : bool
        Clip the predicted x0 to [-1, 1]; there is no gradient where it is outside.

    Returns
    -------
    value : array of shape (N,)
    backward : callable
        From dL/dvalue (N,) to dL/doutput, of `output`'s shape.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`; or if `output`, `x0` or `x_t` is not an array, or they
        are not all of one library.
    ValueError
        If an argument does not fit; the message names it. Also if the output is eps at a t where that says
        nothing of x_0 (`GaussianDiffusion.predict_x0`), or if the decoder is ``"8bit"`` and `x0` at t = 0 is
        not 8-bit data.
    """
    check_decoder(decoder)
    check_diffusion(diffusion)
    x0, x_t = matching(x0=x0, x_t=x_t)
    xp = array_namespace(x0)
    N = x0.shape[0]
    t = to_numpy(t)
    log_variance = diffusion.model_log_variance(x_t, t, output)  # refuses a wrong t
    steps = np.broadcast_to(t, (N,))
    guess = diffusion.predict_x0(x_t, steps, output)
    inside = xp.astype(xp.abs(guess) <= 1, guess.dtype) if clip else 1.0
    guess = clip_to_unit(guess) if clip else guess

    # The means' common part in x_t is left out: it would add only rounding to the difference. What is left is
    # c x_0 and c x_0^, and c is the mean for x_0 = 1, x_t = 0.
    ones = column_like(np.ones(N), x0)
    c, _ = diffusion.q_posterior_mean_variance(ones, 0 * ones, steps)
    log_small, log_large = diffusion.log_variance_range
    kl, backward_kl = gaussian_kl(c * x0, column_like(log_small[steps], x0), c * guess, log_variance)
    value = sum_samples(kl)

    # L_0 only where t = 0: few samples of a batch, if any.
    last = np.flatnonzero(steps == 0)
    backward_nll = None
    if last.size:
        index = integers_like(last, x0)
        x0_last, mean_last, log_variance_last = (xp.take(a, index, axis=0) for a in (x0, guess, log_variance))
        likelihood = gaussian_nll if decoder == "density" else discretized_gaussian_nll
        nll, backward_nll = likelihood(x0_last, mean_last, log_variance_last)
        value = _put(value, last, sum_samples(nll))

    @once
    def backward(dvalue: Array) -> Array:
        d = xp.reshape(dvalue, (N,) + (1,) * (x0.ndim - 1)) + xp.zeros_like(x0)
        _, _, dmean, dlog_variance = backward_kl(d)
        dguess = c * dmean
        if backward_nll is not None:
            dmean_last, dlog_variance_last = backward_nll(xp.take(d, index, axis=0))
            dguess = _put(dguess, last, dmean_last)
            dlog_variance = _put(dlog_variance, last, dlog_variance_last)
        # dx0^/dprediction is -s/a, 1 or -s: the guess is linear, so it is the guess at x_t = 0, output 1.
        slope = diffusion.predict_x0(0 * ones, steps, ones, given=diffusion.prediction)
        dprediction = slope * (inside * dguess)
        if diffusion.variance != "learned_range":
            return dprediction
        dnu = column_like((log_large - log_small)[steps] / 2, x0) * dlog_variance
        return xp.concat([dprediction, dnu], axis=-1)

    return value, backward


# The bound of a data set


@dataclass(frozen=True, eq=False)
class Bound:
    """A variational bound on the negative log-likelihood, averaged over data.

    Attributes
    ----------
    value : float
        L_T and all of L_t added up.
    standard_error : float
        Of `value`, from the spread over the data; nan for a single sample, 0 for a closed form.
    L_T : float
        The prior's term.
    L_t : ndarray, shape (T,)
        The term of each reverse step; L_t[0] is the likelihood term L_0. In an estimate, the mean over the
        draws at that t, and nan where no draw fell.
    exact : bool
        True: every t was summed. False: `value` is an unbiased estimate over random t ≥ 1.
    unit : {"nats", "bits/dim"}
        Of all of these: nats for a sample, or bits for each of its dimensions.
    """

    value: float
    standard_error: float
    L_T: float
    L_t: np.ndarray = field(repr=False)
    exact: bool
    unit: Literal["nats", "bits/dim"]


def variational_bound(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    data: Array,
    *,
    rng: np.random.Generator,
    labels: Array | None = None,
    decoder: Decoder = "density",
    clip: bool = False,
    t_samples: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: bool = True,
) -> Bound:
    """Evaluate the bound on the negative log-likelihood of data, in nats per sample.  (docs: L.1, L.2)

    (Ho et al. 2020, eq. 5.) Every term is an expectation over q(x_t | x_0), for which one x_t is drawn per
    sample and t. The sum over t is either complete, or estimated from L_0 and a few random other t for each
    sample, as L_T + L_0 + (T - 1) * mean(L_t): unbiased, too, and `standard_error` then includes the choice
    of t. The smallest of these t have the largest terms, and few draws fall there: with fewer than 10 T in
    all, n * t_samples, the standard error tends to be too small.

    Parameters
    ----------
    denoise : callable or UNet or MLP
        ``denoise(x, t)``, as for `sample`. Of a tinydiff model the ``predict`` is called, in its dtype.
    diffusion : GaussianDiffusion
        The process; for a shorter chain, one with ``schedule.respace(timesteps)``, and a `denoise` that is
        told the times of the chain it was trained on.
    data : array of shape (n, ...)
        The data set.
    rng : numpy.random.Generator
        Draws the noise, and the random t.
    labels : integer array of shape (n,), optional
        The class of each sample, 0 … num_classes, for a model with `num_classes`: the bound is then on
        -log p(x_0 | y). Default: no classes.
    decoder : {"density", "8bit"}
        What L_0 is: ``"density"``, for points; ``"8bit"``, the probability of 8-bit levels, for images.
    clip : bool
        Clip the predicted x0 to [-1, 1], the range of images.
    t_samples : int, optional
        How many random t, 1 … T-1, for each sample. Default: every t. (A chain of one step has no other.)
    batch_size : int
        How many samples to show the network at a time.
    workers : int, optional
        Processes that share each batch, as in `tinydiff.sample`.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    Bound
        With ``exact`` True if every t was summed.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`, `data` is not an array, or `rng` is not a generator.
    ValueError
        If an argument is out of range or does not fit; the message names it.
    """
    check_decoder(decoder)
    check_counts(batch_size=batch_size)
    if t_samples is not None:
        check_counts(t_samples=t_samples)
    check_network("denoise", denoise)
    check_diffusion(diffusion)
    check_array("data", data)
    check_rng(rng)
    if data.ndim < 2 or data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected (n, ...) with n at least 1.")
    like = weight_of(denoise) if isinstance(denoise, Module) else data
    T, n = diffusion.T, data.shape[0]
    labels = labels_for(denoise, labels, n, "denoise")
    if T == 1:
        t_samples = None  # there is no t but that of L_0
    draws = T - 1 if t_samples is None else t_samples  # for each sample, besides L_0
    share = (T - 1) / max(1, draws)  # of the sum over t >= 1: what one draw stands for

    totals, priors = np.zeros(n), np.zeros(n)
    sums, counts = np.zeros(T), np.zeros(T, dtype=np.int64)
    with (
        many_steps(),
        shared_out(denoise, min(n, batch_size), workers, to_predict=True) as shared,
        progress_bar(progress, total=n * (1 + draws), desc="bound", unit="term", leave=False) as bar,
    ):
        predict: Any = shared.predict if isinstance(denoise, Module) else shared
        for start in range(0, n, batch_size):
            rows = slice(start, min(n, start + batch_size))
            (x0,) = matching(data=asarray_like(data[rows, ...], like))
            check_decoder(decoder, x0)
            N = x0.shape[0]
            told = {} if labels is None else {"labels": labels[rows, ...]}
            priors[rows] = to_numpy(prior_term(diffusion, x0))
            for i in range(1 + draws):
                t = np.full(N, i) if t_samples is None or i == 0 else to_numpy(rng.integers(1, T, size=N))
                x_t = diffusion.q_sample(x0, t, standard_normal(rng, x0.shape, x0))
                output = predict(x_t, integers_like(t, x0), **told)
                terms = to_numpy(step_term(diffusion, output, x0, x_t, t, decoder, clip)[0])
                totals[rows] += terms if i == 0 else share * terms
                np.add.at(sums, t, terms)
                np.add.at(counts, t, 1)
                bar.update(N)
    values = priors + totals
    with np.errstate(invalid="ignore"):  # 0/0 where no t fell: nan, as said
        means = sums / counts
    return Bound(
        value=float(np.mean(values)),
        standard_error=float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        L_T=float(np.mean(priors)),
        L_t=means,
        exact=t_samples is None,
        unit="nats",
    )


def bits_per_dim(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    data: Array,
    *,
    rng: np.random.Generator,
    labels: Array | None = None,
    clip: bool = True,
    t_samples: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: bool = True,
) -> Bound:
    """Evaluate the bound of 8-bit images, in bits for each dimension.  (docs: L.12)

    (Ho et al. 2020, table 1.) It is `variational_bound` with the decoder ``"8bit"``, divided by D log 2. A
    code that knows nothing takes 8 bits.

    Parameters
    ----------
    denoise, diffusion, rng, labels, t_samples, batch_size, workers, progress
        As in `variational_bound`.
    data : array of shape (n, ...)
        8-bit data scaled to [-1, 1].
    clip : bool
        Clip the predicted x0 to [-1, 1].

    Returns
    -------
    Bound
        In bits/dim; its ``exact`` says whether every t was summed.

    Raises
    ------
    TypeError
        As in `variational_bound`.
    ValueError
        If `data` is not 8-bit data, or an argument is out of range; the message names it.
    """
    nats = variational_bound(
        denoise,
        diffusion,
        data,
        rng=rng,
        labels=labels,
        decoder="8bit",
        clip=clip,
        t_samples=t_samples,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    unit = math.prod(data.shape[1:]) * math.log(2)
    return Bound(
        value=nats.value / unit,
        standard_error=nats.standard_error / unit,
        L_T=nats.L_T / unit,
        L_t=nats.L_t / unit,
        exact=nats.exact,
        unit="bits/dim",
    )


def _sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an argument that was broadcast from `shape`."""
    xp = array_namespace(gradient)
    lead = gradient.ndim - len(shape)
    axes = tuple(i for i in range(gradient.ndim) if i < lead or shape[i - lead] != gradient.shape[i])
    return xp.reshape(xp.sum(gradient, axis=axes, keepdims=True), shape) if axes else gradient


def _put(x: Array, rows: np.ndarray, values: Array) -> Array:
    """`x` with some of its rows replaced."""
    xp = array_namespace(x)
    place = np.zeros(x.shape[0], dtype=np.int64)
    place[rows] = np.arange(rows.size)
    chosen = np.zeros(x.shape[0], dtype=bool)
    chosen[rows] = True
    spread = xp.take(values, integers_like(place, x), axis=0)
    mask = xp.reshape(asarray_like(chosen, x, xp.bool), (-1,) + (1,) * (x.ndim - 1))
    return xp.where(mask, spread, x)


def _levels(x: Array, name: str = "x") -> np.ndarray:
    """k = 0 ... 255 of 8-bit data 2 k / 255 - 1, in float64 on the host; ValueError for other data."""
    x_host = to_float64(x)
    level = np.round((x_host + 1) * 127.5)
    with np.errstate(invalid="ignore"):  # inf - inf: nan, which is not close
        known = np.abs(x_host - (level / 127.5 - 1)) < 1e-3
    if not np.all(known & (level >= 0) & (level <= 255)):
        raise ValueError(
            f"{name} holds values that are not 8-bit levels (2 k / 255 - 1 for k = 0 ... 255); expected "
            "8-bit data scaled to [-1, 1]. For other data take the decoder 'density'."
        )
    return level


def check_decoder(decoder: str, data: Array | None = None) -> None:
    """ValueError if there is no such decoder, or `data` is not the 8-bit data it is for."""
    check_choice("decoder", decoder, get_args(Decoder))
    if decoder == "8bit" and data is not None:
        _levels(data, "data")
