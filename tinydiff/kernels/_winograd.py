"""Winograd's convolution F(2x2, 3x3): 16 multiplications where the definition takes 36.

Cut the padded image into overlapping 4x4 patches d, one for each 2x2 patch y of the output. For every
patch, with the 3x3 taps g (Lavin & Gray 2016, section 4.1; docs: A.7, A.8)::

    y = A.T [ (G g G.T) * (B.T d B) ] A

       B.T = | 1  0 -1  0 |     G = | 1    0   0 |     A.T = | 1  1  1  0 |
             | 0  1  1  0 |         | ½   ½   ½  |           | 0  1 -1  1 |
             | 0 -1  1  0 |         | ½  -½   ½  |
             | 0 -1  0  1 |         | 0    0   1 |

where * multiplies element by element. Summed over channels, each of the 16 elements is one matrix product
over all patches: V = B.T d B (16, T, C), U = G g G.T (16, C, D), M = V U (16, T, D), T patches.
Every step is linear, so the derivative is the transposes in reverse (docs: A.9)::

    dM = A dy A.T      dU = V.T dM,  dg = G.T dU G      dV = dM U.T,  dd = B dV B.T

The transforms are additions only. Pixels are first dealt out by their place in a patch, so that each
addition runs over long contiguous stretches: NumPy copies what is not contiguous into buffers first, at
two to three times the cost. The signs of B and A are those that save a negation.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels._threads import scratch

__all__ = ["winograd_conv", "winograd_conv_backward", "winograd_weight", "winograd_weight_backward"]

G = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])

# Patches times channels in a chunk: V and M of a chunk take 64 bytes for each of them in float32. One thread
# alone would like them in its own cache (a quarter of this); two must not hand Python's lock over too often.
CHUNK = 48 * 2**10


def winograd_weight(g: np.ndarray) -> np.ndarray:
    """U = G g G.T: (3, 3, C, D)  ->  (16, C, D).  (docs: A.8)"""
    c, d = g.shape[2:]
    return (np.kron(G, G).astype(g.dtype) @ g.reshape(9, c * d)).reshape(16, c, d)


def winograd_weight_backward(du: np.ndarray) -> np.ndarray:
    """dg = G.T dU G: (16, C, D)  ->  (3, 3, C, D).  (docs: A.9)"""
    c, d = du.shape[1:]
    return (np.kron(G, G).T.astype(du.dtype) @ du.reshape(16, c * d)).reshape(3, 3, c, d)


def _chunks(start: int, stop: int, patches: int, channels: int) -> list[slice]:
    size = max(1, CHUNK // (patches * channels))
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _pixels(first: int, before: int, size: int, limit: int) -> tuple[slice, slice]:
    """Where every second pixel from padded index `first` on comes from, and where it goes.

    Of an image's `size` rows (or columns) padded with `before` zeros, the padded indices first, first + 2, …
    make up to `limit` places; the first slice is into the image, the second into the places.
    """
    place = max(0, (before - first + 1) // 2)
    pixel = 2 * place + first - before
    count = max(0, min(limit - place, (size - pixel + 1) // 2))
    return slice(pixel, pixel + 2 * count, 2), slice(place, place + count)


def _input_transform(x: np.ndarray, before: int, th: int, tw: int) -> np.ndarray:
    """V = B.T d B of the patches of x (m, H, W, C) padded with `before` zeros: (4, 4, m, th, tw, C)."""
    m, h, w, c = x.shape
    d = scratch("d", (4, 2, m, th + 1, tw, c), x.dtype)  # d[q, r, :, i, j] = padded[:, 2 i + r, 2 j + q]
    d[...] = 0.0
    for r in range(2):
        rows, to_rows = _pixels(r, before, h, th + 1)
        for q in range(4):
            cols, to_cols = _pixels(q, before, w, tw)
            d[q, r, :, to_rows, to_cols] = x[:, rows, cols]
    db = scratch("db", d.shape, x.dtype)
    np.subtract(d[0], d[2], out=db[0])
    np.add(d[1], d[2], out=db[1])
    np.subtract(d[2], d[1], out=db[2])
    np.subtract(d[3], d[1], out=db[3])
    even, odd = db[:, 0], db[:, 1]
    v = scratch("v", (4, 4, m, th, tw, c), x.dtype)
    np.subtract(even[:, :, :th], even[:, :, 1:], out=v[0])
    np.add(odd[:, :, :th], even[:, :, 1:], out=v[1])
    np.subtract(even[:, :, 1:], odd[:, :, :th], out=v[2])
    np.subtract(odd[:, :, 1:], odd[:, :, :th], out=v[3])
    return v


def _input_transform_backward(dv: np.ndarray, before: int, dx: np.ndarray) -> None:
    """dd = B dV B.T of the patches, summed where they overlap, written to dx (m, H, W, C).  Overwrites dV."""
    _, _, m, th, tw, c = dv.shape
    _, h, w, _ = dx.shape
    dcols = scratch("d", (2, 4, m, th, tw + 1, c), dv.dtype)
    _fold(dv.swapaxes(0, 1), dcols, axis=3)
    planes = scratch("db", (2, 2, m, th + 1, tw + 1, c), dv.dtype)
    _fold(dcols.swapaxes(0, 1), planes, axis=2)
    for r in range(2):
        rows, from_rows = _pixels(r, before, h, th + 1)
        for s in range(2):
            cols, from_cols = _pixels(s, before, w, tw + 1)
            dx[:, rows, cols] = planes[r, s, :, from_rows, from_cols]


def _fold(t: np.ndarray, out: np.ndarray, axis: int) -> None:
    """Apply B along one axis, adding up where patches overlap.  Overwrites t.

    t[k] holds element k of every patch; out[0] and out[1] are the even and odd pixels, one longer along
    `axis`:  out[0][i] = t0[i] + (t1 + t2 - t0)[i-1],  out[1][i] = (t1 - t2 - t3)[i] + t3[i-1].
    """
    before = (slice(None),) * axis
    head, last, tail = (*before, slice(0, -1)), (*before, slice(-1, None)), (*before, slice(1, None))
    even, odd = out
    total = scratch("total", t[0].shape, t.dtype)
    np.add(t[1], t[2], out=total)
    total -= t[0]
    t[1] -= t[2]
    t[1] -= t[3]
    even[head], even[last] = t[0], 0.0
    even[tail] += total
    odd[head], odd[last] = t[1], 0.0
    odd[tail] += t[3]


def _output_transform(mm: np.ndarray, y: np.ndarray) -> None:
    """y = A.T M A of the patches: mm (4, 4, m, th, tw, D) written to y (m, H', W', D)."""
    rows = scratch("db", (2, 4, *mm.shape[2:]), mm.dtype)
    np.add(mm[1], mm[2], out=rows[0])
    rows[0] += mm[0]
    np.subtract(mm[1], mm[2], out=rows[1])
    rows[1] += mm[3]
    cols = scratch("d", (2, *mm.shape[2:]), mm.dtype)
    for s, combine, outer in ((0, np.add, 0), (1, np.subtract, 3)):
        combine(rows[:, 1], rows[:, 2], out=cols)
        for r in range(2):
            out = y[:, r::2, s::2]
            inside = np.s_[:, : out.shape[1], : out.shape[2]]
            np.add(cols[r][inside], rows[r, outer][inside], out=out)


def _output_transform_backward(dy: np.ndarray, th: int, tw: int) -> np.ndarray:
    """dM = A dy A.T of the patches of dy (m, H', W', D): (4, 4, m, th, tw, D)."""
    m, h, w, d = dy.shape
    rows = scratch("db", (4, 2, m, th, tw, d), dy.dtype)
    if h % 2 or w % 2:
        rows[...] = 0.0
    for r, row in ((0, 0), (1, 3)):
        for s in range(2):
            part = dy[:, r::2, s::2]
            rows[row, s, :, : part.shape[1], : part.shape[2]] = part
    np.add(rows[0], rows[3], out=rows[1])
    np.subtract(rows[0], rows[3], out=rows[2])
    dm = scratch("m", (4, 4, m, th, tw, d), dy.dtype)
    dm[:, 0] = rows[:, 0]
    np.add(rows[:, 0], rows[:, 1], out=dm[:, 1])
    np.subtract(rows[:, 0], rows[:, 1], out=dm[:, 2])
    dm[:, 3] = rows[:, 1]
    return dm


def winograd_conv(
    x: np.ndarray, u: np.ndarray, b: np.ndarray, before: int, y: np.ndarray, start: int, stop: int
) -> None:
    """Write images start … stop-1 of y (N, H', W', D) from those of x (N, H, W, C).  (docs: A.8)"""
    _, c, d = u.shape
    th, tw = (y.shape[1] + 1) // 2, (y.shape[2] + 1) // 2
    for chunk in _chunks(start, stop, th * tw, max(c, d)):
        m = chunk.stop - chunk.start
        v = _input_transform(x[chunk], before, th, tw)
        mm = scratch("m", (16, m * th * tw, d), x.dtype)
        np.matmul(v.reshape(16, m * th * tw, c), u, out=mm)
        mm[5] += b  # element (1, 1) of M enters all four outputs with coefficient 1
        _output_transform(mm.reshape(4, 4, m, th, tw, d), y[chunk])


def winograd_conv_backward(
    x: np.ndarray,
    u: np.ndarray,
    dy: np.ndarray,
    before: int,
    dx: np.ndarray,
    start: int,
    stop: int,
) -> np.ndarray:
    """Write images start … stop-1 of dx (N, H, W, C); returns their share of dU (16, C, D).  (docs: A.9)"""
    _, c, d = u.shape
    th, tw = (dy.shape[1] + 1) // 2, (dy.shape[2] + 1) // 2
    ut = np.ascontiguousarray(u.swapaxes(1, 2))
    du = np.zeros_like(u)
    part = scratch("du", u.shape, u.dtype)
    for chunk in _chunks(start, stop, th * tw, max(c, d)):
        m = chunk.stop - chunk.start
        v = _input_transform(x[chunk], before, th, tw)
        flat = v.reshape(16, m * th * tw, c)
        dm = _output_transform_backward(dy[chunk], th, tw).reshape(16, m * th * tw, d)
        du += np.matmul(flat.swapaxes(1, 2), dm, out=part)
        np.matmul(dm, ut, out=flat)
        _input_transform_backward(v, before, dx[chunk])
    return du
