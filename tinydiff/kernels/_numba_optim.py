"""The optimiser's chains, in place, in one pass through memory."""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _optim
from tinydiff.kernels._numba_jit import fits, jit

__all__ = ["adam_step", "ema_step"]


@jit
def _adam_step(value, grad, m, v, step_size, rate1, rate2, per_root, eps, decay):  # type: ignore[no-untyped-def]
    for i in range(value.size):
        g = grad[i]
        m1 = m[i] + rate1 * (g - m[i])
        v1 = v[i] + rate2 * (g * g - v[i])
        m[i], v[i] = m1, v1
        value[i] = decay * value[i] - step_size * (m1 / (np.sqrt(v1) * per_root + eps))


@jit
def _ema(average, value, rate):  # type: ignore[no-untyped-def]
    r = average.dtype.type(rate)
    for i in range(average.size):
        average[i] += r * (value[i] - average[i])


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
    scalars = (step_size, 1.0 - beta1, 1.0 - beta2, 1.0 / root, eps, decay)  # computed in float64
    _adam_step(*flat, *map(value.dtype.type, scalars))
    return value, m, v


def ema_step(average: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """Move `average` in place; see ``portable.ema_step``."""
    if not fits(average, value):
        return _optim.ema_step(average, value, rate)
    average = np.asarray(average, order="C")
    _ema(average.reshape(-1), np.ascontiguousarray(value).reshape(-1), float(rate))
    return average
