"""The exponential function of sixteen numbers at once, and the sigmoid.

LLVM has no vector instruction for exp, so here is one of sums and products (docs: A.25). With
n the integer next to x / ln 2::

    exp(x) = 2^n exp(r),   r = x - n ln 2,   |r| <= ln 2 / 2

exp(r) is its Taylor polynomial, to a degree whose remainder is below rounding, and 2^n is a matter of bits.
ln 2 is split in two, so that n times the first part is exact. n comes from adding and then subtracting a
number so large that its last binary digit counts ones, 1.5 times 2^23 or 2^52: the sum is rounded to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from tinydiff.kernels._numba_jit import OPTIONS
from tinydiff.kernels._numba_lanes import Lanes, clamp, scale_by_power_of_two, spread

__all__ = ["exp", "sigmoid"]


def exp(x: Any) -> Any:
    """e^x of a vector.  NaN gives NaN, what overflows infinity, what underflows 0.  (docs: A.25)"""
    raise NotImplementedError("only for compiled code")


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) of a vector.  Where e^-x overflows, 0.  (docs: A.12, A.25)"""
    raise NotImplementedError("only for compiled code")


def _constants(real: Any) -> tuple[Any, ...]:
    """What `exp` needs in float32 or float64: see the comments."""
    single = real is np.float32
    # Beyond these exp is 0 or infinity.
    low, high = (-104, 89) if single else (-746, 710)
    magic = 1.5 * 2.0 ** (23 if single else 52)
    # ln 2 to so few binary digits that n times it, n < 2^8 or 2^11, is exact, and the rest.
    ln2_high, ln2_low = (
        (0.693145751953125, 1.4286068203094173e-06)
        if single
        else (float.fromhex("0x1.62e42fefa3000p-1"), float.fromhex("0x1.3de6af278ece6p-42"))
    )
    taylor = [1 / math.factorial(k) for k in range(7 if single else 13, -1, -1)]
    numbers = (low, high, magic, 1 / math.log(2), ln2_high, ln2_low)
    return *map(real, numbers), tuple(map(real, taylor))


@overload(exp, jit_options=OPTIONS)
def _exp(x):  # type: ignore[no-untyped-def]
    if not isinstance(x, Lanes):
        return None
    low, high, magic, per_ln2, ln2_high, ln2_low, taylor = _constants(
        np.float32 if x.dtype == types.float32 else np.float64
    )
    first, rest = taylor[0], taylor[1:]

    def implementation(x):  # type: ignore[no-untyped-def]
        x = clamp(x, low, high)
        shifted = per_ln2 * x + magic
        n = shifted - magic
        r = x - ln2_high * n - ln2_low * n
        p = spread(first)
        for coefficient in rest:
            p = p * r + coefficient
        return scale_by_power_of_two(p, shifted, magic)

    return implementation


@overload(sigmoid, jit_options=OPTIONS)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    if not isinstance(x, Lanes):
        return None
    zero, one = (np.float32(0), np.float32(1)) if x.dtype == types.float32 else (0.0, 1.0)
    return lambda x: one / (one + exp(zero - x))
