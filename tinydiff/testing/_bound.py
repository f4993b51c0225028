"""Whether the terms of the bound are what they should be."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np

from tinydiff.backend import clip_to_unit, column_like, sum_samples
from tinydiff.bound import (
    Decoder,
    check_decoder,
    discretized_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
    step_term,
)
from tinydiff.diffusion import GaussianDiffusion, Variance, check_diffusion
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    asked_up_to,
    check_shape,
    laid_out,
    output_shape,
    times,
)
from tinydiff.testing._judge import Claim, moved_in_time
from tinydiff.testing._reverse import NU, log_variances

__all__ = ["assert_bound_terms", "by_tanh", "of_levels", "output_asked"]


def assert_bound_terms(
    bound_terms: Function,
    diffusion: GaussianDiffusion,
    *,
    decoder: Decoder = "density",
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``bound_terms(x0, x_t, t, output)`` are the bound's terms, at every t (docs: L.5, V.3).

    Each term is compared by itself: in a mean over t one wrong term would go unnoticed.

    Parameters
    ----------
    bound_terms : callable
        Takes x0 and x_t of `shape`, t (N,) and the network's output, and returns (N,), in nats: for each
        sample KL(q || p), of posterior and step, where t > 0, and the decoder's term where t = 0.
    diffusion : GaussianDiffusion
        Its ``prediction`` and ``variance`` say what the output is. With ``"fixed_large"`` the term at t = 0
        may have either of the variances that code uses there: beta_0, or that of ``"fixed_small"``.
    decoder : {"density", "8bit"}
        As in `tinydiff.bound.step_term`.
    axis : int
        As in `assert_p_mean_variance`.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    check_decoder(decoder)
    rng, batches = np.random.default_rng(0), []
    for t in times(asked_up_to(diffusion), shape[0], rng):
        levels = np.clip(rng.integers(-64, 320, shape), 0, 255)  # often the outer ones, whose formula differs
        x0 = 2 * levels / 255 - 1 if decoder == "8bit" else rng.uniform(-1, 1, shape)
        x_t = diffusion.q_sample(x0, t, rng.standard_normal(shape))
        batches.append((x0, x_t, t, output_asked(diffusion, x0, t, rng)))
    refusals = []
    for process in _conventions(diffusion):
        ours, mistakes = _ours_and_mistakes(process, decoder, shape)
        claim = Claim(
            "bound_terms",
            "x0, x_t, t, output",
            "L_{t-1}, and L_0 at t = 0 (docs: L.5, V.3)",
            ours,
            mistakes,
            rounding=1e-6 * math.prod(shape[1:]),  # of logarithms that cancel
            shown=lambda x0, x_t, t, output: (x0, x_t, t, laid_out(diffusion, axis, output)),
        )
        refusal = claim.refusal(bound_terms, batches, asarray, tolerance)
        if refusal is None:
            return
        refusals.append(refusal)
    # The message for what seems to be your convention: that with a named mistake, else the nearer one.
    _, message = min(refusals, key=lambda refusal: ("comes of this" not in refusal[1], refusal[0]))
    raise AssertionError(message)


def output_asked(
    diffusion: GaussianDiffusion, x0: np.ndarray, t: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """What a network may say of x_t, and of its variance, if that is learned."""
    C = x0.shape[-1]
    output = rng.uniform(-1, 1, output_shape(diffusion, x0.shape))
    output[..., C:] = rng.uniform(*NU, output[..., C:].shape)
    if diffusion.prediction == "x0":  # far from x0 P(level) is 0 at t = 0, except in our decoder
        near = x0 + math.sqrt(diffusion.schedule.one_minus_alphas_cumprod[0]) * output[..., :C]
        output[..., :C] = np.where(column_like(t, x0) == 0, near, output[..., :C])
    return output


def _conventions(diffusion: GaussianDiffusion) -> list[GaussianDiffusion]:
    """The process; with fixed_large also one with the small variance at t = 0, as in the papers' code."""
    if diffusion.variance != "fixed_large":
        return [diffusion]
    other = copy.copy(diffusion)
    small, large = diffusion.log_variance_range
    other.log_variance_range = small, np.append(small[:1], large[1:])
    return [diffusion, other]


def _ours_and_mistakes(
    diffusion: GaussianDiffusion, decoder: Decoder, shape: tuple[int, ...]
) -> tuple[Function, dict[str, Function]]:
    """The terms (N,) as functions of (x0, x_t, t, output): the right one, and wrong ones by name."""
    from scipy.special import ndtr

    learned, schedule, D = diffusion.variance == "learned_range", diffusion.schedule, math.prod(shape[1:])

    def of(variance: Variance) -> Function:
        process = GaussianDiffusion(schedule, diffusion.prediction, variance)
        return lambda x0, x_t, t, output: step_term(process, output, x0, x_t, t, decoder)[0]

    def ours(x0: np.ndarray, x_t: np.ndarray, t: np.ndarray, output: np.ndarray) -> np.ndarray:
        return step_term(diffusion, output, x0, x_t, t, decoder)[0]

    small_at_0 = diffusion.log_variance_range[0][0]
    likelihood = gaussian_nll if decoder == "density" else discretized_gaussian_nll

    def scaled(factor: float) -> Function:
        return lambda *given: factor * ours(*given)

    def built(
        log_variance: Function = diffusion.model_log_variance,
        divergence: Function = gaussian_kl,
        likelihood: Function = likelihood,
        estimate: Function = diffusion.predict_x0,
    ) -> Function:
        """The terms from their parts, one of which may be wrong."""

        def mistake(x0: np.ndarray, x_t: np.ndarray, t: np.ndarray, output: np.ndarray) -> np.ndarray:
            guess = estimate(x_t, t, output)
            posterior, _ = diffusion.q_posterior_mean_variance(x0, x_t, t)
            mean, _ = diffusion.q_posterior_mean_variance(guess, x_t, t)
            small, of_step = column_like(diffusion.log_variance_range[0][t], x0), log_variance(x_t, t, output)
            kl, _ = divergence(posterior, small, mean, of_step)
            nll, _ = likelihood(x0, guess, of_step)
            return sum_samples(np.where(column_like(t, x0) == 0, nll, kl))

        return mistake

    def levels(**how: Any) -> Function:
        """The terms, with the probability of a level."""
        return built(likelihood=partial(of_levels, Phi=ndtr, least=1e-300, **how))

    mistakes = {
        **moved_in_time(ours, schedule.T),
        "a mean over the numbers of a sample, not a sum": scaled(1 / D),
        "bits, not nats": scaled(1 / math.log(2)),
        "bits for each number, not nats": scaled(1 / D / math.log(2)),
        "the sign": scaled(-1.0),
        "half of each term": scaled(0.5),
        "twice each term": scaled(2.0),
        "T times each term": scaled(schedule.T),
        "T - 1 times each term": scaled(schedule.T - 1),
        "a divergence at t = 0, not a likelihood": built(
            likelihood=lambda x0, guess, log_p: gaussian_kl(x0, small_at_0, guess, log_p)
        ),
        "the divergence the other way round, KL(p || q)": built(
            divergence=lambda mean_q, log_q, mean_p, log_p: gaussian_kl(mean_p, log_p, mean_q, log_q)
        ),
        "the squares alone, of the divergence": built(
            divergence=lambda mean_q, log_q, mean_p, log_p: ((mean_q - mean_p) ** 2 / np.exp(log_p) / 2, None)
        ),
        "the estimate of x_0 is clipped": built(
            estimate=lambda *given: clip_to_unit(diffusion.predict_x0(*given))
        ),
        "the normal distribution by a tanh, at least 1e-12, which is what the papers' code takes": built(
            likelihood=partial(of_levels, Phi=by_tanh, least=1e-12)
        ),
        "a density times the width of a level, 2/255, for the level's probability": built(
            likelihood=lambda x0, *of: (gaussian_nll(x0, *of)[0] - math.log(2 / 255), None)
        ),
    }
    if decoder == "density":
        mistakes["the probability of a level, not a density; decoder='8bit' expects it"] = levels()
    else:
        mistakes |= {
            "a density, not the probability of a level; decoder='density' expects it": built(
                likelihood=gaussian_nll
            ),
            "1/256 on both sides of a level, not 1/255": levels(half=1 / 256),
            "1/127.5 on both sides of a level, not 1/255": levels(half=1 / 127.5),
            "levels 0 and 255 closed at the outer end, like the others": levels(closed=True),
        }
    if learned:
        mistakes |= {what: built(log_variance) for what, log_variance in log_variances(diffusion).items()}
    elif diffusion.variance == "fixed_large":
        mistakes["the variance is fixed_small, beta~_t"] = of("fixed_small")
    else:
        mistakes["the variance is fixed_large, beta_t"] = of("fixed_large")
    return ours, mistakes


def of_levels(
    x0: np.ndarray,
    mean: np.ndarray,
    log_variance: np.ndarray,
    Phi: Function,
    least: float,
    half: float = 1 / 255,
    closed: bool = False,
) -> tuple[np.ndarray, None]:
    """-log P of an 8-bit level, as in the code of Ho et al. 2020 and of Nichol & Dhariwal 2021."""
    high, low = (Phi((x0 + side - mean) / np.exp(log_variance / 2)) for side in (half, -half))
    edge = 2.0 if closed else 0.999
    P = np.where(x0 < -edge, high, np.where(x0 > edge, 1 - low, high - low))
    return -np.log(np.maximum(P, least)), None


def by_tanh(z: np.ndarray) -> np.ndarray:
    """The approximation of Phi in that code."""
    return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
