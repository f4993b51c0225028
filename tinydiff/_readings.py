"""The numbers of a training that the host wants to see, and when it asks for them.

On a device, to read a number is to wait until all that was asked of it is done. So the losses and gradients'
norms stay there, step after step, and are read together (docs: A.21). That a number is not finite is then
noticed late: the weights go back to those after the last reading that found all in order (docs: A.22). With
NumPy a number is there as soon as it is computed, and every step is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tinydiff.backend import Array, array_namespace, is_numpy_array, to_numpy
from tinydiff.nn.module import Parameter

__all__ = ["Kept", "Losses", "check_finite"]


class Losses:
    """The loss of every step that counts; on a device, those since the last reading stay there."""

    def __init__(self, values: list[float]) -> None:
        self._values: list[Any] = values  # floats; then pairs (loss, norm) of 0-d arrays, not read yet

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, which: slice) -> list[float]:
        return self._values[which]

    def append(self, unread: tuple[Array, Array]) -> None:
        """Count a step whose loss and norm nobody has read."""
        self._values.append(unread)

    def read(self, *further: tuple[Array, Array]) -> tuple[int, list[tuple[float, float]]]:
        """Return loss and norm of the unread steps and of `further`, and the number of the first of them."""
        first = len(self._values)
        while first and isinstance(self._values[first - 1], tuple):
            first -= 1
        return first, _as_floats([*self._values[first:], *further])

    def replace(self, first: int, values: list[float]) -> None:
        """Put what was read in the place of what was not, at once: an interruption finds all or nothing."""
        self._values[first:] = values


def _as_floats(pairs: list[tuple[Array, Array]]) -> list[tuple[float, float]]:
    """The numbers on the host, in one transfer."""
    if not pairs or is_numpy_array(pairs[0][0]):
        return [(float(loss), float(norm)) for loss, norm in pairs]
    flat = array_namespace(pairs[0][0]).stack([number for pair in pairs for number in pair])
    numbers = [float(number) for number in to_numpy(flat)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def check_finite(
    first: int, numbers: list[tuple[float, float]], rate: Callable[[int], float], kept: Kept | None
) -> None:
    """FloatingPointError if a loss or norm of the steps from `first` on is not finite; `kept` is put back."""
    for step, (loss, norm) in enumerate(numbers, first):
        if math.isfinite(loss) and math.isfinite(norm):
            continue
        back = ""
        if kept is not None:
            kept.put_back()
            back = f"; the weights are back to those after {kept.steps} steps"
        raise FloatingPointError(
            f"the loss is {loss} and the gradient's norm {norm} at step {step} (learning rate "
            f"{rate(step):.3g}); try a smaller lr or a smaller clip_norm{back}."
        )


class Kept:
    """Weights to go back to: a copy of those after the last step that is known to be sound."""

    def __init__(self, parameters: Mapping[str, Parameter], steps: int) -> None:
        self._parameters = list(parameters.values())
        self.keep(steps)

    def keep(self, steps: int) -> None:
        """Copy the weights as they are after `steps` steps."""
        self.steps = steps
        self._copies = [array_namespace(p.value).asarray(p.value, copy=True) for p in self._parameters]

    def put_back(self) -> None:
        """Give the weights the values they had."""
        for p, value in zip(self._parameters, self._copies, strict=True):
            p.value = value
