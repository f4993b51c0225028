"""The optimiser's chains, in place, in one pass through memory."""

from __future__ import annotations

import numpy as np

from tinydiff.kernels import _optim
from tinydiff.kernels._numba_jit import fits, inlined, jit

__all__ = ["adam_step", "ema_step"]


@inlined
def _average(mean, new, beta, rate):  # type: ignore[no-untyped-def]
    """As ``portable._average``, with rate = 1 - beta."""
    return beta * mean + rate * new if beta < rate else mean + rate * (new - mean)


@jit
def _adam_step(value, grad, m, v, step_size, beta1, beta2, rate1, rate2, per_root, eps, decay):  # type: ignore[no-untyped-def]
    for i in range(value.size):
        g = grad[i]
        m1 = _average(m[i], g, beta1, rate1)
        v1 = _average(v[i], g * g, beta2, rate2)
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
    rates = (beta1, beta2, 1.0 - beta1, 1.0 - beta2)  # computed in float64, as the root
    scalars = (step_size, *rates, 1.0 / root, eps, decay)
    _adam_step(*flat, *map(value.dtype.type, scalars))
    return value, m, v


def ema_step(average: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """Move `average` in place; see ``portable.ema_step``."""
    if not fits(average, value):
        return _optim.ema_step(average, value, rate)
    average = np.asarray(average, order="C")
    _ema(average.reshape(-1), np.ascontiguousarray(value).reshape(-1), float(rate))
    return average
