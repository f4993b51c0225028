"""The numbers of a training that the host wants to see, and when it asks for them.

To read a number from a device is to wait until all that was asked of the device is done. So the losses and
gradients' norms stay there, step after step, and are read together (docs: A.21). A number that is not finite
is then noticed late: the weights go back to those at the last reading that found all in order (docs: A.22).
With NumPy a number is there as soon as it is computed, and every step is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tinydiff._run import Run
from tinydiff.backend import Array, array_namespace, is_numpy_array, to_numpy
from tinydiff.nn.module import Parameter

__all__ = ["Kept", "Readings"]

Pair: TypeAlias = tuple[Array, Array]  # loss and norm of a step, 0-d, where they were computed
Numbers: TypeAlias = list[tuple[float, float]]  # loss and norm of each of some steps


class Readings:
    """The losses of a training, one for each step that counts, and what is done with them when they are read.

    Parameters
    ----------
    losses : list of float
        Those of the steps that were made before.
    run : Run or None
        Gets lines of metrics, and checkpoints.
    kept : Kept or None
        Weights to go back to. None: the numbers of every step are read at once.
    rate : callable
        From a step to its learning rate.
    show : callable
        Is given the running mean of the loss.
    steps, log_every, checkpoint_every : int
        As for `tinydiff.train`.
    """

    def __init__(
        self,
        losses: list[float],
        run: Run | None,
        kept: Kept | None,
        rate: Callable[[int], float],
        show: Callable[[float], None],
        *,
        steps: int,
        log_every: int,
        checkpoint_every: int,
    ) -> None:
        self._losses: list[Any] = losses  # floats; then pairs, for steps not read yet
        self._run, self._kept, self._rate, self._show = run, kept, rate, show
        self._steps, self._log_every, self._checkpoint_every = steps, log_every, checkpoint_every
        self._mean = math.nan

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def losses(self) -> list[float]:
        """A copy."""
        return self._losses[:]

    def read(self, step: int, pair: Pair) -> tuple[int, Numbers] | None:
        """Read the numbers up to `pair`, those of `step`, before it moves the weights; None if they may wait.

        Returns the first step that was not read yet, and the numbers from there on. FloatingPointError if
        one is not finite; the weights go back to those that are kept.
        """
        at_once = self._kept is None
        if not (at_once or self._due(step, self._log_every) or self._save_is_due(step)):
            return None
        first, numbers = self._unread(pair)
        for at, (loss, norm) in enumerate(numbers, first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                back = "" if self._kept is None else f"; {self._kept.put_back()}"
                raise FloatingPointError(
                    f"the loss is {loss} and the gradient's norm {norm} at step {at} (learning rate "
                    f"{self._rate(at):.3g}); try a smaller lr or a smaller clip_norm{back}."
                )
        return first, numbers

    def count(self, step: int, pair: Pair, read: tuple[int, Numbers] | None) -> None:
        """Count `step`, which has moved the weights; `read` is what `read` returned. Log and save if due."""
        if read is None:
            self._losses.append(pair)
            return
        first, numbers = read
        values = [loss for loss, _ in numbers]
        if self._run is not None and self._due(step, self._log_every):
            since = step // self._log_every * self._log_every
            losses = [*self._losses[since:first], *values]
            self._run.log(step + 1, losses, numbers[-1][1], self._rate(step))
        self._losses[first:] = values  # at once: an interruption finds all or nothing
        if self._kept is not None:
            self._kept.keep(step + 1)
        for value in values:
            self._mean = value if math.isnan(self._mean) else 0.98 * self._mean + 0.02 * value
        self._show(self._mean)
        if self._save_is_due(step):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the steps that count, if all their numbers are finite."""
        if self._run is None:
            return
        first, numbers = self._unread()
        if all(math.isfinite(number) for pair in numbers for number in pair):
            self._losses[first:] = [loss for loss, _ in numbers]
            self._run.save(self.losses)

    def _due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self._steps

    def _save_is_due(self, step: int) -> bool:
        return self._run is not None and self._due(step, self._checkpoint_every)

    def _unread(self, *further: Pair) -> tuple[int, Numbers]:
        """The first step that was not read yet; its numbers, those of the steps since, and of `further`."""
        first = len(self._losses)
        while first and isinstance(self._losses[first - 1], tuple):
            first -= 1
        return first, _as_floats([*self._losses[first:], *further])


def _as_floats(pairs: list[Pair]) -> Numbers:
    """The numbers on the host, in one transfer."""
    if not pairs or is_numpy_array(pairs[0][0]):
        return [(float(loss), float(norm)) for loss, norm in pairs]
    flat = array_namespace(pairs[0][0]).stack([number for pair in pairs for number in pair])
    numbers = [float(number) for number in to_numpy(flat)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class Kept:
    """Weights to go back to: a copy of those after the last step that is known to be sound."""

    def __init__(self, parameters: Mapping[str, Parameter], steps: int) -> None:
        self._parameters = list(parameters.values())
        self.keep(steps)

    def keep(self, steps: int) -> None:
        """Copy the weights as they are after `steps` steps."""
        self._steps = steps
        self._copies = [array_namespace(p.value).asarray(p.value, copy=True) for p in self._parameters]

    def put_back(self) -> str:
        """Give the weights the values they had; returns the words for a message."""
        for p, value in zip(self._parameters, self._copies, strict=True):
            p.value = value
        return f"the weights are back to those after {self._steps} steps"
