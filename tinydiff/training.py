"""The training loop: its progress, its metrics, and how it survives an interruption.

The randomness of a step is a function of (seed, step), and the order of the data a function of (seed,
epoch). So a resumed run is the same run, bit for bit, with no generator state to save.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from tinydiff.backend import Array, array_namespace, asarray_like, standard_normal, to_numpy
from tinydiff.checkpoint import load_arrays, replace_file, save_arrays
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import simple_loss
from tinydiff.nn.module import Module
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine

__all__ = ["TrainingResult", "train", "training_loss"]

M = TypeVar("M", bound=Module)
Data = Any  # an array (n, ...), or a callable (batch_size, rng) -> array (batch_size, ...)

# The independent streams of randomness that a seed stands for.
STEP, EPOCH = 0, 1


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


def training_loss(
    model: Any, diffusion: GaussianDiffusion, x0: Array, rng: np.random.Generator
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
        Draws times, noise, and dropout masks.

    Returns
    -------
    loss : array, 0-d
    backward : callable
        Without argument; adds to the gradients of the model's parameters.
    """
    t = rng.integers(diffusion.schedule.T, size=x0.shape[0])
    noise = standard_normal(rng, x0.shape, x0)
    output, model_backward = model(diffusion.q_sample(x0, t, noise), t, rng)
    loss, gradient = simple_loss(diffusion, output, x0, t, noise)
    return loss, lambda: model_backward(gradient)


def train(
    model: M,
    diffusion: GaussianDiffusion,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    lr: float = 1e-3,
    warmup: int | None = None,
    final_lr: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 50,
    progress: bool = True,
) -> TrainingResult[M]:
    """Train with the simple loss, Adam, and a moving average of the weights (Ho et al. 2020, algorithm 1).

    The same seed on the same machine gives the same weights bit for bit, whether or not the run was
    interrupted and resumed.

    Parameters
    ----------
    model : UNet or MLP
        Trained in place.
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    data : array of shape (n, ...), or callable
        The data set, visited in a new random order each epoch; or ``data(batch_size, rng)`` that draws a
        fresh batch.
    steps : int
        Number of training steps in all.
    batch_size : int
        Samples per step.
    seed : int
        Seed of everything random.
    lr : float
        Learning rate after warm-up.
    warmup : int, optional
        Steps over which the rate rises from 0. Default: a twentieth of `steps`, 500 at most.
    final_lr : float
        What the cosine falls to at the end, as a fraction of `lr`; 1: no fall.
    weight_decay : float
        Decoupled weight decay (AdamW).
    clip_norm : float
        Bound on the joint norm of all gradients; ``math.inf``: none.
    ema_decay : float
        Decay of the moving average of the weights.
    run_dir : path, optional
        Directory for ``metrics.jsonl`` (a line every `log_every` steps) and ``checkpoint.safetensors``.
        Default: nothing is written.
    resume : bool
        Continue from the checkpoint in `run_dir`, if there is one.
    checkpoint_every : int
        Steps between checkpoints; the last step always leaves one.
    log_every : int
        Steps between lines of metrics.
    progress : bool
        Show a progress bar (loss, steps per second, time left) on the standard error stream.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ValueError
        If an argument is out of range; if the checkpoint in `run_dir` was made with other settings; or if
        it belongs to an unfinished run and `resume` is False. Nothing on disk is changed then.
    FloatingPointError
        If the loss stops being finite; the last checkpoint is kept.
    """
    _check_positive(
        steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every, log_every=log_every
    )
    warmup = min(500, steps // 20) if warmup is None else warmup
    settings = {
        "model": type(model).__name__,
        "config": model.config,  # type: ignore[attr-defined]
        "betas": _digest(diffusion.schedule.betas),
        "prediction": diffusion.prediction,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "lr": lr,
        "warmup": warmup,
        "final_lr": final_lr,
        "weight_decay": weight_decay,
        "clip_norm": str(clip_norm),
        "ema_decay": ema_decay,
    }
    parameters = model.named_parameters()
    optimizer = Adam(parameters, lr, weight_decay=weight_decay)
    ema = EMA(model, ema_decay)
    run = None if run_dir is None else _Run(Path(run_dir), settings, model, optimizer, ema)
    losses = [] if run is None else run.start(resume)
    like = next(iter(parameters.values())).value
    batches = _batches(data, batch_size, seed, len(losses), like)

    from tqdm import tqdm

    began = time.perf_counter()
    with tqdm(total=steps, initial=len(losses), desc="training", unit="step", disable=not progress) as bar:
        smooth = math.nan
        for step in range(len(losses), steps):
            rng = np.random.default_rng([seed, STEP, step])
            loss_array, backward = training_loss(model, diffusion, next(batches)(rng), rng)
            backward()
            norm = clip_grad_norm(parameters, clip_norm)
            optimizer.lr = lr * warmup_cosine(step, steps, warmup, final_lr)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

            loss = float(loss_array)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step} (learning rate {optimizer.lr:.3g}); "
                    "try a smaller lr or a smaller clip_norm."
                )
            losses.append(loss)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if run is not None:
                if (step + 1) % log_every == 0 or step + 1 == steps:
                    run.log(step + 1, losses[-log_every:], float(norm), optimizer.lr)
                if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                    run.save(losses)
    return TrainingResult(ema.model, np.asarray(losses), time.perf_counter() - began)


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} is {count!r}; expected an integer of at least 1.")


def _digest(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def _batches(
    data: Data, batch_size: int, seed: int, first_step: int, like: Array
) -> Iterator[Callable[[np.random.Generator], Array]]:
    """From `first_step` on: for every step a function from that step's generator to its batch."""
    if callable(data):
        while True:
            yield lambda rng: asarray_like(data(batch_size, rng), like)
    n = data.shape[0]
    per_epoch = n // batch_size
    if per_epoch < 1:
        raise ValueError(f"batch_size is {batch_size}, but data holds only {n}.")
    step = first_step
    while True:
        epoch, batch = divmod(step, per_epoch)
        if batch == 0 or step == first_step:
            order = np.random.default_rng([seed, EPOCH, epoch]).permutation(n)
        index = order[batch * batch_size : (batch + 1) * batch_size]
        yield lambda rng, index=index: _take(data, index, like)  # type: ignore[misc]
        step += 1


def _take(data: Array, index: np.ndarray, like: Array) -> Array:
    xp = array_namespace(data)
    return asarray_like(xp.take(data, asarray_like(index, data, xp.int64), axis=0), like)


class _Run:
    """The files of a run: ``metrics.jsonl`` and ``checkpoint.safetensors``."""

    def __init__(
        self, directory: Path, settings: dict[str, Any], model: Any, optimizer: Adam, ema: EMA
    ) -> None:
        self.checkpoint = directory / "checkpoint.safetensors"
        self.metrics = directory / "metrics.jsonl"
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.began = time.time()

    def start(self, resume: bool) -> list[float]:
        """Take up the checkpoint if there is one to take up; return the losses so far."""
        losses: list[float] = []
        if self.checkpoint.exists():
            arrays, metadata = load_arrays(self.checkpoint)
            if resume:
                self._check_settings(metadata["settings"])
                losses = self._restore(arrays)
            elif metadata["step"] < metadata["settings"]["steps"]:
                raise ValueError(
                    f"{self.checkpoint} is an unfinished run (step {metadata['step']} of "
                    f"{metadata['settings']['steps']}): pass resume=True (--resume) to continue it, choose "
                    "another directory, or delete it to begin again."
                )
        lines = self.metrics.read_text().splitlines() if losses and self.metrics.exists() else []
        kept = [line for line in lines if line and json.loads(line)["step"] <= len(losses)]
        replace_file(self.metrics, "".join(line + "\n" for line in kept).encode())
        return losses

    def _check_settings(self, before: dict[str, Any]) -> None:
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
        losses = [float(loss) for loss in arrays["losses"]]
        self.optimizer.steps = self.ema.steps = len(losses)
        return losses

    def save(self, losses: list[float]) -> None:
        """Write the whole state of the run."""
        arrays = {f"model.{k}": a for k, a in self.model.state_dict().items()}
        arrays |= {f"ema.{k}": a for k, a in self.ema.model.state_dict().items()}
        for moments, name in [(self.optimizer.m, "m"), (self.optimizer.v, "v")]:
            arrays |= {f"adam.{name}.{i}": to_numpy(moment) for i, moment in enumerate(moments)}
        arrays["losses"] = np.asarray(losses)
        save_arrays(self.checkpoint, arrays, {"step": len(losses), "settings": self.settings})

    def log(self, step: int, losses: list[float], grad_norm: float, lr: float) -> None:
        """Append a line of metrics; the loss is the mean since the line before."""
        line = {
            "step": step,
            "loss": float(np.mean(losses)),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": round(time.time() - self.began, 3),
        }
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
