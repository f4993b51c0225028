"""Winograd's convolution of an image of 8 x 8 pixels: overlapping patches in, tiles out (chapter 11)."""

from matplotlib.patches import Rectangle
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg

SIDE, PATCH, TILE, BEFORE = 8, 6, 4, 1
COLOURS = BLUE, ORANGE, GREEN, GREY


def cells(ax, first, last, colour, width):
    for at in range(first, last + 1):
        ax.plot([at, at], [first, last], color=colour, linewidth=width)
        ax.plot([first, last], [at, at], color=colour, linewidth=width)


def box(ax, row, column, size, colour, inset=0.0, **how):
    size -= 2 * inset
    ax.add_patch(Rectangle((column + inset, row + inset), size, size, edgecolor=colour, **how))


def axes_of(ax, title, low, high, ticks):
    ax.set(title=title, xlim=(low - 0.15, high + 0.15), ylim=(high + 0.15, low - 0.15), aspect="equal")
    ax.set(xlabel="column", ylabel="row", xticks=[t + 0.5 for t in ticks], yticks=[t + 0.5 for t in ticks])
    ax.set_xticklabels(ticks)
    ax.set_yticklabels(ticks)
    ax.tick_params(length=0, labelsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)


def main():
    fig = figure(8.4, 3.5)
    left, middle, right = fig.subplots(1, 3, width_ratios=[10, 7.5, 8])
    tiles = [(i, j) for i in range(SIDE // TILE) for j in range(SIDE // TILE)]

    low, high = -BEFORE, SIDE + BEFORE
    for row in range(low, high):
        for column in range(low, high):
            if not (0 <= row < SIDE and 0 <= column < SIDE):
                left.text(column + 0.5, row + 0.5, "0", ha="center", va="center", fontsize=7)
    cells(left, 0, SIDE, GREY, 0.3)
    for k, (i, j) in enumerate(tiles):
        row, column = TILE * i - BEFORE, TILE * j - BEFORE
        box(left, row, column, PATCH, COLOURS[k], 0.09 * (k + 1), facecolor="none", linewidth=1.6)
    axes_of(left, "image, with a padding of 1", low, high, range(low, high))

    for k in range(PATCH * PATCH):
        row, column = divmod(k, PATCH)
        box(middle, row, column, 1, GREY, 0.12, facecolor="none", linewidth=0.6)
        for p in range(len(tiles)):
            down, across = divmod(p, 2)
            at = row + 0.22 + 0.3 * down, column + 0.22 + 0.3 * across
            box(middle, *at, 0.26, "none", facecolor=COLOURS[p])
    axes_of(middle, r"36 places of $V = B^\top d\, B$", 0, PATCH, range(PATCH))
    middle.set(xlabel="place across", ylabel="place down")

    cells(right, 0, SIDE, GREY, 0.3)
    for k, (i, j) in enumerate(tiles):
        box(right, TILE * i, TILE * j, TILE, COLOURS[k], 0.08, facecolor="none", linewidth=1.6)
    axes_of(right, r"output, tiles $A^\top M A$", 0, SIDE, range(SIDE))
    save_svg(fig, "patches.svg")


if __name__ == "__main__":
    main()
