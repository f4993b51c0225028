"""The definition of every tuned routine, in the array API standard.

A twin in another file, written for speed, must agree with these lines over random shapes. One thing is done
here for a GPU's sake: each routine takes few calls, since there a call costs more than its arithmetic (docs:
A.27). A product of images and a matrix is written as one product of rows: CuPy would otherwise make one small
product for every row of every image.

Shapes: N images, H x W pixels, C channels (last), k x k taps, G groups.  Padding is
``(before, after)``, the same for rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff.backend import Array, array_namespace, constant_like

__all__ = [
    "Padding",
    "adam_step",
    "attention",
    "attention_backward",
    "conv2d",
    "conv2d_backward",
    "ema_step",
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

Padding = tuple[int, int]


def seen(size: int, k: int, stride: int, padding: Padding) -> np.ndarray:
    """Along an axis of this size: the pixel that output p sees through tap i, s p + i - before.

    (size', k), integers, with size' = (size + before + after - k) // s + 1; outside 0 … size-1 are the padded
    zeros.  (docs: B.7)
    """
    before, after = padding
    p = np.arange((size + before + after - k) // stride + 1)
    return stride * p[:, None] + np.arange(k) - before


def reached(size: int, k: int, stride: int, padding: Padding) -> np.ndarray:
    """The other way: the output p that pixel r reaches through tap i, s p + i = r + before; -1 for none.

    (size, k), integers; outside 0 … size'-1 there are no outputs.  (docs: B.8)
    """
    before, _ = padding
    p, rest = np.divmod(np.arange(size)[:, None] + before - np.arange(k), stride)
    return np.where(rest == 0, p, -1)


def _pixels(find: Callable[..., np.ndarray], h: int, w: int, sizes: tuple[int, int], *how: Any) -> np.ndarray:
    """The numbers r W + c of the pixels that `find` names, H W where it has none: (A, B, k, k)."""
    r, c = (find(size, *how) for size in sizes)
    r, c = r[:, None, :, None], c[:, None, :]
    return np.where((r >= 0) & (r < h) & (c >= 0) & (c < w), r * w + c, h * w)


def windows(
    x: Array, find: Callable[..., np.ndarray], sizes: tuple[int, int], k: int, stride: int, padding: Padding
) -> Array:
    """In a row, the k x k pixels of x (N, H, W, C) that `find` names along the axes; zeros where it has none.

    `find` is `seen` or `reached`, `sizes` are those of the convolution's input.  ->  (N, A, B, k k C),
    A and B as many as `find` has for each.
    """
    if (k, stride, *padding) == (1, 1, 0, 0):
        return x  # every pixel sees itself
    xp = array_namespace(x)
    n, h, w, c = x.shape
    geometry = (tuple(sizes), k, stride, tuple(padding))
    pixels = constant_like(_pixels, find, h, w, *geometry, like=x, dtype=xp.int64)
    zero = xp.broadcast_to(constant_like(np.zeros, (1, 1, c), like=x, dtype=x.dtype), (n, 1, c))
    and_zero = xp.concat([xp.reshape(x, (n, h * w, c)), zero], axis=1)
    rows = xp.take(and_zero, xp.reshape(pixels, (-1,)), axis=1)
    return xp.reshape(rows, (n, *pixels.shape[:2], k * k * c))


def conv2d(x: Array, w: Array, b: Array, stride: int, padding: Padding) -> Array:
    """Cross-correlate: y[n,p,q,:] = b + sum_ij xpad[n, s p + i, s q + j, :] @ w[i,j].  (docs: B.7)

    x (N, H, W, C), w (k, k, C, D), b (D,)  ->  y (N, H', W', D), H' = (H + before + after - k) // s + 1.
    The sum over taps and the sum over channels are one: the product of `windows` and w, as matrices.
    """
    return _rows_times(windows(x, seen, x.shape[1:3], w.shape[0], stride, padding), w) + b


def conv2d_backward(
    x: Array, w: Array, dy: Array, stride: int, padding: Padding
) -> tuple[Array, Array, Array]:
    """Gradients of `conv2d`.  (docs: B.8, B.9)

    dxpad[n,u,v,:] = sum_ij dy[n,p,q,:] @ w[i,j].T, over the taps for which there are p, q: s p + i = u,
    s q + j = v.     dw[i,j] = sum_npq xpad[n, s p + i, s q + j, :].T dy[n,p,q,:]     db = sum_npq dy

    dy (N, H', W', D)  ->  dx (N, H, W, C), dw (k, k, C, D), db (D,)
    """
    xp = array_namespace(x)
    k, _, c, d = w.shape
    geometry = (x.shape[1:3], k, stride, padding)
    dx = _rows_times(windows(dy, reached, *geometry), xp.permute_dims(w, (0, 1, 3, 2)))
    dy_rows = xp.reshape(dy, (-1, d))
    dw = xp.reshape(windows(x, seen, *geometry), (-1, k * k * c)).T @ dy_rows
    return dx, xp.reshape(dw, w.shape), xp.sum(dy_rows, axis=0)


def _group_means(x: Array) -> Array:
    """Mean over each group of x (N, H, W, G, C/G), rows first: shorter sums round less.  (docs: A.14)"""
    xp = array_namespace(x)
    return xp.mean(xp.mean(x, axis=(2, 4), keepdims=True), axis=1, keepdims=True)


def group_norm(
    x: Array, weight: Array, bias: Array, groups: int, eps: float
) -> tuple[Array, tuple[Array, Array]]:
    """y = weight * xhat + bias,  xhat = (x - mean) / sqrt(var + eps) over each group.  (docs: B.10)

    x (N, H, W, C), weight and bias (C,)  ->  y (N, H, W, C), and what `group_norm_backward` needs:
    xhat (N, H, W, G, C/G) and rstd = 1/sqrt(var + eps) (N, 1, 1, G, 1).
    """
    xp = array_namespace(x)
    n, h, w, c = x.shape
    g = xp.reshape(x, (n, h, w, groups, c // groups))
    centred = g - _group_means(g)
    var = _group_means(centred * centred)
    rstd = 1.0 / xp.sqrt(var + eps)
    xhat = centred * rstd
    return xp.reshape(xhat, x.shape) * weight + bias, (xhat, rstd)


def group_norm_backward(saved: tuple[Array, Array], weight: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Gradients of `group_norm`, with g = dy * weight.  (docs: B.11)

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))     dweight = sum dy * xhat     dbias = sum dy
    """
    xp = array_namespace(dy)
    xhat, rstd = saved
    dy_grouped = xp.reshape(dy, xhat.shape)
    g = xp.reshape(dy * weight, xhat.shape)
    dx = rstd * (g - _group_means(g) - xhat * _group_means(g * xhat))
    dweight = xp.reshape(xp.sum(dy_grouped * xhat, axis=(0, 1, 2)), weight.shape)
    dbias = xp.reshape(xp.sum(dy_grouped, axis=(0, 1, 2)), weight.shape)
    return xp.reshape(dx, dy.shape), dweight, dbias


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) as exp(x) / (1 + exp(x)); where exp could overflow it is 1.  (docs: A.12)"""
    xp = array_namespace(x)
    e = xp.exp(xp.minimum(x, 80.0))
    return e / (1.0 + e)


def silu(x: Array) -> tuple[Array, Array]:
    """y = x s with s = sigmoid(x).  (docs: B.3)   Returns y and s, both of x's shape."""
    s = sigmoid(x)
    return x * s, s


def silu_backward(s: Array, y: Array, dy: Array) -> Array:
    """dx = dy (s + y (1 - s)).  (docs: B.3)"""
    return dy * (s + y * (1.0 - s))


def group_norm_silu(
    x: Array, weight: Array, bias: Array, groups: int, eps: float
) -> tuple[Array, tuple[Any, Array, Array]]:
    """`silu` of `group_norm`, the pair that stands before every 3x3 convolution of a residual block.

    Returns y and what `group_norm_silu_backward` needs.  (docs: B.3, B.10)
    """
    z, saved = group_norm(x, weight, bias, groups, eps)
    y, s = silu(z)
    return y, (saved, s, y)


def group_norm_silu_backward(
    saved: tuple[Any, Array, Array], weight: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """Gradients of `group_norm_silu`: dx, dweight, dbias.  (docs: B.3, B.11)"""
    norm_saved, s, y = saved
    return group_norm_backward(norm_saved, weight, silu_backward(s, y, dy))


def sum_pixels(x: Array) -> Array:
    """Sum over the pixels of each image: (N, H, W, C)  ->  (N, C)."""
    return array_namespace(x).sum(x, axis=(1, 2))


def upsample(x: Array) -> Array:
    """y[n,p,q,:] = x[n, p // 2, q // 2, :]: (N, H, W, C)  ->  (N, 2H, 2W, C).  (docs: B.15)"""
    xp = array_namespace(x)
    n, h, w, c = x.shape
    copies = xp.broadcast_to(xp.reshape(x, (n, h, 1, w, 1, c)), (n, h, 2, w, 2, c))
    return xp.reshape(copies, (n, 2 * h, 2 * w, c), copy=True)  # of one number it would otherwise be a view


def upsample_backward(dy: Array) -> Array:
    """dx = the sum of dy over the four copies: (N, 2H, 2W, C)  ->  (N, H, W, C).  (docs: B.15)"""
    n, h, w, c = dy.shape
    copies = array_namespace(dy).reshape(dy, (n, h // 2, 2, w // 2, 2, c))
    rows = copies[:, :, 0, ...] + copies[:, :, 1, ...]
    return rows[:, :, :, 0, :] + rows[:, :, :, 1, :]


def upsample_conv2d(x: Array, w: Array, b: Array) -> Array:
    """Double the pixels of x (N, H, W, C), and convolve with w (3, 3, C, D): (N, 2H, 2W, D)."""
    return conv2d(upsample(x), w, b, 1, (1, 1))


def upsample_conv2d_backward(x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Gradients of `upsample_conv2d` by x, w and b."""
    dx, dw, db = conv2d_backward(upsample(x), w, dy, 1, (1, 1))
    return upsample_backward(dx), dw, db


def _rows_times(x: Array, w: Array) -> Array:
    """x w over the last axis, as one product of rows: x (..., C), w of C rows in all  ->  (..., D)."""
    xp = array_namespace(x)
    c, d = x.shape[-1], w.shape[-1]
    return xp.reshape(xp.reshape(x, (-1, c)) @ xp.reshape(w, (c, d)), (*x.shape[:-1], d))


def linear(x: Array, w: Array, b: Array) -> Array:
    """y = x w + b over the last axis: x (..., C), w (C, D), b (D,)  ->  y (..., D).  (docs: B.1)"""
    return _rows_times(x, w) + b


def linear_backward(x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """dx = dy w.T,  dw = x.T dy,  db = sum dy,  with rows flattened.  (docs: B.2)"""
    xp = array_namespace(x)
    x_rows = xp.reshape(x, (-1, w.shape[0]))
    dy_rows = xp.reshape(dy, (-1, w.shape[1]))
    return _rows_times(dy, w.T), x_rows.T @ dy_rows, xp.sum(dy_rows, axis=0)


def softmax(x: Array) -> Array:
    """p = exp(x) / sum exp(x) over the last axis, shifted so that exp cannot overflow.  (docs: B.14)"""
    xp = array_namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def softmax_backward(p: Array, dp: Array) -> Array:
    """dx = p (dp - sum_k p_k dp_k).  (docs: B.14)"""
    xp = array_namespace(p)
    return p * (dp - xp.sum(p * dp, axis=-1, keepdims=True))


def _transpose(x: Array) -> Array:
    return array_namespace(x).permute_dims(x, (0, 1, 3, 2))


def attention(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    """o = p v,  p = softmax(scale q k.T), for each image and head.  (docs: B.12)

    q, k, v (N, heads, L, d)  ->  o (N, heads, L, d), and what `attention_backward` needs.
    """
    p = softmax((q @ _transpose(k)) * scale)
    return p @ v, (q, k, v, p, scale)


def attention_backward(saved: tuple[Any, ...], do: Array) -> tuple[Array, Array, Array]:
    """Gradients of `attention`: dq, dk, dv.  (docs: B.13)

    dv = p.T do,  dp = do v.T,  ds = scale * softmax_backward(p, dp),  dq = ds k,  dk = ds.T q
    """
    q, k, v, p, scale = saved
    ds = softmax_backward(p, do @ _transpose(v)) * scale
    return ds @ k, _transpose(ds) @ q, _transpose(p) @ do


def _average(mean: Array, new: Array, beta: float) -> Array:
    """beta mean + (1 - beta) new; from beta 1/2 on as a step away from `mean`.

    So a beta near 1 is rounded once, and with one below 1/2 a large `mean` does not cost `new` its digits:
    mean + (new - mean) is 0 for 1e8 and 1 in float32.
    """
    return beta * mean + (1.0 - beta) * new if beta < 0.5 else mean + (1.0 - beta) * (new - mean)


def adam_step(
    value: Array,
    grad: Array,
    m: Array,
    v: Array,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    decay: float,
) -> tuple[Array, Array, Array]:
    """One step of Adam (Kingma & Ba 2015): new value and moments; a twin may reuse the old.  (docs: B.21)

    m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v)
    value = decay value - step_size m / (sqrt(v)/root + eps)
    """
    xp = array_namespace(value)
    m, v = _average(m, grad, beta1), _average(v, grad * grad, beta2)
    return decay * value - step_size * m / (xp.sqrt(v) * (1.0 / root) + eps), m, v


def ema_step(average: Array, value: Array, rate: float) -> Array:
    """average + rate (value - average); a twin may reuse `average`.  (docs: B.23)"""
    return average + rate * (value - average)
