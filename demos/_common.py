"""What the demos share, none of it diffusion: their flags, and how they end when something is wrong."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import tinydiff as td
from tinydiff.samplers import SAMPLERS


class SamplingParser(argparse.ArgumentParser):
    """The flags of every demo that samples, in groups; a wrong one ends in one sentence."""

    def __init__(self, description: str, epilog: str, out: str, defaults: dict[str, Any]) -> None:
        super().__init__(
            description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.sampling_steps = defaults["sampling_steps"]
        self.set_defaults(**{**defaults, "sampling_steps": None})
        self.run = run = self.add_argument_group("the run")
        run.add_argument("--out", type=Path, metavar="DIR", help=f"where the results go (default: {out})")
        run.add_argument(
            "--seed", type=count_from(0), metavar="N", default=0, help="of everything random (default: 0)"
        )
        run.add_argument("--quiet", action="store_true", help="print nothing but errors")
        run.add_argument(
            "--backend",
            choices=["numpy", "cupy"],
            help="the array library (default: TINYDIFF_BACKEND, or else numpy)",
        )
        self.data = self.add_argument_group("the data")
        self.add_groups()
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

    def add_groups(self) -> None:
        """Add what a kind of demo has between the data and sampling; here nothing."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help).\n")

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_args(*given)
        if args.out is not None and args.out.exists() and not args.out.is_dir():
            self.error(f"argument --out: {args.out} is not a directory")
        return args


class Parser(SamplingParser):
    """And those of the demos that train."""

    def add_groups(self) -> None:
        self.run.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
        self.training = self.add_argument_group("training")
        self.training.add_argument(
            "--steps", type=count_from(1), metavar="N", help="training steps (default: %(default)s)"
        )
        self.training.add_argument(
            "--batch", type=count_from(1), metavar="N", help="data per step (default: %(default)s)"
        )
        self.training.add_argument(
            "--lr", type=positive, metavar="RATE", help="learning rate (default: %(default)s)"
        )
        process = self.add_argument_group("the diffusion")
        process.add_argument(
            "--schedule", choices=["linear", "cosine"], help="of the noise (default: %(default)s)"
        )
        process.add_argument("--T", type=count_from(1), metavar="N", help="its length (default: %(default)s)")
        process.add_argument(
            "--prediction", choices=["eps", "x0", "v"], help="what the network outputs (default: %(default)s)"
        )

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_args(*given)
        if args.sampling_steps is None:
            args.sampling_steps = min(self.sampling_steps, args.T)
        if args.sampling_steps > args.T:
            self.error(f"argument --sampling-steps: {args.sampling_steps} is more than --T {args.T}")
        return args


def count_from(least: int) -> Any:
    """The type of a flag that takes an integer of at least `least`."""

    def count(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return int(text)

    return count


def positive(text: str) -> float:
    """The type of a flag that takes a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def schedules(T: int) -> dict[str, td.NoiseSchedule]:
    """The choices of --schedule."""
    return {"linear": td.linear_schedule(T), "cosine": td.cosine_schedule(T)}


@contextmanager
def explained_errors(out: Path | None) -> Iterator[None]:
    """End what a user can put right in one sentence and exit code 2, and Ctrl-C in one line and 130."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # td.train says when a loss is not finite
            yield
    except KeyboardInterrupt:
        print(_what_is_kept(out), file=sys.stderr)
        sys.exit(130)
    except (td.BackendError, ValueError, FloatingPointError, OSError, ImportError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _what_is_kept(out: Path | None) -> str:
    if out is None:  # there is no training to continue
        return "Interrupted: nothing is kept."
    checkpoint = out / "checkpoint.safetensors"
    if not checkpoint.exists():
        return "Interrupted before the first step was done: nothing is kept."
    return f"Interrupted: {checkpoint} is kept; the same command with --resume continues from it."


def write_metrics(args: argparse.Namespace, **metrics: Any) -> None:
    """Write metrics.json: `metrics`, peak memory, and the settings of the run."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {**metrics, "peak_memory_mib": peak_memory_mib(), "settings": settings}
    (args.out / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def peak_memory_mib() -> float | None:
    """The most memory this process has held at a time; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
