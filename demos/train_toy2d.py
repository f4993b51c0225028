"""Learn a shape in the plane, sample from what was learned, and measure how far the samples are from data."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import (
    LOSSES,
    Parser,
    choose_device,
    explained_errors,
    learned_variance,
    loss_options,
    save_trained,
    say_if_nothing_resumes,
    schedules,
    settle_batch,
    training_seconds,
    write_metrics,
    write_samples,
)

import tinydiff as td
from tinydiff import plotting
from tinydiff.backend import generator_beside, to_numpy
from tinydiff.datasets import toy2d
from tinydiff.diffusion import Variance

DEFAULTS = dict(
    shape="moons",
    steps=4000,
    batch=512,
    lr=4e-3,
    loss="simple",
    schedule="cosine",
    T=100,
    prediction="v",  # on standardised data a v of 0 is already the best linear denoiser
    samples=10_000,
    sampler="ddpm",
    sampling_steps=100,
)
VARIANCE: Variance = "fixed_large"  # keeps the spread of samples; fixed_small shrinks it by a percent or two
HIDDEN, BLOCKS, EMA_DECAY = 96, 3, 0.999
SAMPLES_AT_A_TIME = 1000  # what fits a processor's cache
DRAWS = 8  # fresh draws of data that the samples, and the draws themselves, are compared with
DOTS = 1000  # points in the pictures of the processes

EXAMPLES = """examples:
  python demos/train_toy2d.py
  python demos/train_toy2d.py --shape two_spirals --schedule linear --prediction eps
  python demos/train_toy2d.py --schedule flow --prediction flow --sampler ddim
  python demos/train_toy2d.py --sampler ddim --sampling-steps 20 --out runs/fast"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, EXAMPLES, out="runs/toy2d-SHAPE", defaults=DEFAULTS)
    parser.data.add_argument(
        "--shape",
        metavar="NAME",
        choices=toy2d.SHAPES,
        help=f"{', '.join(toy2d.SHAPES)} (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"runs/toy2d-{args.shape}")
    with explained_errors(args.out, resume=args.resume):
        run(args)


def run(args: argparse.Namespace) -> None:
    choose_device(args)
    model_rng, data_rng, sample_rng = np.random.default_rng(args.seed).spawn(3)
    chains = schedules(args.T)
    learned = learned_variance(args.loss)
    variance: Variance = "learned_range" if learned else VARIANCE
    diffusion = td.GaussianDiffusion(chains[args.schedule], args.prediction, variance)
    width = 4 if learned else 2
    model = td.MLP(2, width, hidden=HIDDEN, blocks=BLOCKS, rng=model_rng, backend=args.backend)
    forward = plotting.forward_process(toy2d.sample(args.shape, DOTS, data_rng), chains, data_rng)

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        return toy2d.sample(args.shape, n, rng)

    say_if_nothing_resumes(args)
    settle_batch(args, model, diffusion, draw, "density")
    result = td.train(
        model,
        diffusion,
        draw,
        steps=args.steps,
        batch_size=args.batch,
        **loss_options(args.loss, decoder="density"),
        seed=args.seed,
        lr=args.lr,
        ema_decay=EMA_DECAY,
        data_name=args.shape,
        run_dir=args.out,
        resume=args.resume,
        workers=args.workers,
        progress=not args.quiet,
    )
    save_trained(args, result.model, diffusion, "shape")

    began = time.perf_counter()
    rng = generator_beside(model.linear_in.weight.value, sample_rng)
    how = dict(sampler=args.sampler, steps=args.sampling_steps, rng=rng)
    shown = dict(batch_size=SAMPLES_AT_A_TIME, workers=args.workers, progress=not args.quiet)
    samples = to_numpy(td.sample(result.model, diffusion, (args.samples, 2), **how, **shown))
    sampling_seconds = time.perf_counter() - began
    write_samples(args.out, samples)
    states = td.iterate_samples(result.model, diffusion, (DOTS, 2), **how)

    data, distance, floor = distance_and_floor(samples, args.shape, data_rng)
    verdict = f"sliced Wasserstein distance {distance:.4f}, sampling floor {floor:.4f}"
    pictures = {
        "forward.png": forward,
        "training.png": plotting.training_curve(result.losses, LOSSES[args.loss]),
        "samples.png": plotting.samples_beside_data(samples, data, verdict),
        "reverse.png": plotting.reverse_process(states),
    }
    for name, picture in pictures.items():
        plotting.save(picture, args.out / name)
    write_metrics(
        args,
        sliced_wasserstein=distance,
        sampling_floor=floor,
        ratio=distance / floor,
        n=args.samples,
        steps=args.steps,
        final_loss=float(plotting.smooth(result.losses)[-1]),
        training_seconds=training_seconds(args.out),
        sampling_seconds=round(sampling_seconds, 3),
    )
    if not args.quiet:
        print(f"{verdict}: {distance / floor:.2f} times the floor")
        print(f"pictures in {args.out}: {', '.join(pictures)}")


def distance_and_floor(
    samples: np.ndarray, shape: str, rng: np.random.Generator
) -> tuple[np.ndarray, float, float]:
    """Fresh data, the mean distance of the samples to it, and that of such data to itself."""
    draws = [toy2d.sample(shape, len(samples), rng) for _ in range(DRAWS)]
    distances = [td.metrics.sliced_wasserstein(samples, draw) for draw in draws]
    floors = [td.metrics.sliced_wasserstein(draws[i - 1], draws[i]) for i in range(DRAWS)]
    return draws[0], float(np.mean(distances)), float(np.mean(floors))


if __name__ == "__main__":
    main()
