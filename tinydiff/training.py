"""The training loop: its progress, its metrics, and how it survives an interruption.

The randomness of a step is a function of (seed, step), and the order of the data a function of (seed,
epoch). So a resumed run is the same run, bit for bit, with no generator state to save.

A step counts once its loss is in the list: it is put there last, so an interruption in the middle of a step
is recognised by a list that is shorter than the optimizer's count.

On a GPU everything stays where it is. Times and tables live on the host, data, noise, loss and weights on the
device, and the host runs ahead of it: it waits only where numbers are read, at a line of metrics and at a
checkpoint, and reads those of all steps since at once.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np

from tinydiff._checks import check_counts, check_number, check_rng, check_seed
from tinydiff._graph import RecordedStep, is_wanted
from tinydiff._readings import Kept, Losses, check_finite
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    device,
    generator_beside,
    is_numpy_array,
    standard_normal,
    to_numpy,
)
from tinydiff.bound import Decoder, check_decoder
from tinydiff.checkpoint import load_arrays, replace_file, save_arrays
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.importance import LossSecondMomentSampler
from tinydiff.kernels import many_steps
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss, vlb_loss
from tinydiff.memory import is_out_of_memory, largest_batch, let_go, reason, what_fits
from tinydiff.nn.module import Module, weight_of
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.parallel import shared_out

__all__ = ["Loss", "TrainingResult", "find_batch_size", "train", "training_loss"]

M = TypeVar("M", bound=Module)
Loss: TypeAlias = Literal["simple", "hybrid", "vlb"]
Data = Any  # an array (n, ...), or a callable (batch_size, rng) -> array (batch_size, ...)

# The independent streams of randomness that a seed stands for. None is 0: NumPy pads a seed with zeros, so
# that [seed, 0, 0] is the stream of `seed` itself, from which the model may have been drawn.
STEP, EPOCH = 1, 2


@dataclass(frozen=True)
class TrainingResult(Generic[M]):
    """What a training leaves behind.

    Attributes
    ----------
    model : UNet or MLP
        A copy of the trained model with the moving average of its weights: the one to sample from. The
        model given to `train` holds the last weights.
    losses : ndarray of shape (steps,)
        The loss of every step, resumed ones included.
    seconds : float
        Wall-clock time of this call.
    """

    model: M
    losses: np.ndarray
    seconds: float


class TimeSampler(Protocol):
    """What draws t and learns from the terms it drew: a `LossSecondMomentSampler`."""

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]: ...

    def update(self, t: Array, losses: Array) -> None: ...


def training_loss(
    model: Any,
    diffusion: GaussianDiffusion,
    x0: Array,
    rng: np.random.Generator,
    loss: Loss = "simple",
    *,
    min_snr_gamma: float | None = None,
    decoder: Decoder = "density",
    t_sampler: TimeSampler | None = None,
) -> tuple[Array, Callable[[], Array]]:
    """Ho et al. 2020, algorithm 1, lines 2 to 5: random times and noise, the loss, and its derivative.

    Parameters
    ----------
    model : UNet or MLP
        Called as ``model(x_t, t, rng)``.
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    x0 : array of shape (N, ...)
        A batch of data.
    rng : numpy.random.Generator
        Draws times, noise, and dropout masks. On a GPU it draws the times, and seeds the generator there that
        draws the others (`generator_beside`).
    loss : {"simple", "hybrid", "vlb"}
        `simple_loss`, `hybrid_loss` or `vlb_loss` (docs: L.9, V.5, V.4). Of a learned variance the first
        teaches nothing; without one there is no second.
    min_snr_gamma : float, optional
        Weigh L_simple by `min_snr_weight` with this gamma (docs: L.10). Default: no weights.
    decoder : {"density", "8bit"}
        What L_0 is in the bound: the density of points, or the probability of 8-bit levels.
    t_sampler : LossSecondMomentSampler, optional
        Draws t and the weights of the bound's terms, and is given these terms to remember (docs: V.6), for
        ``"vlb"`` only. Default: t is uniform.

    Returns
    -------
    loss : array, 0-d
    backward : callable
        Without argument; adds to the gradients of the model's parameters.

    Raises
    ------
    ValueError
        If an argument is out of range, or belongs to another loss; the message names it.
    """
    _check_loss(loss, diffusion, min_snr_gamma, decoder, t_sampler is not None)
    check_rng(rng)
    N = x0.shape[0]
    if t_sampler is None:
        t, t_weights = rng.integers(diffusion.T, size=N), None
    else:
        t, t_weights = t_sampler.sample(N, rng)
    rng_there = generator_beside(x0, rng)
    noise = standard_normal(rng_there, x0.shape, x0)
    output, model_backward = model(diffusion.q_sample(x0, t, noise), t, rng_there)
    given = (diffusion, output, x0, t, noise)
    if loss == "vlb":
        record = None if t_sampler is None else functools.partial(t_sampler.update, t)
        value, gradient = vlb_loss(*given, decoder=decoder, weights=t_weights, record=record)
    else:
        weights = None if min_snr_gamma is None else min_snr_weight(diffusion, t, min_snr_gamma)
        if loss == "simple":
            value, gradient = simple_loss(*given, weights)
        else:
            value, gradient = hybrid_loss(*given, decoder=decoder, weights=weights)
    return value, lambda: model_backward(gradient)


@many_steps()
def train(
    model: M,
    diffusion: GaussianDiffusion,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    loss: Loss = "simple",
    min_snr_gamma: float | None = None,
    decoder: Decoder = "density",
    importance_sampling: bool = False,
    seed: int = 0,
    lr: float = 1e-3,
    warmup: int | None = None,
    final_lr: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    data_name: str = "",
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 50,
    workers: int | None = None,
    graph: bool | None = None,
    progress: bool = True,
) -> TrainingResult[M]:
    """Train with Adam and a moving average of the weights (Ho et al. 2020, algorithm 1).

    The same seed on the same machine, with the same number of processes, gives the same weights bit for bit,
    whether or not the run was interrupted and resumed.

    Parameters
    ----------
    model : UNet or MLP
        Trained in place.
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    data : array of shape (n, ...), or callable
        The data set, of which each epoch visits every sample once, in a new random order (a batch may end
        one epoch and begin the next); or ``data(batch_size, rng)`` that draws a fresh batch. An array that
        is not where the model is goes there once, as a whole; for one that does not fit, pass a callable.
    steps : int
        Number of training steps in all.
    batch_size : int
        Samples per step.
    loss : {"simple", "hybrid", "vlb"}
        What is minimised: `simple_loss`; `hybrid_loss`, for a diffusion with learned variance; or `vlb_loss`,
        the bound itself, in bits per dimension (docs: L.9, V.5, V.4).
    min_snr_gamma : float, optional
        Weigh L_simple, also that in L_hybrid, by `min_snr_weight` with this gamma (docs: L.10); 5 is common.
        Default: no weights.
    decoder : {"density", "8bit"}
        What L_0 of the bound is: the density of points, or the probability of 8-bit levels, for images.
    importance_sampling : bool
        Draw the t of ``"vlb"`` by a `LossSecondMomentSampler` (docs: V.7). Default: uniformly.
    seed : int
        Seed of everything random, 0 … 2**32 - 1.
    lr : float
        Learning rate after warm-up.
    warmup : int, optional
        Steps over which the rate rises, 0 … steps. Default: a twentieth of `steps`, 500 at most.
    final_lr : float
        What the cosine falls to at the end, as a fraction of `lr`, in [0, 1]; 1: no fall.
    weight_decay : float
        Decoupled weight decay (AdamW).
    clip_norm : float
        Bound on the joint norm of all gradients; ``math.inf``: none.
    ema_decay : float
        Decay of the moving average of the weights.
    data_name : str
        What the data is called: a run is only resumed on data of the same name (and shape).
    run_dir : path, optional
        Directory for ``metrics.jsonl`` (a line every `log_every` steps) and ``checkpoint.safetensors``.
        Default: nothing is written.
    resume : bool
        Continue from the checkpoint in `run_dir`, if there is one.
    checkpoint_every : int
        Steps between checkpoints; the last step always leaves one, and so does Ctrl-C.
    log_every : int
        Steps between lines of metrics.
    workers : int, optional
        Processes that share each batch, as `tinydiff.parallel.shared_out` has it. Default: one for each core
        for a `UNet` or a large batch of an `MLP`, in NumPy, on Linux.
    graph : bool, optional
        On a GPU, record the step and replay it, if it can be: with the loss ``"simple"``, unweighted, without
        dropout. Default: what ``TINYDIFF_RECORD`` says, or no.
    progress : bool
        Show a progress bar (loss, steps per second, time left) on the standard error stream.

    Returns
    -------
    TrainingResult

    Raises
    ------
    TypeError
        If `data` is neither an array nor callable.
    ValueError
        If an argument is out of range, or belongs to another loss; if `data` is not 8-bit and the decoder is;
        if the checkpoint in `run_dir` is damaged, or was made with other settings; or if it belongs to an
        unfinished run and `resume` is False (that of a finished run gives way). Nothing on disk is changed
        then.
    FloatingPointError
        If the loss or the gradient's norm stops being finite. The model keeps the weights it had before that
        step, and the last checkpoint is kept. On a GPU it is noticed at the next line of metrics or
        checkpoint, and the model gets back the weights it had at the one before.
    MemoryError
        If a step does not fit in memory; the message names a batch size that does.
    """
    check_counts(checkpoint_every=checkpoint_every, log_every=log_every)
    warmup = check_loop(steps, batch_size, seed, warmup, final_lr, clip_norm, ema_decay, data)
    _check_loss(loss, diffusion, min_snr_gamma, decoder, importance_sampling)
    if loss != "simple" and not callable(data):  # the wrong decoder shows at once, not where a t = 0 is drawn
        check_decoder(decoder, data[:batch_size, ...])
    parameters = model.named_parameters()
    like = weight_of(model)
    settings = {
        "model": type(model).__name__,
        "config": getattr(model, "config", None),
        "dtype": str(to_numpy(like).dtype),
        "betas": _digest(diffusion.schedule.betas),
        "prediction": diffusion.prediction,
        "data": "callable" if callable(data) else [int(size) for size in data.shape],
        "data_name": data_name,
        "steps": int(steps),
        "batch_size": int(batch_size),
        "seed": int(seed),
        "lr": float(lr),
        "warmup": int(warmup),
        "final_lr": float(final_lr),
        "weight_decay": float(weight_decay),
        "clip_norm": str(float(clip_norm)),  # JSON has no infinity
        "ema_decay": float(ema_decay),
        "loss": loss,
        "min_snr_gamma": None if min_snr_gamma is None else float(min_snr_gamma),
        "variance": None if loss == "simple" else diffusion.variance,
        "decoder": None if loss == "simple" else decoder,
        "importance_sampling": bool(importance_sampling),
    }
    data = _beside(data, like)
    optimizer = Adam(parameters, lr, weight_decay=weight_decay)
    ema = EMA(model, ema_decay)
    t_sampler = LossSecondMomentSampler(diffusion.T) if importance_sampling else None
    drawn = None if t_sampler is None else _Drawn(t_sampler)
    run = None if run_dir is None else _Run(Path(run_dir), settings, model, optimizer, ema, t_sampler)
    losses = Losses([] if run is None else run.start(resume))
    how: dict[str, Any] = dict(loss=loss, min_snr_gamma=min_snr_gamma, decoder=decoder)
    # Where reading a number costs nothing it is read at once; importance sampling needs each step's anyway.
    at_once = is_numpy_array(like) or importance_sampling
    kept = None if at_once else Kept(parameters, len(losses))

    recordable = loss == "simple" and min_snr_gamma is None and diffusion.variance != "learned_range"
    recordable = recordable and not getattr(model, "config", {}).get("dropout")
    whole_step = (
        RecordedStep(model, diffusion, optimizer, ema, clip_norm)
        if recordable and is_wanted(like, graph)
        else None
    )

    def rate(step: int) -> float:
        return lr * warmup_cosine(step, steps, warmup, final_lr)

    from tqdm import tqdm

    began = time.perf_counter()
    processes = ExitStack()
    shared = processes.enter_context(shared_out(model, batch_size, workers))
    bar = tqdm(total=steps, initial=len(losses), desc="training", unit="step", disable=not progress)
    smooth = math.nan
    refused = ""
    backward: Any = None
    try:
        for step in range(len(losses), steps):
            rng = np.random.default_rng([seed, STEP, step])
            optimizer.zero_grad()
            x0 = _batch(data, batch_size, seed, step, rng, like)
            optimizer.lr = rate(step)
            if whole_step is not None:  # the update and the average, too
                loss_array, norm_array = whole_step(x0, rng)
            else:
                loss_array, backward = training_loss(shared, diffusion, x0, rng, **how, t_sampler=drawn)
                backward()
                norm_array = clip_grad_norm(parameters, clip_norm)
            last = step + 1 == steps
            line_due = (step + 1) % log_every == 0 or last
            save_due = run is not None and ((step + 1) % checkpoint_every == 0 or last)
            reading = at_once or line_due or save_due
            if reading:
                first, numbers = losses.read((loss_array, norm_array))
                check_finite(first, numbers, rate, kept)
            if run is not None:
                run.begin()
            if whole_step is None:
                optimizer.step()
                ema.update()
            if drawn is not None:
                drawn.remember()
            if not reading:
                losses.append((loss_array, norm_array))
            else:
                values = [value for value, _ in numbers]
                if run is not None and line_due:
                    since = step // log_every * log_every
                    run.log(step + 1, [*losses[since:first], *values], numbers[-1][1], optimizer.lr)
                losses.replace(first, values)
                if kept is not None:
                    kept.keep(step + 1)
                for value in values:
                    smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if run is not None and save_due:
                run.save(losses[:])
    except KeyboardInterrupt:
        if run is not None and optimizer.steps == len(losses) > 0:
            first, numbers = losses.read()
            if all(math.isfinite(number) for pair in numbers for number in pair):
                losses.replace(first, [value for value, _ in numbers])
                run.save(losses[:])
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        refused = reason(error)
    finally:
        bar.close()
        processes.close()
    if refused:
        x0 = loss_array = norm_array = backward = whole_step = None
        model.zero_grad()
        trial = _trial_step(model, diffusion, _sample_shape(data), like, how)
        raise MemoryError(what_fits(trial, like, batch_size, refused))
    return TrainingResult(ema.model, np.asarray(losses[:]), time.perf_counter() - began)


def check_loop(
    steps: int,
    batch_size: int,
    seed: int,
    warmup: int | None,
    final_lr: float,
    clip_norm: float,
    ema_decay: float,
    data: Data,
) -> int:
    """ValueError or TypeError naming the first that a training cannot be made of; returns the warm-up."""
    check_counts(steps=steps, batch_size=batch_size)
    check_seed(seed)
    warmup = min(500, steps // 20) if warmup is None else warmup
    check_number(
        "warmup", warmup, lambda n: n == int(n) and 0 <= n <= steps, f"an integer in 0 ... steps = {steps}"
    )
    check_number("final_lr", final_lr, lambda rate: 0 <= rate <= 1, "a number in [0, 1]")
    check_number("clip_norm", clip_norm, lambda norm: norm > 0, "a positive number")
    check_number("ema_decay", ema_decay, lambda decay: 0 <= decay < 1, "a number in [0, 1)")
    _check_data(data)
    return warmup


def _check_data(data: Data) -> None:
    """TypeError or ValueError unless it is callable, or an array that there is something to learn from."""
    if callable(data):
        return
    if len(getattr(data, "shape", ())) < 1:
        raise TypeError(f"data is a {type(data).__name__}; expected an array (n, ...) or a callable.")
    if data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected at least one sample.")
    _check_values("data", data)


def _check_values(name: str, values: Array) -> None:
    """ValueError unless they are real floating numbers; with NumPy, finite ones."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array; expected one in which every number counts.")
    if not array_namespace(values).isdtype(values.dtype, "real floating"):
        raise ValueError(
            f"{name} has dtype {values.dtype}; expected a real floating one (of 8-bit images, x / 127.5 - 1)."
        )
    if is_numpy_array(values) and not np.isfinite(values).all():
        raise ValueError(f"{name} holds numbers that are not finite.")


def find_batch_size(
    model: Any,
    diffusion: GaussianDiffusion,
    data: Data,
    *,
    most: int = 1024,
    loss: Loss = "simple",
    min_snr_gamma: float | None = None,
    decoder: Decoder = "density",
) -> int:
    """Return the largest power of two with which a step of training fits in memory.

    Forward and backward are tried with what else `train` keeps set aside: on a GPU with batches of 1, 2, 4, …
    until one does not fit; with NumPy by the memory that batches of 1 and 2 take, up to half of what is free.
    The gradients are zero afterwards, the weights as they were.

    Parameters
    ----------
    model, diffusion, data, loss, min_snr_gamma, decoder
        As for `train`.
    most : int
        The largest to try.

    Returns
    -------
    int

    Raises
    ------
    MemoryError
        If not even a batch of 1 fits.
    ValueError
        If `most` is less than 1.
    """
    check_counts(most=most)
    _check_data(data)
    how: dict[str, Any] = dict(loss=loss, min_snr_gamma=min_snr_gamma, decoder=decoder)
    parameters = list(model.named_parameters().values())
    like = parameters[0].value
    shape = _sample_shape(data)
    data_there = _beside(data, like)
    # Adam's moments, the moving average, and the weights that are kept to go back to.
    reserve = [array_namespace(like).zeros_like(p.value) for p in parameters for _ in range(4)]
    size = largest_batch(_trial_step(model, diffusion, shape, like, how), like, most)
    del reserve, data_there
    let_go(like)
    if not size:
        raise MemoryError("not even a batch of 1 fits in memory: the model needs to be smaller.")
    return size


def _trial_step(
    model: Any, diffusion: GaussianDiffusion, shape: tuple[int, ...], like: Array, how: dict[str, Any]
) -> Callable[[int], None]:
    """step(n): forward and backward of a batch of n, whose gradients are thrown away."""
    xp = array_namespace(like)

    def step(n: int) -> None:
        try:
            x0 = xp.full((n, *shape), -1.0, dtype=like.dtype, device=device(like))  # -1 is an 8-bit level
            _, backward = training_loss(model, diffusion, x0, np.random.default_rng(0), **how)
            backward()
        finally:
            model.zero_grad()

    return step


def _sample_shape(data: Data) -> tuple[int, ...]:
    """The shape of one sample."""
    return tuple((data(1, np.random.default_rng(0)) if callable(data) else data).shape[1:])


def _beside(data: Data, like: Array) -> Data:
    """The data set where `like` is; where it is there already, or drawn batch by batch, it stays as it is."""
    if callable(data) or (array_namespace(data) is array_namespace(like) and device(data) == device(like)):
        return data
    try:
        return asarray_like(data, like)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"data of shape {tuple(data.shape)} does not fit in memory beside the model; pass a callable "
            "that draws batches of it."
        ) from None


def _check_loss(
    loss: str, diffusion: GaussianDiffusion, min_snr_gamma: float | None, decoder: str, importance: bool
) -> None:
    """ValueError naming what there is not, or what another loss would be needed for."""
    if loss not in get_args(Loss):
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(map(repr, get_args(Loss)))}.")
    if loss == "hybrid" and diffusion.variance != "learned_range":
        raise ValueError(
            f"diffusion has variance {diffusion.variance!r}; the loss 'hybrid' expects 'learned_range'."
        )
    if min_snr_gamma is not None and not 0 < min_snr_gamma < math.inf:
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}; expected None or a positive number.")
    if min_snr_gamma is not None and loss == "vlb":
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}; expected None: the loss 'vlb' has no L_simple.")
    if importance and loss != "vlb":
        raise ValueError(f"importance sampling of t is for the loss 'vlb'; the loss is {loss!r}.")
    check_decoder(decoder)


class _Drawn:
    """A sampler of t whose update waits until the step counts: till then it may still be interrupted."""

    def __init__(self, sampler: LossSecondMomentSampler) -> None:
        self._sampler = sampler
        self.sample = sampler.sample

    def update(self, t: Array, losses: Array) -> None:
        self._terms = (t, losses)

    def remember(self) -> None:
        self._sampler.update(*self._terms)


def _digest(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def _batch(data: Data, batch_size: int, seed: int, step: int, rng: np.random.Generator, like: Array) -> Array:
    """The batch of a step, beside `like`: drawn by `data`, or its place in the endless row of epochs.

    An array is gathered where it is, by an index from the host.
    """
    if callable(data):
        batch = data(batch_size, rng)
        if len(getattr(batch, "shape", ())) < 1 or batch.shape[0] != batch_size:
            came = f"has shape {batch.shape}" if hasattr(batch, "shape") else f"is a {type(batch).__name__}"
            raise ValueError(f"data(batch_size, rng) {came}; expected an array ({batch_size}, ...).")
        _check_values("data(batch_size, rng)", batch)
        return asarray_like(batch, like)
    n = data.shape[0]
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    index = np.concat([_order(seed, e, n)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])
    xp = array_namespace(data)
    return asarray_like(xp.take(data, asarray_like(index, data, xp.int64), axis=0), like)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n samples."""
    return np.random.default_rng([seed, EPOCH, epoch]).permutation(n)


# What there was to set before there was a choice of loss, and the checkpoints of that time stand for.
SIMPLE: dict[str, Any] = dict(
    loss="simple", min_snr_gamma=None, variance=None, decoder=None, importance_sampling=False
)


# How a line of metrics begins.
LINE = b'{"step": '


class _Run:
    """The files of a run: ``metrics.jsonl`` and ``checkpoint.safetensors``."""

    def __init__(
        self,
        directory: Path,
        settings: dict[str, Any],
        model: Any,
        optimizer: Adam,
        ema: EMA,
        t_sampler: LossSecondMomentSampler | None,
    ) -> None:
        self.checkpoint = directory / "checkpoint.safetensors"
        self.metrics = directory / "metrics.jsonl"
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.t_sampler = t_sampler
        self.began = time.perf_counter()
        self._begun = False

    def start(self, resume: bool) -> list[float]:
        """Take up the checkpoint if there is one to take up; return the losses so far."""
        losses: list[float] = []
        if self.checkpoint.exists():
            arrays, metadata = load_arrays(self.checkpoint)
            if not ("losses" in arrays and {"step", "settings"} <= metadata.keys()):
                raise ValueError(f"{self.checkpoint} is not a checkpoint of tinydiff's training.")
            if resume:
                self._check_settings(metadata["settings"])
                losses = self._restore(arrays)
            elif metadata["step"] < metadata["settings"]["steps"]:
                raise ValueError(
                    f"{self.checkpoint} is an unfinished run (step {metadata['step']} of "
                    f"{metadata['settings']['steps']}): pass resume=True (--resume) to continue it, choose "
                    "another directory, or delete it to begin again."
                )
        self._before = [line for line in self._lines() if line["step"] <= len(losses)]
        self._resumed = bool(losses)
        if self._before:
            self.began -= self._before[-1]["seconds"]
        return losses

    def begin(self) -> None:
        """Make the files this run's, when a first step has gone well: what a finished run left gives way."""
        if self._begun:
            return
        replace_file(self.metrics, "".join(json.dumps(line) + "\n" for line in self._before).encode())
        if not self._resumed:
            self.checkpoint.unlink(missing_ok=True)
        self._begun = True

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of metrics there are; a crash may have left the last one incomplete."""
        lines = []
        for text in self.metrics.read_bytes().splitlines() if self.metrics.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if line is None and LINE.startswith(text[: len(LINE)]):
                break
            if not (isinstance(line, dict) and {"step", "seconds"} <= line.keys()):
                raise ValueError(f"{self.metrics} is not tinydiff's: choose another directory, or move it.")
            lines.append(line)
        return lines

    def _check_settings(self, before: dict[str, Any]) -> None:
        before = SIMPLE | before
        changed = [k for k, v in self.settings.items() if before.get(k) != v]
        if changed:
            what = ", ".join(f"{k} was {before.get(k)!r}, is {self.settings[k]!r}" for k in changed)
            raise ValueError(
                f"{self.checkpoint} belongs to a run with other settings ({what}): resume with the same "
                "settings, or choose another directory."
            )

    def _restore(self, arrays: dict[str, np.ndarray]) -> list[float]:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k[len(prefix) :]: a for k, a in arrays.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.ema.model.load_state_dict(part("ema."))
        for moments, name in [(self.optimizer.m, "m"), (self.optimizer.v, "v")]:
            for i, moment in enumerate(moments):
                moments[i] = asarray_like(arrays[f"adam.{name}.{i}"].copy(), moment)
        if self.t_sampler is not None:
            self.t_sampler.load_state_dict(part("t_sampler."))
        losses = [float(loss) for loss in arrays["losses"]]
        self.optimizer.steps = self.ema.steps = len(losses)
        return losses

    def save(self, losses: list[float]) -> None:
        """Write the whole state of the run."""
        arrays = {f"model.{k}": a for k, a in self.model.state_dict().items()}
        arrays |= {f"ema.{k}": a for k, a in self.ema.model.state_dict().items()}
        for moments, name in [(self.optimizer.m, "m"), (self.optimizer.v, "v")]:
            arrays |= {f"adam.{name}.{i}": to_numpy(moment) for i, moment in enumerate(moments)}
        if self.t_sampler is not None:
            arrays |= {f"t_sampler.{k}": a for k, a in self.t_sampler.state_dict().items()}
        arrays["losses"] = np.asarray(losses)
        save_arrays(self.checkpoint, arrays, {"step": len(losses), "settings": self.settings})

    def log(self, step: int, losses: list[float], grad_norm: float, lr: float) -> None:
        """Append a line of metrics; the loss is the mean since the line before."""
        line = {
            "step": step,
            "loss": float(np.mean(losses)),
            "grad_norm": grad_norm,
            "lr": float(lr),
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
