"""The posterior as a product of two bells, and a reverse step's variance between its bounds (chapter 3)."""

import numpy as np
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg

from tinydiff import GaussianDiffusion, NoiseSchedule, linear_schedule


def bell(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def product(ax):
    """For x_0 = 1, x_t = -0.3 at the second step of a chain of two."""
    diffusion = GaussianDiffusion(NoiseSchedule([0.35, 0.35]))
    x0, x_t = np.array([1.0]), np.array([-0.3])
    alpha, beta = diffusion.schedule.alphas[1], diffusion.schedule.betas[1]
    curves = [
        ("from $x_0$", BLUE, diffusion.q_mean_variance(x0, 0)),
        ("from $x_t$", ORANGE, (x_t / np.sqrt(alpha), np.array([beta / alpha]))),
        ("posterior", GREEN, diffusion.q_posterior_mean_variance(x0, x_t, 1)),
    ]
    x = np.linspace(-2.6, 2.8, 120)
    for label, colour, (mean, variance) in curves:
        y = bell(x, mean[0], variance[0])
        ax.plot(x, y, color=colour)
        ax.fill_between(x, y, color=colour, alpha=0.12, linewidth=0)
        side = {"from $x_0$": 14, "from $x_t$": -14}.get(label, 0)
        ax.annotate(
            label, (mean[0], np.max(y)), (side, 5), textcoords="offset points", color=colour,
            ha={14: "left", -14: "right"}.get(side, "center"),
        )  # fmt: skip
    ax.set(ylim=(0, 1.08), yticks=[], xlabel="$x_{t-1}$")
    ax.spines["left"].set_visible(False)


def variances(ax):
    """As fractions of beta_t, for data that is +1 or -1."""
    schedule = linear_schedule(20)
    diffusion = GaussianDiffusion(schedule)
    one, x = np.ones(1), np.linspace(-12, 12, 4001)
    truth = []
    for t in range(schedule.T):
        a, s2 = (y[0] for y in diffusion.q_mean_variance(one, t))
        density = 0.5 * (bell(x, a, s2) + bell(x, -a, s2))
        doubt = np.sum(density * (1 - np.tanh(a * x / s2) ** 2)) * (x[1] - x[0])  # E Var(x_0 | x_t)
        weight = diffusion.q_posterior_mean_variance(one, 0 * one, t)[0][0]
        truth.append(schedule.posterior_variance[t] + weight**2 * doubt)
    steps = np.arange(1, schedule.T + 1)
    ax.plot(steps, np.ones(schedule.T), color=ORANGE)
    ax.plot(steps, truth / schedule.betas, "o-", color=GREEN, markersize=3)
    ax.plot(steps, schedule.posterior_variance / schedule.betas, color=BLUE)
    ax.text(20, 1.03, r"$\beta_t$: fixed_large", color=ORANGE, ha="right", va="bottom")
    ax.text(7.6, 0.57, r"$\tilde\beta_t$: fixed_small", color=BLUE, va="top")
    ax.text(2.3, 0.86, "truth", color=GREEN, ha="left", va="bottom")
    ax.set(
        ylim=(0, 1.15),
        xlim=(0.5, 20.5),
        xticks=[1, 5, 10, 15, 20],
        xlabel="$t$",
        ylabel=r"variance / $\beta_t$",
    )
    ax.tick_params(color=GREY)


def main():
    fig = figure(8.4, 3.0)
    left, right = fig.subplots(1, 2)
    product(left)
    variances(right)
    save_svg(fig, "posterior.svg")


if __name__ == "__main__":
    main()
