"""The plane of data and noise, in which x_t and v are the axes turned by one angle (chapter 1)."""

import numpy as np
from matplotlib.patches import Arc
from style import BLUE, GREY, ORANGE, figure, save_svg


def arrow(ax, end, colour, label, offset, start=(0, 0)):
    ax.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0},
    )
    ax.annotate(
        label, end, offset, textcoords="offset points", color=colour, fontsize=12, ha="center", va="center"
    )


def main():
    angle = np.deg2rad(34)
    a, s = np.cos(angle), np.sin(angle)
    fig = figure(4.6, 3.0)
    ax = fig.subplots()
    turn = np.linspace(0, np.pi / 2, 100)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.plot([a, a], [0, s], color=BLUE, linewidth=0.8, linestyle=":")
    ax.plot([0, a], [s, s], color=BLUE, linewidth=0.8, linestyle=":")
    arrow(ax, (1, 0), GREY, "$x_0$", (12, 0))
    arrow(ax, (0, 1), GREY, r"$\varepsilon$", (0, 10))
    arrow(ax, (a, s), BLUE, "$x_t$", (12, 6))
    arrow(ax, (-s, a), ORANGE, "$v_t$", (-10, 8))
    ax.add_patch(Arc((0, 0), 0.6, 0.6, theta1=0, theta2=34, color=GREY, linewidth=0.8))
    ax.add_patch(Arc((0, 0), 0.6, 0.6, theta1=90, theta2=124, color=GREY, linewidth=0.8))
    ax.text(0.36 * np.cos(angle / 2), 0.36 * np.sin(angle / 2), r"$\varphi_t$", va="center", ha="center")
    ax.text(-0.37 * np.sin(angle / 2), 0.37 * np.cos(angle / 2), r"$\varphi_t$", va="center", ha="center")
    ax.text(a / 2, -0.03, "$a_t$", color=BLUE, va="top", ha="center")
    ax.text(a + 0.03, s / 2, "$s_t$", color=BLUE, va="center", ha="left")
    ax.set(xlim=(-0.85, 1.25), ylim=(-0.14, 1.15), aspect="equal")
    ax.axis("off")
    save_svg(fig, "rotation.svg")


if __name__ == "__main__":
    main()
