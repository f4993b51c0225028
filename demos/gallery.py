"""Draw what the demos make on one sheet: samples of the eight shapes beneath fresh data, and digits.

Reads the runs that `train_toy2d.py --shape NAME` left in runs/, and a run with digits of its own. What is
missing is made first (half a minute a shape, seconds for the digits, which the weights in the package draw).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _common import explained_errors, folder, path

from tinydiff import plotting
from tinydiff.datasets import toy2d

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEMOS = Path(__file__).resolve().parent
DOTS = 4000
DIGIT_ROWS, DIGIT_COLUMNS = 3, 24
GREY = "#555555"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=folder, metavar="DIR", default=Path("runs"), help="where the runs are (default: runs)"
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        default=Path("docs/figures/gallery.png"),
        help="where the sheet goes (default: %(default)s)",
    )
    args = parser.parse_args()
    # The run that was interrupted with it has spoken of --resume.
    again = "Interrupted: the gallery needs no --resume; the same command continues from there."
    with explained_errors(args.runs, again):
        run(args)


def run(args: argparse.Namespace) -> None:
    plotting.require_matplotlib()
    shapes = {
        shape: completed(args.runs / f"toy2d-{shape}", "train_toy2d.py", "--shape", shape, "--resume")
        for shape in toy2d.SHAPES
    }
    count = str(DIGIT_ROWS * DIGIT_COLUMNS)
    digits = completed(args.runs / "gallery-digits", "sample_mnist.py", "--samples", count)
    plotting.save(draw(shapes, np.load(digits / "samples.npy")), args.out)
    print(args.out)


def completed(run: Path, demo: str, *flags: str) -> Path:
    """The folder of a run, made first if it is not there."""
    if not (run / "metrics.json").exists():
        ended = subprocess.run([sys.executable, DEMOS / demo, *flags, "--out", run])
        if ended.returncode:  # the demo has said why
            sys.exit(ended.returncode)
    return run


def draw(shapes: dict[str, Path], digits: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(14, 5.2), layout="constrained", facecolor="white")
    grid = fig.add_gridspec(3, len(shapes), height_ratios=[1, 1, 1.05])
    rng = np.random.default_rng(0)
    for column, (shape, run) in enumerate(shapes.items()):
        measured = json.loads((run / "metrics.json").read_text())
        for row, (points, colour) in enumerate(
            [(toy2d.sample(shape, DOTS, rng), GREY), (np.load(run / "samples.npy")[:DOTS], plotting.BLUE)]
        ):
            axes = fig.add_subplot(grid[row, column])
            axes.scatter(points[:, 0], points[:, 1], s=0.6, color=colour, alpha=0.5, linewidths=0)
            axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(shape.replace("_", " "), fontsize=10, color=plotting.INK)
            else:
                axes.set_xlabel(f"{measured['ratio']:.2f} × floor", fontsize=8, color=GREY)
            if column == 0:
                axes.set_ylabel(["data", "samples"][row], fontsize=10, color=plotting.INK)
    axes = fig.add_subplot(grid[2, :])
    shown = digits[: DIGIT_ROWS * DIGIT_COLUMNS, :, :, 0].reshape(DIGIT_ROWS, DIGIT_COLUMNS, 28, 28)
    axes.imshow(shown.transpose(0, 2, 1, 3).reshape(DIGIT_ROWS * 28, -1), cmap="gray_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel("digits", fontsize=10, color="#222222")
    return fig


if __name__ == "__main__":
    main()
