"""How a network is told the time: sinusoids of t (Vaswani et al. 2017, section 3.5), then a small MLP."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.backend import Array, array_namespace, asarray_like, constant_like, is_numpy_array
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module, derivative_of, keeping
from tinydiff.nn.silu import silu

__all__ = ["TimestepEmbedding", "shared_time", "sinusoidal_embedding"]

# Times 0 ... this - 1 are looked up on the host, where their sines would cost as much as a layer.
LARGEST_TABLE = 2**12


def shared_time(t: Array) -> Array:
    """`t`; in inference, where all times are the same, as a sampler's are, only one of them.  (docs: B.19)

    What a network makes of it is computed once then, and broadcast. On a device `t` is left as it is: to look
    at a time there is to wait for it.
    """
    shared = not keeping() and is_numpy_array(t) and t.size > 1 and (t == t[0]).all()
    return t[:1] if shared else t


def sinusoidal_embedding(
    t: Array,
    dim: int,
    *,
    like: Array,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Array:
    """Embed times as sines and cosines of geometrically spaced frequencies.  (docs: B.5)

    omega_k = max_period ** (-k / (half - freq_shift)),  k = 0 … half - 1,  half = dim // 2; the angles
    omega_k t are computed in float64 (at t = 1000 float32 angles would be wrong in the fifth digit) and cast
    at the end.

    Parameters
    ----------
    t : array of shape (N,)
        Times, integer or real.
    dim : int
        Length of an embedding; odd lengths end in a zero.
    like : array
        Decides library, device and dtype of the result.
    flip_sin_to_cos : bool
        True: ``[cos, sin]``, diffusers' default; False: ``[sin, cos]``, the published DDPM checkpoints.
    freq_shift : float
        0: the slowest frequency stops short of 1/max_period (diffusers' default); 1: it is exactly that
        (Ho et al. 2020).
    max_period : float
        The longest period, divided by 2 pi.

    Returns
    -------
    array of shape (N, dim)

    Raises
    ------
    ValueError
        If `t` has another shape, `dim` is not a positive integer, or `freq_shift` is not less than half:
        there is no such spacing.
    """
    check_counts(dim=dim)
    half = dim // 2
    if half and not freq_shift < half:
        raise ValueError(f"freq_shift is {freq_shift}; expected less than half of dim = {dim}, rounded down.")
    if is_numpy_array(like) and is_numpy_array(t) and t.dtype.kind in "iu" and t.ndim == 1 and t.size:
        last = int(t.max())
        if last < LARGEST_TABLE and t.min() >= 0:
            length = 1 << max(10, last.bit_length())
            table = _table(length, dim, like.dtype, flip_sin_to_cos, freq_shift, max_period)
            return table.take(t, axis=0)
    return _embed(t, dim, like, flip_sin_to_cos, freq_shift, max_period)


def _embed(
    t: Array, dim: int, like: Array, flip_sin_to_cos: bool, freq_shift: float, max_period: float
) -> Array:
    xp = array_namespace(like)
    omega = constant_like(_frequencies, dim // 2, freq_shift, max_period, like=like, dtype=xp.float64)
    times = asarray_like(t, like, xp.float64)
    if times.ndim != 1:  # (N, 1), say, would come out as (N, 2, ...)
        raise ValueError(f"t has shape {tuple(times.shape)}; expected (N,).")
    times = times[:, None]
    angles = times * omega[None, :]
    sin, cos = xp.sin(angles), xp.cos(angles)
    parts = [cos, sin] if flip_sin_to_cos else [sin, cos]
    if dim % 2:
        parts.append(xp.zeros_like(times))
    return xp.astype(xp.concat(parts, axis=1), like.dtype)


def _frequencies(half: int, freq_shift: float, max_period: float) -> np.ndarray:
    """omega_k, (half,)."""
    return np.exp(-math.log(max_period) * np.arange(half) / (half - freq_shift))


@functools.lru_cache(maxsize=8)
def _table(length: int, dim: int, dtype: np.dtype, *settings: Any) -> np.ndarray:
    """The embeddings of the times 0 ... length - 1: a row is what `_embed` returns, to the last bit."""
    table = _embed(np.arange(length), dim, np.empty(0, dtype), *settings)
    table.flags.writeable = False
    return table


class TimestepEmbedding(Module):
    """linear_2(silu(linear_1(embedding))): from `dim` sinusoids to `out_features` numbers.

    Parameters
    ----------
    dim, out_features : int
        Sizes of the last axis before and after.
    rng : numpy.random.Generator
        Draws the initial weights.
    """

    def __init__(self, dim: int, out_features: int, rng: np.random.Generator) -> None:
        self.linear_1 = Linear(dim, out_features, rng)
        self.linear_2 = Linear(out_features, out_features, rng)

    def __call__(self, embedding: Array) -> tuple[Array, Callable[[Array], Array]]:
        """(N, dim)  ->  (N, out_features).  (docs: B.6)"""
        h, backward_1 = self.linear_1(embedding)
        h, backward_silu = silu(h)
        y, backward_2 = self.linear_2(h)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            return backward_1(backward_silu(backward_2(dy)))

        return y, backward
