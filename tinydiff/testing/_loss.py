"""Whether a loss is L_simple: what it shows the network, what it holds the answer against, how it adds up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff._checks import check_number
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.losses import min_snr_weight
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    called,
    check_shape,
    check_tolerance,
    laid_out,
    on_host,
    times,
)
from tinydiff.testing._judge import Claim, distance, linear, moved_in_time

__all__ = ["assert_loss"]

SIGNATURE = "network, x0, t, noise"


def assert_loss(
    loss: Function,
    diffusion: GaussianDiffusion,
    *,
    min_snr_gamma: float | None = None,
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``loss(network, x0, t, noise)`` is L_simple, at every t (docs: L.9, L.10).

    Parameters
    ----------
    loss : callable
        Takes ``network(x_t, t)``, x0 and noise of `shape` and t (N,), 0 … T-1. Returns the squared error's
        mean over the numbers of each sample, (N,), or the mean of these, one number. The network is to be
        shown x_t and t; further arguments of it are ignored.
    diffusion : GaussianDiffusion
        Its ``prediction`` says what the answer is held against. Of the half of the answer that is a learned
        variance L_simple says nothing.
    min_snr_gamma : float, optional
        Each sample counts `tinydiff.losses.min_snr_weight` with this gamma. Default: 1.
    axis : int
        As in `assert_p_mean_variance`.
    shape, asarray, tolerance
        As in `assert_q_sample`. One number for a batch is off at all t of the batch.

    Raises
    ------
    AssertionError
        As in `assert_q_sample`; and if the network is not asked, or is shown something else.
    TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    check_tolerance(tolerance)
    if min_snr_gamma is not None:
        check_number("min_snr_gamma", min_snr_gamma, lambda gamma: 0 < gamma < np.inf, "a positive number")

    def shown(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> tuple[Any, ...]:
        return x0, t, noise, laid_out(diffusion, axis, output)

    batches = _batches(diffusion, shape)
    yours = _of_arrays(loss, diffusion, tolerance)
    first = called(yours, f"loss({SIGNATURE})", *(asarray(x.copy()) for x in shown(*batches[0])))
    one_number = first.size == 1

    def reduced(per_sample: Function) -> Function:
        return (lambda *given: np.full(shape[0], np.mean(per_sample(*given)))) if one_number else per_sample

    ours, mistakes = _ours_and_mistakes(diffusion, min_snr_gamma, shape)
    mistakes = {what: reduced(mistake) for what, mistake in mistakes.items()}
    if one_number and shape[0] > 1:
        mistakes["a sum over the batch, not a mean"] = lambda *given: shape[0] * reduced(ours)(*given)
        mistakes["a sum over all numbers of the batch, not a mean"] = lambda *given: (
            math.prod(shape) * reduced(ours)(*given)
        )
    weighed = "" if min_snr_gamma is None else ", weighed (docs: L.10)"
    expected = f"the mean of |{diffusion.prediction} - output|^2 (docs: L.9){weighed}"
    claim = Claim("loss", SIGNATURE, expected, reduced(ours), mistakes, shown=shown)
    claim.judge(
        lambda *given: np.full(shape[0], yours(*given).item()) if one_number else yours(*given),
        batches,
        asarray,
        tolerance,
    )


def _of_arrays(loss: Function, diffusion: GaussianDiffusion, tolerance: float) -> Function:
    """Of (x0, t, noise, output): what loss makes of a network with this output, if it shows it the right."""

    def yours(x0: Any, t: Any, noise: Any, output: Any) -> np.ndarray:
        right_t = on_host("t", t)
        x_t = diffusion.q_sample(on_host("x0", x0), right_t, on_host("noise", noise))
        asked = []

        def network(x: Any, t: Any, *_: Any, **__: Any) -> Any:
            asked.append(t)
            x, t = (
                on_host("the x that the network is shown", x),
                on_host("the t that the network is shown", t),
            )
            _check_shown(x, x_t, right_t, tolerance)
            if t.shape != right_t.shape or np.any(t != right_t):
                raise AssertionError(f"the network is shown t = {t}; expected {right_t} (E.13).")
            return output

        value = on_host("loss", loss(network, x0, t, noise))
        if not asked:
            raise AssertionError("loss does not ask the network.")
        return value

    return yours


def _check_shown(x: np.ndarray, x_t: np.ndarray, t: np.ndarray, tolerance: float) -> None:
    if x.shape != x_t.shape:
        raise AssertionError(f"the network is shown x of shape {x.shape}; expected {x_t.shape}.")
    off = distance(x, x_t, x_t)
    if np.max(off) > tolerance:
        raise AssertionError(
            f"the network is shown an x_t that is off by {np.max(off):.3g} of its largest number at "
            f"t = {t[np.argmax(off)]}: assert_q_sample says more."
        )


def _ours_and_mistakes(
    diffusion: GaussianDiffusion, gamma: float | None, shape: tuple[int, ...]
) -> tuple[Function, dict[str, Function]]:
    """Of (x0, t, noise, output), a number for each sample: what is right, and by its name what is not."""
    schedule, C, axes = diffusion.schedule, shape[-1], tuple(range(1, len(shape)))
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    snr, every, one = schedule.snr, np.arange(schedule.T), np.ones(schedule.T)

    def weights_of(prediction: str) -> np.ndarray:
        return min_snr_weight(GaussianDiffusion(schedule, prediction), every, gamma)  # type: ignore[arg-type]

    right = one if gamma is None else weights_of(diffusion.prediction)

    def mean(numbers: np.ndarray) -> np.ndarray:
        return np.mean(numbers, axis=axes)

    def built(
        weights: np.ndarray = right,
        target: Function = diffusion.training_target,
        size: Function = np.square,
        reduce: Function = mean,
    ) -> Function:
        """The loss from its parts, one of which may be wrong."""
        return lambda x0, t, noise, output: weights[t] * reduce(size(output[..., :C] - target(x0, t, noise)))

    ours = built()
    mistakes = {
        **moved_in_time(ours, schedule.T),
        "the target is eps": built(target=lambda x0, t, noise: noise),
        "the target is x_0": built(target=lambda x0, t, noise: x0),
        "the target is v": built(target=linear(-s, a)),
        "the target is -v, which is another convention, EDM's": built(target=linear(s, -a)),
        "the target is x_t": built(target=linear(a, s)),
        "a sum over the numbers of a sample, as Ho et al. write it, not a mean": built(
            reduce=lambda numbers: np.sum(numbers, axis=axes)
        ),
        "half of it": built(weights=right / 2),
        "the root of it": lambda *given: np.sqrt(ours(*given)),
        "the absolute difference, not its square": built(size=np.abs),
        "Huber's loss, half the square up to 1 and then linear": built(
            size=lambda d: np.where(np.abs(d) < 1, d * d / 2, np.abs(d) - 0.5)
        ),
    }
    if gamma is None:
        return ours, mistakes

    def by(snr: np.ndarray = snr, cap: Function = np.minimum) -> np.ndarray:
        """The weights from their parts."""
        return {"x0": cap(snr, gamma), "eps": cap(snr, gamma) / snr, "v": cap(snr, gamma) / (snr + 1)}[
            diffusion.prediction
        ]

    with np.errstate(divide="ignore", invalid="ignore"):
        mistakes |= {
            "no weights": built(one),
            "the weights of an error of x_0": built(weights_of("x0")),
            "the weights of an error of eps (E.19)": built(weights_of("eps")),
            "the weights of an error of eps, and 1 more (E.19)": built(weights_of("eps") + 1),
            "min(snr + 1, gamma) / (snr + 1) (E.19)": built(np.minimum(snr + 1, gamma) / (snr + 1)),
            "the weights of an error of v": built(weights_of("v")),
            "the larger of snr and gamma, not the smaller (E.19)": built(by(cap=np.maximum)),
            "snr as it is, not at most gamma": built(by(cap=lambda snr, gamma: snr)),
            "the root of snr, a ratio of rates": built(by(snr=np.sqrt(snr))),
            "1 / snr for snr": built(by(snr=1 / snr)),
            "the mean of the batch, times the weights": lambda x0, t, noise, output: (
                right[t] * np.mean(built(one)(x0, t, noise, output))
            ),
        }
    if shape[0] == shape[-1]:
        mistakes["weights (N,) that spread along the last axis"] = lambda x0, t, noise, output: mean(
            right[t] * (output[..., :C] - diffusion.training_target(x0, t, noise)) ** 2
        )
    return ours, mistakes


def _batches(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> list[tuple[np.ndarray, ...]]:
    """x0, t, noise and the network's output, at all of 0 … T-1."""
    rng = np.random.default_rng(0)
    wide = (*shape[:-1], (2 if diffusion.variance == "learned_range" else 1) * shape[-1])
    return [
        (rng.uniform(-1, 1, shape), t, rng.standard_normal(shape), rng.standard_normal(wide))
        for t in times(diffusion.T, shape[0], rng)
    ]
