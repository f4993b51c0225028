"""What a person looks at: the forward process, the training, the samples, the reverse process.

Every function takes arrays and returns a matplotlib ``Figure``, which `save` writes as PNG. Points (N, 2)
are drawn as dots and images (N, H, W, C) as a mosaic; nothing else differs between the two. Images of one
channel are drawn as ink on paper, 1 black and -1 white (for photographs draw ``-x``). matplotlib is imported
only when something is drawn, no window is opened, and pyplot's global state is not touched.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff._checks import check_counts, check_rng, check_unmasked, class_or_kind
from tinydiff.backend import Array, standard_normal, to_numpy
from tinydiff.checkpoint import replace_file
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.samplers import SamplerState
from tinydiff.schedules import NoiseSchedule, check_schedule, evenly_spaced_timesteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "forward_process",
    "require_matplotlib",
    "reverse_process",
    "samples_beside_data",
    "save",
    "smooth",
    "training_curve",
]

DPI = 150
COLUMNS = 8
LIMIT = 3.0  # of panels with noise: data of unit variance and standard normal noise both fit

INK, QUIET, FRAME = "#222222", "#6e6e6e", "#d4d4d4"
BLUE = "#0b62a4"
# Dots are coloured by where they belong in the data, so that the eye can follow them. The colours are told
# apart with any colour vision; the palest fifth of the map is left out, which would be lost on white.
COLOURS, PALEST = "plasma", 0.8

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "axes.edgecolor": FRAME,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def require_matplotlib() -> None:
    """ImportError if it is missing, saying what to install; to be called before computing what to draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError('Pictures need matplotlib: pip install "tinydiff[demos]".') from None


@contextmanager
def _style() -> Iterator[None]:
    """Draw in this file's style, whatever the user's settings are, and leave them as they were."""
    require_matplotlib()
    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True):
        yield


@_style()
def forward_process(
    x0: Array,
    schedules: Mapping[str, NoiseSchedule],
    rng: np.random.Generator,
    columns: int = COLUMNS,
) -> Figure:
    """Draw data on its way to noise: a row for each schedule, the same noise in all of them.

    Parameters
    ----------
    x0 : array of shape (N, 2) or (N, H, W, C)
        Data: some thousands of points, or a few images, in [-1, 1].
    schedules : mapping of str to NoiseSchedule
        What to compare, all of the same T, and what each is called.
    rng : numpy.random.Generator
        Draws the noise.
    columns : int
        How many times to show, evenly spaced from 0 to T-1.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If `x0` is neither points nor images of floating numbers, `schedules` is empty or of several T, or
        `columns` is not an integer of at least 1.
    TypeError
        If `schedules` is not a mapping to NoiseSchedules, or `rng` not a generator.
    """
    check_counts(columns=columns)
    check_rng(rng)
    x0 = _checked("x0", x0)
    if not isinstance(schedules, Mapping):
        expected = "what each is called, and it: {'cosine': ...}"
        raise TypeError(f"schedules is {class_or_kind(schedules)}; expected {expected}.")
    for schedule in schedules.values():
        check_schedule(schedule)
    lengths = {schedule.T for schedule in schedules.values()}
    if len(lengths) != 1:
        raise ValueError(f"schedules have T = {sorted(lengths)}; expected at least one, and one T for all.")
    (T,) = lengths
    times = evenly_spaced_timesteps(T, min(columns, T))
    noise = standard_normal(rng, x0.shape, x0)
    fig, axes = _panels(len(schedules), len(times), row_gap=0.3)
    steps = f"T = {T} step{'s' * (T > 1)}"
    _title(fig, "Forward process", f"from data to noise in {steps}, the same noise in every row")
    colours = _colours(x0)
    for row, (name, schedule) in zip(axes, schedules.items(), strict=True):
        _row_label(row[0], str(name).replace("$", r"\$"))
        diffusion = GaussianDiffusion(schedule)
        for ax, t in zip(row, times, strict=True):
            _show(ax, diffusion.q_sample(x0, int(t), noise), colours)
            signal = math.sqrt(schedule.alphas_cumprod[t])
            _caption(ax, rf"$\sqrt{{\bar\alpha_t}}$ = {signal:.2f}")
    for ax, t in zip(axes[0], times, strict=True):
        ax.set_title(f"$t$ = {t}", fontsize=9, pad=4)
    return fig


@_style()
def training_curve(losses: Array, label: str = "mean squared error") -> Figure:
    """Draw the loss of every training step, faint, and its running mean.

    Parameters
    ----------
    losses : array of shape (steps,)
        As in ``TrainingResult.losses``.
    label : str
        What the loss is.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is no loss, or one is not finite.
    """
    from matplotlib.ticker import MaxNLocator

    losses = np.asarray(losses, np.float64)
    curve = smooth(losses)
    steps = np.arange(1, len(losses) + 1)
    width, height = 6.4, 3.6
    fig = _canvas(width, height)
    ax = _axes(fig, 0.66, 0.5, width - 0.66 - 0.7, height - 0.5 - 0.56)
    _title(fig, "Training", "loss of each step, and its running mean")
    ax.plot(steps, losses, color=BLUE, alpha=0.22, linewidth=0.5)
    ax.plot(steps, curve, color=BLUE, linewidth=1.6)
    ax.plot(steps[-1], curve[-1], "o", color=BLUE, markersize=4, clip_on=False)
    ax.annotate(
        f"{curve[-1]:.3g}", (steps[-1], curve[-1]), (7, 0), textcoords="offset points", va="center",
        color=BLUE, fontsize=10, annotation_clip=False,
    )  # fmt: skip
    _loss_axis(ax, losses)
    ax.set_xlim(1, max(2, len(losses)))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("training step")
    ax.set_ylabel(label, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=FRAME, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=5)
    return fig


@_style()
def samples_beside_data(samples: Array, data: Array, title: str = "") -> Figure:
    """Draw samples and data in two panels with the same limits, a little beyond the data.

    The panel's title says how many points are outside them, or not finite.

    Parameters
    ----------
    samples, data : array of shape (N, 2) or (N, H, W, C)
        Points, or images in [-1, 1]; N may differ, but the two look alike only with the same N.
    title : str
        What to say about them, after "Samples beside data".

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If `samples` and `data` are not both points or both images, of floating numbers.
    """
    samples, data = _checked("samples", samples), _checked("data", data)
    if samples.shape[1:] != data.shape[1:]:
        raise ValueError(f"samples has shape {samples.shape} and data {data.shape}; expected the same kind.")
    fig, axes = _panels(1, 2, panel=3.6, gap=0.15, left=EDGE)
    _title(fig, "Samples beside data", title)
    limit = 1.1 * float(np.abs(data[np.isfinite(data)]).max(initial=0)) or LIMIT
    for ax, x, name, colour in zip(axes[0], [data, samples], ["data", "samples"], [INK, BLUE], strict=True):
        _show(ax, x, colour, limit)
        unseen = int(np.sum(~np.all(np.abs(x) <= limit, axis=1))) if x.ndim == 2 else 0
        ax.set_title(f"{name}, {unseen} of {len(x)} outside" if unseen else name, fontsize=9, pad=5)
    return fig


@_style()
def reverse_process(states: Iterable[SamplerState], columns: int = COLUMNS) -> Figure:
    """Draw the way from noise to samples: the states x_t, and beneath each the data predicted from it.

    Parameters
    ----------
    states : iterable of SamplerState
        What `iterate_samples` yields, from the noise to the sample: of some thousands of points, or a few
        images.
    columns : int
        How many states to show, at most, from the first to the last, more closely spaced towards the end,
        where the detail comes.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If `states` holds less than two, or something that is neither points nor images; or `columns` is not
        an integer of at least 1.
    TypeError
        If `states` holds what is not a SamplerState.
    """
    check_counts(columns=columns)
    states = list(states)
    if len(states) < 2:
        raise ValueError(f"states holds {len(states)}; expected the noise and what at least one step made.")
    for state in states:
        if not isinstance(state, SamplerState):
            expected = "the SamplerState that iterate_samples yields"
            raise TypeError(f"states holds {class_or_kind(state)}; expected {expected}.")
    sample = _checked("states", states[-1].x)
    last = len(states) - 1
    left = last * np.linspace(1, 0, columns) ** 1.5
    shown = np.arange(last + 1) if last < columns else np.unique(last - np.round(left).astype(int))
    fig, axes = _panels(2, len(shown))
    _title(fig, "Reverse process", f"from noise to samples in {last} step{'s' * (last > 1)}")
    _row_label(axes[0][0], "state $x_t$")
    _row_label(axes[1][0], "predicted $x_0$")
    colours = _colours(sample)
    for i, top, bottom in zip(shown, *axes, strict=True):
        _show(top, to_numpy(states[i].x), colours)
        # A state carries the prediction of the step that led to it: that made *from* x_t is in the next one.
        _show(bottom, to_numpy(states[min(i + 1, last)].x0), colours)
        top.set_title(f"$t$ = {states[i].t}" if i < last else "sample", fontsize=9, pad=4)
    return fig


def save(fig: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG; the same figure gives the same file.

    Parameters
    ----------
    fig : Figure
        What the functions above return.
    path : path
        Destination; its directory is made if it is missing, and an existing file replaced only once the new
        one is complete.

    Raises
    ------
    TypeError
        If `fig` is no figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    if not isinstance(fig, Figure):
        raise TypeError(f"fig is {class_or_kind(fig)}; expected a figure, as the functions here return one.")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # Images of three channels hold more colours than a palette does.
    if not any(np.asarray(shown.get_array()).ndim == 3 for ax in fig.axes for shown in ax.images):
        # A palette of 256 colours makes the file a third as large, and no eye sees the difference.
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    replace_file(path, content.getvalue())


def smooth(losses: Array) -> np.ndarray:
    """Return the running mean of the losses, each over the last fiftieth of all the steps.

    Parameters
    ----------
    losses : array of shape (steps,)
        Finite numbers.

    Returns
    -------
    ndarray of float64, shape (steps,)
        Near the start, the mean of the steps there are.

    Raises
    ------
    ValueError
        If there is no loss, or one is not finite.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or losses.size == 0 or not np.isfinite(losses).all():
        raise ValueError(f"losses has shape {losses.shape}; expected (steps,), finite and not empty.")
    window = max(1, losses.size // 50)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    stop = np.arange(1, losses.size + 1)
    start = np.maximum(0, stop - window)
    return (total[stop] - total[start]) / (stop - start)


# Composition. Every length is in inches, so that panels are exactly square and text keeps its size.

LEFT = 0.34  # room for the rows' names
TOP = 0.66  # room for the title and a line of labels
EDGE = 0.1  # on the other sides


def _canvas(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI)


def _axes(fig: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes with the lower left corner at x, y."""
    w, h = fig.get_size_inches()
    return fig.add_axes((x / w, y / h, width / w, height / h))


def _panels(
    rows: int, columns: int, panel: float = 1.2, gap: float = 0.07, row_gap: float = 0.07, left: float = LEFT
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of square panels beneath a title."""
    width = left + columns * (panel + gap) - gap + EDGE
    height = TOP + rows * (panel + row_gap) + EDGE
    fig = _canvas(width, height)

    def panel_at(row: int, column: int) -> Axes:
        y = height - TOP - (row + 1) * panel - row * row_gap
        ax = _axes(fig, left + column * (panel + gap), y, panel, panel)
        ax.set(xticks=[], yticks=[])
        return ax

    return fig, [[panel_at(row, column) for column in range(columns)] for row in range(rows)]


def _title(fig: Figure, title: str, rest: str) -> None:
    """Heading and explanation on one line from the left edge; a page too narrow for them is widened."""
    width, height = fig.get_size_inches()
    y, inches = height - 0.3, fig.dpi_scale_trans
    heading = fig.text(EDGE, y, title, fontsize=11, fontweight="bold", transform=inches)
    right = heading.get_window_extent().x1 / fig.dpi
    explanation = fig.text(right + 0.12, y, rest, color=QUIET, transform=inches, parse_math=False)
    needed = explanation.get_window_extent().x1 / fig.dpi + EDGE
    if needed > width:
        fig.set_size_inches(needed, height)
        for ax in fig.axes:
            box = ax.get_position()
            ax.set_position((box.x0 * width / needed, box.y0, box.width * width / needed, box.height))


def _row_label(ax: Axes, name: str) -> None:
    ax.annotate(
        name, (0, 0.5), (-6, 0), xycoords="axes fraction", textcoords="offset points",
        rotation=90, ha="right", va="center",
    )  # fmt: skip


def _caption(ax: Axes, text: str) -> None:
    ax.annotate(
        text, (0.5, 0), (0, -5), xycoords="axes fraction", textcoords="offset points",
        ha="center", va="top", color=QUIET, fontsize=7.5,
    )  # fmt: skip


# Content


def _checked(name: str, x: Array) -> np.ndarray:
    """Points or images of floating numbers, on the host."""
    check_unmasked(name, x)
    x = to_numpy(x)
    points = x.ndim == 2 and x.shape[1] == 2
    images = x.ndim == 4 and x.shape[3] in (1, 3)
    if not (points or images) or len(x) == 0:
        raise ValueError(
            f"{name} has shape {x.shape}; expected points (N, 2) or images (N, H, W, C) with C 1 or 3."
        )
    if x.dtype.kind != "f":
        expected = "a floating one (of 8-bit images, x / 127.5 - 1)"
        raise ValueError(f"{name} has dtype {x.dtype}; expected {expected}.")
    return x


def _show(ax: Axes, x: np.ndarray, colour: str | np.ndarray, limit: float = LIMIT) -> None:
    """Draw points in their colours, or images, into a panel."""
    if x.ndim == 4:
        ax.imshow(_mosaic(x), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        return
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    # In points, half the distance between dots if they lay in a square grid; but never too fine to be seen.
    side = ax.get_window_extent().width * 72 / ax.figure.dpi
    diameter = min(max(0.5 * side / math.sqrt(len(x)), 0.8), 3.0)
    ax.scatter(x[:, 0], x[:, 1], s=diameter**2, c=colour, alpha=0.6, linewidths=0)


def _colours(data: np.ndarray) -> str | np.ndarray:
    """A colour for each point, by its place in the data from left to right."""
    from matplotlib import colormaps

    if data.ndim == 4:
        return INK
    rank = np.argsort(np.argsort(data[:, 0])) / len(data)
    return colormaps[COLOURS](PALEST * rank)


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] side by side in a square, as grey or colour values in [0, 1] with white between."""
    n, h, w, c = images.shape
    side = math.ceil(math.sqrt(n))
    rows = math.ceil(n / side)
    white = 0.0 if c == 1 else 1.0  # grey values are ink on paper
    cell = np.full((rows * side, h + 2, w + 2, c), white)
    cell[:n, 1:-1, 1:-1] = np.clip(images / 2 + 0.5, 0, 1)
    grid = cell.reshape(rows, side, h + 2, w + 2, c).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * (h + 2), side * (w + 2), c)
    return grid[..., 0] if c == 1 else grid


def _loss_axis(ax: Axes, losses: np.ndarray) -> None:
    """A logarithmic axis if the loss falls far enough for one to show more; round numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = np.quantile(losses, [0.002, 0.998])
    if 0 < 4 * low < high:
        ax.set_yscale("log")
        ax.set_ylim(0.9 * low, 1.1 * high)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.1 * (high - low) or 0.1
        ax.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
