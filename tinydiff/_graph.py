"""A step recorded once on a GPU, and asked for again as a whole: a CUDA graph.

Every launch costs the host some microseconds, and a step has hundreds (docs: A.27). From the second step on
all are the same launches on the same shapes, so they are recorded, with the addresses that they read and
write. A replay is one launch. What a recording needs:

- What comes in is copied to arrays that stay (by those who use a `Recording`), and what changes from step
  to step, such as a learning rate, is an array of one element there.
- Its memory is its own, kept as long as it is: what is freed within it may be used again within it only.
- Nothing is sent or taken within it. The kernels of ``kernels/cupy.py`` keep to that, and call cuBLAS in a
  way that can be recorded; the definitions, under CuPy, do not.
- It is recorded when it has run as it is: kernels are compiled, constants sent, weights laid end to end.

Chosen by ``TINYDIFF_RECORD=1``, or an argument, with the CuPy kernels. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff._together import cut, end_to_end, groups
from tinydiff.backend import (
    Array,
    BackendError,
    array_namespace,
    asarray_like,
    generator_beside,
    is_cupy_array,
    standard_normal,
)
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import mean_squared_error
from tinydiff.nn.module import Module, Parameter, weight_of

__all__ = [
    "RecordedLoss",
    "RecordedPredict",
    "Recording",
    "Replayed",
    "is_wanted",
    "loss_and_gradients",
    "predictor",
]

WARM_UP = 2  # runs before the recording: in the second one all is laid where it will stay


def is_wanted(like: Array, asked: bool | None = None) -> bool:
    """Whether steps are to be recorded: `asked`, or else ``TINYDIFF_RECORD``; only on a GPU.

    Raises
    ------
    BackendError
        If they are, and the kernels for CuPy are the definitions, which cannot be recorded.
    """
    if not (_is_asked(asked) and is_cupy_array(like)):
        return False
    if not hasattr(kernels.kernels_for(like), "end_to_end"):
        raise BackendError("To record steps, choose kernels that can be: set TINYDIFF_CUPY_KERNELS=cupy.")
    return True


def _is_asked(asked: bool | None) -> bool:
    return os.environ.get("TINYDIFF_RECORD", "0") not in ("", "0") if asked is None else asked


class Recording:
    """What `work` asks of the GPU, recorded at once and run at every call.

    Parameters
    ----------
    work : callable
        Without argument; it has run before, reads and writes the same arrays every time, and neither sends
        nor takes a number. It runs once more here, on the host only: the device does nothing.

    Attributes
    ----------
    result
        What `work` returned: arrays that each call writes anew.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        import cupy

        from tinydiff.kernels._cupy_flat import late

        self._pool = cupy.cuda.MemoryPool()
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.get_current_stream().synchronize()  # nothing is under way that the other stream could miss
        cupy.get_default_memory_pool().free_all_blocks()  # what the runs before it held, it takes for itself
        with cupy.cuda.using_allocator(self._pool.malloc), stream, late() as unsent:
            stream.begin_capture()
            try:
                self.result = work()
            except BaseException:
                with suppress(Exception):  # what went wrong in `work` is the news
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        for there, numbers in unsent:
            there.set(numbers)
        self._kept = (stream, unsent)
        cupy.cuda.get_current_stream().synchronize()  # `numbers` is pageable: it must have been read

    def __call__(self) -> Any:
        """Run it, on the current stream, in its turn; returns `result`."""
        self._graph.launch()
        return self.result


class Replayed:
    """`work`, done as it is the first times it is called, recorded then, and replayed from then on."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._calls = 0
        self._recording: Recording | None = None

    def __call__(self) -> Any:
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._work()
        if self._recording is None:
            self._recording = Recording(self._work)
        return self._recording()


class RecordedLoss:
    """L_simple and its gradients, as `training_loss` has them, from the third call on recorded.  (docs: L.9)

    Times, noise, x_t and the target are made outside. A batch of another shape begins anew.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self._diffusion = diffusion
        self._given: list[Array] = []
        self._replayed: Any = None

    def __call__(self, model: Any, x0: Array, rng: np.random.Generator) -> tuple[Array, Callable[[], None]]:
        xp = array_namespace(x0)
        t = rng.integers(self._diffusion.T, size=x0.shape[0])
        noise = standard_normal(generator_beside(x0, rng), x0.shape, x0)
        x_t, target = self._diffusion.q_sample(x0, t, noise), self._diffusion.training_target(x0, t, noise)
        given = [x_t, target, asarray_like(t, x0, xp.int64)]
        if self._replayed is None or self._given[0].shape != x_t.shape:
            self._given = [xp.asarray(array, copy=True) for array in given]
            self._replayed = Replayed(functools.partial(loss_and_gradients, model, *self._given))
        for there, array in zip(self._given, given, strict=True):
            there[...] = array
        loss, gradients = self._replayed()

        def backward() -> None:
            for parameter, gradient in gradients:
                parameter.accumulate(gradient)

        return xp.asarray(loss, copy=True), backward


def loss_and_gradients(
    model: Any, x_t: Array, target: Array, t: Array
) -> tuple[Array, list[tuple[Parameter, Array]]]:
    """The mean squared error of the model's output, and its gradient by each parameter, laid end to end.

    The parameters' own gradients are zero when it begins, and when it ends.
    """
    output, backward = model(x_t, t)
    loss, gradient = mean_squared_error(output, target)
    backward(gradient)
    parameters = list(model.named_parameters().values())
    laid: dict[int, Array] = {}
    for which in groups(grads := [p.grad for p in parameters]):
        flat = end_to_end([grads[i] for i in which])
        laid |= zip(which, cut(flat, [grads[i].shape for i in which]), strict=True)
    model.zero_grad()
    return loss, [(parameter, laid[i]) for i, parameter in enumerate(parameters)]


class RecordedPredict:
    """A model's ``predict`` for x of one shape, recorded at its third call."""

    def __init__(self, model: Any, x: Array) -> None:
        self._model = weakref.ref(model)
        xp = array_namespace(x)
        self._x, self._t = xp.zeros_like(x), xp.zeros(x.shape[0], dtype=xp.int64)
        self._replayed = Replayed(self._work)

    def __call__(self, x: Array, t: Array) -> Array:
        self._x[...] = x
        self._t[...] = asarray_like(t, x, self._t.dtype)
        return array_namespace(x).asarray(self._replayed(), copy=True)

    def _work(self) -> Array:
        model: Any = self._model()
        return model.predict(self._x, self._t)


# By model: the arrays and kernels its recordings are of, and these, by shape.
_recorded: weakref.WeakKeyDictionary[Any, tuple[list[Any], dict[tuple[int, ...], RecordedPredict]]]
_recorded = weakref.WeakKeyDictionary()


def predictor(model: Module, asked: bool | None = None) -> Callable[[Array, Array], Array]:
    """The model's ``predict``; recorded, if that is wanted on its device.

    A recording stays with the model as long as its weights are the same arrays; what is in them may change.
    """
    if not _is_asked(asked) or not is_wanted(like := weight_of(model), asked):
        return model.predict
    of = [kernels.kernels_for(like), *(p.value for p in model.named_parameters().values())]
    before, by_shape = _recorded.get(model, ([], {}))
    if len(of) != len(before) or any(a is not b for a, b in zip(of, before, strict=True)):
        _recorded[model] = of, (by_shape := {})

    def predict(x: Array, t: Array) -> Array:
        if x.shape not in by_shape:
            by_shape[x.shape] = RecordedPredict(model, x)
        return by_shape[x.shape](x, t)

    return predict
