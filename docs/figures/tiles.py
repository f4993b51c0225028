"""A block of the convolution in CUDA: its tile of the result, and what it fetches for it (chapter 12)."""

from matplotlib.patches import Rectangle
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg

# 128 outputs by 128 of 256 channels, with 64 channels of the input: two K of 32, nine taps for each.
ROWS, COLUMNS, STEPS, TAPS = 512, 256, 18, 9
BM, BN, BK = 128, 128, 32
WARP = 64, 32  # outputs and channels
FIRST, LEFT = 128, 128  # the block's tile
STEP = 11  # the step that is multiplied; the next two are under way


def box(ax, x, y, width, height, colour="none", line=GREY, **how):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=line, **how))


def main():
    depth = STEPS * BK
    fig = figure(8.4, 4.6)
    (corner, above), (beside, result) = fig.subplots(2, 2, width_ratios=[2.4, 1], height_ratios=[1.25, 1])
    for step in range(STEPS):
        x = step * BK
        colour = ORANGE if STEP <= step <= STEP + 2 else "none"
        alpha = 0.4 if STEP < step <= STEP + 2 else 1
        box(beside, x, FIRST, BK, BM, colour, alpha=alpha, linewidth=0.6)
        box(above, LEFT, x, BN, BK, colour, alpha=alpha, linewidth=0.6)
    box(beside, 0, 0, depth, ROWS, linewidth=0.8, fill=False, linestyle=(0, (4, 3)))
    box(above, 0, 0, COLUMNS, depth, linewidth=0.8, fill=False)
    box(result, 0, 0, COLUMNS, ROWS, linewidth=0.8, fill=False)
    for row in range(0, ROWS, BM):
        for column in range(0, COLUMNS, BN):
            colour, alpha = (BLUE, 0.5) if (row, column) == (FIRST, LEFT) else ("none", 1)
            box(result, column, row, BN, BM, colour, alpha=alpha, linewidth=0.6)
    for row in range(FIRST, FIRST + BM, WARP[0]):
        for column in range(LEFT, LEFT + BN, WARP[1]):
            box(result, column + 3, row + 6, WARP[1] - 6, WARP[0] - 12, line=GREEN, fill=False, linewidth=1.2)

    beside.set(xlim=(0, depth), ylim=(ROWS, 0), ylabel="outputs", yticks=range(0, ROWS + 1, BM))
    beside.set(xlabel="steps: a tap of 32 channels each", xticks=[0, TAPS * BK, depth])
    beside.set_xticklabels([0, TAPS, STEPS])
    beside.set_title("$X$, never made", pad=4)
    above.set(xlim=(0, COLUMNS), ylim=(depth, 0), ylabel="steps", yticks=[0, TAPS * BK, depth])
    above.set(xlabel="channels of the output", xticks=range(0, COLUMNS + 1, BN))
    above.set_yticklabels([0, TAPS, STEPS])
    above.set_title("$W$", pad=4)
    result.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), xlabel="channels of the output")
    result.set(xticks=range(0, COLUMNS + 1, BN), yticks=range(0, ROWS + 1, BM))
    result.set_title("$y$", pad=4)
    corner.axis("off")
    lines = [
        (BLUE, "a block's tile, in its threads' registers"),
        (GREEN, "its warps' shares, 64 outputs by 32 channels each"),
        (ORANGE, "in shared memory: the step that is multiplied"),
        (ORANGE, "and, paler, the next two, on their way"),
    ]
    for k, (colour, text) in enumerate(lines):
        corner.text(0, 0.85 - 0.2 * k, text, color=colour, transform=corner.transAxes, fontsize=10)
    for ax in (above, beside, result):
        ax.tick_params(labelsize=8)
        for spine in ax.spines.values():
            spine.set_visible(False)
    save_svg(fig, "tiles.svg")


if __name__ == "__main__":
    main()
