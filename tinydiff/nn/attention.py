"""Multi-head self-attention over the pixels of an image (Vaswani et al. 2017; Ho et al. 2020, appendix B)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, array_namespace
from tinydiff.kernels import kernels_for
from tinydiff.nn.group_norm import GroupNorm
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module, derivative_of

__all__ = ["SelfAttention"]


class SelfAttention(Module):
    """x + out(softmax(q k.T / sqrt(d)) v), with q, k, v linear in the group-normalised pixels.

    Parameters
    ----------
    channels : int
        Channels of the image.
    head_dim : int or None
        Channels d per head; must divide `channels`. None: one head over all channels.
    norm_groups : int
        Groups of the normalisation before attention.
    norm_eps : float
        eps of that normalisation.
    rng : numpy.random.Generator
        Draws the initial weights; the output projection begins at zero.

    Raises
    ------
    ValueError
        If a number is not a positive integer, or `head_dim` or `norm_groups` does not divide `channels`.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int | None,
        norm_groups: int,
        norm_eps: float,
        rng: np.random.Generator,
    ) -> None:
        head_dim = channels if head_dim is None else head_dim
        check_counts(channels=channels, head_dim=head_dim)
        if channels % head_dim:
            raise ValueError(f"head_dim = {head_dim} does not divide channels = {channels}.")
        self.head_dim = head_dim
        self.group_norm = GroupNorm(norm_groups, channels, norm_eps)
        self.to_q = Linear(channels, channels, rng)
        self.to_k = Linear(channels, channels, rng)
        self.to_v = Linear(channels, channels, rng)
        self.to_out = [Linear(channels, channels, rng, scale=0.0)]

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (N, H, W, C)  ->  y (N, H, W, C).  (docs: B.12)"""
        normed, norm_backward = self.group_norm(x)
        xp = array_namespace(x)
        kernels = kernels_for(x)
        n, h, w, c = x.shape
        d = self.head_dim

        def split(pixels: Array) -> Array:  # (N, L, C) -> (N, heads, L, d)
            return xp.permute_dims(xp.reshape(pixels, (n, h * w, c // d, d)), (0, 2, 1, 3))

        def merge(heads: Array) -> Array:  # (N, heads, L, d) -> (N, L, C)
            return xp.reshape(xp.permute_dims(heads, (0, 2, 1, 3)), (n, h * w, c))

        pixels = xp.reshape(normed, (n, h * w, c))
        q, q_backward = self.to_q(pixels)
        k, k_backward = self.to_k(pixels)
        v, v_backward = self.to_v(pixels)
        heads, saved = kernels.attention(split(q), split(k), split(v), 1.0 / math.sqrt(d))
        out, out_backward = self.to_out[0](merge(heads))

        y = xp.reshape(out, (n, h, w, c))
        y += x

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """Through the projection, the heads, and the projections before them.  (docs: B.13)"""
            do = split(out_backward(xp.reshape(dy, (n, h * w, c))))
            dq, dk, dv = kernels.attention_backward(saved, do)
            dpixels = q_backward(merge(dq))
            dpixels += k_backward(merge(dk))
            dpixels += v_backward(merge(dv))
            dx = norm_backward(xp.reshape(dpixels, (n, h, w, c)))
            dx += dy
            return dx

        return y, backward
