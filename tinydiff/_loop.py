"""The loop of a training: its progress, its metrics, and how it survives an interruption.

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
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import check_counts, check_number, check_seed, check_unmasked
from tinydiff._graph import WARM_UP, RecordedLoss
from tinydiff._progress import progress_bar
from tinydiff._readings import Kept, Losses, check_finite
from tinydiff._run import Run, Stateful, load_states, states_of
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    device,
    integers_like,
    is_numpy_array,
    to_numpy,
)
from tinydiff.memory import is_out_of_memory, reason, what_fits
from tinydiff.models._checks import check_model
from tinydiff.nn.module import config_of, weight_of
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.parallel import shared_out

__all__ = [
    "Data",
    "Learner",
    "Objective",
    "beside",
    "check_data",
    "checked_plan",
    "loop",
    "settings_of",
    "trial",
]

Data: TypeAlias = Any  # an array (n, ...), or a callable (batch_size, rng) -> array (batch_size, ...)

# Takes a network (or a DataParallel of it), a batch and a generator; returns the loss, and what adds to the
# gradients.
Objective: TypeAlias = Callable[[Any, Array, np.random.Generator], tuple[Array, Callable[[], Any]]]

# A root mean square beyond which data is taken to be unscaled by mistake: 8-bit levels have about 100.
LARGE = 10

SEEN = 256  # samples that are looked at, for the scale of the data

# The independent streams of randomness that a seed stands for. None is 0: NumPy pads a seed with zeros, so
# that [seed, 0, 0] is the stream of `seed` itself, from which the model may have been drawn.
STEP, EPOCH = 1, 2


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
        """As JSON holds them; it has no infinity."""
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
        """The other way; what else is in `state` is left alone."""
        load_states(self._parts, _as_now(state))


def _as_now(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """An older state names the average's weights without ``model.``, and leaves the count to the losses."""
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
) -> list[float]:
    """Train the first of `learners`, a network, and what else takes part in the loss; returns every loss.

    Parameters
    ----------
    learners : sequence of Learner
        Of which the first is shared out to processes.
    loss : callable
        See `Objective`.
    data, resume, checkpoint_every, log_every, workers, progress
        As for `tinydiff.train`, and checked.
    run : Run or None
        The files, if any.
    plan : Plan
        The numbers.
    at_once : bool
        Read the loss of every step: where a number costs nothing, or the next step needs it.
    counted : callable
        Called when a step is about to count.
    unit : str
        What the progress bar calls the loss.
    """
    if resume and run is None:
        raise ValueError("resume is True and run_dir None; expected the directory of the run to continue.")
    network, steps = learners[0], plan.steps
    like = weight_of(network.model)
    data = beside(data, like)
    losses = Losses([] if run is None else run.start(resume))
    start = len(losses)
    for learner in learners:
        learner.optimizer.steps = learner.ema.steps = start  # which older checkpoints do not say
    kept = None if at_once else Kept(network.parameters, start)

    def factor(step: int) -> float:
        return warmup_cosine(step, steps, plan.warmup, plan.final_lr)

    processes = ExitStack()
    # A number that is not finite is said by `check_finite`, not by NumPy; the processes inherit it.
    processes.enter_context(np.errstate(over="ignore", invalid="ignore"))
    shared = processes.enter_context(shared_out(network.model, plan.batch_size, workers))
    bar = progress_bar(progress, total=steps, initial=start, desc="training", unit="step")
    smooth = math.nan
    refused = ""
    backward: Any = None
    try:
        for step in range(start, steps):
            rng = np.random.default_rng([plan.seed, STEP, step])
            for learner in learners:
                learner.optimizer.zero_grad()
            x0 = batch_of(data, plan.batch_size, plan.seed, step, rng, like)
            if callable(data) and step == start:
                _warn_of_scale(x0)
            loss_array, backward = loss(shared, x0, rng)
            backward()
            norm_array = _joint([clip_grad_norm(one.parameters, one.clip_norm) for one in learners])
            last = step + 1 == steps
            line_due = (step + 1) % log_every == 0 or last
            save_due = run is not None and ((step + 1) % checkpoint_every == 0 or last)
            reading = at_once or line_due or save_due
            if reading:
                first, numbers = losses.read((loss_array, norm_array))
                check_finite(first, numbers, lambda step: network.lr * factor(step), kept)
            if run is not None:
                run.begin()
            for learner in learners:
                learner.step(factor(step))
            counted()
            if not reading:
                losses.append((loss_array, norm_array))
            else:
                values = [value for value, _ in numbers]
                if run is not None and line_due:
                    since = step // log_every * log_every
                    run.log(step + 1, [*losses[since:first], *values], numbers[-1][1], network.optimizer.lr)
                losses.replace(first, values)
                if kept is not None:
                    kept.keep(step + 1)
                for value in values:
                    smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
                bar.set_postfix({unit: f"{smooth:.4f}"}, refresh=False)
            bar.update()
            if run is not None and save_due:
                run.save(losses[:])
    except KeyboardInterrupt:
        if run is not None and network.optimizer.steps == len(losses) > start:
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
        if run is not None:
            run.end()
    if refused:
        x0 = loss_array = norm_array = backward = None
        models = [learner.model for learner in learners]
        raise MemoryError(what_fits(trial(loss, models, data, like), like, plan.batch_size, refused))
    return losses[:]


def _joint(norms: list[Array]) -> Array:
    """The norm of all gradients from those of the learners'."""
    return norms[0] if len(norms) == 1 else asarray_like(math.hypot(*map(float, norms)), norms[0])


def trial(loss: Objective, models: Sequence[Any], data: Data, like: Array) -> Callable[[int], None]:
    """step(n): forward and backward of a batch of n, whose gradients are thrown away.

    A loss that records is asked as often as it takes to; what it has recorded goes, too.
    """
    xp = array_namespace(like)
    shape = (data(1, np.random.default_rng(0)) if callable(data) else data).shape[1:]

    def step(n: int) -> None:
        x0 = xp.full((n, *shape), -1.0, dtype=like.dtype, device=device(like))  # -1 is an 8-bit level
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


def settings_of(model: Any, data: Data, data_name: str, plan: Plan, **others: Any) -> dict[str, Any]:
    """What a run depends on: network, data, plan and `others`; TypeError unless `data_name` is a str."""
    if not isinstance(data_name, str):
        raise TypeError(f"data_name is a {type(data_name).__name__}; expected a str.")
    return {
        "model": type(model).__name__,
        "config": dict(config_of(model)) or None,
        "dtype": str(to_numpy(weight_of(model)).dtype),
        "data": "callable" if callable(data) else [int(size) for size in data.shape],
        "data_mean_and_rms": _moments(data),
        "data_name": data_name,
        **plan.settings(),
        **others,
    }


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
    _warn_of_scale(data)
    counts = int(steps), int(batch_size), int(seed), int(warmup)
    return Plan(*counts, float(final_lr), float(clip_norm), float(ema_decay))


def check_data(data: Data) -> None:
    """TypeError or ValueError unless it is callable, or an array of at least one sample, of floats."""
    if callable(data):
        return
    if len(getattr(data, "shape", ())) < 1:
        raise TypeError(f"data is a {type(data).__name__}; expected an array (n, ...) or a callable.")
    if data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected at least one sample.")
    _check_values("data", data)


def _moments(data: Data) -> list[float] | None:
    """Mean and root mean square of some samples, by which other data are told; None if not on the host."""
    if not is_numpy_array(data) or not data.size:
        return None
    return _mean_and_scale(data[:: -(-len(data) // SEEN)])


def _mean_and_scale(some: np.ndarray) -> list[float]:
    """Mean and root mean square in float64, one sample after the other: of large pictures a few fit twice."""
    means = [np.mean(one, dtype=np.float64) for one in some]
    squares = [np.mean(np.square(one, dtype=np.float64)) for one in some]
    return [float(np.mean(means)), math.sqrt(np.mean(squares))]


def _warn_of_scale(data: Data) -> None:
    """Warn whoever called the training of data that the noise hardly hides, and of pictures not centred."""
    if not is_numpy_array(data) or not data.size:
        return
    some = data[:SEEN]
    _, scale = _mean_and_scale(some)
    if some.ndim == 4 and 0 <= np.min(some) < np.max(some) <= 1:
        warnings.warn(
            f"data are pictures in [{np.min(some):.3g}, {np.max(some):.3g}], and expected in [-1, 1] (from "
            "[0, 1], 2 * x - 1): the noise has a mean of 0.",
            stacklevel=5,  # as below
        )
    if scale > LARGE:
        warnings.warn(
            f"data has a root mean square of {scale:.3g}, and the noise 1, which hardly hides it: is it "
            "scaled? Pictures are expected in [-1, 1] (from 0 ... 255, x / 127.5 - 1), points with a "
            "variance of about 1.",
            stacklevel=5,  # _warn_of_scale, checked_plan or loop, train, many_steps, the caller
        )


def _check_values(name: str, values: Array) -> None:
    """ValueError unless they are real floating numbers; with NumPy, finite ones."""
    check_unmasked(name, values)
    if not array_namespace(values).isdtype(values.dtype, "real floating"):
        raise ValueError(
            f"{name} has dtype {values.dtype}; expected a real floating one (of 8-bit images, x / 127.5 - 1)."
        )
    if is_numpy_array(values) and not all(np.isfinite(part).all() for part in _parts(values)):
        raise ValueError(f"{name} holds numbers that are not finite.")


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """In parts, because a file that is mapped into memory may be larger than the memory."""
    return (values[start : start + 1024] for start in range(0, len(values), 1024))


def beside(data: Data, like: Array) -> Data:
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


def batch_of(
    data: Data, batch_size: int, seed: int, step: int, rng: np.random.Generator, like: Array
) -> Array:
    """The batch of a step, beside `like`: what `data` draws, or the next samples in the sequence of epochs.

    An array is indexed where it is, by an index that is made on the host.
    """
    if callable(data):
        batch = data(batch_size, rng)
        if len(getattr(batch, "shape", ())) < 1 or batch.shape[0] != batch_size:
            came = f"has shape {batch.shape}" if hasattr(batch, "shape") else f"is a {type(batch).__name__}"
            raise ValueError(f"data(batch_size, rng) {came}; expected an array ({batch_size}, ...).")
        _check_values("data(batch_size, rng)", batch)
        return asarray_like(batch, like)
    n = data.shape[0]
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    index = np.concat([_order(seed, e, n)[max(0, start - e * n) : stop - e * n] for e in epochs])
    xp = array_namespace(data)
    return asarray_like(xp.take(data, integers_like(index, data), axis=0), like)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n samples."""
    return np.random.default_rng([seed, EPOCH, epoch]).permutation(n)
