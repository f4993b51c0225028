"""IDX, the file format of MNIST: a header of big-endian integers, then the array's bytes in row-major order.

    offset  size  content
    0       2     zero
    2       1     type of the elements; 0x08 is uint8, the only one MNIST uses and the only one read here
    3       1     number of dimensions, d
    4       4 d   length of each dimension
    4 + 4d  ...   the elements, and nothing after them

Files travel gzip-compressed or plain. Anything wrong with a file ends in a ValueError that names it.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np

from tinydiff.checkpoint import replace_file

__all__ = ["decompress", "parse_idx", "read_idx", "write_idx"]

UINT8 = 0x08
GZIP_MAGIC = b"\x1f\x8b"
MAX_NDIM = 64  # NumPy's own limit


def read_idx(source: str | os.PathLike[str] | bytes, ndim: int | None = None) -> np.ndarray:
    """Read an array from an IDX file, gzip-compressed or plain.

    Parameters
    ----------
    source : path or bytes
        The file, or its content.
    ndim : int, optional
        How many dimensions the array must have. Default: any number.

    Returns
    -------
    ndarray of uint8
        A fresh, writable array.

    Raises
    ------
    ValueError
        If the content is a damaged gzip stream, is not IDX, holds another type than uint8 or another number
        of dimensions than `ndim`, or is shorter or longer than its header says. The message names the file.
    FileNotFoundError
        If there is no such file.
    """
    if isinstance(source, bytes):
        return parse_idx(decompress(source, "<bytes>"), "<bytes>", ndim)
    name = os.fspath(source)
    return parse_idx(decompress(Path(source).read_bytes(), name), name, ndim)


def decompress(content: bytes, name: str, most: int = -1) -> bytes:
    """Undo gzip if `content` is a gzip stream, else return it as it is; `name` is for the error message.

    Returns at most `most` bytes of what the stream holds: a small stream may hold more than fits in memory.
    """
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            return stream.read(most)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: damaged or truncated gzip stream ({error})") from None


def parse_idx(content: bytes, name: str, ndim: int | None = None) -> np.ndarray:
    """Make the array that decompressed IDX bytes describe; errors and the rest as in `read_idx`."""
    if len(content) < 4:
        raise ValueError(f"{name}: {len(content)} bytes; an IDX file has at least 4")
    if content[:2] != b"\0\0":
        raise ValueError(f"{name}: not an IDX file: starts with 0x{content[:4].hex()}, expected 0x0000")
    if content[2] != UINT8:
        raise ValueError(f"{name}: element type 0x{content[2]:02x}; expected 0x{UINT8:02x} (uint8)")
    found = content[3]
    if ndim is not None and found != ndim:
        raise ValueError(f"{name}: {found} dimensions; expected {ndim}")
    if not 1 <= found <= MAX_NDIM:
        raise ValueError(f"{name}: {found} dimensions; expected 1 to {MAX_NDIM}")
    start = 4 + 4 * found
    if len(content) < start:
        raise ValueError(f"{name}: truncated: {len(content)} bytes; the header alone has {start}")
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", found, 4))
    present, promised = len(content) - start, math.prod(shape)
    if present != promised:
        what = "truncated" if present < promised else "trailing bytes"
        raise ValueError(f"{name}: {what}: {present} bytes of data; shape {shape} takes {promised}")
    try:
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
    except ValueError as error:  # empty, and its other lengths multiply to more than can be addressed
        raise ValueError(f"{name}: shape {shape} is too large ({error})") from None


def write_idx(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an array as IDX, gzip-compressed if `path` ends in ``.gz``.

    The compressed file holds neither time nor name: the same array gives the same bytes (with the same zlib).
    An existing file is replaced only once the new one is complete.

    Raises
    ------
    TypeError
        If `array` is not an ndarray of uint8.
    ValueError
        If it has no dimension.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"array is of type {found}; expected an ndarray of uint8")
    if array.ndim == 0:
        raise ValueError("array has no dimension; expected at least 1")
    content = bytes([0, 0, UINT8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if os.fspath(path).endswith(".gz"):
        buffer = io.BytesIO()
        # Not gzip.compress: what that writes into the header differs between Python versions.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
            stream.write(content)
        content = buffer.getvalue()
    replace_file(path, content)
