"""Steps of the two samplers that add noise, each with one mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from tinydiff.backend import clip_to_unit
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.testing._reverse import log_variances

__all__ = ["Step", "walked", "wrong_steps"]

# Of (i, x, output, z): from the state of step i, what the network says of it, and fresh noise, to the next.
Step: TypeAlias = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# Of (i, x, output): what a step is made of.
Part: TypeAlias = Callable[[int, np.ndarray, np.ndarray], Any]


def walked(
    step: Step,
    network: Callable[..., np.ndarray],
    x: np.ndarray,
    timesteps: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The samples of a sampler that makes this step at each of the times."""
    for i in reversed(range(len(timesteps))):
        output = network(x, np.full(len(x), timesteps[i]))
        x = step(i, x, output, rng.standard_normal(x.shape))
    return x


def wrong_steps(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, name: str, eta: float, clip: bool
) -> dict[str, Step]:
    """By what each does wrong, steps of the sampler called `name`; `walk` is `long` on the times alone."""
    if name == "ddpm":
        return _ancestral(long, walk, timesteps, clip)
    return _ddim(long, walk, timesteps, eta, clip) if name == "ddim" else {}


def _ancestral(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, clip: bool
) -> dict[str, Step]:
    betas, alphas, rest = walk.schedule.betas, walk.schedule.alphas, walk.schedule.one_minus_alphas_cumprod

    def of(process: GaussianDiffusion, which: int, times: np.ndarray | None = None) -> Part:
        """The mean (0) or the variance (1) of a process's step."""
        return lambda i, x, output: process.p_mean_variance(
            x, i if times is None else int(times[i]), output, clip
        )[which]

    def subtracting(factor: np.ndarray) -> Part:
        """Ho et al. 2020, eq. 11, with another factor in front of eps."""
        return lambda i, x, output: (x - factor[i] * walk.predict_eps(x, i, output)) / np.sqrt(alphas[i])

    def exponential_of(log_variance: Callable[..., np.ndarray]) -> Part:
        return lambda i, x, output: np.exp(log_variance(x, np.full(len(x), i), output))

    right_mean, right_variance = of(walk, 0), of(walk, 1)

    def step(
        mean: Part = right_mean, variance: Part = right_variance, power: float = 0.5, at_the_end: bool = False
    ) -> Step:
        return lambda i, x, output, z: (
            mean(i, x, output) + (variance(i, x, output) ** power * z if i or at_the_end else 0.0)
        )

    steps = {
        "noise at the last step (E.9)": step(at_the_end=True),
        "the variance as a standard deviation (E.10)": step(power=1.0),
        "no noise": step(variance=lambda *_: np.zeros(())),
        "the variance of the long chain (E.8)": step(variance=of(long, 1, timesteps)),
        "the whole step of the long chain (E.8)": step(of(long, 0, timesteps), of(long, 1, timesteps)),
        "beta_t in front of eps, not beta_t / sqrt(1 - abar_t) (E.11)": step(subtracting(betas)),
        "sqrt(1 - abar_t) in front of eps, not beta_t over it (E.11)": step(subtracting(np.sqrt(rest))),
    }
    if walk.variance == "learned_range":
        for what, log_variance in log_variances(walk).items():
            steps[what] = step(variance=exponential_of(log_variance))
        return steps
    for variance in ("fixed_small", "fixed_large"):
        other = GaussianDiffusion(walk.schedule, walk.prediction, variance)
        steps[f"the variance {variance}"] = step(variance=of(other, 1))
    return steps


def _ddim(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, eta: float, clip: bool
) -> dict[str, Step]:
    small, small_of_long = walk.schedule.posterior_variance, long.schedule.posterior_variance[timesteps]
    after = walk.schedule.one_minus_alphas_cumprod_prev
    computed = timesteps - long.T // walk.T  # the times after those, if they were so far apart
    rest_computed = np.where(computed < 0, 0.0, long.schedule.one_minus_alphas_cumprod[computed])
    rest_to_the_first = np.append(walk.schedule.one_minus_alphas_cumprod[0], after[1:])

    def step(
        variance: np.ndarray = eta**2 * small,
        rest: np.ndarray = after,  # 1 - abar of the next state
        reduced: bool = True,
        eps_unclipped: bool = False,
    ) -> Step:
        def ddim(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray) -> np.ndarray:
            x0 = walk.predict_x0(x, i, output)
            D = clip_to_unit(x0) if clip else x0
            eps = walk.predict_eps(x, i, x0 if eps_unclipped else D, given="x0")
            of_eps = np.sqrt(np.maximum(rest[i] - variance[i] * reduced, 0))
            return np.sqrt(1 - rest[i]) * D + of_eps * eps + np.sqrt(variance[i]) * z

        return ddim

    return {
        "the next time computed, t - T / S, and not looked up (E.16)": step(rest=rest_computed),
        "the last step leads to abar of the first time, not to 1, the data": step(rest=rest_to_the_first),
        "sigma_t^2 of the long chain (E.8)": step(variance=eta**2 * small_of_long),
        "eta for eta^2 in sigma_t^2": step(variance=eta * small),
        "sigma_t^2 not taken out of what stands in front of eps": step(reduced=False),
        "sigma_t is 0": step(variance=0 * small),
        "eta is 1": step(variance=small),
        "eps of an x_0 that is not clipped": step(eps_unclipped=True),
    }
