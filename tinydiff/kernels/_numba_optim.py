"""The optimiser's chains, in place, in one pass through memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels import _optim
from tinydiff.kernels._numba_jit import fits, inlined, jit

__all__ = ["adam_change", "adam_step", "ema_step"]


@inlined
def _change(g, m, v, i, step_size, rate1, rate2, per_root, eps):  # type: ignore[no-untyped-def]
    """Step the moments number i by the gradient g; returns what is to be taken from the value."""
    m1 = m[i] + rate1 * (g - m[i])
    v1 = v[i] + rate2 * (g * g - v[i])
    m[i], v[i] = m1, v1
    return step_size * (m1 / (np.sqrt(v1) * per_root + eps))


@jit
def _adam_change(grad, m, v, scalars):  # type: ignore[no-untyped-def]
    for i in range(grad.size):
        grad[i] = _change(grad[i], m, v, i, *scalars)


@jit
def _adam_step(value, grad, m, v, scalars, decay):  # type: ignore[no-untyped-def]
    for i in range(value.size):
        value[i] = decay * value[i] - _change(grad[i], m, v, i, *scalars)


@jit
def _ema(average, value, rate):  # type: ignore[no-untyped-def]
    r = average.dtype.type(rate)
    for i in range(average.size):
        average[i] += r * (value[i] - average[i])


def _scalars(
    dtype: np.dtype, step_size: float, beta1: float, beta2: float, root: float, eps: float
) -> tuple[Any, ...]:
    """What `_change` takes, computed in float64."""
    return tuple(map(dtype.type, (step_size, 1.0 - beta1, 1.0 - beta2, 1.0 / root, eps)))


def adam_change(
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``portable.adam_change``, written over `grad`, `m` and `v`, which are contiguous."""
    how = (step_size, beta1, beta2, root, eps)
    if not fits(grad, m, v):
        return _optim.adam_change(grad, m, v, *how)
    _adam_change(*(array.reshape(-1) for array in (grad, m, v)), _scalars(grad.dtype, *how))
    return grad, m, v


def adam_step(
    value: np.ndarray,
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    decay: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step `value`, `m` and `v` in place; see ``portable.adam_step``."""
    if not fits(value, grad, m, v):
        return _optim.adam_step(value, grad, m, v, step_size, beta1, beta2, root, eps, decay)
    value, m, v = (np.asarray(array, order="C") for array in (value, m, v))
    flat = (array.reshape(-1) for array in (value, np.ascontiguousarray(grad), m, v))
    scalars = _scalars(value.dtype, step_size, beta1, beta2, root, eps)
    _adam_step(*flat, scalars, value.dtype.type(decay))
    return value, m, v


def ema_step(average: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """Move `average` in place; see ``portable.ema_step``."""
    if not fits(average, value):
        return _optim.ema_step(average, value, rate)
    average = np.asarray(average, order="C")
    _ema(average.reshape(-1), np.ascontiguousarray(value).reshape(-1), float(rate))
    return average
