"""Log-SNR over time, and what each schedule spends its steps on (chapter 2)."""

import numpy as np
from style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure, save_svg

from tinydiff import cosine_schedule, flow_schedule, linear_schedule


def main():
    T = 1000
    chains = [
        ("linear", linear_schedule(T), BLUE),
        ("cosine", cosine_schedule(T), ORANGE),
        ("flow", flow_schedule(T), PURPLE),
        ("unscaled, $T$ = 100", linear_schedule(100, beta_start=1e-4, beta_end=0.02), GREEN),
    ]
    fig = figure(8.4, 3.1)
    left, right = fig.subplots(1, 2)
    for label, chain, colour in chains:
        clock = np.log(chain.snr[chain.snr > 0])  # flow ends in noise alone
        time = np.arange(1, len(clock) + 1) / chain.T
        left.plot(time, clock, color=colour, label=label, linestyle="--" if chain.T == 100 else "-")
        if chain.T == T:
            counts, edges = np.histogram(clock, np.arange(-12, 12.5, 1))
            right.stairs(counts, edges, color=colour, linewidth=1.6, label=label)
    left.axhline(0, color=GREY, linewidth=0.6)
    left.set(xlim=(0, 1), ylim=(-12, 12), xlabel="$t / T$", ylabel=r"log-SNR  $\lambda_t$")
    left.legend(loc="lower left", labelcolor="linecolor", fontsize=9)
    right.set(xlim=(12, -12), xlabel=r"log-SNR  $\lambda$, from data to noise", ylabel="steps of 1000")
    right.legend(loc="upper right", labelcolor=[BLUE, ORANGE, PURPLE], fontsize=9)
    save_svg(fig, "log-snr.svg")


if __name__ == "__main__":
    main()
