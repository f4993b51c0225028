"""A time-conditioned residual MLP, for points in the plane (or in any few dimensions)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, get_backend
from tinydiff.models._checks import check_like_model, check_times, check_told, plain
from tinydiff.nn import (
    ClassEmbedding,
    Linear,
    Module,
    TimestepEmbedding,
    derivative_of,
    silu,
    sinusoidal_embedding,
)
from tinydiff.nn.time_embedding import shared_time

__all__ = ["MLP"]


class ResidualBlock(Module):
    """h + linear_2(silu(linear_1(silu(h)) + time_emb_proj(emb))).

    Unlike the U-Net's, it does not begin as the identity. The network's last layer begins at zero, and if the
    blocks did so, too, only features of x without t would be left to learn from. For predicting v of eight
    Gaussians on a circle these happen to be of no use: the loss stayed at 1.00 for 3000 steps.
    """

    def __init__(self, features: int, emb_features: int, rng: np.random.Generator) -> None:
        self.linear_1 = Linear(features, features, rng)
        self.time_emb_proj = Linear(emb_features, features, rng)
        self.linear_2 = Linear(features, features, rng)

    def __call__(self, h: Array, emb: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """h (N, F), emb (N, E), in inference also (1, E)  ->  (N, F).  (docs: B.19)

        An array that a layer or its backward returns, and that nobody keeps, is added to in place: no new
        array, no new memory to go through.
        """
        r, backward_silu_1 = silu(h)
        r, backward_1 = self.linear_1(r)
        a, backward_emb = self.time_emb_proj(emb)
        r += a
        r, backward_silu_2 = silu(r)
        r, backward_2 = self.linear_2(r)

        @derivative_of(r)
        def backward(dy: Array) -> tuple[Array, Array]:
            da = backward_silu_2(backward_2(dy))
            dh = backward_silu_1(backward_1(da))
            dh += dy
            return dh, backward_emb(da)

        r += h
        return r, backward


class MLP(Module):
    """Predicts, from noisy points x_t and their times t, points of the same dimension.

    Parameters
    ----------
    in_features : int
        Dimension D of the points.
    out_features : int, optional
        Dimension of the prediction. Default: `in_features`.
    hidden : int
        Width of the residual stream.
    blocks : int
        Number of residual blocks.
    time_features : int
        Number of sinusoids in the time embedding, and of the features that each block sees of it.
    rng : numpy.random.Generator
        Draws the initial weights, in float32 on the host whatever the backend. Default: seed 0.
    backend : {"numpy", "cupy"}, optional
        Where the weights live. Default: ``TINYDIFF_BACKEND``.
    num_classes : int, optional
        How many classes the network can be told, as for `UNet`. Default: it is told none.

    Raises
    ------
    ValueError
        If a size is not positive; the message names the argument.
    TypeError
        If `rng` is not a generator.
    BackendError
        As `tinydiff.backend.get_backend`.
    """

    recordable = True

    def __init__(
        self,
        in_features: int = 2,
        out_features: int | None = None,
        hidden: int = 128,
        blocks: int = 3,
        time_features: int = 64,
        rng: np.random.Generator | None = None,
        backend: str | None = None,
        *,
        num_classes: int | None = None,
    ) -> None:
        out_features = in_features if out_features is None else out_features
        self.config: dict[str, Any] = plain(
            in_features=in_features,
            out_features=out_features,
            hidden=hidden,
            blocks=blocks,
            time_features=time_features,
            **({} if num_classes is None else {"num_classes": num_classes}),
        )
        check_counts(**self.config)
        xp = get_backend(backend)
        rng = np.random.default_rng(0) if rng is None else rng
        self.linear_in = Linear(in_features, hidden, rng)
        self.time_embedding = TimestepEmbedding(time_features, time_features, rng)
        self.blocks = [ResidualBlock(hidden, time_features, rng) for _ in range(blocks)]
        self.linear_out = Linear(hidden, out_features, rng, scale=0.0)
        self.class_embedding = (
            None if num_classes is None else ClassEmbedding(num_classes, time_features, rng)
        )
        self.to(xp)

    def __call__(
        self, x: Array, t: Array, rng: np.random.Generator | None = None, labels: Array | None = None
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Predict, and return the derivative of the prediction.  (docs: B.19)

        Parameters
        ----------
        x : array of shape (N, in_features)
            Noisy points.
        t : array of shape (N,)
            Times.
        rng : numpy.random.Generator, optional
            Not used: this network draws nothing. It is taken so that every model is called alike.
        labels : integer array of shape (N,), optional
            The classes, 0 … num_classes - 1; num_classes is "no class". Default: no class.

        Returns
        -------
        y : array of shape (N, out_features)
        backward : callable
            ``dx = backward(dy)``; adds to every parameter's gradient. To be called at most once.

        Raises
        ------
        ValueError
            If the shape of `x`, `t` or `labels` does not fit, `x` is not of the weights' library and dtype, a
            label (on the host) is of no class, or there are labels and no classes.
        TypeError
            If `x`, `t` or `labels` is not an array, or the labels are not integers.
        """
        self.check_input(x, t, labels)
        sinusoids = sinusoidal_embedding(shared_time(t), self.config["time_features"], like=x)
        emb, backward_time = self.time_embedding(sinusoids)
        backward_class = None
        if self.class_embedding is not None:
            emb, backward_class = self.class_embedding(emb, labels)
        emb, backward_emb = silu(emb)
        h, backward_in = self.linear_in(x)
        backwards = []
        for block in self.blocks:
            h, back = block(h, emb)
            backwards.append(back)
        h, backward_silu = silu(h)
        y, backward_out = self.linear_out(h)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            dh = backward_silu(backward_out(dy))
            dh, demb = backwards.pop()(dh)
            while backwards:
                dh, de = backwards.pop()(dh)
                demb += de
            demb = backward_emb(demb)
            if backward_class is not None:
                demb = backward_class(demb)
            backward_time(demb)
            return backward_in(dh)

        return y, backward

    def check_input(self, x: Array, t: Array, labels: Array | None = None) -> None:
        """Raise what the call would, before anything is computed."""
        check_like_model(self, "x", x)
        if len(x.shape) != 2 or x.shape[1] != self.config["in_features"]:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, {self.config['in_features']}).")
        check_times(t, x)
        check_told(self, labels, x.shape[0])
