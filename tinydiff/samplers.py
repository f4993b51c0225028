"""From noise to data: one formula, and a table of samplers.

A sampler takes any callable ``denoise(x, t) -> prediction``: a network, a wrapped model of another
framework, or the exact denoiser of a known density. To take fewer steps than the schedule has is to walk down
a subsequence of its times, with betas recomputed so that the marginals at those times stay the same.

At x, whose rates of signal and noise are a and s, one has an estimate D of the data, and with it one of the
noise, since x = a D + s eps. The next state, of rates a' and s', is made of the same two (docs: R.4):

    x' = a' D + sqrt(s'^2 - c^2) eps + C z,       eps = (x - a D) / s

Of the noise that x' is to have, c^2 is renewed: taken out of eps and put back as C z, with fresh z. With x0
the network's estimate, h = log(a'/s') - log(a/s) the step in half the log-SNR, beta~ the posterior's variance
and sigma^2 the model's:

    sampler   D                                       c^2           C^2       source
    -------   -------------------------------------   -----------   -------   ------------------------------
    ddpm      x0                                      beta~         sigma^2   Ho et al. 2020, algorithm 2
    ddim      x0                                      eta^2 beta~   c^2       Song, Meng & Ermon 2021, eq. 12
    dpm++     x0 + h / (2 h_before) (x0 - x0_before)  0             0         Lu et al. 2022, algorithm 2
    edm       x - s (eps + eps') / 2, over a          0             0         Karras et al. 2022, algorithm 1

Where c = C = 0 the walk follows the probability-flow ODE (docs: R.7). Four clocks may time it, in each of
which, with x scaled to fit, one of the four predictions is the velocity (docs: R.7, R.16):

    d(x/a) = eps d(s/a),       d(x/s) = x0 d(a/s),       dx = v dphi,  tan phi = s/a,
    d(x/(a+s)) = flow d(s/(a+s))

ddim is Euler's rule in all of them but the third. edm is Heun's rule in the first: eps' is the noise seen
from where ddim would have gone. The first clock is infinite at pure noise, the second at the data. The third
runs from 0 to a quarter turn, and heun is Heun's rule in it, with the same look ahead (docs: R.11):

    x' = x + (phi' - phi) (v + v') / 2

The fourth runs from 0 to 1. It is the time of flow matching, whose Euler steps are therefore ddim's.

The last step, to the data, is the same for all: x' = x0.

References
----------
Ho, Jain & Abbeel 2020, *Denoising diffusion probabilistic models*.
Song, Meng & Ermon 2021, *Denoising diffusion implicit models*.
Lu et al. 2022, *DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models*.
Karras et al. 2022, *Elucidating the design space of diffusion-based generative models*.
Liu, Gong & Liu 2023, *Flow straight and fast: learning to generate and transfer data with rectified flow*.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import (
    check_batch,
    check_choice,
    check_counts,
    check_network,
    check_number,
)
from tinydiff._graph import WARM_UP, forget, predictor
from tinydiff._progress import progress_bar
from tinydiff.backend import (
    Array,
    array_namespace,
    clip_to_unit,
    device,
    get_backend,
    standard_normal,
)
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.guidance import guided
from tinydiff.kernels import many_steps
from tinydiff.memory import attempted, what_fits
from tinydiff.models._checks import check_like_model, labels_for, num_classes_of
from tinydiff.nn.module import Module, weight_of
from tinydiff.parallel import shared_out
from tinydiff.schedules import checked_timesteps, evenly_spaced_timesteps

__all__ = [
    "SAMPLERS",
    "SamplerState",
    "Steps",
    "angles",
    "check_signal",
    "extrapolation_weights",
    "invert",
    "iterate_samples",
    "respaced",
    "sample",
    "step_lengths",
]

SAMPLERS = ("ddpm", "ddim", "dpm++", "heun", "edm")

Steps: TypeAlias = int | Sequence[int] | np.ndarray | None  # how many of the times, or which; None: all

# By how much "edm" may divide s/a in its first step. At 158 the distance of its samples from data was 0.15,
# where that of "heun" is 0.022; at 63 it was 0.028 (the exact network of two Gaussians, T = 100).
LARGEST_LEAP = 100

# How much of the data's variance may be left where a walk begins with pure noise.
LEFT = 0.1


@dataclass(frozen=True, eq=False)
class SamplerState:
    """One state on the way from noise to data.

    Attributes
    ----------
    steps_left : int
        Steps still to be taken; 0: `x` is the sample.
    t : int
        The time of `x`, 0 … T-1; -1: `x` is data.
    x : array of shape (N, ...)
        The state. It may be written into: the walk goes on from what it holds when the next one is asked for.
    x0 : array of shape (N, ...) or None
        The data predicted where the step that led here began; None at the start.
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
    steps: Steps = None,
    *,
    rng: np.random.Generator,
    eta: float = 0.0,
    clip: bool = False,
    x_T: Array | None = None,
    labels: Array | None = None,
    guidance_scale: float = 1.0,
) -> Iterator[SamplerState]:
    """Walk from noise to data, handing out every state: the start, then one after each step.  (docs: R.4)

    The last state holds the sample. Parameters are those of `sample`.

    Returns
    -------
    iterator of SamplerState
        One more than there are steps. Arguments are checked, and the start is drawn, at the call; a step is
        taken when its state is asked for.

    Raises
    ------
    TypeError, ValueError
        As in `sample`.
    """
    _check_start(denoise, shape, x_T)
    labels = _checked_labels(denoise, shape[0], labels, guidance_scale)
    check_choice("sampler", sampler, SAMPLERS)
    check_number("eta", eta, lambda value: 0 <= value <= 1, "a number in [0, 1]")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is {eta}; expected 0: the sampler {sampler!r} has none, only 'ddim' has.")
    walk, timesteps = respaced(diffusion, steps)
    if sampler == "edm" and walk.schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"sampler is 'edm', whose clock s/a is infinite at t = {timesteps[-1]}, where alphas_cumprod is "
            "0; expected one of the others ('heun' has a clock that is finite there)."
        )
    check_signal(walk, timesteps)
    estimate = _estimator(_asked(denoise, walk, labels, guidance_scale), walk, timesteps, clip)
    if x_T is None:
        x = standard_normal(rng, shape, _like(denoise))
    else:  # a copy, through which PyTorch differentiates: whoever is handed a state may write into it
        x = array_namespace(x_T).astype(x_T, x_T.dtype)
    return _states(estimate, walk, timesteps, x, sampler, rng, eta, clip)


def _states(
    estimate: Callable[[Array, int], tuple[Array, Array]],
    walk: GaussianDiffusion,
    timesteps: np.ndarray,
    x: Array,
    sampler: str,
    rng: np.random.Generator,
    eta: float,
    clip: bool,
) -> Iterator[SamplerState]:
    """Walk from `x` down the respaced chain `walk`, whose step i is the original time timesteps[i]."""
    renewed = {"ddpm": 1.0, "ddim": eta**2}.get(sampler, 0.0) * walk.schedule.posterior_variance
    a2, s2 = walk.schedule.alphas_cumprod_prev, walk.schedule.one_minus_alphas_cumprod_prev  # of x'
    weight = extrapolation_weights(walk) if sampler == "dpm++" else np.zeros(walk.T)
    x0_before: Array = None
    yield SamplerState(len(timesteps), int(timesteps[-1]), x, None)
    for i in reversed(range(walk.T)):
        output, x0 = estimate(x, i)
        D = x0 + float(weight[i]) * (x0 - x0_before) if weight[i] else x0
        eps = walk.predict_eps(x, i, D, given="x0")
        x_next = math.sqrt(a2[i]) * D + math.sqrt(max(0.0, s2[i] - renewed[i])) * eps
        # Noise added to the sample itself would only blur it: the last step adds none.
        if i and (sampler == "ddpm" or renewed[i]):
            C = _deviation(walk, x, i, output) if sampler == "ddpm" else math.sqrt(renewed[i])
            x_next = x_next + C * standard_normal(rng, x.shape, x)
        if i and sampler in ("heun", "edm"):
            output_next, x0_next = estimate(x_next, i - 1)
            slope, step = (walk.predict_v, _heun) if sampler == "heun" else (walk.predict_eps, _edm)
            if clip:
                here, there = slope(x, i, x0, given="x0"), slope(x_next, i - 1, x0_next, given="x0")
            else:  # from the answer itself: by way of x_0, whose rounding is divided by s, digits are lost
                here, there = slope(x, i, output), slope(x_next, i - 1, output_next)
            x_next = step(walk, i, x, (here + there) / 2)
        x, x0_before = x_next, x0
        yield SamplerState(i, int(timesteps[i - 1]) if i else -1, x, x0)


def _heun(walk: GaussianDiffusion, i: int, x: Array, v: Array) -> Array:
    """x + (phi' - phi) v, with the mean of v and v': the trapezoid in the clock of v.  (docs: R.11)"""
    phi = angles(walk)
    return x + float(phi[i - 1] - phi[i]) * v


def _edm(walk: GaussianDiffusion, i: int, x: Array, eps: Array) -> Array:
    """The step of ddim with the mean of eps and eps': the trapezoid in the clock of eps.  (docs: R.11)"""
    return walk.q_sample(walk.predict_x0(x, i, eps, given="eps"), i - 1, eps)


def _deviation(walk: GaussianDiffusion, x: Array, i: int, output: Array) -> Array | float:
    """The square root of the model's variance: one number for all, or an array if it is learned."""
    if walk.model_variance is not None:
        return math.sqrt(walk.model_variance[i])
    return array_namespace(x).exp(walk.model_log_variance(x, i, output) / 2)


def extrapolation_weights(walk: GaussianDiffusion) -> np.ndarray:
    """h / (2 h_before) of every step, (T,), float64 on the host.  (docs: R.10)

    It is 0, and the step of first order, where there is no step before, and where a step is infinitely long
    in the log-SNR: to the data (i = 0), and from pure noise.
    """
    h = step_lengths(walk)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.append(h[:-1] / h[1:] / 2, 0.0)
    return np.where(np.isfinite(weight), weight, 0.0)


def step_lengths(walk: GaussianDiffusion) -> np.ndarray:
    """h of every step, what log(a/s) gains in it, (T,), float64 on the host.  (docs: R.10)"""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log(walk.schedule.alphas_cumprod) - np.log(walk.schedule.one_minus_alphas_cumprod)
        return -np.diff(log_snr, prepend=np.inf) / 2


def angles(diffusion: GaussianDiffusion) -> np.ndarray:
    """phi_t = arctan(s/a), the clock in which v is the velocity: (T,), float64 on the host.  (docs: R.7)"""
    abar, one_minus_abar = diffusion.schedule.alphas_cumprod, diffusion.schedule.one_minus_alphas_cumprod
    return np.arctan2(np.sqrt(one_minus_abar), np.sqrt(abar))


def respaced(diffusion: GaussianDiffusion, steps: Steps) -> tuple[GaussianDiffusion, np.ndarray]:
    """The process on some of its times, and those times: all, `steps` of them evenly spaced, or `steps`."""
    check_diffusion(diffusion)
    how_many: Any = diffusion.T if steps is None else steps
    if np.ndim(how_many) == 0:
        timesteps = evenly_spaced_timesteps(diffusion.T, how_many)
    else:
        timesteps = checked_timesteps("steps", steps, diffusion.T)
    schedule = diffusion.schedule.respace(timesteps)
    return GaussianDiffusion(schedule, diffusion.prediction, diffusion.variance), timesteps


def check_signal(walk: GaussianDiffusion, timesteps: np.ndarray) -> None:
    """ValueError if eps is predicted where the walk meets pure noise: it says nothing of x0.  (docs: F.7)"""
    if walk.prediction == "eps" and walk.schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"diffusion has prediction 'eps', which says nothing of x0 at t = {timesteps[-1]}, where "
            "alphas_cumprod is 0; expected 'x0', 'v' or 'flow', or steps that end before."
        )


def _asked(
    denoise: Any, walk: GaussianDiffusion, labels: Array | None, guidance_scale: float
) -> Callable[[Array, Array], Array]:
    """How the network is asked for its prediction: of x and t, whatever else it is told."""
    predict = predictor(denoise) if isinstance(denoise, Module) else denoise
    if labels is None:
        return predict
    return guided(predict, walk, labels, guidance_scale, num_classes_of(denoise))


def _estimator(
    predict: Callable[[Array, Array], Array], walk: GaussianDiffusion, timesteps: np.ndarray, clip: bool
) -> Callable[[Array, int], tuple[Array, Array]]:
    """(x, i) -> what the network says of x at step i of the walk, and the data it means."""

    def estimate(x: Array, i: int) -> tuple[Array, Array]:
        t = array_namespace(x).full(x.shape[0], int(timesteps[i]), device=device(x))
        output = predict(x, t)
        x0 = walk.predict_x0(x, i, output)
        return output, clip_to_unit(x0) if clip else x0

    return estimate


def _check_start(denoise: Any, shape: tuple[int, ...], x_T: Array | None) -> None:
    check_network("denoise", denoise)
    sizes = shape if np.ndim(shape) == 1 else ()
    if len(sizes) == 0 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in sizes):
        raise ValueError(f"shape is {shape!r}; expected (N, ...), integers of at least 1.")
    if x_T is not None:
        check_like_model(denoise, "x_T", x_T)
        if tuple(x_T.shape) != tuple(shape):
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}; expected {tuple(shape)}.")


def _checked_labels(denoise: Any, n: int, labels: Array | None, guidance_scale: float) -> Array | None:
    """The labels beside the weights; TypeError or ValueError unless they and the scale are in range."""
    check_number("guidance_scale", guidance_scale, math.isfinite, "a finite number")
    if labels is None and guidance_scale != 1:
        raise ValueError(f"guidance_scale is {guidance_scale}; expected 1, or labels.")
    return labels_for(denoise, labels, n, "denoise")


def _like(denoise: Any) -> Array:
    """An array where the sample is to be: beside a model's weights, else float32 on the default backend."""
    if isinstance(denoise, Module):
        return weight_of(denoise)
    xp = get_backend()
    return xp.zeros((), dtype=xp.float32)


def _warn_of_a_leap(walk: GaussianDiffusion) -> None:
    """Warn the caller of `sample` if the first step is so long in the clock s/a that "edm" overshoots."""
    with np.errstate(over="ignore"):
        leap = np.exp(step_lengths(walk)[-1])  # infinite to the data, and from pure noise, which is an error
    if LARGEST_LEAP < leap < np.inf:
        warnings.warn(
            f"sampler is 'edm', whose clock s/a is divided by {leap:.0f} in the first of {walk.T} steps, and "
            "overshoots; 'heun' does not, nor does 'edm' with many more steps, or where s/a ends lower.",
            stacklevel=4,  # _warn_of_a_leap, sample, many_steps, the caller
        )


def _warn_of_a_start(walk: GaussianDiffusion, timesteps: np.ndarray) -> None:
    """Warn the caller of `sample` if pure noise is not what the network has seen where the walk begins."""
    left = walk.schedule.alphas_cumprod[-1]
    if left > LEFT:
        warnings.warn(
            f"the walk begins with pure noise at t = {timesteps[-1]}, where {left:.2g} of the data's "
            "variance is left (alphas_cumprod): pass x_T, data noised up to there, or begin later; or the "
            "schedule does not end in noise.",
            stacklevel=4,  # as above
        )


@many_steps()
def sample(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    shape: tuple[int, ...],
    sampler: str = "ddpm",
    steps: Steps = None,
    *,
    rng: np.random.Generator,
    eta: float = 0.0,
    clip: bool = False,
    x_T: Array | None = None,
    labels: Array | None = None,
    guidance_scale: float = 1.0,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Array:
    """Draw samples.

    Parameters
    ----------
    denoise : callable or UNet or MLP
        ``denoise(x, t)`` with x (N, ...) and t (N,), times of `diffusion`'s schedule (0 … T-1, also with
        fewer `steps`), returns what `diffusion.prediction` names. Of a tinydiff model the
        ``predict`` is called.
    diffusion : GaussianDiffusion
        The process that is reversed.
    shape : tuple of int
        Shape (N, ...) of the result.
    sampler : {"ddpm", "ddim", "dpm++", "heun", "edm"}
        "ddpm" is ancestral (Ho et al. 2020, algorithm 2) and adds noise on the way, of the model's variance;
        "ddim" adds as much as `eta` says (Song, Meng & Ermon 2021, eq. 12). The others add none and are of
        second order: DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), which costs no more than DDIM, and Heun's
        rule on the probability-flow ODE, which asks the network twice a step, in the clock arctan(s/a)
        ("heun") or s/a ("edm", Karras et al. 2022, algorithm 1).
    steps : int or sequence of int, optional
        How many of the schedule's T times to walk through, evenly spaced; or which, increasing. The walk
        starts at the last of them. Default: all.
    rng : numpy.random.Generator
        Draws the starting noise and the noise of every step.
    eta : float
        DDIM only, in [0, 1]: 0 adds no noise, 1 as much as the posterior has.
    clip : bool
        Clip each predicted x0 to [-1, 1], the range of images.
    x_T : array of shape `shape`, optional
        The start; for a model, of the library and dtype of its weights. Default: drawn from N(0, I), like its
        weights for a model, in float32 on the default backend (``TINYDIFF_BACKEND``) for another callable.
    labels : integer array of shape (N,), optional
        The class of each sample, 0 … num_classes, for a model with `num_classes`. Default: no classes.
    guidance_scale : float
        With `labels`: w, how many times as far toward them as the network says (`tinydiff.guided`). 1 asks
        for the classes only; other numbers but 0 make each step two predictions.
    batch_size : int, optional
        How many samples to walk at a time. Default: all. The samples depend on it, too: noise is drawn batch
        after batch.
    workers : int, optional
        Processes that share each batch, as `tinydiff.parallel.shared_out` has it. Default: one for each core
        for a `UNet` or a large batch of an `MLP`, in NumPy, on Linux.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    array of shape `shape`

    Raises
    ------
    TypeError
        If `denoise` is not callable, `diffusion` is not a `GaussianDiffusion`, `x_T` is not an array, or
        `rng` is not a generator where noise is drawn.
    ValueError
        If an argument is out of its range or does not fit; the message names the argument.
    MemoryError
        If a step does not fit in memory; the message names a `batch_size` that does. (With NumPy the system
        may end the process instead: as in `train`.)

    Warns
    -----
    UserWarning
        If "edm" is to begin with a step that overshoots by far: see the notes. If the walk begins with pure
        noise where much of the data is left.

    Notes
    -----
    "edm" is for schedules whose s/a stays moderate. At the end of a cosine schedule it is in the ten
    thousands, and a few steps evenly spaced in t overshoot by far; "heun" is of the same order and cost and
    does not.

    On a GPU the prediction of a `UNet` or an `MLP` is recorded as a CUDA graph the third time it is asked for
    a batch of one shape, and replayed from then on. The recordings of the last two shapes stay with the
    model, and each holds the memory that one pass takes. ``TINYDIFF_RECORD=0``: nothing is recorded.

    Two differences from diffusers' schedulers. By default DDPM's and DDIM's leave out the last of the times
    ("leading"), and DPM-Solver's the first, 0; here both ends of the schedule are always walked through, as
    in Nichol & Dhariwal (2021, section 4). And with `clip`, DDIM's eps is taken from the clipped x0, so that
    the two belong together; diffusers does so only with ``use_clipped_model_output=True``.
    """
    _check_start(denoise, shape, x_T)
    total = shape[0]
    labels = _checked_labels(denoise, total, labels, guidance_scale)
    size = total if batch_size is None else batch_size
    check_counts(batch_size=size)
    starts = range(0, total, size)
    together = min(size, total) * (2 if guidance_scale not in (0, 1) else 1)  # that the network is asked for
    chain, timesteps = respaced(diffusion, steps)
    steps_in_all = chain.T * len(starts)
    if sampler == "edm":
        _warn_of_a_leap(chain)
    if x_T is None:
        _warn_of_a_start(chain, timesteps)

    def walk(denoise: Any, start: int, stop: int, rng: Any) -> Iterator[SamplerState]:
        return iterate_samples(
            denoise,
            diffusion,
            (stop - start, *shape[1:]),
            sampler,
            steps,
            rng=rng,
            eta=eta,
            clip=clip,
            x_T=None if x_T is None else x_T[start:stop, ...],
            labels=None if labels is None else labels[start:stop],
            guidance_scale=guidance_scale,
        )

    def some_steps(n: int) -> None:
        """As many as it takes until the network's prediction may be recorded."""
        try:
            for _ in islice(walk(denoise, 0, n, np.random.default_rng(0)), 2 + WARM_UP):
                pass
        finally:
            forget(denoise)

    def all_parts() -> list[Array]:
        parts = []
        with (
            shared_out(denoise, together, workers, to_predict=True) as shared,
            progress_bar(progress, total=steps_in_all, desc="sampling", unit="step", leave=False) as bar,
        ):
            for start in starts:
                for state in walk(shared, start, min(total, start + size), rng):
                    bar.update(0 if state.x0 is None else 1)
                parts.append(state.x)
        return parts

    parts, refused = attempted(all_parts)
    if refused:
        forget(denoise)
        like = _like(denoise) if x_T is None else x_T
        raise MemoryError(what_fits(some_steps, like, min(size, total), refused))
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=0)


@many_steps()
def invert(
    denoise: Callable[[Array, Array], Array],
    diffusion: GaussianDiffusion,
    x0: Array,
    steps: Steps = None,
    *,
    labels: Array | None = None,
    guidance_scale: float = 1.0,
    progress: bool = True,
) -> Array:
    """Encode data as the noise from which DDIM makes it: DDIM walked backwards.  (docs: R.9)

    The step is DDIM's with eta = 0, but to the next later time: x' = a' D + s' eps (Song, Meng & Ermon 2021,
    section 4.3). It takes D and eps at the state where it begins; the step back down, which is to undo it,
    takes them at the state where it ends. So ``sample(..., "ddim", steps, x_T=invert(..., steps))`` gives
    `x0` back up to an error that falls as 1 / steps, and one that does not, that of the piece between `x0`
    and t = 0: for data of variance c, about ((1 - abar_0) / c)^2 times its distance from the mean.

    Parameters
    ----------
    denoise : callable or UNet or MLP
        As in `sample`.
    diffusion : GaussianDiffusion
        The process whose end the result belongs to.
    x0 : array of shape (N, ...)
        Data; for a model, of the library and dtype of its weights.
    steps, labels, guidance_scale
        As in `sample`.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    array of shape (N, ...)
        x at the last of the times; standard normal, if `x0` is of the density that the network has learned.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`, or `x0` is not an array.
    ValueError
        If an argument is out of its range or does not fit; the message names the argument.

    Notes
    -----
    The network knows no time before t = 0, so for the first step it is shown sqrt(abar_0) x0 as if it were of
    t = 0.
    """
    check_network("denoise", denoise)
    check_like_model(denoise, "x0", x0)
    check_batch("x0", x0)
    walk, timesteps = respaced(diffusion, steps)
    labels = _checked_labels(denoise, x0.shape[0], labels, guidance_scale)
    estimate = _estimator(_asked(denoise, walk, labels, guidance_scale), walk, timesteps, clip=False)
    a = np.sqrt(walk.schedule.alphas_cumprod)
    s = np.sqrt(walk.schedule.one_minus_alphas_cumprod)
    x = float(a[0]) * x0
    _, D = estimate(x, 0)
    x = x + float(s[0]) * walk.predict_eps(x, 0, D, given="x0")
    for i in progress_bar(progress, range(1, walk.T), desc="inverting", unit="step", leave=False):
        _, D = estimate(x, i - 1)
        x = float(a[i]) * D + float(s[i]) * walk.predict_eps(x, i - 1, D, given="x0")
    return x
