"""Kernels that go element by element: g++ compiles a loop over them."""

import ctypes
import functools

import numpy as np

from cupy._array import empty, ndarray
from cupy._build import built
from cupy._stream import run

__all__ = ["ElementwiseKernel"]

IN_C = {"float32": "float", "float64": "double", "int64": "long long"}


class ElementwiseKernel:
    """As ``cupy.ElementwiseKernel``, for one type T and numbers of given types."""

    def __init__(self, in_params, out_params, operation, name):
        self._inputs, self._outputs = (
            [param.split() for param in params.split(",")] for params in (in_params, out_params)
        )
        self._operation, self._name = operation, name

    def __call__(self, *args):
        inputs, outputs = args[: len(self._inputs)], list(args[len(self._inputs) :])
        if len(inputs) < len(self._inputs) or len(outputs) not in (0, len(self._outputs)):
            raise TypeError(f"Wrong number of arguments for {self._name!r}")
        (dtype,) = {x.dtype for x in args if isinstance(x, ndarray)}
        by_element = (x for (kind, *_), x in zip([*self._inputs, *self._outputs], args) if kind == "T")
        shape = np.broadcast_shapes(*(x.shape for x in by_element))
        if not outputs:
            outputs = [empty(shape, dtype) for _ in self._outputs]
        if any(x.shape != shape for x in outputs):
            raise ValueError(f"{self._name}: an output is not of the shape {shape}.")
        library = built(self._source(dtype), "-O1")
        given = []
        for (*raw, kind, _), x in zip(self._inputs, inputs):
            if kind != "T":
                given.append({"float64": float, "int64": int}[kind](x))
            elif raw and not x.flags.c_contiguous:
                raise ValueError(f"{self._name}: a raw argument that is not contiguous is not emulated.")
            else:
                given.append(x.view)
        run(functools.partial(self._run, library, shape, given, [x.view for x in outputs]))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _source(self, dtype):
        lines = []
        for k, (*raw, kind, name) in enumerate(self._inputs):
            in_c = IN_C.get(kind, "T")
            if raw:
                lines.append(f"const T* {name} = (T*)args[{k}];")
            else:
                lines.append(f"const {in_c} {name} = (({in_c}*)args[{k}])[{'i' if kind == 'T' else 0}];")
        for k, (_, name) in enumerate(self._outputs, len(self._inputs)):
            lines.append(f"T& {name} = ((T*)args[{k}])[i];")
        loop = 'extern "C" void elements(ptrdiff_t n, void** args) { for (ptrdiff_t i = 0; i < n; i++) {'
        begin = ["#include <math.h>", "#include <stddef.h>", f"using T = {IN_C[dtype.name]};", loop]
        return "\n".join([*begin, *lines, self._operation, "}}"])

    def _run(self, library, shape, given, outputs):
        arrays = []
        for (*raw, kind, _), x in zip(self._inputs, given):
            if kind == "T" and not raw:
                x = np.broadcast_to(x, shape)
            arrays.append(np.ascontiguousarray(x))
        whole = [np.ascontiguousarray(x) for x in outputs]
        places = [x.ctypes.data for x in (*arrays, *whole)]
        library.elements(ctypes.c_ssize_t(int(np.prod(shape))), (ctypes.c_void_p * len(places))(*places))
        for x, there in zip(whole, outputs):
            if not np.may_share_memory(x, there):
                there[...] = x
