"""Draw handwritten digits at once, with the weights that come with the package or your own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Plain, choose_device, counted, explained_errors, path, walk_of, write_metrics
from train_mnist import add_data, add_digits, digits, draw, pixel_statistics

import tinydiff as td
from tinydiff import plotting
from tinydiff.datasets import mnist
from tinydiff.metrics.digits import digit_report

DEFAULTS = dict(data="subset", samples=64, sampler="ddpm", sampling_steps=50)

EXAMPLES = """examples:
  python demos/sample_mnist.py
  python demos/sample_mnist.py --digits 3 1 4
  python demos/sample_mnist.py --sampler dpm++ --sampling-steps 10 --out runs/fast
  python demos/sample_mnist.py --samples 1000 --report
  python demos/sample_mnist.py --model runs/mnist/model.safetensors
  python demos/sample_mnist.py --model runs/classes/model.safetensors --digits 7 --guidance 3"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Plain(__doc__, EXAMPLES, out="runs/mnist-samples", defaults=DEFAULTS)
    parser.add_sampling()
    add_digits(parser)
    parser.run.add_argument(
        "--model",
        type=path,
        metavar="FILE",
        help="what train_mnist.py left: a model.safetensors, or the checkpoint.safetensors of a run that is "
        "not finished (default: the weights in the package; with --digits or --guidance, those with classes)",
    )
    parser.run.add_argument(
        "--report",
        action="store_true",
        help="judge the digits (are they legible, all ten, distributed as MNIST's, no copies of --data?), in "
        "metrics.json under digits",
    )
    add_data(parser, use="data to show the digits beside and to judge them by: ")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/mnist-samples")
    with explained_errors(args.out, interrupted="Interrupted: there is no metrics.json of this run."):
        run(args, parser.sampling_steps)


def run(args: argparse.Namespace, default_steps: int) -> None:
    choose_device(args)
    plotting.require_matplotlib()
    if args.model is None:
        model, diffusion, about = td.pretrained.mnist(args.backend, classes=asks_for_digits(args))
    else:
        model, diffusion, about = td.pretrained.load(args.model, args.backend)
    check(args, model, diffusion, default_steps)
    data_rng, sample_rng = np.random.default_rng(args.seed).spawn(2)
    data = data_rng.permutation(digits(args)[0])
    unseen = heldout(args) if args.report else None
    most = len(data) // 2 if unseen is None else len(unseen)
    if args.report and args.samples > most:
        raise ValueError(f"--samples is {args.samples}; with --data {args.data}, --report can judge {most}.")
    samples, pictures, drawn = draw(args, model, diffusion, data, sample_rng, walk_of(args))
    seconds = drawn["sampling_seconds"]
    for name, picture in pictures.items():
        plotting.save(picture, args.out / name)
    found: dict[str, Any] = {
        "pixels": {"samples": pixel_statistics(samples), "data": pixel_statistics(data)},
        "n": args.samples,
        **drawn,
        "seconds_a_digit": seconds / args.samples,
        "trained": {name: value for name, value in about.items() if name != "betas"},
    }
    if args.report:
        found["digits"] = digit_report(samples, data, unseen, rng=data_rng)
    write_metrics(args, **found)
    if not args.quiet:
        if args.report:
            judged, floor = found["digits"]["samples"], found["digits"]["floor"]
            for key in ("frechet_distance", "confidence", "effective_classes", "share_too_near"):
                name = key.replace("_", " ").replace("frechet", "Fréchet")
                print(f"{name}: {judged[key]:.3f} (real digits: {floor[key]:.3f})")
        if "share_as_asked" in drawn:
            print(f"read as the digits asked for: {drawn['share_as_asked']:.0%}")
        drew = f"{counted(args.samples, 'digit')} in {seconds:.1f} s"
        print(f"{drew}; pictures in {args.out}: {', '.join(pictures)}")


def asks_for_digits(args: argparse.Namespace) -> bool:
    return bool(args.digits) or args.guidance is not None


def check(args: argparse.Namespace, model: Any, diffusion: td.GaussianDiffusion, default_steps: int) -> None:
    """Before anything is drawn: a network for 28x28x1 images, and no more steps than it knows."""
    if not isinstance(model, td.UNet) or model.config["in_channels"] != 1:
        kind = type(model).__name__
        channels = f" of {model.config['in_channels']} channels" if isinstance(model, td.UNet) else ""
        raise ValueError(f"{args.model} holds a {kind}{channels}; expected a UNet for images of 1 channel.")
    if asks_for_digits(args) and "num_classes" not in model.config:
        flag = "--digits" if args.digits else "--guidance"
        raise ValueError(
            f"{flag} is for a network trained with train_mnist.py --classes; {args.model} was not."
        )
    if args.sampling_steps is None:
        args.sampling_steps = min(default_steps, diffusion.T)
    if args.sampling_steps > diffusion.T:
        raise ValueError(f"--sampling-steps is {args.sampling_steps}; this model knows {diffusion.T} steps.")
    if args.report and args.samples < 2:
        raise ValueError("--report needs at least 2 samples.")


def heldout(args: argparse.Namespace) -> np.ndarray | None:
    """MNIST's test digits with all 60,000 for training; else None, and some of the data are set aside."""
    if args.data != "full":
        return None
    return mnist.to_model_range(mnist.load("test")[0])


if __name__ == "__main__":
    main()
