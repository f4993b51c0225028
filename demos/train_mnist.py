"""Learn to draw handwritten digits: train a U-Net on MNIST, and sample from it."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    LOSSES,
    Parser,
    Plain,
    choose_device,
    count_from,
    counted,
    explained_errors,
    finite,
    learned_variance,
    loss_options,
    save_trained,
    say_if_nothing_resumes,
    schedules,
    settle_batch,
    training_seconds,
    walk_of,
    write_metrics,
    write_samples,
)

import tinydiff as td
from tinydiff import plotting
from tinydiff.backend import generator_beside, to_numpy
from tinydiff.datasets import mnist
from tinydiff.diffusion import Variance
from tinydiff.metrics import digit_probabilities

DEFAULTS = dict(
    data="subset",
    channels=[16, 32, 64],
    steps=4000,
    batch=64,
    lr=2e-3,
    loss="simple",
    schedule="cosine",
    T=1000,
    prediction="v",
    samples=64,
    sampler="ddpm",
    sampling_steps=100,
    checkpoint_every=100,
)
# What differs with --backend cupy: the training is that of the package's weights, on all digits.
# A step takes a few milliseconds there, and a checkpoint as long as eight steps.
ON_A_GPU = dict(data="full", channels=[32, 64, 64], steps=15_000, samples=256, checkpoint_every=1000)
LAYERS_PER_BLOCK, EMA_DECAY = 1, 0.995
SAMPLES_AT_A_TIME = 64  # bounds the memory, and fills one picture
DIGITS = 4  # in the pictures of the processes
GUIDANCE = 2.0

EXAMPLES = """examples:
  python demos/train_mnist.py
  python demos/train_mnist.py --steps 8000 --data full --out runs/long
  python demos/train_mnist.py --resume
  python demos/train_mnist.py --loss hybrid --out runs/hybrid
  python demos/train_mnist.py --classes --digits 7 --out runs/classes
  python demos/train_mnist.py --backend cupy --device 1 --batch auto

with --backend cupy the defaults are
  --data full --channels 32 64 64 --steps 15000 --samples 256 --checkpoint-every 1000"""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with explained_errors(args.out, resume=args.resume):
        run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, EXAMPLES, out="runs/mnist", defaults=DEFAULTS, on_a_gpu=ON_A_GPU)
    add_data(parser)
    add_channels(parser)
    add_digits(parser)
    parser.training.add_argument(
        "--classes",
        action="store_true",
        help="tell the network which digit each picture shows, but for a tenth of them; then --digits can be "
        "asked for",
    )
    parser.training.add_argument(
        "--checkpoint-every",
        type=count_from(1),
        metavar="N",
        help="steps between checkpoints, from which --resume continues (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if not args.classes and (args.digits or args.guidance is not None):
        parser.error(f"argument --{'digits' if args.digits else 'guidance'}: it is for --classes")
    args.out = args.out or Path("runs/mnist")
    return args


def add_data(parser: Plain, use: str = "", more: str = "") -> None:
    parser.data.add_argument(
        "--data",
        choices=["subset", "full"],
        help=f"{use}10,000 digits that come with the package, or all 60,000, from the folder TINYDIFF_DATA "
        f"or downloaded{more} (default: %(default)s)",
    )


def add_channels(parser: Plain) -> None:
    parser.training.add_argument(
        "--channels",
        type=count_from(1),
        nargs="+",
        metavar="C",
        help="of the U-Net at each of its levels, in multiples of 8 (default: 16 32 64)",
    )


def add_digits(parser: Plain) -> None:
    """The flags of a sampling from a network that is told which digit to draw."""
    parser.sampling.add_argument(
        "--digits",
        type=count_from(0, 9),
        nargs="+",
        metavar="D",
        help="of a network that is told classes: which to draw, in turn (default: all ten)",
    )
    parser.sampling.add_argument(
        "--guidance",
        type=finite,
        metavar="W",
        help="and how far toward them: 1 as the network says, more for clearer and less varied digits "
        f"(default: {GUIDANCE:g})",
    )


def unet(
    args: argparse.Namespace, learned: bool, rng: np.random.Generator, num_classes: int | None = None
) -> td.UNet:
    """The network of --channels, with attention at the last level; with a second output if `learned`."""
    return td.UNet(
        out_channels=2 if learned else 1,
        block_channels=args.channels,
        layers_per_block=LAYERS_PER_BLOCK,
        attention=[False] * (len(args.channels) - 1) + [True],
        rng=rng,
        backend=args.backend,
        num_classes=num_classes,
    )


def run(args: argparse.Namespace) -> None:
    choose_device(args)
    model_rng, data_rng, sample_rng = np.random.default_rng(args.seed).spawn(3)
    chains = schedules(args.T)
    learned = learned_variance(args.loss)
    variance: Variance = "learned_range" if learned else "fixed_small"
    diffusion = td.GaussianDiffusion(chains[args.schedule], args.prediction, variance)
    model = unet(args, learned, model_rng, 10 if args.classes else None)
    images, labels = digits(args)
    order = data_rng.permutation(len(images))
    data, labels = images[order], labels[order]
    forward = plotting.forward_process(data[:DIGITS], chains, data_rng)
    say_if_nothing_resumes(args)
    settle_batch(args, model, diffusion, data, "8bit")

    result = td.train(
        model,
        diffusion,
        data,
        steps=args.steps,
        batch_size=args.batch,
        labels=labels if args.classes else None,
        **loss_options(args.loss, decoder="8bit"),
        seed=args.seed,
        lr=args.lr,
        ema_decay=EMA_DECAY,
        data_name=f"mnist {args.data}",
        run_dir=args.out,
        resume=args.resume,
        workers=args.workers,
        checkpoint_every=args.checkpoint_every,
        progress=not args.quiet,
    )
    save_trained(args, result.model, diffusion, "data")

    how_trained = f"{counted(args.steps, 'training step')}, {walk_of(args)}"
    samples, drawn, found = draw(args, result.model, diffusion, data, sample_rng, how_trained)
    curve = plotting.training_curve(result.losses, LOSSES[args.loss])
    pictures = {"forward.png": forward, "training.png": curve, **drawn}
    for name, picture in pictures.items():
        plotting.save(picture, args.out / name)
    write_metrics(
        args,
        pixels={"samples": pixel_statistics(samples), "data": pixel_statistics(data)},
        n=args.samples,
        steps=args.steps,
        final_loss=float(plotting.smooth(result.losses)[-1]),
        training_seconds=training_seconds(args.out),
        **found,
    )
    if not args.quiet:
        print(f"pictures in {args.out}: {', '.join(pictures)}")


def draw(
    args: argparse.Namespace,
    model: td.UNet,
    diffusion: td.GaussianDiffusion,
    data: np.ndarray,
    rng: np.random.Generator,
    title: str,
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Sample, and leave samples.npy; return the samples, two pictures by name, and what metrics.json says.

    A network with classes is asked for args.digits in turn.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rng = generator_beside(model.conv_in.weight.value, rng)
    how: dict[str, Any] = dict(sampler=args.sampler, steps=args.sampling_steps, clip=True, rng=rng)
    shown: dict[str, Any] = dict(batch_size=SAMPLES_AT_A_TIME, workers=args.workers, progress=not args.quiet)
    wanted = args.digits or range(10)
    asked = np.resize(wanted, max(args.samples, DIGITS))
    few: dict[str, Any] = {}
    if "num_classes" in model.config:
        args.guidance = GUIDANCE if args.guidance is None else args.guidance
        how["guidance_scale"] = args.guidance
        title += f", guidance {args.guidance:g}"
        shown["labels"], few["labels"] = asked[: args.samples], asked[:DIGITS]
    samples = to_numpy(td.sample(model, diffusion, (args.samples, 28, 28, 1), **how, **shown))
    found: dict[str, Any] = {"sampling_seconds": round(time.perf_counter() - began, 3)}
    write_samples(args.out, samples)
    states = td.iterate_samples(model, diffusion, (DIGITS, 28, 28, 1), **how, **few)
    seen = min(SAMPLES_AT_A_TIME, args.samples)
    picture = samples[:seen]
    if few:
        read = np.argmax(digit_probabilities(samples), axis=1)
        found["share_as_asked"] = float(np.mean(read == asked[: args.samples]))
        picture = picture[np.argsort(np.arange(seen) % len(wanted), kind="stable")]  # like beside like
    pictures = {
        "samples.png": plotting.samples_beside_data(picture, data[:seen], title),
        "reverse.png": plotting.reverse_process(states),
    }
    return samples, pictures, found


def digits(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 28, 28, 1) and which digits they show; where all 60,000 cannot be had, the subset.

    One line says so then.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images, labels = mnist.load("train" if args.data == "full" else "subset")
    if caught:
        args.data = "subset"
    if not args.quiet:
        for warning in caught:
            print(warning.message, file=sys.stderr)
    return mnist.to_model_range(images), labels


def pixel_statistics(images: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the pixels, and the share of them that is ink."""
    return {"mean": float(images.mean()), "std": float(images.std()), "ink": float((images > 0).mean())}


if __name__ == "__main__":
    main()
