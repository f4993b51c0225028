"""From a network's output to a scalar and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_array, check_labels, check_number
from tinydiff.backend import Array, array_namespace, asarray_like, integers_like, is_numpy_array, to_numpy
from tinydiff.bound import Decoder, step_term
from tinydiff.diffusion import GaussianDiffusion, check_diffusion

__all__ = ["cross_entropy", "hybrid_loss", "mean_squared_error", "min_snr_weight", "simple_loss", "vlb_loss"]


def mean_squared_error(output: Array, target: Array) -> tuple[Array, Array]:
    """L = mean (output - target)^2,  dL/doutput = 2 (output - target) / size.  (docs: B.20)

    Parameters
    ----------
    output, target : array
        The same shape, any but an empty one; `target` is cast to `output`'s dtype.

    Returns
    -------
    value : array, 0-d
        The mean over every element of the batch.
    gradient : array
        dL/doutput, of `output`'s shape and dtype.

    Raises
    ------
    ValueError
        If the shapes differ, or hold no number.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"output has shape {tuple(output.shape)}; expected {tuple(target.shape)}, the target's."
        )
    size = math.prod(output.shape)
    if size == 0:
        raise ValueError(f"output has shape {tuple(output.shape)}; expected at least one number.")
    xp = array_namespace(output)
    if target.dtype != output.dtype:
        target = xp.astype(target, output.dtype)
    difference = output - target
    return xp.sum(difference * difference) / size, difference * (2.0 / size)


def simple_loss(
    diffusion: GaussianDiffusion,
    output: Array,
    x0: Array,
    t: Array,
    noise: Array,
    weights: Array | None = None,
) -> tuple[Array, Array]:
    """L_simple: squared error on what the diffusion's `prediction` names.  (docs: L.9)

    (Ho et al. 2020, eq. 14.) The target is `noise` for ``"eps"``, `x0` for ``"x0"``,
    sqrt(abar_t) noise - sqrt(1 - abar_t) x0 for ``"v"`` and noise - x0 for ``"flow"``. Ho et al. write the
    sum over dimensions; here, as in their code, it is the mean.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        Decides the target.
    output : array of shape (N, ...); with learned variance twice that on the last axis
        What the network returned for x_t = ``diffusion.q_sample(x0, t, noise)``.
    x0 : array of shape (N, ...)
        Data.
    t : integer array of shape (N,)
        Times, 0 … T-1.
    noise : array of shape (N, ...)
        Standard normal noise.
    weights : array of shape (N,), optional
        What each sample's squared error counts for, e.g. ``min_snr_weight(diffusion, t)``. Default: 1.

    Returns
    -------
    value : array, 0-d
    gradient : array of `output`'s shape
        dL/doutput; 0 on the half that is a learned variance, of which this loss knows nothing.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`; or if `output`, `x0`, `noise` or `weights` is no array,
        or the first three are not all of one library.
    ValueError
        If a shape or `t` does not fit; the message names the argument.
    """
    check_diffusion(diffusion)
    target = diffusion.training_target(x0, t, noise)
    prediction, nu = diffusion.split_output(x0, output)
    if weights is None:
        value, gradient = mean_squared_error(prediction, target)
    else:
        root = _column("weights", weights, prediction) ** 0.5  # w d^2 is the square of w^1/2 d
        value, gradient = mean_squared_error(root * prediction, root * target)
        gradient = root * gradient
    if nu is None:
        return value, gradient
    xp = array_namespace(output)
    return value, xp.concat([gradient, xp.zeros_like(gradient)], axis=-1)


def min_snr_weight(diffusion: GaussianDiffusion, t: Array, gamma: float = 5.0) -> np.ndarray:
    """Min-SNR weights for `simple_loss` (Hang et al. 2023).  (docs: L.10)

    A squared error of x0 counts min(snr_t, gamma) times. That of eps is snr times as large, that of v snr + 1
    times, that of the flow (sqrt(snr) + 1)^2 times, so the weight depends on what the network predicts:

        x0: min(snr, gamma)     eps: min(1, gamma / snr)     v: min(snr, gamma) / (snr + 1)

        flow: min(snr, gamma) / (sqrt(snr) + 1)^2

    Parameters
    ----------
    diffusion : GaussianDiffusion
        Its schedule and its `prediction`.
    t : integer array of shape (N,)
        Times, 0 … T-1.
    gamma : float
        Cap of the weight of x0's error, greater than 0.

    Returns
    -------
    ndarray of shape (N,)
        float64, on the host.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`.
    ValueError
        If `gamma` is not positive, or `t` is out of range.
    """
    check_diffusion(diffusion)
    check_number("gamma", gamma, lambda value: 0 < value < math.inf, "a finite number greater than 0")
    steps = to_numpy(t)
    if steps.dtype.kind not in "iu" or np.any((steps < 0) | (steps >= diffusion.T)):
        raise ValueError(f"t is {steps}; expected integers in 0 ... {diffusion.T - 1}.")
    snr = diffusion.schedule.snr[steps]
    if diffusion.prediction == "x0":
        return np.minimum(snr, gamma)
    if diffusion.prediction == "eps":
        return gamma / np.maximum(snr, gamma)
    if diffusion.prediction == "v":
        return np.minimum(snr, gamma) / (snr + 1)
    return np.minimum(snr, gamma) / (np.sqrt(snr) + 1) ** 2


def vlb_loss(
    diffusion: GaussianDiffusion,
    output: Array,
    x0: Array,
    t: Array,
    noise: Array,
    *,
    decoder: Decoder = "density",
    weights: Array | None = None,
    record: Callable[[Array], None] | None = None,
) -> tuple[Array, Array]:
    """L_vlb, estimated from random t, in bits per dimension.  (docs: V.4)

    (Nichol & Dhariwal 2021, section 3.) T * mean over the batch of (weight * L_t) / (D log 2): with t uniform
    and weights of 1, or with the t and the weights of a `LossSecondMomentSampler`, it is an unbiased estimate
    of the bound without L_T, in which no network's output has a part.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        The process, with any `prediction` and `variance`.
    output : array of shape (N, ...); with learned variance twice that on the last axis
        What the network returned for x_t = ``diffusion.q_sample(x0, t, noise)``.
    x0 : array of shape (N, ...)
        Data.
    t : integer array of shape (N,)
        Times, 0 … T-1.
    noise : array of shape (N, ...)
        Standard normal noise.
    decoder : {"density", "8bit"}
        What L_0 is: the density of points, or the probability of 8-bit levels.
    weights : array of shape (N,), optional
        1 / (T p_t) if t was drawn with probabilities p_t. Default: 1.
    record : callable, optional
        Called with L_t of each sample (N,), in nats and without weight: what a `LossSecondMomentSampler` is
        to remember.

    Returns
    -------
    value : array, 0-d
    gradient : array of `output`'s shape
        dL/doutput.

    Raises
    ------
    TypeError, ValueError
        As `tinydiff.bound.step_term`.
    """
    check_diffusion(diffusion)
    terms, backward = step_term(diffusion, output, x0, diffusion.q_sample(x0, t, noise), t, decoder)
    xp = array_namespace(terms)
    if record is not None:
        record(terms)
    N = x0.shape[0]
    scale = xp.full_like(terms, diffusion.T * N / (math.prod(x0.shape) * math.log(2)))
    if weights is not None:
        scale = scale * _column("weights", weights, terms)
    return xp.mean(scale * terms), backward(scale / N)


def hybrid_loss(
    diffusion: GaussianDiffusion,
    output: Array,
    x0: Array,
    t: Array,
    noise: Array,
    *,
    vlb_weight: float = 1e-3,
    decoder: Decoder = "density",
    weights: Array | None = None,
) -> tuple[Array, Array]:
    """L_hybrid = L_simple + lambda L_vlb, with the mean's gradient stopped in L_vlb.  (docs: V.5)

    (Nichol & Dhariwal 2021, eq. 16.) L_simple teaches the prediction and L_vlb the variance. The mean
    depends only on the first half of the output, and the variance only on the second, so to stop the mean's
    gradient is to take L_vlb's on the second half only.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        The process, with ``variance="learned_range"``.
    output : array of shape (N, ..., 2 C)
        What the network returned for x_t = ``diffusion.q_sample(x0, t, noise)``: prediction and nu.
    x0, noise : array of shape (N, ..., C)
        Data and standard normal noise.
    t : integer array of shape (N,)
        Times, 0 … T-1, drawn uniformly.
    vlb_weight : float
        lambda, finite and not negative.
    decoder : {"density", "8bit"}
        What L_0 is: the density of points, or the probability of 8-bit levels.
    weights : array of shape (N,), optional
        Of L_simple, e.g. ``min_snr_weight(diffusion, t)``.

    Returns
    -------
    value : array, 0-d
    gradient : array of `output`'s shape
        dL/doutput with the mean held fixed in L_vlb: not the derivative of `value`.

    Raises
    ------
    TypeError
        As `simple_loss`.
    ValueError
        If the variance is not learned, or `vlb_weight` is out of range; or as `simple_loss` and `vlb_loss`.
    """
    check_diffusion(diffusion)
    check_number(
        "vlb_weight", vlb_weight, lambda weight: 0 <= weight < math.inf, "a finite number, not negative"
    )
    if diffusion.variance != "learned_range":
        raise ValueError(f"diffusion has variance {diffusion.variance!r}; expected 'learned_range'.")
    simple, simple_gradient = simple_loss(diffusion, output, x0, t, noise, weights)
    xp = array_namespace(simple_gradient)
    vlb, vlb_gradient = vlb_loss(diffusion, output, x0, t, noise, decoder=decoder)
    C, weight = x0.shape[-1], float(vlb_weight)  # a NumPy number would make float64 of float32
    gradient = xp.concat([simple_gradient[..., :C], weight * vlb_gradient[..., C:]], axis=-1)
    return simple + weight * vlb, gradient


def _column(name: str, values: Array, x: Array) -> Array:
    """Weights (N,) as (N, 1, ..., 1) beside `x`.

    TypeError unless they are an array; ValueError for another shape or, on the host, below 0.
    """
    check_array(name, values)
    N = x.shape[0]
    if tuple(values.shape) != (N,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; expected ({N},), one for each of the batch."
        )
    if is_numpy_array(values) and not np.all(values >= 0):
        raise ValueError(f"{name} holds {np.min(values)}; expected numbers of at least 0.")
    column = asarray_like(values, x)
    return array_namespace(x).reshape(column, (N,) + (1,) * (x.ndim - 1))


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """L = mean over n of -log p_n[label_n],  p = softmax(logits),  dL/dlogits = (p - onehot(labels)) / N.

    By the derivative of the softmax (docs: B.14). With z the logits, -log p_y = log sum_k exp(z_k) - z_y,
    whose derivative with respect to z_k is exp(z_k) / sum_j exp(z_j) - [k = y]. The largest logit is
    subtracted first: that changes nothing, and no exponential overflows.

    Parameters
    ----------
    logits : array of shape (N, K)
        Unnormalised log-probabilities of K classes; -inf is a class that cannot be.
    labels : integer array of shape (N,)
        The true classes, 0 … K-1.

    Returns
    -------
    value : array, 0-d
        In nats, the mean over the batch.
    gradient : array of shape (N, K)
        dL/dlogits, of `logits`' dtype.

    Raises
    ------
    ValueError
        If a shape does not fit, the batch is empty, or a label is not one of 0 … K-1.
    TypeError
        If the labels are not integers.
    """
    shape = tuple(logits.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"logits has shape {shape}; expected (N, K), not empty.")
    host = to_numpy(labels)
    check_labels(host, shape[1], shape[0])
    xp = array_namespace(logits)
    labels = integers_like(host.astype(np.int64), logits)
    classes = integers_like(np.arange(shape[1]), logits)
    labelled = xp.expand_dims(labels, axis=1) == classes
    onehot = xp.astype(labelled, logits.dtype)
    z = logits - xp.max(logits, axis=1, keepdims=True)
    exp = xp.exp(z)
    total = xp.sum(exp, axis=1, keepdims=True)
    log_p = z - xp.log(total)
    value = -xp.sum(xp.where(labelled, log_p, xp.zeros_like(log_p))) / shape[0]  # 0 log 0 is NaN
    return value, (exp / total - onehot) / shape[0]
