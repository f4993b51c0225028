"""NVIDIA's own compiler, which needs no GPU: what it says of a kernel, where it is installed.

``pip install nvidia-cuda-nvrtc-cu12`` brings it.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

__all__ = ["architectures", "said", "version"]

SINCE_TENSOR_CORES = ("sm_80", "sm_90")  # A100, H100: for what they alone know
BEFORE = ("sm_75",)  # T4


@functools.cache
def _library():
    """The library, or None."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


@functools.cache
def version():
    """Such as "12.9", or None where there is none."""
    if _library() is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architectures(source):
    """GPUs for which this source is meant."""
    return SINCE_TENSOR_CORES if "mma.sync" in source or "cp.async" in source else BEFORE + SINCE_TENSOR_CORES


def said(source, options, architecture):
    """What the compiler says of it: nothing, if it is as it should be."""
    of, program = _library(), ctypes.c_void_p()
    given = [option.encode() for option in (*options, "--std=c++17", f"--gpu-architecture={architecture}")]
    of.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    status = of.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    size = ctypes.c_size_t()
    of.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    of.nvrtcGetProgramLog(program, log)
    of.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() or (f"nvrtcResult {status}" if status else "")
