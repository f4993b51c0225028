"""The plane of data and noise: the arc on which x_t moves, and the line of flow matching (chapter 1)."""

import numpy as np
from rotation import arrow
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg


def main():
    angle = np.deg2rad(34)
    a, s = np.cos(angle), np.sin(angle)
    on_the_line = np.array([a, s]) / (a + s)
    fig = figure(4.6, 3.0)
    ax = fig.subplots()
    turn = np.linspace(0, np.pi / 2, 100)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.plot([1, 0], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    arrow(ax, (1, 0), GREY, "$x_0$", (12, 0))
    arrow(ax, (0, 1), GREY, r"$\varepsilon$", (0, 10))
    arrow(ax, (a, s), BLUE, "$x_t$", (12, 4))
    arrow(ax, (a - 0.45 * s, s + 0.45 * a), ORANGE, "$v_t$", (8, 8), (a, s))
    arrow(ax, on_the_line + 0.42 * np.array([-1, 1]), GREEN, r"$\Delta$", (-10, -8), on_the_line)
    ax.plot(*on_the_line, color=BLUE, marker="o", markersize=5)
    ax.text(on_the_line[0] - 0.02, on_the_line[1] - 0.06, "$r_t$", color=BLUE, va="top", ha="center")
    ax.set(xlim=(-0.25, 1.25), ylim=(-0.1, 1.15), aspect="equal")
    ax.axis("off")
    save_svg(fig, "flow.svg")


if __name__ == "__main__":
    main()
