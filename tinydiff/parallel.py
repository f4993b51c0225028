"""One batch, several processes: each computes its share of the samples.

Samples do not meet inside a network here (group normalisation and attention stay within one image), so a
batch can be cut anywhere. With its shares S_1, S_2, ..., the output is that of the shares one after another,
and the gradient of every parameter is a sum over samples (docs: A.20)::

    y = [f(S_1), f(S_2), ...]        dL/dw = dL/dw on S_1 + dL/dw on S_2 + ...

`DataParallel` is therefore itself a model: it is called like one, and returns its output and its derivative.
Code that trains or samples need not know.

Threads do this badly in Python. NumPy lets go of the interpreter's lock while it computes, but every one of
the thousands of calls of a step takes it back, and waits for the other thread to hand it over. A process has
a lock of its own. The weights lie in memory that all processes see; what is sent (``_messages.py``) is a
batch and a result.
"""

from __future__ import annotations

import copy
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, class_or_kind
from tinydiff._messages import Line
from tinydiff._together import cut, groups
from tinydiff.backend import Array, is_numpy_array
from tinydiff.kernels import alone, kernels_for, threads_in_reach
from tinydiff.models import MLP, UNet
from tinydiff.models._checks import answer_of, check_model, without_rng
from tinydiff.nn.module import Module, Parameter, _keeping, derivative_of, keeping, once

__all__ = ["DataParallel", "WorkerError", "shared_out"]

# The networks whose outputs depend each on its own sample only, and which draw nothing but dropout (a
# subclass may differ); and the least share of a batch, in samples times weights, that is worth a process: to
# send a smaller one, and to make the calls a second time, takes as long as to compute it. A U-Net's weight
# meets many pixels of a sample.
LEAST_WORK: dict[type, int] = {UNet: 2**17, MLP: 2**23}

# The crews of this process, and all ends of lines that it holds: whatever is forked inherits them, and would
# keep them open. Crews begin and end one at a time: a worker that unknowingly holds another worker's end
# hides that worker's death from the leader.
_crews: weakref.WeakSet[DataParallel] = weakref.WeakSet()
_held: weakref.WeakSet[Line] = weakref.WeakSet()
_changing = threading.RLock()


class _Forking(threading.local):
    """What a thread is forking."""

    line: Line | None = None  # a crew's worker has one, a process of the program's own has none


_forking = _Forking()


def _after_fork() -> None:
    global _changing
    _changing = threading.RLock()  # another thread of the parent may have held it
    for line in list(_held):
        if line is not _forking.line:
            line.close()
    _held.clear()
    if _forking.line is None:
        for crew in list(_crews):
            crew._inherited()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class WorkerError(RuntimeError):
    """A process that shares the work has failed or ended, or could not be begun."""


class DataParallel(Module):
    """A model whose batches are shared out to processes.

    To be called and differentiated as the model itself, with the same parameters; use it as a context
    manager, or `close` it, so that the processes end. Linux only: the processes are forks of this one.

    Parameters
    ----------
    model : UNet or MLP, or another Module
        A model with NumPy weights, whose samples do not influence one another.
    workers : int
        Number of processes, this one included. A batch of fewer samples is shared among fewer.

    Raises
    ------
    TypeError
        If `model` is not a `Module`.
    ValueError
        If `workers` is not an integer of at least 1, or the weights are not NumPy arrays.
    RuntimeError
        If this process is daemonic, as a ``Pool``'s are. A `WorkerError`, which is a RuntimeError, if this
        system is not Linux or begins no more processes; later also if a process has failed or ended, or held
        the derivative that is called and has ended since.

    Notes
    -----
    The same inputs give the same bits on every run with the same number of processes. With another number,
    products are cut elsewhere and round differently; and each process draws dropout masks of its own. What a
    model of your own computes may depend on its inputs and parameters only: another attribute that changes
    stays in the processes what it was when they began. Threads that call it at once take turns.
    A fork that the program makes has the weights as they were, in memory of its own, and begins processes of
    its own.

    Examples
    --------
    >>> with DataParallel(model, workers=2) as both:
    ...     y, backward = both(x, t)
    """

    def __init__(self, model: Any, workers: int) -> None:
        check_model(model)
        check_counts(workers=workers)
        self._model = model
        self._parameters = list(model.named_parameters().values())
        self._count = workers
        self._draws = type(model) not in LEAST_WORK or bool(model.config.get("dropout"))
        self._workers: list[tuple[Any, Line]] = []
        self._calls = 0
        self._forgotten: list[int] = []  # calls whose backward was thrown away: the workers may let go too
        self._unanswered = False
        self._lock = threading.RLock()  # held until the answers are used: the next take their place
        self._make_room()
        self._share_values()
        self._fork()
        _crews.add(self)

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; the model's weights are ordinary memory again, and a call is the model's own."""
        with self._lock:
            self._end()
            self._count = 1
            for parameter, value in zip(self._parameters, self._values, strict=True):
                if parameter.value is value:
                    parameter.value = value.copy()

    @property
    def config(self) -> dict[str, Any]:
        """That of the model."""
        return self._model.config

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model, by itself: for a moving average, say."""
        return copy.deepcopy(self._model, memo)

    def _parts(self, path: str = "") -> Iterator[tuple[str, Any]]:
        return self._model._parts(path)

    def __call__(
        self, x: Array, t: Array, rng: np.random.Generator | None = None, labels: Array | None = None
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Predict, and return the derivative of the prediction; as the model's own call.  (docs: A.20)"""
        if not keeping():
            never = once(lambda dy: dy)  # within `inference` it only raises
            return self.predict(x, t, labels=labels), never
        told = () if labels is None else (labels,)
        with self._lock:
            edges = self._edges(x, t, *told)
            self._calls += 1
            key = self._calls
            self._share_values()
            shares = self._shares(edges, x, t, *told)
            rngs = rng.spawn(len(shares)) if rng is not None and self._draws else [None] * len(shares)
            asked = [(x_, t_, r, *y_) for (x_, t_, *y_), r in zip(shares, rngs, strict=True)]
            messages = [("call", key, *each) for each in asked[1:]]
            (y, backward_own), ys = self._ask(messages, lambda: answer_of(self._model, *asked[0]))
            holders = self._workers[: len(messages)]

        y = np.concatenate([y, *ys])

        @derivative_of(y)
        def backward(dy: Array) -> Array:
            """Each process walks back through its share; the gradients of the parameters are added up."""
            dys = self._shares(edges, dy)
            messages = [("backward", key, *dy_share) for dy_share in dys[1:]]
            with self._lock:
                if messages and (self._unanswered or self._workers[: len(messages)] != holders):
                    raise WorkerError(
                        "the processes that held this derivative have ended; call the model again."
                    )
                dx, dxs = self._ask(messages, lambda: backward_own(*dys[0]))
                for grads in self._grads[: len(messages)]:
                    for parameter, grad in zip(self._parameters, grads, strict=True):
                        parameter.grad = parameter.grad + grad
            return np.concatenate([dx, *dxs])

        weakref.finalize(backward, self._forgotten.append, key)
        return y, backward

    def predict(self, x: Array, t: Array, *, labels: Array | None = None) -> Array:
        """Predict without keeping anything for a backward; as the call, but with the labels by name."""
        told = () if labels is None else (labels,)
        with self._lock:
            self._share_values()
            shares = self._shares(self._edges(x, t, *told), x, t, *told)
            asked = [without_rng(*share) for share in shares]
            messages = [("predict", 0, *each) for each in asked[1:]]
            y, ys = self._ask(messages, lambda: self._model.predict(*asked[0]))
        return np.concatenate([y, *ys])

    def _edges(self, x: Array, t: Array, *labels: Array) -> list[int]:
        """Where the batch is cut; what is not a batch stays whole, and the model says what is wrong with it.

        A network's `check_input` is asked first, so that its messages are about the batch, not a share of it.
        """
        getattr(self._model, "check_input", lambda x, t, *labels: None)(x, t, *labels)
        n = x.shape[0] if getattr(x, "ndim", 0) and getattr(t, "shape", None) == x.shape[:1] else 1
        count = max(1, min(self._count, n))
        return [n * i // count for i in range(count + 1)]

    @staticmethod
    def _shares(edges: list[int], *arrays: Array) -> list[tuple[Array, ...]]:
        if len(edges) == 2:
            return [arrays]
        return [tuple(a[start:stop] for a in arrays) for start, stop in pairwise(edges)]

    def _make_room(self) -> None:
        """Make memory for weights and gradients that the workers see; they must be forked after that."""
        if not all(is_numpy_array(p.value) for p in self._parameters):
            raise ValueError("model has weights that are not NumPy arrays; only those can be shared.")
        self._values: list[Any] = _in_shared_memory(self._parameters)
        self._grads = [_in_shared_memory(self._parameters) for _ in range(self._count - 1)]

    def _share_values(self) -> None:
        """Put the weights where the workers see them; they may have been replaced since."""
        new = [(p, v) for p, v in zip(self._parameters, self._values, strict=True) if p.value is not v]
        if not all(
            v is not None and is_numpy_array(p.value) and (p.shape, p.value.dtype) == (v.shape, v.dtype)
            for p, v in new
        ):
            self._make_room()
            self._end()  # `_ask` forks anew
            new = list(zip(self._parameters, self._values, strict=True))
        for parameter, value in new:
            value[...] = parameter.value
            parameter.value = value

    def _inherited(self) -> None:
        """In a fork that is none of its workers: these, and the weights' memory, are the other process'."""
        self._lock = threading.RLock()
        self._workers, self._unanswered = [], False
        for parameter, value in zip(self._parameters, self._values, strict=True):
            if parameter.value is value:
                parameter.value = value.copy()
        self._values = [None] * len(self._parameters)  # `_share_values` makes room, `_ask` forks

    def _ask(self, messages: list[tuple[Any, ...]], own: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Give the workers their shares, compute this process's own, and collect the answers."""
        if self._count > 1 and (self._unanswered or not self._workers):
            self._end()  # interrupted while the workers were at it: what they would answer is lost
            self._fork()
        forget = [self._forgotten.pop() for _ in self._forgotten[:]]  # another thread may append meanwhile
        asked = [line for _, line in self._workers[: len(messages)]]
        self._unanswered = True
        try:
            for line, message in zip(asked, messages, strict=True):
                line.send(forget, *message)
            try:
                with alone():
                    result = own()
            finally:
                answers = [line.receive()[0] for line in asked]
                self._unanswered = False
        except (EOFError, ConnectionError):
            self._end()
            raise WorkerError(
                "a worker process has ended unexpectedly (was memory short?); workers=1 does without."
            ) from None
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return result, answers

    def _fork(self) -> None:
        if self._count == 1:
            return
        if not _can_fork():
            raise WorkerError("processes share the work on Linux only; expected workers=1 on this system.")
        if multiprocessing.current_process().daemon:
            raise RuntimeError("a daemonic process, as a Pool's, may start no others; expected workers=1.")
        # Imported before the fork, since a fork would wait for ever for what another thread is importing.
        kernels_for(np.empty(0))
        context = multiprocessing.get_context("fork")
        with _changing, warnings.catch_warnings():  # JAX's and Python's: a fork asks nothing of other threads
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded", DeprecationWarning)
            lines = [Line.ends() for _ in self._grads]
            _held.update(end for ends in lines for end in ends)
            for grads, (ours, theirs) in zip(self._grads, lines, strict=True):
                arguments = (theirs, self._model, self._parameters, grads)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                try:
                    _forking.line = theirs
                    process.start()
                except OSError as error:  # a limit on processes, as a container's, or on memory
                    self._end()
                    raise WorkerError(
                        f"a process to share the work could not be begun ({error}): workers=1 needs none."
                    ) from None
                finally:
                    _forking.line = None
                self._workers.append((process, ours))
            for _, theirs in lines:
                theirs.close()

    def _end(self) -> None:
        for process, line in self._workers:
            with _changing:
                _held.discard(line)
                line.close()  # the worker's next receive ends it
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()
        self._unanswered = False


def _serve(line: Line, model: Any, parameters: list[Parameter], grads: list[np.ndarray]) -> None:
    """A worker: answer what comes through the line until it is closed."""
    for stop in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, or a terminal closed, is for the process that leads
        signal.signal(stop, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends this one, whatever the leader does on it
    _forking.line = None  # a fork of this one may be anything
    gc.freeze()  # what was there before the fork belongs to the other process
    kept: dict[int, Any] = {}
    _keeping.set(True)  # whatever the thread that forked it was within
    model.zero_grad()
    with alone():
        while True:
            try:
                forget, what, key, *arguments = line.receive()
            except (EOFError, OSError):
                return
            for call in forget:
                kept.pop(call, None)
            try:
                answer: Any
                if what == "predict":
                    answer = model.predict(*arguments)
                elif what == "call":
                    answer, kept[key] = answer_of(model, *arguments)
                else:
                    answer = kept.pop(key)(*arguments)
                    for parameter, grad in zip(parameters, grads, strict=True):
                        grad[...] = parameter.grad
            except Exception as error:
                kind = MemoryError if isinstance(error, MemoryError) else WorkerError
                answer = kind(f"a worker process failed: {type(error).__name__}: {error}")
            try:
                line.send(answer)
            except OSError:
                return  # nobody waits for it any more
            if what == "backward":
                model.zero_grad()


def _in_shared_memory(parameters: list[Parameter]) -> list[np.ndarray]:
    """Arrays of the parameters' shapes, zero, in memory that forked processes share.

    Those that the optimiser steps together lie end to end, so that it leaves them where they are.
    """
    values = [p.value for p in parameters]
    shared: list[Any] = [None] * len(values)
    for which in groups(values):
        dtype, shapes = values[which[0]].dtype, [values[i].shape for i in which]
        size = sum(map(math.prod, shapes))
        flat = np.frombuffer(mmap.mmap(-1, max(1, size * dtype.itemsize)), dtype, size)
        for i, view in zip(which, cut(flat, shapes), strict=True):
            shared[i] = view
    return shared


@contextmanager
def shared_out(
    model: Any, batch_size: int, workers: int | None = None, *, to_predict: bool = False
) -> Iterator[Any]:
    """`model`, or a `DataParallel` of it where that is worth it and can be done.

    Parameters
    ----------
    model : callable
        Any. Unless `workers` says otherwise, what is not a `UNet` or an `MLP` (a subclass is not) with NumPy
        weights is handed back as it is.
    batch_size : int
        Samples per call.
    workers : int, optional
        Number of processes; no more than `batch_size` are begun. Default: on Linux as many as BLAS would use
        threads, or a container may use processors, but each with enough samples that these, times the number
        of weights, are at least 2**17 for a U-Net, 2**23 for an MLP; 1 elsewhere.
    to_predict : bool
        True: a copy is shared out, and the model's own weights are not moved to shared memory, so that
        another thread may train it meanwhile.

    Raises
    ------
    TypeError
        If `workers` is more than 1, and `model` is not a `Module`.
    ValueError
        If `workers` is not an integer of at least 1.
    RuntimeError
        As `DataParallel`.
    """
    if workers is None:
        workers = _default_workers(model, batch_size)
    else:
        check_counts(workers=workers)
        workers = min(workers, batch_size)
    if workers == 1 or isinstance(model, DataParallel):
        yield model
        return
    if not isinstance(model, Module):
        raise TypeError(
            f"workers is {workers}, and the network {class_or_kind(model)}; expected workers=1, or a UNet, "
            "an MLP, or another network derived from nn.Module."
        )
    with DataParallel(_separate_copy(model) if to_predict else model, workers) as crew:
        yield crew


def _separate_copy(model: Any) -> Any:
    """A copy with parameters of its own, which hold the model's arrays until they are given others."""
    values = [parameter.value for parameter in model.named_parameters().values()]
    copied = copy.deepcopy(model, {id(value): value for value in values})
    copied.zero_grad()
    return copied


def _can_fork() -> bool:
    """Whether a fork may compute. On macOS Accelerate, NumPy's BLAS, fails or hangs in one."""
    return sys.platform.startswith("linux") and hasattr(os, "fork")


def _default_workers(model: Any, batch_size: int) -> int:
    if not _can_fork() or multiprocessing.current_process().daemon or type(model) not in LEAST_WORK:
        return 1
    if not all(is_numpy_array(p.value) for p in model.named_parameters().values()):
        return 1
    shares = batch_size * model.num_parameters() // LEAST_WORK[type(model)]
    return max(1, min(threads_in_reach(), batch_size, shares))
