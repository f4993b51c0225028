"""The levels that four schedules visit, and how evenly each spreads the error over time (chapter 14)."""

import numpy as np
from style import BLUE, GREEN, GREY, ORANGE, figure, save_svg

from tinydiff import (
    Adam,
    GaussianDiffusion,
    GaussianMixture,
    LearnedSchedule,
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
)
from tinydiff.continuous_bound import diffuse, draw_times, integral_term

ANGLES = np.pi * np.arange(8) / 4
RING = GaussianMixture(np.ones(8), 1.3 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 0.01)


def terms(gamma, slope, rng):
    """The integral's terms with the ring's best network, one sample at each of the different levels."""
    x0, noise = RING.sample(len(gamma), rng), rng.standard_normal((len(gamma), 2))
    order = np.argsort(gamma)
    rise = np.append(1.0, -np.expm1(-np.diff(gamma[order])))
    chain = NoiseSchedule(rise / (1 + np.exp(-gamma[order])))
    output = RING.denoiser(GaussianDiffusion(chain))(diffuse(x0, noise, gamma)[0], np.argsort(order))
    return integral_term(output, x0, noise, gamma, slope, "eps")[0]


def root_of_moment(levels, rng, draws=20_000):
    """sqrt(m) of S.13 at each level."""
    near = 1e-9 * np.arange(draws)
    moments = [np.mean(terms(level + near, 1.0 + 0 * near, rng) ** 2) for level in levels]
    return np.sqrt(moments)


def main():
    rng, learned = np.random.default_rng(0), LearnedSchedule(-9.2, 10.1)
    u = np.linspace(0, 1, 200)
    curves = {"straight": (*learned(u)[0], GREY, "--")}
    optimizer = Adam(learned.rise.named_parameters(), lr=0.03)
    for _ in range(600):
        (gamma, slope), backward = learned.separate(draw_times(64, rng))
        learned.zero_grad()
        backward(0 * gamma, 0 * gamma, terms(gamma, slope, rng))
        optimizer.step()
    for name, chain, colour in [("linear", linear_schedule(), BLUE), ("cosine", cosine_schedule(), ORANGE)]:
        levels = -np.log(chain.snr)
        times = np.linspace(0, 1, len(levels))
        curves[name] = (
            np.interp(u, times, levels),
            np.interp(u, times, np.gradient(levels, times)),
            colour,
            "-",
        )
    curves["learned"] = (*learned(u)[0], GREEN, "-")
    grid = np.linspace(-10, 10, 41)
    logs = np.log(root_of_moment(grid, rng))
    fig = figure(8.4, 3.0)
    left, right = fig.subplots(1, 2)
    for name, (gamma, slope, colour, line) in curves.items():
        left.plot(u, gamma, line, color=colour, label=name)
        inside = np.abs(gamma) <= 10
        spread = slope * np.exp(np.interp(gamma, grid, logs))
        right.plot(u[inside], spread[inside], line, color=colour)
    left.set(xlim=(0, 1), ylim=(-11, 11), xlabel="$u$", ylabel=r"level  $\gamma(u)$")
    left.legend(loc="upper left", labelcolor="linecolor", fontsize=9)
    right.set(xlim=(0, 1), yscale="log", xlabel="$u$", ylabel=r"$\gamma' \sqrt{m}$, nats")
    save_svg(fig, "levels.svg")


if __name__ == "__main__":
    main()
