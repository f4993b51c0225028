"""Kernels in CUDA, compiled by g++ and run by ``_threads.cpp``."""

import ctypes
import functools
import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from cupy import _nvrtc
from cupy._array import empty, ndarray
from cupy._stream import run

__all__ = ["ElementwiseKernel", "RawKernel", "built"]

LONGEST = 60  # seconds of the CPU that a launch may take
HERE = Path(__file__).parent
# What is undefined ends the launch: a place past an array's end, a wrong alignment, an overflow.
FLAGS = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-x", "c++", "-"]
# What is undefined ends a launch: a place past an array's end, a wrong alignment, an overflow.
STRICT = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]

RUN = r"""
extern "C" void run_thread(void** args) { called(KERNEL, args); }
extern "C" const char* letters() { return letters_of(KERNEL); }
extern "C" char* shared_begin() { return &__start_shared_memory; }
extern "C" char* shared_end() { return &__stop_shared_memory; }
"""

_seeds = random.Random(0)
_turn = threading.Lock()  # threads of the host take turns


class CompileException(Exception):
    """What the compiler says."""


def _kept(ending, *of):
    """Where in the cache directory is kept what was made of these."""
    name = hashlib.sha256("\0".join(map(str, of)).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinydiff" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (name + ending)


def built(source, *options):
    """The library that g++ makes of a source in C++; kept in the cache directory."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise CompileException("The emulated GPU needs g++.")
    command = [compiler, *FLAGS[:-3], *options, *FLAGS[-3:]]
    library = _kept(".so", *command, source)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as beside:  # another process may build the same
            made = Path(beside) / "made.so"
            done = subprocess.run([*command, "-o", made], input=source, capture_output=True, text=True)
            if done.returncode:
                raise CompileException(done.stderr[:4000])
            made.replace(library)
    return ctypes.CDLL(str(library))


def _shown_to_nvidia(source, options):
    """Whether its own compiler takes it, too, without a word; where it is installed."""
    shown = _kept(".shown", *options, source, _nvrtc.version())
    if _nvrtc.version() is None or shown.exists():
        return
    for architecture in _nvrtc.architectures(source):
        said = _nvrtc.said(source, options, architecture)
        if said:
            raise CompileException(f"NVRTC, for {architecture}: {said}")
    shown.touch()


@functools.cache
def _emulate():
    library = built((HERE / "_threads.cpp").read_text(), "-O3")
    emulate = ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL).emulate  # kernels find it, too
    p, u = ctypes.c_void_p, ctypes.c_uint
    emulate.argtypes = [p, p, u, u, ctypes.c_size_t, p, p, u, u, ctypes.c_char_p]
    return emulate


def _closed(text, at):
    """Where the bracket that opens at `at` closes."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"':
            quoted = not quoted
        elif not quoted:
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                return i
    raise CompileException(f"a bracket is not closed: {text[at : at + 100]}")


def _called(statement):
    """What stands between the brackets of asm(...), as a call of ``_cuda.h``."""
    parts, start, i = [], 0, 0
    while i < len(statement):
        if statement[i] == '"':
            i = statement.index('"', i + 1)
        elif statement[i] == "(":
            i = _closed(statement, i)
        elif statement[i] == ":":
            parts.append(statement[start:i])
            start = i + 1
        i += 1
    parts.append(statement[start:])
    text = "".join(re.findall(r'"([^"]*)"', parts[0]))
    operands = []
    for part in parts[1:3]:  # outputs, inputs; then what it writes over
        for found in re.finditer(r'"=?([a-z])"\s*\(', part):
            operands.append(f"ptx_{found[1]}({part[found.end() : _closed(part, found.end() - 1)]})")
    name, _, given = text.strip().rstrip(";").partition(" ")
    words = [word for word in re.split(r"[\s,{}\[\]]+", given) if word]
    if sorted(words) != sorted({f"%{i}" for i in range(len(operands))} | {w for w in words if w[0] != "%"}):
        raise CompileException(f"{text}: expected each of its {len(operands)} operands once.")
    arguments = (operands[int(word[1:])] if word[0] == "%" else word for word in words)
    return f"{name.replace('.', '_')}({', '.join(arguments)})"


def _in_cpp(source):
    """CUDA in C++: PTX as calls, and the shared memory whose size is the launch's."""
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = (\1*)dynamic_shared;", source)
    while found := re.search(r"\basm(\s+volatile)?\s*\(", source):
        end = _closed(source, found.end() - 1)
        source = source[: found.start()] + _called(source[found.end() : end]) + source[end + 1 :]
    return source


class RawKernel:
    """As ``cupy.RawKernel``; a parameter must be of the very type that CuPy makes of its argument."""

    def __init__(self, code, name, options=()):
        self._code, self._name, self._options = code, name, options
        self.max_dynamic_shared_size_bytes = 48 * 1024

    @functools.cached_property
    def _library(self):
        _shown_to_nvidia(self._code, self._options)
        _emulate()
        source = (HERE / "_cuda.h").read_text() + _in_cpp(self._code) + RUN
        library = built(source, *STRICT, f"-DKERNEL={self._name}", *self._options)
        for of in (library.letters, library.shared_begin, library.shared_end):
            of.restype = ctypes.c_void_p
        library.letters.restype = ctypes.c_char_p
        return library

    def __call__(self, grid, block, args, *, shared_mem=0):
        (blocks,), (threads,) = grid, block
        letters = self._library.letters().decode()
        if len(args) != len(letters):
            raise TypeError(f"{self._name} has {len(letters)} parameters, not {len(args)}.")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{shared_mem} bytes of shared memory: {self._name} may have fewer.")
        values = [
            _as(letter, arg, f"{self._name}, {i}") for i, (letter, arg) in enumerate(zip(letters, args))
        ]
        run(functools.partial(self._launch, blocks, threads, values, shared_mem))
        for i, arg in enumerate(args):
            if isinstance(arg, ndarray) and not arg.mem.is_alone():
                raise RuntimeError(f"{self._name}: somebody wrote before or behind its argument {i}.")

    def _launch(self, blocks, threads, values, shared_mem):
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        said, of = ctypes.create_string_buffer(256), self._library
        where = of.shared_begin(), of.shared_end()
        with _turn:
            seed = _seeds.getrandbits(32)
            ran = _emulate()(of.run_thread, places, blocks, threads, shared_mem, *where, seed, LONGEST, said)
        if not ran:
            raise RuntimeError(f"{self._name}: {said.value.decode()}")


def _as(letter, arg, what):
    """An argument as a launch hands it on: 8 bytes, of the type that the parameter has."""
    if isinstance(arg, ndarray) and letter == "p":
        return ctypes.c_void_p(arg.data.ptr)
    if type(arg) is int and (letter == "i" or (letter == "p" and arg == 0)):
        return ctypes.c_longlong(arg)
    if type(arg) is float and letter == "d":
        return ctypes.c_double(arg)
    raise TypeError(f"{what}: {type(arg).__name__} for a parameter of kind {letter!r}.")


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
        by_element = [
            x.shape for param, x in zip([*self._inputs, *self._outputs], args)
            if isinstance(x, ndarray) and param[0] != "raw"
        ]  # fmt: skip
        shape = np.broadcast_shapes(*by_element)
        if not outputs:
            outputs = [empty(shape, dtype) for _ in self._outputs]
        if any(x.shape != shape for x in outputs):
            raise ValueError(f"{self._name}: an output is not of the shape {shape}.")
        library = built(self._source(dtype))
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
            of = f"(({'T' if kind == 'T' else IN_C[kind]}*)args[{k}])"
            if raw:
                lines.append(f"const T* {name} = {of};")
            else:
                lines.append(
                    f"const {'T' if kind == 'T' else IN_C[kind]} {name} = {of}[{'i' if kind == 'T' else 0}];"
                )
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
            arrays.append(np.ascontiguousarray(x, {"float64": np.float64, "int64": np.int64}.get(kind)))
        whole = [np.ascontiguousarray(x) for x in outputs]
        places = [x.ctypes.data for x in (*arrays, *whole)]
        library.elements(ctypes.c_ssize_t(int(np.prod(shape))), (ctypes.c_void_p * len(places))(*places))
        for x, there in zip(whole, outputs):
            if not np.may_share_memory(x, there):
                there[...] = x
