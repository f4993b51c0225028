"""A step recorded once on a GPU, and launched again as a whole: a CUDA graph.

Every launch costs the host some microseconds, and a step has hundreds (docs: A.27). From the second step on
every step makes the same launches on the same shapes, so they are recorded, with the addresses that they read
and write. A replay is one launch. What a recording needs:

- Inputs are copied into arrays that stay, by whoever uses the `Recording`. What else changes from step to
  step is left out of it: noise is drawn before, and clipping, Adam and the moving average come after.
- It has memory of its own as long as it exists, as much as one pass takes plus 32 MiB for cuBLAS: what is
  freed within it can be used again only within it.
- Nothing is copied between host and device within it. The kernels of ``kernels/cupy.py`` keep to that, and
  call cuBLAS in a way that can be recorded; the definitions, under CuPy, do not.
- The same step has run before, unrecorded: by then kernels are compiled, constants are on the device, and
  weights lie end to end.

With the CuPy kernels and tinydiff's own models, unless ``TINYDIFF_RECORD=0``, two things are recorded: the
steps of `tinydiff.train` with the plain loss, and what `sample`, `iterate_samples` and `invert` ask of a
model. The bound, the likelihood, the training of a schedule and the other losses run launch by launch.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
import warnings
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
    integers_like,
    is_cupy_array,
    standard_normal,
)
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import mean_squared_error
from tinydiff.memory import is_out_of_memory, let_go
from tinydiff.models._checks import exchanged_layers, without_rng
from tinydiff.nn.module import Module, weight_of

__all__ = [
    "WARM_UP",
    "RecordedLoss",
    "Recording",
    "Replayed",
    "forget",
    "is_wanted",
    "loss_and_backward",
    "predictor",
]

WARM_UP = 2  # runs before the recording: from the second on every array is where it will stay
SHAPES = 2  # of x for which a model keeps recordings: that of a batch, and of a last, smaller one


def is_wanted(model: Any, asked: bool | None = None) -> bool:
    """Whether steps of `model` are to be recorded: only on a GPU, with kernels that can be.

    Parameters
    ----------
    model : Module
        Its class's own ``recordable`` decides where nothing else does; then a network of tinydiff's counts
        only with layers of tinydiff's.
    asked : bool, optional
        What the caller wants, whatever the class says. Default: what ``TINYDIFF_RECORD`` says, 1 or 0; if it
        is not set, what the class says.

    Raises
    ------
    BackendError
        If it is asked for, and the kernels for CuPy are the definitions, which cannot be recorded; or if
        ``TINYDIFF_RECORD`` says something else.
    """
    asked = _asked_by_variable() if asked is None else asked
    if asked is False or (asked is None and not vars(type(model)).get("recordable")):
        return False
    weight = next(iter(model.named_parameters().values()), None)
    if weight is None or not is_cupy_array(weight.value) or (asked is None and exchanged_layers(model)):
        return False
    if hasattr(kernels.kernels_for(weight.value), "end_to_end"):
        return True
    if asked:
        raise BackendError("To record steps, choose kernels that can be: set TINYDIFF_CUPY_KERNELS=cupy.")
    return False


def _asked_by_variable() -> bool | None:
    said = os.environ.get("TINYDIFF_RECORD", "").strip()
    if said not in ("", "0", "1"):
        raise BackendError(f"TINYDIFF_RECORD is {said!r}: set it to '0' or '1'.")
    return bool(int(said)) if said else None


class Recording:
    """What `work` asks of the GPU, recorded at once and run at every call.

    Parameters
    ----------
    work : callable
        Without argument; it has run before, reads and writes the same arrays every time, and copies nothing
        between host and device. It is called once more here: its launches are recorded, and do not run.

    Attributes
    ----------
    result
        What `work` returned: arrays that each call writes anew.

    Raises
    ------
    MemoryError
        If there is no memory for it: it takes what `work` takes, from CuPy's pool and within its limit.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        import cupy

        from tinydiff.kernels._cupy_flat import late
        from tinydiff.kernels._cupy_products import ready, workspace_of

        self._current_stream = cupy.cuda.get_current_stream
        self._ran = before = self._current_stream()
        self._device = cupy.cuda.Device()

        def beneath(size: int) -> Any:
            with before:  # the memory comes back in the order of this stream
                return cupy.get_default_memory_pool().malloc(size)

        self._pool = cupy.cuda.MemoryPool(beneath)
        stream = cupy.cuda.Stream(non_blocking=True)
        before.synchronize()  # nothing is under way that the other stream could miss
        let_go(cupy.empty(0))  # so that it can take the memory that the runs before it held
        ready()  # those runs may have been another thread's
        try:
            with cupy.cuda.using_allocator(self._pool.malloc), stream, late() as unsent:
                stream.begin_capture()
                try:
                    self.result = work()
                except BaseException as error:
                    with suppress(Exception):  # the error in `work` is the one to report
                        stream.end_capture()
                    traceback.clear_frames(error.__traceback__)  # which hold arrays
                    raise
                self._graph = stream.end_capture()
        finally:  # cuBLAS has had a workspace for that stream: it lives as long as what was recorded
            workspace = workspace_of(stream.ptr)
        for there, numbers in unsent:
            there.set(numbers)
        self._kept = (stream, unsent, workspace)
        before.synchronize()  # `numbers` is pageable: it must have been read

    def __call__(self) -> Any:
        """Run it, on the current stream, in its turn; returns `result`."""
        self._ran = self._current_stream()
        self._graph.launch()
        return self.result

    def __del__(self) -> None:
        with suppress(Exception), self._device:  # the interpreter may be ending, or the thread another
            self._ran.synchronize()
            self.result = self._graph = None
            self._pool.free_all_blocks()  # without that they would never go back: CuPy's pool keeps its own


class Replayed:
    """Calls `work` itself `WARM_UP` times, then records it, and replays the recording from then on.

    Where it cannot be recorded (by this version of a library, say), a warning says so, and every call calls
    `work` itself.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._calls = 0
        self.replay: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._work()
        if self.replay is None:
            try:
                self.replay = Recording(self._work)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.replay = self._work
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    f"Steps are not recorded on this GPU, but run one by one: {said}", RuntimeWarning, 2
                )
        return self.replay()


class Weights:
    """The arrays that are a model's weights now. A recording reads these, whatever takes their places."""

    def __init__(self, model: Any) -> None:
        self._parameters = list(model.named_parameters().values())
        self._arrays = [parameter.value for parameter in self._parameters]

    def are_there(self) -> bool:
        """Whether they still are its weights; the numbers in them may have changed."""
        return all(p.value is array for p, array in zip(self._parameters, self._arrays, strict=True))


class RecordedLoss:
    """L_simple and its gradients, as `training_loss` has them, recorded at the third call.  (docs: L.9)

    Times, noise, x_t and the target are computed outside the recording. A batch of another shape discards
    the recording, and so do weights in other arrays, as they are after the first step.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self._diffusion = diffusion
        self._given: list[Array] = []
        self._weights: Weights | None = None
        self._replayed: Any = None

    def __call__(
        self, model: Any, x0: Array, rng: np.random.Generator, *labels: Array
    ) -> tuple[Array, Callable[[], None]]:
        if self._weights is None or not self._weights.are_there() or self._given[0].shape != x0.shape:
            self.forget()  # so that the next recording has its memory
        xp = array_namespace(x0)
        t = rng.integers(self._diffusion.T, size=x0.shape[0])
        noise = standard_normal(generator_beside(x0, rng), x0.shape, x0)
        x_t, target = self._diffusion.q_sample(x0, t, noise), self._diffusion.training_target(x0, t, noise)
        given = [x_t, target, *(integers_like(integers, x0) for integers in (t, *labels))]
        if self._replayed is None:
            self._given = [xp.asarray(array, copy=True) for array in given]
            self._weights = Weights(model)
            self._replayed = Replayed(functools.partial(loss_and_backward, model, *self._given))
        for there, array in zip(self._given, given, strict=True):
            there[...] = array
        loss, backward = self._replayed()
        return xp.asarray(loss, copy=True), backward

    def forget(self) -> None:
        """Let go of the recording, and of its memory."""
        self._given, self._weights, self._replayed = [], None, None


def loss_and_backward(
    model: Any, x_t: Array, target: Array, t: Array, *labels: Array
) -> tuple[Array, Callable[[], None]]:
    """The mean squared error of the model's output, and a function to add its gradients to the parameters'.

    The gradients are computed here, and laid end to end. The parameters' own must be zero, and are so again
    afterwards.
    """
    try:
        output, backward = model(*without_rng(x_t, t, *labels))
        loss, gradient = mean_squared_error(output, target)
        backward(gradient)
        parameters = list(model.named_parameters().values())
        laid: dict[int, Array] = {}
        for which in groups(grads := [p.grad for p in parameters]):
            flat = end_to_end([grads[i] for i in which])
            laid |= zip(which, cut(flat, [grads[i].shape for i in which]), strict=True)
    finally:
        model.zero_grad()

    def add() -> None:
        for i, parameter in enumerate(parameters):
            parameter.accumulate(laid[i])

    return loss, add


class RecordedPredict:
    """A model's ``predict``, recorded at the third call with a shape of x; the last `SHAPES` shapes are kept.

    Threads take turns: they share the arrays that a recording reads and writes.
    """

    def __init__(self, model: Any) -> None:
        import cupy

        self._current_stream = cupy.cuda.get_current_stream
        self._stream = self._current_stream()
        self._per_thread = cupy.cuda.runtime.streamPerThread
        self._runtime = cupy.cuda.runtime
        self._model = weakref.ref(model)  # which holds on to this
        self._weights = Weights(model)
        self._like = weight_of(model)
        self._kernels = kernels.kernels_for(self._like)
        self._turn = threading.Lock()
        self._by_shape: dict[tuple[int, ...], tuple[list[Array], Replayed]] = {}

    def is_current(self) -> bool:
        """Whether the model's weights are still in the same arrays, and its kernels still the chosen ones."""
        return self._weights.are_there() and self._kernels is kernels.kernels_for(self._like)

    def __call__(self, x: Array, *integers: Array) -> Array:
        if not self._is_alike(x) or any(tuple(given.shape) != x.shape[:1] for given in integers):
            model: Any = self._model()
            return model.predict(*without_rng(x, *integers))  # which refuses it
        xp = array_namespace(x)
        with self._turn:
            if (stream := self._current_stream()) != self._stream:
                self._stream.synchronize()  # it may still read what is written now
                self._stream = stream
            key = (len(integers), *x.shape)
            kept = self._by_shape.pop(key, None)
            if len(self._by_shape) == SHAPES:
                del self._by_shape[next(iter(self._by_shape))]  # the one asked for longest ago
            inputs, replayed = self._by_shape[key] = self._begun(x, len(integers)) if kept is None else kept
            for there, given in zip(inputs, (x, *integers), strict=True):
                there[...] = asarray_like(given, x, there.dtype)
            y = None
            try:
                y = replayed()
            except Exception as error:
                if len(self._by_shape) == 1 or not is_out_of_memory(error):
                    raise
            if y is None:  # without what is recorded for another shape there is more memory
                self._by_shape = {key: (inputs, replayed)}
                let_go(x)
                y = replayed()
            y = xp.asarray(y, copy=True)
            if stream.ptr == self._per_thread:  # each thread has its own by this name: others cannot wait
                stream.synchronize()
            return y

    def _is_alike(self, x: Array) -> bool:
        """Whether it is an array like the weights, on their GPU, which is this thread's current one."""
        if not is_cupy_array(x) or x.dtype != self._like.dtype:
            return False
        return bool(x.device.id == self._like.device.id == self._runtime.getDevice())

    def _begun(self, x: Array, n: int) -> tuple[list[Array], Replayed]:
        xp = array_namespace(x)
        integers = [xp.empty(x.shape[0], dtype=xp.int64) for _ in range(n)]
        inputs = [xp.empty(x.shape, dtype=x.dtype), *integers]
        model: Any = self._model
        return inputs, Replayed(lambda: model().predict(*without_rng(*inputs)))


_recorded: weakref.WeakKeyDictionary[Any, RecordedPredict] = weakref.WeakKeyDictionary()  # by model


def predictor(model: Module, asked: bool | None = None) -> Callable[..., Array]:
    """The model's ``predict``; recorded, if that is wanted (`is_wanted`).

    A recording stays with the model, and so does its memory, as long as the model's weights are the same
    arrays; the numbers in them may change.
    """
    if not is_wanted(model, asked):
        return model.predict

    def predict(x: Array, t: Array, labels: Array | None = None) -> Array:
        recorded = _recorded.get(model)
        if recorded is None or not recorded.is_current():
            recorded = _recorded[model] = RecordedPredict(model)
        return recorded(x, t) if labels is None else recorded(x, t, labels)

    return predict


def forget(model: Any) -> None:
    """Let go of the recordings that stay with the model, and of their memory."""
    if _recorded and isinstance(model, Module):
        _recorded.pop(model, None)
