"""The CuPy twin of ``portable.py``: the same functions, the same results, in few launches.

On a GPU a small network waits for its launches, not for arithmetic (docs: A.27), and a large one for memory.
A chain of element-wise passes is one kernel here, in CUDA. So is a float32 convolution or linear layer, by
tensor cores (``_cupy_conv.py``; docs: A.28). Other ones are rows, laid out by one launch (docs: A.4),
and a product by cuBLAS (``_cupy_products.py``).
"""

from __future__ import annotations

from typing import Any

import cupy

from tinydiff.kernels import _cupy_attention
from tinydiff.kernels._cupy_conv import convolved, fits, weight_gradient
from tinydiff.kernels._cupy_elements import adam_step, ema_step, silu, silu_backward
from tinydiff.kernels._cupy_flat import end_to_end
from tinydiff.kernels._cupy_gather import reached_rows, seen_rows, upsample_backward
from tinydiff.kernels._cupy_norm import (
    group_norm,
    group_norm_backward,
    group_norm_silu,
    group_norm_silu_backward,
)
from tinydiff.kernels._cupy_products import product
from tinydiff.kernels._cupy_softmax import softmax_backward_in_place, softmax_in_place
from tinydiff.kernels._cupy_sums import over_rows
from tinydiff.kernels.portable import Padding, upsample

__all__ = [
    "adam_step",
    "attention",
    "attention_backward",
    "conv2d",
    "conv2d_backward",
    "ema_step",
    "end_to_end",
    "group_norm",
    "group_norm_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "linear",
    "linear_backward",
    "silu",
    "silu_backward",
    "sum_pixels",
    "upsample",
    "upsample_backward",
    "upsample_conv2d",
    "upsample_conv2d_backward",
]


def conv2d(x: Any, w: Any, b: Any, stride: int, padding: Padding) -> Any:
    """As ``portable.conv2d``: one kernel; where it does not fit, rows, product, bias.  (docs: B.7, A.28)"""
    return _conv(x, w, b, stride, padding, doubled=False)


def _conv(x: Any, w: Any, b: Any, stride: int, padding: Padding, doubled: bool) -> Any:
    k, _, _, d = w.shape
    x = cupy.ascontiguousarray(x)
    n, *sizes, _ = x.shape
    h, width = (((size << doubled) + sum(padding) - k) // stride + 1 for size in sizes)
    if fits(k, x, w, b, uneven=(h, width) if doubled else ()):
        return convolved(x, w, b, (h, width), stride, padding, doubled=doubled)
    y = product(seen_rows(x, k, stride, padding, doubled), w.reshape(-1, d))
    y += b
    return y.reshape(n, h, width, d)


def conv2d_backward(x: Any, w: Any, dy: Any, stride: int, padding: Padding) -> tuple[Any, Any, Any]:
    """As ``portable.conv2d_backward``.  (docs: B.8, B.9)"""
    dy = cupy.ascontiguousarray(dy)
    dx = _conv_dx(w, dy, x.shape[1:3], stride, padding)
    return dx, *_conv_dw_db(x, w, dy, stride, padding, doubled=False)


def _conv_dx(w: Any, dy: Any, sizes: tuple[int, int], stride: int, padding: Padding) -> Any:
    """The outputs that each pixel reaches, times the taps' transposes."""
    k, _, c, d = w.shape
    if fits(k, dy, w, uneven=tuple(sizes) if stride > 1 else ()) and c % 4 == 0:
        return convolved(dy, w, None, sizes, stride, padding, turned=True)
    rows = reached_rows(dy, sizes, k, stride, padding)
    if k == 1:
        dx = product(rows, w.reshape(c, d), tb=True)
    else:
        dx = product(rows, w.transpose(0, 1, 3, 2).reshape(-1, c))
    return dx.reshape(dy.shape[0], *sizes, c)


def _conv_dw_db(x: Any, w: Any, dy: Any, stride: int, padding: Padding, doubled: bool) -> tuple[Any, Any]:
    k, _, _, d = w.shape
    x = cupy.ascontiguousarray(x)
    if fits(k, x, dy):
        dw, db = weight_gradient(x, dy, k, stride, padding, doubled=doubled)
    else:
        dy_rows = dy.reshape(-1, d)
        dw, db = product(seen_rows(x, k, stride, padding, doubled), dy_rows, ta=True), over_rows(dy_rows)
    return dw.reshape(w.shape), db


def upsample_conv2d(x: Any, w: Any, b: Any) -> Any:
    """As ``portable.upsample_conv2d``: the doubled image is never made."""
    return _conv(x, w, b, 1, (1, 1), doubled=True)


def upsample_conv2d_backward(x: Any, w: Any, dy: Any) -> tuple[Any, Any, Any]:
    """As ``portable.upsample_conv2d_backward``."""
    dy = cupy.ascontiguousarray(dy)
    dx = upsample_backward(_conv_dx(w, dy, dy.shape[1:3], 1, (1, 1)))
    return dx, *_conv_dw_db(x, w, dy, 1, (1, 1), doubled=True)


def sum_pixels(x: Any) -> Any:
    """As ``portable.sum_pixels``."""
    n, h, w, c = x.shape
    return over_rows(cupy.ascontiguousarray(x).reshape(n, h * w, c))


def _rows(x: Any) -> Any:
    return cupy.ascontiguousarray(x).reshape(-1, x.shape[-1])


def linear(x: Any, w: Any, b: Any) -> Any:
    """As ``portable.linear``.  (docs: B.1)"""
    rows, d = _rows(x), w.shape[1]
    if fits(1, rows, w, b):
        y = convolved(rows[:, None, None], w[None, None], b, (1, 1), 1, (0, 0))
    else:
        y = product(rows, w)
        y += b
    return y.reshape(*x.shape[:-1], d)


def linear_backward(x: Any, w: Any, dy: Any) -> tuple[Any, Any, Any]:
    """As ``portable.linear_backward``.  (docs: B.2)"""
    rows, dy_rows = _rows(x), _rows(dy)
    if fits(1, rows, dy_rows, w):
        there = dy_rows[:, None, None]
        dx = convolved(there, w[None, None], None, (1, 1), 1, (0, 0), turned=True)
        dw, db = weight_gradient(rows[:, None, None], there, 1, 1, (0, 0))
    else:
        dx = product(dy_rows, w, tb=True)
        dw, db = product(rows, dy_rows, ta=True), over_rows(dy_rows)
    return dx.reshape(x.shape), dw, db


def attention(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, tuple[Any, ...]]:
    """As ``portable.attention``: narrow heads without a matrix of scores; else products.  (docs: B.12)"""
    n, heads, length, d = q.shape
    if d <= _cupy_attention.WIDEST and k.shape[2] == length and q.size:
        return _cupy_attention.attention(q, k, v, scale)
    flat = [cupy.ascontiguousarray(a).reshape(n * heads, *a.shape[2:]) for a in (q, k, v)]
    p = softmax_in_place(product(flat[0], flat[1], tb=True, scale=scale))
    return product(p, flat[2]).reshape(q.shape), (*flat, p, scale)


def attention_backward(saved: tuple[Any, ...], do: Any) -> tuple[Any, Any, Any]:
    """As ``portable.attention_backward``.  (docs: B.13)"""
    if isinstance(saved, _cupy_attention.Attended):
        return _cupy_attention.attention_backward(saved, do)
    q, k, v, p, scale = saved
    n, heads, *each = do.shape
    do = cupy.ascontiguousarray(do).reshape(n * heads, *each)
    ds = softmax_backward_in_place(p, product(do, v, tb=True))
    grads = (
        product(ds, k, scale=scale),
        product(ds, q, ta=True, scale=scale),
        product(p, do, ta=True),
    )
    dq, dk, dv = (grad.reshape(n, heads, *grad.shape[1:]) for grad in grads)
    return dq, dk, dv
