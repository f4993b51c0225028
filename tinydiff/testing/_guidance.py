"""Whether guidance mixes what it should: two predictions of one state, each with its own weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, check_number
from tinydiff.backend import clip_to_unit, column_like
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    answering,
    batch_shown,
    check_shape,
    classes_told,
    in_bfloat16,
    steps_shown,
    times,
)
from tinydiff.testing._judge import Claim, moved_in_time

__all__ = ["assert_guided"]


def assert_guided(
    guided: Function,
    diffusion: GaussianDiffusion,
    *,
    guidance_scale: float = 3.0,
    num_classes: int = 10,
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``guided(network, x, t, labels)`` is f(x) + w (f(x, y) - f(x)), at every t (docs: R.15).

    Parameters
    ----------
    guided : callable
        Takes ``network(x, t, labels)``, x of `shape`, t (N,) and labels (N,), and returns the prediction to
        sample with. The network may be asked for more samples at a time, and be given its labels as
        ``class_labels`` or ``y``. None, or any number but 0 … num_classes - 1, tells it that there is no
        class; it returns an array (a tuple of one, with ``return_dict=False``).
    diffusion : GaussianDiffusion
        Its T says which t are asked about. With a learned variance the network returns the prediction and
        then nu, which is not guided: it is that of f(x, y).
    guidance_scale : float
        The w at which yours guides, by our convention: 1 is the class alone, 0 is none.
    num_classes : int
        How many classes the labels are drawn from.
    axis : int
        The axis of your channels, and of the two halves of a learned variance: 1 for (N, C, H, W).
    shape, asarray, tolerance
        As in `assert_q_sample`.

    Raises
    ------
    AssertionError
        As in `assert_q_sample`; and if what the network is shown has no shape that it can be asked of.
    TypeError, ValueError
        As in `assert_q_sample`; ValueError also if the scale is 0 or 1, of which only one prediction is left.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    check_counts(num_classes=num_classes)
    check_number(
        "guidance_scale",
        guidance_scale,
        lambda w: math.isfinite(w) and w not in (0, 1),
        "a finite number, but 0 and 1, which do not show both predictions",
    )
    formula, rng = _Network(diffusion, num_classes, axis), np.random.default_rng(0)
    labels = rng.integers(0, num_classes, shape[0])

    def yours(x: Any, t: Any, labels: Any) -> Any:
        def network(x: Any, t: Any, labels: Any) -> Any:
            return asarray(formula.answer(x, t, labels))

        return guided(answering(network, with_labels=True), x, t, labels)

    ours, mistakes = _ours_and_mistakes(formula, labels, float(guidance_scale), shape)
    claim = Claim(
        "guided",
        "network, x, t, labels",
        f"f(x) + w (f(x, y) - f(x)) with w = {guidance_scale:g} (docs: R.15)",
        ours,
        mistakes,
        shown=lambda x, t: (x, t, labels),
    )
    batches = [(rng.standard_normal(shape), t) for t in times(diffusion.T, shape[0], rng)]
    claim.judge(yours, batches, asarray, tolerance)


class _Network:
    """A network of classes by a formula: each number of its output comes from that of x at its place."""

    def __init__(self, diffusion: GaussianDiffusion, num_classes: int, axis: int) -> None:
        self.diffusion, self.num_classes, self.axis = diffusion, num_classes, axis

    def __call__(self, x: np.ndarray, t: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """The prediction of x (N, ...) at t (N,), and nu if the variance is learned; the label -1 is none."""
        t, k = (column_like(given, x) for given in (t, 1.0 + labels))
        angle = 0.37 * t + 1.7 * k + x / (1 + k)
        prediction = x + np.sin(angle)
        return (prediction, np.cos(angle)) if self.diffusion.variance == "learned_range" else (prediction,)

    def answer(self, x: Any, t: Any, labels: Any) -> np.ndarray:
        """What it answers yours."""
        x, t = batch_shown(x, t)
        told, t = classes_told(x, labels, self.num_classes), steps_shown(t, self.diffusion.T)
        return np.concat(self(x.astype(np.float64), np.broadcast_to(t, len(x)), told), axis=self.axis)


def _ours_and_mistakes(
    network: _Network, labels: np.ndarray, w: float, shape: tuple[int, ...]
) -> tuple[Function, dict[str, Function]]:
    """The guided prediction as functions of (x, t): the right one, and wrong ones by name."""
    none = np.full_like(labels, -1)

    def both(x: np.ndarray, t: np.ndarray) -> Any:
        """What the network says without a class, and with it."""
        return network(x, t, none), network(x, t, labels)

    def guide(f: np.ndarray, told: np.ndarray, w: float = w) -> np.ndarray:
        return f + w * (told - f)

    def built(mix: Function = guide, asked: Function = both, nu: Function = lambda f, told: told) -> Function:
        """Guidance from its parts, one of which may be wrong."""

        def guided(x: np.ndarray, t: np.ndarray) -> np.ndarray:
            (f, *nu_f), (told, *nu_told) = asked(x, t)
            return np.concat([mix(f, told), *map(nu, nu_f, nu_told)], axis=network.axis)

        return guided

    def without_a_class(f: Function) -> Function:
        """Another answer in the place of that without a class."""
        return lambda x, t: (f(x, t), network(x, t, labels))

    def in_turns(turns: list[np.ndarray]) -> Function:
        """x twice, end to end, with the labels of the two by turns."""

        def asked(x: np.ndarray, t: np.ndarray) -> Any:
            answers = network(np.concat([x, x]), np.concat([t, t]), np.stack(turns, axis=1).ravel())
            pair = [tuple(part[rows] for part in answers) for rows in halves]
            return pair if turns[0] is none else pair[::-1]

        halves = slice(None, shape[0]), slice(shape[0], None)
        return asked

    def rescaled(share: float) -> Function:
        """Lin et al. 2023, eq. 15 and 16."""

        def mix(f: np.ndarray, told: np.ndarray) -> np.ndarray:
            prediction, axes = guide(f, told), tuple(range(1, f.ndim))
            size = np.std(told, axis=axes, keepdims=True) / np.std(prediction, axis=axes, keepdims=True)
            return prediction * (share * size + 1 - share)

        return mix

    def of_three_channels(f: np.ndarray, told: np.ndarray) -> np.ndarray:
        (first, _), (_, rest) = (np.split(part, [3], axis=network.axis) for part in (guide(f, told), told))
        return np.concat([first, rest], axis=network.axis)

    ours = built()
    mistakes = {
        **moved_in_time(ours, network.diffusion.T),
        "the network is shown t in bfloat16 (E.14)": lambda x, t: ours(x, in_bfloat16(t)),
        "1 + w in the place of w, which is another convention, that of Ho & Salimans": built(
            lambda f, told: guide(f, told, 1 + w)
        ),
        "w - 1 in the place of w": built(lambda f, told: guide(f, told, w - 1)),
        "the two predictions exchanged": built(lambda f, told: guide(told, f)),
        "w times the difference alone, without f(x)": built(lambda f, told: w * (told - f)),
        "f(x) + w f(x, y), not the difference": built(lambda f, told: f + w * told),
        "f(x, y) alone: no guidance, or the network is told the class in both predictions (E.27)": built(
            lambda f, told: told
        ),
        "f(x) alone: the network is told no class in either prediction": built(lambda f, told: f),
        "no class is told as class 0, which is one": built(
            asked=without_a_class(lambda x, t: network(x, t, 0 * labels))
        ),
        "no class is told as the last class, which is one": built(
            asked=without_a_class(lambda x, t: network(x, t, 0 * labels + network.num_classes - 1))
        ),
        "f(x) is not shown x_t, but zeros (E.27)": built(
            asked=without_a_class(lambda x, t: network(0 * x, t, none))
        ),
        "x twice, end to end, and the labels by turns, no class first": built(asked=in_turns([none, labels])),
        "x twice, end to end, and the labels by turns, the class first": built(
            asked=in_turns([labels, none])
        ),
        "rescaled to the deviation of f(x, y) (Lin et al. 2023)": built(rescaled(1.0)),
        "rescaled by 0.7 to the deviation of f(x, y) (Lin et al. 2023)": built(rescaled(0.7)),
        "the guided prediction is clipped": built(lambda f, told: clip_to_unit(guide(f, told))),
    }
    if shape[network.axis] > 3:
        mistakes["only the first three channels are guided, as DiT's forward_with_cfg does and says"] = built(
            of_three_channels
        )
    if network.diffusion.variance == "learned_range":
        mistakes["nu is guided as well"] = built(nu=guide)
        mistakes["nu is that of f(x)"] = built(nu=lambda f, told: f)
    return ours, mistakes
