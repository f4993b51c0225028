"""Group normalisation (Wu & He 2018)."""

from __future__ import annotations

from collections.abc import Callable

from tinydiff._checks import check_counts, check_images
from tinydiff.backend import Array
from tinydiff.kernels import kernels_for
from tinydiff.nn import init
from tinydiff.nn.module import Module, derivative_of

__all__ = ["GroupNorm"]


class GroupNorm(Module):
    """Each group of channels of each image: mean 0, variance 1; then a gain and a bias per channel.

    Parameters
    ----------
    groups : int
        Number of groups; must divide `channels`.
    channels : int
        Channels of the input.
    eps : float
        Added to the variance.
    then_silu : bool
        Apply SiLU to the result: the two are one kernel, which passes over the image once.

    Raises
    ------
    ValueError
        If a number is not a positive integer, or `groups` does not divide `channels`.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, then_silu: bool = False) -> None:
        check_counts(norm_groups=groups, channels=channels)
        if channels % groups:
            raise ValueError(f"norm_groups = {groups} does not divide channels = {channels}.")
        self.groups = groups
        self.eps = eps
        self.then_silu = then_silu
        self.weight = init.ones(channels)
        self.bias = init.zeros(channels)

    def __call__(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x (N, H, W, C)  ->  y (N, H, W, C).  (docs: B.10)"""
        kernels = kernels_for(x)
        weight = self.weight.value
        check_images(x, weight.shape[0])
        if self.then_silu:
            forward, derivative = kernels.group_norm_silu, kernels.group_norm_silu_backward
        else:
            forward, derivative = kernels.group_norm, kernels.group_norm_backward
        y, saved = forward(x, weight, self.bias.value, self.groups, self.eps)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """dx: remove from dy what the mean and the variance took.  (docs: B.11)"""
            dx, dweight, dbias = derivative(saved, weight, dy)
            self.weight.accumulate(dweight)
            self.bias.accumulate(dbias)
            return dx

        return y, backward
