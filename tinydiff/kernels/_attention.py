"""Attention in blocks that stay in cache, and with one column more.

Scores of L pixels against L pixels are the largest array of a U-Net, and short-lived: o = softmax(q k.T) v
has only L rows of d numbers. So a few heads at a time are taken to the end, the scores in scratch, and the
backward computes them again instead of reading them back.

Of the passes over the scores one remains, the exponential; what else a softmax does is moved into the
products around it, which read and write the scores anyway (docs: A.23)::

    [q, -m] [k, 1].T  =  q k.T - m              a shift m of each row, so that exp cannot overflow
    e [v, 1]          =  [e v, l]               the sum l of each row of e = exp(q k.T - m)
    [do/l, -D] [v, 1].T  =  (do/l) v.T - D      D the row sums of (do/l) o

    o = e v / l      dv = e.T (do/l)      ds = e * ((do/l) v.T - D)      dq = ds k      dk = ds.T q

The shift must be known before the scores are. It need not be their maximum: |q| times the largest |k| is at
least that. Where it is so much more that a row of e vanishes, the maximum itself is taken.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels._threads import in_parallel, scratch

__all__ = ["attention", "attention_backward"]

# Bytes of a block of scores; in the backward two are in use at a time.
BLOCK_BYTES = 2**19

# Fewer scores than this are not worth a second thread.
PARALLEL_SIZE = 2**16

Saved = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]


def _blocks(start: int, stop: int, bytes_per_head: int) -> list[slice]:
    size = max(1, BLOCK_BYTES // bytes_per_head)
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _and(a: np.ndarray, column: np.ndarray | float) -> np.ndarray:
    """[a, column]: (N, heads, L, d) and a column  ->  (N heads, L, d + 1)."""
    n, heads, length, d = a.shape
    both = np.empty((n, heads, length, d + 1), a.dtype)
    both[..., :d] = a
    both[..., d] = column
    return both.reshape(n * heads, length, d + 1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, Saved]:
    """As ``portable.attention``; what it saves is for ``attention_backward`` of this module.  (docs: A.23)"""
    n, heads, length, d = q.shape
    longest = np.sqrt(np.max(np.sum(k * k, axis=3), axis=2, keepdims=True))
    q1 = _and(q * scale, -scale * np.sqrt(np.sum(q * q, axis=3)) * longest)
    k1, v1 = _and(k, 1.0), _and(v, 1.0)
    o1 = np.empty(v1.shape, v.dtype)
    least = np.finfo(q.dtype).tiny / np.finfo(q.dtype).eps

    def work(start: int, stop: int) -> None:
        for block in _blocks(start, stop, length * length * q.itemsize):
            e = scratch("scores", (block.stop - block.start, length, length), q.dtype)
            kt = k1[block].swapaxes(1, 2)
            np.matmul(q1[block], kt, out=e)
            np.exp(e, out=e)
            np.matmul(e, v1[block], out=o1[block])
            if not o1[block, :, d].min() > least:  # or it is not a number
                np.matmul(q1[block], kt, out=e)
                q1[block, :, d] -= e.max(axis=2)
                np.matmul(q1[block], kt, out=e)  # as the backward will have it, to the bit
                np.exp(e, out=e)
                np.matmul(e, v1[block], out=o1[block])

    in_parallel(work, n * heads, n * heads * length**2 >= PARALLEL_SIZE)
    total = o1[..., d:]
    o = o1[..., :d] / total
    return o.reshape(q.shape), (q1, k1, v1, o, total, scale)


def attention_backward(saved: Saved, do: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.attention_backward``."""
    q1, k1, v1, o, total, scale = saved
    count, length, d = o.shape
    do1 = np.empty(q1.shape, do.dtype)
    np.divide(do.reshape(o.shape), total, out=do1[..., :d])
    do1[..., d] = -np.sum(do1[..., :d] * o, axis=2)
    dq, dk, dv = (np.empty(o.shape, do.dtype) for _ in range(3))

    def work(start: int, stop: int) -> None:
        for block in _blocks(start, stop, length * length * do.itemsize):
            shape = (block.stop - block.start, length, length)
            e, ds = scratch("scores", shape, do.dtype), scratch("dscores", shape, do.dtype)
            np.matmul(q1[block], k1[block].swapaxes(1, 2), out=e)
            np.exp(e, out=e)
            np.matmul(e.swapaxes(1, 2), do1[block, :, :d], out=dv[block])
            np.matmul(do1[block], v1[block].swapaxes(1, 2), out=ds)
            ds *= e
            np.matmul(ds, k1[block, :, :d], out=dq[block])
            np.matmul(ds.swapaxes(1, 2), q1[block, :, :d], out=dk[block])

    in_parallel(work, count, count * length**2 >= PARALLEL_SIZE)
    dq *= scale
    return dq.reshape(do.shape), dk.reshape(do.shape), dv.reshape(do.shape)
