"""Many arrays as one: laid end to end, so that one call does the work of a call for each.

A network has a hundred weights and more. What is done to them element by element (Adam, the moving average,
scaling) does not depend on where an array ends, and a dozen calls for each array take longer than their
arithmetic: for small arrays on the host, for any on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tinydiff.backend import Array, array_namespace, is_numpy_array
from tinydiff.kernels import kernels_for
from tinydiff.kernels._optim import BLOCK

__all__ = ["EndToEnd", "Together", "cut", "end_to_end", "groups"]


def groups(arrays: Sequence[Array]) -> list[list[int]]:
    """The indices of the arrays to lay end to end, a list for each group: one group for each dtype.

    A NumPy array of a block or more is a group by itself, stepped block by block (``kernels/_optim.py``).
    """
    alike: dict[tuple[type, Any, int | None], list[int]] = {}
    for i, array in enumerate(arrays):
        by_itself = i if is_numpy_array(array) and array.size >= BLOCK else None
        alike.setdefault((type(array), array.dtype, by_itself), []).append(i)
    return list(alike.values())


def end_to_end(arrays: Sequence[Array]) -> Array:
    """The arrays' elements in a row, (size,), only to be read: it may be a view."""
    laid = getattr(kernels_for(arrays[0]), "end_to_end", None)
    if laid is not None:
        return laid(arrays)
    xp = array_namespace(arrays[0])
    return xp.concat(arrays, axis=None) if len(arrays) > 1 else xp.reshape(arrays[0], (-1,))


def cut(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Views of `flat`, one after another, in these shapes."""
    xp = array_namespace(flat)
    edges = [0]
    for shape in shapes:
        edges.append(edges[-1] + math.prod(shape))
    return [
        xp.reshape(flat[start:stop], shape)
        for (start, stop), shape in zip(pairwise(edges), shapes, strict=True)
    ]


class EndToEnd:
    """Arrays in one stretch of memory: `flat` (size,), and `views`, its parts in the arrays' shapes.

    They are copied there, unless they are NumPy arrays that lie so already, as a single contiguous one does.

    Parameters
    ----------
    arrays : sequence of array
        Of one library, dtype and device.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        whole = _whole(arrays)
        if whole is not None:
            self.flat, self.views = whole, list(arrays)
        else:
            self.flat = array_namespace(arrays[0]).concat(arrays, axis=None)
            self.views = cut(self.flat, [tuple(array.shape) for array in arrays])

    def write(self, flat: Array) -> None:
        """Put these numbers (size,) here."""
        if flat is not self.flat:
            self.flat[...] = flat


def _whole(arrays: Sequence[Array]) -> Array | None:
    """The NumPy array (size,) of which these are all parts, one after another, if there is one."""
    first = arrays[0]
    if not isinstance(first, np.ndarray):
        return None
    if len(arrays) == 1:
        return first.reshape(-1) if first.flags.c_contiguous else None
    flat = first.base
    if not (isinstance(flat, np.ndarray) and flat.ndim == 1 and flat.size == sum(a.size for a in arrays)):
        return None
    parts = cut(flat, [array.shape for array in arrays])
    same = (a.__array_interface__ == part.__array_interface__ for a, part in zip(arrays, parts, strict=True))
    return flat if all(same) else None


class Together:
    """Keeps lists of arrays laid end to end, group by group; array i has the same shape in every list.

    A copy (or pickle) of it is empty: copies of the views would not share memory any more.
    """

    def __init__(self) -> None:
        self._laid: list[tuple[list[int], list[EndToEnd]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_laid": []}

    def hold(self, *lists: list[Array]) -> list[tuple[list[int], list[EndToEnd]]]:
        """Lay them end to end, if they are not; in the lists, the arrays are replaced by views of the result.

        That is done at the first call, and again whenever an array is not the view that was put there: after
        a checkpoint has been read, or the model has been moved to another device.

        Parameters
        ----------
        *lists : list of array
            The same number of them, of the same shapes, at every call.

        Returns
        -------
        list of tuple of (list of int, list of EndToEnd)
            For each group the indices of its arrays, and for each of `lists` those arrays, laid end to end.
        """
        lie_there = self._laid and all(
            arrays[i] is view
            for which, together in self._laid
            for arrays, each in zip(lists, together, strict=True)
            for i, view in zip(which, each.views, strict=True)
        )
        if not lie_there:
            self._laid = [
                (which, [EndToEnd([arrays[i] for i in which]) for arrays in lists])
                for which in groups(lists[0])
            ]
            for which, together in self._laid:
                for arrays, each in zip(lists, together, strict=True):
                    for i, view in zip(which, each.views, strict=True):
                        arrays[i] = view
        return self._laid
