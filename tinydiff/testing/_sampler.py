"""Whether a sampler walks where it should, with the same start, noise and network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from tinydiff.backend import clip_to_unit
from tinydiff.diffusion import GaussianDiffusion, Prediction, check_diffusion
from tinydiff.mixture import GaussianMixture
from tinydiff.samplers import SAMPLERS, Steps, iterate_samples, respaced
from tinydiff.schedules import NoiseSchedule
from tinydiff.testing._asked import (
    Function,
    answering,
    asked_shape,
    batch_shown,
    called,
    check_shape,
    check_tolerance,
    in_bfloat16,
    laid_out,
    on_host,
    other_sign,
    whole,
)
from tinydiff.testing._forward import TAKEN_TO_DATA
from tinydiff.testing._judge import named, single
from tinydiff.testing._reverse import NU
from tinydiff.testing._wrong_steps import Step, walked, wrong_steps

__all__ = ["assert_sampler"]

FLOAT32 = " In float32 what is right can be off by as much: compare in float64, or with a larger tolerance."


def assert_sampler(
    sampler: Function,
    diffusion: GaussianDiffusion,
    name: str = "ddpm",
    steps: Steps = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
    axis: int = -1,
    shape: tuple[int, ...] = (4, 3, 4, 4),
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``sampler(denoise, x_T, timesteps, noise)`` arrives where tinydiff's does (docs: R.4).

    The network is the best one for a mixture of two Gaussians, by a formula; it remembers what it was asked.

    Parameters
    ----------
    sampler : callable
        Takes ``denoise(x, t)``, with t an integer or (N,), which returns an array (a tuple of one, with
        ``return_dict=False``); x_T of `shape`; the times to walk through, an increasing NumPy array of int64;
        and ``noise()``, which returns the next standard normal numbers of `shape`, or of the shape that
        ``noise(like)`` or ``noise(sizes)`` asks for. Returns the samples, before they are turned into
        pictures. Further arguments of ``denoise`` and ``noise`` are ignored.
    diffusion : GaussianDiffusion
        Its ``prediction`` and ``variance`` say what `denoise` returns.
    name, steps, eta, clip
        The sampler to compare with, as in `tinydiff.sample`.
    axis : int
        As in `assert_p_mean_variance`.
    shape, asarray, tolerance
        As in `assert_q_sample`; the largest number is that of all samples.

    Raises
    ------
    AssertionError
        If it arrives elsewhere. The message says how far off, and at which t the network is first asked
        something else. It names the mistake that leads to just these samples, if it is known here. Each known
        mistake is walked as far as it goes along with yours.
    TypeError, ValueError
        If an argument is not as said above.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    check_tolerance(tolerance)
    _, timesteps = respaced(diffusion, steps)
    x_T = np.random.default_rng(0).standard_normal(shape)
    expected, asked = _Network(diffusion), _Network(diffusion)
    our_noise, your_noise, of_shapes = _Noise(), _Noise(), []

    def noise(*like: Any, **how: Any) -> Any:
        of_shapes.append(asked_shape(like, how) or shape)
        return asarray(np.resize(your_noise.standard_normal(shape), of_shapes[-1]))

    right = _ours(diffusion, name, timesteps, eta, clip, x_T)(expected, our_noise)
    result = called(
        sampler,
        "sampler(denoise, x_T, timesteps, noise)",
        answering(lambda x, t: asarray(laid_out(diffusion, axis, asked(x, t)))),
        asarray(x_T.copy()),
        timesteps.copy(),
        noise,
    )
    came = on_host("what sampler returned", result)
    if came.dtype.kind != "f":
        raise AssertionError(
            f"what sampler returned has dtype {came.dtype}, as pictures have; expected the samples before "
            "that, in the range of the data."
        )
    if came.shape != shape:
        raise AssertionError(f"what sampler returned has shape {came.shape}; expected {shape}.")

    def off(other: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            difference = np.max(np.abs(came - other)) / np.max(np.abs(right))
        return float(difference) if np.isfinite(difference) else np.inf

    worst = off(right)
    as_often = [t for t, _ in asked.calls] == [t for t, _ in expected.calls]
    # Clipped, different walks may end alike.
    same_way = not as_often or _asked_alike(asked.calls, expected.calls, max(1e-2, tolerance))
    if worst <= tolerance and same_way:
        return
    distances = {}
    for what, mistake in _mistakes(diffusion, name, timesteps, eta, clip, x_T, tolerance).items():
        try:
            with np.errstate(all="ignore"):
                distances[what] = off(mistake(_Network(diffusion, asked.calls)))
        except ValueError:  # there is no such walk: another sampler cannot begin at pure noise, say
            continue
        except _Elsewhere:
            distances[what] = np.inf
    where = f"{worst:.3g} of the largest number from" if np.isfinite(worst) else "at no finite numbers, not"
    calls = _first_difference(asked.calls, expected.calls, tolerance)
    if your_noise.drawn != our_noise.drawn:
        calls += f" noise() is called {your_noise.drawn} times; expected {our_noise.drawn}."
    if {*of_shapes} - {shape}:
        calls += f" noise() is asked for shape {max({*of_shapes} - {shape})}; expected {shape}."
    small = worst < 2e-3 or single(worst, came)
    unknown = f" Nor is it another of {', '.join(SAMPLERS)}.{FLOAT32 if as_often and small else ''}"
    if your_noise.drawn > our_noise.drawn:
        unknown += " Noise that is drawn and then multiplied by 0 is no mistake."
    if worst <= tolerance:
        where, unknown = "by another way", ""
    raise AssertionError(
        f"sampler arrives {where} where {name} does (docs: R.4). {calls}\n"
        f"{named(distances, worst, tolerance, unknown)}"
    )


def _ours(
    diffusion: GaussianDiffusion, name: str, timesteps: np.ndarray, eta: float, clip: bool, x_T: np.ndarray
) -> Function:
    """A function from a network to our samples; further arguments change what is right."""

    def samples(
        network: Function,
        rng: Any = None,
        name: str = name,
        prediction: Prediction = diffusion.prediction,
        left_out: int = 0,  # how many of the last steps
        **changed: Any,
    ) -> np.ndarray:
        process = GaussianDiffusion(diffusion.schedule, prediction, diffusion.variance)
        options: dict[str, Any] = dict(x_T=x_T, steps=timesteps, eta=eta, clip=clip, rng=rng or _Noise())
        states = iterate_samples(network, process, x_T.shape, name, **(options | changed))
        return next(state.x for state in states if state.steps_left == left_out)

    return samples


def _mistakes(
    diffusion: GaussianDiffusion,
    name: str,
    timesteps: np.ndarray,
    eta: float,
    clip: bool,
    x_T: np.ndarray,
    tolerance: float,
) -> dict[str, Function]:
    """Functions from a network to samples, by what each does wrong."""
    ours = _ours(diffusion, name, timesteps, eta, clip, x_T)
    short = diffusion.schedule.respace(timesteps)
    walk = GaussianDiffusion(short, diffusion.prediction, diffusion.variance)
    every, gap = np.arange(diffusion.T), diffusion.T // walk.T
    a, s = np.sqrt(diffusion.schedule.alphas_cumprod), np.sqrt(diffusion.schedule.one_minus_alphas_cumprod)
    s_T = np.sqrt(short.one_minus_alphas_cumprod[-1])

    def changed(**to: Any) -> Function:
        return lambda network: ours(network, **to)

    def shown(times: np.ndarray) -> Function:
        """The network is shown, at t, times[t]."""
        return lambda network: ours(lambda x, t: network(x, times[t]))

    def to_pictures(end: Function) -> Function:
        """The right samples, with something done to them at the end."""
        return lambda network: end(ours(network))

    def of_their_betas(network: Function) -> np.ndarray:
        schedule = NoiseSchedule(diffusion.schedule.betas[timesteps])
        process = GaussianDiffusion(schedule, diffusion.prediction, diffusion.variance)
        return _ours(process, name, every[: walk.T], eta, clip, x_T)(lambda x, t: network(x, timesteps[t]))

    def stepping(step: Step) -> Function:
        return lambda network: walked(step, network, x_T, timesteps, _Noise())

    steps = wrong_steps(diffusion, walk, timesteps, name, eta, clip)
    mistakes = {
        "the network is shown t + 1 (E.13)": shown(np.minimum(every + 1, diffusion.T - 1)),
        "the network is shown t - 1": shown(np.maximum(every - 1, 0)),
        "the network is shown t in bfloat16 (E.14)": shown(np.minimum(in_bfloat16(every), diffusion.T - 1)),
        "the network is shown T - 1 - t": shown(every[::-1]),
        "the network is shown t = 0 at each step, as of a rate that is made an integer": shown(0 * every),
        "the network is shown the number of the step, not its t": shown(np.searchsorted(timesteps, every)),
        "the network is shown x / a, a state that is not scaled down": lambda network: ours(
            lambda x, t: network(x / a[t[0]], t)
        ),
        "the network is shown x / (a + s), flow matching's state": lambda network: ours(
            lambda x, t: network(x / (a + s)[t[0]], t)
        ),
        "it starts from x_T as it is, and not from sqrt(1 + sigma_T^2) x_T": changed(
            x_T=a[timesteps[-1]] * x_T
        ),
        "the estimate of x_0 is clipped": changed(clip=True),
        "the estimate of x_0 is not clipped": changed(clip=False),
        "the output is taken for eps": changed(prediction="eps"),
        "the output is taken for x_0": changed(prediction="x0"),
        "the output is taken for v": changed(prediction="v"),
        "the output is taken for the flow, eps - x_0": changed(prediction="flow"),
        TAKEN_TO_DATA: lambda network: ours(lambda x, t: other_sign(x, network(x, t)), prediction="flow"),
        "steps 0, r, 2 r, ... that leave out the last, T - 1 (E.3)": changed(steps=np.arange(walk.T) * gap),
        "steps ..., T - 1 - r, T - 1 that leave out the first, 0": changed(
            steps=diffusion.T - 1 - gap * np.arange(walk.T)[::-1]
        ),
        "the first step is left out, or x_T is shown at the next time, not its own (E.21)": changed(
            steps=timesteps[:-1]
        ),
        "the last step is left out, or leads to abar of the first time": changed(left_out=1),
        "the samples are clipped at the end, as pictures are": to_pictures(clip_to_unit),
        "(x + 1) / 2 of the samples, as pictures are": to_pictures(lambda x: (x + 1) / 2),
        "(x + 1) / 2 of the samples, clipped, as pictures are": to_pictures(
            lambda x: (clip_to_unit(x) + 1) / 2
        ),
        "the same noise in every step": changed(rng=_Noise(again=True)),
        "a chain of betas[timesteps], without the betas between them (E.8)": of_their_betas,
        **{
            f"the sampler is {other}": changed(name=other, eta=eta if other == "ddim" else 0.0)
            for other in SAMPLERS
        },
        **{what: stepping(step) for what, step in steps.items()},
    }
    if 1 - s_T > tolerance:  # else this is nearly right
        start = "it starts from sigma_T x_T, and not from sqrt(1 + sigma_T^2) x_T"
        mistakes[f"{start}; the first is another convention, EDM's"] = changed(x_T=s_T * x_T)
    if diffusion.variance == "learned_range":
        mistakes["nu comes first, the prediction after it"] = lambda network: ours(
            lambda x, t: np.roll(network(x, t), x.shape[-1], axis=-1)
        )
    if name in ("heun", "edm"):
        mistakes["the second call of a step is shown the time of the first"] = lambda network: ours(
            _first_of_two(network)
        )
    return mistakes


Call: TypeAlias = tuple[int, np.ndarray]  # of the network: t and x


class _Elsewhere(Exception):
    """A walk has left the one that it was to follow."""


class _Network:
    """The best network for data whose numbers each come from one mixture; it remembers what it was asked.

    For a learned variance it gives not the best nu, but some nu. Where there is a walk to go `along` with, it
    raises `_Elsewhere` when it is asked something else.
    """

    def __init__(self, diffusion: GaussianDiffusion, along: Sequence[Call] = ()) -> None:
        self.calls: list[Call] = []
        self._along = along
        self._diffusion, self._learned = diffusion, diffusion.variance == "learned_range"
        # Means outside [-1, 1], and data inside and outside: the samples show clipping, and what was clipped.
        mixture = GaussianMixture([0.4, 0.6], [[-1.2], [1.1]], [0.1, 0.2])
        self._denoise = mixture.denoiser(GaussianDiffusion(diffusion.schedule, diffusion.prediction))

    def __call__(self, x: Any, t: Any) -> np.ndarray:
        x, t = batch_shown(x, t)
        now, T = whole(t).flat[0], self._diffusion.T
        if np.any(whole(t) != now):
            raise AssertionError(f"the network is shown t = {t}; expected one time for all of a batch.")
        if now % 1 or not 0 <= now < T:
            why = "E.13; or E.14, in bfloat16" if now == in_bfloat16(T - 1) else "E.13"
            if now > T and now * T / 1000 in range(T):
                ours = f"lambda x, u: denoise(x, {T / 1000:g} * u)"
                why = f"in a time of your own, 1000 / T times ours: {ours}, say"
            if now % 1:
                own = f"in a time of your own: lambda x, u: denoise(x, {T} * u), say; " if now <= 1 else ""
                why = f"{own}of sigmas between a chain's make a NoiseSchedule"
            raise AssertionError(
                f"the network is shown t = {now}; expected a whole number, 0 … {T - 1} ({why})."
            )
        if not (self.calls and self.calls[-1][0] == now and np.array_equal(self.calls[-1][1], x)):
            self.calls.append((int(now), x))  # once, if it is asked twice, as for guidance
            if not _asked_alike(self._along[len(self.calls) - 1 :], self.calls[-1:]):
                raise _Elsewhere
        x = x.astype(np.float64)
        with np.errstate(all="ignore"):  # yours may have gone where numbers overflow
            prediction = self._denoise(x.reshape(-1, 1), np.full(x.size, int(now))).reshape(x.shape)
        if not self._learned:
            return prediction
        # The best nu for all steps is not that for fewer steps, which is far beyond nu's range.
        nu = np.mean(NU) + (NU[1] - NU[0]) / 2 * np.sin(2 * x)
        return np.concat([prediction, nu], axis=-1)


class _Noise:
    """The noise of a walk, in the place of a generator; it counts how often it is asked."""

    def __init__(self, again: bool = False) -> None:
        self.drawn, self._again = 0, again
        self._rng = np.random.default_rng(1)

    def standard_normal(self, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        self.drawn += 1
        rng = np.random.default_rng(1) if self._again else self._rng
        return rng.standard_normal(shape)


def _first_of_two(network: Function) -> Function:
    """The network, shown in every second call the time of the call before."""
    before: list[Any] = []

    def asked(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        if before:
            return network(x, before.pop())
        before.append(t)
        return network(x, t)

    return asked


def _asked_alike(yours: Sequence[Call], others: Sequence[Call], largest: float = 1e-2) -> bool:
    """Whether two networks are asked the same, to `largest` of the other's, as long as both are asked."""
    for (t, x), (other_t, other_x) in zip(yours, others, strict=False):
        if t != other_t:
            return False
        if x.shape == other_x.shape and not np.max(np.abs(x - other_x)) <= largest * np.max(np.abs(other_x)):
            return False
    return True


def _first_difference(asked: Sequence[Call], expected: Sequence[Call], tolerance: float) -> str:
    """Where the network is first asked something else."""
    for k, ((t, x), (right_t, right_x)) in enumerate(zip(asked, expected, strict=False), start=1):
        if t != right_t:
            return f"Call {k} of the network is at t = {t}; expected {right_t}."
        if x.shape != right_x.shape or not np.max(np.abs(x - right_x)) <= tolerance * np.max(np.abs(right_x)):
            if k == 1:
                return f"The first call of the network, at t = {t}, has another state than x_T."
            step = f"after the step from t = {asked[k - 2][0]}"
            return f"Call {k} of the network, at t = {t}, is the first with another state, {step}."
    if len(asked) != len(expected):
        return f"The network is called {len(asked)} times; expected {len(expected)}."
    return "The network is asked all that it should be: it is the last step that differs."
