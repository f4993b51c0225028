"""CuPy's module for cuBLAS, through whose file its functions are found: here the library itself.

A product is computed by the stream that its handle was given.
"""

import ctypes
from pathlib import Path

from cupy._build import built
from cupy._stream import run

_library = built(Path(__file__).with_suffix(".cpp").read_text(), "-O2")
__file__ = _library._name


@ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
def _ask(stream, call, size):
    kept = ctypes.create_string_buffer(ctypes.string_at(call, size), size)
    run(lambda: _library.multiply(kept), stream)


_library.ask_with(_ask)
