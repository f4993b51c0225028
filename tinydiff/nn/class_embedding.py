"""How a network is told a class: a learned row of numbers, added to the embedding of the time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts, check_labels, check_rng
from tinydiff.backend import Array, array_namespace, constant_like, device, integers_like, is_numpy_array
from tinydiff.kernels import kernels_for
from tinydiff.nn.module import Module, Parameter, derivative_of

__all__ = ["ClassEmbedding"]


class ClassEmbedding(Module):
    """y_n = emb_n + W[labels_n].

    Parameters
    ----------
    num_classes : int
        How many classes there are. W has one more row, the last: that of "no class" (Ho & Salimans 2022).
    features : int
        Length of a row.
    rng : numpy.random.Generator
        Draws the initial weight (num_classes + 1, features) from N(0, 1), as diffusers does.

    Raises
    ------
    ValueError
        If a size is not a positive integer.
    TypeError
        If `rng` is not a generator.
    """

    def __init__(self, num_classes: int, features: int, rng: np.random.Generator) -> None:
        check_counts(num_classes=num_classes, features=features)
        check_rng(rng)
        self.weight = Parameter(rng.standard_normal((num_classes + 1, features), dtype=np.float32))

    def __call__(self, emb: Array, labels: Array | None = None) -> tuple[Array, Callable[[Array], Array]]:
        """emb (N, E), in inference also (1, E), and labels (N,), 0 … num_classes  ->  (N, E).  (docs: B.27)

        Without labels: no class. On a device it is not checked whether they are in range: that would be to
        wait for them.
        """
        weight = self.weight.value
        if labels is None:
            xp = array_namespace(emb)
            labels = xp.full(emb.shape[0], weight.shape[0] - 1, device=device(emb))
        check_labels(labels, weight.shape[0])
        if is_numpy_array(labels):
            labels = integers_like(labels.astype(np.int64), weight)
        xp = array_namespace(weight)
        y = emb + xp.take(weight, labels, axis=0)

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """dW = onehot(labels).T dy, that of onehot(labels) W;  demb = dy."""
            classes = constant_like(np.arange, weight.shape[0], like=labels, dtype=labels.dtype)
            onehot = xp.astype(xp.expand_dims(labels, axis=1) == classes, weight.dtype)
            self.weight.accumulate(kernels_for(dy).linear_backward(onehot, weight, dy)[1])
            return dy

        return y, backward
