"""Winograd's convolution F(4x4, 3x3): 36 multiplications where the definition takes 144.

Cut the padded image into 6x6 patches d that overlap by two, one for each 4x4 patch y of the output. For every
patch, with the 3x3 taps g (Lavin & Gray 2016, section 4; docs: A.7, A.8)::

    y = A.T [ (G g G.T) * (B.T d B) ] A

where * multiplies element by element. Summed over channels, each of the 36 elements is one matrix product
over all patches: V = B.T d B (36, P, C), U = G g G.T (36, C, D), M = V U (36, P, D), P patches.
Every step is linear, so the derivative with respect to the taps is the transposes in reverse (docs: A.9)::

    dM = A dy A.T      dU = V.T dM      dg = G.T dU G

The derivative with respect to x is the convolution of dy with the taps turned round (docs: A.6, A.9).

A, B and G come from multiplying polynomials: the product of two, of degrees 3 and 2, is known from its values
at five points and its leading coefficient (docs: A.7). The choice of points decides the rounding: in float32
the usual 0, 1, -1, 2, -2 are off by 11 times as much as a sum tap by tap; 0, 3/4, -3/4, 3/2, -3/2 by 5 times
(docs: A.16). That is relative to the largest number of a patch: in one with a pixel of 1e6 the others' sums,
of order 1, are off by 0.1. And a number that is not finite makes all of its patches so.

The transforms are matrix products too, by matrices of 6 and 4 rows, over one axis of the patches after the
other: chains of additions in NumPy pass over memory once for every sign in the matrix, BLAS passes once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from tinydiff.kernels._memory import empty
from tinydiff.kernels._threads import scratch

__all__ = [
    "both_axes",
    "count_patches",
    "winograd_conv",
    "winograd_conv_taps",
    "winograd_weight",
    "winograd_weight_backward",
    "worth_cutting",
]

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
TILE, TAPS = 4, 3
PATCH = TILE + TAPS - 1

# With fewer channels than this on either side, the additions outweigh the multiplications saved; the Numba
# twin takes as many at a time. With fewer patches the weights' transforms do. (docs: A.24)
CHANNELS = 16
PATCHES = 8

# Patches times channels in a chunk: V and M take 144 bytes each for every one of them in float32, and should
# stay in cache between one product and the next. There are two arrays of that size, the scratch "one" and
# "two", and no more: each product reads one of them and writes the other. (For dM there is a third.)
CHUNK = 4096

# Fewest patches in a chunk of dW. A chunk's products are added to all of dU, which for many channels is
# larger than what the chunk was made from.
FEWEST_PATCHES = 32


def count_patches(n: int, h_out: int, w_out: int) -> int:
    """How many patches so many images, rows and columns are cut into, with those that stick out."""
    return n * -(-h_out // TILE) * -(-w_out // TILE)


def worth_cutting(w: np.ndarray, stride: int, padding: tuple[int, int], size: tuple[int, int, int]) -> bool:
    """Whether to cut a convolution's output into patches; `size` is its images, rows and columns.

    Each patch takes 36 products, however much of it sticks out; that pays where it is at most 6 for a pixel.
    """
    patches = count_patches(*size)
    return (
        w.shape[0] == TAPS
        and stride == 1
        and padding[0] < TAPS
        and min(w.shape[2:]) >= CHANNELS
        and patches >= PATCHES
        and PATCH**2 * patches <= 6 * math.prod(size)
    )


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (6, 4), B (6, 6) and G (6, 3), with which y = A.T [(G g) * (B.T d)] in one dimension.  (docs: A.7)"""
    a, b, g = np.zeros((PATCH, TILE)), np.zeros((PATCH, PATCH)), np.zeros((PATCH, TAPS))
    for i, p in enumerate(POINTS):
        others = [q for q in POINTS if q != p]
        a[i] = p ** np.arange(TILE)
        g[i] = p ** np.arange(TAPS) / np.prod([p - q for q in others])
        b[:-1, i] = np.poly(others)[::-1]  # coefficients of the polynomial that is zero at the others
    a[-1, -1] = g[-1, -1] = 1.0
    b[:, -1] = np.poly(POINTS)[::-1]
    return a, b, g


A, B, G = _matrices()

# In an image whose pixels are all doubled, a patch is known from four by four pixels; in an image whose
# pixels are to be added two by two, a patch is two by two sums (docs: A.26).
DOUBLE = np.repeat(np.eye(4), 2, axis=0)[1:-1]  # (6, 4): a, b, b, c, c, d of a, b, c, d
PAIRS = np.repeat(np.eye(2), 2, axis=1)  # (2, 4): a + b, c + d of a, b, c, d


@functools.cache
def _of(name: str, dtype: np.dtype) -> np.ndarray:
    """A transform's matrix, in a dtype."""
    matrices = {
        "B.T": B.T,
        "B.T double": B.T @ DOUBLE,
        "A.T": A.T,
        "A.T, 1": np.concatenate([A.T, np.ones((TILE, 1))], axis=1),
        "pairs A.T": PAIRS @ A.T,
        "A": A,
        "G": G,
        "G.T": G.T,
    }
    return matrices[name].astype(dtype)


def winograd_weight(g: np.ndarray) -> np.ndarray:
    """U = G g G.T: (3, 3, C, D)  ->  (36, C, D), in scratch until the next.  (docs: A.8)"""
    return both_axes(_of("G", g.dtype), g, "inner taps", "u").reshape(PATCH**2, *g.shape[2:])


def winograd_weight_backward(du: np.ndarray) -> np.ndarray:
    """dg = G.T dU G: (36, C, D)  ->  (3, 3, C, D).  (docs: A.9)"""
    patches = du.reshape(PATCH, PATCH, *du.shape[1:])
    return both_axes(_of("G.T", du.dtype), patches, "inner taps", "dg").copy()


def _chunks(start: int, stop: int, th: int, tw: int, patches: int) -> Iterator[tuple[slice, int, int]]:
    """Yield chunks of about `patches` patches: a few images whole, or one of about equal parts of an image.

    Each as (images, first row of patches, row after the last). An image has th patches down and tw across.
    """
    parts = -(-th // max(1, min(th, patches // tw)))
    rows = -(-th // parts)
    images = max(1, patches // (th * tw))
    for i in range(start, stop, images):
        for row in range(0, th, rows):
            yield slice(i, min(i + images, stop)), row, min(row + rows, th)


def both_axes(matrix: np.ndarray, patches: np.ndarray, between: str, to: str) -> np.ndarray:
    """Apply a matrix (q, p) to both axes of patches (p, p, ...): (q, q, ...), in the scratch named `to`.

    That may be where `patches` lie: it is written after the first axis, when they are no longer read.
    """
    q, p = matrix.shape
    size = patches.size // p**2
    inner = scratch(between, (p, q, size), patches.dtype)
    np.matmul(matrix, patches.reshape(p, p, size), out=inner)
    out = scratch(to, (q, q * size), patches.dtype)
    np.matmul(matrix, inner.reshape(p, q * size), out=out)
    return out.reshape(q, q, *patches.shape[2:])


def _input_transform(x: np.ndarray, row: int, th: int, before: int, tw: int, doubled: bool) -> np.ndarray:
    """V = B.T d B of th rows of patches of x (m, H, W, C), from row number `row` on: (6, 6, m, th, tw, C).

    Those of row 0 begin `before` pixels before the image; what lies outside is zero. With `doubled` it is as
    if every pixel of x were doubled first.  (docs: A.8, A.26)
    """
    matrix = _of("B.T double" if doubled else "B.T", x.dtype)
    size, step = matrix.shape[1], TILE // 2 if doubled else TILE
    m, h, w, c = x.shape
    xpad = scratch("xpad", (m, step * (th - 1) + size, step * (tw - 1) + size, c), x.dtype)
    first = step * row - before
    top, left = max(0, -first), before
    rows, cols = max(0, min(h - first, xpad.shape[1]) - top), min(w, xpad.shape[2] - left)
    xpad[:, :top] = xpad[:, top + rows :] = 0.0
    xpad[:, :, :left] = xpad[:, :, left + cols :] = 0.0
    xpad[:, top : top + rows, left : left + cols] = x[:, first + top : first + top + rows, :cols]
    image, down, right, channel = xpad.strides
    d = scratch("one", (size, size, m, th, tw, c), x.dtype)
    d[...] = np.ndarray(
        d.shape, x.dtype, xpad, strides=(down, right, image, step * down, step * right, channel)
    )
    return both_axes(matrix, d, between="two", to="one")


def _by_tiles(y: np.ndarray, tile: int) -> np.ndarray:
    """View of y (m, tile th, tile tw, D) as (tile, tile, m, th, tw, D)."""
    m, h, w, d = y.shape
    return y.reshape(m, h // tile, tile, w // tile, tile, d).transpose(2, 4, 0, 1, 3, 5)


def _output_transform(mm: np.ndarray, b: np.ndarray | None, y: np.ndarray, in_pairs: bool) -> None:
    """y = A.T M A + b of the patches: mm (6, 6, m, th, tw, D) written to y (m, H', W', D).

    With `in_pairs` it is as if y's rows, then its columns, were added two by two at the end.  (docs: A.26)
    """
    m, th, tw, d = mm.shape[2:]
    size = m * th * tw * d
    at = _of("pairs A.T" if in_pairs else "A.T", mm.dtype)
    tile = len(at)
    inner = scratch("one", (PATCH + 1, tile * size), mm.dtype)
    np.matmul(at, mm.reshape(PATCH, PATCH, size), out=inner[:PATCH].reshape(PATCH, tile, size))
    patches = scratch("two", (tile, tile * size), mm.dtype)
    if b is None:
        np.matmul(at, inner[:PATCH], out=patches)
    else:  # [A.T, 1] and a seventh row, of biases: the product adds them
        inner[PATCH].reshape(-1, d)[...] = b
        np.matmul(_of("A.T, 1", mm.dtype), inner, out=patches)
    whole = y.shape[1] == tile * th and y.shape[2] == tile * tw
    target = y if whole else scratch("ypad", (m, tile * th, tile * tw, d), mm.dtype)
    _by_tiles(target, tile)[...] = patches.reshape(tile, tile, m, th, tw, d)
    if not whole:
        y[...] = target[:, : y.shape[1], : y.shape[2]]


def _output_transform_backward(dy: np.ndarray, th: int, tw: int) -> np.ndarray:
    """dM = A dy A.T of the patches of dy (m, H', W', D): (6, 6, m, th, tw, D)."""
    m, h, w, d = dy.shape
    source = dy
    if h != TILE * th or w != TILE * tw:
        source = scratch("ypad", (m, TILE * th, TILE * tw, d), dy.dtype)
        source[:, h:] = source[:, :, w:] = 0.0
        source[:, :h, :w] = dy
    patches = scratch("three", (TILE, TILE, m, th, tw, d), dy.dtype)
    patches[...] = _by_tiles(source, TILE)
    return both_axes(_of("A", dy.dtype), patches, between="two", to="three")


def winograd_conv(
    x: np.ndarray,
    u: np.ndarray,
    b: np.ndarray | None,
    before: int,
    y: np.ndarray,
    start: int,
    stop: int,
    *,
    doubled: bool = False,
    in_pairs: bool = False,
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C).  (docs: A.8, A.26)

    `doubled`: x is to be doubled first; `in_pairs`: y is to be added two by two, and has no bias.
    """
    _, c, d = u.shape
    tile = TILE // 2 if in_pairs else TILE
    th, tw = -(-y.shape[1] // tile), -(-y.shape[2] // tile)
    patches = CHUNK // max(c, (c + d) // 2)  # V, of c channels, goes through more transforms than M
    for images, row, end in _chunks(start, stop, th, tw, patches):
        v = _input_transform(x[images], row, end - row, before, tw, doubled)
        mm = scratch("two", (*v.shape[:-1], d), x.dtype)
        np.matmul(v.reshape(PATCH**2, -1, c), u, out=mm.reshape(PATCH**2, -1, d))
        _output_transform(mm, b, y[images, tile * row : tile * end], in_pairs)


def winograd_conv_taps(
    x: np.ndarray, dy: np.ndarray, before: int, start: int, stop: int, *, doubled: bool = False
) -> np.ndarray:
    """Return the share of images start … stop-1 in dU (36, C, D).  (docs: A.9)"""
    c, d = x.shape[3], dy.shape[3]
    th, tw = -(-dy.shape[1] // TILE), -(-dy.shape[2] // TILE)
    # Not in scratch: by the time it is read, this thread may be at work for another caller.
    du, part = empty((PATCH**2, c, d), x.dtype), scratch("part of du", (PATCH**2, c, d), x.dtype)
    product = du
    for images, row, end in _chunks(start, stop, th, tw, max(FEWEST_PATCHES, CHUNK // max(c, d))):
        v = _input_transform(x[images], row, end - row, before, tw, doubled)
        dm = _output_transform_backward(dy[images, TILE * row : TILE * end], end - row, tw)
        np.matmul(v.reshape(PATCH**2, -1, c).swapaxes(1, 2), dm.reshape(PATCH**2, -1, d), out=product)
        if product is part:
            du += part
        product = part
    return du
