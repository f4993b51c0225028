"""Whether the forward process is what it should be, and what a network learns to say of it."""

from __future__ import annotations

import numpy as np

from tinydiff.backend import clip_to_unit
from tinydiff.diffusion import GaussianDiffusion, Prediction, check_diffusion
from tinydiff.schedules import NoiseSchedule
from tinydiff.testing._asked import SHAPE, Function, asked_up_to, check_shape, times
from tinydiff.testing._judge import Claim, linear, moved_in_time

__all__ = ["TAKEN_TO_DATA", "TO_DATA", "assert_predict_x0", "assert_q_sample", "assert_training_target"]

TAKEN_TO_DATA = "the output is taken for x_0 - eps, the flow where t runs from noise to data"
TO_DATA = "the target is x_0 - eps, the flow where t runs from noise to data"


def assert_q_sample(
    q_sample: Function,
    schedule: NoiseSchedule,
    *,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``q_sample(x0, t, noise)`` is x_t, at every t (docs: F.2).

    Parameters
    ----------
    q_sample : callable
        Takes x0 and noise of `shape` and t (N,), 0 … T-1, and returns x_t.
    schedule : NoiseSchedule
        The schedule whose rates it should have; `assert_schedule` compares the schedule itself.
    shape : tuple of int
        (N, ...), the shape of a batch. Best with N equal to the last size: rates (N,) that were not made a
        column then broadcast along the last axis, which raises no error, but shows in the numbers.
    asarray : callable
        From a NumPy array, float64 or (t) int64, to what your function takes: ``torch.as_tensor``.
    tolerance : float
        The largest difference that passes, relative to the largest expected number of its sample.

    Raises
    ------
    AssertionError
        If it is something else, or if the function writes into what it is given, other than a network's
        output. The message says how far off it is and at which t, and names the mistake that gives just this,
        if it is known here.
    TypeError, ValueError
        If `schedule`, `shape` or `tolerance` is not as said above.
    """
    check_shape(shape)
    ours = GaussianDiffusion(schedule).q_sample
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    alpha, beta = np.sqrt(schedule.alphas), np.sqrt(schedule.betas)
    before = schedule.one_minus_alphas_cumprod_prev
    with np.errstate(divide="ignore"):
        s_over_a = s / a

    mistakes = {
        **moved_in_time(ours, schedule.T),
        "abar_{t-1} in the place of abar_t": linear(np.sqrt(1 - before), np.sqrt(before)),
        "both rates without their roots": linear(a**2, s**2),
        "1 - abar_t in front of the noise, without its root (E.23)": linear(a, s**2),
        "abar_t in front of the data, without its root": linear(a**2, s),
        "1 - sqrt(abar_t) in front of the noise": linear(a, 1 - a),
        "the two rates, or the arguments x0 and noise, exchanged": linear(s, a),
        "the noise subtracted": linear(a, -s),
        "data that is not scaled down": linear(np.ones_like(a), s),
        "data that is not scaled down, noise times s/a, which is another convention, EDM's": linear(
            np.ones_like(a), s_over_a
        ),
        "both rates divided by their sum, 1 - t and t, which is another convention, flow matching's": linear(
            a / (a + s), s / (a + s)
        ),
        "alpha_t of one step in the place of abar_t of all": linear(alpha, beta),
        "alpha_t in the place of abar_t in front of the data": linear(alpha, s),
        "beta_t in the place of 1 - abar_t in front of the noise": linear(a, beta),
    }
    if shape[0] == shape[-1]:
        mistakes["rates (N,) that spread along the last axis"] = lambda x0, t, noise: a[t] * x0 + s[t] * noise
    expected = "sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (docs: F.2)"
    claim = Claim("q_sample", "x0, t, noise", expected, ours, mistakes)
    claim.judge(q_sample, _pairs(schedule.T, shape), asarray, tolerance)


def assert_training_target(
    training_target: Function,
    diffusion: GaussianDiffusion,
    *,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``training_target(x0, t, noise)`` is what the network should say of x_t (docs: F.10).

    Parameters
    ----------
    training_target : callable
        Takes x0 and noise of `shape` and t (N,), 0 … T-1, and returns the target.
    diffusion : GaussianDiffusion
        Its ``prediction`` says which: eps, x0, v = a eps - s x0, or the flow, eps - x0.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape)
    schedule, ours = diffusion.schedule, diffusion.training_target
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    mistakes = {
        **moved_in_time(ours, schedule.T),
        "the target is eps, or the arguments x0 and noise are exchanged": lambda x0, t, noise: noise,
        "the target is x_0, or the arguments x0 and noise are exchanged": lambda x0, t, noise: x0,
        "the target is v": linear(-s, a),
        "the sign; -v is another convention, EDM's": lambda *given: -ours(*given),
        "the rates of v exchanged, s eps - a x_0": linear(-a, s),
        "the arguments x0 and noise of v exchanged, a x_0 - s eps": linear(a, -s),
        "the target is x_t": linear(a, s),
        "the target is the noise as it was added, s eps": linear(0 * a, s),
        "the target is the flow, eps - x_0": lambda x0, t, noise: noise - x0,
        TO_DATA: lambda x0, t, noise: x0 - noise,
    }
    if diffusion.prediction == "flow":  # TO_DATA says it
        del mistakes["the sign; -v is another convention, EDM's"]
    formula = {
        "eps": "eps",
        "x0": "x_0",
        "v": "sqrt(abar_t) eps - sqrt(1 - abar_t) x_0",
        "flow": "eps - x_0",
    }[diffusion.prediction]
    claim = Claim("training_target", "x0, t, noise", f"{formula} (docs: F.10)", ours, mistakes)
    claim.judge(training_target, _pairs(schedule.T, shape), asarray, tolerance)


def assert_predict_x0(
    predict_x0: Function,
    diffusion: GaussianDiffusion,
    *,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``predict_x0(x_t, t, output)`` is the data that an output means (docs: F.7).

    Parameters
    ----------
    predict_x0 : callable
        Takes x_t and output of `shape` and t (N,), and returns an estimate of x0, not clipped.
    diffusion : GaussianDiffusion
        Its ``prediction`` says what the output is. Where that is eps, times at which x_t is all noise
        are left out: eps says nothing of x0 there.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_q_sample`.
    """
    check_diffusion(diffusion)
    check_shape(shape)
    schedule = diffusion.schedule
    a, s = np.sqrt(schedule.alphas_cumprod), np.sqrt(schedule.one_minus_alphas_cumprod)
    alpha = np.sqrt(schedule.alphas)

    def taken_as(given: Prediction) -> Function:
        return lambda x_t, t, output: diffusion.predict_x0(x_t, t, output, given=given)

    ours = taken_as(diffusion.prediction)
    with np.errstate(divide="ignore"):
        mistakes = {
            **moved_in_time(ours, schedule.T),
            "the output is taken for eps": linear(1 / a, -s / a),
            "the output is taken for x_0": taken_as("x0"),
            "the output is taken for v": taken_as("v"),
            "the output is taken for -v": linear(a, s),
            "the output is taken for the flow, eps - x_0": taken_as("flow"),
            TAKEN_TO_DATA: linear(1 / (a + s), s / (a + s)),
            "the estimate is clipped": lambda *given: clip_to_unit(ours(*given)),
            "x_t is clipped": lambda x_t, t, output: ours(clip_to_unit(x_t), t, output),
            "sqrt(alpha_t) of one step divides, not sqrt(abar_t)": linear(1 / alpha, -s / alpha),
            "sqrt(abar_t) multiplies": linear(a, -s * a),
            "sqrt(abar_t) divides x_t alone": linear(1 / a, -s),
            "sqrt(abar_t) divides eps alone": linear(np.ones_like(a), -s / a),
            "1 - sqrt(abar_t) in front of eps": linear(1 / a, -(1 - a) / a),
            "nothing divides by sqrt(abar_t)": linear(np.ones_like(a), -s),
            "abar_t divides, without its root": linear(1 / a**2, -s / a**2),
            "1 - abar_t in front of eps, without its root": linear(1 / a, -(s**2) / a),
            "eps is added": linear(1 / a, s / a),
            "the output is subtracted as it is": linear(np.ones_like(a), -np.ones_like(a)),
            "the rates of v exchanged, s x_t - a v": linear(s, -a),
            "x_t is not divided by a + s, as if it were flow matching's": linear(
                np.ones_like(a), -s / (a + s)
            ),
            "the output's eps, not its x_0": lambda x_t, t, output: diffusion.predict_eps(
                x_t, t, output, given=diffusion.prediction
            ),
        }
    expected = {
        "eps": "(x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (docs: F.7)",
        "x0": "the output (docs: F.7)",
        "v": "sqrt(abar_t) x_t - sqrt(1 - abar_t) v (docs: F.7)",
        "flow": "(x_t - sqrt(1 - abar_t) flow) / (sqrt(abar_t) + sqrt(1 - abar_t)) (docs: F.11)",
    }[diffusion.prediction]
    claim = Claim("predict_x0", "x_t, t, output", expected, ours, mistakes)
    claim.judge(predict_x0, _pairs(asked_up_to(diffusion), shape, of_noise=True), asarray, tolerance)


def _pairs(T: int, shape: tuple[int, ...], of_noise: bool = False) -> list[tuple[np.ndarray, ...]]:
    """Batches of an array, t and another array, at all of 0 … T-1; the first array is data, or noise."""
    rng = np.random.default_rng(0)
    batches: list[tuple[np.ndarray, ...]] = []
    for t in times(T, shape[0], rng):
        first = rng.standard_normal(shape) if of_noise else rng.uniform(-1, 1, shape)
        batches.append((first, t, rng.standard_normal(shape)))
    return batches
