"""Training a network on a fixed forward process (Ho et al. 2020, algorithm 1): which loss, and its steps.

The loop itself is `tinydiff._loop`.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, get_args

import numpy as np

from tinydiff._checks import (
    check_batch,
    check_choice,
    check_counts,
    check_network,
    check_number,
    check_rng,
)
from tinydiff._data import Data, beside, check_data, checked_labels
from tinydiff._graph import RecordedLoss, forget, is_wanted
from tinydiff._loop import Learner, Objective, checked_plan, loop, run_in, trial
from tinydiff.backend import Array, array_namespace, generator_beside, is_numpy_array, standard_normal
from tinydiff.bound import Decoder, check_decoder
from tinydiff.checkpoint import process_metadata
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.importance import LossSecondMomentSampler
from tinydiff.kernels import many_steps
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss, vlb_loss
from tinydiff.memory import largest_batch, let_go
from tinydiff.models._checks import answer_of, check_like_model, check_model
from tinydiff.nn.module import M, config_of, weight_of
from tinydiff.samplers import check_signal

__all__ = ["Loss", "TrainingResult", "find_batch_size", "train", "training_loss"]

Loss: TypeAlias = Literal["simple", "hybrid", "vlb"]


@dataclass(frozen=True, eq=False)
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
    losses: np.ndarray = field(repr=False)
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
    labels: Array | None = None,
) -> tuple[Array, Callable[[], Array]]:
    """Ho et al. 2020, algorithm 1, lines 2 to 5: random times and noise, the loss, and its derivative.

    Parameters
    ----------
    model : UNet or MLP, or another callable
        Called as ``model(x_t, t, rng)``, with labels as ``model(x_t, t, rng, labels)``; returns (output,
        backward).
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    x0 : array of shape (N, ...)
        A batch of data.
    rng : numpy.random.Generator
        Draws times, noise, and dropout masks. On a GPU it draws the times, and seeds the generator there that
        draws the rest (`generator_beside`).
    loss : {"simple", "hybrid", "vlb"}
        `simple_loss`, `hybrid_loss` or `vlb_loss` (docs: L.9, V.5, V.4). The first does not teach a learned
        variance; the second needs one.
    min_snr_gamma : float, optional
        Weigh L_simple by `min_snr_weight` with this gamma (docs: L.10). Default: no weights.
    decoder : {"density", "8bit"}
        What L_0 is in the bound: the density of points, or the probability of 8-bit levels.
    t_sampler : LossSecondMomentSampler, optional
        Draws t and the weights of the bound's terms, and is given these terms to remember (docs: V.6). For
        ``"vlb"`` only, and made for the diffusion's T. Default: t is uniform.
    labels : integer array of shape (N,), optional
        The classes that the network is told. Default: it is called without.

    Returns
    -------
    loss : array, 0-d
    backward : callable
        Without argument; adds to the gradients of the model's parameters.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`, `x0` is not an array, `rng` is not a generator, or
        `model` is not callable or returns no derivative.
    ValueError
        If an argument is out of range, or belongs to another loss; the message names it.
    """
    _check_loss(loss, diffusion, min_snr_gamma, decoder, t_sampler is not None)
    if (T := getattr(t_sampler, "T", diffusion.T)) != diffusion.T:
        raise ValueError(f"t_sampler draws from T = {T} times; diffusion has T = {diffusion.T}.")
    check_rng(rng)
    check_network("model", model)
    check_like_model(model, "x0", x0)
    check_batch("x0", x0)
    N = x0.shape[0]
    if t_sampler is None:
        t, t_weights = rng.integers(diffusion.T, size=N), None
    else:
        t, t_weights = t_sampler.sample(N, rng)
    rng_there = generator_beside(x0, rng)
    noise = standard_normal(rng_there, x0.shape, x0)
    told = () if labels is None else (labels,)
    output, model_backward = answer_of(model, diffusion.q_sample(x0, t, noise), t, rng_there, *told)
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
    labels: np.ndarray | None = None,
    label_dropout: float = 0.1,
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

    With NumPy the same seed on the same machine, with the same number of processes, gives the same weights
    bit for bit, whether or not the run was interrupted and resumed (docs: A.19).

    Parameters
    ----------
    model : UNet or MLP, or another Module
        Called as in `training_loss`, and trained in place.
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    data : array of shape (n, ...), or callable
        The data set, of which each epoch visits every sample once, in a new random order (a batch may end
        one epoch and begin the next); or ``data(batch_size, rng)`` that draws a fresh batch, or a pair of it
        and the labels (batch_size,) for a model with `num_classes`. Its scale is that of the noise: images in
        [-1, 1], points of about unit variance. An array that is not where the model is goes there once, as a
        whole; for one that does not fit, pass a callable.
    steps : int
        Number of training steps in all. A run with a `final_lr` of 1 and the same `warmup` may be resumed
        with more, even one that was finished: no step depends on how many follow.
    batch_size : int
        Samples per step.
    labels : integer array of shape (n,), optional
        The class of each sample of `data`, an array, for a model with `num_classes`. Default: no classes, or
        those that a callable draws.
    label_dropout : float
        With labels: the share of samples of which the network is told "no class" instead, in [0, 1], drawn
        at each step (Ho & Salimans 2022, algorithm 1); 0: it learns nothing to be guided away from.
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
        What the data is called: a run is only resumed on data of the same name and shape, and if it is an
        array on the host, with the same mean and root mean square of some of its samples, to four digits.
    run_dir : path, optional
        Directory for ``metrics.jsonl`` (a line every `log_every` steps) and ``checkpoint.safetensors``.
        Default: nothing is written.
    resume : bool
        Continue from the checkpoint in `run_dir`, which must be given, if there is one. To go on with other
        settings, train the trained model again in another `run_dir`: Adam's moments and the average begin
        anew.
    checkpoint_every : int
        Steps between checkpoints; the last step always leaves one, and so does Ctrl-C, unless it comes while
        a step moves the weights.
    log_every : int
        Steps between lines of metrics.
    workers : int, optional
        Processes that share each batch, as `tinydiff.parallel.shared_out` has it. Default: one for each core
        for a `UNet` or a large batch of an `MLP`, in NumPy, on Linux; 1 for another class, which may depend
        on what other processes do not see.
    graph : bool, optional
        On a GPU, record a step as a CUDA graph when it has run a few times, and replay it from then on, if
        that is possible: with the loss ``"simple"``, unweighted, without dropout. As long as the training
        lasts the recording holds the memory that one forward and backward takes. Default: what
        ``TINYDIFF_RECORD`` says, 0 or 1; if it is not set, yes for a `UNet` or an `MLP`, and no for another
        class, which may look at its numbers on the host (unless it says that it is ``recordable``).
    progress : bool
        Show a progress bar (loss, steps per second, time left) on the standard error stream.

    Returns
    -------
    TrainingResult

    Warns
    -----
    UserWarning
        If `data`, or the first batch that it draws, is on the host and the noise hardly hides it: pictures in
        0 … 255, say; or if it holds pictures in [0, 1]. If the network predicts eps and the chain ends in
        noise alone, where eps says nothing of the data.

    Raises
    ------
    TypeError
        If `data` is neither an array nor callable, or `model`, `diffusion` or `data_name` is something else;
        or if `labels` are not integers; or if there is a `run_dir`, and the model has a ``config`` that JSON
        cannot hold.
    ValueError
        If an argument is out of range, or belongs to another loss; if `data` is not 8-bit and the decoder is;
        if the checkpoint in `run_dir` is damaged, or was made with other settings; or if it belongs to an
        unfinished run and `resume` is False (that of a finished run gives way); or if another training is
        running in `run_dir`, which is known where the file system has locks, or has run there since this one
        looked. Nothing on disk is changed then.
    FloatingPointError
        If the loss or the gradient's norm stops being finite. The model keeps the weights it had before that
        step, and the last checkpoint is kept. On a GPU it is noticed at the next line of metrics or
        checkpoint, and the model gets back the weights it had at the one before.
    MemoryError
        If a step does not fit in memory; the message names a batch size that does. (With NumPy the system may
        end the process instead, for it promises memory that it does not have: ask `find_batch_size` first.)
    BackendError
        If `graph` is True, or ``TINYDIFF_RECORD`` is 1, and the kernels for CuPy are the definitions.
    """
    check_counts(checkpoint_every=checkpoint_every, log_every=log_every)
    numbers = checked_plan(steps, batch_size, seed, warmup, final_lr, clip_norm, ema_decay, data)
    _check_loss(loss, diffusion, min_snr_gamma, decoder, importance_sampling)
    _warn_of_noise_alone(diffusion)
    if loss != "simple" and not callable(data):  # now, not at the first step that draws t = 0
        check_decoder(decoder, data[:batch_size, ...])
    told = checked_labels(model, data, labels, label_dropout)
    learner = Learner(model, lr, clip_norm=clip_norm, ema_decay=ema_decay, weight_decay=weight_decay)
    states: dict[str, Any] = {"": learner}
    drawn = None
    if importance_sampling:
        states["t_sampler."] = LossSecondMomentSampler(diffusion.T)
        drawn = _Drawn(states["t_sampler."])
    run = run_in(
        run_dir,
        states,
        functools.partial(process_metadata, diffusion),  # so that `pretrained.load` reads it
        model,
        data,
        data_name,
        numbers,
        told,
        betas=diffusion.schedule.betas.tolist(),
        prediction=diffusion.prediction,
        lr=float(lr),
        weight_decay=float(weight_decay),
        loss=loss,
        min_snr_gamma=None if min_snr_gamma is None else float(min_snr_gamma),
        variance=None if loss == "simple" else diffusion.variance,
        decoder=None if loss == "simple" else decoder,
        importance_sampling=bool(importance_sampling),
    )

    how: dict[str, Any] = dict(min_snr_gamma=min_snr_gamma, decoder=decoder, t_sampler=drawn)
    objective = _objective(model, diffusion, loss, graph, **how)
    forget(model)  # recordings of its predictions: they read weights where these will no longer be

    began = time.perf_counter()
    try:
        losses = loop(
            [learner],
            objective,
            data,
            run,
            numbers,
            resume=resume,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            workers=workers,
            progress=progress,
            # Where reading a number costs nothing it is read at once; importance sampling needs each step's.
            at_once=is_numpy_array(weight_of(model)) or importance_sampling,
            counted=(lambda: None) if drawn is None else drawn.remember,
            labels=told,
        )
    finally:
        if isinstance(objective, RecordedLoss):
            model.zero_grad()  # the gradients lie in the recording's memory, which goes now
    return TrainingResult(learner.ema.model, np.asarray(losses), time.perf_counter() - began)


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

    Forward and backward are tried while memory is set aside for what else `train` keeps: on a GPU with
    batches of 1, 2, 4, … until one does not fit; with NumPy with batches of 1 and 2, whose memory tells which
    batch takes half of what is free. The gradients are zero afterwards, the weights as they were.

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
    TypeError
        If `data` is neither an array nor callable, or `model` or `diffusion` is something else.
    ValueError
        If `most` is less than 1; or as in `train`, of the arguments that it has too.
    MemoryError
        If not even a batch of 1 fits.
    """
    check_counts(most=most)
    check_model(model)
    check_data(data)
    _check_loss(loss, diffusion, min_snr_gamma, decoder, False)
    objective = _objective(model, diffusion, loss, None, min_snr_gamma=min_snr_gamma, decoder=decoder)
    like = weight_of(model)
    data_there = beside(data, like)
    forget(model)
    # Adam's moments, the moving average, and the weights that are kept to go back to. With a recording also
    # the clipped gradients; without one they take the place of the activations.
    kept = 5 if isinstance(objective, RecordedLoss) else 4
    weights = [p.value for p in model.named_parameters().values()]
    reserve = [array_namespace(like).zeros_like(weight) for weight in weights for _ in range(kept)]
    size = largest_batch(trial(objective, [model], data, like), like, most)
    del reserve, data_there
    let_go(like)
    if not size:
        raise MemoryError("not even a batch of 1 fits in memory: the model needs to be smaller.")
    return size


def _warn_of_noise_alone(diffusion: GaussianDiffusion) -> None:
    """Warn if what is trained cannot be sampled from the chain's end: eps says nothing there.  (docs: F.7)"""
    try:
        check_signal(diffusion, np.arange(diffusion.T))
    except ValueError as refusal:  # 4: _warn_of_noise_alone, train, many_steps, the caller
        warnings.warn(f"sampling cannot begin where the chain ends: {refusal}", stacklevel=4)


def _check_loss(
    loss: str, diffusion: GaussianDiffusion, min_snr_gamma: float | None, decoder: str, importance: bool
) -> None:
    """ValueError naming an unknown choice, or an argument that is for another loss."""
    check_diffusion(diffusion)
    check_choice("loss", loss, get_args(Loss))
    if loss == "hybrid" and diffusion.variance != "learned_range":
        raise ValueError(
            f"diffusion has variance {diffusion.variance!r}; the loss 'hybrid' expects 'learned_range'."
        )
    if min_snr_gamma is not None:
        expected = "None or a positive number"
        check_number("min_snr_gamma", min_snr_gamma, lambda gamma: 0 < gamma < math.inf, expected)
    if min_snr_gamma is not None and loss == "vlb":
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}; expected None: the loss 'vlb' has no L_simple.")
    if importance and loss != "vlb":
        raise ValueError(f"importance sampling of t is for the loss 'vlb'; the loss is {loss!r}.")
    check_decoder(decoder)


def _objective(
    model: Any, diffusion: GaussianDiffusion, loss: Loss, graph: bool | None, **how: Any
) -> Objective:
    """What a step minimises: `training_loss`; recorded, if it is what `RecordedLoss` does and that is wanted.

    That is the mean squared error, unweighted, of a network without dropout.
    """
    plain = loss == "simple" and how["min_snr_gamma"] is None and diffusion.variance != "learned_range"
    if plain and not config_of(model).get("dropout") and is_wanted(model, graph):
        return RecordedLoss(diffusion)

    def objective(
        network: Any, x0: Array, rng: np.random.Generator, labels: Array | None = None
    ) -> tuple[Array, Callable[[], Array]]:
        return training_loss(network, diffusion, x0, rng, loss, labels=labels, **how)

    return objective


class _Drawn:
    """Withholds the terms from its sampler until the step counts: till then it may be interrupted."""

    def __init__(self, sampler: LossSecondMomentSampler) -> None:
        self._sampler = sampler
        self.sample = sampler.sample

    def update(self, t: Array, losses: Array) -> None:
        self._terms = (t, losses)

    def remember(self) -> None:
        self._sampler.update(*self._terms)
