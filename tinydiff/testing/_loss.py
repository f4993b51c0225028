"""Whether a loss is L_simple: what it shows the network, what it compares the answer with, how it adds up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff._checks import check_number
from tinydiff.diffusion import GaussianDiffusion, Prediction, check_diffusion
from tinydiff.losses import min_snr_weight
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    answering,
    called,
    check_shape,
    check_tolerance,
    in_bfloat16,
    laid_out,
    on_host,
    output_shape,
    times,
    whole,
)
from tinydiff.testing._forward import TO_DATA
from tinydiff.testing._judge import Claim, distance, linear, moved_in_time

__all__ = ["assert_loss"]

SIGNATURE = "network, x0, t, noise"
OF_LAST = "a sum over the last axis, not a mean"


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
        mean over the numbers of each sample, (N,), or the mean of these, one number. The network is a
        function of x_t and t, or ``timestep``, and returns an array (a tuple of one, with
        ``return_dict=False``); further arguments are ignored.
    diffusion : GaussianDiffusion
        Its ``prediction`` says what the answer is compared with. L_simple leaves out the half of the answer
        that is a learned variance.
    min_snr_gamma : float, optional
        Each sample is weighed by `tinydiff.losses.min_snr_weight` with this gamma. Default: by 1.
    axis : int
        As in `assert_p_mean_variance`.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError
        As in `assert_q_sample`; and if the network is not asked, or is shown something other than x_t and t.
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

    rng = np.random.default_rng(0)
    mixed = _batches(diffusion, shape, times(diffusion.T, shape[0], rng), rng)
    yours = _of_arrays(loss, diffusion, asarray, tolerance)
    first = called(yours, f"loss({SIGNATURE})", *(asarray(x.copy()) for x in shown(*mixed[0])))
    ours, mistakes = _ours_and_mistakes(diffusion, min_snr_gamma, shape)
    weighed = "" if min_snr_gamma is None else ", weighed (docs: L.10)"
    expected = (
        f"the mean of |{diffusion.prediction} - output|^2 (docs: L.9){weighed}; assert_training_target asks "
        "for the target alone"
    )
    if first.size > 1 or shape[0] == 1:
        claim = Claim("loss", SIGNATURE, expected, ours, mistakes, shown=shown)
        claim.judge(lambda *given: np.atleast_1d(yours(*given)), mixed, asarray, tolerance)
        return

    def to_one(per_sample: Function, end: Function = np.mean) -> Function:
        return lambda *given: np.full(shape[0], end(per_sample(*given)))

    # In a mean over many t what counts little is lost: so first one t in each batch, then mixed ones, which
    # show numbers (N,) that were not made a column.
    alike = _batches(diffusion, shape, np.repeat(np.arange(diffusion.T)[:, None], shape[0], axis=1), rng)
    of_batch = "a sum over the batch, not a mean"
    if shape[0] == shape[-1]:  # the same factor
        of_batch = "a sum over the batch or over the last axis, not a mean"
        del mistakes[OF_LAST]
    mistakes = {what: to_one(mistake) for what, mistake in mistakes.items()} | {
        "the root of the batch's mean": to_one(ours, lambda numbers: np.sqrt(np.mean(numbers))),
        of_batch: to_one(ours, np.sum),
        "a sum over all numbers of the batch, not a mean": to_one(
            ours, lambda numbers: math.prod(shape[1:]) * np.sum(numbers)
        ),
    }
    claim = Claim("loss", SIGNATURE, expected, to_one(ours), mistakes, shown=shown)
    claim.judge(lambda *given: np.full(shape[0], yours(*given).item()), alike, asarray, tolerance, mixed)


def _of_arrays(loss: Function, diffusion: GaussianDiffusion, asarray: Function, tolerance: float) -> Function:
    """A function of (x0, t, noise, output): the loss of a network that returns `output`.

    The network raises an AssertionError if it is not shown x_t and t.
    """

    def yours(x0: Any, t: Any, noise: Any, output: Any) -> np.ndarray:
        right_t, answer, asked = on_host("t", t), on_host("output", output), []
        x_t = diffusion.q_sample(on_host("x0", x0), right_t, on_host("noise", noise))

        def network(x: Any, t: Any) -> Any:
            asked.append(t)
            _check_x(on_host("the x that the network is shown", x), x_t, right_t, tolerance)
            _check_t(on_host("the t that the network is shown", t), right_t, diffusion.T)
            return asarray(answer.copy())

        value = on_host("loss", loss(answering(network), x0, t, noise))
        if not asked:
            raise AssertionError("loss does not ask the network.")
        return value

    return yours


def _check_x(x: np.ndarray, x_t: np.ndarray, t: np.ndarray, tolerance: float) -> None:
    if x.shape != x_t.shape:
        raise AssertionError(f"the network is shown x of shape {x.shape}; expected {x_t.shape}.")
    off = distance(x, x_t, x_t)
    if np.max(off) > tolerance:
        raise AssertionError(
            f"the network is shown an x_t that is off by {np.max(off):.3g} of its largest number at "
            f"t = {t[np.argmax(off)]}: assert_q_sample says more."
        )


def _check_t(t: np.ndarray, right: np.ndarray, T: int) -> None:
    if t.shape != right.shape:
        raise AssertionError(f"the network is shown t of shape {t.shape}; expected {right.shape}.")
    t = whole(t)
    if np.any(t != right):
        raise AssertionError(f"the network is shown t = {t}; expected {right}{_why(t, right, T)}.")


def _why(t: np.ndarray, right: np.ndarray, T: int) -> str:
    """What it is that the network is shown in the place of the right times, if it is known."""
    if any(np.array_equal(t, right + by) for by in (-1, 1)):
        return " (E.13)"
    if np.array_equal(t, in_bfloat16(right)):
        return " (in bfloat16, E.14)"
    if np.array_equal(t, T - 1 - right):
        return ", not T - 1 - t"
    if np.array_equal(np.sort(t), np.sort(right)):
        return ", each sample its own"
    for later, back in [(0, ""), (1, " - 1")]:
        unit = np.sum(right + later) / np.sum(t) if np.sum(t) else 0.0
        if np.allclose(unit * t, right + later, rtol=1e-5, atol=1e-3):
            return f" (in a time of your own: lambda x, u: network(x, {unit:.6g} * u{back}), say)"
    return ""


def _ours_and_mistakes(
    diffusion: GaussianDiffusion, gamma: float | None, shape: tuple[int, ...]
) -> tuple[Function, dict[str, Function]]:
    """The loss (N,) as functions of (x0, t, noise, output): the right one, and wrong ones by name."""
    schedule, C, axes = diffusion.schedule, shape[-1], tuple(range(1, len(shape)))
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    one = np.ones(schedule.T)
    right = one if gamma is None else min_snr_weight(diffusion, np.arange(schedule.T), gamma)

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

    def of_all_pairs(x0: np.ndarray, t: np.ndarray, noise: np.ndarray, output: np.ndarray) -> np.ndarray:
        target = diffusion.training_target(x0, t, noise)
        return right[t] * np.mean((output[:, :C].reshape(-1, 1) - target.reshape(-1)) ** 2, axis=1)

    ours = built()
    mistakes = {
        **moved_in_time(ours, schedule.T),
        "the target is eps": built(target=lambda x0, t, noise: noise),
        "the target is -eps": built(target=lambda x0, t, noise: -noise),
        "the target is x_0": built(target=lambda x0, t, noise: x0),
        "the target is v": built(target=linear(-s, a)),
        "the target is -v, which is another convention, EDM's": built(target=linear(s, -a)),
        "the target is x_t": built(target=linear(a, s)),
        "the target is the noise as it was added, s eps": built(target=linear(0 * a, s)),
        "the target is the flow, eps - x_0": built(target=linear(-one, one)),
        TO_DATA: built(target=linear(one, -one)),
        "a sum over the numbers of a sample, as Ho et al. write it, not a mean": built(
            reduce=lambda numbers: np.sum(numbers, axis=axes)
        ),
        OF_LAST: built(weights=C * right),
        "half of it": built(weights=right / 2),
        "the root of it": lambda *given: np.sqrt(ours(*given)),
        "the absolute difference, not its square": built(size=np.abs),
        "Huber's loss, half the square up to 1 and then linear": built(
            size=lambda d: np.where(np.abs(d) < 1, d * d / 2, np.abs(d) - 0.5)
        ),
    }
    if diffusion.variance == "learned_range":
        mistakes["nu, the second half of the output, for the prediction"] = lambda x0, t, noise, output: ours(
            x0, t, noise, output[..., C:]
        )
    if math.prod(shape[1:]) == 1:
        mistakes["(N, 1) less (N,), which is (N, N): every answer against every target"] = of_all_pairs
    mistakes |= {what: built(weights) for what, weights in _wrong_weights(diffusion, gamma).items()}
    if gamma is None:
        return ours, mistakes
    mistakes["the weights, divided by their mean in the batch"] = lambda x0, t, noise, output: (
        ours(x0, t, noise, output) / np.mean(right[t])
    )
    mistakes["the mean of the batch, times the weights; or their (N,) times (N, 1, ...) (E.20)"] = (
        lambda x0, t, noise, output: right[t] * np.mean(built(one)(x0, t, noise, output))
    )
    if shape[0] == shape[-1]:
        mistakes["weights (N,) that spread along the last axis (E.20)"] = lambda x0, t, noise, output: mean(
            right[t] * (output[..., :C] - diffusion.training_target(x0, t, noise)) ** 2
        )
    return ours, mistakes


def _wrong_weights(diffusion: GaussianDiffusion, gamma: float | None) -> dict[str, np.ndarray]:
    """Weights (T,) that are mistaken for the right ones: Min-SNR's with this gamma, or none."""
    schedule, snr, every = diffusion.schedule, diffusion.schedule.snr, np.arange(diffusion.T)

    def weights_of(gamma: float, prediction: Prediction = diffusion.prediction) -> np.ndarray:
        return min_snr_weight(GaussianDiffusion(schedule, prediction), every, gamma)

    def squares(snr: np.ndarray = snr) -> dict[str, np.ndarray]:
        """How large the square of each error is, if that of x_0 is 1."""
        return {"x0": np.ones_like(snr), "eps": snr, "v": snr + 1, "flow": (np.sqrt(snr) + 1) ** 2}

    if gamma is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            debiased = 1 / np.sqrt(np.minimum(snr, 1000.0))
            errors = {of: size / squares()[diffusion.prediction] for of, size in squares().items()}
        weights = {
            "Min-SNR weights with gamma 5, which min_snr_gamma=5 expects": weights_of(5.0),
            "the weights of P2 with k = 1 and gamma = 1, 1 / (1 + snr)": 1 / (1 + snr),
            "the weights of a debiased estimate, 1 / sqrt(snr) with snr at most 1000": debiased,
            "an error of x_0": errors["x0"],
            "an error of eps, as denoising-diffusion-pytorch weighs them all": errors["eps"],
            "an error of v": errors["v"],
            "an error of the flow, eps - x_0": errors["flow"],
        }
        if diffusion.prediction == "v":  # P2 weighs errors of eps; for v this gives an error of x_0
            del weights["the weights of P2 with k = 1 and gamma = 1, 1 / (1 + snr)"]
        return weights

    def by(snr: np.ndarray = snr, cap: Function = np.minimum) -> np.ndarray:
        """The weights from their parts."""
        return cap(snr, gamma) / squares(snr)[diffusion.prediction]

    right, of_eps = weights_of(gamma), weights_of(gamma, "eps")
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "no weights": np.ones(diffusion.T),
            "the weights of an error of x_0": weights_of(gamma, "x0"),
            "the weights of an error of eps (E.19)": of_eps,
            "the weights of an error of eps, and 1 more (E.19)": of_eps + 1,
            "the weights of an error of v": weights_of(gamma, "v"),
            "the weights of an error of the flow, eps - x_0": weights_of(gamma, "flow"),
            "min(snr + 1, gamma) / (snr + 1) (E.19)": np.minimum(snr + 1, gamma) / (snr + 1),
            "the larger of snr and gamma, not the smaller (E.19)": by(cap=np.maximum),
            "snr as it is, not at most gamma": by(cap=lambda snr, gamma: snr),
            "snr gamma / (snr + gamma), soft Min-SNR": by(cap=lambda snr, gamma: snr * gamma / (snr + gamma)),
            "gamma, where it should be the smaller of snr and gamma": by(cap=lambda snr, gamma: gamma),
            "the root of snr, a ratio of rates": by(snr=np.sqrt(snr)),
            "the square of snr": by(snr=snr**2),
            "1 / snr for snr": by(snr=1 / snr),
            "0 / 0 where snr is 0, of min(snr, gamma) / snr": by(),
            "the weights, squared": right**2,
            "the weights of t - 1": right[np.maximum(every - 1, 0)],
            "the weights of t + 1": right[np.minimum(every + 1, diffusion.T - 1)],
        }


def _batches(
    diffusion: GaussianDiffusion, shape: tuple[int, ...], times: np.ndarray, rng: np.random.Generator
) -> list[tuple[np.ndarray, ...]]:
    """x0, t, noise and the network's output, at these times, (., N)."""
    wide = output_shape(diffusion, shape)
    return [
        (rng.uniform(-1, 1, shape), t, rng.standard_normal(shape), rng.standard_normal(wide)) for t in times
    ]
