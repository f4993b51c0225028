"""exp and 1 + tanh, by whichever of NumPy's functions has vector instructions on this processor.

NumPy compiles each of its functions for some instruction sets only. Nanoseconds for a number in float32,
measured on one processor with all its instructions, and without those of 512 bits:

    ===========  =====  =====
    vectors of   512    256 bits
    ===========  =====  =====
    exp          0.34   0.70
    exp2         0.15   1.56 (it has none)
    tanh         0.24   1.57
    ===========  =====  =====

NumPy says what it uses, so the choice is made once, on import, and is the same on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["POWER", "Power", "one_plus_tanh"]


class Power(NamedTuple):
    """A power function, and the logarithm of e to its base: exp(x) is of(log_e x)."""

    of: Callable[..., Any]  # of(x, out=...), as NumPy's functions
    log_e: float


def _vectors(function: str) -> str:
    """The instruction set of a function of NumPy's in float32; "" where it does not say."""
    try:
        return np.lib.introspect.opt_func_info(f"^{function}$", "float32")[function]["ff"]["current"]
    except KeyError:
        return ""


def _choose_power(of_exp2: str) -> Power:
    if of_exp2.startswith(("X86_V4", "AVX512")):
        return Power(np.exp2, math.log2(math.e))
    return Power(np.exp, 1.0)


def _by_tanh(u: np.ndarray, out: np.ndarray) -> None:
    np.tanh(u, out=out)
    out += 1.0


def _by_exp(u: np.ndarray, out: np.ndarray) -> None:
    """2 / (1 + exp(-2 u)).  Where exp overflows that is rightly 0.  (docs: A.10)"""
    np.multiply(u, -2.0, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1.0
    np.divide(2.0, out, out=out)


def _choose_tanh(of_exp: str) -> Any:
    """By exp where that has vectors of 256 bits, though it takes two more passes: they are cheap."""
    return _by_exp if of_exp.startswith(("X86_V3", "AVX2", "FMA3")) else _by_tanh


POWER = _choose_power(_vectors("exp2"))

# one_plus_tanh(u, out) writes 1 + tanh(u) to `out`.
one_plus_tanh = _choose_tanh(_vectors("exp"))
