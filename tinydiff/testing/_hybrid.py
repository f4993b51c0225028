"""Whether the hybrid loss teaches what it should: a stopped gradient leaves no trace in the loss's value."""

from __future__ import annotations

import math

import numpy as np

from tinydiff._checks import check_number
from tinydiff.backend import clip_to_unit, column_like
from tinydiff.bound import Decoder
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.losses import simple_loss, vlb_loss
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    asked_up_to,
    check_shape,
    laid_out,
    times,
)
from tinydiff.testing._bound import by_tanh, of_levels, output_asked
from tinydiff.testing._judge import Claim

__all__ = ["assert_hybrid_gradient"]


def assert_hybrid_gradient(
    gradient: Function,
    diffusion: GaussianDiffusion,
    *,
    vlb_weight: float = 1e-3,
    decoder: Decoder = "density",
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``gradient(x0, t, noise, output)`` is what L_hybrid teaches, at every t (docs: V.5).

    Parameters
    ----------
    gradient : callable
        Takes x0 and noise of `shape`, t (N,), 0 … T-1, and the network's output, and returns the gradient of
        your loss, the mean over the batch, by that output.
    diffusion : GaussianDiffusion
        Its variance is ``"learned_range"``; its ``prediction`` says what the first half of the output is.
    vlb_weight : float
        lambda, positive: what L_vlb, a sum over t in bits per dimension, counts.
    decoder : {"density", "8bit"}
        As in `tinydiff.losses.vlb_loss`.
    axis : int
        As in `assert_p_mean_variance`.
    shape, asarray, tolerance
        As in `assert_q_sample`. What passes is relative to the largest number of a sample's gradient. That by
        nu falls along the chain, of the linear schedule to less than 1e-5 of it beyond the middle: whatever
        nu learns there passes, and float32 has no digits of it. In float32 give 1e-3, if the tables were made
        in float64; of tables made in float32 nothing is left at t = 0 (E.6).

    Raises
    ------
    AssertionError
        As in `assert_q_sample`.
    TypeError, ValueError
        As in `assert_q_sample`; ValueError also if the variance is not learned.
    """
    check_diffusion(diffusion)
    if diffusion.variance != "learned_range":
        raise ValueError(f"diffusion has variance {diffusion.variance!r}; expected 'learned_range'.")
    check_shape(shape, axis)
    check_number("vlb_weight", vlb_weight, lambda weight: 0 < weight < math.inf, "a positive number")
    rng, batches = np.random.default_rng(0), []
    for t in times(asked_up_to(diffusion), shape[0], rng):
        x0 = 2 * rng.integers(0, 256, shape) / 255 - 1
        output = output_asked(diffusion, x0, t, rng)
        batches.append((x0, t, rng.standard_normal(shape), output))
    ours, mistakes = _ours_and_mistakes(diffusion, float(vlb_weight), decoder, shape)

    def on_axis(gradient: Function) -> Function:
        return lambda *given: laid_out(diffusion, axis, gradient(*given))

    claim = Claim(
        "gradient",
        "x0, t, noise, output",
        "that of L_simple by the prediction, and of lambda L_vlb by nu (docs: V.5)",
        on_axis(ours),
        {what: on_axis(mistake) for what, mistake in mistakes.items()},
        shown=lambda x0, t, noise, output: (x0, t, noise, laid_out(diffusion, axis, output)),
    )
    claim.judge(gradient, batches, asarray, tolerance)


def _ours_and_mistakes(
    diffusion: GaussianDiffusion, vlb_weight: float, decoder: Decoder, shape: tuple[int, ...]
) -> tuple[Function, dict[str, Function]]:
    """The gradient as functions of (x0, t, noise, output): the right one, and wrong ones by name."""
    N, C, T, D = shape[0], shape[-1], diffusion.T, math.prod(shape[1:])

    def built(
        vlb_weight: float = vlb_weight,
        simple: float = 1.0,
        mean: Function = np.zeros_like,
        nu: float = 1.0,
        whole: float = 1.0,
    ) -> Function:
        """From its parts: what L_simple counts, and where the mean and nu learn from L_vlb."""

        def gradient(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> np.ndarray:
            of_simple = simple_loss(diffusion, output, x0, t, noise)[1]
            of_vlb = vlb_weight * vlb_loss(diffusion, output, x0, t, noise, decoder=decoder)[1]
            prediction = simple * of_simple + column_like(mean(t), output) * of_vlb
            return whole * np.concat([prediction[..., :C], nu * of_vlb[..., C:]], axis=-1)

        return gradient

    def with_tanh(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> np.ndarray:
        """At t = 0 the derivative by nu of the decoder of the papers' code, by central differences."""
        x_t = diffusion.q_sample(x0, t, noise)
        guess = diffusion.predict_x0(x_t, t, output)
        step = np.concat([np.zeros(x0.shape), np.full(x0.shape, 1e-6)], axis=-1)
        up, down = (
            of_levels(x0, guess, diffusion.model_log_variance(x_t, t, output + side), by_tanh, 1e-12)[0]
            for side in (step, -step)
        )
        at_0 = vlb_weight * T / (N * D * math.log(2)) * (up - down) / 2e-6
        prediction, nu = np.split(ours(x0, t, noise, output), 2, axis=-1)
        return np.concat([prediction, np.where(column_like(t, x0) == 0, at_0, nu)], axis=-1)

    def of_nu(
        told: Function = lambda nu: nu, slope: float = 1.0, estimate: Function = lambda x0: x0
    ) -> Function:
        """Of another nu, or of another estimate of x_0, in L_vlb; the prediction learns what it should."""
        of_x0 = GaussianDiffusion(diffusion.schedule, "x0", "learned_range")

        def gradient(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> np.ndarray:
            guess = estimate(diffusion.predict_x0(diffusion.q_sample(x0, t, noise), t, output))
            output_of_x0 = np.concat([guess, told(output[..., C:])], axis=-1)
            of_vlb = vlb_loss(of_x0, output_of_x0, x0, t, noise, decoder=decoder)[1]
            prediction = simple_loss(diffusion, output, x0, t, noise)[1][..., :C]
            return np.concat([prediction, slope * vlb_weight * of_vlb[..., C:]], axis=-1)

        return gradient

    def exchanged(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> np.ndarray:
        return np.roll(ours(x0, t, noise, np.roll(output, C, axis=-1)), C, axis=-1)

    ours = built()
    return ours, {
        "nu, from -1 to 1, is taken for f, from 0 to 1": of_nu(lambda nu: 2 * nu - 1, 2.0),
        "the ends of nu's range are exchanged: beta~ at 1, beta at -1": of_nu(lambda nu: -nu, -1.0),
        "the estimate of x_0 is clipped in L_vlb": of_nu(estimate=clip_to_unit),
        "the two halves of the output are exchanged": exchanged,
        "the mean learns from L_vlb too: its gradient is not stopped (E.31)": built(mean=np.ones_like),
        "at t = 0 the mean learns from L_vlb too: its gradient is stopped only beyond (E.31)": built(
            mean=lambda t: t == 0
        ),
        "nu learns nothing: its gradient is stopped as well, or L_vlb is left out": built(nu=0.0),
        "the mean learns from L_vlb, and nu does not: the other half is stopped (E.31)": built(
            mean=np.ones_like, nu=0.0
        ),
        "the prediction learns nothing: L_simple is left out": built(simple=0.0),
        "L_vlb alone, in both halves": built(simple=0.0, mean=np.ones_like),
        "lambda is 1": built(1.0),
        "lambda counts one term, not the sum over T, as in LearnedGaussianDiffusion": built(vlb_weight / T),
        "L_vlb is in nats for each number, not in bits": built(vlb_weight * math.log(2)),
        "L_vlb is in bits for a sample, not for each number": built(vlb_weight * D),
        "L_vlb is in nats for a sample, and lambda counts one term": built(vlb_weight * D * math.log(2) / T),
        "the normal distribution by a tanh, at least 1e-12, which is what the papers' code takes": with_tanh,
        "a sum over the batch, not a mean": built(whole=N),
        "a sum over all numbers of the batch, not a mean": built(whole=N * D),
        "minus the gradient": built(whole=-1.0),
    }
