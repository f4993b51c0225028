"""Kernels in CUDA, compiled by g++ and run by ``_threads.cpp``."""

import ctypes
import functools
import random
from pathlib import Path

from cupy._array import ndarray
from cupy._build import built, shown_to_nvidia, strict
from cupy._memory import is_untouched
from cupy._ptx import in_cpp
from cupy._stream import run

__all__ = ["RawKernel"]

LONGEST = 60  # seconds of the CPU that a launch may take
HERE = Path(__file__).parent

RUN = r"""
extern "C" void run_thread(void** args) { called(KERNEL, args); }
extern "C" const char* letters() { return letters_of(KERNEL); }
extern "C" char* shared_begin() { return &__start_shared_memory; }
extern "C" char* shared_end() { return &__stop_shared_memory; }
"""

_seeds = random.Random(0)


@functools.cache
def _emulate():
    library = built((HERE / "_threads.cpp").read_text(), "-O3")
    emulate = ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL).emulate  # kernels find it, too
    p, u = ctypes.c_void_p, ctypes.c_uint
    emulate.argtypes = [p, p, u, u, ctypes.c_size_t, p, p, u, u, ctypes.c_char_p]
    return emulate


class RawKernel:
    """As ``cupy.RawKernel``; a parameter must be of the very type that CuPy makes of its argument."""

    def __init__(self, code, name, options=()):
        self._code, self._name, self._options = code, name, options
        self.max_dynamic_shared_size_bytes = 48 * 1024

    @functools.cached_property
    def _library(self):
        shown_to_nvidia(self._code, self._options)
        _emulate()
        source = (HERE / "_cuda.h").read_text() + in_cpp(self._code) + RUN
        library = built(source, *strict(), f"-DKERNEL={self._name}", *self._options)
        for of in (library.letters, library.shared_begin, library.shared_end):
            of.restype = ctypes.c_void_p
        library.letters.restype = ctypes.c_char_p
        return library

    def __call__(self, grid, block, args, *, shared_mem=0):
        (blocks,), (threads,) = grid, block
        blocks = max(1, blocks)  # so does CuPy: of no blocks one runs
        if blocks >= 2**31 or not 0 < threads <= 1024:
            raise ValueError(f"{self._name}: {blocks} blocks of {threads} threads cannot be launched.")
        letters = self._library.letters().decode()
        if len(args) != len(letters):
            raise TypeError(f"{self._name} has {len(letters)} parameters, not {len(args)}.")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{shared_mem} bytes of shared memory: {self._name} may have fewer.")
        values = [
            _as(letter, arg, f"{self._name}, {i}") for i, (letter, arg) in enumerate(zip(letters, args))
        ]
        beside = {i: arg.mem.beside() for i, arg in enumerate(args) if isinstance(arg, ndarray)}
        run(functools.partial(self._launch, blocks, threads, values, shared_mem, beside))

    def _launch(self, blocks, threads, values, shared_mem, beside):
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        said, of = ctypes.create_string_buffer(256), self._library
        where = of.shared_begin(), of.shared_end()
        seed = _seeds.getrandbits(32)
        if not _emulate()(of.run_thread, places, blocks, threads, shared_mem, *where, seed, LONGEST, said):
            raise RuntimeError(f"{self._name}: {said.value.decode()}")
        for i, each in beside.items():
            if not is_untouched(each):
                raise RuntimeError(f"{self._name}: somebody wrote before or behind its argument {i}.")


def _as(letter, arg, what):
    """An argument as a launch hands it on: 8 bytes, of the type that the parameter has."""
    if isinstance(arg, ndarray) and letter == "p":
        return ctypes.c_void_p(arg.data.ptr)
    if type(arg) is int and (letter == "i" or (letter == "p" and arg == 0)):
        return ctypes.c_longlong(arg)
    if type(arg) is float and letter == "d":
        return ctypes.c_double(arg)
    raise TypeError(f"{what}: {type(arg).__name__} for a parameter of kind {letter!r}.")
