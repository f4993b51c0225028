"""What compilers make of a kernel: g++ a library, which is kept in the cache directory; NVIDIA's, nothing."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from cupy import _nvrtc

__all__ = ["CompileException", "built", "shown_to_nvidia", "strict"]

FLAGS = ["-std=c++17", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]


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
    command = ["g++", *FLAGS, *options, "-x", "c++", "-"]
    library = _kept(".so", *command, source)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as beside:  # another process may build the same
            made = Path(beside) / "made.so"
            done = subprocess.run([*command, "-o", made], input=source, capture_output=True, text=True)
            if done.returncode:
                raise CompileException(done.stderr[:4000])
            made.replace(library)
    return ctypes.CDLL(str(library))


@functools.cache
def strict():
    """Options by which what is undefined is noticed.

    A place past an array's end, a wrong alignment and an overflow end a launch. What a thread has of its own
    and never wrote is a large number, with a g++ that knows how to (12).
    """
    options = ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return (*options, *["-ftrivial-auto-var-init=pattern"] * (int(version.split(".")[0]) >= 12))


def shown_to_nvidia(source, options):
    """CompileException unless its own compiler takes it, too, without a word; where it is installed."""
    shown = _kept(".shown", *options, source, _nvrtc.version())
    if _nvrtc.version() is None or shown.exists():
        return
    for architecture in _nvrtc.architectures(source):
        said = _nvrtc.said(source, options, architecture)
        if said:
            raise CompileException(f"NVRTC, for {architecture}: {said}")
    shown.touch()
