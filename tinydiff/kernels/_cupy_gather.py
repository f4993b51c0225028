"""The rows of a convolution, laid out on a GPU in one launch without an index array.  (docs: A.4, B.7, B.8)

A thread copies one number, or, where channels and addresses allow, 16 bytes of them. `seen` and `reached` are
the lines of ``portable.py`` for one pixel and tap. An image whose pixels are to be doubled first (B.15) is
read at half its row and column.
"""

from __future__ import annotations

import math
from typing import Any

import cupy

from tinydiff.kernels import portable
from tinydiff.kernels._cupy_compile import THREADS, blocks_of, compiled, kind_of

__all__ = ["reached_rows", "seen_rows", "upsample_backward"]

SOURCE = r"""
struct __align__(sizeof(REAL) * PACK) Numbers { REAL of[PACK]; };

// Along an axis: where output (or, turned, input) p looks through tap i; below zero for nowhere.
__device__ int look(int p, int i, int size, int stride, int before, int turned, int doubled) {
  int at = turned ? p + before - i : stride * p + i - before;
  if (at < 0) return -1;
  if (turned) {
    if (at % stride) return -1;
    at /= stride;
  }
  at >>= doubled;
  return at < size ? at : -1;
}

extern "C" __global__ void windows(
    const Numbers* x, Numbers* rows, long long total, long long h_, long long w_, long long c_, long long a_,
    long long b_, long long k_, long long stride, long long before, long long turned, long long doubled) {
  unsigned e = blockIdx.x * THREADS + threadIdx.x;
  if (e >= total) return;
  unsigned h = h_, w = w_, c = c_, a = a_, b = b_, k = k_;
  unsigned channel = e % c, place = e / c;
  unsigned j = place % k, i = place / k % k, pixel = place / (k * k);
  unsigned q = pixel % b, p = pixel / b % a, n = pixel / (a * b);
  int r = look(p, i, h, stride, before, turned, doubled), s = look(q, j, w, stride, before, turned, doubled);
  Numbers found;
  if (r >= 0 && s >= 0) {
    found = x[((n * h + r) * w + s) * c + channel];
  } else {
    for (int of = 0; of < PACK; of++) found.of[of] = 0;
  }
  rows[e] = found;
}
"""


def seen_rows(x: Any, k: int, stride: int, padding: portable.Padding, doubled: bool = False) -> Any:
    """The pixels that each output of a convolution of x (N, H, W, C) sees: (N H' W', k k C).

    With `doubled` it is a convolution of `upsample(x)`.  (docs: B.7)
    """
    _, h, w, c = x.shape
    if (k, stride, *padding, doubled) == (1, 1, 0, 0, False):
        return cupy.ascontiguousarray(x).reshape(-1, c)
    a, b = (((size << doubled) + sum(padding) - k) // stride + 1 for size in (h, w))
    return _windows(x, (a, b), k, stride, padding, turned=False, doubled=doubled)


def reached_rows(dy: Any, sizes: tuple[int, int], k: int, stride: int, padding: portable.Padding) -> Any:
    """The outputs, of dy (N, H', W', D), that each input reaches: (N H W, k k D).  (docs: B.8)"""
    if (k, stride, *padding) == (1, 1, 0, 0):
        return cupy.ascontiguousarray(dy).reshape(-1, dy.shape[3])
    return _windows(dy, sizes, k, stride, padding, turned=True, doubled=False)


def _windows(
    x: Any, of: tuple[int, int], k: int, stride: int, padding: portable.Padding, turned: bool, doubled: bool
) -> Any:
    x = cupy.ascontiguousarray(x)
    n, h, w, c = x.shape
    rows = cupy.empty((n * of[0] * of[1], k * k * c), x.dtype)
    pack = math.gcd(c, 16 // x.itemsize)
    if x.data.ptr % 16:
        pack = 1
    total = rows.size // pack
    if total >= 2**31 or x.size // pack >= 2**32:
        raise MemoryError(
            f"a convolution's rows are {rows.size:,} numbers, of {x.size:,}: take a smaller batch."
        )
    if total:
        args = (x, rows, total, h, w, c // pack, *of, k, stride, padding[0], int(turned), int(doubled))
        compiled(SOURCE, "windows", kind_of(x), f"PACK={pack}")((blocks_of(total),), (THREADS,), args)
    return rows


_sum_of_four = cupy.ElementwiseKernel(
    "raw T dy, int64 w, int64 c",
    "T dx",
    """
    ptrdiff_t down = 2 * w * c, at = (i / c / w * 2 * w + i / c % w) * 2 * c + i % c;
    dx = (dy[at] + dy[at + down]) + (dy[at + c] + dy[at + down + c]);
    """,
    "tinydiff_sum_of_four",
)


def upsample_backward(dy: Any) -> Any:
    """As ``portable.upsample_backward``, in the same order.  (docs: B.15)"""
    n, h, w, c = dy.shape
    dx = cupy.empty((n, h // 2, w // 2, c), dy.dtype)
    return _sum_of_four(cupy.ascontiguousarray(dy), w // 2, c, dx) if dx.size else dx
