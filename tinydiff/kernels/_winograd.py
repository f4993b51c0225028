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
at five points and its leading coefficient (docs: A.7). Which points decides the rounding: in float32 the
usual 0, 1, -1, 2, -2 are off by 11 times as much as the definition; 0, 3/4, -3/4, 3/2, -3/2 by half of that
(docs: A.16).

The transforms are matrix products too, by matrices of 6 and 4 rows, over one axis of the patches after the
other: chains of additions in NumPy pass over memory once for every sign in the matrix, BLAS passes once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from tinydiff.kernels._threads import scratch

__all__ = ["winograd_conv", "winograd_conv_taps", "winograd_weight", "winograd_weight_backward"]

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
TILE, TAPS = 4, 3
PATCH = TILE + TAPS - 1

# Patches times channels in a chunk: V and M take 144 bytes each for every one of them in float32, and should
# stay in cache between one product and the next. There are two arrays of that size, or three, and no more.
CHUNK = 4096


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
BOTH_G = np.kron(G, G)


@functools.cache
def _transforms(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B.T, A.T and A of a dtype."""
    return B.T.astype(dtype), A.T.astype(dtype), A.astype(dtype)


def winograd_weight(g: np.ndarray) -> np.ndarray:
    """U = G g G.T: (3, 3, C, D)  ->  (36, C, D).  (docs: A.8)"""
    c, d = g.shape[2:]
    return (BOTH_G.astype(g.dtype) @ g.reshape(TAPS**2, c * d)).reshape(PATCH**2, c, d)


def winograd_weight_backward(du: np.ndarray) -> np.ndarray:
    """dg = G.T dU G: (36, C, D)  ->  (3, 3, C, D).  (docs: A.9)"""
    c, d = du.shape[1:]
    return (BOTH_G.T.astype(du.dtype) @ du.reshape(PATCH**2, c * d)).reshape(TAPS, TAPS, c, d)


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _chunks(start: int, stop: int, th: int, values_per_row: int) -> Iterator[tuple[slice, int, int]]:
    """Images, and their rows of patches from one to another: a few images whole, or a part of one."""
    rows = max(1, min(th, CHUNK // values_per_row))
    images = max(1, CHUNK // (th * values_per_row))
    for i in range(start, stop, images):
        for row in range(0, th, rows):
            yield slice(i, min(i + images, stop)), row, min(row + rows, th)


def _both_axes(matrix: np.ndarray, patches: np.ndarray, between: str, to: str) -> np.ndarray:
    """Apply a matrix (q, p) to both axes of patches (p, p, ...): (q, q, ...), in the scratch named `to`.

    That may be where `patches` lie: they are used up when the second axis is begun.
    """
    q, p = matrix.shape
    size = patches.size // p**2
    inner = scratch(between, (p, q, size), patches.dtype)
    np.matmul(matrix, patches.reshape(p, p, size), out=inner)
    out = scratch(to, (q, q * size), patches.dtype)
    np.matmul(matrix, inner.reshape(p, q * size), out=out)
    return out.reshape(q, q, *patches.shape[2:])


def _input_transform(x: np.ndarray, first: int, th: int, before: int, tw: int) -> np.ndarray:
    """V = B.T d B of th rows of patches of x (m, H, W, C): (6, 6, m, th, tw, C).

    The first row of patches begins at the pixels' row `first`, each row of them `before` columns left of the
    image; outside the image x is zero.
    """
    m, h, w, c = x.shape
    xpad = scratch("xpad", (m, TILE * th + TAPS - 1, TILE * tw + TAPS - 1, c), x.dtype)
    top, left = max(0, -first), before
    rows, cols = max(0, min(h - first, xpad.shape[1]) - top), min(w, xpad.shape[2] - left)
    xpad[:, :top] = xpad[:, top + rows :] = 0.0
    xpad[:, :, :left] = xpad[:, :, left + cols :] = 0.0
    xpad[:, top : top + rows, left : left + cols] = x[:, first + top : first + top + rows, :cols]
    image, row, col, channel = xpad.strides
    d = scratch("one", (PATCH, PATCH, m, th, tw, c), x.dtype)
    d[...] = np.ndarray(d.shape, x.dtype, xpad, strides=(row, col, image, TILE * row, TILE * col, channel))
    return _both_axes(_transforms(x.dtype)[0], d, between="two", to="one")


def _by_tiles(y: np.ndarray) -> np.ndarray:
    """View of y (m, 4 th, 4 tw, D) as (4, 4, m, th, tw, D)."""
    m, h, w, d = y.shape
    return y.reshape(m, h // TILE, TILE, w // TILE, TILE, d).transpose(2, 4, 0, 1, 3, 5)


def _output_transform(mm: np.ndarray, b: np.ndarray | float, y: np.ndarray) -> None:
    """y = A.T M A + b of the patches: mm (6, 6, m, th, tw, D) written to y (m, H', W', D)."""
    patches = _both_axes(_transforms(mm.dtype)[1], mm, between="one", to="two")
    m, th, tw, d = mm.shape[2:]
    whole = y.shape[1] == TILE * th and y.shape[2] == TILE * tw
    target = y if whole else scratch("ypad", (m, TILE * th, TILE * tw, d), mm.dtype)
    np.add(patches, b, out=_by_tiles(target))
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
    patches[...] = _by_tiles(source)
    return _both_axes(_transforms(dy.dtype)[2], patches, between="two", to="three")


def winograd_conv(
    x: np.ndarray, u: np.ndarray, b: np.ndarray | float, before: int, y: np.ndarray, start: int, stop: int
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C).  (docs: A.8)"""
    _, c, d = u.shape
    th, tw = _tiles(y.shape[1]), _tiles(y.shape[2])
    for images, row, end in _chunks(start, stop, th, tw * max(c, d)):
        v = _input_transform(x[images], TILE * row - before, end - row, before, tw)
        mm = scratch("two", (*v.shape[:-1], d), x.dtype)
        np.matmul(v.reshape(PATCH**2, -1, c), u, out=mm.reshape(PATCH**2, -1, d))
        _output_transform(mm, b, y[images, TILE * row : TILE * end])


def winograd_conv_taps(x: np.ndarray, dy: np.ndarray, before: int, start: int, stop: int) -> np.ndarray:
    """The share of images start … stop-1 in dU (36, C, D).  (docs: A.9)"""
    c, d = x.shape[3], dy.shape[3]
    th, tw = _tiles(dy.shape[1]), _tiles(dy.shape[2])
    du = np.zeros((PATCH**2, c, d), x.dtype)
    part = scratch("du", du.shape, x.dtype)
    for images, row, end in _chunks(start, stop, th, tw * max(c, d)):
        v = _input_transform(x[images], TILE * row - before, end - row, before, tw)
        dm = _output_transform_backward(dy[images, TILE * row : TILE * end], end - row, tw)
        du += np.matmul(v.reshape(PATCH**2, -1, c).swapaxes(1, 2), dm.reshape(PATCH**2, -1, d), out=part)
    return du
