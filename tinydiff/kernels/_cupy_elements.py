"""What goes element by element on a GPU, one launch each: SiLU, and the optimiser's chains, in place."""

from __future__ import annotations

from typing import Any

import cupy

from tinydiff.kernels import portable

__all__ = ["adam_step", "ema_step", "silu", "silu_backward"]

_silu = cupy.ElementwiseKernel("T x", "T y, T s", "s = T(1) / (T(1) + exp(-x)); y = x * s;", "tinydiff_silu")
_silu_backward = cupy.ElementwiseKernel(
    "T s, T y, T dy", "T dx", "dx = dy * (s + y * (T(1) - s));", "tinydiff_silu_backward"
)
_adam = cupy.ElementwiseKernel(
    "T g, float64 step_size, float64 rest1, float64 rest2, float64 root, float64 eps, float64 decay",
    "T w, T m, T v",
    """
    m += T(rest1) * (g - m);
    v += T(rest2) * (g * g - v);
    w = T(decay) * w - T(step_size) * m / (sqrt(v) * T(1.0 / root) + T(eps));
    """,
    "tinydiff_adam",
)
_ema = cupy.ElementwiseKernel("T w, float64 rate", "T a", "a += T(rate) * (w - a);", "tinydiff_ema")


def silu(x: Any) -> tuple[Any, Any]:
    """As ``portable.silu``."""
    return tuple(_silu(x))


def silu_backward(s: Any, y: Any, dy: Any) -> Any:
    """As ``portable.silu_backward``."""
    return _silu_backward(s, y, dy)


def adam_step(
    value: Any,
    grad: Any,
    m: Any,
    v: Any,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    decay: float,
) -> tuple[Any, Any, Any]:
    """Step `value`, `m` and `v`, in place unless a beta is below 1/2; see ``portable.adam_step``.

    With such a beta the kernel's v + (1 - beta) (g^2 - v) would lose a small g after a large one.
    """
    if min(beta1, beta2) < 0.5:
        return portable.adam_step(value, grad, m, v, step_size, beta1, beta2, root, eps, decay)
    _adam(grad, step_size, 1.0 - beta1, 1.0 - beta2, root, eps, decay, value, m, v)
    return value, m, v


def ema_step(average: Any, value: Any, rate: float) -> Any:
    """Move `average` in place; see ``portable.ema_step``."""
    _ema(value, rate, average)
    return average
