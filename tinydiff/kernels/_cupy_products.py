"""Matrix products by cuBLAS, called directly.

CuPy's own ``@`` cannot be part of a recording: it refuses cuBLAS on a stream that is being captured. It also
copies a transposed factor of a batched product, and does not heed CUPY_TF32 there. So cuBLAS is called here
through ctypes: the library that CuPy itself is linked to, with a handle of our own. A handle needs a
workspace of its own for each stream it is used on, since what it would allocate by itself during a capture
would not stay.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from contextlib import suppress
from typing import Any

import cupy
from cupy._core import get_compute_type
from cupy_backends.cuda.libs import cublas

from tinydiff.kernels._cupy_compile import kind_of

__all__ = ["is_tf32", "product", "ready", "workspace_of"]

COMPUTE_TYPE_TF32 = 7  # of CuPy: CUPY_TF32 asked for it
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77  # of cuBLAS
WORKSPACE = 2**25  # bytes: what NVIDIA advises for Hopper
NUMBER = {"f": (0, ctypes.c_float), "d": (1, ctypes.c_double)}  # CUDA_R_32F, CUDA_R_64F

# cublasStatus_t that may mean that there is no memory, by the names by which ``memory.py`` knows them
STATUS = {1: "CUBLAS_STATUS_NOT_INITIALIZED", 3: "CUBLAS_STATUS_ALLOC_FAILED"}

_mine = threading.local()


@functools.cache
def _library() -> Any:
    """CuPy's module for cuBLAS: the functions of the library it is linked to are found through it.

    None where they are not: on Windows a module does not hand on what it is linked to.
    """
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    try:
        library = ctypes.CDLL(cublas.__file__)
        library.cublasCreate_v2.argtypes = [ctypes.POINTER(p)]
    except (OSError, AttributeError):
        return None
    library.cublasSetStream_v2.argtypes = [p, p]
    library.cublasSetWorkspace_v2.argtypes = [p, p, ctypes.c_size_t]
    one: list[Any] = [p, i, i]
    many: list[Any] = [*one, n]
    begin: list[Any] = [p, i, i, i, i, i, p]
    library.cublasGemmEx.argtypes = [*begin, *one, *one, p, *one, i, i]
    library.cublasGemmStridedBatchedEx.argtypes = [*begin, *many, *many, p, *many, i, i, i]
    return library


class _Handle:
    """A handle of this thread on this device, which follows CuPy's current stream."""

    def __init__(self) -> None:
        self.library = _library()
        self.pointer = ctypes.c_void_p()
        _check("cublasCreate", self.library.cublasCreate_v2(ctypes.byref(self.pointer)))
        self.stream: int | None = None
        self.workspaces: dict[int, Any] = {}

    def follow(self, stream: int) -> None:
        if stream == self.stream:
            return
        if stream not in self.workspaces:
            # Beside CuPy's current pool, which may be that of a recording.
            self.workspaces[stream] = cupy.get_default_memory_pool().malloc(WORKSPACE)
        workspace = self.workspaces[stream].ptr
        _check("cublasSetStream", self.library.cublasSetStream_v2(self.pointer, stream))
        _check("cublasSetWorkspace", self.library.cublasSetWorkspace_v2(self.pointer, workspace, WORKSPACE))
        self.stream = stream


class _Handles(dict[int, _Handle]):
    """A thread's handles, by device. When it ends they go to others.

    They are not destroyed: that waits for the device, and something recorded may still know their memory.
    """

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            for device, handle in self.items():
                handle.stream = None
                handle.workspaces.clear()
                _idle.setdefault(device, []).append(handle)


_idle: dict[int, list[_Handle]] = {}  # by device, those of threads that have ended


def workspace_of(stream: int) -> Any:
    """The workspace that this thread's products had on a stream, or None; it is the caller's from now on."""
    handle = _mine.__dict__.get("handles", {}).get(cupy.cuda.runtime.getDevice())
    if handle is None:
        return None
    handle.stream = None  # another stream may have that name later
    return handle.workspaces.pop(stream, None)


def ready() -> None:
    """Make this thread's handle now, if products need one: not in a recording, since that allocates."""
    if _library() is not None:
        _own()


def _own() -> _Handle:
    handles = _mine.__dict__.get("handles")
    if handles is None:
        handles = _mine.handles = _Handles()
    device = cupy.cuda.runtime.getDevice()
    if device not in handles:
        try:
            handles[device] = _idle[device].pop()
        except (KeyError, IndexError):
            handles[device] = _Handle()
    handle: _Handle = handles[device]
    return handle


def _handle() -> _Handle:
    handle = _own()
    handle.follow(cupy.cuda.get_current_stream().ptr)
    return handle


def _check(what: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{what} returned {status} ({STATUS.get(status, 'cublasStatus_t')}).")


@functools.lru_cache(maxsize=64)
def _number(kind: str, value: float) -> Any:
    return NUMBER[kind][1](value)


def _compute_type(kind: str) -> int:
    if kind == "d":
        return COMPUTE_64F
    return COMPUTE_32F_FAST_TF32 if is_tf32() else COMPUTE_32F


def is_tf32() -> bool:
    """Whether the factors of float32 products may be rounded to 11 digits (CUPY_TF32=1)."""
    return bool(get_compute_type("f") == COMPUTE_TYPE_TF32)


def product(a: Any, b: Any, *, ta: bool = False, tb: bool = False, scale: float = 1.0) -> Any:
    """scale a b of two matrices, or of as many pairs as the first axis counts; with `ta` a.T, with `tb` b.T.

    a (..., M, K) or, with ta, (..., K, M); b (..., K, N) or (..., N, K)  ->  (..., M, N). What is not
    contiguous is copied.
    """
    a, b = cupy.ascontiguousarray(a), cupy.ascontiguousarray(b)
    kind = kind_of(a)
    (m, k), (k_b, n) = a.shape[-2:][:: -1 if ta else 1], b.shape[-2:][:: -1 if tb else 1]
    lead = a.shape[:-2]
    if k != k_b or lead != b.shape[:-2] or a.dtype != b.dtype:
        raise ValueError(f"no product of {a.shape} {a.dtype} and {b.shape} {b.dtype} (ta={ta}, tb={tb}).")
    if max(m, k, n, *lead) >= 2**31:  # beyond cuBLAS's int, to which ctypes would cut it without a word
        raise MemoryError(f"a product of {a.shape} and {b.shape}: take a smaller batch.")
    c = cupy.empty((*lead, m, n), a.dtype)
    if not c.size or not k:
        c.fill(0)
        return c
    if _library() is None:  # CuPy's product, which cannot be recorded
        cupy.matmul(a.swapaxes(-1, -2) if ta else a, b.swapaxes(-1, -2) if tb else b, out=c)
        c *= scale
        return c
    number = NUMBER[kind][0]
    handle = _handle()
    # cuBLAS goes by columns, where all are transposed: c.T = b.T a.T.
    begin = (handle.pointer, int(tb), int(ta), n, m, k, ctypes.byref(_number(kind, scale)))
    b_is, a_is = (b.data.ptr, number, b.shape[-1]), (a.data.ptr, number, a.shape[-1])
    zero, c_is = ctypes.byref(_number(kind, 0.0)), (c.data.ptr, number, n)
    end = (_compute_type(kind), -1)  # CUBLAS_GEMM_DEFAULT
    if lead:
        each = (k * n, m * k, m * n)  # from one matrix to the next
        args = (*begin, *b_is, each[0], *a_is, each[1], zero, *c_is, each[2], c.size // (m * n), *end)
        _check("cublasGemmStridedBatchedEx", handle.library.cublasGemmStridedBatchedEx(*args))
    else:  # which has more ways to choose from: to share out a long sum, say
        _check("cublasGemmEx", handle.library.cublasGemmEx(*begin, *b_is, *a_is, zero, *c_is, *end))
    return c
