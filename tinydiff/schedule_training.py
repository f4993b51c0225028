"""Training a network and its forward process together (Kingma et al. 2021).

Each step estimates the continuous-time bound of a batch. The network and the two end points of gamma go down
the bound's gradient; what is between the end points goes down that of the estimate's variance (docs: S.13).
What comes out is a network and a schedule like any other.

The loop is that of `tinydiff.train`, with two learners. On a GPU its steps are not recorded: each sends
numbers of the schedule, which changes from step to step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import numpy as np

from tinydiff._checks import check_counts, check_number
from tinydiff._data import Data, checked_labels
from tinydiff._loop import Learner, checked_plan, loop, run_in
from tinydiff.backend import Array
from tinydiff.bound import Decoder
from tinydiff.checkpoint import process_metadata
from tinydiff.continuous_bound import learned_schedule_loss
from tinydiff.diffusion import GaussianDiffusion, Prediction
from tinydiff.kernels import many_steps
from tinydiff.learned_schedule import LearnedSchedule
from tinydiff.nn.module import M
from tinydiff.schedules import NoiseSchedule

__all__ = ["LearnedScheduleResult", "train_learned_schedule"]


@dataclass(frozen=True, eq=False)
class LearnedScheduleResult(Generic[M]):
    """What training a network with its schedule leaves behind.

    Attributes
    ----------
    model : UNet or MLP
        A copy of the trained model with the moving average of its weights: the one to sample from.
    schedule : NoiseSchedule
        The chain of T levels that `model` was trained for: ``learned.schedule(T)``.
    losses : ndarray of shape (steps,)
        The bound's estimate at every step, in bits per dimension.
    learned : LearnedSchedule
        gamma(u), its parameters averaged like the model's.
    seconds : float
        Wall-clock time.
    """

    model: M
    schedule: NoiseSchedule
    losses: np.ndarray = field(repr=False)
    learned: LearnedSchedule
    seconds: float


@many_steps()
def train_learned_schedule(
    model: M,
    data: Data,
    *,
    T: int = 1000,
    steps: int,
    batch_size: int,
    seed: int = 0,
    lr: float = 1e-3,
    schedule_lr: float = 1e-2,
    gamma_0: float = -13.3,
    gamma_1: float = 5.0,
    units: int = 32,
    prediction: Prediction = "v",
    decoder: Decoder = "density",
    even: bool = True,
    labels: np.ndarray | None = None,
    label_dropout: float = 0.1,
    warmup: int | None = None,
    final_lr: float = 0.0,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    data_name: str = "",
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 50,
    workers: int | None = None,
    progress: bool = True,
) -> LearnedScheduleResult[M]:
    """Train a network on the continuous-time bound, and the noise schedule with it.  (docs: S.13)

    Afterwards ``GaussianDiffusion(result.schedule, prediction)`` and ``result.model`` go together in
    ``sample``, ``variational_bound`` and ``bits_per_dim``. For a bound take the variance ``"fixed_large"``:
    the bound is then the continuous one that this loss estimates, up to 1/T.

    Parameters
    ----------
    model : UNet or MLP
        Changed in place.
    data : array of shape (n, ...), or callable
        As for `train`: the data set, or ``data(batch_size, rng)`` that draws a batch, with labels or without.
    T : int
        Length of the chain that is wanted, at least 2. The network is told real times in [0, T-1].
    steps, batch_size : int
        How many updates, on how many samples each. As for `train`, with a `final_lr` of 1 a run may be
        resumed with more steps.
    seed : int
        Seed of all randomness, 0 … 2**32 - 1.
    lr, schedule_lr : float
        Adam's learning rate at the end of the warm-up, for the network and for the schedule.
    gamma_0, gamma_1, units
        Where the schedule begins, as in `LearnedSchedule`.
    prediction : {"eps", "x0", "v", "flow"}
        What the network learns to predict.
    decoder : {"density", "8bit"}
        The reconstruction: the density of points, or the probability of 8-bit levels for images in [-1, 1].
    even : bool
        Times evenly spaced over each batch, as in `draw_times`.
    labels, label_dropout
        As for `train`: the classes that the network is told. The schedule is one for all of them.
    warmup : int, optional
        Steps of linear rise of the learning rates. Default: a twentieth of `steps`, at most 500.
    final_lr : float
        Where the cosine of the learning rates ends, as a fraction of their largest.
    clip_norm : float
        Bound on the norm of the network's gradient; ``math.inf`` for none. The schedule's is not clipped.
    ema_decay : float
        Decay of the moving averages, in [0, 1).
    data_name, run_dir, resume, checkpoint_every, log_every
        As for `train`: the files of the run, and whether it goes on from them.
    workers : int, optional
        Processes that share each batch, as for `train`.
    progress : bool
        Show a progress bar on the standard error stream.

    Returns
    -------
    LearnedScheduleResult
        With the averaged model, the schedule and the losses.

    Raises
    ------
    TypeError
        If `data` is neither an array nor callable, `model` is not a network of tinydiff's, or `data_name` is
        not a str; or if there is a `run_dir`, and the model has a ``config`` that JSON cannot hold.
    ValueError
        If an argument, or the checkpoint in `run_dir`, is not what is expected, as for `train`; the message
        names it. Also, at the end, if the learned end points are not those of a schedule
        (`LearnedSchedule.schedule`).
    FloatingPointError
        If the loss or the norm of a gradient stops being finite. The model keeps the weights that it had
        before that step.
    MemoryError
        If a step does not fit in memory; the message names a batch size that does. (With NumPy the system may
        end the process instead: as in `train`.)
    """
    check_counts(T=T, checkpoint_every=checkpoint_every, log_every=log_every)
    check_number(
        "schedule_lr", schedule_lr, lambda rate: 0 <= rate < math.inf, "a finite number, not negative"
    )
    numbers = checked_plan(steps, batch_size, seed, warmup, final_lr, clip_norm, ema_decay, data)
    told = checked_labels(model, data, labels, label_dropout)
    learned = LearnedSchedule(gamma_0, gamma_1, units)
    network = Learner(model, lr, clip_norm=clip_norm, ema_decay=ema_decay)
    schedule = Learner(learned, schedule_lr, clip_norm=math.inf, ema_decay=ema_decay)

    def about() -> dict[str, Any]:
        """The process of the averages so far, for `pretrained.load`; nothing if they have no chain."""
        try:
            chain = schedule.ema.model.schedule(T)
        except ValueError:
            return {}
        return process_metadata(GaussianDiffusion(chain, prediction))

    states = {"": network, "schedule.": schedule}
    run = run_in(
        run_dir,
        states,
        about,
        model,
        data,
        data_name,
        numbers,
        told,
        loss="continuous bound",
        T=int(T),
        lr=float(lr),
        schedule_lr=float(schedule_lr),
        gamma_0=float(gamma_0),
        gamma_1=float(gamma_1),
        units=int(units),
        prediction=prediction,
        decoder=decoder,
        even=bool(even),
    )

    def objective(
        network: Any, x0: Array, rng: np.random.Generator, labels: Array | None = None
    ) -> tuple[Array, Callable[[], Any]]:
        how: dict[str, Any] = dict(T=T, prediction=prediction, decoder=decoder, even=even, labels=labels)
        return learned_schedule_loss(network, learned, x0, rng, **how)

    began = time.perf_counter()
    losses = loop(
        [network, schedule],
        objective,
        data,
        run,
        numbers,
        resume=resume,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        workers=workers,
        progress=progress,
        at_once=True,  # gamma is on the host, and every step goes through it
        unit="bits_per_dim",
        labels=told,
    )
    seconds = time.perf_counter() - began
    trained, averaged = network.ema.model, schedule.ema.model
    return LearnedScheduleResult(trained, averaged.schedule(T), np.asarray(losses), averaged, seconds)
