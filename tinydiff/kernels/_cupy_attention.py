"""Attention with narrow heads on a GPU: a launch forward, two backward, no matrix of scores.  (docs: B.12)

With eight channels a head the scores are many times what they are computed from, so they are never written: a
thread has one query and goes through the keys, which a block reads together, 64 at a time. It keeps the
largest score so far, m, and sum exp(s - m); when a larger one comes, its sums are scaled to that (Milakov &
Gimelshein 2018; docs: A.31). Kept for the backward are m and the sum's inverse:
p_ab = exp(s_ab - m_a) / sum_a.

Backward, by B.13 and B.14 (sum_b p_ab dp_ab = do_a . o_a): a thread has one query, for dq, or one key, for dk
and dv. Nothing is added up between blocks: the same call gives the same bits.

Heads lie side by side in each pixel, as the layers have them, so nothing is copied: (N, L, heads, d).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy

from tinydiff.kernels._cupy_compile import compiled, kind_of

__all__ = ["WIDEST", "Attended", "attention", "attention_backward"]

WIDEST = 32  # channels of a head: they are a thread's registers
BLOCK = 64  # threads, queries or keys of a block

SOURCE = r"""
#define BLOCK 64

// Where a thread is: its image and head, and its row of them.
struct Place {
  long long base, row, step;
  int t;
  __device__ Place(long long heads, long long length) : step(heads * DIM), t(threadIdx.x) {
    long long tiles = (length + BLOCK - 1) / BLOCK, tile = blockIdx.x % tiles, which = blockIdx.x / tiles;
    base = which / heads * length * heads * DIM + which % heads * DIM;
    row = tile * BLOCK + t;
  }
};

__device__ REAL dot(const REAL* a, const REAL* b) {
  REAL sum = 0;
#pragma unroll
  for (int e = 0; e < DIM; e++) sum += a[e] * b[e];
  return sum;
}

// A row of DIM numbers, or zeros past the end.
__device__ void read(REAL* to, const REAL* from, const Place& at, long long row, long long length) {
#pragma unroll
  for (int e = 0; e < DIM; e++) to[e] = row < length ? from[at.base + row * at.step + e] : (REAL)0;
}

// The next BLOCK rows, by all threads.
__device__ void read_tile(REAL* to, const REAL* from, const Place& at, long long first, long long length) {
  for (int e = at.t; e < BLOCK * DIM; e += BLOCK) {
    long long row = first + e / DIM;
    to[e] = row < length ? from[at.base + row * at.step + e % DIM] : (REAL)0;
  }
}

extern "C" __global__ void attention(
    const REAL* q, const REAL* k, const REAL* v, REAL* o, REAL* largest, REAL* inverse, long long heads,
    long long length, double scale) {
  __shared__ REAL K[BLOCK * DIM], V[BLOCK * DIM];
  Place at(heads, length);
  REAL mine[DIM], out[DIM], m = 0, sum = 0;
  read(mine, q, at, at.row, length);
  for (int e = 0; e < DIM; e++) out[e] = 0;
  for (long long first = 0; first < length; first += BLOCK) {
    read_tile(K, k, at, first, length);
    read_tile(V, v, at, first, length);
    __syncthreads();
    int count = length - first < BLOCK ? length - first : BLOCK;
    for (int j = 0; j < count; j++) {
      REAL s = (REAL)scale * dot(mine, K + j * DIM);
      if (s > m || (first == 0 && j == 0)) {
        REAL less = first == 0 && j == 0 ? (REAL)0 : exp(m - s);
        sum *= less;
#pragma unroll
        for (int e = 0; e < DIM; e++) out[e] *= less;
        m = s;
      }
      REAL p = exp(s - m);
      sum += p;
#pragma unroll
      for (int e = 0; e < DIM; e++) out[e] += p * V[j * DIM + e];
    }
    __syncthreads();
  }
  if (at.row >= length) return;
  for (int e = 0; e < DIM; e++) o[at.base + at.row * at.step + e] = out[e] / sum;
  largest[at.base / DIM + at.row * heads] = m;
  inverse[at.base / DIM + at.row * heads] = 1 / sum;
}

extern "C" __global__ void attention_dq(
    const REAL* q, const REAL* k, const REAL* v, const REAL* o, const REAL* d_o, const REAL* largest,
    const REAL* inverse, REAL* dq, long long heads, long long length, double scale) {
  __shared__ REAL K[BLOCK * DIM], V[BLOCK * DIM];
  Place at(heads, length);
  REAL mine[DIM], mine_do[DIM], sum[DIM], m = 0, over = 0;
  read(sum, o, at, at.row, length);
  read(mine, q, at, at.row, length);
  read(mine_do, d_o, at, at.row, length);
  REAL mean = dot(mine_do, sum);  // of dp, under the weights p
  if (at.row < length) {
    m = largest[at.base / DIM + at.row * heads];
    over = inverse[at.base / DIM + at.row * heads];
  }
  for (int e = 0; e < DIM; e++) sum[e] = 0;
  for (long long first = 0; first < length; first += BLOCK) {
    read_tile(K, k, at, first, length);
    read_tile(V, v, at, first, length);
    __syncthreads();
    int count = length - first < BLOCK ? length - first : BLOCK;
    for (int j = 0; j < count; j++) {
      REAL p = exp((REAL)scale * dot(mine, K + j * DIM) - m) * over;
      REAL ds = p * (dot(mine_do, V + j * DIM) - mean);
#pragma unroll
      for (int e = 0; e < DIM; e++) sum[e] += ds * K[j * DIM + e];
    }
    __syncthreads();
  }
  if (at.row >= length) return;
  for (int e = 0; e < DIM; e++) dq[at.base + at.row * at.step + e] = (REAL)scale * sum[e];
}

extern "C" __global__ void attention_dk_dv(
    const REAL* q, const REAL* k, const REAL* v, const REAL* o, const REAL* d_o, const REAL* largest,
    const REAL* inverse, REAL* dk, REAL* dv, long long heads, long long length, double scale) {
  __shared__ REAL Q[BLOCK * DIM], DO[BLOCK * DIM], means[BLOCK], ms[BLOCK], overs[BLOCK];
  Place at(heads, length);
  REAL mine_k[DIM], mine_v[DIM], sum_k[DIM], sum_v[DIM];
  read(mine_k, k, at, at.row, length);
  read(mine_v, v, at, at.row, length);
  for (int e = 0; e < DIM; e++) sum_k[e] = sum_v[e] = 0;
  for (long long first = 0; first < length; first += BLOCK) {
    read_tile(Q, q, at, first, length);
    read_tile(DO, d_o, at, first, length);
    __syncthreads();
    long long query = first + at.t;
    if (query < length) {
      REAL mean = 0;
      for (int e = 0; e < DIM; e++) mean += DO[at.t * DIM + e] * o[at.base + query * at.step + e];
      means[at.t] = mean;
      ms[at.t] = largest[at.base / DIM + query * heads];
      overs[at.t] = inverse[at.base / DIM + query * heads];
    }
    __syncthreads();
    int count = length - first < BLOCK ? length - first : BLOCK;
    for (int i = 0; i < count; i++) {
      REAL p = exp((REAL)scale * dot(mine_k, Q + i * DIM) - ms[i]) * overs[i];
      REAL ds = p * (dot(mine_v, DO + i * DIM) - means[i]);
#pragma unroll
      for (int e = 0; e < DIM; e++) {
        sum_v[e] += p * DO[i * DIM + e];
        sum_k[e] += ds * Q[i * DIM + e];
      }
    }
    __syncthreads();
  }
  if (at.row >= length) return;
  for (int e = 0; e < DIM; e++) {
    dk[at.base + at.row * at.step + e] = (REAL)scale * sum_k[e];
    dv[at.base + at.row * at.step + e] = sum_v[e];
  }
}
"""


class Attended(NamedTuple):
    """What the backward needs, (N, L, heads, d): q, k, v and o; of each row its largest score and 1 / sum."""

    q: Any
    k: Any
    v: Any
    o: Any
    largest: Any
    inverse: Any
    scale: float


def _by_pixel(x: Any) -> Any:
    """(N, heads, L, d)  ->  (N, L, heads, d), contiguous: as the layers have it, and then no copy."""
    return cupy.ascontiguousarray(x.transpose(0, 2, 1, 3))


def _by_head(x: Any) -> Any:
    return x.transpose(0, 2, 1, 3)


def _run(name: str, x: Any, args: tuple[Any, ...], scale: float) -> None:
    n, length, heads, d = x.shape
    grid = (-(-length // BLOCK) * heads * n,)
    compiled(SOURCE, name, kind_of(x), f"DIM={d}")(grid, (BLOCK,), (*args, heads, length, float(scale)))


def attention(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Attended]:
    """As ``portable.attention``, for heads of at most `WIDEST` channels and as many keys as queries."""
    q, k, v = map(_by_pixel, (q, k, v))
    o = cupy.empty_like(q)
    largest, inverse = cupy.empty((2, *q.shape[:3]), q.dtype)
    _run("attention", q, (q, k, v, o, largest, inverse), scale)
    return _by_head(o), Attended(q, k, v, o, largest, inverse, scale)


def attention_backward(saved: Attended, do: Any) -> tuple[Any, Any, Any]:
    """As ``portable.attention_backward``.  (docs: B.13)"""
    do = _by_pixel(do)
    given = (saved.q, saved.k, saved.v, saved.o, do, saved.largest, saved.inverse)
    dq, dk, dv = (cupy.empty_like(do) for _ in range(3))
    _run("attention_dq", do, (*given, dq), saved.scale)
    _run("attention_dk_dv", do, (*given, dk, dv), saved.scale)
    return _by_head(dq), _by_head(dk), _by_head(dv)
