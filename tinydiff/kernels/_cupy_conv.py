"""A convolution on a GPU as one product whose left factor is never made: float32, by the tensor cores.

The rows of what each output sees (docs: A.4) take nine times the image's memory; to write and read them takes
longer than the product. Here a block of threads has some outputs and some of their channels. It goes through
taps and channels, 32 at a time: it fetches what its outputs see through this tap, and the tap's weights, to
shared memory, while it multiplies what came before (``_cupy_tensor_cores.py``). The nine taps of 32 channels
follow one another, so that a pixel is fetched from afar once. The bias is added at the end (docs: A.28).

The derivative by the input is the same with the taps turned (B.8). That by the weights is a sum over outputs:
it is shared out between blocks, and the shares are added up by a second launch, in a fixed order (B.9).

Images have a multiple of four channels; others go by rows.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy

from tinydiff.kernels._cupy_compile import compiled, kind_of
from tinydiff.kernels._cupy_products import is_tf32
from tinydiff.kernels._cupy_sums import over_rows
from tinydiff.kernels._cupy_tensor_cores import TENSOR_CORES
from tinydiff.kernels.portable import Padding

__all__ = ["convolved", "fits", "weight_gradient"]

DEPTH = 32  # of the sum, in shared memory at a time
STAGES = 3  # of them, or two where they do not fit: one is multiplied, the others are under way
WIDEST = 5  # taps along an axis: each of the k k has a bit
LONGEST = 2**15  # places along an axis, where taps are not EVEN: two share a register, which has a sign
ENOUGH = 96  # blocks, to keep most of an H100's 132 multiprocessors busy
SHARES = 264  # blocks for the derivative by the weights, about

COMMON = (
    TENSOR_CORES
    + r"""
#define BM (16 * MT * WM)
#define BN (32 * WN)
#define BK 32
#define LANES (32 * WM * WN)
#define STAGE (A_SIZE + B_SIZE)

// Along an axis: where output (or, turned, input) p looks through tap i; below zero for nowhere.
__device__ int look(int p, int i, int size, int before) {
#if TURNED
  int at = p + before - i;
  if (STRIDE > 1) {
    if (at < 0 || at % STRIDE) return -1;
    at /= STRIDE;
  }
#else
  int at = STRIDE * p + i - before;
  if (at < 0) return -1;
  at >>= DOUBLED;
#endif
  return at < size ? at : -1;
}

__device__ float low_of(float v) { return v - __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// The warp's acc += a b: a its rows, b its columns of what is in shared memory, from its lane's g and q on.
__device__ void accumulate(float acc[MT][4][4], const float* a, const float* b) {
#pragma unroll
  for (int k = 0; k < BK; k += 8) {
    float high_b[4][2], low_b[4][2];
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float v = b[AT_B(k + 4 * e, 8 * n)];
        high_b[n][e] = SPLIT ? v : v * STRETCH;
        low_b[n][e] = SPLIT ? low_of(v) : 0;
      }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float high_a[4], low_a[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float v = a[AT_A(16 * m + 8 * (e % 2), k + 4 * (e / 2))];
        high_a[e] = SPLIT ? v : v * STRETCH;
        low_a[e] = SPLIT ? low_of(v) : 0;
      }
#pragma unroll
      for (int n = 0; n < 4; n++) {
        if (SPLIT) {
          float part[4] = {0, 0, 0, 0};
          multiply(part, low_a, high_b[n], part);
          multiply(part, high_a, low_b[n], part);
          multiply(part, high_a, high_b[n], part);
#pragma unroll
          for (int e = 0; e < 4; e++) acc[m][n][e] += part[e];
        } else {
          multiply(acc[m][n], high_a, high_b[n], acc[m][n]);
        }
      }
    }
  }
}
"""
)

# y (N A B, D): what each sees of x (N, H, W, C), times w (k k, C, D), or turned (k k, D, C), plus bias.
SOURCE = (
    r"""
#define A_STRIDE (BK + 4)
#define AT_A(m, k) ((m) * A_STRIDE + (k))
#if TURNED
#define B_STRIDE (BK + 4)
#define B_SIZE (BN * B_STRIDE)
#define AT_B(k, n) ((n) * B_STRIDE + (k))
#else
#define B_STRIDE (BN + 8)
#define B_SIZE (BK * B_STRIDE)
#define AT_B(k, n) ((k) * B_STRIDE + (n))
#endif
#define A_SIZE (BM * A_STRIDE)
"""
    + COMMON
    + r"""
#define ROWS (BM * 8 / LANES)  // outputs for which a thread fetches 16 bytes
#define APART (LANES / 8)
#define PIECES (BN * 8 / LANES)  // of 16 bytes of the weights
#define EVEN (!DOUBLED && (!TURNED || STRIDE == 1))  // from one tap to the next it is equally far for all

extern "C" __global__ void __launch_bounds__(LANES) convolve(
    const float* x, const float* w, const float* bias, float* y, long long outputs_, long long h_,
    long long w_, long long c_, long long a_, long long b_, long long d_, long long before_) {
  extern __shared__ float shared[];
  int outputs = outputs_, H = h_, W = w_, C = c_, A = a_, B = b_, D = d_, before = before_;
  int t = threadIdx.x, g = t % 32 / 4, q = t % 4, warp = t / 32;
  int columns = (D + BN - 1) / BN, first = blockIdx.x / columns * BM, column0 = blockIdx.x % columns * BN;

  // What this thread fetches: of x 16 bytes of ROWS pixels, of w PIECES.
  int chunk = 4 * (t % 8);
  unsigned seen[ROWS];  // a bit for each tap
  int from[ROWS];  // where x is seen through tap 0; or, where taps are uneven, the image, and
  int place[ROWS];  // the output's place in it
#pragma unroll
  for (int e = 0; e < ROWS; e++) {
    int output = first + t / 8 + e * APART, n = output / (A * B), p = output / B % A, o = output % B;
    seen[e] = 0;
    if (output < outputs)
      for (int i = 0; i < K * K; i++)
        if (look(p, i / K, H, before) >= 0 && look(o, i % K, W, before) >= 0) seen[e] |= 1u << i;
    if (EVEN) {
      int r = TURNED ? p + before : STRIDE * p - before, s = TURNED ? o + before : STRIDE * o - before;
      from[e] = ((n * H + r) * W + s) * C + chunk;
    } else {
      from[e] = n * H * W;
      place[e] = p << 16 | o;
    }
  }
#if TURNED
  int k_b = chunk, n_b = t / 8, w_from = (column0 + n_b) * C + k_b, w_apart = APART * C;
#else
  int k_b = t / (BN / 4), n_b = 4 * (t % (BN / 4)), w_from = k_b * D + column0 + n_b;
  int w_apart = LANES / (BN / 4) * D;
#endif
  float* a_to = shared + AT_A(t / 8, chunk);
  float* b_to = shared + A_SIZE + AT_B(k_b, n_b);
  int tap = 0, c0 = 0, stage = 0;  // that are fetched next

  auto fetch = [&]() {
    int i = tap / K, j = tap % K, by = (TURNED ? -1 : 1) * (i * W + j) * C + c0;
    bool inside = c0 + chunk < C;
#pragma unroll
    for (int e = 0; e < ROWS; e++) {
      int at = from[e] + by;
      if (!EVEN) {
        int r = look(place[e] >> 16, i, H, before), s = look(place[e] & 0xffff, j, W, before);
        at = (from[e] + r * W + s) * C + c0 + chunk;
      }
      send(a_to + stage * STAGE + AT_A(e * APART, 0), x + at, inside && seen[e] >> tap & 1);
    }
    int w_by = TURNED ? tap * D * C + c0 : (tap * C + c0) * D;
#pragma unroll
    for (int e = 0; e < PIECES; e++) {
#if TURNED
      bool there = inside && column0 + n_b + e * APART < D;
      float* to = b_to + stage * STAGE + AT_B(0, e * APART);
#else
      bool there = column0 + n_b < D && c0 + k_b + e * (LANES / (BN / 4)) < C;
      float* to = b_to + stage * STAGE + AT_B(e * (LANES / (BN / 4)), 0);
#endif
      send(to, w + (w_from + e * w_apart + w_by), there);
    }
    if (++tap == K * K) tap = 0, c0 += BK;
    if (++stage == STAGES) stage = 0;
  };

  float acc[MT][4][4];
#pragma unroll
  for (int i = 0; i < MT * 16; i++) acc[i / 16][i / 4 % 4][i % 4] = 0;
  int row = warp / WN * (16 * MT) + g, column = warp % WN * 32, ready = 0;
  const float* a = shared + AT_A(row, q);
  const float* b = shared + A_SIZE + AT_B(q, column + g);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (c0 < C) fetch();
    sent();
  }
  for (int steps = (C + BK - 1) / BK * (K * K); steps > 0; steps--) {
    arrived<STAGES - 2>();
    __syncthreads();
    if (c0 < C) fetch();
    sent();
    accumulate(acc, a + ready * STAGE, b + ready * STAGE);
    if (++ready == STAGES) ready = 0;
  }

#pragma unroll
  for (int n = 0; n < 4; n++) {
    int at = column0 + column + 8 * n + 2 * q;
    if (at >= D) continue;
    float bias_0 = bias ? bias[at] : 0, bias_1 = bias ? bias[at + 1] : 0;
#pragma unroll
    for (int e = 0; e < 2 * MT; e++) {
      int output = first + row + 8 * e;
      const float* of = &acc[e / 2][n][e % 2 * 2];
      float* to = y + (long long)output * D + at;
      if (output < outputs) *(float2*)to = make_float2(of[0] + bias_0, of[1] + bias_1);
    }
  }
}
"""
)

# dw (shares, k k C + 1, D): what the outputs of a share see of x, transposed, times their dy; last, sum dy.
SOURCE_DW = (
    r"""
#define TURNED 0
#define A_STRIDE (BM + 8)
#define AT_A(m, k) ((k) * A_STRIDE + (m))
#define B_STRIDE (BN + 8)
#define AT_B(k, n) ((k) * B_STRIDE + (n))
#define A_SIZE (BK * A_STRIDE)
#define B_SIZE (BK * B_STRIDE)
"""
    + COMMON
    + r"""
#define ROWS (BM / 4 * BK / LANES)  // outputs for which a thread fetches 16 bytes
#define APART (LANES / (BM / 4))
#define PIECES (BN / 4 * BK / LANES)
#define B_APART (LANES / (BN / 4))

extern "C" __global__ void __launch_bounds__(LANES) convolve_dw(
    const float* x, const float* dy, float* dw, long long outputs_, long long h_, long long w_, long long c_,
    long long a_, long long b_, long long d_, long long before_, long long share_) {
  extern __shared__ float shared[];
  int outputs = outputs_, H = h_, W = w_, C = c_, A = a_, B = b_, D = d_, before = before_, share = share_;
  int t = threadIdx.x, g = t % 32 / 4, q = t % 4, warp = t / 32;
  int weights = K * K * C, columns = (D + BN - 1) / BN, rows = (weights + BM - 1) / BM;
  int column0 = blockIdx.x % columns * BN, row0 = blockIdx.x / columns % rows * BM;
  int which = blockIdx.x / columns / rows, start = which * share;
  int stop = start + share < outputs ? start + share : outputs;

  // What this thread fetches: 16 bytes of x, seen through one tap by ROWS outputs, and of dy PIECES.
  int m = t % (BM / 4) * 4, tap = (row0 + m) / C, c = (row0 + m) % C, i = tap / K, j = tap % K;
  int next = row0 + m < weights ? start + t / (BM / 4) : stop;  // the first output
  int image[ROWS], p[ROWS], o[ROWS];  // and of each, n H W and its place in the image
#pragma unroll
  for (int e = 0; e < ROWS; e++) {
    int output = start + t / (BM / 4) + e * APART;
    image[e] = output / (A * B) * H * W;
    p[e] = output / B % A;
    o[e] = output % B;
  }
  int on_o = BK % B, on_p = BK / B % A, on_image = BK / B / A * H * W;  // from one fetch to the next
  int n_b = t % (BN / 4) * 4, next_b = column0 + n_b < D ? start + t / (BN / 4) : stop;
  int dy_from = (start + t / (BN / 4)) * D + column0 + n_b, dy_apart = B_APART * D;
  float* a_to = shared + AT_A(m, t / (BM / 4));
  float* b_to = shared + A_SIZE + AT_B(t / (BN / 4), n_b);
  int stage = 0;

  auto fetch = [&]() {
#pragma unroll
    for (int e = 0; e < ROWS; e++) {
      int r = look(p[e], i, H, before), s = look(o[e], j, W, before);
      bool there = next + e * APART < stop && r >= 0 && s >= 0;
      send(a_to + stage * STAGE + AT_A(0, e * APART), x + ((image[e] + r * W + s) * C + c), there);
      o[e] += on_o;
      p[e] += on_p;
      image[e] += on_image;
      if (o[e] >= B) o[e] -= B, p[e]++;
      if (p[e] >= A) p[e] -= A, image[e] += H * W;
    }
    next += BK;
#pragma unroll
    for (int e = 0; e < PIECES; e++) {
      send(b_to + stage * STAGE + AT_B(e * B_APART, 0), dy + (dy_from + e * dy_apart),
           next_b + e * B_APART < stop);
    }
    next_b += BK;
    dy_from += BK * D;
    if (++stage == STAGES) stage = 0;
  };

  float acc[MT][4][4], bias = 0;
#pragma unroll
  for (int e = 0; e < MT * 16; e++) acc[e / 16][e / 4 % 4][e % 4] = 0;
  int row = warp / WN * (16 * MT) + g, column = warp % WN * 32, ready = 0;
  const float* a = shared + AT_A(row, q);
  const float* b = shared + A_SIZE + AT_B(q, column + g);
  int steps = (stop - start + BK - 1) / BK, fetched = STAGES - 1;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) fetch();
    sent();
  }
  for (int step = 0; step < steps; step++) {
    arrived<STAGES - 2>();
    __syncthreads();
    if (fetched++ < steps) fetch();
    sent();
    accumulate(acc, a + ready * STAGE, b + ready * STAGE);
    if (row0 == 0 && t < BN) {
#pragma unroll 8
      for (int k = 0; k < BK; k++) bias += shared[ready * STAGE + A_SIZE + AT_B(k, t)];
    }
    if (++ready == STAGES) ready = 0;
  }

  dw += (long long)which * (weights + 1) * D;
  if (row0 == 0 && t < BN && column0 + t < D) dw[(long long)weights * D + column0 + t] = bias;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    int at = column0 + column + 8 * n + 2 * q;
    if (at >= D) continue;
#pragma unroll
    for (int e = 0; e < 2 * MT; e++) {
      int weight = row0 + row + 8 * e;
      const float* of = &acc[e / 2][n][e % 2 * 2];
      if (weight < weights) *(float2*)(dw + weight * D + at) = make_float2(of[0], of[1]);
    }
  }
}
"""
)


def fits(k: int, *arrays: Any, uneven: tuple[int, ...] = ()) -> bool:
    """Whether this file can take these images (..., channels) and weights of k k taps, on this device.

    `uneven` are the sizes of a result, where that is `doubled`, or `turned` with a stride.
    """
    return (
        k <= WIDEST
        and max(uneven, default=0) <= LONGEST
        and all(
            kind_of(x) == "f"
            and x.shape[-1] % 4 == 0
            and 0 < x.size < 2**31
            and x.flags.c_contiguous
            and x.data.ptr % 16 == 0
            for x in arrays
        )
        and _device(cupy.cuda.runtime.getDevice())[0]
    )


@functools.cache
def _device(number: int) -> tuple[bool, int]:
    """Whether a device has TF32 (from Ampere on), and the bytes of shared memory that a block may have."""
    device = cupy.cuda.Device(number)
    return int(device.compute_capability) >= 80, device.attributes["MaxSharedMemoryPerBlockOptin"]


def _warps(columns: int) -> tuple[int, int]:
    """WM and WN, a block's warps down and across; each has 32 channels of the result."""
    return (4, 1) if columns <= 32 else (4, 2) if columns <= 64 else (2, 4)


def _height(outputs: int, columns: int, warps: tuple[int, int]) -> int:
    """MT, how many times 16 outputs a warp has: as many as leave enough blocks."""
    for height in (4, 2) if warps[1] == 4 else (2,):
        if -(-outputs // (16 * height * warps[0])) * columns >= ENOUGH:
            return height
    return 1


def _launch(source: str, name: str, blocks: int, stage: int, args: tuple[Any, ...], **sizes: int) -> None:
    """Run the kernel for these sizes, with `stage` floats in shared memory for each of its stages."""
    device = cupy.cuda.runtime.getDevice()
    stages = STAGES if 4 * STAGES * stage <= _device(device)[1] else 2
    shared = 4 * stages * stage
    kernel = _kernel(device, source, name, shared, STAGES=stages, SPLIT=int(not is_tf32()), **sizes)
    kernel((blocks,), (32 * sizes["WM"] * sizes["WN"],), args, shared_mem=shared)


@functools.cache
def _kernel(device: int, source: str, name: str, shared: int, **sizes: int) -> Any:
    """The kernel for these sizes, which may have so many bytes of shared memory on this device."""
    kernel = compiled(source, name, "f", *(f"{key}={value}" for key, value in sizes.items()))
    kernel.max_dynamic_shared_size_bytes = shared
    return kernel


def convolved(
    x: Any,
    w: Any,
    bias: Any,
    sizes: tuple[int, int],
    stride: int,
    padding: Padding,
    *,
    doubled: bool = False,
    turned: bool = False,
) -> Any:
    """The convolution of x (N, H, W, C) with w (k, k, C, D), at `sizes` places, plus bias (D,) or None.

    With `doubled` it is that of `upsample(x)`; with `turned`, the derivative of a convolution by its input: x
    is the output's (N, H', W', C), w (k, k, D, C), and `sizes` are the input's.  (docs: B.7, B.8, A.28)
    """
    n, h, width, c = x.shape
    k, d = w.shape[0], w.shape[2 if turned else 3]
    outputs = n * sizes[0] * sizes[1]
    down, across = warps = _warps(d)
    columns = -(-d // (32 * across))
    height = _height(outputs, columns, warps)
    rows = 16 * height * down
    stage = rows * (DEPTH + 4) + (32 * across * (DEPTH + 4) if turned else DEPTH * (32 * across + 8))
    y = cupy.empty((n, *sizes, d), x.dtype)
    args = (x, w, 0 if bias is None else bias, y, outputs, h, width, c, *sizes, d, padding[0])
    how = dict(MT=height, WM=down, WN=across, K=k, STRIDE=stride, DOUBLED=int(doubled), TURNED=int(turned))
    if outputs:
        _launch(SOURCE, "convolve", -(-outputs // rows) * columns, stage, args, **how)
    return y


def weight_gradient(
    x: Any, dy: Any, k: int, stride: int, padding: Padding, *, doubled: bool = False
) -> tuple[Any, Any]:
    """The derivatives by weights and bias, (k k C, D) and (D,), of a convolution of x.  (docs: B.9, A.28)

    x (N, H, W, C), to be doubled first if `doubled`; dy (N, H', W', D), the gradient by the output.
    """
    n, h, width, c = x.shape
    _, *sizes, d = dy.shape
    outputs, weights = n * sizes[0] * sizes[1], k * k * c
    down, across = _warps(d)
    height = 4 if across == 4 else 2
    rows = 16 * height * down
    tiles = -(-weights // rows) * -(-d // (32 * across))
    shares = max(1, min(SHARES // tiles, outputs // (8 * DEPTH)))
    share = -(-outputs // (shares * DEPTH)) * DEPTH
    shares = -(-outputs // share)
    stage = DEPTH * (rows + 8 + 32 * across + 8)
    found = cupy.empty((shares, (weights + 1) * d), x.dtype)
    args = (x, dy, found, outputs, h, width, c, *sizes, d, padding[0], share)
    how = dict(MT=height, WM=down, WN=across, K=k, STRIDE=stride, DOUBLED=int(doubled))
    _launch(SOURCE_DW, "convolve_dw", tiles * shares, stage, args, **how)
    whole = (over_rows(found) if shares > 1 else found[0]).reshape(weights + 1, d)
    return whole[:-1], whole[-1]
