"""Training a network and its forward process together (Kingma et al. 2021).

Each step estimates the continuous-time bound of a batch. The network and the two end points of gamma go down
the bound's gradient; what is between the end points goes down that of the estimate's variance (docs: S.13).
What comes out is a network and a schedule like any other.

As in `tinydiff.training`, the randomness of a step is a function of (seed, step) and the order of the data
one of (seed, epoch). This loop keeps no files.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Generic

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.bound import Decoder
from tinydiff.continuous_bound import learned_schedule_loss
from tinydiff.diffusion import Prediction
from tinydiff.kernels import many_steps
from tinydiff.learned_schedule import LearnedSchedule
from tinydiff.nn.module import weight_of
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.parallel import shared_out
from tinydiff.schedules import NoiseSchedule
from tinydiff.training import STEP, Data, M, _batch, check_loop

__all__ = ["LearnedScheduleResult", "train_learned_schedule"]


@dataclass(frozen=True)
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
    losses: np.ndarray
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
    warmup: int | None = None,
    final_lr: float = 0.0,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    workers: int | None = None,
    progress: bool = True,
) -> LearnedScheduleResult[M]:
    """Train a network on the continuous-time bound, and the noise schedule with it.  (docs: S.13)

    Afterwards ``GaussianDiffusion(result.schedule, prediction)`` and ``result.model`` go together in
    ``sample``, ``variational_bound`` and ``bits_per_dim``. For a bound take the variance ``"fixed_large"``:
    it is the continuous bound that this loss estimates, up to 1/T.

    Parameters
    ----------
    model : UNet or MLP
        Changed in place.
    data : array of shape (n, ...), or callable
        As for `train`: the data set, or ``data(batch_size, rng)`` that draws a batch.
    T : int
        Length of the chain that is wanted, at least 2. The network is told real times in [0, T-1].
    steps, batch_size : int
        How many updates, on how many samples each.
    seed : int
        Of all randomness, 0 … 2**32 - 1.
    lr, schedule_lr : float
        Adam's learning rate at the end of the warm-up, for the network and for the schedule.
    gamma_0, gamma_1, units
        Where the schedule begins, as in `LearnedSchedule`.
    prediction : {"eps", "x0", "v"}
        What the network learns to predict.
    decoder : {"density", "8bit"}
        The reconstruction: the density of points, or the probability of 8-bit levels for images in [-1, 1].
    even : bool
        Times evenly spaced over each batch, as in `draw_times`.
    warmup : int, optional
        Steps of linear rise of the learning rates. Default: a twentieth of `steps`, at most 500.
    final_lr : float
        Where the cosine of the learning rates ends, as a fraction of their largest.
    clip_norm : float
        Bound on the norm of the network's gradient; ``math.inf`` for none. The schedule's is not clipped.
    ema_decay : float
        Of the moving averages, in [0, 1).
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
    ValueError
        If an argument is out of range or does not fit; the message names it. Also, at the end, if the learned
        end points are not those of a schedule (`LearnedSchedule.schedule`).
    FloatingPointError
        If the loss or the norm of a gradient stops being finite. The model keeps the weights that it had
        before that step.
    """
    check_counts(T=T)
    warmup = check_loop(steps, batch_size, seed, warmup, final_lr, clip_norm, ema_decay, data)
    learned = LearnedSchedule(gamma_0, gamma_1, units)
    parameters = model.named_parameters()
    like = weight_of(model)
    optimizers = [(Adam(parameters, lr), lr), (Adam(learned.named_parameters(), schedule_lr), schedule_lr)]
    averages = EMA(model, ema_decay), EMA(learned, ema_decay)
    losses = np.zeros(steps)

    from tqdm import tqdm

    began = time.perf_counter()
    smooth = math.nan
    with (
        shared_out(model, batch_size, workers) as shared,
        tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar,
    ):
        for step in range(steps):
            rng = np.random.default_rng([seed, STEP, step])
            for optimizer, _ in optimizers:
                optimizer.zero_grad()
            loss_array, backward = learned_schedule_loss(
                shared,
                learned,
                _batch(data, batch_size, seed, step, rng, like),
                rng,
                T=T,
                prediction=prediction,
                decoder=decoder,
                even=even,
            )
            backward()
            loss = float(loss_array)
            norms = (
                float(clip_grad_norm(parameters, clip_norm)),
                float(clip_grad_norm(learned.named_parameters(), math.inf)),
            )
            if not all(map(math.isfinite, (loss, *norms))):
                raise FloatingPointError(
                    f"the loss is {loss}, the norm of the gradient {norms[0]} (network) and {norms[1]} "
                    f"(schedule) at step {step}; try a smaller lr or schedule_lr."
                )
            for optimizer, rate in optimizers:
                optimizer.lr = rate * warmup_cosine(step, steps, warmup, final_lr)
                optimizer.step()
            for average in averages:
                average.update()
            losses[step] = loss
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            bar.set_postfix(bits_per_dim=f"{smooth:.4f}", refresh=False)
            bar.update()
    trained, averaged = averages[0].model, averages[1].model
    return LearnedScheduleResult(trained, averaged.schedule(T), losses, averaged, time.perf_counter() - began)
