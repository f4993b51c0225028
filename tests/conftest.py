"""What every test shares: a Hypothesis profile without deadlines, and reproducible examples in CI."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _numpy_backend(monkeypatch):
    """Tests choose their backend by argument; an inherited environment variable must not choose for them."""
    monkeypatch.delenv("TINYDIFF_BACKEND", raising=False)
