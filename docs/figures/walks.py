"""From the same starts: arcs, the curves of their mean velocity, and ancestral walks (chapter 6)."""

import numpy as np
from scipy.stats import norm
from style import BLUE, GREY, ORANGE, figure, save_svg

from tinydiff import GaussianDiffusion, cosine_schedule, iterate_samples
from tinydiff.mixture import GaussianMixture

T, STARTS = 200, 16


def walks(data, diffusion, sampler, start):
    """Every state of every walk, (T + 1, STARTS), from noise to data."""
    states = iterate_samples(
        data.denoiser(diffusion), diffusion, start.shape, sampler, rng=np.random.default_rng(3), x_T=start
    )
    return np.stack([state.x[:, 0] for state in states])


def main():
    data = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.03)
    diffusion = GaussianDiffusion(cosine_schedule(T), "v")
    start = norm.ppf((np.arange(STARTS) + 0.5) / STARTS)[:, None]
    x0 = data.sample(STARTS, np.random.default_rng(1))[:, 0]
    a = np.sqrt(np.append(1.0, diffusion.schedule.alphas_cumprod))[::-1, None]
    s = np.sqrt(np.append(0.0, diffusion.schedule.one_minus_alphas_cumprod))[::-1, None]
    panels = {
        r"arcs  $a\,x_0 + s\,\varepsilon$": a * x0 + s * start[:, 0],
        "the ODE (heun)": walks(data, diffusion, "heun", start),
        "ancestral (ddpm)": walks(data, diffusion, "ddpm", start),
    }
    fig = figure(8.4, 2.8)
    axes = fig.subplots(1, len(panels), sharey=True)
    for ax, (title, paths) in zip(axes, panels.items(), strict=True):
        for path in paths.T:
            ax.plot(np.arange(T, -1, -1), path, color=BLUE if path[-1] < 0 else ORANGE, linewidth=0.9)
        ax.set(title=title, xlim=(T, 0), xticks=[200, 100, 0], xlabel="$t$, from noise to data")
        ax.tick_params(color=GREY)
    axes[0].set(ylabel="$x_t$", yticks=[-2, -1, 0, 1, 2])
    save_svg(fig, "walks.svg")


if __name__ == "__main__":
    main()
