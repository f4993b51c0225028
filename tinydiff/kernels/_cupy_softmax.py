"""Softmax and its backward on a GPU, one launch each, in place: a warp has one row.  (docs: B.14)

For heads that are too wide for ``_cupy_attention.py``.
"""

from __future__ import annotations

from typing import Any

from tinydiff.kernels._cupy_compile import THREADS, compiled, kind_of

__all__ = ["softmax_backward_in_place", "softmax_in_place"]

WARP = 32

SOURCE = r"""
__device__ REAL sum_of_warp(REAL v) {
  for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(0xffffffffu, v, s);
  return v;
}

__device__ REAL largest_of_warp(REAL v) {
  for (int s = 16; s > 0; s /= 2) {
    REAL other = __shfl_xor_sync(0xffffffffu, v, s);
    v = other > v ? other : v;
  }
  return v;
}

extern "C" __global__ void softmax(REAL* x, long long rows, long long columns) {
  long long row = blockIdx.x * (long long)(THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp
  REAL* p = x + row * columns;
  int lane = threadIdx.x % 32;
  REAL largest = p[0], sum = 0;
  for (int b = lane; b < columns; b += 32) largest = p[b] > largest ? p[b] : largest;
  largest = largest_of_warp(largest);
  for (int b = lane; b < columns; b += 32) {
    REAL e = exp(p[b] - largest);
    p[b] = e;
    sum += e;
  }
  sum = sum_of_warp(sum);
  for (int b = lane; b < columns; b += 32) p[b] = p[b] / sum;
}

extern "C" __global__ void softmax_backward(const REAL* p_, REAL* dp_, long long rows, long long columns) {
  long long row = blockIdx.x * (long long)(THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const REAL* p = p_ + row * columns;
  REAL* dp = dp_ + row * columns;
  REAL sum = 0;
  for (int b = threadIdx.x % 32; b < columns; b += 32) sum += p[b] * dp[b];
  sum = sum_of_warp(sum);
  for (int b = threadIdx.x % 32; b < columns; b += 32) dp[b] = p[b] * (dp[b] - sum);
}
"""


def softmax_in_place(x: Any) -> Any:
    """Softmax of each row of x (..., L), contiguous; x is written over and returned."""
    return _by_rows("softmax", x, x)


def softmax_backward_in_place(p: Any, dp: Any) -> Any:
    """dx = p (dp - sum_k p_k dp_k), written over dp; both contiguous."""
    return _by_rows("softmax_backward", p, p, dp)


def _by_rows(name: str, x: Any, *arrays: Any) -> Any:
    if x.size:
        columns = x.shape[-1]
        rows = x.size // columns
        grid = (-(-rows // (THREADS // WARP)),)
        compiled(SOURCE, name, kind_of(x))(grid, (THREADS,), (*arrays, rows, columns))
    return arrays[-1]
