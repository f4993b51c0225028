"""CuPy's module for cuBLAS, through whose file its functions are found: here the library itself.

In a recording a product is not computed, but kept.
"""

import ctypes
from pathlib import Path

from cupy._build import built
from cupy._stream import is_capturing, run

_library = built(Path(__file__).with_suffix(".cpp").read_text(), "-O2")
__file__ = _library._name


def _keep(call, size):
    if not is_capturing():
        return 0
    kept = ctypes.create_string_buffer(ctypes.string_at(call, size), size)
    run(lambda: _library.multiply(kept))
    return 1


_hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(_keep)
_library.keep_with(_hook)
