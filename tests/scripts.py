"""The scripts of demos/ and tools/, which are in no package: as modules, and run in this process."""

import functools
import gc
import importlib.util
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinydiff.kernels import _threads

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"


def script(path):
    """What is in the file, as a module of its own at every call."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo(name):
    return script(DEMOS / f"{name}.py")


def run(module, *argv, capsys=None, expect=0):
    """Run a demo, which is to end with exit code `expect`; return what it wrote on stdout and stderr."""
    module = demo(module) if isinstance(module, str) else module
    if expect:
        with pytest.raises(SystemExit) as end:
            module.main([str(arg) for arg in argv])
        assert end.value.code == expect
    else:
        module.main([str(arg) for arg in argv])
    return capsys.readouterr() if capsys else None


@contextmanager
def benchmark_in_brief():
    """Its parts on the path, the machine measured briefly; afterwards the number of threads is what it was.

    Between turns it collects garbage, of which there is none in what all the tests have imported.
    """
    threads = _threads._blas[0]() if _threads._blas else None
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        from _bench import layers, machine

        patch.setattr(layers, "product_gflops", lambda: machine.product_gflops(256))
        patch.setattr(machine, "share_given", functools.partial(machine.share_given, seconds=0.02))
        for name in ("OPENBLAS_NUM", "OMP_NUM", "MKL_NUM", "VECLIB_MAXIMUM"):
            patch.setenv(f"{name}_THREADS", "1")
        patch.setenv("CUPY_TF32", "1")
        yield
    gc.unfreeze()
    if threads:
        _threads._blas[1](threads)
