"""Trainings in the tests: what they are shown, how one is interrupted, and what two are compared by."""

import json
from itertools import pairwise

import numpy as np
from numpy.testing import assert_array_equal

from tinydiff.backend import to_numpy

POINTS = np.random.default_rng(5).standard_normal((10, 2)).astype(np.float32)


class Interrupted(Exception):
    pass


def drawn(batch_size, rng):
    return POINTS[rng.integers(len(POINTS), size=batch_size)]


def failing(data, at, error):
    """`data` as a callable that raises at its call number `at`, counted from 0."""
    return raising(lambda batch_size, rng: data[rng.integers(len(data), size=batch_size)], at, error)


def raising(original, at, error=KeyboardInterrupt, when="before"):
    """`original`, but for its call number `at`, counted from 0: that raises, before or after its work."""
    calls = iter(range(10**9))

    def call(*args, **kwargs):
        now = next(calls) == at
        if now and when == "before":
            raise error
        result = original(*args, **kwargs)
        if now:
            raise error
        return result

    return call


def refused(original, times):
    """`original`, but for its first calls: Windows refuses what is done to a file that somebody has open."""
    refusals = iter(range(times))

    def call(*args, **kwargs):
        if next(refusals, None) is not None:
            raise PermissionError("in use")
        return original(*args, **kwargs)

    return call


def weights_of(model):
    """By name, as they are now."""
    return {name: to_numpy(p.value).copy() for name, p in model.named_parameters().items()}


def assert_same_weights(a, b):
    """Of two models, or what `weights_of` has said of them."""
    a, b = (x if isinstance(x, dict) else weights_of(x) for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert_array_equal(a[name], b[name], err_msg=name)


def lines(directory):
    """The metrics, without the wall clock."""
    parsed = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(earlier["seconds"] <= later["seconds"] for earlier, later in pairwise(parsed))
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in parsed]
