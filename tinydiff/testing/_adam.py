"""Whether steps of an optimizer are Adam's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from tinydiff._checks import check_betas, check_number
from tinydiff.testing._asked import Function, answer_of, check_tolerance
from tinydiff.testing._steps import judge_steps, rows

__all__ = ["assert_adam"]

STEPS, WEIGHTS = 30, 33


def assert_adam(
    adam: Function,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``adam(weights, gradients)`` are the steps of Adam, or AdamW (docs: B.21).

    Parameters
    ----------
    adam : callable
        Takes weights (n,) and gradients (K, n), of which some are next to nothing and some are 0, and returns
        the weights after each of the K = 30 steps, (K, n).
    lr, betas, eps, weight_decay
        As in `tinydiff.Adam`: the settings of yours. The decay is decoupled, as in AdamW.
    asarray : callable
        As in `assert_q_sample`.
    tolerance : float
        The largest difference that passes, as a part of the furthest that each weight should have moved. In
        float32 give 1e-3.

    Raises
    ------
    AssertionError
        If the weights are others. The message says by how much and since when, and names the mistake that
        gives them, if it is known; also if `adam` writes into what it is given.
    ValueError
        If a setting is out of range.
    """
    check_tolerance(tolerance)
    for name, value in [("lr", lr), ("eps", eps)]:
        check_number(name, value, lambda value: 0 < value < math.inf, "a positive number")
    check_number("weight_decay", weight_decay, lambda decay: 0 <= decay < math.inf, "a number, not negative")
    check_betas(betas)
    rng = np.random.default_rng(0)
    weights = 100 * lr * rng.standard_normal(WEIGHTS)  # so that float32 has digits for how far they move
    # Of many sizes, from far below eps on; the last weight is met by one gradient alone, which comes late.
    gradients = rng.standard_normal((STEPS, WEIGHTS)) * np.logspace(-2, 6, WEIGHTS) * eps
    gradients[:, -1] = np.where(np.arange(STEPS) == STEPS // 2, 1.0, 0.0)
    given = {"weights": weights, "gradients": gradients}
    shape = gradients.shape
    came = answer_of(adam, "adam(weights, gradients)", given, asarray, shape, rows(shape))

    def path(**how: Any) -> np.ndarray:
        settings = dict(lr=lr, betas=betas, eps=eps, decay=weight_decay)
        return _path(weights, gradients, **{**settings, **how})

    mistakes = partial(_mistakes, path, betas, lr, weight_decay)
    judge_steps("adam", came, path(), weights, mistakes, tolerance, "Adam's (docs: B.21)")


def _path(
    weights: np.ndarray,
    gradients: np.ndarray,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    coupled: float = 0.0,
    first: int = 1,
    corrected: tuple[bool, bool] = (True, True),
    inside: bool = False,
    hat: bool = False,
    summed: bool = False,
    late: bool = False,
    largest: bool = False,
    of_m: bool = True,
    of_v: Function = np.sqrt,
    decayed_last: bool = False,
    at_rest: bool = False,
) -> np.ndarray:
    """The weights after each step, from the parts of Adam, one of which may be wrong."""
    w, m, v, top, found = weights, 0.0 * weights, 0.0 * weights, 0.0 * weights, []
    beta1, beta2 = betas
    for k, gradient in enumerate(gradients, first):
        g = gradient + coupled * w
        before = m, v
        moved = (g != 0) | (not at_rest)
        m = np.where(moved, beta1 * m + (1.0 if summed else 1 - beta1) * g, m)
        v = np.where(moved, beta2 * v + (1.0 if summed else 1 - beta2) * g**2, v)
        top = np.maximum(top, v)
        mean, square = before if late else (m, top if largest else v)
        of_1, of_2 = (1 - beta**k if on else 1.0 for beta, on in zip(betas, corrected, strict=True))
        root = of_v(square / of_2 + eps * inside) + eps * (not inside) * (1 / np.sqrt(of_2) if hat else 1.0)
        step = lr * (mean / of_1 if of_m else g) / root
        w = np.where(moved, w - step - lr * decay * (w - step * decayed_last), w)
        found.append(w)
    return np.array(found)


def _mistakes(path: Function, betas: tuple[float, float], lr: float, decay: float) -> dict[str, np.ndarray]:
    """Weights that are mistaken for the right ones; `path` makes them from the wrong part."""
    mistakes = {
        "the bias is corrected as after one step more": path(first=2),
        "no bias is corrected": path(corrected=(False, False)),
        "the bias of the first moment alone is corrected": path(corrected=(True, False)),
        "the bias of the second moment alone is corrected": path(corrected=(False, True)),
        "eps inside the root": path(inside=True),
        "eps beside the root before its bias is corrected, which is the paper's other eps": path(hat=True),
        "beta1 and beta2 exchanged": path(betas=betas[::-1]),
        "the second moment without its root": path(of_v=np.positive),
        "gradients and squares without their factors, 1 - beta": path(summed=True),
        "the moments before the gradient, not after it": path(late=True),
        "the largest second moment so far, which is AMSGrad": path(largest=True),
        "the gradient in the place of the first moment": path(of_m=False),
        "the gradient in the place of the first moment, and no bias is corrected: RMSprop": path(
            of_m=False, corrected=(False, False)
        ),
        "the first moment alone, without the second": path(of_v=np.ones_like, eps=0.0),
        "a weight rests while its gradient is 0, as in SparseAdam": path(at_rest=True),
        "up the gradient, not down": path(lr=-lr, decay=-decay),
    }
    if decay == 0:
        mistakes["a weight decay of 0.01, the default of PyTorch's AdamW"] = path(decay=0.01)
    else:
        mistakes |= {
            "no weight decay": path(decay=0.0),
            "the weight decay is in the gradient, as in PyTorch's Adam, not AdamW": path(
                decay=0.0, coupled=decay
            ),
            "the weight decay is not multiplied by lr, as in the paper of AdamW": path(decay=decay / lr),
            "the weight decay is that of the new weights": path(decayed_last=True),
        }
    return mistakes
