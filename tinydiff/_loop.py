"""The loop of a training: its progress, its metrics, and how it survives an interruption.

The randomness of a step is a function of (seed, step), and the order of the data (``_data.py``) a function of
(seed, epoch). So a resumed run is the same run, bit for bit, with no generator state to save.

A step counts once its loss is among the readings (``_readings.py``): it is put there last, so after an
interruption in the middle of a step there are fewer losses than steps that the optimizer has counted.

On a GPU everything stays where it is. Times and tables live on the host, data, noise, loss and weights on the
device, and the host runs ahead of the device. It waits only where numbers are read, at a line of metrics and
at a checkpoint, and then reads the numbers of all steps since the last time at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import check_counts, check_number, check_seed, class_or_kind
from tinydiff._data import (
    STEP,
    Data,
    Labels,
    batch_of,
    beside,
    check_data,
    mean_and_rms,
    sample_shape,
    warn_of_scale,
)
from tinydiff._graph import WARM_UP, RecordedLoss
from tinydiff._progress import progress_bar
from tinydiff._readings import Kept, Readings
from tinydiff._run import Run, Stateful, load_states, states_of
from tinydiff.backend import Array, array_namespace, asarray_like, device, to_numpy
from tinydiff.checkpoint import model_name
from tinydiff.memory import attempted, what_fits
from tinydiff.models._checks import check_model
from tinydiff.nn.module import config_of, weight_of
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.parallel import shared_out

__all__ = ["Learner", "Objective", "checked_plan", "loop", "run_in", "trial"]

# Takes a network (or a DataParallel of it), a batch and a generator, and the batch's labels if there are any;
# returns the loss, and a function that adds to the gradients.
Objective: TypeAlias = Callable[..., tuple[Array, Callable[[], Any]]]


@dataclass(frozen=True)
class Plan:
    """The numbers that both kinds of training are given, made by `checked_plan`."""

    steps: int
    batch_size: int
    seed: int
    warmup: int
    final_lr: float
    clip_norm: float
    ema_decay: float

    def settings(self) -> dict[str, Any]:
        """The numbers as JSON can hold them: it has no infinity."""
        return {**asdict(self), "clip_norm": str(self.clip_norm)}


class Learner:
    """What is trained: a module, its optimizer, and the moving average of its weights.

    Parameters
    ----------
    model : Module
        Trained in place.
    lr, weight_decay, clip_norm, ema_decay : float
        As for `tinydiff.train`.
    """

    def __init__(
        self, model: Any, lr: float, *, clip_norm: float, ema_decay: float, weight_decay: float = 0.0
    ) -> None:
        check_model(model)
        self.model = model
        self.lr = lr
        self.clip_norm = clip_norm
        self.parameters = model.named_parameters()
        self.optimizer = Adam(self.parameters, lr, weight_decay=weight_decay)
        self.ema = EMA(model, ema_decay)
        self._parts: dict[str, Stateful] = {"model.": model, "ema.": self.ema, "adam.": self.optimizer}

    def step(self, factor: float) -> None:
        """Move the weights, at `factor` times the learning rate, and their average."""
        self.optimizer.lr = self.lr * factor
        self.optimizer.step()
        self.ema.update()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Weights, average and moments, on the host."""
        return states_of(self._parts)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `state_dict` returned; whatever else is in `state` is ignored."""
        load_states(self._parts, _brought_up_to_date(state))


def _brought_up_to_date(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The state by today's names: older versions called the average ``ema.`` and kept no count of steps."""
    if "adam.steps" in state:
        return state
    renamed = {re.sub(r"^ema\.", "ema.model.", name): array for name, array in state.items()}
    return {**renamed, "adam.steps": np.asarray(0), "ema.steps": np.asarray(0)}


def loop(
    learners: Sequence[Learner],
    loss: Objective,
    data: Data,
    run: Run | None,
    plan: Plan,
    *,
    resume: bool,
    checkpoint_every: int,
    log_every: int,
    workers: int | None,
    progress: bool,
    at_once: bool,
    counted: Callable[[], None] = lambda: None,
    unit: str = "loss",
    labels: Labels | None = None,
) -> list[float]:
    """Train the first of `learners`, a network, and what else takes part in the loss; returns every loss.

    Parameters
    ----------
    learners : sequence of Learner
        The first of them is shared out to processes.
    loss : callable
        See `Objective`.
    data, resume, checkpoint_every, log_every, workers, progress
        As for `tinydiff.train`, and checked.
    run : Run or None
        The files, if any.
    plan : Plan
        The numbers.
    at_once : bool
        Read the loss at every step: for where reading costs nothing, or the next step needs the number.
    counted : callable
        Called when a step is about to count.
    unit : str
        What the progress bar calls the loss.
    labels : Labels, optional
        The classes of the data, or of what it draws.
    """
    if resume and run is None:
        raise ValueError("resume is True and run_dir None; expected the directory of the run to continue.")
    network = learners[0]
    like = weight_of(network.model)
    data = beside(data, like)
    losses = [] if run is None else run.start(resume)
    start = len(losses)
    for learner in learners:
        learner.optimizer.steps = learner.ema.steps = start  # which older checkpoints do not say
    kept = None if at_once else Kept(network.parameters, start)

    def factor(step: int) -> float:
        return warmup_cosine(step, plan.steps, plan.warmup, plan.final_lr)

    def all_steps() -> list[float]:
        with ExitStack() as stack:
            if run is not None:
                stack.callback(run.end)
            # `Readings` says if a number is not finite, NumPy need not; the processes inherit the setting.
            stack.enter_context(np.errstate(over="ignore", invalid="ignore"))
            shared = stack.enter_context(shared_out(network.model, plan.batch_size, workers))
            bar = progress_bar(progress, total=plan.steps, initial=start, desc="training", unit="step")
            stack.enter_context(bar)
            readings = Readings(
                losses,
                run,
                kept,
                rate=lambda step: network.lr * factor(step),
                show=lambda mean: bar.set_postfix({unit: f"{mean:.4f}"}, refresh=False),
                steps=plan.steps,
                log_every=log_every,
                checkpoint_every=checkpoint_every,
            )
            try:
                for step in range(start, plan.steps):
                    rng = np.random.default_rng([plan.seed, STEP, step])
                    x0, *told = batch_of(data, labels, plan.batch_size, plan.seed, step, rng, like)
                    if callable(data) and step == start:
                        warn_of_scale(x0, 7)  # all_steps, attempted, loop, train, many_steps, the caller
                    pair = _loss_and_norm(learners, shared, loss, x0, rng, *told)
                    read = readings.read(step, pair)
                    if run is not None:
                        run.begin()
                    for learner in learners:
                        learner.step(factor(step))
                    counted()
                    readings.count(step, pair, read)
                    bar.update()
            except KeyboardInterrupt:
                if network.optimizer.steps == len(readings) > start:
                    readings.save()
                raise
            return readings.losses

    done, refused = attempted(all_steps)
    if refused:
        step = trial(loss, [learner.model for learner in learners], data, like)
        raise MemoryError(what_fits(step, like, plan.batch_size, refused))
    return done


def _loss_and_norm(
    learners: Sequence[Learner],
    network: Any,
    loss: Objective,
    x0: Array,
    rng: np.random.Generator,
    *labels: np.ndarray,
) -> tuple[Array, Array]:
    """Forward and backward of a batch: the loss, and the joint norm of the gradients, which are clipped."""
    for learner in learners:
        learner.optimizer.zero_grad()
    value, backward = loss(network, x0, rng, *labels)
    backward()
    norms = [clip_grad_norm(learner.parameters, learner.clip_norm) for learner in learners]
    return value, norms[0] if len(norms) == 1 else asarray_like(math.hypot(*map(float, norms)), norms[0])


def trial(loss: Objective, models: Sequence[Any], data: Data, like: Array) -> Callable[[int], None]:
    """step(n): forward and backward of a batch of n, whose gradients are thrown away.

    A loss that records is called until it does; the recording is thrown away, too.
    """
    xp = array_namespace(like)
    shape = sample_shape(data)

    def step(n: int) -> None:
        # Of -1, which the 8-bit decoder accepts, too.
        x0 = xp.full((n, *shape), -1.0, dtype=like.dtype, device=device(like))
        try:
            for _ in range(WARM_UP + 1 if isinstance(loss, RecordedLoss) else 1):
                for model in models:
                    model.zero_grad()
                _, backward = loss(models[0], x0, np.random.default_rng(0))
                backward()
                del backward
        finally:
            for model in models:
                model.zero_grad()
            if isinstance(loss, RecordedLoss):
                loss.forget()

    return step


def run_in(
    run_dir: str | Path | None,
    states: Mapping[str, Stateful],
    about: Callable[[], Mapping[str, Any]],
    model: Any,
    data: Data,
    data_name: str,
    plan: Plan,
    labels: Labels | None,
    **others: Any,
) -> Run | None:
    """The run's files; None without a `run_dir`. TypeError unless `data_name` is a str, or as `Run`.

    A run depends on the network, the data, the plan, the labels and `others`; `states` and `about` are
    `Run`'s.
    """
    if not isinstance(data_name, str):
        raise TypeError(f"data_name is {class_or_kind(data_name)}; expected a str.")
    if run_dir is None:
        return None
    settings = {
        "model": model_name(model),
        "config": dict(config_of(model)) or None,
        "dtype": str(to_numpy(weight_of(model)).dtype),
        "data": "callable" if callable(data) else [int(size) for size in data.shape],
        "data_mean_and_rms": mean_and_rms(data),
        "data_name": data_name,
        **plan.settings(),
        **others,
        **(dict(labels=None, label_dropout=None) if labels is None else labels.settings()),
    }
    return Run(Path(run_dir), settings, states, about)


def checked_plan(
    steps: int,
    batch_size: int,
    seed: int,
    warmup: int | None,
    final_lr: float,
    clip_norm: float,
    ema_decay: float,
    data: Data,
) -> Plan:
    """The numbers of a training; ValueError, or TypeError for `data`, naming the first that does not fit."""
    check_counts(steps=steps, batch_size=batch_size)
    check_seed(seed)
    warmup = min(500, steps // 20) if warmup is None else warmup
    check_number(
        "warmup", warmup, lambda n: 0 <= n <= steps and n == int(n), f"an integer in 0 ... steps = {steps}"
    )
    check_number("final_lr", final_lr, lambda rate: 0 <= rate <= 1, "a number in [0, 1]")
    check_number("clip_norm", clip_norm, lambda norm: norm > 0, "a positive number")
    check_number("ema_decay", ema_decay, lambda decay: 0 <= decay < 1, "a number in [0, 1)")
    check_data(data)
    warn_of_scale(data, 5)  # checked_plan, train, many_steps, the caller
    counts = int(steps), int(batch_size), int(seed), int(warmup)
    return Plan(*counts, float(final_lr), float(clip_norm), float(ema_decay))
