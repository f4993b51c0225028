"""From noise to data: ancestral sampling (Ho et al. 2020, algorithm 2) and DDIM (Song, Meng & Ermon 2021).

A sampler takes any callable ``denoise(x, t) -> prediction``: a network, a wrapped model of another
framework, or the exact denoiser of a known density. Fewer steps than the schedule has means walking down a
subsequence of its times, with betas recomputed so that the marginals at those times stay the same.

Both samplers step alike: from x_t and the prediction to a Gaussian, from which the next state is drawn, but
for the last step, which takes its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff.backend import Array, array_namespace, asarray_like, device, get_backend, standard_normal
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.nn.module import Module
from tinydiff.schedules import evenly_spaced_timesteps

__all__ = ["SAMPLERS", "SamplerState", "iterate_samples", "sample"]

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class SamplerState:
    """One state on the way from noise to data.

    Attributes
    ----------
    steps_left : int
        Steps still to be taken; 0: `x` is the sample.
    t : int
        The time of `x`, 0 … T-1; -1: `x` is data.
    x : array of shape (N, ...)
        The state.
    x0 : array of shape (N, ...) or None
        The data predicted on the step that led here; None at the start.
    """

    steps_left: int
    t: int
    x: Array
    x0: Array | None


def iterate_samples(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    shape: tuple[int, ...],
    sampler: str = "ddpm",
    steps: int | None = None,
    *,
    rng: np.random.Generator,
    eta: float = 0.0,
    clip: bool = False,
    x_T: Array | None = None,
) -> Iterator[SamplerState]:
    """Walk from noise to data, handing out every state: the start, then one after each step.

    Parameters, and errors raised, are those of `sample`; the last state holds the sample.

    Returns
    -------
    iterator of SamplerState
        steps + 1 of them. Arguments are checked, and the start is drawn, at the call; a step is taken when
        its state is asked for.
    """
    _check_shape(shape, x_T)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(map(repr, SAMPLERS))}.")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; expected a number in [0, 1].")
    predict = denoise.predict if isinstance(denoise, Module) else denoise
    T = diffusion.schedule.T
    timesteps = evenly_spaced_timesteps(T, T if steps is None else steps)
    walk = GaussianDiffusion(diffusion.schedule.respace(timesteps), diffusion.prediction, diffusion.variance)
    x = standard_normal(rng, shape, _like(denoise)) if x_T is None else x_T
    return _states(predict, walk, timesteps, x, sampler, rng, eta, clip)


def _states(
    predict: Callable[[Array, Array], Array],
    walk: GaussianDiffusion,
    timesteps: np.ndarray,
    x: Array,
    sampler: str,
    rng: np.random.Generator,
    eta: float,
    clip: bool,
) -> Iterator[SamplerState]:
    """Walk from `x` down the respaced chain `walk`, whose step i is the original time timesteps[i]."""
    xp = array_namespace(x)
    yield SamplerState(len(timesteps), int(timesteps[-1]), x, None)
    for i in reversed(range(len(timesteps))):
        t = xp.full((x.shape[0],), int(timesteps[i]), dtype=xp.int64, device=device(x))
        output = predict(x, t)
        x0 = walk.predict_x0(x, i, output)
        x0 = xp.clip(x0, -1.0, 1.0) if clip else x0
        if sampler == "ddpm":
            mean, variance = walk.p_mean_variance(x, i, output, clip)
        else:
            mean, variance = _ddim_mean_variance(walk, x, i, x0, eta)
        # Noise added to the sample itself would only blur it: the last step takes the mean.
        silent = i == 0 or (sampler == "ddim" and eta == 0.0)
        x = mean if silent else mean + xp.sqrt(variance) * standard_normal(rng, x.shape, x)
        yield SamplerState(i, int(timesteps[i - 1]) if i else -1, x, x0)


def _ddim_mean_variance(
    walk: GaussianDiffusion, x: Array, i: int, x0: Array, eta: float
) -> tuple[Array, Array]:
    """sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps,  s = eta x the posterior's deviation.  (docs: R.4)

    Song et al. 2021, eq. 12 and 16; eta = 0 is deterministic, eta = 1 is ancestral with fixed_small.
    """
    abar = float(walk.schedule.alphas_cumprod_prev[i])
    variance = eta**2 * float(walk.schedule.posterior_variance[i])
    eps = walk.predict_eps(x, i, x0, given="x0")
    rest = max(0.0, float(walk.schedule.one_minus_alphas_cumprod_prev[i]) - variance)
    return math.sqrt(abar) * x0 + math.sqrt(rest) * eps, asarray_like(variance, x)


def _check_shape(shape: tuple[int, ...], x_T: Array | None) -> None:
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}; expected (N, ...) with every size at least 1.")
    if x_T is not None and tuple(x_T.shape) != tuple(shape):
        raise ValueError(f"x_T has shape {tuple(x_T.shape)}; expected {tuple(shape)}.")


def _like(denoise: Any) -> Array:
    """An array where the sample is to be: beside a model's weights, else float32 on the default backend."""
    if isinstance(denoise, Module):
        return next(iter(denoise.named_parameters().values())).value
    xp = get_backend()
    return xp.zeros((), dtype=xp.float32)


def sample(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    shape: tuple[int, ...],
    sampler: str = "ddpm",
    steps: int | None = None,
    *,
    rng: np.random.Generator,
    eta: float = 0.0,
    clip: bool = False,
    x_T: Array | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Array:
    """Draw samples.

    Parameters
    ----------
    denoise : callable or UNet or MLP
        ``denoise(x, t)`` with x (N, ...) and t (N,), times of `diffusion`'s schedule (0 … T-1, also with
        fewer `steps`), returns what `diffusion.prediction` names. A tinydiff model is asked by its
        ``predict``.
    diffusion : GaussianDiffusion
        The process that is reversed.
    shape : tuple of int
        Shape (N, ...) of the result.
    sampler : {"ddpm", "ddim"}
        Ancestral (Ho et al. 2020, algorithm 2), or DDIM (Song et al. 2021, eq. 12).
    steps : int, optional
        How many of the schedule's T times to walk through, evenly spaced. Default: all of them.
    rng : numpy.random.Generator
        Draws the starting noise and the noise of every step.
    eta : float
        DDIM only, in [0, 1]: 0 adds no noise, 1 as much as the posterior has.
    clip : bool
        Clip each predicted x0 to [-1, 1], the range of images.
    x_T : array of shape `shape`, optional
        The start. Default: drawn from N(0, I), in float32, beside the model's weights or, for another
        callable, on the default backend (``TINYDIFF_BACKEND``).
    batch_size : int, optional
        How many samples to walk at a time. Default: all. A part of what the samples depend on: noise is
        drawn batch after batch.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    array of shape `shape`

    Raises
    ------
    ValueError
        If an argument is out of its range or shapes do not fit; the message names the argument.

    Notes
    -----
    Two differences from diffusers' schedulers. They space their times differently by default ("leading");
    here both ends of the schedule are always walked through, as in Nichol & Dhariwal (2021, section 4). And
    with `clip`, DDIM's eps is taken from the clipped x0, so that the two belong together; there only with
    ``use_clipped_model_output=True``.
    """
    from tqdm import tqdm

    _check_shape(shape, x_T)
    total = shape[0]
    size = total if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    starts = range(0, total, size)
    parts = []
    steps_in_all = (diffusion.schedule.T if steps is None else steps) * len(starts)
    with tqdm(total=steps_in_all, desc="sampling", unit="step", disable=not progress, leave=False) as bar:
        for start in starts:
            stop = min(total, start + size)
            states = iterate_samples(
                denoise,
                diffusion,
                (stop - start, *shape[1:]),
                sampler,
                steps,
                rng=rng,
                eta=eta,
                clip=clip,
                x_T=None if x_T is None else x_T[start:stop, ...],
            )
            for state in states:
                bar.update(0 if state.x0 is None else 1)
            parts.append(state.x)
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=0)
