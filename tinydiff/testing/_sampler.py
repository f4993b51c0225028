"""Whether a sampler walks where it should, with the same start, noise and network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.mixture import GaussianMixture
from tinydiff.samplers import SAMPLERS, respaced, sample
from tinydiff.testing._judge import Function, check_shape, check_tolerance, named, on_host
from tinydiff.testing._wrong_steps import Step, walked, wrong_steps

__all__ = ["assert_sampler"]


def assert_sampler(
    sampler: Function,
    diffusion: GaussianDiffusion,
    name: str = "ddpm",
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
    shape: tuple[int, ...] = (4, 3, 4, 4),
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``sampler(denoise, x_T, timesteps, noise)`` arrives where tinydiff's does (docs: R.4).

    The network is the best one of a mixture of two Gaussians, a formula, and remembers what it was asked.

    Parameters
    ----------
    sampler : callable
        Takes ``denoise(x, t)``, with t an integer or (N,); x_T of `shape`; the times to walk through, an
        increasing array of int64, in NumPy; and ``noise()``, which returns the next standard normal numbers
        of `shape`. Returns the samples.
    diffusion : GaussianDiffusion
        Its ``prediction`` and ``variance`` say what `denoise` returns.
    name, steps, eta, clip
        The sampler to compare with, as in `tinydiff.sample`.
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError
        If it arrives elsewhere. The message says how far off, at which t the network is first asked something
        else, and names the mistake that leads to just these samples, if it is one of those known here.
    TypeError, ValueError
        If an argument is not as said above.
    """
    check_diffusion(diffusion)
    check_shape(shape)
    check_tolerance(tolerance)
    walk, timesteps = respaced(diffusion, steps)
    x_T = np.random.default_rng(0).standard_normal(shape)
    noises = np.random.default_rng(1)
    asked, expected = _Network(diffusion, asarray), _Network(diffusion)

    def ours(network: Function, name: str = name, **changed: Any) -> np.ndarray:
        options: dict[str, Any] = dict(steps=timesteps, eta=eta, clip=clip) | changed
        rng = np.random.default_rng(1)
        return sample(network, diffusion, shape, name, rng=rng, x_T=x_T, workers=1, progress=False, **options)

    right = ours(expected)
    result = sampler(
        asked, asarray(x_T.copy()), timesteps.copy(), lambda: asarray(noises.standard_normal(shape))
    )
    came = on_host("sampler's result", result)
    if came.shape != shape:
        raise AssertionError(f"sampler's result has shape {came.shape}; expected {shape}.")

    def off(other: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            difference = np.abs(came - other)
        return float(np.max(np.where(np.isnan(difference), np.inf, difference)) / np.max(np.abs(right)))

    worst = off(right)
    if worst <= tolerance:
        return

    def shown(by: int) -> Function:
        return lambda network: ours(lambda x, t: network(x, np.clip(t + by, 0, diffusion.T - 1)))

    def changed(**to: Any) -> Function:
        return lambda network: ours(network, **to)

    def stepping(step: Step) -> Function:
        return lambda network: walked(step, network, x_T, timesteps, np.random.default_rng(1))

    mistakes = {
        "the network is shown t + 1 (E.13)": shown(1),
        "the network is shown t - 1": shown(-1),
        "the estimate of x_0 is clipped": changed(clip=True),
        "the estimate of x_0 is not clipped": changed(clip=False),
        "steps that leave out the last, T - 1 (E.3)": changed(
            steps=np.arange(walk.T) * (diffusion.T // walk.T)
        ),
        **{f"the sampler is {other}": changed(name=other) for other in SAMPLERS},
        **{
            what: stepping(step)
            for what, step in wrong_steps(diffusion, walk, timesteps, name, eta, clip).items()
        },
    }
    distances = {}
    for what, mistake in mistakes.items():
        try:
            with np.errstate(all="ignore"):
                distances[what] = off(mistake(_Network(diffusion)))
        except ValueError:  # there is no such walk: another sampler cannot begin at pure noise, say
            continue
    raise AssertionError(
        f"sampler arrives {worst:.3g} of the largest number away from where {name} does (docs: R.4). "
        f"{_first_difference(asked.calls, expected.calls, tolerance)}\n{named(distances, worst)}"
    )


class _Network:
    """The best network of data whose numbers are each of one mixture; it remembers what it was asked."""

    def __init__(self, diffusion: GaussianDiffusion, asarray: Function = np.asarray) -> None:
        self.calls: list[tuple[int, np.ndarray]] = []
        self._diffusion, self._asarray = diffusion, asarray
        self._denoise = GaussianMixture([0.3, 0.7], [[-1.2], [0.8]], [0.05, 0.1]).denoiser(diffusion)

    def __call__(self, x: Any, t: Any) -> Any:
        x, t = on_host("the network's x", x), on_host("the network's t", t)
        if t.shape not in ((), (len(x),)) or np.any(t != t.flat[0]) or t.flat[0] % 1:
            raise AssertionError(
                f"the sampler shows the network t = {t}; expected an integer or (N,) equal ones."
            )
        if not 0 <= t.flat[0] < self._diffusion.T:
            raise AssertionError(
                f"the sampler shows the network t = {t.flat[0]}; expected 0 … {self._diffusion.T - 1} (E.13)."
            )
        now = int(t.flat[0])
        self.calls.append((now, x.copy()))
        said = self._denoise(x.astype(np.float64).reshape(-1, 1), np.full(x.size, now))
        said[:, 1:] = np.clip(said[:, 1:], -1, 1)  # nu: the best one for all steps is beyond, for fewer
        return self._asarray(np.concat([part.reshape(x.shape) for part in said.T], axis=-1))


def _first_difference(
    asked: list[tuple[int, np.ndarray]], expected: list[tuple[int, np.ndarray]], tolerance: float
) -> str:
    """Where the network is first asked something else."""
    for k, ((t, x), (right_t, right_x)) in enumerate(zip(asked, expected, strict=False), start=1):
        if t != right_t:
            return f"Call {k} of the network is at t = {t}; expected {right_t}."
        if x.shape != right_x.shape or not np.max(np.abs(x - right_x)) <= tolerance * np.max(np.abs(right_x)):
            before = f"after the step from t = {asked[k - 2][0]}" if k > 1 else "x_T"
            return f"Call {k} of the network, at t = {t}, is the first with another state, {before}."
    if len(asked) != len(expected):
        return f"The network is called {len(asked)} times; expected {len(expected)}."
    return "The network is asked all that it should be: it is the last step that differs."
