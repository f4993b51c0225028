"""Group normalisation, alone or with the SiLU that follows it, on a GPU: one launch forward, two backward.

A block of threads has one image and a few groups side by side, so that what it reads of a pixel fills a
sector of memory (32 bytes). Thread t has one channel of them, c = t mod width, and every rows-th pixel from
r = t div width on. It goes through its pixels three times: for the mean, for the variance of what is left
(docs: A.14), and to write; from the second time on they are in the cache. The backward goes through them
twice: for the sums, and to write.

Kept for the backward are the input, its mean and 1/sqrt(var + eps); the rest is computed again (docs: A.10,
A.11). The two means over a group are sums over its channels of weight times sums over pixels::

    sum g = sum_c w_c sum_p dz      sum g xhat = sum_c w_c sum_p dz xhat,     g = w dz

so the image's share of dbias and dweight comes with them; the second launch adds the images up. All sums
are in a fixed order: the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy

from tinydiff.kernels import portable
from tinydiff.kernels._cupy_compile import THREADS, compiled, kind_of
from tinydiff.kernels._cupy_sums import over_rows

__all__ = ["group_norm", "group_norm_backward", "group_norm_silu", "group_norm_silu_backward"]

SECTOR = 8  # channels of a block at least, if there are so many

SOURCE = r"""
__device__ int half_of(int n) {  // the largest power of two below n; 0 for 1
  int s = 1;
  while (2 * s < n) s *= 2;
  return n > 1 ? s : 0;
}

// What a thread knows of its place.
struct Place {
  int t, c, r, j, width, rows, per_group;
  __device__ Place(int width, int per_group) : t(threadIdx.x), width(width), per_group(per_group) {
    c = t % width;
    r = t / width;
    j = c % per_group;
    rows = THREADS / width;
  }
};

// Of one number a thread: the sum over the rows of threads, by channel.
__device__ REAL channel_sum(REAL* part, REAL value, const Place& at) {
  part[at.t] = value;
  __syncthreads();
  for (int s = half_of(at.rows); s > 0; s /= 2) {
    if (at.r < s && at.r + s < at.rows) part[at.t] += part[at.t + s * at.width];
    __syncthreads();
  }
  REAL sum = part[at.c];
  __syncthreads();
  return sum;
}

// Of one number a channel: the sum over the thread's group.
__device__ REAL group_sum(REAL* part, REAL value, const Place& at) {
  if (at.r == 0) part[at.c] = value;
  __syncthreads();
  for (int s = half_of(at.per_group); s > 0; s /= 2) {
    if (at.r == 0 && at.j < s && at.j + s < at.per_group) part[at.c] += part[at.c + s];
    __syncthreads();
  }
  REAL sum = part[at.c - at.j];
  __syncthreads();
  return sum;
}

extern "C" __global__ void group_norm(
    const REAL* x, const REAL* weight, const REAL* bias, REAL* y, REAL* means, REAL* rstds,
    long long pixels, long long channels, long long per_group, long long width, double eps, long long silu) {
  __shared__ REAL part[THREADS];
  Place at((int)width, (int)per_group);
  int packs = channels / width, n = blockIdx.x / packs, channel = blockIdx.x % packs * width + at.c;
  const REAL* from = x + (n * pixels * channels + channel);
  REAL* to = y + (n * pixels * channels + channel);
  int first = at.r < at.rows ? at.r : (int)pixels;  // a thread too many has no pixel
  REAL count = pixels * per_group, sum = 0;
#pragma unroll 8
  for (int p = first; p < pixels; p += at.rows) sum += from[p * channels];
  REAL mean = group_sum(part, channel_sum(part, sum, at), at) / count;
  sum = 0;
#pragma unroll 8
  for (int p = first; p < pixels; p += at.rows) {
    REAL centred = from[p * channels] - mean;
    sum += centred * centred;
  }
  REAL var = group_sum(part, channel_sum(part, sum, at), at) / count;
  REAL rstd = 1 / sqrt(var + (REAL)eps);
  if (at.r == 0 && at.j == 0) {
    means[(n * channels + channel) / per_group] = mean;
    rstds[(n * channels + channel) / per_group] = rstd;
  }
  REAL w = weight[channel], b = bias[channel];
#pragma unroll 8
  for (int p = first; p < pixels; p += at.rows) {
    REAL z = (from[p * channels] - mean) * rstd * w + b;
    to[p * channels] = silu ? z / (1 + exp(-z)) : z;
  }
}

// dz = dy silu'(z), silu' = s (1 + z (1 - s))
__device__ REAL through_silu(REAL dy, REAL z) {
  REAL s = 1 / (1 + exp(-z));
  return dy * (s * (1 + z * (1 - s)));
}

extern "C" __global__ void group_norm_backward(
    const REAL* x, const REAL* dy, const REAL* weight, const REAL* bias, const REAL* means,
    const REAL* rstds, REAL* dx, REAL* shares, long long images,
    long long pixels, long long channels, long long per_group, long long width, long long silu) {
  __shared__ REAL part[THREADS];
  Place at((int)width, (int)per_group);
  int packs = channels / width, n = blockIdx.x / packs, channel = blockIdx.x % packs * width + at.c;
  long long here = n * pixels * channels + channel;
  int first = at.r < at.rows ? at.r : (int)pixels;
  REAL mean = means[(n * channels + channel) / per_group], rstd = rstds[(n * channels + channel) / per_group];
  REAL w = weight[channel], b = bias[channel], sum = 0, sum_xhat = 0;
#pragma unroll 4
  for (int p = first; p < pixels; p += at.rows) {
    REAL xhat = (x[here + p * channels] - mean) * rstd, dz = dy[here + p * channels];
    if (silu) dz = through_silu(dz, xhat * w + b);
    sum += dz;
    sum_xhat += dz * xhat;
  }
  sum = channel_sum(part, sum, at);
  sum_xhat = channel_sum(part, sum_xhat, at);
  if (at.r == 0) {
    shares[n * channels + channel] = sum;
    shares[(images + n) * channels + channel] = sum_xhat;
  }
  REAL count = pixels * per_group;
  REAL mean_g = group_sum(part, w * sum, at) / count, mean_g_xhat = group_sum(part, w * sum_xhat, at) / count;
#pragma unroll 4
  for (int p = first; p < pixels; p += at.rows) {
    REAL xhat = (x[here + p * channels] - mean) * rstd, dz = dy[here + p * channels];
    if (silu) dz = through_silu(dz, xhat * w + b);
    dx[here + p * channels] = rstd * (w * dz - mean_g - xhat * mean_g_xhat);
  }
}
"""


class Normed(NamedTuple):
    """What the backward needs: input, means and 1/sqrt(var + eps) (N, G), bias, and whether SiLU followed."""

    x: Any
    mean: Any
    rstd: Any
    bias: Any
    silu: bool


def _width(channels: int, per_group: int) -> int:
    """Channels of a block: whole groups, a divisor of all, with `SECTOR` channels if there are so many."""
    groups = channels // per_group
    packed = next(
        k for k in range(1, groups + 1) if groups % k == 0 and (k * per_group >= SECTOR or k == groups)
    )
    return packed * per_group if packed * per_group <= THREADS else per_group


def _run(name: str, x: Any, width: int, args: tuple[Any, ...]) -> None:
    """A block for each image and `width` channels; with twice the threads where each has many pixels."""
    n, h, w, c = x.shape
    threads = THREADS if h * w * width < 16 * THREADS else 2 * THREADS
    compiled(SOURCE, name, kind_of(x), f"THREADS={threads}")((n * (c // width),), (threads,), args)


def _forward(x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> tuple[Any, Normed]:
    x, weight, bias = map(cupy.ascontiguousarray, (x, weight, bias))
    n, h, w, c = x.shape
    y = cupy.empty_like(x)
    mean, rstd = cupy.empty((2, n, groups), x.dtype)
    width = _width(c, c // groups)
    args = (x, weight, bias, y, mean, rstd, h * w, c, c // groups, width, float(eps), int(silu))
    _run("group_norm", x, width, args)
    return y, Normed(x, mean, rstd, bias, silu)


def _backward(saved: Normed, weight: Any, dy: Any) -> tuple[Any, Any, Any]:
    x = saved.x
    dy, weight = map(cupy.ascontiguousarray, (dy, weight))
    n, h, w, c = x.shape
    per_group = c // saved.mean.shape[1]
    dx, shares = cupy.empty_like(x), cupy.empty((2, n, c), x.dtype)
    width = _width(c, per_group)
    args = (x, dy, weight, saved.bias, saved.mean, saved.rstd, dx, shares, n, h * w, c, per_group, width)
    _run("group_norm_backward", x, width, (*args, int(saved.silu)))
    dbias, dweight = over_rows(shares)
    return dx, dweight, dbias


def _fits(x: Any, weight: Any, bias: Any, groups: int) -> bool:
    """Whether a group's channels have a thread each, and all numbers are of one kind."""
    return x.shape[3] // groups <= THREADS and x.size > 0 and x.dtype == weight.dtype == bias.dtype


def group_norm(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> tuple[Any, Any]:
    """As ``portable.group_norm``."""
    if not _fits(x, weight, bias, groups):
        return portable.group_norm(x, weight, bias, groups, eps)
    return _forward(x, weight, bias, groups, eps, silu=False)


def group_norm_backward(saved: Any, weight: Any, dy: Any) -> tuple[Any, Any, Any]:
    """As ``portable.group_norm_backward``."""
    if not isinstance(saved, Normed):
        return portable.group_norm_backward(saved, weight, dy)
    return _backward(saved, weight, dy)


def group_norm_silu(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> tuple[Any, Any]:
    """As ``portable.group_norm_silu``."""
    if not _fits(x, weight, bias, groups):
        return portable.group_norm_silu(x, weight, bias, groups, eps)
    return _forward(x, weight, bias, groups, eps, silu=True)


def group_norm_silu_backward(saved: Any, weight: Any, dy: Any) -> tuple[Any, Any, Any]:
    """As ``portable.group_norm_silu_backward``."""
    if not isinstance(saved, Normed):
        return portable.group_norm_silu_backward(saved, weight, dy)
    return _backward(saved, weight, dy)
