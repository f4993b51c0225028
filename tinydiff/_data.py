"""The data of a training: what it may be, where it lies, and the batch that each step is given.

It is an array, of which an epoch visits every sample once in an order that is a function of (seed, epoch), or
a callable that draws each batch anew. Labels lie beside the array, or are drawn with each batch.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import check_array, check_labels, check_number, check_unmasked, class_or_kind
from tinydiff.backend import (
    Array,
    array_namespace,
    asarray_like,
    device,
    integers_like,
    is_numpy_array,
    to_numpy,
)
from tinydiff.memory import attempted
from tinydiff.models._checks import check_model, num_classes_of
from tinydiff.nn.module import config_of

__all__ = [
    "EPOCH",
    "STEP",
    "Data",
    "Labels",
    "batch_of",
    "beside",
    "check_data",
    "checked_labels",
    "mean_and_rms",
    "sample_shape",
    "warn_of_scale",
]

# An array (n, ...), or a callable (batch_size, rng) -> array (batch_size, ...), or a pair of it and labels.
Data: TypeAlias = Any

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
    data: Data,
    labels: Labels | None,
    batch_size: int,
    seed: int,
    step: int,
    rng: np.random.Generator,
    like: Array,
) -> tuple[Array, ...]:
    """The batch of a step, beside `like`, and what the network is told of it, on the host, if anything.

    It is what `data` draws, or the next samples in the sequence of epochs. An array is indexed where it is,
    by an index that is made on the host.
    """
    if callable(data):
        batch, *told = _drawn(data, labels, batch_size, rng)
    else:
        index = _index(data.shape[0], batch_size, seed, step)
        batch = array_namespace(data).take(data, integers_like(index, data), axis=0)
        told = [] if labels is None else [labels.of[index]]
    if labels is not None:
        told = [labels.withheld(y, rng) for y in told]
    return asarray_like(batch, like), *told


def _drawn(data: Data, labels: Labels | None, batch_size: int, rng: np.random.Generator) -> tuple[Array, ...]:
    """What a callable draws: a batch, or that and labels; TypeError or ValueError if it is something else."""
    drawn = data(batch_size, rng)
    batch, *told = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn,)
    if len(getattr(batch, "shape", ())) < 1 or batch.shape[0] != batch_size:
        came = f"has shape {batch.shape}" if hasattr(batch, "shape") else f"is {class_or_kind(batch)}"
        raise ValueError(f"data(batch_size, rng) {came}; expected an array ({batch_size}, ...).")
    _check_values("data(batch_size, rng)", batch)
    if not told:
        return (batch,)
    if labels is None:
        raise ValueError(
            "data(batch_size, rng) returned labels too, and the model was made without num_classes; expected "
            "an array."
        )
    return batch, _on_host(told[0], labels.num_classes, batch_size)


def _on_host(labels: Any, num_classes: int, n: int) -> np.ndarray:
    """Labels (n,) as NumPy's int64; TypeError or ValueError unless n of these classes, or of none."""
    check_array("labels", labels)
    on_host = to_numpy(labels)
    check_labels(on_host, num_classes + 1, n)
    return on_host.astype(np.int64)


def sample_shape(data: Data) -> tuple[int, ...]:
    """The shape of one sample."""
    drawn = data(1, np.random.default_rng(0)) if callable(data) else data
    return tuple((drawn[0] if isinstance(drawn, tuple) else drawn).shape[1:])


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a data set, and how often a network in training is told none instead.

    Attributes
    ----------
    of : ndarray of shape (n,)
        0 … num_classes. Of a callable (0,): it draws them with each batch, or none.
    num_classes : int
        What stands for "no class".
    dropout : float
        The share of samples whose class is withheld.
    """

    of: np.ndarray
    num_classes: int
    dropout: float

    def withheld(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Labels (N,), a random share of which is "no class" instead."""
        return np.where(rng.random(len(labels)) < self.dropout, self.num_classes, labels)

    def settings(self) -> dict[str, Any]:
        """What a run knows them by: how many there are of each class, the last of which is none."""
        counts = np.bincount(self.of, minlength=self.num_classes + 1).tolist() if self.of.size else None
        return dict(labels=counts, label_dropout=self.dropout)


def checked_labels(model: Any, data: Data, labels: Any, label_dropout: float) -> Labels | None:
    """The labels, on the host; None if nothing is to be told.

    ValueError or TypeError unless they are those of the data, and classes that the model has.
    """
    check_model(model)
    if labels is None and not (callable(data) and config_of(model).get("num_classes")):
        return None
    classes = num_classes_of(model)
    check_number("label_dropout", label_dropout, lambda rate: 0 <= rate <= 1, "a number in [0, 1]")
    if labels is None:
        return Labels(np.zeros(0, np.int64), classes, float(label_dropout))
    if callable(data):
        raise ValueError(
            "labels are given, and data is a callable; expected None: data(batch_size, rng) returns the pair "
            "(batch, labels)."
        )
    return Labels(_on_host(labels, classes, data.shape[0]), classes, float(label_dropout))


def _index(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of n samples a step is given: the next in the sequence of epochs."""
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    return np.concat([_order(seed, e, n)[max(0, start - e * n) : stop - e * n] for e in epochs])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n samples."""
    return np.random.default_rng([seed, EPOCH, epoch]).permutation(n)
