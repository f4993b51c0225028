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

EXAMPLES = """examples:
  python demos/train_mnist.py
  python demos/train_mnist.py --steps 8000 --data full --out runs/long
  python demos/train_mnist.py --resume
  python demos/train_mnist.py --loss hybrid --out runs/hybrid
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
    parser.training.add_argument(
        "--checkpoint-every",
        type=count_from(1),
        metavar="N",
        help="steps between checkpoints, from which --resume continues (default: %(default)s)",
    )
    args = parser.parse_args(argv)
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


def unet(args: argparse.Namespace, learned: bool, rng: np.random.Generator) -> td.UNet:
    """The network of --channels, with attention at the last level; with a second output if `learned`."""
    return td.UNet(
        out_channels=2 if learned else 1,
        block_channels=args.channels,
        layers_per_block=LAYERS_PER_BLOCK,
        attention=[False] * (len(args.channels) - 1) + [True],
        rng=rng,
        backend=args.backend,
    )


def run(args: argparse.Namespace) -> None:
    choose_device(args)
    model_rng, data_rng, sample_rng = np.random.default_rng(args.seed).spawn(3)
    both = schedules(args.T)
    learned = learned_variance(args.loss)
    variance: Variance = "learned_range" if learned else "fixed_small"
    diffusion = td.GaussianDiffusion(both[args.schedule], args.prediction, variance)
    model = unet(args, learned, model_rng)
    data = data_rng.permutation(digits(args))
    forward = plotting.forward_process(data[:DIGITS], both, data_rng)
    say_if_nothing_resumes(args)
    settle_batch(args, model, diffusion, data, "8bit")

    result = td.train(
        model,
        diffusion,
        data,
        steps=args.steps,
        batch_size=args.batch,
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
    samples, sampling_seconds, drawn = draw(args, result.model, diffusion, data, sample_rng, how_trained)
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
        sampling_seconds=round(sampling_seconds, 3),
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
) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Sample, and leave samples.npy; return the samples, the seconds it took, and two pictures by name."""
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rng = generator_beside(model.conv_in.weight.value, rng)
    how = dict(sampler=args.sampler, steps=args.sampling_steps, clip=True, rng=rng)
    shown = dict(batch_size=SAMPLES_AT_A_TIME, workers=args.workers, progress=not args.quiet)
    samples = to_numpy(td.sample(model, diffusion, (args.samples, 28, 28, 1), **how, **shown))
    seconds = time.perf_counter() - began
    write_samples(args.out, samples)
    states = td.iterate_samples(model, diffusion, (DIGITS, 28, 28, 1), **how)
    seen = min(SAMPLES_AT_A_TIME, args.samples)
    pictures = {
        "samples.png": plotting.samples_beside_data(samples[:seen], data[:seen], title),
        "reverse.png": plotting.reverse_process(states),
    }
    return samples, seconds, pictures


def digits(args: argparse.Namespace) -> np.ndarray:
    """The images (n, 28, 28, 1); where all 60,000 cannot be had, the subset, and one line that says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images, _ = mnist.load("train" if args.data == "full" else "subset")
    if caught:
        args.data = "subset"
    if not args.quiet:
        for warning in caught:
            print(warning.message, file=sys.stderr)
    return mnist.to_model_range(images)


def pixel_statistics(images: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the pixels, and the share of them that is ink."""
    return {"mean": float(images.mean()), "std": float(images.std()), "ink": float((images > 0).mean())}


if __name__ == "__main__":
    main()
