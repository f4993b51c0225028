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

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import (
    Array,
    BackendError,
    array_namespace,
    asarray_like,
    generator_beside,
    is_cupy_array,
    standard_normal,
)
from tinydiff.losses import mean_squared_error
from tinydiff.nn.module import Module, weight_of
from tinydiff.optim import EMA, Adam, clip_grad_norm

__all__ = ["RecordedPredict", "RecordedStep", "Recording", "Replayed", "is_wanted", "predictor"]

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


class RecordedStep:
    """A step of training on L_simple, as `training.train` takes it, from its third on recorded.  (docs: L.9)

    The times, the noise, x_t and the target are made outside, as `training_loss` makes them.
    """

    def __init__(self, model: Any, diffusion: Any, optimizer: Adam, ema: EMA, clip_norm: float) -> None:
        self._model, self._diffusion = model, diffusion
        self._optimizer, self._ema, self._clip_norm = optimizer, ema, clip_norm
        self._buffers: list[Array] = []
        self._replayed = Replayed(self._work)

    def __call__(self, x0: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Take the step, update and average included, on the batch x0; returns loss and gradient's norm."""
        xp = array_namespace(x0)
        t = rng.integers(self._diffusion.T, size=x0.shape[0])
        noise = standard_normal(generator_beside(x0, rng), x0.shape, x0)
        x_t, target = self._diffusion.q_sample(x0, t, noise), self._diffusion.training_target(x0, t, noise)
        self._optimizer.steps += 1
        self._ema.steps += 1
        numbers = np.asarray([*self._optimizer.numbers(), self._ema.rate()])
        given = [x_t, target, asarray_like(t, x0, xp.int64), asarray_like(numbers, x0, xp.float64)]
        if not self._buffers:
            self._buffers = [xp.asarray(array, copy=True) for array in given]
        for buffer, array in zip(self._buffers, given, strict=True):
            buffer[...] = array
        loss, norm = self._replayed()
        return xp.asarray(loss, copy=True), xp.asarray(norm, copy=True)

    def _work(self) -> tuple[Array, Array]:
        x_t, target, t, numbers = self._buffers
        self._optimizer.zero_grad()
        output, backward = self._model(x_t, t)
        loss, gradient = mean_squared_error(output, target)
        backward(gradient)
        norm = clip_grad_norm(self._optimizer.parameters, self._clip_norm)
        self._optimizer.apply(*(numbers[i] for i in range(3)))
        self._ema.apply(numbers[3])
        self._optimizer.zero_grad()  # they lie in the recording's memory
        return loss, norm


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
