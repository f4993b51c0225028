"""How likely a network holds data to be: the density at the other end of the probability-flow ODE.

In the clock phi, tan phi = s/a, the ODE that takes data to noise has the network's v for its velocity. Where
the flow spreads, the density thins (Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39):

    dx/dphi = v(x, phi)                d log p(x(phi)) / dphi = -tr dv/dx

At the end the density is that of the noise. So, with phi_T the last angle of the schedule (docs: R.13),

    log p(x) = log N(x(phi_T); 0, I) + integral of tr dv/dx over phi from 0 to phi_T

The trace comes from products z' dv/dx, each of them one pass through the network's hand-written backward:
exactly, with the D unit vectors for z; or as a mean over random signs, since E z z' = I (docs: R.14).

References
----------
Chen et al. 2018, *Neural ordinary differential equations*.
Song et al. 2021, *Score-based generative modeling through stochastic differential equations*.
Hutchinson 1989, *A stochastic estimator of the trace of the influence matrix*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinydiff._checks import check_batch, check_counts, check_network, check_rng
from tinydiff._progress import progress_bar
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    device,
    standard_normal,
    sum_samples,
    to_float64,
)
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.kernels import many_steps
from tinydiff.models._checks import answer_of, check_like_model, labels_for, without_rng
from tinydiff.nn.module import Module
from tinydiff.samplers import Steps, angles, check_signal, respaced

__all__ = ["ode_log_likelihood"]


@many_steps()
def ode_log_likelihood(
    model: Callable[[Array, Array], tuple[Array, Callable[[Array], Array]]],
    diffusion: GaussianDiffusion,
    x: Array,
    steps: Steps = None,
    *,
    labels: Array | None = None,
    probes: int | None = None,
    rng: np.random.Generator | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Log-density under the probability-flow ODE, by the instantaneous change of variables.

    Heun's rule takes x and the integral of the trace together from the data to the noise, over the times of
    the schedule and nothing in between. The error falls as 1 / steps^2, except that of the piece before the
    first time: that is one step whatever `steps` is, and needs data that is smooth at the scale of the first
    time's noise.  (docs: R.13, R.14)

    Parameters
    ----------
    model : UNet or MLP, or any callable
        ``output, backward = model(x, t)``, the contract of every tinydiff model: ``backward(dy)`` is the
        gradient with respect to x. The gradients of a model's parameters are left as they were; those of a
        model within another function are added to.
    diffusion : GaussianDiffusion
        The process. The second half of a network with learned variances plays no part in the ODE.
    x : array of shape (N, ...)
        Data.
    steps : int or sequence of int, optional
        How many of the schedule's T times to walk through, evenly spaced; or which, increasing. Default: all.
    labels : integer array of shape (N,), optional
        The class of each sample, for a model with `num_classes`: the result is then log p(x | y). Default: no
        classes.
    probes : int, optional
        Number of random sign vectors in Hutchinson's estimate of the trace, each drawn once for the whole
        way. It gives the log-density no bias, and a variance that falls as 1 / probes. Default: none; the
        trace is then exact, and takes as many passes as a sample has numbers.
    rng : numpy.random.Generator
        Draws the signs; needed with `probes` only.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    ndarray of float64, shape (N,), on the host
        log p(x) in nats. For images in [-1, 1] that is a density: to compare with bits per dimension of 8-bit
        data, add uniform noise of one grey level's width first, and D log(127.5) to minus the result.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`, `x` is not an array, `model` returns no derivative,
        or `rng` is not a generator where `probes` needs one.
    ValueError
        If an argument is out of its range or does not fit; the message names the argument.

    Notes
    -----
    The network knows no angle below the first, phi_0. The first step, from phi = 0, takes 0 for the velocity
    at the data. That is its limit where the density is smooth: E[x_0 | x_t] is then x_t up to s^2, and
    v = (a x_t - x_0) / s vanishes. The density found is that of such data.

    The density at the end is taken to be N(0, I), from which samplers start. It is not quite that where some
    signal is left: the log-density is off by about sqrt(abar_T), 0.006 for the linear schedule of 1000 steps
    and 5e-5 for the cosine one.
    """
    if probes is not None:
        check_counts(probes=probes)
        check_rng(rng)
    check_network("model", model)
    check_like_model(model, "x", x)
    check_batch("x", x)
    labels = labels_for(model, labels, x.shape[0])
    told = () if labels is None else (labels,)

    def network(x: Array, t: Array) -> tuple[Array, Callable[[Array], Array]]:
        return answer_of(model, *without_rng(x, t, *told))

    walk, timesteps = respaced(diffusion, steps)
    check_signal(walk, timesteps)
    phi = np.concat([[0.0], angles(walk)])
    directions = list(_signs(x, probes, rng)) if probes is not None else None
    v, trace = 0.0 * x, np.zeros(x.shape[0])
    integral = np.zeros(x.shape[0])
    with _gradients_kept(model):
        for i in progress_bar(progress, range(walk.T), desc="likelihood", unit="step", leave=False):
            step = float(phi[i + 1] - phi[i])
            if i:
                v, trace = _velocity_and_trace(network, walk, x, i - 1, timesteps, directions)
            v_next, trace_next = _velocity_and_trace(network, walk, x + step * v, i, timesteps, directions)
            x = x + step / 2 * (v + v_next)
            integral += step / 2 * (trace + trace_next)
    log_normal = -to_float64(sum_samples(x * x + math.log(2 * math.pi))) / 2
    return log_normal + integral


def _velocity_and_trace(
    network: Callable[[Array, Array], tuple[Array, Callable[[Array], Array]]],
    walk: GaussianDiffusion,
    x: Array,
    i: int,
    timesteps: np.ndarray,
    directions: list[Array] | None,
) -> tuple[Array, np.ndarray]:
    """v at step i of the walk, and the trace of dv/dx: exact, or the mean of z' dv/dx z over `directions`."""
    xp = array_namespace(x)
    t = xp.full(x.shape[0], int(timesteps[i]), device=device(x))
    trace = np.zeros(x.shape[0])
    for z in _unit_vectors(x) if directions is None else directions:
        output, backward = network(x, t)  # once for each z: a backward can be called only once
        # v is linear, p x + q output with numbers p and q; so are its derivatives, applied to z.
        dx = walk.predict_v(z, i, 0.0 * z, given=walk.prediction)
        doutput = walk.predict_v(0.0 * z, i, z, given=walk.prediction)
        if walk.variance == "learned_range":
            doutput = xp.concat([doutput, 0.0 * z], axis=-1)
        trace += to_float64(sum_samples(z * (dx + backward(doutput))))
    v = walk.predict_v(x, i, output)
    return v, trace if directions is None else trace / len(directions)


def _unit_vectors(x: Array) -> Iterator[Array]:
    """The D unit vectors of one sample's shape, each for all of the batch."""
    xp = array_namespace(x)
    D = math.prod(x.shape[1:])
    for d in range(D):
        unit = np.zeros(D)
        unit[d] = 1.0
        yield xp.zeros_like(x) + asarray_like(unit.reshape(x.shape[1:]), x)


def _signs(x: Array, probes: int, rng: Any) -> Iterator[Array]:
    """Random signs of x's shape."""
    xp = array_namespace(x)
    for _ in range(probes):
        yield xp.where(standard_normal(rng, x.shape, x) < 0, -xp.ones_like(x), xp.ones_like(x))


@contextmanager
def _gradients_kept(model: Any) -> Iterator[None]:
    """Give a model's parameters back the gradients they had: a backward adds to them."""
    parameters = list(model.named_parameters().values()) if isinstance(model, Module) else []
    kept = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
