"""The U-Net of DDPM (Ho et al. 2020, appendix B), with its backward written out.

The same network, operation for operation and name for name, as diffusers' ``UNet2DModel``::

    x ─ conv_in ─┬─ down_blocks[0] ─┬─ … ─┬─ mid_block ─ up_blocks[0] ─ … ─ norm, SiLU ─ conv_out ─ y
                 └──────────────────┴─────┴── skips, last in first out ──┘
    t ─ sinusoids ─ time_embedding ─ + ─ SiLU ─→ into every residual block
    a class, if there are any ─ class_embedding ─┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, get_backend
from tinydiff.models._checks import check_like_model, check_times, check_told, plain
from tinydiff.nn import (
    ClassEmbedding,
    Conv2d,
    Downsample,
    GroupNorm,
    Module,
    ResnetBlock,
    SelfAttention,
    TimestepEmbedding,
    Upsample,
    concat,
    derivative_of,
    once,
    silu,
    sinusoidal_embedding,
)

__all__ = ["UNet", "misfit"]


class DownBlock(Module):
    """Residual blocks, each perhaps with attention, then a halving of the pixels unless it is the last level.

    Every result along the way is a skip for the up path.
    """

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[SelfAttention], downsamplers: list[Downsample]
    ) -> None:
        self.resnets = resnets
        self.attentions = attentions
        self.downsamplers = downsamplers

    def __call__(
        self, h: Array, emb: Array, rng: np.random.Generator | None
    ) -> tuple[list[Array], Callable[[Array, list[Array]], tuple[Array, Array]]]:
        """h (N, H, W, C)  ->  the results in order, the last of which goes on to the next level."""
        results = []
        backwards = []
        for index, resnet in enumerate(self.resnets):
            h, backward_resnet = resnet(h, emb, rng)
            h, backward_attention = self.attentions[index](h) if self.attentions else (h, None)
            results.append(h)
            backwards.append((backward_resnet, backward_attention))
        backward_down = None
        for downsample in self.downsamplers:
            h, backward_down = downsample(h)
            results.append(h)

        @once
        def backward(dh: Array, dskips: list[Array]) -> tuple[Array, Array]:
            """dh: from the next level; dskips: popped from the end, one per result.  Returns dh, demb."""
            demb: Array = 0.0
            if backward_down is not None:
                dh = backward_down(dh + dskips.pop())
            while backwards:
                backward_resnet, backward_attention = backwards.pop()
                dh = dh + dskips.pop()
                if backward_attention is not None:
                    dh = backward_attention(dh)
                dh, de = backward_resnet(dh)
                demb = demb + de
            return dh, demb

        return results, backward


class MidBlock(Module):
    """Residual block, attention (optional), residual block, at the fewest pixels."""

    def __init__(self, attentions: list[SelfAttention], resnets: list[ResnetBlock]) -> None:
        self.attentions = attentions
        self.resnets = resnets

    def __call__(
        self, h: Array, emb: Array, rng: np.random.Generator | None
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """h (N, H, W, C)  ->  (N, H, W, C)."""
        h, backward_0 = self.resnets[0](h, emb, rng)
        h, backward_attention = self.attentions[0](h) if self.attentions else (h, None)
        h, backward_1 = self.resnets[1](h, emb, rng)

        @once
        def backward(dh: Array) -> tuple[Array, Array]:
            dh, demb_1 = backward_1(dh)
            if backward_attention is not None:
                dh = backward_attention(dh)
            dh, demb_0 = backward_0(dh)
            return dh, demb_0 + demb_1

        return h, backward


class UpBlock(Module):
    """Residual blocks, each fed the stream and one skip, then a doubling of the pixels unless at the top."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[SelfAttention], upsamplers: list[Upsample]
    ) -> None:
        self.resnets = resnets
        self.attentions = attentions
        self.upsamplers = upsamplers

    def __call__(
        self, h: Array, skips: list[Array], emb: Array, rng: np.random.Generator | None
    ) -> tuple[Array, Callable[[Array], tuple[Array, list[Array], Array]]]:
        """h (N, H, W, C) and skips, popped from the end  ->  (N, 2H, 2W, D)."""
        backwards = []
        for index, resnet in enumerate(self.resnets):
            h, backward_concat = concat(h, skips.pop())
            h, backward_resnet = resnet(h, emb, rng)
            h, backward_attention = self.attentions[index](h) if self.attentions else (h, None)
            backwards.append((backward_concat, backward_resnet, backward_attention))
        backward_up = None
        for upsample in self.upsamplers:
            h, backward_up = upsample(h)

        @once
        def backward(dh: Array) -> tuple[Array, list[Array], Array]:
            """Returns dh, the gradients of the skips (the first used comes last) and demb."""
            dskips = []
            demb: Array = 0.0
            if backward_up is not None:
                dh = backward_up(dh)
            while backwards:
                backward_concat, backward_resnet, backward_attention = backwards.pop()
                if backward_attention is not None:
                    dh = backward_attention(dh)
                dh, de = backward_resnet(dh)
                dh, dskip = backward_concat(dh)
                dskips.append(dskip)
                demb = demb + de
            return dh, dskips, demb

        return h, backward


class UNet(Module):
    """DDPM's U-Net: predicts, from a noisy image x_t and its time t, an image of the same size.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the image and of the prediction.
    block_channels : sequence of int
        Channels at each level; every level but the last halves height and width.
    layers_per_block : int
        Residual blocks per level on the way down (one more on the way up).
    attention : sequence of bool
        For each level: self-attention after each of its residual blocks.
    mid_attention : bool
        Self-attention between the two residual blocks at the bottom.
    norm_groups : int
        Groups of every group normalisation; must divide every entry of `block_channels`.
    norm_eps : float
        eps of every group normalisation (the published DDPM checkpoints: 1e-6).
    head_dim : int or None
        Channels per attention head; None: a single head.
    dropout : float
        Dropout rate in [0, 1) inside the residual blocks; active only where `rng` is given to the call.
    downsample_padding : {0, 1}
        1: symmetric; 0: asymmetric (bottom and right), as in the published DDPM checkpoints.
    flip_sin_to_cos : bool
        Time embedding ``[cos, sin]`` (True) or ``[sin, cos]`` (False, the published DDPM checkpoints).
    freq_shift : float
        Frequency shift of the time embedding (the published DDPM checkpoints: 1).
    rng : numpy.random.Generator
        Draws the initial weights, in float32 on the host whatever the backend. Default: seed 0.
    backend : {"numpy", "cupy"}, optional
        Where the weights live. Default: ``TINYDIFF_BACKEND``.
    num_classes : int, optional
        How many classes the network can be told: each has a row of numbers, which is added to the time
        embedding, and so has "no class", which comes last. Default: it is told none.

    Raises
    ------
    ValueError
        If the sizes do not fit together; the message names the argument.
    TypeError
        If `rng` is not a generator.
    BackendError
        As `tinydiff.backend.get_backend`.

    Notes
    -----
    The function is that of diffusers' ``UNet2DModel``; the initial weights are Ho et al.'s (uniform with
    variance 1 / mean(fan_in, fan_out); the last layer of every residual branch, and of the network, zero).
    """

    recordable = True

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_channels: Sequence[int] = (32, 64, 64),
        layers_per_block: int = 1,
        attention: Sequence[bool] = (False, False, True),
        mid_attention: bool = True,
        norm_groups: int = 8,
        norm_eps: float = 1e-5,
        head_dim: int | None = 8,
        dropout: float = 0.0,
        downsample_padding: int = 1,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0.0,
        rng: np.random.Generator | None = None,
        backend: str | None = None,
        *,
        num_classes: int | None = None,
    ) -> None:
        for name, entries in (("block_channels", block_channels), ("attention", attention)):
            if np.ndim(entries) != 1:
                raise ValueError(f"{name} is {entries!r}; expected a sequence, one entry per level.")
        self.config: dict[str, Any] = plain(
            in_channels=in_channels,
            out_channels=out_channels,
            block_channels=block_channels,
            layers_per_block=layers_per_block,
            attention=[bool(a) for a in attention],
            mid_attention=mid_attention,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            head_dim=head_dim,
            dropout=dropout,
            downsample_padding=downsample_padding,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            **({} if num_classes is None else {"num_classes": num_classes}),
        )
        check_counts(in_channels=in_channels, out_channels=out_channels, layers_per_block=layers_per_block)
        check_counts(**{f"block_channels[{level}]": n for level, n in enumerate(block_channels)})
        optional = {"head_dim": head_dim, "num_classes": num_classes}
        check_counts(norm_groups=norm_groups, **{k: n for k, n in optional.items() if n is not None})
        for name in ("norm_eps", "dropout", "freq_shift"):
            if not isinstance(self.config[name], (int, float)):
                raise ValueError(f"{name} is {self.config[name]!r}; expected a number.")
        if found := misfit(self.config):
            name, expected = found
            raise ValueError(f"{name} is {self.config[name]!r}; expected {expected}.")
        xp = get_backend(backend)
        rng = np.random.default_rng(0) if rng is None else rng
        levels = len(block_channels)
        first, last = block_channels[0], block_channels[-1]
        emb_features = 4 * first

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, emb_features, norm_groups, norm_eps, dropout, rng)

        def attend(channels: int) -> SelfAttention:
            return SelfAttention(channels, head_dim, norm_groups, norm_eps, rng)

        self.conv_in = Conv2d(in_channels, first, 3, rng=rng)
        self.time_embedding = TimestepEmbedding(first, emb_features, rng)

        self.down_blocks = []
        skip_channels = [first]
        channels = first
        for level, c_out in enumerate(block_channels):
            resnets = [resnet(channels if i == 0 else c_out, c_out) for i in range(layers_per_block)]
            attentions = [attend(c_out) for _ in range(layers_per_block) if attention[level]]
            downs = [Downsample(c_out, downsample_padding, rng)] if level < levels - 1 else []
            self.down_blocks.append(DownBlock(resnets, attentions, downs))
            skip_channels += [c_out] * (len(resnets) + len(downs))
            channels = c_out

        self.mid_block = MidBlock(
            [attend(last)] if mid_attention else [], [resnet(last, last), resnet(last, last)]
        )

        self.up_blocks = []
        for level, c_out in reversed(list(enumerate(block_channels))):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(channels + skip_channels.pop(), c_out))
                channels = c_out
            attentions = [attend(c_out) for _ in resnets if attention[level]]
            ups = [Upsample(c_out, rng)] if level > 0 else []
            self.up_blocks.append(UpBlock(resnets, attentions, ups))

        self.conv_norm_out = GroupNorm(norm_groups, first, norm_eps, then_silu=True)
        self.conv_out = Conv2d(first, out_channels, 3, rng=rng, scale=0.0)
        self.class_embedding = None if num_classes is None else ClassEmbedding(num_classes, emb_features, rng)
        self.to(xp)

    def __call__(
        self, x: Array, t: Array, rng: np.random.Generator | None = None, labels: Array | None = None
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Predict, and return the derivative of the prediction.  (docs: B.18)

        Parameters
        ----------
        x : array of shape (N, H, W, in_channels)
            Noisy images; H and W divisible by 2 ** (levels - 1).
        t : array of shape (N,)
            Times.
        rng : numpy.random.Generator, optional
            Draws the dropout masks; without it nothing is dropped.
        labels : integer array of shape (N,), optional
            The classes, 0 … num_classes - 1; num_classes is "no class". Default: no class.

        Returns
        -------
        y : array of shape (N, H, W, out_channels)
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
        first = self.config["block_channels"][0]
        sinusoids = sinusoidal_embedding(
            t,
            first,
            like=x,
            flip_sin_to_cos=self.config["flip_sin_to_cos"],
            freq_shift=self.config["freq_shift"],
        )
        y, backward = self.run_embedded(x, sinusoids, rng, labels)
        return y, lambda dy: backward(dy)[0]

    def run_embedded(
        self,
        x: Array,
        sinusoids: Array,
        rng: np.random.Generator | None = None,
        labels: Array | None = None,
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Do as the call does, with an embedding (N, block_channels[0]) in place of the time's sinusoids.

        ``dx, dsinusoids = backward(dy)``: whatever else is in the embedding can be learned.
        """
        down_backwards = []
        up_backwards = []
        emb, backward_time = self.time_embedding(sinusoids)
        backward_class = None
        if self.class_embedding is not None:
            emb, backward_class = self.class_embedding(emb, labels)
        emb, backward_emb = silu(emb)  # every residual block begins with this same SiLU: taken once
        h, backward_in = self.conv_in(x)
        skips = [h]
        for down in self.down_blocks:
            results, back_down = down(skips[-1], emb, rng)
            skips += results
            down_backwards.append(back_down)
        h, backward_mid = self.mid_block(skips[-1], emb, rng)
        for up in self.up_blocks:
            h, back_up = up(h, skips, emb, rng)
            up_backwards.append(back_up)
        h, backward_norm = self.conv_norm_out(h)
        y, backward_out = self.conv_out(h)

        @derivative_of(y)
        def backward(dy: Array) -> tuple[Array, Array]:
            """Walk back: out, up (collecting the skips' gradients), mid, down (adding them in), in."""
            dh = backward_norm(backward_out(dy))
            dskips: list[Array] = []  # the last skip used on the way up was the first made: conv_in's
            demb: Array = 0.0
            while up_backwards:
                dh, ds, de = up_backwards.pop()(dh)
                dskips += ds
                demb = demb + de
            dh, de = backward_mid(dh)
            demb = demb + de
            while down_backwards:
                dh, de = down_backwards.pop()(dh, dskips)
                demb = demb + de
            demb = backward_emb(demb)
            if backward_class is not None:
                demb = backward_class(demb)
            return backward_in(dh + dskips.pop()), backward_time(demb)

        return y, backward

    def check_input(self, x: Array, t: Array, labels: Array | None = None) -> None:
        """Raise what the call would, before anything is computed."""
        check_like_model(self, "x", x)
        c = self.config["in_channels"]
        multiple = 2 ** (len(self.config["block_channels"]) - 1)
        if len(x.shape) != 4 or x.shape[3] != c or any(size < 1 or size % multiple for size in x.shape[1:3]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (N, H, W, {c}) with H and W divisible by {multiple}."
            )
        check_times(t, x)
        check_told(self, labels, x.shape[0])


def misfit(c: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first argument of `UNet` that does not fit, and what was expected; all are of the right types."""
    channels, groups, head_dim = c["block_channels"], c["norm_groups"], c["head_dim"]
    if not channels:
        return "block_channels", "at least one number of channels"
    if len(c["attention"]) != len(channels):
        return "attention", f"{len(channels)} entries, one per level"
    if groups < 1 or any(n % groups for n in channels):
        return "norm_groups", f"a divisor of the channels of every level, {channels}"
    attended = {n for n, is_attended in zip(channels, c["attention"], strict=True) if is_attended}
    attended |= {channels[-1]} if c["mid_attention"] else set()
    if head_dim is not None and attended and (head_dim < 1 or any(n % head_dim for n in attended)):
        return "head_dim", f"None, or a divisor of the channels with attention, {sorted(attended)}"
    if not c["norm_eps"] > 0.0:
        return "norm_eps", "a positive number"
    if not 0.0 <= c["dropout"] < 1.0:
        return "dropout", "a rate in [0, 1)"
    if c["downsample_padding"] not in (0, 1):
        return "downsample_padding", "0 or 1"
    if not c["freq_shift"] < max(channels[0] // 2, 1):
        return "freq_shift", f"less than half of the first level's channels, {channels[0]}, rounded down"
    return None
