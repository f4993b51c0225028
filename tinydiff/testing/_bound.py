"""Whether the terms of the bound are what they should be."""

from __future__ import annotations

import math

import numpy as np

from tinydiff.backend import column_like, sum_samples
from tinydiff.bound import (
    Decoder,
    check_decoder,
    discretized_gaussian_nll,
    gaussian_kl,
    gaussian_nll,
    step_term,
)
from tinydiff.diffusion import GaussianDiffusion, Variance, check_diffusion
from tinydiff.testing._judge import SHAPE, Claim, Function, Given, check_shape, moved_in_time, times
from tinydiff.testing._reverse import log_variances

__all__ = ["assert_bound_terms"]


def assert_bound_terms(
    bound_terms: Function,
    diffusion: GaussianDiffusion,
    *,
    decoder: Decoder = "density",
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``bound_terms(x0, x_t, t, output)`` are the bound's terms, at every t (docs: L.5, V.3).

    Term by term, for in a mean over t one wrong term is lost.

    Parameters
    ----------
    bound_terms : callable
        Takes x0 and x_t of `shape`, t (N,) and the network's output, and returns (N,), in nats: of each
        sample the divergence of the step from the posterior where t > 0, what the decoder says where t = 0.
    diffusion : GaussianDiffusion
        Its ``prediction`` and ``variance`` say what the output is. With ``"fixed_large"`` any term will do at
        t = 0, where code differs in the variance that it takes.
    decoder : {"density", "8bit"}
        As in `tinydiff.bound.step_term`.
    shape, asarray, tolerance
        As in `assert_q_sample`. With the decoder ``"8bit"`` a term at t = 0 may be off by 0.01 nats for each
        number where code takes a tanh for the normal distribution.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape)
    check_decoder(decoder)
    learned, schedule, D = diffusion.variance == "learned_range", diffusion.schedule, math.prod(shape[1:])

    def of(variance: Variance = diffusion.variance) -> Function:
        process = GaussianDiffusion(schedule, diffusion.prediction, variance)

        def terms(x0: np.ndarray, x_t: np.ndarray, t: np.ndarray, output: np.ndarray) -> Given:
            value, _ = step_term(process, output, x0, x_t, t, decoder)
            return {"": np.where((t == 0) & (diffusion.variance == "fixed_large"), np.nan, value)}

        return terms

    ours = of()
    likelihood = gaussian_nll if decoder == "density" else discretized_gaussian_nll

    def scaled(factor: float) -> Function:
        return lambda *given: {"": factor * ours(*given)[""]}

    def built(
        log_variance: Function = diffusion.model_log_variance,
        turned: bool = False,
        divergence_at_0: bool = False,
    ) -> Function:
        """The terms from divergences and likelihoods, with another variance, or with one of them wrong."""

        def mistake(x0: np.ndarray, x_t: np.ndarray, t: np.ndarray, output: np.ndarray) -> Given:
            guess = diffusion.predict_x0(x_t, t, output)
            posterior, _ = diffusion.q_posterior_mean_variance(x0, x_t, t)
            mean, _ = diffusion.q_posterior_mean_variance(guess, x_t, t)
            q, p = (
                (posterior, column_like(diffusion.log_variance_range[0][t], x0)),
                (mean, log_variance(x_t, t, output)),
            )
            kl, _ = gaussian_kl(*p, *q) if turned else gaussian_kl(*q, *p)
            at_0 = kl if divergence_at_0 else likelihood(x0, guess, p[1])[0]
            return {"": sum_samples(np.where(column_like(t, x0) == 0, at_0, kl))}

        return mistake

    mistakes = {
        **moved_in_time(ours, schedule.T),
        "a mean over the numbers of a sample, not a sum": scaled(1 / D),
        "bits, not nats": scaled(1 / math.log(2)),
        "bits for each number, not nats": scaled(1 / D / math.log(2)),
        "half of each term": scaled(0.5),
        "twice each term": scaled(2.0),
        "T times each term": scaled(schedule.T),
        "a divergence at t = 0, not a likelihood": built(divergence_at_0=True),
        "the divergence of the posterior from the step, p || q": built(turned=True),
        **{
            what: built(log_variance)
            for what, log_variance in (log_variances(diffusion) if learned else {}).items()
        },
    }
    if not learned:
        mistakes["the variance is fixed_small, beta~_t"] = of("fixed_small")
        mistakes["the variance is fixed_large, beta_t"] = of("fixed_large")
    rng = np.random.default_rng(0)
    T = int(np.count_nonzero(schedule.alphas_cumprod)) if diffusion.prediction == "eps" else schedule.T
    batches = []
    for t in times(T, shape[0], rng):
        x0 = 2 * rng.integers(0, 256, shape) / 255 - 1 if decoder == "8bit" else rng.uniform(-1, 1, shape)
        x_t = diffusion.q_sample(x0, t, rng.standard_normal(shape))
        output = rng.uniform(-1, 1, (*shape[:-1], (1 + learned) * shape[-1]))
        batches.append((x0, x_t, t, output))
    claim = Claim("bound_terms", "L_{t-1}, and L_0 at t = 0 (docs: L.5, V.3)", ours, mistakes)
    claim.judge(bound_terms, batches, asarray, tolerance)
