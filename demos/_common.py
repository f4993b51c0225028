"""What the demos share, none of it diffusion: their flags, and how they end when something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

try:
    import tinydiff as td
except ModuleNotFoundError as error:  # tinydiff, or what it needs
    sys.exit(f'{error}: run pip install ".[demos]" first, in the folder of README.md.')
from tinydiff.backend import backend_name
from tinydiff.checkpoint import load_arrays, replace_file
from tinydiff.diffusion import Prediction
from tinydiff.parallel import WorkerError
from tinydiff.samplers import SAMPLERS

LARGEST_BATCH = 1024  # the most that --batch auto takes on a GPU

LOSSES = {  # what their values are
    "simple": "mean squared error",
    "hybrid": "mean squared error + bound / 1000",
    "vlb": "bound, in bits per dimension",
}


# Errors whose message alone tells a user what to put right.
EXPLAINED = (
    td.BackendError, WorkerError, ValueError, FloatingPointError, OSError, ImportError, MemoryError,
)  # fmt: skip
# Those after which the same command may go on: there was no room on the disk, say, and now there is.
FROM_OUTSIDE = (WorkerError, OSError, MemoryError)


class Plain(argparse.ArgumentParser):
    """The flags of a demo that trains or samples, in groups it may add to; a wrong one ends in a sentence."""

    def __init__(self, description: str, epilog: str, out: str, defaults: dict[str, Any]) -> None:
        super().__init__(
            description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file on Windows, say, cannot encode β
            sys.stdout.reconfigure(errors="replace")
        self.set_defaults(**defaults)
        self.run = self.add_argument_group("the run")
        self.run.add_argument(
            "--out", type=folder, metavar="DIR", help=f"where the results go (default: {out})"
        )
        self.run.add_argument(
            "--seed", type=count_from(0), metavar="N", default=0, help="seed of all randomness (default: 0)"
        )
        self.run.add_argument("--quiet", action="store_true", help="print nothing but errors")
        self.run.add_argument(
            "--backend",
            choices=["numpy", "cupy"],
            help="the array library (default: TINYDIFF_BACKEND, or else numpy)",
        )
        self.run.add_argument(
            "--device",
            type=count_from(0),
            metavar="N",
            help="which of the GPUs that CUDA_VISIBLE_DEVICES leaves visible (default: the first)",
        )
        self.run.add_argument(
            "--tf32",
            action="store_true",
            help="let the GPU round the factors of float32 products to 11 binary digits, which may be faster "
            "(the same as CUPY_TF32=1)",
        )
        self.run.add_argument(
            "--workers",
            type=count_from(1),
            metavar="N",
            help="processes that share each batch; 1 may be faster beside other programs (default: one for "
            "each core where that pays)",
        )
        self.data = self.add_argument_group("the data")

    def add_training(self, batch: Callable[[str], Any], or_else: str = "") -> None:
        """Add the groups ``training`` and ``process``; `batch` is the type of --batch."""
        self.training = self.add_argument_group("training")
        self.training.add_argument(
            "--steps", type=count_from(1), metavar="N", help="training steps (default: %(default)s)"
        )
        self.training.add_argument(
            "--batch", type=batch, metavar="N", help=f"data per step{or_else} (default: %(default)s)"
        )
        self.training.add_argument(
            "--lr", type=positive, metavar="RATE", help="learning rate (default: %(default)s)"
        )
        self.process = self.add_argument_group("the diffusion")
        self.process.add_argument(
            "--T", type=count_from(1), metavar="N", help="its length in steps (default: %(default)s)"
        )
        self.process.add_argument(
            "--prediction",
            choices=get_args(Prediction),
            help="what the network outputs: the noise, the data, v = a noise - s data, or flow matching's "
            "noise - data (default: %(default)s)",
        )

    def add_sampling(self) -> None:
        """Add the group of one sampling."""
        self.sampling_steps = self.get_default("sampling_steps")
        self.set_defaults(sampling_steps=None)  # so that only a number the user gave can be too large
        sampling = self.add_argument_group("sampling")
        sampling.add_argument(
            "--samples", type=count_from(1), metavar="N", help="how many (default: %(default)s)"
        )
        sampling.add_argument(
            "--sampler",
            choices=SAMPLERS,
            help="ancestral; DDIM; DPM-Solver++ (2M); Heun; Heun in Karras' variables; the last two ask the "
            "network twice a step (default: %(default)s)",
        )
        sampling.add_argument(
            "--sampling-steps",
            type=count_from(1),
            metavar="N",
            help=f"how many of the T steps to walk through (default: {self.sampling_steps}, at most T)",
        )
        self.sampling = sampling

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help).\n")

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_args(*given)
        if args.tf32 and self._backend(*given) != "cupy":
            self.error("argument --tf32: it is for --backend cupy")
        return args

    def _backend(self, *given: Any) -> str:
        """The backend that the flags or the environment name: other defaults depend on it."""
        first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        first.add_argument("--backend")
        try:
            return backend_name(first.parse_known_args(*given)[0].backend)
        except argparse.ArgumentError:  # the whole parser will name it
            return ""


class Parser(Plain):
    """The flags of a demo that trains one model and samples from it.

    `on_a_gpu` holds the defaults that differ with the cupy backend.
    """

    def __init__(
        self,
        description: str,
        epilog: str,
        out: str,
        defaults: dict[str, Any],
        on_a_gpu: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(description, epilog, out, defaults)
        self.on_a_gpu = on_a_gpu or {}
        self.run.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
        auto = f", or auto: as many as fit in memory, at most the default, or on a GPU {LARGEST_BATCH}"
        self.add_training(count_or_auto, auto)
        self.training.add_argument(
            "--loss",
            choices=LOSSES,
            help="the simple loss; or the hybrid one or the variational bound, for both of which the network "
            "also learns the variance of the reverse steps (default: %(default)s)",
        )
        self.process.add_argument(
            "--schedule", choices=td.pretrained.SCHEDULES, help="how the noise grows (default: %(default)s)"
        )
        self.add_sampling()

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        largest = self.get_default("batch")
        if self._backend(*given) == "cupy":
            largest = LARGEST_BATCH
            self.set_defaults(**self.on_a_gpu)
        args = super().parse_args(*given)
        args.largest_batch = largest
        if args.sampling_steps is None:
            args.sampling_steps = min(self.sampling_steps, args.T)
        if args.sampling_steps > args.T:
            self.error(f"argument --sampling-steps: {args.sampling_steps} is more than --T {args.T}")
        if schedules(args.T)[args.schedule].snr[-1] == 0:  # found out now, and not after the training
            end = f"in noise alone, where --schedule {args.schedule} ends"
            if args.prediction == "eps":
                self.error(f"argument --prediction: eps says nothing of the data {end}")
            if args.sampler == "edm":
                self.error(f"argument --sampler: edm cannot begin {end}; heun can")
        return args


def count_from(least: int, most: int | None = None) -> Any:
    """The type of a flag that takes an integer of at least `least`, and at most `most`."""
    expected = f"at least {least}" if most is None else f"{least} to {most}"

    def count(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {expected}")
        return int(text)

    return count


def count_or_auto(text: str) -> int | str:
    """The type of --batch."""
    if text == "auto":
        return text
    try:
        return count_from(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def finite(text: str) -> float:
    """The type of a flag that takes any number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def positive(text: str) -> float:
    """The type of a flag that takes a positive number."""
    with suppress(argparse.ArgumentTypeError):
        if (number := finite(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def counted(n: int, what: str) -> str:
    """How many there are: "1 step", "2 steps"."""
    return f"{n} {what}{'s' * (n != 1)}"


def walk_of(args: argparse.Namespace) -> str:
    """How it was sampled, for a title: "50 DDIM steps", "1 Heun step"."""
    name = "Heun" if args.sampler == "heun" else args.sampler.upper()  # the others are acronyms
    return counted(args.sampling_steps, f"{name} step")


def schedules(T: int) -> dict[str, td.NoiseSchedule]:
    """The choices of --schedule: those that `td.pretrained.load` rebuilds from a model's file."""
    return {name: schedule(T) for name, schedule in td.pretrained.SCHEDULES.items()}


def learned_variance(loss: str) -> bool:
    """Whether the network of a --loss returns a variance besides its prediction."""
    return loss in ("hybrid", "vlb")


def loss_options(loss: str, decoder: str) -> dict[str, Any]:
    """The options of `td.train` for a --loss; the bound, noisy otherwise, gets its t by importance."""
    return dict(loss=loss, decoder=decoder, importance_sampling=loss == "vlb")


def choose_device(args: argparse.Namespace) -> None:
    """Make the GPU of --device the current one. Call it first: if anything is missing, the demo ends here.

    From then on `args`, and so metrics.json, hold what the environment chose.
    """
    chosen = backend_name(args.backend)
    if chosen == "cupy":
        args.device = args.device or 0
        args.tf32 = args.tf32 or os.environ.get("CUPY_TF32") == "1"
    if args.tf32:
        os.environ["CUPY_TF32"] = "1"  # CuPy looks at it before its first product
    td.get_backend(args.backend, device=args.device)
    args.backend = chosen


def settle_batch(
    args: argparse.Namespace, model: Any, diffusion: td.GaussianDiffusion, data: Any, decoder: str
) -> None:
    """Replace --batch auto by a number: that of the run being resumed, or as many as fit."""
    if args.batch != "auto":
        return
    if args.resume and checkpoint_in(args.out).exists():
        args.batch = load_arrays(checkpoint_in(args.out))[1].get("settings", {}).get("batch_size", args.batch)
    if args.batch == "auto":
        how = dict(loss=args.loss, decoder=decoder, most=args.largest_batch)
        args.batch = td.find_batch_size(model, diffusion, data, **how)
    if not args.quiet:
        print(f"--batch {args.batch}")


def say_if_nothing_resumes(args: argparse.Namespace) -> None:
    """Print a line where --resume finds no run: a mistyped --out looks the same as a first start."""
    if args.resume and not args.quiet and not checkpoint_in(args.out).exists():
        print(f"no checkpoint in {args.out}: the run begins with step 1")


def save_trained(args: argparse.Namespace, model: Any, diffusion: td.GaussianDiffusion, data: str) -> None:
    """Write model.safetensors, with what `td.pretrained.load` needs; `data` is the flag that names it."""
    keys = [data, "schedule", "T", "prediction", "loss", "steps", "seed"]
    about = {key: getattr(args, key) for key in keys} | {"variance": diffusion.variance}
    td.save_model(args.out / "model.safetensors", model, about)


def checkpoint_in(out: Path) -> Path:
    """The checkpoint that `td.train` leaves in its folder."""
    return out / "checkpoint.safetensors"


def training_seconds(out: Path) -> float:
    """Seconds of the whole run in `out`, however often it was resumed: from the last line of its metrics."""
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def path(text: str) -> Path:
    """The type of a flag that takes a path: ~ is the home folder, even if no shell has expanded it."""
    try:
        place = Path(text).expanduser()
        place.exists()
    except (OSError, RuntimeError) as error:  # not permitted, or there is no home folder
        raise argparse.ArgumentTypeError(f"{text} is out of reach: {error}") from None
    return place


def folder(text: str) -> Path:
    """The type of a flag that takes a folder."""
    place = path(text)
    if place.exists() and not place.is_dir():
        raise argparse.ArgumentTypeError(f"{place} is not a directory")
    return place


@contextmanager
def explained_errors(out: Path, interrupted: str | None = None, resume: bool = False) -> Iterator[None]:
    """Turn errors that a user can put right into a sentence and exit code 2, and Ctrl-C into a line and 130.

    `interrupted` is that line; the default says whether this run has left a checkpoint in `out`, or with
    `resume` may have begun from one. SIGTERM, by which a cluster or a container ends what runs in it, counts
    as Ctrl-C. So does SIGHUP, sent by a terminal that is closed or has lost its connection. A signal that is
    ignored, as SIGHUP after nohup, stays so.
    """
    ends = (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
    before = {end: was for end in ends if (was := signal.getsignal(end)) not in (signal.SIG_IGN, None)}
    for end in before:
        signal.signal(end, signal.default_int_handler)
    checkpoint = checkpoint_in(out)
    found = _written(checkpoint)
    kept = f"{checkpoint} is kept; the same command with --resume continues from it."
    try:
        yield
    except KeyboardInterrupt:
        begun = _written(checkpoint) not in (None, None if resume else found)
        nothing = "Interrupted before the first checkpoint: nothing of this run is kept."
        print(interrupted or (f"Interrupted: {kept}" if begun else nothing), file=sys.stderr)
        sys.exit(130)
    except EXPLAINED as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, FROM_OUTSIDE) and _written(checkpoint) not in (None, found):
            print(kept, file=sys.stderr)
        sys.exit(2)
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _written(path: Path) -> int | None:
    """When; None if there is no such file, or it is out of reach."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def write_samples(out: Path, samples: np.ndarray) -> None:
    """Write samples.npy: whole, or not at all."""
    content = io.BytesIO()
    np.save(content, samples)
    replace_file(out / "samples.npy", content.getvalue())


def write_metrics(args: argparse.Namespace, **metrics: Any) -> None:
    """Write metrics.json: `metrics`, peak memory, and the settings of the run."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {**metrics, "peak_memory_mib": peak_memory_mib(), "settings": settings}
    replace_file(args.out / "metrics.json", (json.dumps(content, indent=2) + "\n").encode())


def peak_memory_mib() -> float | None:
    """The most memory this process has held at a time, and the largest that shared its work, together.

    What the two share counts twice. None where the system does not say.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    held = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(sum(held) * unit / 2**20, 1)
