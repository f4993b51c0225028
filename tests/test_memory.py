"""Out of memory is one sentence with a batch size that fits; and how one is found."""

import functools
import sys
import tracemalloc
import types

import array_api_strict as strict
import numpy as np
import pytest
from namespaces import space
from runs import assert_same_weights, weights_of

import tinydiff as td
from tinydiff import memory, training

PROCESS = td.GaussianDiffusion(td.linear_schedule(10))
POINTS = np.zeros((100, 2), np.float32)
SETTINGS = dict(steps=4, seed=0, progress=False)


class OutOfMemoryError(MemoryError):
    """As CuPy's, in what it is and says."""

    def __init__(self, size):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: 1,024 bytes).")


class CUDARuntimeError(RuntimeError):
    def __init__(self, size):
        super().__init__("cudaErrorMemoryAllocation: out of memory")


class Tight(td.MLP):
    """A model whose backward has memory up to a batch of `room`, and that says what it was shown."""

    room, error, after = 10**9, OutOfMemoryError, 0

    def __call__(self, x, t, rng=None):
        self.shown = [*getattr(self, "shown", []), x.shape[0]]
        y, backward = super().__call__(x, t, rng)

        def backward_with_little_room(dy):
            if x.shape[0] > self.room and len(self.shown) > self.after:
                raise self.error(x.shape[0] * 4)
            return backward(dy)

        return y, backward_with_little_room


def tight(room, error=OutOfMemoryError, after=0, where=None):
    model = Tight(hidden=4, blocks=1, time_features=4)
    model.room, model.error, model.after = room, error, after
    return model if where is None else where.module(model, "float32")


# Training


@pytest.mark.parametrize("error", [OutOfMemoryError, CUDARuntimeError])
@pytest.mark.parametrize("name", ["numpy", "strict"])
@pytest.mark.parametrize(("batch_size", "fits"), [(64, 8), (40, 10), (11, 5)])
def test_out_of_memory_names_a_batch_that_fits(name, error, batch_size, fits):
    model = tight(10, error, where=space(name))
    before = weights_of(model)
    with pytest.raises(MemoryError) as caught:
        td.train(model, PROCESS, POINTS, batch_size=batch_size, **SETTINGS)
    message = str(caught.value)
    assert message.startswith(f"a step of batch_size={batch_size} does not fit in memory (")
    assert message.endswith(f"); a step of {fits} fits, so try batch_size={fits}.")
    assert "\n" not in message and ".)" not in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # nothing holds the arrays
    assert all(p._grad is None for p in model.named_parameters().values())
    assert_same_weights(model, before)
    td.train(model, PROCESS, POINTS, batch_size=fits, **SETTINGS)


def test_when_nothing_fits():
    with pytest.raises(MemoryError, match=r"batch_size=4 does not fit .*; not even one of 1 fits\.$"):
        td.train(tight(0), PROCESS, POINTS, batch_size=4, **SETTINGS)


def test_running_out_in_the_middle_keeps_the_checkpoint(tmp_path):
    model = tight(4, after=3)  # as when another program takes the memory
    how = dict(batch_size=8, run_dir=tmp_path, checkpoint_every=2)
    with pytest.raises(MemoryError, match="try batch_size=4"):
        td.train(model, PROCESS, POINTS, **how, **SETTINGS)
    assert td.checkpoint.load_arrays(tmp_path / "checkpoint.safetensors")[1]["step"] == 2


def test_other_errors_are_not_taken_for_it():
    class Other(RuntimeError):
        def __init__(self, size):
            super().__init__("cudaErrorIllegalAddress: an illegal memory access was encountered")

    with pytest.raises(Other):
        td.train(tight(0, Other), PROCESS, POINTS, batch_size=4, **SETTINGS)
    with pytest.raises(Other):
        td.find_batch_size(tight(4, Other, where=space("strict")), PROCESS, POINTS)


def test_a_data_set_that_does_not_fit(monkeypatch):
    where = space("strict")
    original = where.xp.asarray

    def asarray(obj, **kwargs):
        if getattr(obj, "size", 0) == POINTS.size:
            raise OutOfMemoryError(POINTS.nbytes)
        return original(obj, **kwargs)

    model = tight(100, where=where)
    monkeypatch.setattr(where.xp, "asarray", asarray)
    with pytest.raises(MemoryError, match=r"data of shape \(100, 2\) does not fit .* pass a callable"):
        td.train(model, PROCESS, POINTS, batch_size=4, **SETTINGS)


# Sampling


@pytest.mark.parametrize("name", ["numpy", "strict"])
@pytest.mark.parametrize("sampler", td.samplers.SAMPLERS)
def test_sampling_names_a_batch_that_fits(name, sampler):
    where = space(name)

    def denoise(x, t, room=6):
        if x.shape[0] > room:
            raise OutOfMemoryError(4)
        return 0.5 * x

    how = dict(sampler=sampler, steps=3, progress=False)
    x_T = where.array(np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32))
    for start in (x_T, None):
        with pytest.raises(
            MemoryError, match=r"^a step of batch_size=40 .*; a step of 5 fits, so try batch_size=5\.$"
        ):
            td.sample(
                denoise, PROCESS, (50, 2), rng=np.random.default_rng(0), x_T=start, batch_size=40, **how
            )
    td.sample(denoise, PROCESS, (50, 2), rng=np.random.default_rng(0), x_T=x_T, batch_size=5, **how)
    with pytest.raises(MemoryError, match="not even one of 1 fits"):
        none = functools.partial(denoise, room=0)
        td.sample(none, PROCESS, (50, 2), rng=np.random.default_rng(0), x_T=x_T, **how)


# Finding a batch size


@pytest.mark.parametrize("error", [OutOfMemoryError, CUDARuntimeError])
@pytest.mark.parametrize(
    ("room", "most", "found"), [(100, 1024, 64), (80, 1024, 64), (79, 1024, 32), (100, 48, 32), (1, 8, 1)]
)
def test_on_a_device_the_batch_is_doubled_until_it_does_not_fit(room, most, found, error):
    model = tight(room, error, where=space("strict"))
    before = weights_of(model)
    assert td.find_batch_size(model, PROCESS, POINTS, most=most) == found
    assert model.shown[:4] == [1, 2, 5, 10][: len(model.shown)]
    assert max(model.shown) <= 2.5 * found
    assert all(p._grad is None for p in model.named_parameters().values())
    assert_same_weights(model, before)


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_most_is_a_count(most):
    with pytest.raises(ValueError, match="most is"):
        td.find_batch_size(tight(1), PROCESS, POINTS, most=most)


def test_not_even_one_fits():
    with pytest.raises(MemoryError, match="not even a batch of 1 fits"):
        td.find_batch_size(tight(0, where=space("strict")), PROCESS, POINTS)


def test_data_may_be_drawn():
    model = tight(5, where=space("strict"))
    assert td.find_batch_size(model, PROCESS, lambda n, rng: POINTS[:n]) == 4


@pytest.mark.parametrize(
    ("free", "found"), [(2 * 1000, 1), (2 * 1499, 1), (2 * 1500, 2), (2 * 4400, 4), (10**9, 64)]
)
def test_on_the_host_a_line_is_followed_up_to_half_of_what_is_free(monkeypatch, free, found):
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setattr(memory, "_peak", lambda step, n: 500 + 500 * n)
    shown = []
    assert memory.largest_batch(shown.append, np.zeros(1), 100) == found
    assert set(shown) <= {1, 2}  # nothing larger is tried


def test_on_the_host_no_half_is_tried_that_takes_more_than_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 4400)
    monkeypatch.setattr(memory, "_peak", lambda step, n: 500 + 500 * n)
    shown = []
    said = memory.what_fits(shown.append, np.zeros(1), 40, "no room")
    assert said.endswith("a step of 5 fits, so try batch_size=5.") and max(shown) == 5


def test_what_is_made_once_and_kept_is_not_the_steps(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 10**6)
    kept = []

    def step(n):
        if not kept:
            kept.append(np.zeros(10**6))
        np.zeros(1000 * n)

    assert memory.largest_batch(step, np.zeros(1), 100) == 64


def test_what_others_hold_and_have_held_is_not_the_steps():
    tracemalloc.start()
    try:
        held = np.zeros(10**5)
        np.zeros(10**6)
        assert 8000 <= memory._peak(np.zeros, 1000) < held.nbytes / 10
    finally:
        tracemalloc.stop()


def test_a_device_lets_go_after_every_trial(monkeypatch):
    events = []

    def step(n):
        events.append(n)
        if n > 4:
            raise MemoryError

    monkeypatch.setattr(memory, "let_go", lambda like: events.append("let go"))
    assert memory.largest_batch(step, strict.zeros(1), 100) == 2
    assert events == [1, "let go", 2, "let go", 5, "let go"]


def test_what_training_keeps_is_set_aside_meanwhile(monkeypatch):
    """Adam's two moments, the moving average, and the weights to go back to."""
    model, held = td.MLP(hidden=256), []

    def largest_batch(step, like, most):
        held.append(tracemalloc.get_traced_memory()[0] - before)
        return 1

    monkeypatch.setattr(training, "largest_batch", largest_batch)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        td.find_batch_size(model, PROCESS, POINTS)
    finally:
        tracemalloc.stop()
    assert 4 <= held[0] / (4 * model.num_parameters()) < 4.1


@pytest.mark.parametrize(
    "how", [dict(loss="simple"), dict(loss="hybrid"), dict(loss="vlb"), dict(loss="vlb", decoder="8bit")]
)
def test_every_loss_can_be_tried(how):
    """With T = 1, so that L_0 is among the terms: what is tried has to be 8-bit data."""
    diffusion = td.GaussianDiffusion(td.linear_schedule(1), "v", "learned_range")
    model = td.MLP(out_features=4, hidden=4, blocks=1, time_features=4)
    assert td.find_batch_size(model, diffusion, POINTS, most=2, **how) == 2


def test_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    monkeypatch.setattr(memory, "_peak", lambda step, n: n * 2**29)
    assert memory.largest_batch(lambda n: None, np.zeros(1), 100) == 2


@pytest.mark.parametrize("before", [2, 1, 8])
def test_the_line_predicts_what_a_step_takes(before):
    """Of a U-Net: the memory of 8 samples from that of 1 and 2, never too little and not twice too much.

    However much scratch the kernels have from steps before.
    """
    model = td.UNet(block_channels=(8, 8), attention=(False, True), norm_groups=4)

    def step(n):
        x0 = np.zeros((n, 16, 16, 1), np.float32)
        td.training_loss(model, PROCESS, x0, np.random.default_rng(0))[1]()
        model.zero_grad()

    step(before)
    one, two, eight = (memory._peak(step, n) for n in (1, 2, 8))
    predicted = one + 7 * (two - one)
    assert 0.95 * eight <= predicted <= 2 * eight
    assert eight > 8 * 16 * 16 * 8 * 4 * 10  # at least ten of the activations at full resolution


def test_measuring_leaves_a_trace_of_others_on():
    tracemalloc.start()
    try:
        assert memory._peak(lambda n: np.zeros(n * 10**6), 1) >= 8 * 10**6
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    memory._peak(lambda n: None, 1)
    assert not tracemalloc.is_tracing()


# What there is


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "0", 2048 * 1024), ("1000000", "250000", 750000), ("10", "20", 0), (None, None, 2048 * 1024)],
)
def test_available_memory_is_the_least_of_system_and_group(tmp_path, limit, used, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable:    2048 kB\n")
    if limit is not None:
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(used + "\n")
    assert memory.available_memory(tmp_path) == expected


def test_available_memory_here():
    free = memory.available_memory()
    assert free is None or free >= 0


def test_letting_go_asks_cupys_pools(monkeypatch):
    called = []
    pool = lambda name: types.SimpleNamespace(free_all_blocks=lambda: called.append(name))  # noqa: E731
    cupy = types.ModuleType("cupy")
    cupy.ndarray = cupy.generic = type("of CuPy's", (), {})
    cupy.get_default_memory_pool = lambda: pool("device")
    cupy.get_default_pinned_memory_pool = lambda: pool("pinned")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    memory.let_go(np.zeros(1))
    assert called == []
    monkeypatch.setattr(memory, "is_cupy_array", lambda x: True)
    memory.let_go(np.zeros(1))
    assert called == ["device", "pinned"]
