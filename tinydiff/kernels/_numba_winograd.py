"""Winograd's convolution F(4x4, 3x3), as in ``_winograd.py`` (docs: A.7, A.8, A.9), in one pass.

6x6 patches d for 4x4 patches y of the output, interpolating at 0, ±a, ±b and infinity (docs: A.24)::

    y = A.T [ (G g G.T) * (B.T d B) ] A

    A.T = | 1  1   1   1   1   0 |    B.T = | a²b²   0   -a²-b²  0   1  0 |
          | 0  a  -a   b  -b   0 |          |  0   -ab²   -b²    a   1  0 |
          | 0  a²  a²  b²  b²  0 |          |  0    ab²   -b²   -a   1  0 |
          | 0  a³ -a³  b³ -b³  1 |          |  0   -a²b   -a²    b   1  0 |
                                            |  0    a²b   -a²   -b   1  0 |
    G row of point p: (1, p, p²) / N        |  0    a²b²    0  -a²-b² 0  1 |

    N = a²b², 2a²(a²-b²) twice, 2b²(b²-a²) twice; last row (0, 0, 1)

Each transform goes over the image once. A patch is taken 16 channels at a time into an array of fixed size
that stays in the first-level cache; there a transform along one axis is a loop over channels that LLVM
makes vector instructions of, and the same loop again does the other axis, because each leaves its result
transposed. The products are BLAS's, over as many patches as fit the second-level cache with all they need.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels._memory import empty
from tinydiff.kernels._numba_jit import inlined, jit
from tinydiff.kernels._numba_lanes import LANES, load, store, zero_before, zeros
from tinydiff.kernels._threads import scratch
from tinydiff.kernels._winograd import both_axes

__all__ = ["winograd_conv", "winograd_conv_backward", "winograd_weight", "winograd_weight_backward"]

# The points: few binary digits, so that the coefficients of A and B are exact in float32, and chosen for the
# smallest rounding error of the result among such (docs: A.24).
a, b = 5 / 8, 3 / 2
a2, b2 = a * a, b * b

G = np.array(
    [[1 / n, p / n, p * p / n] for p, n in (
        (0.0, a2 * b2),
        (a, 2 * a2 * (a2 - b2)),
        (-a, 2 * a2 * (a2 - b2)),
        (b, 2 * b2 * (b2 - a2)),
        (-b, 2 * b2 * (b2 - a2)),
    )]
    + [[0.0, 0.0, 1.0]]
)  # fmt: skip

# Bytes of V and M of a chunk: what fits the second-level cache.
CHUNK_BYTES = 2**20

# The most patches in a chunk of the backward. BLAS adds their products to dU one after the other; over more
# patches the rounding of these sums would show (docs: A.24).
MOST_PATCHES = 32


def winograd_weight(g: np.ndarray) -> np.ndarray:
    """U = G g G.T: (3, 3, C, D)  ->  (36, C, D), in scratch until the next.  (docs: A.8)"""
    return both_axes(G.astype(g.dtype), g, "inner taps", "u").reshape(36, *g.shape[2:])


def winograd_weight_backward(du: np.ndarray) -> np.ndarray:
    """dg = G.T dU G: (36, C, D)  ->  (3, 3, C, D).  (docs: A.9)"""
    return both_axes(G.T.astype(du.dtype), du.reshape(6, 6, *du.shape[1:]), "inner taps", "dg").copy()


def _coefficients(dtype: np.dtype) -> tuple[np.floating, ...]:
    """a, b, their squares and cubes, a² + b² and a²b², as scalars of this dtype."""
    return tuple(dtype.type(number) for number in (a, b, a2, b2, a * a2, b * b2, a2 + b2, a2 * b2))


@inlined
def _times_bt(d0, d1, d2, d3, d4, d5, points):  # type: ignore[no-untyped-def]
    """B.T d of six vectors."""
    a, b, a2, b2, _, _, both, product = points
    even_a, odd_a = d4 - b2 * d2, a * (d3 - b2 * d1)
    even_b, odd_b = d4 - a2 * d2, b * (d3 - a2 * d1)
    first, last = product * d0 + (d4 - both * d2), product * d1 + (d5 - both * d3)
    return first, even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, last


@inlined
def _times_b(v0, v1, v2, v3, v4, v5, points):  # type: ignore[no-untyped-def]
    """B v of six vectors."""
    a, b, a2, b2, _, _, both, product = points
    sum_a, difference_a = v1 + v2, a * (v1 - v2)
    sum_b, difference_b = v3 + v4, b * (v3 - v4)
    d1 = product * v5 - (b2 * difference_a + a2 * difference_b)
    d2 = -both * v0 - (b2 * sum_a + a2 * sum_b)
    d3 = difference_a + difference_b - both * v5
    return product * v0, d1, d2, d3, v0 + (sum_a + sum_b), v5


@inlined
def _times_at(m0, m1, m2, m3, m4, m5, points):  # type: ignore[no-untyped-def]
    """A.T m of six vectors."""
    a, b, a2, b2, a3, b3, _, _ = points
    sum_a, difference_a = m1 + m2, m1 - m2
    sum_b, difference_b = m3 + m4, m3 - m4
    y1 = a * difference_a + b * difference_b
    y3 = m5 + a3 * difference_a + b3 * difference_b
    return m0 + (sum_a + sum_b), y1, a2 * sum_a + b2 * sum_b, y3


@inlined
def _times_a(y0, y1, y2, y3, points):  # type: ignore[no-untyped-def]
    """A y of four vectors."""
    a, b, a2, b2, a3, b3, _, _ = points
    even_a, odd_a = y0 + a2 * y2, a * y1 + a3 * y3
    even_b, odd_b = y0 + b2 * y2, b * y1 + b3 * y3
    return y0, even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, y3


@inlined
def _pixel(x, row, col, h, w, c, index):  # type: ignore[no-untyped-def]
    """LANES channels of a pixel, 0 outside the image; in row 0 they begin at the flat `index`."""
    if 0 <= row < h and 0 <= col < w:
        return load(x, index + row * w * c)
    return zeros(x)


@inlined
def _load6(x, index, step):  # type: ignore[no-untyped-def]
    """Six vectors, `step` apart."""
    return (
        load(x, index),
        load(x, index + step),
        load(x, index + 2 * step),
        load(x, index + 3 * step),
        load(x, index + 4 * step),
        load(x, index + 5 * step),
    )


@inlined
def _store6(x, index, step, values):  # type: ignore[no-untyped-def]
    """Six vectors, `step` apart."""
    v0, v1, v2, v3, v4, v5 = values
    store(x, index, v0)
    store(x, index + step, v1)
    store(x, index + 2 * step, v2)
    store(x, index + 3 * step, v3)
    store(x, index + 4 * step, v4)
    store(x, index + 5 * step, v5)


@jit
def _input_transform(images, doubled, before, start, th, tw, points, places):  # type: ignore[no-untyped-def]
    """V = B.T d B of the patches `start` on of images (N, H, W, C): places (36, T, C).

    With `doubled` = 1, not 0, of the images with every pixel doubled (docs: A.26).
    """
    _, h, w, c = images.shape
    patches = places.shape[1]
    x, v = images.reshape(-1), places.reshape(-1)
    e = np.empty(36 * LANES, x.dtype)  # (6, 6, LANES)
    for t in range(patches):
        n, patch = divmod(start + t, th * tw)
        i, j = divmod(patch, tw)
        row, col = 4 * i - before, 4 * j - before
        inside = doubled == 0 and row >= 0 and row + 6 <= h and col >= 0 and col + 6 <= w
        for block in range((c + LANES - 1) // LANES):
            first = min(block * LANES, c - LANES)
            for s in range(6):
                column = (col + s) >> doubled
                index = (n * h * w + column) * c + first
                if inside:
                    d0, d1, d2, d3, d4, d5 = _load6(x, index + row * w * c, w * c)
                else:
                    d0 = _pixel(x, row >> doubled, column, h, w, c, index)
                    d1 = _pixel(x, (row + 1) >> doubled, column, h, w, c, index)
                    d2 = _pixel(x, (row + 2) >> doubled, column, h, w, c, index)
                    d3 = _pixel(x, (row + 3) >> doubled, column, h, w, c, index)
                    d4 = _pixel(x, (row + 4) >> doubled, column, h, w, c, index)
                    d5 = _pixel(x, (row + 5) >> doubled, column, h, w, c, index)
                _store6(e, s * LANES, 6 * LANES, _times_bt(d0, d1, d2, d3, d4, d5, points))
            for k in range(6):
                e0, e1, e2, e3, e4, e5 = _load6(e, 6 * k * LANES, LANES)
                index = (6 * k * patches + t) * c + first
                _store6(v, index, patches * c, _times_bt(e0, e1, e2, e3, e4, e5, points))


@jit
def _input_transform_backward(places, doubled, before, start, th, tw, points, images):  # type: ignore[no-untyped-def]
    """dd = B dV B.T of places (36, T, C), added to images (N, H, W, C) where the patches were read."""
    _, h, w, c = images.shape
    patches = places.shape[1]
    dv, dx = places.reshape(-1), images.reshape(-1)
    e = np.empty(36 * LANES, dx.dtype)
    for t in range(patches):
        n, patch = divmod(start + t, th * tw)
        i, j = divmod(patch, tw)
        row, col = 4 * i - before, 4 * j - before
        for block in range((c + LANES - 1) // LANES):
            first = min(block * LANES, c - LANES)
            for l in range(6):
                v0, v1, v2, v3, v4, v5 = _load6(dv, (l * patches + t) * c + first, 6 * patches * c)
                _store6(e, l * LANES, 6 * LANES, _times_b(v0, v1, v2, v3, v4, v5, points))
            for r in range(max(0, -row), min(6, (h << doubled) - row)):
                e0, e1, e2, e3, e4, e5 = _load6(e, 6 * r * LANES, LANES)
                line = (n * h + ((row + r) >> doubled)) * w * c + first
                done = block * LANES - first  # channels that the block before has added already
                for s, d in enumerate(_times_b(e0, e1, e2, e3, e4, e5, points)):
                    if 0 <= col + s < w << doubled:
                        index = line + ((col + s) >> doubled) * c
                        store(dx, index, load(dx, index) + zero_before(d, done))


@jit
def _output_transform(places, bias, start, th, tw, points, images):  # type: ignore[no-untyped-def]
    """y = A.T M A + bias of places (36, T, D), written to images (N, H', W', D)."""
    _, h, w, c = images.shape
    patches = places.shape[1]
    m, y = places.reshape(-1), images.reshape(-1)
    e = np.empty(24 * LANES, y.dtype)  # (4, 6, LANES)
    for t in range(patches):
        n, patch = divmod(start + t, th * tw)
        i, j = divmod(patch, tw)
        for block in range((c + LANES - 1) // LANES):
            first = min(block * LANES, c - LANES)
            shift = load(bias, first)
            for l in range(6):
                m0, m1, m2, m3, m4, m5 = _load6(m, (l * patches + t) * c + first, 6 * patches * c)
                for r, row in enumerate(_times_at(m0, m1, m2, m3, m4, m5, points)):
                    store(e, (6 * r + l) * LANES, row)
            for r in range(min(4, h - 4 * i)):
                e0, e1, e2, e3, e4, e5 = _load6(e, 6 * r * LANES, LANES)
                index = ((n * h + 4 * i + r) * w + 4 * j) * c + first
                for s, pixel in enumerate(_times_at(e0, e1, e2, e3, e4, e5, points)):
                    if 4 * j + s < w:
                        store(y, index + s * c, pixel + shift)


@jit
def _output_transform_backward(images, start, th, tw, points, places):  # type: ignore[no-untyped-def]
    """dM = A dy A.T of the patches `start` on of images (N, H', W', D): places (36, T, D)."""
    _, h, w, c = images.shape
    patches = places.shape[1]
    dy, dm = images.reshape(-1), places.reshape(-1)
    e = np.empty(24 * LANES, dy.dtype)  # (6, 4, LANES)
    for t in range(patches):
        n, patch = divmod(start + t, th * tw)
        i, j = divmod(patch, tw)
        row, col = 4 * i, 4 * j
        for block in range((c + LANES - 1) // LANES):
            first = min(block * LANES, c - LANES)
            for s in range(4):
                index = (n * h * w + col + s) * c + first
                y0 = _pixel(dy, row, col + s, h, w, c, index)
                y1 = _pixel(dy, row + 1, col + s, h, w, c, index)
                y2 = _pixel(dy, row + 2, col + s, h, w, c, index)
                y3 = _pixel(dy, row + 3, col + s, h, w, c, index)
                _store6(e, s * LANES, 4 * LANES, _times_a(y0, y1, y2, y3, points))
            for k in range(6):
                index = 4 * k * LANES
                e0, e1 = load(e, index), load(e, index + LANES)
                e2, e3 = load(e, index + 2 * LANES), load(e, index + 3 * LANES)
                index = (6 * k * patches + t) * c + first
                _store6(dm, index, patches * c, _times_a(e0, e1, e2, e3, points))


def _chunks(start: int, stop: int, bytes_per_patch: int, most: int) -> list[tuple[int, int]]:
    size = max(1, min(CHUNK_BYTES // bytes_per_patch, most))
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def winograd_conv(
    x: np.ndarray,
    u: np.ndarray,
    bias: np.ndarray,
    before: int,
    y: np.ndarray,
    start: int,
    stop: int,
    *,
    doubled: bool = False,
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C).  (docs: A.8, A.26)

    `doubled`: as if every pixel of x were doubled first.
    """
    _, c, d = u.shape
    th, tw = (y.shape[1] + 3) // 4, (y.shape[2] + 3) // 4
    points = _coefficients(x.dtype)
    first_patch, end, size = start * th * tw, stop * th * tw, 36 * (c + d) * x.itemsize
    for first, last in _chunks(first_patch, end, size, end):
        v = scratch("v", (36, last - first, c), x.dtype)
        m = scratch("m", (36, last - first, d), x.dtype)
        _input_transform(x, int(doubled), before, first, th, tw, points, v)
        np.matmul(v, u, out=m)
        _output_transform(m, bias, first, th, tw, points, y)


def winograd_conv_backward(
    x: np.ndarray,
    ut: np.ndarray,
    dy: np.ndarray,
    before: int,
    dx: np.ndarray,
    start: int,
    stop: int,
    *,
    doubled: bool = False,
) -> np.ndarray:
    """Add to images start … stop-1 of dx (N, H, W, C); returns their share of dU (36, C, D).  (docs: A.9)

    ut is U.T (36, D, C), that is `winograd_weight` of the taps' transposes: BLAS is faster so.
    """
    _, d, c = ut.shape
    th, tw = (dy.shape[1] + 3) // 4, (dy.shape[2] + 3) // 4
    points = _coefficients(x.dtype)
    du = empty((36, c, d), x.dtype)
    first_patch, end, size = start * th * tw, stop * th * tw, 36 * (c + d) * x.itemsize
    for first, last in _chunks(first_patch, end, size, MOST_PATCHES):
        v = scratch("v", (36, last - first, c), x.dtype)
        dm = scratch("m", (36, last - first, d), x.dtype)
        _input_transform(x, int(doubled), before, first, th, tw, points, v)
        _output_transform_backward(dy, first, th, tw, points, dm)
        if first == first_patch:
            np.matmul(v.swapaxes(1, 2), dm, out=du)
        else:
            du += np.matmul(v.swapaxes(1, 2), dm, out=scratch("du", du.shape, du.dtype))
        np.matmul(dm, ut, out=v)
        _input_transform_backward(v, int(doubled), before, first, th, tw, points, dx)
    return du
