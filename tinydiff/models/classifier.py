"""A small convolutional classifier, whose features measure how far generated digits are from real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, array_namespace, get_backend
from tinydiff.models._checks import check_like_model, plain
from tinydiff.nn import Conv2d, GroupNorm, Linear, Module, derivative_of, inference, once

__all__ = ["Classifier"]


class Classifier(Module):
    """3x3 convolutions, GroupNorm and SiLU, halving the image from the second on; mean over pixels; affine.

    Parameters
    ----------
    in_channels : int
        Channels of the images.
    classes : int
        Number of classes K.
    channels : sequence of int
        Channels after each convolution; the last is the number of features.
    norm_groups : int
        Groups of every normalisation; divides every entry of `channels`.
    rng : numpy.random.Generator
        Draws the initial weights, in float32 on the host whatever the backend. Default: seed 0.
    backend : {"numpy", "cupy"}, optional
        Where the weights live. Default: ``TINYDIFF_BACKEND``.

    Raises
    ------
    ValueError
        If a size does not fit; the message names the argument.
    TypeError
        If `rng` is not a generator.
    BackendError
        As `tinydiff.backend.get_backend`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        channels: Sequence[int] = (16, 32, 64, 64),
        norm_groups: int = 8,
        rng: np.random.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        if len(channels) < 1:
            raise ValueError("channels is empty; expected at least one number of channels.")
        check_counts(in_channels=in_channels, classes=classes, channels=min(channels))
        self.config: dict[str, Any] = plain(
            in_channels=in_channels, classes=classes, channels=channels, norm_groups=norm_groups
        )
        xp = get_backend(backend)
        rng = np.random.default_rng(0) if rng is None else rng
        before = [in_channels, *channels[:-1]]
        self.convs = [
            Conv2d(c, d, 3, rng=rng, stride=1 if level == 0 else 2)
            for level, (c, d) in enumerate(zip(before, channels, strict=True))
        ]
        self.norms = [GroupNorm(norm_groups, c, then_silu=True) for c in channels]
        self.linear = Linear(channels[-1], classes, rng)
        self.to(xp)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Classify, and return the derivative of the logits.

        Parameters
        ----------
        x : array of shape (N, H, W, in_channels)
            Images in [-1, 1].

        Returns
        -------
        logits : array of shape (N, classes)
            Their softmax is the probability of each class.
        backward : callable
            ``dx = backward(dlogits)``; adds to every parameter's gradient. To be called at most once.

        Raises
        ------
        ValueError
            If the shape of `x` does not fit, or it is not of the weights' library and dtype.
        TypeError
            If `x` is not an array.
        """
        features, backward_features = self._features(x)
        logits, backward_linear = self.linear(features)

        @derivative_of(logits)
        def backward(dlogits: Array) -> Array:
            return backward_features(backward_linear(dlogits))

        return logits, backward

    def features(self, x: Array) -> Array:
        """Return what the last layer sees, (N, channels[-1]); argument and errors as in the call."""
        with inference():
            return self._features(x)[0]

    def _features(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        check_like_model(self, "x", x)
        backwards = []
        h = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h, backward_conv = conv(h)
            h, backward_norm = norm(h)
            backwards += [backward_conv, backward_norm]
        h, backward_mean = _mean_over_pixels(h)

        @once
        def backward(dy: Array) -> Array:
            dh = backward_mean(dy)
            while backwards:
                dh = backwards.pop()(dh)
            return dh

        return h, backward


def _mean_over_pixels(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """x (N, H, W, C)  ->  y (N, C), the mean over rows and columns; dx = dy / (H W) at every pixel."""
    xp = array_namespace(x)
    shape = x.shape

    @once
    def backward(dy: Array) -> Array:
        share = xp.reshape(dy, (shape[0], 1, 1, shape[3])) / math.prod(shape[1:3])
        return xp.asarray(xp.broadcast_to(share, shape), copy=True)  # kernels expect memory of its own

    return xp.mean(x, axis=(1, 2)), backward
