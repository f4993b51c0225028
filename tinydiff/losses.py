"""From a network's output to a scalar and its gradient."""

from __future__ import annotations

import math

from tinydiff.backend import Array, array_namespace
from tinydiff.diffusion import GaussianDiffusion

__all__ = ["mean_squared_error", "simple_loss"]


def mean_squared_error(output: Array, target: Array) -> tuple[Array, Array]:
    """L = mean (output - target)^2,  dL/doutput = 2 (output - target) / size.  (docs: B.20)

    Parameters
    ----------
    output, target : array
        The same shape, any; `target` is cast to `output`'s dtype.

    Returns
    -------
    value : array, 0-d
        The mean over every element of the batch.
    gradient : array
        dL/doutput, of `output`'s shape and dtype.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"output has shape {tuple(output.shape)}; expected {tuple(target.shape)}, the target's."
        )
    xp = array_namespace(output)
    difference = output - xp.astype(target, output.dtype, copy=False)
    return xp.mean(difference * difference), difference * (2.0 / math.prod(output.shape))


def simple_loss(
    diffusion: GaussianDiffusion, output: Array, x0: Array, t: Array, noise: Array
) -> tuple[Array, Array]:
    """L_simple (Ho et al. 2020, eq. 14): squared error on what the diffusion's `prediction` names.

    The target is `noise` for ``"eps"``, `x0` for ``"x0"`` and sqrt(abar_t) noise - sqrt(1 - abar_t) x0 for
    ``"v"``. Ho et al. write the sum over dimensions; here, as in their code, it is the mean.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        Decides the target.
    output : array of shape (N, ...)
        What the network returned for x_t = ``diffusion.q_sample(x0, t, noise)``.
    x0, noise : array of shape (N, ...)
        Data and standard normal noise.
    t : integer array of shape (N,)
        Times, 0 … T-1.

    Returns
    -------
    value : array, 0-d
    gradient : array of shape (N, ...)
        dL/doutput.

    Raises
    ------
    ValueError
        If a shape or `t` does not fit; the message names the argument.
    """
    return mean_squared_error(output, diffusion.training_target(x0, t, noise))
