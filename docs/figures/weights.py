"""What an error of x_0 counts at each level of noise, by five losses (chapter 4)."""

import numpy as np
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg

from tinydiff import linear_schedule


def main():
    snr = linear_schedule().snr
    clock, middle = np.log(snr), np.argmin(np.abs(np.log(snr)))
    curves = [
        ("bound, $\\tilde\\beta_t$", np.append(np.nan, -np.diff(snr)), GREY, "--"),
        ("$\\varepsilon$", snr, BLUE, "-"),
        ("$v$", snr + 1, ORANGE, "-"),
        ("$x_0$", np.ones_like(snr), GREEN, "-"),
        ("Min-SNR, $\\gamma = 5$", np.minimum(snr, 5), BLUE, ":"),
    ]
    fig = figure(6.0, 3.2)
    ax = fig.subplots()
    for label, weight, colour, line in curves:
        ax.plot(clock, weight / weight[middle], line, color=colour, label=label)
    ax.axvline(0, color=GREY, linewidth=0.6)
    ax.set(
        xlim=(10, -10),
        yscale="log",
        ylim=(3e-5, 2e6),
        xticks=[10, 5, 0, -5, -10],
        xlabel=r"log-SNR  $\lambda$, from data to noise",
        ylabel=r"weight of $\Vert x_0 - \hat x_0 \Vert^2$",
    )
    ax.legend(loc="upper right", labelcolor="linecolor", fontsize=9)
    save_svg(fig, "weights.svg")


if __name__ == "__main__":
    main()
