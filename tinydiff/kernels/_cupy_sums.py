"""Sums over rows on a GPU, in a fixed order: one launch for a few rows, two for many.

A block has up to 32 columns side by side, and a share of the rows; its threads' sums meet as a tree. Where
the rows are shared out between blocks, a second launch adds the shares up. (CuPy's own sum over the first
axis of a tall array keeps only as many blocks busy as there are columns.)
"""

from __future__ import annotations

from typing import Any

import cupy

from tinydiff.kernels._cupy_compile import THREADS, compiled, kind_of

__all__ = ["over_rows"]

COLUMNS = 32  # of a block: a warp reads them at once
FEWEST = 512  # rows that are worth a block
MOST = 128  # shares of the rows

SOURCE = r"""
extern "C" __global__ void over_rows(
    const REAL* x, REAL* y, long long rows, long long columns, long long width, long long shares) {
  __shared__ REAL part[THREADS];
  int lanes = THREADS / width, t = threadIdx.x, lane = t / width, packs = (columns + width - 1) / width;
  long long pack = blockIdx.x % packs, share = blockIdx.x / packs % shares;
  long long which = blockIdx.x / packs / shares;
  long long column = pack * width + t % width, each = (rows + shares - 1) / shares;
  long long start = share * each, stop = start + each < rows ? start + each : rows;
  REAL sum = 0;
  if (lane < lanes && column < columns) {
    const REAL* from = x + which * rows * columns + column;
#pragma unroll 8
    for (long long r = start + lane; r < stop; r += lanes) sum += from[r * columns];
  }
  part[t] = sum;
  __syncthreads();
  int s = 1;
  while (2 * s < lanes) s *= 2;
  for (s = lanes > 1 ? s : 0; s > 0; s /= 2) {
    if (lane < s && lane + s < lanes) part[t] += part[t + s * width];
    __syncthreads();
  }
  if (lane == 0 && column < columns) y[(which * shares + share) * columns + column] = part[t];
}
"""


def over_rows(x: Any) -> Any:
    """Sum over the last axis but one: (..., R, C)  ->  (..., C)."""
    x = cupy.ascontiguousarray(x)
    *lead, rows, columns = x.shape
    if x.size == 0:
        return cupy.sum(x, axis=-2)
    width = min(columns, COLUMNS)
    packs = -(-columns // width)
    many = x.size // (rows * columns)
    shares = 1 if many * packs >= COLUMNS else max(1, min(MOST, rows // FEWEST))
    y = cupy.empty((*lead, shares, columns), x.dtype)
    args = (x, y, rows, columns, width, shares)
    compiled(SOURCE, "over_rows", kind_of(x))((packs * shares * many,), (THREADS,), args)
    return over_rows(y) if shares > 1 else cupy.reshape(y, (*lead, columns))
