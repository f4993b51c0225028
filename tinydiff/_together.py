"""Many arrays as one: laid end to end, so that one call does what would be a call for each.

A network has a hundred weights and more. What is done to them element by element (Adam, the moving average,
scaling) does not mind where an array ends, and a dozen calls for each take longer than their arithmetic: of
small arrays on the host, of any on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tinydiff.backend import Array, array_namespace, device, is_numpy_array
from tinydiff.kernels._optim import BLOCK

__all__ = ["EndToEnd", "Together", "cut", "end_to_end", "groups"]


def groups(arrays: Sequence[Array]) -> list[list[int]]:
    """The numbers of those to lay end to end: two or more of one dtype, and in NumPy each less than a block.

    A larger one in NumPy is stepped block by block where it is (``kernels/_optim.py``).
    """
    alike: dict[tuple[type, Any], list[int]] = {}
    for i, array in enumerate(arrays):
        if not is_numpy_array(array) or array.size < BLOCK:
            alike.setdefault((type(array), array.dtype), []).append(i)
    return [which for which in alike.values() if len(which) > 1]


def end_to_end(arrays: Sequence[Array]) -> Array:
    """Their elements in a row, in a new array (size,)."""
    return array_namespace(arrays[0]).concat(arrays, axis=None)


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
    """Copies of arrays in one stretch of memory, which stays where it is.

    Parameters
    ----------
    arrays : sequence of array
        Of one library, dtype and device.

    Attributes
    ----------
    flat : array of shape (size,)
    views : list of array
        Its parts, in the shapes of `arrays`.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.flat = end_to_end(arrays)
        self.views = cut(self.flat, [tuple(array.shape) for array in arrays])

    def fits(self, arrays: Sequence[Array]) -> bool:
        """Whether these could be copied in."""
        flat = self.flat
        return all(
            array is view
            or (type(array) is type(flat) and array.dtype == flat.dtype and device(array) == device(flat))
            for array, view in zip(arrays, self.views, strict=True)
        )

    def hold(self, arrays: Sequence[Array]) -> None:
        """Copy `arrays` in, unless they are the views."""
        if any(array is not view for array, view in zip(arrays, self.views, strict=True)):
            self.write(end_to_end(arrays))

    def write(self, flat: Array) -> None:
        """Put these numbers (size,) here."""
        if flat is not self.flat:
            self.flat[...] = flat


class Together:
    """Lists of arrays, number i of each being of one shape, of which all that is alike lies end to end.

    Its copy begins anew: views would come out as arrays of their own.
    """

    def __init__(self) -> None:
        self._laid: list[tuple[list[int], list[EndToEnd]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_laid": []}

    def hold(self, *lists: list[Array]) -> list[tuple[list[int], list[EndToEnd]]]:
        """Lay them end to end, if they are not; within the lists, views take their places.

        Another array may have been put in a view's place, by a checkpoint, say: it is copied in. If the
        arrays have been moved to another library or device, they are laid out there.

        Parameters
        ----------
        *lists : list of array
            The same number of them, of the same shapes, at every call.

        Returns
        -------
        list of tuple of (list of int, list of EndToEnd)
            For each group the numbers of its arrays, and where those of each list are.
        """

        def of(which: list[int]) -> list[list[Array]]:
            return [[arrays[i] for i in which] for arrays in lists]

        fits = bool(self._laid) and all(
            each.fits(arrays)
            for which, together in self._laid
            for each, arrays in zip(together, of(which), strict=True)
        )
        if not fits:
            self._laid = [(which, [EndToEnd(arrays) for arrays in of(which)]) for which in groups(lists[0])]
        for which, together in self._laid:
            for each, arrays, whole in zip(together, of(which), lists, strict=True):
                each.hold(arrays)
                for i, view in zip(which, each.views, strict=True):
                    whole[i] = view
        return self._laid
