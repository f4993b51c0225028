"""The training loop: its progress, its metrics, and how it survives an interruption.

The randomness of a step is a function of (seed, step), and the order of the data a function of (seed,
epoch). So a resumed run is the same run, bit for bit, with no generator state to save.

A step counts once its loss is in the list: it is put there last, so an interruption in the middle of a step
is recognised by a list that is shorter than the optimizer's count.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, array_namespace, asarray_like, standard_normal, to_numpy
from tinydiff.bound import Decoder, check_decoder
from tinydiff.checkpoint import load_arrays, replace_file, save_arrays
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.importance import LossSecondMomentSampler
from tinydiff.kernels import many_steps
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss, vlb_loss
from tinydiff.nn.module import Module
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine

__all__ = ["Loss", "TrainingResult", "train", "training_loss"]

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
        Draws times, noise, and dropout masks.
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
    N = x0.shape[0]
    if t_sampler is None:
        t, t_weights = rng.integers(diffusion.T, size=N), None
    else:
        t, t_weights = t_sampler.sample(N, rng)
    noise = standard_normal(rng, x0.shape, x0)
    output, model_backward = model(diffusion.q_sample(x0, t, noise), t, rng)
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
    progress: bool = True,
) -> TrainingResult[M]:
    """Train with Adam and a moving average of the weights (Ho et al. 2020, algorithm 1).

    The same seed on the same machine gives the same weights bit for bit, whether or not the run was
    interrupted and resumed.

    Parameters
    ----------
    model : UNet or MLP
        Trained in place.
    diffusion : GaussianDiffusion
        The process, and what the model predicts.
    data : array of shape (n, ...), or callable
        The data set, of which each epoch visits every sample once, in a new random order (a batch may end
        one epoch and begin the next); or ``data(batch_size, rng)`` that draws a fresh batch.
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
        step, and the last checkpoint is kept.
    """
    check_counts(steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every, log_every=log_every)
    warmup = min(500, steps // 20) if warmup is None else warmup
    if not 0 <= seed < 2**32:  # NumPy splits a larger one in two words: two seeds would share a stream
        raise ValueError(f"seed is {seed}; expected an integer in 0 … 2**32 - 1.")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}; expected a positive number.")
    warmup_cosine(0, steps, warmup, final_lr)  # refuses what is out of range, before anything is written
    if not callable(data) and len(getattr(data, "shape", ())) < 1:
        raise TypeError(f"data is a {type(data).__name__}; expected an array (n, ...) or a callable.")
    if not callable(data) and data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected at least one sample.")
    _check_loss(loss, diffusion, min_snr_gamma, decoder, importance_sampling)
    if loss != "simple" and not callable(data):  # wrong data shows at once, not where a t = 0 is drawn
        check_decoder(decoder, data[:batch_size, ...])
    parameters = model.named_parameters()
    like = next(iter(parameters.values())).value
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
    optimizer = Adam(parameters, lr, weight_decay=weight_decay)
    ema = EMA(model, ema_decay)
    t_sampler = LossSecondMomentSampler(diffusion.T) if importance_sampling else None
    drawn = None if t_sampler is None else _Drawn(t_sampler)
    run = None if run_dir is None else _Run(Path(run_dir), settings, model, optimizer, ema, t_sampler)
    losses = [] if run is None else run.start(resume)

    from tqdm import tqdm

    began = time.perf_counter()
    bar = tqdm(total=steps, initial=len(losses), desc="training", unit="step", disable=not progress)
    smooth = math.nan
    try:
        for step in range(len(losses), steps):
            rng = np.random.default_rng([seed, STEP, step])
            optimizer.zero_grad()
            x0 = _batch(data, batch_size, seed, step, rng, like)
            loss_array, backward = training_loss(
                model, diffusion, x0, rng, loss, min_snr_gamma=min_snr_gamma, decoder=decoder, t_sampler=drawn
            )
            backward()
            norm_array = clip_grad_norm(parameters, clip_norm)
            optimizer.lr = lr * warmup_cosine(step, steps, warmup, final_lr)
            value, norm = float(loss_array), float(norm_array)
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"the loss is {value} and the gradient's norm {norm} at step {step} (learning rate "
                    f"{optimizer.lr:.3g}); try a smaller lr or a smaller clip_norm."
                )
            optimizer.step()
            ema.update()
            if drawn is not None:
                drawn.remember()
            if run is not None and ((step + 1) % log_every == 0 or step + 1 == steps):
                since = step // log_every * log_every
                run.log(step + 1, [*losses[since:], value], norm, optimizer.lr)
            losses.append(value)

            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if run is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                run.save(losses)
    except KeyboardInterrupt:
        if run is not None and optimizer.steps == len(losses) > 0:
            run.save(losses)
        raise
    finally:
        bar.close()
    return TrainingResult(ema.model, np.asarray(losses), time.perf_counter() - began)


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
    """The batch of a step, beside `like`: drawn by `data`, or its place in the endless row of epochs."""
    if callable(data):
        return asarray_like(data(batch_size, rng), like)
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
        kept = [line for line in self._lines() if line["step"] <= len(losses)]
        replace_file(self.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())
        if kept:
            self.began -= kept[-1]["seconds"]
        if not losses:
            self.checkpoint.unlink(missing_ok=True)  # a finished run's: the files here belong to one run
        return losses

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of metrics there are; a crash may have left the last one incomplete."""
        lines = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
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
