"""What every test shares: a Hypothesis profile without deadlines, and reproducible examples in CI."""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tinydiff import plotting
from tinydiff.kernels import blas_on_one_thread

settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser):
    parser.addoption(
        "--emulated",
        action="store_true",
        help="a GPU that is not there: CuPy is what stands in for it in tests/emulated (with -m gpu)",
    )


def pytest_configure(config):
    if config.getoption("emulated"):
        if sys.platform != "linux" or not shutil.which("g++"):
            raise pytest.UsageError("--emulated needs Linux and g++.")
        sys.path.insert(0, str(Path(__file__).parent / "emulated"))
    _leave_flags_alone(config)


def pytest_report_header(config):
    if config.getoption("emulated"):
        from cupy import _nvrtc

        known = _nvrtc.version()
        which = f"NVRTC {known}" if known else "no NVRTC (pip install nvidia-cuda-nvrtc-cu12)"
        return f"a GPU that is not there: kernels are compiled by g++; {which}"


def _leave_flags_alone(config):
    """A product by some matrix units (SME, as in Apple's M4) leaves all flags set: NumPy warns of each."""
    with warnings.catch_warnings(record=True) as of_nothing:
        warnings.simplefilter("always")
        one = np.eye(16, dtype=np.float32)
        assert np.all(one @ one == one)
    if of_nothing:
        # Here, for tests that count warnings or make errors of them; by the filter, in other threads.
        np.seterr(divide="ignore", over="ignore", invalid="ignore")
        config.addinivalue_line("filterwarnings", "ignore:.* encountered in matmul:RuntimeWarning")
        # And in the processes that tests start, where a message is given as it begins.
        kinds = ("divide by zero", "overflow", "invalid value")
        ignored = [f"ignore:{kind} encountered in matmul:RuntimeWarning" for kind in kinds]
        os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [os.environ.get("PYTHONWARNINGS")]), *ignored])


@pytest.fixture(autouse=True)
def _numpy_backend(monkeypatch):
    """Tests choose their backend by argument; an inherited environment variable must not choose for them."""
    monkeypatch.delenv("TINYDIFF_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _no_colors(monkeypatch):
    """From 3.13 on, Python paints tracebacks, and from 3.14 on a parser's help, where FORCE_COLOR is set."""
    monkeypatch.setenv("PYTHON_COLORS", "0")


@pytest.fixture(scope="module", autouse=True)
def blas_threads():
    """One, as in every loop of `train` and `sample`: between products a second spins, on a core that another
    process of pytest needs. Kernels share out work as ever. Modules of tests that ask for BLAS's threads
    have a fixture of this name that leaves them.
    """
    with blas_on_one_thread():
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Most of a short demo's time, where something else is looked at."""
    monkeypatch.setattr(plotting, "save", lambda figure, path: None)


@pytest.fixture
def full_disk():
    """A context in which a file takes its first 100 bytes, and no more: as on a disk that is full."""
    resource = pytest.importorskip("resource", reason="no limit can be set to the size of a file")

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
