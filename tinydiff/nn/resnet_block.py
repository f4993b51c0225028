"""The residual block of the DDPM U-Net (Ho et al. 2020, appendix B)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn.conv import Conv2d
from tinydiff.nn.dropout import dropout
from tinydiff.nn.group_norm import GroupNorm
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module, derivative_of

__all__ = ["ResnetBlock"]


class ResnetBlock(Module):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(emb))))).

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before and after; where they differ the shortcut is a 1x1 convolution.
    emb_features : int
        Features of the activated time embedding `emb`.
    norm_groups : int
        Groups of both normalisations.
    norm_eps : float
        eps of both normalisations.
    dropout_rate : float
        Dropout before the second convolution, in [0, 1).
    rng : numpy.random.Generator
        Draws the initial weights; conv2 begins at zero, so that a new block is its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_features: int,
        norm_groups: int,
        norm_eps: float,
        dropout_rate: float,
        rng: np.random.Generator,
    ) -> None:
        self.dropout_rate = float(dropout_rate)  # `UNet` takes False for 0
        self.norm1 = GroupNorm(norm_groups, in_channels, norm_eps, then_silu=True)
        self.conv1 = Conv2d(in_channels, out_channels, 3, rng=rng)
        self.time_emb_proj = Linear(emb_features, out_channels, rng)
        self.norm2 = GroupNorm(norm_groups, out_channels, norm_eps, then_silu=True)
        self.conv2 = Conv2d(out_channels, out_channels, 3, rng=rng, scale=0.0)
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1, rng=rng) if in_channels != out_channels else None
        )

    def __call__(
        self, x: Array, emb: Array, rng: np.random.Generator | None = None
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """x (N, H, W, C), emb (N, E)  ->  y (N, H, W, D); `rng` draws dropout masks.  (docs: B.17)"""
        h, backward_norm1 = self.norm1(x)
        h, backward_conv1 = self.conv1(h)
        e, backward_emb = self.time_emb_proj(emb)
        h += e[:, None, None, :]
        h, backward_norm2 = self.norm2(h)
        h, backward_dropout = dropout(h, self.dropout_rate, rng)
        h, backward_conv2 = self.conv2(h)
        shortcut, backward_shortcut = (x, None) if self.conv_shortcut is None else self.conv_shortcut(x)

        @derivative_of(h)
        def backward(dy: Array) -> tuple[Array, Array]:
            """Returns dx and demb.  e was broadcast over the pixels: its gradient is a sum.  (docs: B.17)"""
            dh = backward_norm2(backward_dropout(backward_conv2(dy)))
            demb = backward_emb(kernels_for(dh).sum_pixels(dh))
            dx = backward_norm1(backward_conv1(dh))
            dx += dy if backward_shortcut is None else backward_shortcut(dy)
            return dx, demb

        h += shortcut
        return h, backward
