"""The data of a training: what it may be, where it lies, and the batch that each step is given.

It is an array, of which an epoch visits every sample once in an order that is a function of (seed, epoch), or
a callable that draws each batch anew.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import check_unmasked, class_or_kind
from tinydiff.backend import Array, array_namespace, asarray_like, device, integers_like, is_numpy_array
from tinydiff.memory import attempted

__all__ = [
    "EPOCH",
    "STEP",
    "Data",
    "Labels",
    "batch_of",
    "beside",
    "check_data",
    "mean_and_rms",
    "warn_of_scale",
]

Data: TypeAlias = Any  # an array (n, ...), or a callable (batch_size, rng) -> array (batch_size, ...)

# A root mean square beyond which data is taken to be unscaled by mistake: 8-bit levels have about 100.
LARGE = 10

SEEN = 256  # samples that are looked at, for the scale of the data

# The independent streams of randomness that a seed stands for. No stream is number 0: NumPy pads a seed with
# zeros, so [seed, 0, 0] is the stream of `seed` itself, from which the model may have been drawn.
STEP, EPOCH = 1, 2


def check_data(data: Data) -> None:
    """TypeError or ValueError unless it is callable, or an array of at least one sample, of floats."""
    if callable(data):
        return
    if len(getattr(data, "shape", ())) < 1:
        raise TypeError(f"data is {class_or_kind(data)}; expected an array (n, ...) or a callable.")
    if data.shape[0] < 1:
        raise ValueError(f"data has shape {tuple(data.shape)}; expected at least one sample.")
    _check_values("data", data)


def mean_and_rms(data: Data) -> list[float] | None:
    """Mean and root mean square of some samples, which tell data sets apart; None if not on the host."""
    if not is_numpy_array(data) or not data.size:
        return None
    return _moments(data[:: -(-len(data) // SEEN)])


def _moments(some: np.ndarray) -> list[float]:
    """Mean and root mean square in float64; one sample at a time, as large pictures take much memory."""
    means = [np.mean(one, dtype=np.float64) for one in some]
    squares = [np.mean(np.square(one, dtype=np.float64)) for one in some]
    return [float(np.mean(means)), math.sqrt(np.mean(squares))]


def warn_of_scale(data: Data, stacklevel: int) -> None:
    """Warn if the noise hardly hides the data, or if pictures are not centred."""
    if not is_numpy_array(data) or not data.size:
        return
    some = data[:SEEN]
    _, scale = _moments(some)
    if some.ndim == 4 and 0 <= np.min(some) < np.max(some) <= 1:
        warnings.warn(
            f"data are pictures in [{np.min(some):.3g}, {np.max(some):.3g}], and expected in [-1, 1] (from "
            "[0, 1], 2 * x - 1): the noise has a mean of 0.",
            stacklevel=stacklevel,
        )
    if scale > LARGE:
        warnings.warn(
            f"data has a root mean square of {scale:.3g}, and the noise 1, which hardly hides it: is it "
            "scaled? Pictures are expected in [-1, 1] (from 0 ... 255, x / 127.5 - 1), points with a "
            "variance of about 1.",
            stacklevel=stacklevel,
        )


def _check_values(name: str, values: Array) -> None:
    """ValueError unless they are real floating numbers, with NumPy finite ones; TypeError if no array."""
    check_unmasked(name, values)
    try:
        xp = array_namespace(values)
    except TypeError:  # pandas' and h5py's have a shape, too
        expected = "an array (numpy.asarray makes one of what fits in memory)"
        raise TypeError(f"{name} is {class_or_kind(values)}; expected {expected}.") from None
    if not xp.isdtype(values.dtype, "real floating"):
        raise ValueError(
            f"{name} has dtype {values.dtype}; expected a real floating one (of 8-bit images, x / 127.5 - 1)."
        )
    if is_numpy_array(values):  # in parts: a file that is mapped into memory may be larger than the memory
        for start in range(0, len(values), 1024):
            if not np.isfinite(values[start : start + 1024]).all():
                raise ValueError(f"{name} holds numbers that are not finite.")


def beside(data: Data, like: Array) -> Data:
    """The data set, moved to where `like` is; a callable, or an array already there, is returned as it is."""
    if callable(data) or (array_namespace(data) is array_namespace(like) and device(data) == device(like)):
        return data
    there, refused = attempted(functools.partial(asarray_like, data, like))
    if refused:
        raise MemoryError(
            f"data of shape {tuple(data.shape)} does not fit in memory beside the model; pass a callable "
            "that draws batches of it."
        )
    return there


def batch_of(
    data: Data, batch_size: int, seed: int, step: int, rng: np.random.Generator, like: Array
) -> Array:
    """The batch of a step, beside `like`: what `data` draws, or the next samples in the sequence of epochs.

    An array is indexed where it is, by an index that is made on the host.
    """
    if callable(data):
        batch = data(batch_size, rng)
        if len(getattr(batch, "shape", ())) < 1 or batch.shape[0] != batch_size:
            came = f"has shape {batch.shape}" if hasattr(batch, "shape") else f"is {class_or_kind(batch)}"
            raise ValueError(f"data(batch_size, rng) {came}; expected an array ({batch_size}, ...).")
        _check_values("data(batch_size, rng)", batch)
        return asarray_like(batch, like)
    index = _index(data.shape[0], batch_size, seed, step)
    xp = array_namespace(data)
    return asarray_like(xp.take(data, integers_like(index, data), axis=0), like)


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a data set, an array, and how often a network in training is told none instead.

    Attributes
    ----------
    of : ndarray of shape (n,)
        0 … num_classes.
    num_classes : int
        What stands for "no class".
    dropout : float
        The share of samples whose class is withheld.
    """

    of: np.ndarray
    num_classes: int
    dropout: float

    def batch(self, batch_size: int, seed: int, step: int, rng: np.random.Generator) -> np.ndarray:
        """Those of the samples in `batch_of` the same step, (batch_size,), on the host."""
        labels = self.of[_index(len(self.of), batch_size, seed, step)]
        return np.where(rng.random(batch_size) < self.dropout, self.num_classes, labels)

    def counts(self) -> list[int]:
        """How many there are of each class, the last of which is none: by which a run knows them again."""
        return np.bincount(self.of, minlength=self.num_classes + 1).tolist()


def _index(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of n samples a step is given: the next in the sequence of epochs."""
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    return np.concat([_order(seed, e, n)[max(0, start - e * n) : stop - e * n] for e in epochs])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n samples."""
    return np.random.default_rng([seed, EPOCH, epoch]).permutation(n)
