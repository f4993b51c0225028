"""How the pictures of these pages look: one quiet style that reads on white and on black.

Nothing has a background. Text and axes are a grey that has the same contrast with both, and the colours are
of middle lightness, told apart with any colour vision.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).resolve().parent

GREY = "#808080"
BLUE, ORANGE, GREEN, PURPLE = "#3987c9", "#d9822b", "#2a9d7c", "#a668b8"

matplotlib.rcdefaults()
matplotlib.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10.0,
        "mathtext.fontset": "dejavusans",
        "text.color": GREY,
        "axes.edgecolor": GREY,
        "axes.facecolor": "none",
        "axes.labelcolor": GREY,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": GREY,
        "axes.titlesize": 10.0,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "tinydiff",  # the same picture gives the same file
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
)


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def save_svg(fig: Figure, name: str) -> None:
    fig.savefig(FOLDER / name, metadata={"Date": None})


def save_png(fig: Figure, name: str, dpi: int = 130) -> None:
    """As PNG with a palette of 256 colours, which is a third of the size and looks the same."""
    fig.set_dpi(dpi)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        FOLDER / name, "PNG", optimize=True
    )
