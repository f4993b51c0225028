"""How often a step calls its array library: in a small network a GPU takes longer over that than computing.

Counted under array-api-strict (`namespaces.launches`), which goes through the lines that CuPy goes through.
The number of kernels that CuPy starts is close to it, not the same: it may need two for a sum, and none for
a copy that it leaves to the driver.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from namespaces import launches, space, training_step, transfers
from numpy.testing import assert_array_equal

import tinydiff as td
from tinydiff import backend
from tinydiff.backend import to_numpy

ROOT = Path(__file__).parent.parent
PROCESS = td.GaussianDiffusion(td.cosine_schedule(20), "v")


# The counter itself


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda xp, x: x + 1.0, ["__add__"]),
        (lambda xp, x: 1.0 / x, ["__rtruediv__"]),
        (lambda xp, x: xp.sum(x @ x), ["__matmul__", "sum"]),
        (lambda xp, x: x[1:, 0] * x[:1, 0], ["__mul__"]),
        (lambda xp, x: xp.reshape(xp.permute_dims(x, (1, 0)), (4,)), ["reshape"]),  # cannot be a view
        (lambda xp, x: xp.reshape(x, (4,)), []),
        (lambda xp, x: xp.broadcast_to(xp.flip(x).T[..., None], (2, 2, 5)), []),
        (lambda xp, x: xp.asarray(x), []),
        (lambda xp, x: xp.astype(x, x.dtype, copy=False), []),
        (lambda xp, x: xp.asarray(x, copy=True), ["asarray"]),
        (lambda xp, x: xp.asarray(np.ones(2)), ["asarray"]),  # sent from the host
        (lambda xp, x: xp.concat([x, x, x]), ["concat"]),
        (lambda xp, x: x.__iadd__(x), ["__iadd__"]),
        (lambda xp, x: x.__setitem__((0, slice(None)), 3.0), ["__setitem__"]),
        (lambda xp, x: x[xp.asarray([0, 1]), xp.asarray([0, 1])], ["asarray", "asarray", "__getitem__"]),
    ],
)
def test_the_counter_counts_what_computes_or_copies(call, names):
    where = space("strict")
    x = where.xp.ones((2, 2))
    with launches() as seen:
        call(where.xp, x)
    assert [name for name, _ in seen] == names


# Steps


@pytest.fixture
def networks(monkeypatch):
    """Those of the benchmark, with a quarter of the channels: it is the layers that count."""
    monkeypatch.syspath_prepend(ROOT / "demos")
    from _bench.networks import CONFIGS

    return {name: CONFIGS[name].quick() for name in ("mnist", "cifar", "toy")}


@pytest.mark.parametrize("name", ["mnist", "cifar", "toy"])
def test_calls_of_a_step_are_those_of_the_page(networks, name):
    """docs/12 has the numbers; from the second step on all steps are alike."""
    config, where, rng = networks[name], space("strict"), np.random.default_rng(0)
    model = where.module(config.model(), "float32")
    step = training_step(model, PROCESS, where.array(np.full((2, *config.shape), 0.5, np.float32)))
    step(rng)
    steps = []
    for _ in range(2):
        with launches() as seen:
            step(rng)
        steps.append(seen)
    assert steps[0] == steps[1]  # the same work on the same shapes: it could be recorded and replayed
    counts = []
    for n in (2, 3):
        with launches() as seen:
            shape = (2, *config.shape)
            td.sample(model, PROCESS, shape, "ddim", n, rng=rng, progress=False)
        counts.append(len(seen))
    page = (ROOT / "docs" / "12-gpu.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{name}` \| ([\d,]+) \| ([\d,]+) \|", page, re.MULTILINE)
    assert rows == [(f"{len(steps[0]):,}", f"{counts[1] - counts[0]:,}")]


@pytest.mark.parametrize("name", ["mnist", "toy"])
def test_a_network_that_has_its_times_there_sends_and_takes_nothing(networks, name):
    """Forward and backward are the device's alone, which is what a recording of them would need."""
    config, where = networks[name], space("strict")
    model = where.module(config.model(), "float32")
    x, t = where.array(np.ones((2, *config.shape), np.float32)), where.array(np.asarray([3, 15]))
    sent = []
    original = where.xp.asarray

    def asarray(obj, **kwargs):
        if not isinstance(obj, type(x)):
            sent.append(np.shape(obj))
        return original(obj, **kwargs)

    backend._constants.clear()
    for step in range(2):
        with pytest.MonkeyPatch.context() as patch, transfers() as taken:
            patch.setattr(where.xp, "asarray", asarray)
            sent.clear()
            y, backward = model(x, t)
            backward(y)
        assert taken == []
        assert sent if step == 0 else not sent  # the constants of all steps, with the first
    assert_array_equal(to_numpy(y), to_numpy(model.predict(x, np.asarray([3, 15]))))


def test_the_optimizer_s_calls_do_not_grow_with_the_number_of_arrays(networks):
    counts = []
    for config in networks.values():
        where = space("strict")
        model = where.module(config.model(), "float32")
        parameters = model.named_parameters()
        for p in parameters.values():
            p.grad = where.xp.ones(p.shape, dtype=p.value.dtype, device=where.device)
        optimizer, ema = td.Adam(parameters), td.EMA(model)
        for _ in range(2):
            with launches() as seen:
                td.clip_grad_norm(parameters, 1.0)
                optimizer.step()
                ema.update()
        counts.append((len(parameters), len(seen)))
    arrays, calls = zip(*counts)
    assert min(arrays) < 30 and max(arrays) > 300
    assert len(set(calls)) == 1 and calls[0] <= 34
