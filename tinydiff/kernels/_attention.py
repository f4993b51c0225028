"""Attention in blocks that stay in cache, and with one row more.

Scores of L pixels against L pixels are the largest array of a U-Net, and short-lived: o = softmax(q k.T) v
has only L rows of d numbers. So a few heads at a time are taken to the end, the scores in scratch, and the
backward computes them again instead of reading them back.

Of the passes over the scores only the exponential remains; what else a softmax does is moved into the
products around it, which read and write the scores anyway. Pixels are columns here, and the scores stand
key by query, because BLAS is up to twice as fast with factors laid out so (docs: A.23)::

    [k; 1].T [q; -m]  =  k.T q - m              a shift m of each column, so that exp cannot overflow
    [v; 1] e          =  [v e; l]               the sum l of each column of e = exp(k.T q - m)
    [v; 1].T [g; -D]  =  v.T g - D              g = do / l, and D the column sums of g * o

    o = v e / l      dv = e g.T      ds = e * (v.T g - D)      dq = k ds      dk = ds q.T

The shift must be known before the scores are. It need not be their maximum: |q| times the largest |k|, which
is at least that, will do. Where this is so much larger that a column of e vanishes, or is likely to, the
shift is the maximum itself.

Two limits, in float32. With scores beyond 1e8 the rounding alone is more than exp can take, and NaN may come
out where the definition picks the largest. And l may be as small as 1e-31, so that do / l overflows, and is
NaN, if the product of |do| and |v| is beyond 1e6.

Where exp2 is faster than exp (``_exponential.py``), exp(s) is 2^(s log2 e), and q is given the factor.
The Numba twin has a faster exp where vectors have 256 bits (``_numba_attention.py``).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from tinydiff.kernels import _exponential
from tinydiff.kernels._exponential import Power
from tinydiff.kernels._memory import empty
from tinydiff.kernels._threads import chunks, in_parallel, scratch

__all__ = ["Saved", "attention", "attention_backward"]

# Bytes of a block of scores, of a few heads; in the backward two blocks are in use at a time.
BLOCK_BYTES = 2**19

# Fewer scores than this are not worth a second thread.
PARALLEL_SIZE = 2**16

# In heads of at most so many channels, pixels are columns in memory, too; in wider ones only by their
# strides, since transposing costs more the wider they are.
NARROW = 64

# With a larger shift a column is likely to vanish: the maximum is taken at once, so exp once, not twice.
LIKELY = 100.0

Saved: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, Power]


def _columns(a: np.ndarray) -> np.ndarray:
    """[a.T; 1] of every head: (N, heads, L, d)  ->  (N heads, d + 1, L), if only by its strides."""
    n, heads, length, d = a.shape
    if d <= NARROW:
        both = empty((n, heads, d + 1, length), a.dtype)
    else:
        both = empty((n, heads, length, d + 1), a.dtype).swapaxes(2, 3)
    both[:, :, :d] = a.swapaxes(2, 3)
    both[:, :, d] = 1.0
    return both.reshape(n * heads, d + 1, length)


def _lengths(columns: np.ndarray) -> np.ndarray:
    """(N heads, d, L)  ->  (N heads, L)."""
    return np.sqrt(np.sum(columns * columns, axis=1))


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, power: Power | None = None
) -> tuple[np.ndarray, Saved]:
    """As ``portable.attention``; what it saves is for ``attention_backward`` of this module.  (docs: A.23)

    `power` takes the exponentials; None: NumPy's faster one.
    """
    n, heads, length, d = q.shape
    power = _exponential.POWER if power is None else power
    q1, k1, v1 = _columns(q), _columns(k), _columns(v)
    q1[:, :d] *= scale * power.log_e
    q1[:, d] = -_lengths(q1[:, :d]) * _lengths(k1[:, :d]).max(axis=1, keepdims=True)
    o1 = empty((n * heads, d + 1, length), v.dtype)
    least = np.finfo(q.dtype).tiny / np.finfo(q.dtype).eps
    far = q1[:, d].min(axis=1) < -LIKELY * power.log_e

    def work(start: int, stop: int) -> None:
        for block in chunks(start, stop, length * length * q.itemsize, BLOCK_BYTES):
            e = scratch("scores", (block.stop - block.start, length, length), q.dtype)
            kt, vanishes = k1[block].mT, bool(far[block].any())
            while True:
                np.matmul(kt, q1[block], out=e)
                if vanishes:
                    q1[block, d] -= e.max(axis=1)
                    np.matmul(kt, q1[block], out=e)  # as the backward will have it, to the bit
                power.of(e, out=e)
                np.matmul(v1[block], e, out=o1[block])
                if vanishes or o1[block, d].min() > least:
                    break
                vanishes = True  # a column of e has vanished, or is not a number

    in_parallel(work, n * heads, n * heads * length**2 >= PARALLEL_SIZE)
    total = o1[:, d:]
    o = o1[:, :d] / total
    return _heads(o, q.shape), (q1, k1, v1, o, total, scale, power)


def _heads(columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(N heads, d, L)  ->  a view of `shape`, (N, heads, L, d)."""
    n, heads, length, d = shape
    return columns.reshape(n, heads, d, length).swapaxes(2, 3)


def attention_backward(saved: Saved, do: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.attention_backward``."""
    q1, k1, v1, o, total, scale, power = saved
    count, d, length = o.shape
    g1 = _columns(do)
    g1[:, :d] /= total
    g1[:, d] = -np.sum(g1[:, :d] * o, axis=1)
    dq = empty(o.shape, do.dtype)
    dk, dv = (empty((count, length, d), do.dtype) for _ in range(2))

    def work(start: int, stop: int) -> None:
        for block in chunks(start, stop, length * length * do.itemsize, BLOCK_BYTES):
            shape = (block.stop - block.start, length, length)
            e, ds = scratch("scores", shape, do.dtype), scratch("dscores", shape, do.dtype)
            q_rows, g_rows = (np.ascontiguousarray(a[block, :d].mT) for a in (q1, g1))
            np.matmul(k1[block].mT, q1[block], out=e)
            power.of(e, out=e)
            np.matmul(e, g_rows, out=dv[block])
            np.matmul(v1[block].mT, g1[block], out=ds)
            ds *= e
            np.matmul(ds, q_rows, out=dk[block])
            np.matmul(k1[block, :d], ds, out=dq[block])

    in_parallel(work, count, count * length**2 >= PARALLEL_SIZE)
    dq *= scale
    dk *= 1.0 / power.log_e  # q1 has the scale, and this factor
    return _heads(dq, do.shape), dk.reshape(do.shape), dv.reshape(do.shape)
