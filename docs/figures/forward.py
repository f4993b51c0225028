"""Points and digits on their way to noise, linear above and cosine below (chapter 1)."""

import numpy as np
from style import figure, save_png

from tinydiff import GaussianDiffusion, cosine_schedule, linear_schedule
from tinydiff.datasets import mnist, toy2d
from tinydiff.schedules import evenly_spaced_timesteps

T, COLUMNS = 1000, 8
ROWS = {"linear": linear_schedule(T), "cosine": cosine_schedule(T)}


def panels(x0, show, name):
    """A row for each schedule, with the same noise in all panels."""
    noise = np.random.default_rng(1).standard_normal(x0.shape)
    fig = figure(9.6, 2.95)
    axes = fig.subplots(len(ROWS), COLUMNS)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    times = evenly_spaced_timesteps(T, COLUMNS)
    for row, (label, schedule) in zip(axes, ROWS.items(), strict=True):
        row[0].set_ylabel(label)
        for ax, t in zip(row, times, strict=True):
            show(ax, GaussianDiffusion(schedule).q_sample(x0, int(t), noise))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(f"{np.sqrt(schedule.alphas_cumprod[t]):.2f}", fontsize=9)
    for ax, t in zip(axes[0], times, strict=True):
        ax.set_title(f"$t$ = {t + 1}", fontsize=9)  # the papers' count
    save_png(fig, name)


def main():
    points = toy2d.sample("moons", 1200, np.random.default_rng(0), dtype=np.float64)
    # Every point keeps the colour of the place where it began.
    blend = (np.argsort(np.argsort(points[:, 0])) / len(points))[:, None]
    colours = (1 - blend) * np.array([0.22, 0.53, 0.79]) + blend * np.array([0.85, 0.51, 0.17])

    def show_points(ax, x):
        ax.scatter(*x.T, s=1.6, c=colours, linewidths=0)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")

    panels(points, show_points, "forward-points.png")

    images, labels = mnist.load("subset")
    four = mnist.to_model_range(images[[int(np.flatnonzero(labels == k)[0]) for k in (2, 3, 5, 8)]])

    def show_digits(ax, x):
        grid = x[..., 0].reshape(2, 2, 28, 28).transpose(0, 2, 1, 3).reshape(56, 56)
        ax.imshow(grid, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")

    panels(four.astype(np.float64), show_digits, "forward-digits.png")


if __name__ == "__main__":
    main()
