"""Whether one step back is what it should be: the posterior, and the network's step."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.backend import clip_to_unit, column_like
from tinydiff.diffusion import GaussianDiffusion, Prediction, Variance, check_diffusion
from tinydiff.schedules import NoiseSchedule
from tinydiff.testing._asked import SHAPE, Function, asked_up_to, check_shape, laid_out, other_sign, times
from tinydiff.testing._forward import TAKEN_TO_DATA
from tinydiff.testing._judge import Claim, linear, moved_in_time

__all__ = ["NU", "assert_p_mean_variance", "assert_q_posterior", "log_variances", "means"]

# The nu that a learned variance is asked for: from one end to beyond the other, as nu is not to be clipped;
# below the lower end an interpolation outside the logarithm (E.12) would give no variance.
NU = -1.0, 1.2


def assert_q_posterior(
    q_posterior: Function,
    schedule: NoiseSchedule,
    *,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``q_posterior(x0, x_t, t)`` is mean and variance of q(x_{t-1} | x_t, x_0) (docs: P.1).

    Parameters
    ----------
    q_posterior : callable
        Takes x0 and x_t of `shape` and t (N,), and returns the mean and the variance, the latter as
        (N,), (N, 1, ..., 1) or of `shape`. At t = 0, where no noise is added, any variance will do. The x0
        that it is given leaves [-1, 1], as a network's estimate does.
    schedule : NoiseSchedule
        The chain's. For fewer steps, that of those steps: ``schedule.respace(timesteps)``.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.

    Notes
    -----
    With tables in float32 a right answer is off by up to 2e-4 at the first steps, more than the smallest of
    the known mistakes: compare in float64.
    """
    check_shape(shape)
    ours = GaussianDiffusion(schedule).q_posterior_mean_variance
    alpha, beta, abar = schedule.alphas, schedule.betas, schedule.alphas_cumprod
    before, rest = schedule.alphas_cumprod_prev, schedule.one_minus_alphas_cumprod

    def weighted(of_x0: Any, of_x_t: Any, variance: Any) -> Function:
        mean = linear(of_x0, of_x_t)
        return lambda x0, x_t, t: (mean(x0, t, x_t), column_like(variance[t], x0))

    def with_previous(prev: Any) -> Function:
        return weighted(
            np.sqrt(prev) * beta / rest, np.sqrt(alpha) * (1 - prev) / rest, beta * (1 - prev) / rest
        )

    of_x0, of_x_t = np.sqrt(before) * beta / rest, np.sqrt(alpha) * (1 - before) / rest
    small = schedule.posterior_variance
    with np.errstate(divide="ignore", invalid="ignore"):
        mistakes = {
            **moved_in_time(ours, schedule.T),
            "abar_{t-1} rolled, so that it begins with abar_T (E.7)": with_previous(np.roll(abar, 1)),
            "abar_{t-1} padded with 0, not 1 (E.7)": with_previous(np.append(0.0, abar[:-1])),
            "abar_{t-1} padded with abar_0, not 1 (E.7)": with_previous(np.append(abar[:1], abar[:-1])),
            "abar_t in the place of abar_{t-1} (E.7)": with_previous(abar),
            "sqrt(abar_t) for sqrt(abar_{t-1}) in front of x_0": weighted(
                np.sqrt(abar) * beta / rest, of_x_t, small
            ),
            "abar_{t-1} in front of x_0, without its root": weighted(before * beta / rest, of_x_t, small),
            "alpha_t in front of x_t, without its root": weighted(of_x0, alpha * (1 - before) / rest, small),
            "sqrt(abar_t) for sqrt(alpha_t) in front of x_t": weighted(
                of_x0, np.sqrt(abar) * (1 - before) / rest, small
            ),
            "the two weights, or the arguments x0 and x_t, exchanged": weighted(of_x_t, of_x0, small),
            "x_t subtracted": weighted(of_x0, -of_x_t, small),
            "1 - abar_{t-1} divides, not 1 - abar_t": weighted(
                of_x0 * rest / (1 - before), of_x_t * rest / (1 - before), small * rest / (1 - before)
            ),
            "the variance is beta_t": weighted(of_x0, of_x_t, beta),
            "the variance is a standard deviation (E.10)": weighted(of_x0, of_x_t, np.sqrt(small)),
            "the variance is its logarithm": weighted(of_x0, of_x_t, np.log(small)),
            "the mean is x_0": weighted(np.ones_like(beta), 0 * beta, small),
            "the mean is that of x_t given x_0": weighted(np.sqrt(abar), 0 * beta, small),
            "x_0 is clipped": lambda x0, x_t, t: ours(clip_to_unit(x0), x_t, t),
        }
    rng = np.random.default_rng(0)
    batches = [
        (rng.standard_normal(shape), rng.standard_normal(shape), t) for t in times(schedule.T, shape[0], rng)
    ]
    expected = "mu~_t and beta~_t (docs: P.1)"
    claim = Claim("q_posterior", "x0, x_t, t", expected, ours, mistakes, ("mean", "variance"), ("variance",))
    claim.judge(q_posterior, batches, asarray, tolerance)


def assert_p_mean_variance(
    p_mean_variance: Function,
    diffusion: GaussianDiffusion,
    *,
    clip: bool = False,
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``p_mean_variance(x_t, t, output)`` is the step back, mean and variance (docs: P.5, V.1).

    Parameters
    ----------
    p_mean_variance : callable
        Takes x_t of `shape`, t (N,) and the network's output, and returns the mean and the variance of
        p(x_{t-1} | x_t), as `assert_q_posterior` has it. With a learned variance the output is the
        prediction, then nu, which is not to be clipped: it goes from -1 to 1.2.
    diffusion : GaussianDiffusion
        Its ``prediction`` and ``variance`` say what the output is, and which variance to take.
    clip : bool
        Whether the estimate of x0 is to be clipped to [-1, 1].
    axis : int
        The axis on which your output has the two halves of a learned variance: 1 for (N, C, H, W).
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    schedule, learned = diffusion.schedule, diffusion.variance == "learned_range"

    def step(
        prediction: Prediction = diffusion.prediction,
        variance: Variance = diffusion.variance,
        clip: bool = clip,
    ) -> Function:
        process = GaussianDiffusion(schedule, prediction, variance)
        return lambda x_t, t, output: process.p_mean_variance(x_t, t, output, clip=clip)

    ours = step()

    def with_variance(of: Function) -> Function:
        def mistake(*given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mean, variance = ours(*given)
            return mean, of(variance)

        return mistake

    def with_log_variance(of: Function) -> Function:
        return lambda *given: (ours(*given)[0], np.exp(of(*given)))

    def with_mean(of: Function) -> Function:
        return lambda *given: (of(*given), ours(*given)[1])

    mistakes = {
        **moved_in_time(ours, schedule.T),
        "the estimate of x_0 is clipped": step(clip=True),
        "the estimate of x_0 is not clipped": step(clip=False),
        "the output is taken for x_0": step("x0"),
        "the output is taken for v": step("v"),
        "the output is taken for the flow, eps - x_0": step("flow"),
        TAKEN_TO_DATA: lambda x_t, t, output: step("flow")(x_t, t, other_sign(x_t, output)),
        "the variance is a standard deviation (E.10)": with_variance(np.sqrt),
        "the variance is its logarithm": with_variance(np.log),
        **{what: with_mean(of) for what, of in means(diffusion).items()},
    }
    if schedule.alphas_cumprod[-1] > 0:
        mistakes["the output is taken for eps"] = step("eps")
    if learned:
        mistakes |= {what: with_log_variance(of) for what, of in log_variances(diffusion).items()}
        mistakes["nu comes first, the prediction after it"] = lambda x_t, t, output: ours(
            x_t, t, np.roll(output, x_t.shape[-1], axis=-1)
        )
    else:
        mistakes["the variance is fixed_small, beta~_t"] = step(variance="fixed_small")
        mistakes["the variance is fixed_large, beta_t"] = step(variance="fixed_large")
    rng = np.random.default_rng(0)
    batches = []
    for t in times(asked_up_to(diffusion), shape[0], rng):
        nu = [rng.uniform(*NU, shape)] if learned else []
        batches.append((rng.standard_normal(shape), t, np.concat([rng.standard_normal(shape), *nu], axis=-1)))
    claim = Claim(
        "p_mean_variance",
        "x_t, t, output",
        f"mu~_t of the {'clipped ' * bool(clip)}estimate of x_0, variance {diffusion.variance} "
        "(docs: P.5, V.1)",
        ours,
        mistakes,
        ("mean", "variance"),
        free_at_0=("variance",),
        shown=lambda x_t, t, output: (x_t, t, laid_out(diffusion, axis, output)),
    )
    claim.judge(p_mean_variance, batches, asarray, tolerance)


def means(diffusion: GaussianDiffusion) -> dict[str, Function]:
    """Mistaken means of the step back (Ho et al. 2020, eq. 11): functions of (x_t, t, output)."""
    schedule = diffusion.schedule
    alpha, beta, abar = schedule.alphas, schedule.betas, schedule.alphas_cumprod
    rest = schedule.one_minus_alphas_cumprod

    def eq_11(front: Any, of_eps: Any) -> Function:
        mean = linear(front, -front * of_eps)
        return lambda x_t, t, output: mean(x_t, t, diffusion.predict_eps(x_t, t, output))

    with np.errstate(divide="ignore", invalid="ignore"):
        front, of_eps = 1 / np.sqrt(alpha), beta / np.sqrt(rest)
        return {
            "beta_t in front of eps, not beta_t / sqrt(1 - abar_t) (E.11)": eq_11(front, beta),
            "sqrt(1 - abar_t) in front of eps, not beta_t over it (E.11)": eq_11(front, np.sqrt(rest)),
            "beta_t / (1 - abar_t) in front of eps, without the root": eq_11(front, beta / rest),
            "sqrt(beta_t / (1 - abar_t)) in front of eps": eq_11(front, np.sqrt(beta / rest)),
            "eps added": eq_11(front, -of_eps),
            "1 / alpha_t in front, without the root": eq_11(1 / alpha, of_eps),
            "1 / sqrt(abar_t) in front, not 1 / sqrt(alpha_t)": eq_11(1 / np.sqrt(abar), of_eps),
            "sqrt(alpha_t) in front, not 1 over it": eq_11(np.sqrt(alpha), of_eps),
            "nothing divides by sqrt(alpha_t)": eq_11(np.ones_like(alpha), of_eps),
            "sqrt(alpha_t) divides x_t alone": eq_11(front, of_eps * np.sqrt(alpha)),
            "the mean is x_0": diffusion.predict_x0,
            "the mean is the clipped x_0": lambda *given: clip_to_unit(diffusion.predict_x0(*given)),
        }


def log_variances(diffusion: GaussianDiffusion) -> dict[str, Function]:
    """Mistaken logarithms of a learned variance: functions of (x_t, t, output)."""

    def nu(output: np.ndarray) -> np.ndarray:
        return output[..., output.shape[-1] // 2 :]

    def between(f: Function, outside: bool = False) -> Function:
        def log_variance(x_t: np.ndarray, t: np.ndarray, output: np.ndarray) -> np.ndarray:
            small, large = (column_like(table[t], x_t) for table in diffusion.log_variance_range)
            weight = f(nu(output))
            if outside:
                return np.log(weight * np.exp(large) + (1 - weight) * np.exp(small))
            return weight * large + (1 - weight) * small

        return log_variance

    return {
        "the variance interpolated outside the logarithm (E.12)": between(
            lambda nu: (nu + 1) / 2, outside=True
        ),
        "nu taken for the fraction (nu + 1) / 2": between(lambda nu: nu),
        "nu clipped to [0, 1] for the fraction": between(lambda nu: np.clip(nu, 0, 1)),
        "nu clipped to [-1, 1]": between(lambda nu: (np.clip(nu, -1, 1) + 1) / 2),
        "a sigmoid of nu for the fraction": between(lambda nu: 1 / (1 + np.exp(-nu))),
        "nu from beta_t at -1 to beta~_t at 1": between(lambda nu: (1 - nu) / 2),
        "nu taken for the variance's logarithm": lambda x_t, t, output: nu(output),
    }
