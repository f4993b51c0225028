"""Steps of samplers, each with one mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from tinydiff.backend import clip_to_unit
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.samplers import angles, extrapolation_weights, step_lengths
from tinydiff.testing._asked import Function
from tinydiff.testing._reverse import log_variances, means

__all__ = ["Step", "walked", "wrong_steps"]

# From (i, x, output, z, ask) to the next state: step i, its state, what the network says of that, fresh
# noise, and ask(x, i), which asks the network once more.
Step: TypeAlias = Callable[[int, np.ndarray, np.ndarray, np.ndarray, Function], np.ndarray]
# A function of (i, x, output) that a step is made of.
Part: TypeAlias = Callable[[int, np.ndarray, np.ndarray], Any]


def walked(step: Step, network: Function, x: np.ndarray, timesteps: np.ndarray, rng: Any) -> np.ndarray:
    """The samples of a sampler that makes this step at each of the times."""

    def ask(x: np.ndarray, i: int) -> np.ndarray:
        return network(x, np.full(len(x), timesteps[i]))

    for i in reversed(range(len(timesteps))):
        x = step(i, x, ask(x, i), rng.standard_normal(x.shape), ask)
    return x


def wrong_steps(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, name: str, eta: float, clip: bool
) -> dict[str, Step]:
    """Steps of the sampler called `name`, by what each does wrong; `walk` is `long` on the times alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "ddpm":
            return _ancestral(long, walk, timesteps, clip)
        if name == "ddim":
            return _ddim(long, walk, timesteps, eta, clip)
        return _multistep(walk, clip) if name == "dpm++" else _trapezoid(walk, name, clip)


def _ancestral(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, clip: bool
) -> dict[str, Step]:
    def of(process: GaussianDiffusion, which: int, times: np.ndarray | None = None) -> Part:
        """The mean (0) or the variance (1) of a process's step."""
        return lambda i, x, output: process.p_mean_variance(
            x, i if times is None else int(times[i]), output, clip
        )[which]

    def at(function: Function) -> Part:
        """A function of (x_t, t, output) at step i."""
        return lambda i, x, output: function(x, np.full(len(x), i), output)

    right_mean, right_variance = of(walk, 0), of(walk, 1)

    def step(
        mean: Part = right_mean, variance: Part = right_variance, power: float = 0.5, at_the_end: bool = False
    ) -> Step:
        return lambda i, x, output, z, _: (
            mean(i, x, output) + (variance(i, x, output) ** power * z if i or at_the_end else 0.0)
        )

    right, mean_of_long = step(), of(long, 0, timesteps)

    def quiet(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, ask: Function) -> np.ndarray:
        return right(i, x, output, z if i > 1 else 0 * z, ask)

    def again(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, ask: Function) -> np.ndarray:
        return right(i, x, output, walk.predict_eps(x, i, output), ask)

    steps = {
        "noise at the last step (E.9)": step(at_the_end=True),
        "the noise that the network predicts, and not fresh noise": again,
        "no noise in the last two steps": quiet,
        "one noise for all of the batch": lambda i, x, output, z, ask: right(i, x, output, z[:1], ask),
        "the last step is left out, and the one before it adds no noise": lambda i, x, *given: (
            quiet(i, x, *given) if i else x
        ),
        "the variance as a standard deviation (E.10)": step(power=1.0),
        "the fourth root of the variance as a standard deviation": step(power=0.25),
        "no noise": step(variance=lambda *_: np.zeros(())),
        "the variance of the long chain (E.8)": step(variance=of(long, 1, timesteps)),
        "the whole step of the long chain (E.8)": step(mean_of_long, of(long, 1, timesteps)),
        "the state clipped after each step": lambda *given: clip_to_unit(right(*given)),
        **{what: step(at(mean)) for what, mean in means(walk).items()},
    }
    if timesteps[0] > 0:  # else it is the right step
        steps["the last step is that of the long chain, which does not lead to the data (E.26)"] = step(
            lambda i, *given: (right_mean if i else mean_of_long)(i, *given)
        )
    if walk.variance == "learned_range":
        for what, log_variance in log_variances(walk).items():
            steps[what] = step(variance=at(lambda *given, of=log_variance: np.exp(of(*given))))
        other = copy.copy(walk)
        other.log_variance_range = walk.log_variance_range[0], long.log_variance_range[1][timesteps]
        steps["beta_t of the long chain as the upper end of the variance (E.8)"] = step(variance=of(other, 1))
        return steps
    for variance in ("fixed_small", "fixed_large"):
        other = GaussianDiffusion(walk.schedule, walk.prediction, variance)
        steps[f"the variance {variance}"] = step(variance=of(other, 1))
    return steps


def _ddim(
    long: GaussianDiffusion, walk: GaussianDiffusion, timesteps: np.ndarray, eta: float, clip: bool
) -> dict[str, Step]:
    now, after = walk.schedule.one_minus_alphas_cumprod, walk.schedule.one_minus_alphas_cumprod_prev
    small, small_of_long = walk.schedule.posterior_variance, long.schedule.posterior_variance[timesteps]

    def step(
        rest: np.ndarray = after,  # 1 - abar of the next state
        variance: np.ndarray | None = None,
        of_x0: np.ndarray | None = None,
        of_eps: np.ndarray | None = None,
        clip: bool = clip,
        eps_unclipped: bool = False,
    ) -> Step:
        if variance is None:
            variance = eta**2 * rest / now * (1 - (1 - now) / (1 - rest))
        of_x0 = np.sqrt(1 - rest) if of_x0 is None else of_x0
        of_eps = np.sqrt(np.maximum(rest - variance, 0)) if of_eps is None else of_eps

        def ddim(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, _: Function) -> np.ndarray:
            x0 = walk.predict_x0(x, i, output)
            D = clip_to_unit(x0) if clip else x0
            eps = walk.predict_eps(x, i, x0 if eps_unclipped else D, given="x0")
            return of_x0[i] * D + of_eps[i] * eps + np.sqrt(variance[i]) * z

        return ddim

    def towards(times: np.ndarray) -> Step:
        """The step that leads to these times of the long chain, the data where they are below 0."""
        return step(np.where(times < 0, 0.0, long.schedule.one_minus_alphas_cumprod[times]))

    def from_the_end() -> dict[str, Step]:
        """The last step, to a time below 0 that counts from the end of abar, with or without a 1 in front."""
        below = int(timesteps[0] - (timesteps[1] - timesteps[0] if walk.T > 1 else long.T))
        indices = {"T": below % long.T, "T + 1": (below + 1) % (long.T + 1) - 1}
        what = "the last step leads to a time below 0, an index from the end of {} entries (E.16)"
        return {
            what.format(entries): towards(np.append(index, timesteps[:-1]))
            for entries, index in indices.items()
            if index > timesteps[0]  # else it leads to the data
        }

    sigma, right = eta * np.sqrt(small), step()
    steps = {
        "the state clipped after each step": lambda *given: clip_to_unit(right(*given)),
        "the next time computed, t - T / S, and not looked up (E.16)": towards(timesteps - long.T // walk.T),
        "the next state is that of t - 1": towards(timesteps - 1),
        "the next state is a step too far, abar_{t-1} at its t": towards(np.append(-1, timesteps[:-1] - 1)),
        "the last step leads to abar of t = 0, not to 1, the data": step(
            np.append(long.schedule.one_minus_alphas_cumprod[0], after[1:])
        ),
        **from_the_end(),
        "sigma_t^2 of the long chain (E.8)": step(variance=eta**2 * small_of_long),
        "eta for eta^2 in sigma_t^2": step(variance=eta * small),
        "eta^2 (1 - abar) of now for sigma_t^2": step(variance=eta**2 * now),
        "sigma_t^2 not taken out of what stands in front of eps": step(of_eps=np.sqrt(after)),
        "sigma_t, not its square, taken out under the root": step(
            of_eps=np.sqrt(np.maximum(after - sigma, 0))
        ),
        "sigma_t taken out beside the root": step(of_eps=np.sqrt(after) - sigma),
        "eps left out": step(of_eps=0 * after),
        "eps subtracted": step(of_eps=-np.sqrt(np.maximum(after - sigma**2, 0))),
        "sigma_t is 0": step(variance=0 * small),
        "eta is 1": step(variance=small),
        "1 - abar of now, not of the next state, in front of eps": step(
            of_eps=np.sqrt(np.maximum(now - sigma**2, 0))
        ),
        "1 - abar in front of eps, without its root": step(of_eps=after - sigma**2),
        "1 - sqrt(abar) in front of eps": step(of_eps=1 - np.sqrt(1 - after)),
        "sqrt(abar) of now, not of the next state, in front of x_0": step(of_x0=np.sqrt(1 - now)),
        "abar in front of x_0, without its root": step(of_x0=1 - after),
    }
    if clip:
        steps["eps of an x_0 that is not clipped (diffusers, unless use_clipped_model_output=True)"] = step(
            eps_unclipped=True
        )
    else:
        steps["x_0 is clipped, and eps is of the one that is not, which is diffusers' default"] = step(
            clip=True, eps_unclipped=True
        )
    if eta > 0:  # else sigma_t is 0, and this leaves eps out
        steps["sigma_t in front of eps, not the root of 1 - abar - sigma_t^2"] = step(of_eps=sigma)
    return steps


def _estimator(walk: GaussianDiffusion, clip: bool) -> Part:
    """The data that the network's answer means."""

    def estimate(i: int, x: np.ndarray, output: np.ndarray) -> np.ndarray:
        x0 = walk.predict_x0(x, i, output)
        return clip_to_unit(x0) if clip else x0

    return estimate


def _multistep(walk: GaussianDiffusion, clip: bool) -> dict[str, Step]:
    """DPM-Solver++ 2M, whose correction has another weight than h / (2 h_before)."""
    rest = walk.schedule.one_minus_alphas_cumprod_prev
    weight, h = extrapolation_weights(walk), step_lengths(walk)
    estimate = _estimator(walk, clip)

    def step(weight: np.ndarray, of_outputs: bool = False) -> Step:
        before: dict[int, np.ndarray] = {}

        def multistep(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, _: Function) -> np.ndarray:
            before[i] = now = output if of_outputs else estimate(i, x, output)
            corrected = now + weight[i] * (now - before[i + 1]) if weight[i] else now
            D = estimate(i, x, corrected) if of_outputs else corrected
            return np.sqrt(1 - rest[i]) * D + np.sqrt(rest[i]) * walk.predict_eps(x, i, D, given="x0")

        return multistep

    return {
        "h_before / h in the correction, not h / h_before": step(np.where(weight, 1 / weight / 4, 0.0)),
        "the correction without its half": step(2 * weight),
        "the correction as if all steps were equal": step(np.where(weight, 0.5, 0.0)),
        "the correction's sign": step(-weight),
        "the correction of the output, not of x_0 (E.22; where that is eps, DPM-Solver without ++)": step(
            weight, of_outputs=True
        ),
        "the correction integrated exactly, diffusers' solver_type='heun', which is another rule": step(
            np.where(weight, 2 * weight * (1 / -np.expm1(-h) - 1 / h), 0.0)
        ),
    }


def _trapezoid(walk: GaussianDiffusion, name: str, clip: bool) -> dict[str, Step]:
    """Heun's rule: one looks ahead to where ddim would go, and moves by the mean of both slopes, v or eps."""
    phi, heun, estimate = angles(walk), name == "heun", _estimator(walk, clip)

    def slope(i: int, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
        return (walk.predict_v if heun else walk.predict_eps)(x, i, x0, given="x0")

    def moved(i: int, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
        if heun:
            return x + (phi[i - 1] - phi[i]) * slope
        return walk.q_sample(walk.predict_x0(x, i, slope, given="eps"), i - 1, slope)

    def by_ddim(i: int, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
        return walk.q_sample(x0, i - 1, walk.predict_eps(x, i, x0, given="x0"))

    def by_euler(i: int, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
        return moved(i, x, slope(i, x, x0))

    def nowhere(i: int, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
        return moved(i, x, 0 * x)

    def step(first: float = 0.5, second: Any = 0.5, ahead: Function = by_ddim) -> Step:
        second = np.broadcast_to(second, walk.T)

        def trapezoid(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, ask: Function) -> np.ndarray:
            x0 = estimate(i, x, output)
            if i == 0:
                return x0
            there = ahead(i, x, x0)
            x0_there = estimate(i - 1, there, ask(there, i - 1))
            return moved(i, x, first * slope(i, x, x0) + second[i] * slope(i - 1, there, x0_there))

        return trapezoid

    def of_outputs(i: int, x: np.ndarray, output: np.ndarray, z: np.ndarray, ask: Function) -> np.ndarray:
        x0 = estimate(i, x, output)
        return by_euler(i, x, estimate(i, x, (output + ask(by_ddim(i, x, x0), i - 1)) / 2)) if i else x0

    steps = {
        "the sum of both slopes, not their mean": step(1.0, 1.0),
        "the second slope alone, not the mean of both": step(0.0, 1.0),
        "the second call of a step is shown the state before it": step(ahead=nowhere),
        "the mean of both outputs, not of both slopes (E.22)": of_outputs,
    }
    if heun:
        steps["the second call of a step is shown where Euler's rule leads, not ddim"] = step(ahead=by_euler)
    else:
        sigma = np.tan(phi)
        steps["the second slope over the sigma of the first"] = step(
            second=np.append(0.0, sigma[:-1] / sigma[1:]) / 2
        )
    return steps
