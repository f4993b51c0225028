"""NumPy twins of the optimiser's element-wise chains: in place, in blocks that stay in cache.

The definition in ``portable.py`` makes a new array for every operator, each a pass through memory; here a
block of the weights goes through the whole chain before the next one is touched.

A network of small layers has many weights smaller than a block, and a dozen calls for each cost more than
their arithmetic. `Together` lays their moments end to end, and steps them all as one array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinydiff.backend import is_numpy_array

__all__ = ["Together", "adam_change", "adam_step", "ema_step"]

BLOCK = 32_768  # elements: five float32 blocks are 640 KiB


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The same stretch of every array, block by block; views, so what is written in them stays."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


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
    value, m, v = (np.asarray(array, order="C") for array in (value, m, v))
    for w, g, m1, v1 in _blocks(value, np.ascontiguousarray(grad), m, v):
        change = np.empty_like(g)
        _move(g, m1, v1, change, step_size, beta1, beta2, root, eps)
        if decay != 1.0:
            w *= decay
        w -= change
    return value, m, v


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
    for g, m1, v1 in _blocks(grad, m, v):
        _move(g, m1, v1, g, step_size, beta1, beta2, root, eps)
    return grad, m, v


def _move(
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    change: np.ndarray,
    step_size: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
) -> None:
    """Step the moments in place; `change`, which may be `g`, becomes step_size m / (sqrt(v) / root + eps).

    Numerator and denominator are both multiplied by root: one pass less.
    """
    a = g - m
    a *= 1.0 - beta1
    m += a
    np.multiply(g, g, out=change)
    change -= v
    change *= 1.0 - beta2
    v += change
    np.sqrt(v, out=change)
    change += eps * root
    np.divide(m, change, out=change)
    change *= step_size * root


class Together:
    """Moments of many small arrays of one dtype, laid end to end, so that Adam steps them all as one.

    Parameters
    ----------
    m, v : list of array
        Adam's moments. Those numbered `which` are replaced by views of this object's memory, here and
        before any step that finds others in their places.
    which : sequence of int
        Which of them; NumPy arrays of one dtype.

    Notes
    -----
    Not to be copied: views would come out as arrays of their own.
    """

    @classmethod
    def groups(cls, values: Sequence[Any], m: list[Any], v: list[Any]) -> list[Together]:
        """One for every dtype of which there are two or more NumPy arrays of less than a block."""
        by_dtype: dict[Any, list[int]] = {}
        for i, value in enumerate(values):
            if is_numpy_array(value) and value.size < BLOCK:
                by_dtype.setdefault(value.dtype, []).append(i)
        return [cls(m, v, which) for which in by_dtype.values() if len(which) > 1]

    def __init__(self, m: list[np.ndarray], v: list[np.ndarray], which: Sequence[int]) -> None:
        self.which = which
        shapes = [m[i].shape for i in which]
        edges = np.cumsum([0, *(m[i].size for i in which)]).tolist()
        self._flat = [np.empty(edges[-1], m[which[0]].dtype) for _ in range(3)]  # gradients, m, v
        self._views = [
            [flat[a:b].reshape(s) for a, b, s in zip(edges[:-1], edges[1:], shapes, strict=True)]
            for flat in self._flat
        ]
        self._adopt(m, v)

    def fits(self, values: Sequence[Any]) -> bool:
        """Whether these are still NumPy arrays of the dtype; a model may have been moved."""
        dtype = self._flat[0].dtype
        return all(type(value) is np.ndarray and value.dtype == dtype for value in values)

    def _adopt(self, m: list[np.ndarray], v: list[np.ndarray]) -> None:
        """Copy in what has been put in a moment's place, by a checkpoint or a copy of the optimiser."""
        for moments, views in zip((m, v), self._views[1:], strict=True):
            for i, view in zip(self.which, views, strict=True):
                if moments[i] is not view:
                    view[...] = moments[i]
                    moments[i] = view

    def step(
        self,
        kernels: Any,
        values: Sequence[np.ndarray],
        grads: Sequence[np.ndarray],
        m: list[np.ndarray],
        v: list[np.ndarray],
        step_size: float,
        beta1: float,
        beta2: float,
        root: float,
        eps: float,
        decay: float,
    ) -> None:
        """As `adam_step` for each of `values` and `grads`, those numbered `which`; all is done in place.

        `kernels` is the module whose `adam_change` does it.
        """
        self._adopt(m, v)
        np.concatenate(grads, axis=None, out=self._flat[0])
        moved = kernels.adam_change(*self._flat, step_size, beta1, beta2, root, eps)
        for flat, new in zip(self._flat, moved, strict=True):
            if new is not flat:  # from the definition, which writes over nothing
                flat[...] = new
        for value, change in zip(values, self._views[0], strict=True):
            if decay != 1.0:
                value *= decay
            value -= change


def ema_step(average: np.ndarray, value: np.ndarray, rate: float) -> np.ndarray:
    """Move `average` in place; see ``portable.ema_step``."""
    average = np.asarray(average, order="C")
    for a, w in _blocks(average, np.ascontiguousarray(value)):
        difference = w - a
        difference *= rate
        a += difference
    return average
