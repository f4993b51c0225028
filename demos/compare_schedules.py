"""A reproduction: the same U-Net on MNIST under linear, cosine and learned schedules, by three losses.

In the manner of Nichol & Dhariwal (2021), tables 1 and 2 and figure 8: bits per dimension of held-out digits,
and the Fréchet distance of samples, against the number of sampling steps. The learned schedule is that of
Kingma et al. (2021). Every configuration is trained for the same number of steps, on the same digits.

Every configuration has a folder of its own in DIR. What is already there is not made again: the same command
continues an interrupted comparison (a training from its last checkpoint), and two processes can share the
work by --only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import (
    LOSSES,
    Plain,
    choose_device,
    count_from,
    explained_errors,
    learned_variance,
    loss_options,
    schedules,
    write_metrics,
)
from train_mnist import add_channels, add_data, digits, unet

import tinydiff as td
from tinydiff import plotting
from tinydiff._progress import progress_bar
from tinydiff.backend import asarray_like, integers_like, standard_normal, to_numpy
from tinydiff.bound import prior_term, step_term
from tinydiff.checkpoint import replace_file
from tinydiff.diffusion import Variance
from tinydiff.kernels import many_steps
from tinydiff.metrics import digit_features, frechet_distance
from tinydiff.nn.module import weight_of
from tinydiff.parallel import shared_out
from tinydiff.samplers import respaced

DEFAULTS = dict(
    data="subset",
    channels=[16, 32, 64],
    steps=1200,
    batch=32,
    lr=2e-3,
    T=250,  # importance sampling needs ten terms at every t before it begins: 22 T draws or so
    prediction="v",
    samples=1000,
    sampling_steps=[5, 10, 25],
    draws=2048,
)
OUT = "runs/compare"
EMA_DECAY = 0.99
CHECKPOINT_EVERY = 100
HELD_OUT = 1000  # digits that no configuration is trained on
AT_A_TIME = 64  # digits that the network is shown at once
BOUND, SAMPLES = 3, 4  # streams of the seed, beside those of training
SYMBOLS = {"fixed_large": "β", "fixed_small": "β̃", "learned_range": "learned"}

EXAMPLES = """examples:
  python demos/compare_schedules.py
  python demos/compare_schedules.py --only cosine-simple cosine-hybrid cosine-vlb
  python demos/compare_schedules.py --data full --steps 5000 --out runs/long"""


class Configuration(NamedTuple):
    """What is trained: the forward process, and the loss."""

    schedule: str
    loss: str

    @property
    def variances(self) -> list[Variance]:
        """Those of the reverse steps: a network that learned none can have either of the two extremes.

        (The bound that a learned schedule is trained by is that of beta in a chain of endless length.)
        """
        if learned_variance(self.loss):
            return ["learned_range"]
        return ["fixed_large", "fixed_small"]


CONFIGURATIONS = {f"{s}-{loss}": Configuration(s, loss) for s in ("linear", "cosine") for loss in LOSSES}
CONFIGURATIONS["learned"] = Configuration("learned", "continuous bound")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Plain(__doc__, EXAMPLES, out=OUT, defaults=DEFAULTS)
    parser.add_training(count_from(1))
    parser.run.add_argument(
        "--only",
        nargs="+",
        choices=CONFIGURATIONS,
        metavar="NAME",
        default=list(CONFIGURATIONS),
        help=f"some of the configurations: {', '.join(CONFIGURATIONS)} (default: all)",
    )
    add_data(parser, more=f"; {HELD_OUT:,} of them are held out")
    add_channels(parser)
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--samples",
        type=count_from(2),
        metavar="N",
        help="how many to draw for each Fréchet distance, which is larger the fewer they are "
        "(default: %(default)s)",
    )
    measuring.add_argument(
        "--sampling-steps",
        type=count_from(1),
        nargs="+",
        metavar="N",
        help="how many of the T steps to sample in, one number or several (default: 5 10 25, at most T)",
    )
    measuring.add_argument(
        "--draws",
        type=count_from(2),
        metavar="N",
        help="how many noisy digits to estimate each bound from, at least two a step (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path(OUT)
    for steps in args.sampling_steps:
        if steps > args.T:
            parser.error(f"argument --sampling-steps: {steps} is more than --T {args.T}")
    if args.T < 2:
        parser.error("argument --T: the learned schedule needs at least 2 steps")
    args.sampling_steps = sorted(set(args.sampling_steps))
    args.only = [name for name in CONFIGURATIONS if name in args.only]
    again = "Interrupted: what is finished is kept; the same command continues from there."
    with explained_errors(args.out, again):
        run(args)


def run(args: argparse.Namespace) -> None:
    choose_device(args)
    plotting.require_matplotlib()
    images = np.random.default_rng(args.seed).permutation(digits(args)[0])
    held_out, data = images[:HELD_OUT], images[HELD_OUT:]
    reference = digit_features(data)
    floor = frechet_distance(digit_features(held_out[: args.samples]), reference)
    began = time.perf_counter()
    rows = []
    for name in args.only:
        about, folder = CONFIGURATIONS[name], args.out / name
        say(args, f"{name}: training")
        model, schedule, losses = trained(about, args, data, folder)
        for variance in about.variances:
            say(args, f"{name}, variance {SYMBOLS[variance]}: measuring")
            diffusion = td.GaussianDiffusion(schedule, args.prediction, variance)
            once = Measured(folder / f"measured-{variance}.json", training_settings(args))
            bounds, distances = {}, {}
            for K in lengths(args):
                what = f"bound, {K} steps, {args.draws} draws"
                bounds[str(K)] = once(what, bound, model, diffusion, K, held_out, args)
            for K in args.sampling_steps:
                what = f"distance, {K} steps, {args.samples} samples"
                distances[str(K)] = once(what, distance, model, diffusion, K, reference, args)
            rows.append(
                dict(
                    schedule=about.schedule,
                    loss=about.loss,
                    variance=variance,
                    final_loss=float(plotting.smooth(losses)[-1]),
                    bound=bounds,
                    frechet_distance=distances,
                )
            )
    table = table_of(rows, floor, args)
    replace_file(args.out / "table.md", table.encode())
    plotting.save(picture(rows, floor, args), args.out / "compare.png")
    write_metrics(
        args,
        rows=rows,
        frechet_floor=floor,
        held_out=len(held_out),
        training_digits=len(data),
        seconds=round(time.perf_counter() - began, 3),
    )
    if not args.quiet:
        print(table)
        print(f"in {args.out}: table.md, compare.png, metrics.json")


def lengths(args: argparse.Namespace) -> list[int]:
    """Numbers of steps of the chains whose bound is estimated: those that are sampled from, and the whole."""
    return sorted({*args.sampling_steps, args.T})


def say(args: argparse.Namespace, what: str) -> None:
    if not args.quiet:
        print(what, file=sys.stderr)


# Training


def trained(
    configuration: Configuration, args: argparse.Namespace, data: np.ndarray, folder: Path
) -> tuple[td.UNet, td.NoiseSchedule, np.ndarray]:
    """The network, its schedule and its losses: trained, continued, or read from `folder`."""
    model = unet(args, learned_variance(configuration.loss), np.random.default_rng(args.seed))
    how = dict(
        steps=args.steps,
        batch_size=args.batch,
        seed=args.seed,
        lr=args.lr,
        ema_decay=EMA_DECAY,
        data_name=f"mnist {args.data}, some held out",
        run_dir=folder,
        resume=True,
        checkpoint_every=CHECKPOINT_EVERY,
        workers=args.workers,
        progress=not args.quiet,
    )
    if configuration.schedule == "learned":
        both = td.train_learned_schedule(
            model, data, T=args.T, prediction=args.prediction, decoder="8bit", **how
        )
        return both.model, both.schedule, both.losses
    schedule = schedules(args.T)[configuration.schedule]
    diffusion = td.GaussianDiffusion(schedule, args.prediction, configuration.variances[0])
    result = td.train(model, diffusion, data, **how, **loss_options(configuration.loss, decoder="8bit"))
    return result.model, schedule, result.losses


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the trained networks depend on."""
    return {
        k: getattr(args, k) for k in ["data", "channels", "steps", "batch", "lr", "T", "prediction", "seed"]
    }


# Measuring


class Measured:
    """Measurements in a file, each written as soon as it is made, and not made again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "measured": {}}
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] == settings:
                self.content = content

    def __call__(self, what: str, measure: Callable[..., Any], *args: Any) -> Any:
        measured = self.content["measured"]
        if what not in measured:
            measured[what] = measure(*args)
            replace_file(self.path, (json.dumps(self.content, indent=2) + "\n").encode())
        return measured[what]


def distance(
    model: td.UNet,
    diffusion: td.GaussianDiffusion,
    steps: int,
    reference: np.ndarray,
    args: argparse.Namespace,
) -> float:
    """Fréchet distance to the training digits, of as many samples as asked for."""
    rng = np.random.default_rng([args.seed, SAMPLES, steps])
    shape = (args.samples, 28, 28, 1)
    shown = dict(batch_size=AT_A_TIME, workers=args.workers, progress=not args.quiet)
    samples = td.sample(model, diffusion, shape, "ddpm", steps, rng=rng, clip=True, **shown)
    return frechet_distance(digit_features(to_numpy(samples)), reference)


@many_steps()
def bound(
    model: td.UNet, diffusion: td.GaussianDiffusion, steps: int, digits: np.ndarray, args: argparse.Namespace
) -> dict[str, float]:
    """The bound of digits, in bits per dimension, of a chain of some of the steps.  (docs: L.1, L.12)

    `td.bits_per_dim` draws every t at random but that of L_0. But the terms next to L_0 are large, too, so
    here every t gets as many draws as any other, of random digits: the same mean, a fraction of the spread.

    Returns
    -------
    dict
        ``value``, its ``standard_error``, its parts ``L_T`` and ``L_0``; and the ``variance`` of an estimate
        from a single draw at a uniform t, also without the term L_0 (``variance_without_L_0``).
    """
    rng = np.random.default_rng([args.seed, BOUND, steps])
    walk, times = respaced(diffusion, steps)
    draws = max(2, math.ceil(args.draws / steps))
    t = np.repeat(np.arange(steps), draws)
    chosen = rng.integers(len(digits), size=t.size)
    like = weight_of(model)
    terms = np.zeros(t.size)
    with shared_out(model, AT_A_TIME, args.workers) as shared:
        batches = range(0, t.size, AT_A_TIME)
        for start in progress_bar(not args.quiet, batches, desc="bound", unit="batch", leave=False):
            part = slice(start, start + AT_A_TIME)
            x0 = asarray_like(digits[chosen[part]], like)
            x_t = walk.q_sample(x0, t[part], standard_normal(rng, x0.shape, x0))
            output = shared.predict(x_t, integers_like(times[t[part]], x0))
            terms[part] = to_numpy(step_term(walk, output, x0, x_t, t[part], "8bit", clip=True)[0])
    bits = terms.reshape(steps, draws) / (digits[0].size * math.log(2))
    mean, second = np.mean(bits, axis=1), np.mean(np.square(bits), axis=1)
    L_T = float(np.mean(to_numpy(prior_term(walk, digits)))) / (digits[0].size * math.log(2))
    return dict(
        value=L_T + float(np.sum(mean)),
        standard_error=math.sqrt(np.sum(np.var(bits, axis=1, ddof=1)) / draws),
        L_T=L_T,
        L_0=float(mean[0]),
        variance=float(steps * np.sum(second) - np.sum(mean) ** 2),
        variance_without_L_0=float((steps - 1) * np.sum(second[1:]) - np.sum(mean[1:]) ** 2),
    )


# Showing


def label(row: dict[str, Any]) -> str:
    if row["schedule"] == "learned":
        return f"learned schedule, {SYMBOLS[row['variance']]}"
    learned = row["variance"] == "learned_range"
    return f"{row['schedule']}, {row['loss']}" + ("" if learned else f", {SYMBOLS[row['variance']]}")


def table_of(rows: list[dict[str, Any]], floor: float, args: argparse.Namespace) -> str:
    """Markdown: the bounds and the distances of all rows, against the number of steps."""

    def table(head: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> list[str]:
        lines = [["schedule", "loss", "variance", *head], ["---"] * 3 + ["---:"] * len(head)]
        lines += [[row["schedule"], row["loss"], SYMBOLS[row["variance"]], *cells(row)] for row in rows]
        return [f"| {' | '.join(line)} |" for line in lines]

    def bounds(row: dict[str, Any]) -> list[str]:
        values = [row["bound"][str(K)] for K in lengths(args)]
        whole = values[-1]
        return [
            *(f"{value['value']:.3f} ± {value['standard_error']:.3f}" for value in values),
            f"{whole['L_0']:.3f}",
            *(f"{deviation:#.3g}".removesuffix(".") for deviation in deviations(whole)),
        ]

    def distances(row: dict[str, Any]) -> list[str]:
        return [f"{row['frechet_distance'][str(K)]:.2f}" for K in args.sampling_steps]

    channels = " ".join(map(str, args.channels))
    return "\n".join(
        [
            f"Every network: a U-Net of channels {channels} that predicts {args.prediction}, T = {args.T}, "
            f"{args.steps} updates of {args.batch} digits, seed {args.seed}.",
            "",
            f"Bits per dimension of {HELD_OUT} held-out digits, ± one standard error, by the number of "
            f"steps. At {args.T} steps also the term L_0, and the standard deviation of an estimate from one "
            "digit at one random t, with and without L_0.",
            "",
            *table([*(f"{K} steps" for K in lengths(args)), "L_0", "one draw", "without L_0"], bounds),
            "",
            f"Fréchet distance of {args.samples} samples to the training digits, by the number of sampling "
            f"steps. That of {min(args.samples, HELD_OUT)} held-out digits is {floor:.2f}.",
            "",
            *table([f"{K} steps" for K in args.sampling_steps], distances),
            "",
        ]
    )


def deviations(bound: dict[str, float]) -> list[float]:
    """Standard deviations of the bound's estimate from one draw, with and without L_0."""
    return [math.sqrt(max(0.0, bound[name])) for name in ("variance", "variance_without_L_0")]


COLOURS = {"linear": "#c4572b", "cosine": plotting.BLUE, "learned": "#2f7d4f"}
LINES = {"fixed_large": ":", "fixed_small": "--"}
MARKERS = {"fixed_large": "^", "fixed_small": "v"}


def style(row: dict[str, Any]) -> dict[str, Any]:
    """Colours for schedules; dotted and dashed for the two fixed variances, an open circle for the bound."""
    colour, vlb = COLOURS[row["schedule"]], row["loss"] == "vlb"
    return dict(
        color=colour,
        linestyle=LINES.get(row["variance"], "-"),
        marker=MARKERS.get(row["variance"], "s" if vlb else "o"),
        markerfacecolor="white" if vlb else colour,
        markersize=4.5,
        linewidth=1.2,
    )


def picture(rows: list[dict[str, Any]], floor: float, args: argparse.Namespace) -> Any:
    """Distance and bound against the number of steps, and how noisy the bound's estimate is."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(plotting.STYLE, after_reset=True):
        fig = Figure(figsize=(12.4, 4.2), dpi=plotting.DPI, layout="constrained")
        panels = fig.subplots(1, 3, width_ratios=[1, 1, 0.8])
        for axes, draw in zip(panels, (_distances, _bounds, _deviations), strict=True):
            title = draw(axes, rows, floor, args)
            axes.set_title(title, fontsize=10, color=plotting.INK, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=plotting.FRAME, linewidth=0.5, axis="x" if draw is _deviations else "y")
            axes.set_axisbelow(True)
            axes.tick_params(length=0, pad=5)
    return fig


def _distances(axes: Any, rows: list[dict[str, Any]], floor: float, args: argparse.Namespace) -> str:
    """Draw a panel, and return its title."""
    for row in rows:
        distances = [row["frechet_distance"][str(K)] for K in args.sampling_steps]
        axes.plot(args.sampling_steps, distances, **style(row))
    axes.axhline(floor, color=plotting.QUIET, linewidth=0.8)
    axes.annotate(
        "held-out digits", (1, floor), (-2, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color=plotting.QUIET, fontsize=8,
    )  # fmt: skip
    _by_steps(axes, args.sampling_steps)
    return f"Fréchet distance of {args.samples} samples"


def _bounds(axes: Any, rows: list[dict[str, Any]], floor: float, args: argparse.Namespace) -> str:
    """Draw a panel, and return its title."""
    lowest, highest = math.inf, 0.0
    for row in rows:
        values, errors = zip(*((b["value"], b["standard_error"]) for b in row["bound"].values()), strict=True)
        axes.errorbar(lengths(args), values, errors, elinewidth=0.8, **style(row))
        lowest = min(lowest, *values)
        # With few steps the bound with the small variance lies far above all that one would compare.
        highest = max(highest, values[-1] if row["variance"] == "fixed_small" else max(values))
    _by_steps(axes, lengths(args))
    axes.set_ylim(lowest / 1.15, highest * 1.15)
    return "Bits per dimension of held-out digits"


def _deviations(axes: Any, rows: list[dict[str, Any]], floor: float, args: argparse.Namespace) -> str:
    """Draw a panel, and return its title."""
    for place, row in enumerate(rows):
        with_L_0, without = deviations(row["bound"][str(args.T)])
        axes.plot([without, with_L_0], [place] * 2, color=plotting.FRAME, linewidth=1, zorder=1)
        axes.plot(with_L_0, place, "|", color=style(row)["color"], markersize=9)
        axes.plot(without, place, **style(row))
    axes.set(xscale="log", xlabel=f"bits per dimension, T = {args.T}", ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), map(label, rows))
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(style(row)["color"])
    _ticks_at_1_2_5(axes.xaxis)
    return "Deviation of one draw (bar: with $L_0$)"


def _by_steps(axes: Any, steps: list[int]) -> None:
    """Both axes logarithmic, a tick for each number of steps."""
    from matplotlib.ticker import NullLocator

    axes.set(xscale="log", yscale="log", xlabel="steps")
    axes.set_xticks(steps, map(str, steps))
    axes.xaxis.set_minor_locator(NullLocator())
    _ticks_at_1_2_5(axes.yaxis)


def _ticks_at_1_2_5(axis: Any) -> None:
    """1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    main()
