"""What every test shares: a Hypothesis profile without deadlines, and reproducible examples in CI."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config):
    """A product by some matrix units (SME, as in Apple's M4) leaves all flags set: NumPy warns of each."""
    with warnings.catch_warnings(record=True) as of_nothing:
        warnings.simplefilter("always")
        one = np.eye(16, dtype=np.float32)
        assert np.all(one @ one == one)
    if of_nothing:
        config.addinivalue_line("filterwarnings", "ignore:.* encountered in matmul:RuntimeWarning")


@pytest.fixture(autouse=True)
def _numpy_backend(monkeypatch):
    """Tests choose their backend by argument; an inherited environment variable must not choose for them."""
    monkeypatch.delenv("TINYDIFF_BACKEND", raising=False)
