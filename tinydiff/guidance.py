"""Classifier-free guidance: further toward a class than the network, asked for it, would go."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts, check_labels, check_number
from tinydiff.backend import Array, array_namespace, device, integers_like, is_numpy_array
from tinydiff.diffusion import GaussianDiffusion, check_diffusion

__all__ = ["guided"]


def guided(
    denoise: Callable[..., Array],
    diffusion: GaussianDiffusion,
    labels: Array,
    guidance_scale: float,
    num_classes: int,
) -> Callable[[Array, Array], Array]:
    """denoise(x, t) of a network that is told classes: w times as far toward them.  (docs: R.15)

    With f(x) the prediction without a class, f(x, y) that with it, and w the scale,

        f_w(x, y) = f(x) + w (f(x, y) - f(x))

    (Ho & Salimans 2022, eq. 6, whose w is this one less 1). At w = 0 and 1 it is one of the two, and only
    that is asked for; else both are, in one batch of twice the size. A learned variance is that of f(x, y).

    Parameters
    ----------
    denoise : callable
        ``denoise(x, t, labels=labels)``: the ``predict`` of a `UNet` or an `MLP` with classes, say.
    diffusion : GaussianDiffusion
        Its variance says whether the network returns one.
    labels : integer array of shape (N,)
        The class of each sample of a call, 0 … num_classes; num_classes is "no class".
    guidance_scale : float
        w, any finite number.
    num_classes : int
        What tells the network that there is no class.

    Returns
    -------
    callable
        ``(x, t) -> prediction``, for N samples.

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`, or `labels` is not an array of integers.
    ValueError
        If `num_classes`, a label or the scale is out of range; at a call, unless x has N samples.
    """
    check_diffusion(diffusion)
    check_counts(num_classes=num_classes)
    check_labels(labels, num_classes + 1)
    check_number("guidance_scale", guidance_scale, math.isfinite, "a finite number")
    if is_numpy_array(labels):
        labels = labels.astype(np.int64)
    w = float(guidance_scale)

    def mixed(x: Array, t: Array) -> Array:
        check_labels(labels, num_classes + 1, x.shape[0])
        xp = array_namespace(x)
        told = integers_like(labels, x) if is_numpy_array(labels) else labels
        untold = xp.full(x.shape[0], num_classes, dtype=told.dtype, device=device(x))
        if w in (0.0, 1.0):
            return denoise(x, t, labels=told if w else untold)
        both = denoise(
            xp.concat([x, x], axis=0), xp.concat([t, t], axis=0), labels=xp.concat([untold, told], axis=0)
        )
        N = x.shape[0]
        (without, _), (with_class, nu) = (
            diffusion.split_output(x, part) for part in (both[:N, ...], both[N:, ...])
        )
        prediction = without + w * (with_class - without)
        return prediction if nu is None else xp.concat([prediction, nu], axis=-1)

    return mixed
