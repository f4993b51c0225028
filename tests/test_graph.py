"""Steps recorded on a GPU, and the same steps taken launch by launch: the same numbers.

When they are recorded is asked without one, too.
"""

import copy
import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from namespaces import space
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
from tinydiff import _graph, kernels, training
from tinydiff.backend import BackendError, to_numpy

PROCESS = td.GaussianDiffusion(td.cosine_schedule(20), "v")


@pytest.fixture(params=[pytest.param("cupy", marks=pytest.mark.gpu)])
def cupy(monkeypatch):
    space("cupy")  # or the test is skipped, with the reason
    monkeypatch.setattr(kernels, "_on_gpu", None)
    monkeypatch.delenv("TINYDIFF_RECORD", raising=False)
    kernels.use_on_gpu("cupy")
    return pytest.importorskip("cupy")


def shaken(model):
    rng = np.random.default_rng(1)
    for p in model.named_parameters().values():  # no zeros
        p.value = p.value + 0.1 * rng.standard_normal(p.shape).astype(np.float32)
    return model


def unet():
    return shaken(td.UNet(block_channels=(8, 16), attention=(False, True), norm_groups=4))


NETWORKS = {
    "unet": (unet, (4, 4, 1)),
    "mlp": (lambda: shaken(td.MLP(2, hidden=16, blocks=2)), (2,)),
    "mlp, classes": (lambda: shaken(td.MLP(2, hidden=16, blocks=2, num_classes=3)), (2,)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def told(model, n):
    """Labels for n samples, as an option, where the network has classes."""
    return {"labels": np.arange(n) % 3} if "num_classes" in model.config else {}


def on_gpu(model):
    return model.to(td.get_backend("cupy"))


class Own(td.MLP):
    """A class of somebody else's, which may look at its numbers."""


# When


@pytest.fixture
def there(monkeypatch):
    """Every array is on a GPU, whose kernels can be recorded."""
    monkeypatch.delenv("TINYDIFF_RECORD", raising=False)
    monkeypatch.setattr(_graph, "is_cupy_array", lambda x: True)
    module = SimpleNamespace(end_to_end=None)
    monkeypatch.setattr(kernels, "kernels_for", lambda x: module)
    return module


@pytest.mark.parametrize(
    ("variable", "asked", "of_ours", "of_others"),
    [
        ("", None, True, False),
        ("0", None, False, False),
        ("1", None, True, True),
        ("", True, True, True),
        ("0", True, True, True),
        ("", False, False, False),
        ("1", False, False, False),
    ],
)
def test_what_is_recorded(there, monkeypatch, variable, asked, of_ours, of_others):
    monkeypatch.setenv("TINYDIFF_RECORD", variable)
    assert _graph.is_wanted(td.MLP(hidden=8), asked) is of_ours
    assert _graph.is_wanted(unet(), asked) is of_ours
    assert _graph.is_wanted(Own(hidden=8), asked) is of_others
    del there.end_to_end  # the definitions
    assert _graph.is_wanted(td.MLP(hidden=8), None if asked is None and not variable else False) is False
    if of_others:
        with pytest.raises(BackendError, match="TINYDIFF_CUPY_KERNELS=cupy"):
            _graph.is_wanted(td.MLP(hidden=8), asked)


def test_a_class_says_for_itself_that_it_may_be_recorded(there):
    class Says(Own):
        recordable = True

    class Inherits(Says):
        pass

    assert _graph.is_wanted(Says(hidden=8)) is True
    assert _graph.is_wanted(Inherits(hidden=8)) is False
    assert _graph.is_wanted(td.nn.Module(), True) is False  # it has no weights


def test_a_layer_of_somebody_else_is_not_recorded_unasked(there):
    """It may look at its numbers: at how much an adapter counts, say, which changes between two walks."""
    model = td.MLP(hidden=8)
    model.blocks[0].linear_2 = type("Scaled", (td.nn.Linear,), {})(8, 8, np.random.default_rng(0))
    assert _graph.is_wanted(model) is False
    assert _graph.is_wanted(model, True) is True


@pytest.mark.parametrize("asked", [None, True, False])
def test_nothing_is_recorded_in_numpy(asked):
    model = td.MLP(hidden=8)
    assert _graph.is_wanted(model, asked) is False
    assert _graph.predictor(model, asked) == model.predict


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("TINYDIFF_RECORD", "no")
    with pytest.raises(BackendError, match="TINYDIFF_RECORD is 'no': set it to '0' or '1'"):
        _graph.is_wanted(td.MLP(hidden=8))
    assert _graph.is_wanted(td.MLP(hidden=8), True) is False


@pytest.mark.parametrize(
    ("how", "recorded"),
    [
        ({}, True),
        ({"graph": False}, False),
        ({"min_snr_gamma": 5.0}, False),
        ({"min_snr_gamma": 5.0, "graph": True}, False),
        ({"loss": "vlb"}, False),
    ],
)
def test_which_training_is_recorded(monkeypatch, how, recorded):
    """The loss as it comes, without weights, and a network without dropout."""
    seen = []

    class Noted(_graph.RecordedLoss):
        def __call__(self, model, x0, rng):
            seen.append(x0.shape)
            return td.training_loss(model, self._diffusion, x0, rng)

    monkeypatch.setattr(training, "RecordedLoss", Noted)
    monkeypatch.setattr(training, "is_wanted", lambda model, asked: asked is not False)
    points, images = np.zeros((4, 2), np.float32), np.zeros((4, 4, 4, 1), np.float32)
    steps = dict(steps=2, batch_size=2, progress=False, workers=1)
    td.train(td.MLP(hidden=8), PROCESS, points, **steps, **how)
    assert bool(seen) is recorded
    seen.clear()
    drops = td.UNet(block_channels=(4,), attention=(False,), norm_groups=2, head_dim=4, dropout=0.1)
    td.train(drops, PROCESS, images, **steps, **how)
    assert not seen


# What comes out


@networks
@pytest.mark.parametrize("clip_norm", [1.0, np.inf])
def test_a_recorded_training_is_the_training(cupy, name, clip_norm):
    """Losses, weights, averages; learning rate and average's rate change from step to step."""
    make, shape = NETWORKS[name]
    data = np.random.default_rng(2).standard_normal((10, *shape)).astype(np.float32)
    how = dict(steps=9, batch_size=4, lr=1e-2, warmup=3, log_every=4, clip_norm=clip_norm, progress=False)
    results = []
    for graph in (False, True):
        model = on_gpu(make())
        result = td.train(model, PROCESS, data, **how, **told(model, 10), weight_decay=0.01, graph=graph)
        results.append((result.losses, model.state_dict(), result.model.state_dict()))
    (losses, weights, averages), (losses_r, weights_r, averages_r) = results
    assert_allclose(losses_r, losses, rtol=1e-5)
    assert len(set(losses)) == len(losses)
    for plain, recorded in ((weights, weights_r), (averages, averages_r)):
        for key in plain:
            if key.endswith("to_k.bias"):  # no softmax feels it: its gradient is rounding, which Adam scales
                continue
            assert_allclose(recorded[key], plain[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_a_recorded_training_ends_where_its_loss_is_not_finite(cupy):
    model = on_gpu(td.MLP(2, hidden=8))
    calls = iter(range(100))
    points = np.ones((4, 2), np.float32)
    with pytest.raises(FloatingPointError, match=r"at step 7 .*after 5 steps"):
        data = lambda n, rng: points * np.float32(1e30 if next(calls) == 7 else 1)  # noqa: E731
        td.train(model, PROCESS, data, steps=12, batch_size=4, log_every=5, progress=False)
    assert all(np.isfinite(weight).all() for weight in model.state_dict().values())


def test_a_recorded_loss_follows_the_batch_and_the_weights(cupy):
    """Another shape, and weights in other arrays, of which a recording knows nothing."""
    model, recorded = on_gpu(shaken(td.MLP(hidden=8))), _graph.RecordedLoss(PROCESS)

    def of(loss, n):
        value, backward = loss(model, cupy.full((n, 2), 0.5, cupy.float32), np.random.default_rng(n))
        backward()
        gradients = [p.grad.get() for p in model.named_parameters().values()]
        model.zero_grad()
        return [float(value), *gradients]

    for n, change in [(4, False), (3, False), (3, True), (4, True)]:
        if change:
            for p in model.named_parameters().values():
                p.value = p.value * 1.5
        for _ in range(_graph.WARM_UP + 2):
            expected = of(lambda *given: td.training_loss(given[0], PROCESS, *given[1:]), n)
            for found, wanted in zip(of(recorded, n), expected):
                assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
        assert isinstance(recorded._replayed.replay, _graph.Recording)


def test_a_recorded_loss_leaves_the_data_as_it_is(cupy):
    """Of a network that predicts them, the target is the data itself."""
    model = on_gpu(shaken(td.MLP(hidden=8)))
    process, rng = td.GaussianDiffusion(td.cosine_schedule(20), "x0"), np.random.default_rng(0)
    recorded = _graph.RecordedLoss(process)
    batches = [cupy.full((4, 2), i, cupy.float32) for i in range(4)]
    for x0 in batches:
        recorded(model, x0, rng)
    assert [set(x0.get().ravel()) for x0 in batches] == [{0}, {1}, {2}, {3}]


@networks
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++"])
def test_a_recorded_sampling_is_the_sampling(cupy, monkeypatch, name, sampler):
    """Also when the weights change in place, and when others take their place."""
    make, shape = NETWORKS[name]
    model = on_gpu(make())

    def sampled(recorded):
        monkeypatch.setenv("TINYDIFF_RECORD", recorded)
        how = dict(sampler=sampler, steps=5, rng=np.random.default_rng(0), progress=False, batch_size=3)
        how |= {**labels, "guidance_scale": 2.0} if (labels := told(model, 5)) else {}
        return to_numpy(td.sample(model, PROCESS, (5, *shape), **how))

    def change(in_place):
        for p in model.named_parameters().values():
            if in_place:
                p.value *= 1.25
            else:
                p.value = p.value * 0.75

    seen = []
    for in_place in (True, False, True):
        plain = sampled("0")
        assert_allclose(sampled("1"), plain, rtol=1e-4, atol=1e-5)
        assert_allclose(sampled("1"), plain, rtol=1e-4, atol=1e-5)  # of the recording that was kept
        assert len(_graph._recorded[model]._by_shape) == 2  # a batch of 3, and the last one of 2
        seen.append(plain)
        change(in_place)
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])


def test_what_a_replay_returns_is_not_written_over(cupy):
    model = on_gpu(unet())
    predict = _graph.predictor(model)
    xs = [
        cupy.asarray(np.random.default_rng(i).standard_normal((2, 8, 8, 1)), cupy.float32) for i in range(5)
    ]
    ys = [predict(x, np.array([1, 5])) for x in xs]
    for x, y in zip(xs, ys):
        assert_allclose(y.get(), model.predict(x, np.array([1, 5])).get(), rtol=1e-5, atol=1e-6)


def test_memory_of_a_recording_is_its_own(cupy):
    """What is made beside it between replays does not change what it computes, nor the other way."""
    model = on_gpu(unet())
    x, t = cupy.ones((2, 8, 8, 1), cupy.float32), np.array([1, 5])
    predict = _graph.predictor(model)
    expected = [predict(x, t).get() for _ in range(4)]
    beside = [cupy.full(2**k, cupy.nan, cupy.float32) for k in range(20) for _ in range(4)]
    ones = [cupy.ones(2**k, cupy.float32) for k in range(16) for _ in range(4)]
    cupy.get_default_memory_pool().free_all_blocks()
    assert_array_equal(predict(x, t).get(), expected[-1])
    assert all(bool((a == 1).all()) for a in ones) and all(bool(cupy.isnan(a).all()) for a in beside)


def recordings(model):
    """By batch, whether its predictions are recorded; the one asked for last comes last."""
    by_shape = _graph._recorded[model]._by_shape
    return {key[1]: isinstance(replayed.replay, _graph.Recording) for key, (_, replayed) in by_shape.items()}


def test_the_last_two_shapes_are_kept(cupy):
    model = on_gpu(td.MLP(hidden=8))
    predict = _graph.predictor(model)

    def ask(n, times):
        for _ in range(times):
            predict(cupy.ones((n, 2), cupy.float32), np.zeros(n, np.int64))

    ask(4, 3)
    ask(3, 2)
    assert recordings(model) == {4: True, 3: False}
    ask(4, 1)
    ask(2, 3)
    assert recordings(model) == {4: True, 2: True}
    _graph.forget(object())  # what is sampled may be anything that can be called
    assert model in _graph._recorded
    _graph.forget(model)
    assert model not in _graph._recorded


def test_where_memory_is_short_one_shape_gives_way_to_another(cupy, monkeypatch):
    model = on_gpu(shaken(td.MLP(hidden=8)))
    predict = _graph.predictor(model)
    x, more = cupy.ones((3, 2), cupy.float32), cupy.ones((4, 2), cupy.float32)
    expected = [predict(x, np.ones(3, np.int64)).get() for _ in range(3)][-1]
    make = _graph.Recording.__init__

    def short(self, work):
        monkeypatch.setattr(_graph.Recording, "__init__", make)
        raise MemoryError

    monkeypatch.setattr(_graph.Recording, "__init__", short)
    ys = [predict(more, np.ones(4, np.int64)).get() for _ in range(4)]
    assert recordings(model) == {4: True}
    for y in ys:
        assert_allclose(y[:3], expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(_graph.Recording, "__init__", short)
    predict(x, np.ones(3, np.int64))
    _graph.forget(model)
    for _ in range(2):
        predict(x, np.ones(3, np.int64))
    with pytest.raises(MemoryError):  # there is none to give way
        predict(x, np.ones(3, np.int64))


def test_what_is_recorded_stays_where_the_network_fails_for_another_reason(cupy):
    asked = []

    class Fails(td.MLP):
        def predict(self, x, t):
            asked.append(len(x))
            if len(x) == 3:
                raise ValueError("three")
            return super().predict(x, t)

    model = on_gpu(Fails(hidden=8))
    predict = _graph.predictor(model, True)
    for _ in range(_graph.WARM_UP + 1):
        predict(cupy.ones((4, 2), cupy.float32), np.ones(4, np.int64))
    with pytest.raises(ValueError, match="three"):
        predict(cupy.ones((3, 2), cupy.float32), np.ones(3, np.int64))
    assert recordings(model) == {4: True, 3: False} and asked.count(3) == 1


def test_a_copy_of_a_model_is_not_what_was_recorded(cupy):
    model = on_gpu(shaken(td.MLP(hidden=8)))
    x, t = cupy.ones((2, 2), cupy.float32), np.array([1, 5])
    y = [_graph.predictor(model)(x, t) for _ in range(4)][-1]
    twin = copy.deepcopy(model)
    assert twin not in _graph._recorded
    for p in model.named_parameters().values():
        p.value *= 2
    assert_allclose(_graph.predictor(twin)(x, t).get(), y.get(), rtol=1e-6)


def test_what_does_not_fit_is_refused_as_ever(cupy):
    model = on_gpu(td.MLP(hidden=8))
    x, t = cupy.ones((2, 2), cupy.float32), np.array([1, 5])
    for _ in range(5):
        for wrong in (x.get(), x.astype(cupy.float64)):
            with pytest.raises(ValueError, match=r"x has|x is"):
                _graph.predictor(model)(wrong, t)
        with pytest.raises(ValueError, match="t has shape"):
            _graph.predictor(model)(x, t[:1])
        _graph.predictor(model)(x, t)
    assert recordings(model) == {2: True}


def test_a_thread_of_another_gpu_is_not_given_a_replay(cupy, monkeypatch):
    """It would launch there, in no order with what is on the model's own: the model is asked, and refuses."""
    model = on_gpu(td.MLP(hidden=8))
    x, t = cupy.ones((2, 2), cupy.float32), np.array([1, 5])
    for _ in range(_graph.WARM_UP + 1):
        _graph.predictor(model)(x, t)
    assert recordings(model) == {2: True}
    asked = []
    monkeypatch.setattr(model, "predict", lambda x, t: asked.append(x))
    _graph.predictor(model)(x, t)
    assert asked == []
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    _graph.predictor(model)(x, t)
    assert len(asked) == 1 and asked[0] is x


@pytest.mark.parametrize("stream", [dict(non_blocking=True), dict(ptds=True)], ids=["new", "of each thread"])
def test_threads_and_streams_may_share_a_model(cupy, stream):
    model = on_gpu(shaken(td.MLP(hidden=8)))
    xs = [cupy.full((3, 2), i, cupy.float32) for i in range(4)]
    t = np.array([1, 5, 7])
    expected = [model.predict(x, t).get() for x in xs]
    cupy.cuda.get_current_stream().synchronize()
    found = {}

    def ask(i):
        with cupy.cuda.Stream(**stream):
            found[i] = [_graph.predictor(model)(xs[i], t).get() for _ in range(6)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ys in found.items():
        for y in ys:
            assert_allclose(y, expected[i], rtol=1e-5, atol=1e-6)
    assert len(found) == len(xs)


def test_one_stream_after_another(cupy):
    """What the first has not done yet is waited for by the second; the host waits for none of them."""
    model = on_gpu(shaken(td.MLP(hidden=8)))
    xs = [cupy.full((3, 2), i, cupy.float32) for i in range(8)]
    t = np.array([1, 5, 7])
    expected = [model.predict(x, t).get() for x in xs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    predict, found = _graph.predictor(model), []
    for x, stream in zip(xs, [*streams, *streams[:1] * 3, *streams[1:], *streams]):
        with stream:
            found.append(predict(x, t))
    for stream in streams[::-1]:
        stream.synchronize()
    for y, right in zip(found, expected):
        assert_allclose(y.get(), right, rtol=1e-5, atol=1e-6)


def test_a_recording_that_is_let_go_has_been_done(cupy):
    """On the stream that ran it last: its memory may be somebody else's at once."""
    x, y = cupy.ones(1000, cupy.float32), cupy.zeros(1000, cupy.float32)

    def work():
        y[...] = (x + 1) * (x + 2)

    work()
    for k in range(1, 4):
        recording = _graph.Recording(work)
        recording()
        x[...] = k
        cupy.cuda.Device().synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            recording()
        del recording
        beside = [cupy.zeros(1000, cupy.float32) for _ in range(4)]
        stream.synchronize()
        assert (y.get() == (k + 1) * (k + 2)).all() and not any(each.get().any() for each in beside)


def test_a_recording_runs_on_another_stream_than_it_was_made_on(cupy):
    """What was sent for it is there by then: the addresses of arrays that are laid end to end, say."""
    from tinydiff.kernels._cupy_flat import end_to_end

    x, more, y = cupy.ones(3, cupy.float32), cupy.full(5, 2, cupy.float32), cupy.zeros(8, cupy.float32)

    def work():
        y[...] = end_to_end([x, more])

    work()
    y[...] = 0
    cupy.cuda.Device().synchronize()
    one, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        recording = _graph.Recording(work)
    with other:
        recording()
        assert_array_equal(y.get(), [1, 1, 1, 2, 2, 2, 2, 2])


@networks
def test_training_and_sampling_on_another_stream(cupy, name):
    """All that they ask for is asked of the current stream, or else waited for."""
    make, shape = NETWORKS[name]
    data = np.random.default_rng(2).standard_normal((10, *shape)).astype(np.float32)

    def run():
        model = on_gpu(make())
        result = td.train(model, PROCESS, data, steps=5, batch_size=4, log_every=2, progress=False)
        rng = np.random.default_rng(0)
        drawn = td.sample(result.model, PROCESS, (3, *shape), "ddim", 5, rng=rng, progress=False)
        return to_numpy(drawn), result.losses

    expected, losses = run()
    with cupy.cuda.Stream(non_blocking=True):
        found, theirs = run()
    assert_allclose(theirs, losses, rtol=1e-5)
    assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_stream_that_every_thread_calls_the_same_is_waited_for(cupy):
    """CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1: by its name nobody can tell, nor wait for, another thread's."""
    model = on_gpu(shaken(td.MLP(hidden=8)))
    x, t, waited = cupy.ones((3, 2), cupy.float32), np.array([1, 5, 7]), []

    class Noting(cupy.cuda.Stream):
        def synchronize(self):
            waited.append(self.ptr)
            super().synchronize()

    for stream, often in [(Noting(non_blocking=True), 0), (Noting(ptds=True), 5)]:
        with stream:
            for _ in range(_graph.WARM_UP + 1):
                _graph.predictor(model)(x, t)
            waited.clear()
            for _ in range(5):
                _graph.predictor(model)(x, t)
        assert waited == [stream.ptr] * often
        _graph.forget(model)


def test_somebody_elses_class_is_recorded_only_where_that_is_asked_for(cupy, monkeypatch):
    points = np.random.default_rng(2).standard_normal((10, 2)).astype(np.float32)
    made = []

    def noting(self, work, make=_graph.Recording.__init__):
        made.append(work)
        make(self, work)

    monkeypatch.setattr(_graph.Recording, "__init__", noting)
    for make, graph, expected in [(Own, None, 0), (Own, True, 1), (td.MLP, None, 1), (td.MLP, False, 0)]:
        made.clear()
        model = on_gpu(make(hidden=8))
        td.train(model, PROCESS, points, steps=6, batch_size=4, graph=graph, progress=False)
        assert len(made) == expected


def test_what_is_recorded_of_a_model_is_let_go_when_it_is_trained(cupy):
    model = on_gpu(td.MLP(hidden=8))
    points = np.ones((4, 2), np.float32)
    td.sample(model, PROCESS, (3, 2), rng=np.random.default_rng(0), progress=False)
    assert recordings(model) == {3: True}
    td.train(model, PROCESS, points, steps=2, batch_size=4, progress=False)
    assert model not in _graph._recorded


def test_a_thread_that_records_has_its_cublas_handle_before(cupy, monkeypatch):
    """Others may have taken the steps before: to make one allocates, and a recording is no place for that."""
    from tinydiff.kernels import _cupy_products

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product cannot be recorded")
    a, b = cupy.ones((2, 3)), cupy.ones((3, 2))
    _cupy_products.product(a, b)
    monkeypatch.setattr(_cupy_products, "_mine", threading.local())
    monkeypatch.setattr(_cupy_products, "_idle", {})
    library, capturing, stream = _cupy_products._library(), [], cupy.cuda.get_current_stream()
    create = library.cublasCreate_v2

    def noting(handle):
        capturing.append(cupy.cuda.get_current_stream() != stream)
        return create(handle)

    monkeypatch.setattr(library, "cublasCreate_v2", noting)
    recorded = _graph.Recording(lambda: _cupy_products.product(a, b))
    assert bool((recorded() == 3).all()) and capturing == [False]


def test_a_recording_keeps_the_workspace_of_its_products(cupy):
    from tinydiff.kernels import _cupy_products

    if _cupy_products._library() is None:
        pytest.skip("CuPy's own product cannot be recorded")
    pool, a, b = cupy.get_default_memory_pool(), cupy.ones((2, 3)), cupy.ones((3, 2))
    gc.collect()
    before = pool.used_bytes()
    recorded = _graph.Recording(lambda: _cupy_products.product(a, b))
    assert pool.used_bytes() - before >= _cupy_products.WORKSPACE
    assert bool((recorded() == 3).all())


@pytest.mark.parametrize("times", [0, 1])
def test_a_recording_is_let_go_on_its_own_device(cupy, monkeypatch, times):
    """By whatever thread: the stream it ran on may have a name that each device has, and so has the pool."""
    entered, ended = [], []

    class Noting(cupy.cuda.Device):
        def __enter__(self):
            entered.append(len(ended))
            return super().__enter__()

    monkeypatch.setattr(cupy.cuda, "Device", Noting)
    a = cupy.ones(3)
    assert bool((a + a == 2).all())  # what is recorded has run before: it is compiled
    recorded = _graph.Recording(lambda: a + a)
    for _ in range(times):
        assert bool((recorded() == 2).all())
    entered.clear()
    pool = recorded._pool
    recorded._pool = SimpleNamespace(free_all_blocks=lambda: ended.append(pool.used_bytes()))
    del recorded
    assert entered == [0] and ended == [0]  # nothing of it is in use by then


def test_a_recording_that_fails_leaves_nothing_behind(cupy):
    """Its memory is given back, its stream's capture has ended, and what was wrong is what is said."""
    pool = cupy.get_default_memory_pool()

    def work():
        a = cupy.ones(2**20, cupy.float32)
        raise ValueError(f"the sum of {a.size} ones")

    gc.collect()
    pool.free_all_blocks()
    before = pool.used_bytes()
    with pytest.raises(ValueError, match="the sum of 1048576 ones"):
        _graph.Recording(work)
    gc.collect()
    assert pool.used_bytes() == before
    assert float(cupy.ones(3).sum()) == 3


def test_a_stream_on_which_a_recording_fails_is_no_longer_captured(cupy, monkeypatch):
    capturing = []

    class Noting(cupy.cuda.Stream):
        def begin_capture(self):
            capturing.append(self)
            super().begin_capture()

        def end_capture(self):
            capturing.remove(self)
            return super().end_capture()

    def work():
        assert capturing
        raise ValueError("on purpose")

    monkeypatch.setattr(cupy.cuda, "Stream", Noting)
    with pytest.raises(ValueError, match="on purpose"):
        _graph.Recording(work)
    assert not capturing


def test_a_recording_takes_its_memory_from_the_pool_and_gives_it_back(cupy):
    """The arrays are larger than what other tests may have left in pieces."""
    pool = cupy.get_default_memory_pool()
    x, y = cupy.ones(2**24, cupy.float32), cupy.empty(2**24, cupy.float32)

    def work():
        y[...] = (x + 1) * (x + 2)

    work()
    gc.collect()
    pool.free_all_blocks()
    before = pool.used_bytes()
    recording = _graph.Recording(work)
    assert 2 * x.nbytes <= pool.used_bytes() - before <= 4 * x.nbytes
    y[...] = 0
    recording()
    assert float(y.sum()) == 6 * x.size
    del recording
    held = pool.total_bytes()
    again = cupy.empty(x.size, cupy.float32)
    assert pool.used_bytes() == before + again.nbytes and pool.total_bytes() == held
    del again
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + x.nbytes)
    try:
        with pytest.raises(MemoryError):
            _graph.Recording(work)
    finally:
        pool.set_limit(size=0)
    gc.collect()
    assert pool.used_bytes() == before
    y[...] = 0
    _graph.Recording(work)()
    assert float(y.sum()) == 6 * x.size


def test_no_memory_stays_behind_a_training_or_a_model(cupy):
    """That of cuBLAS on a recording's stream included."""
    pool, points = cupy.get_default_memory_pool(), np.ones((8, 2), np.float32)

    def once(clip_norm):
        model = on_gpu(td.MLP(hidden=8))
        how = dict(steps=5, batch_size=4, clip_norm=clip_norm, progress=False)
        result = td.train(model, PROCESS, points, **how)
        td.sample(result.model, PROCESS, (3, 2), "ddim", 5, rng=np.random.default_rng(0), progress=False)

    used = []
    for clip_norm in (1.0, 1.0, np.inf, 1.0):
        once(clip_norm)
        gc.collect()
        used.append(pool.used_bytes())
    assert len(set(used[1:])) == 1


def test_the_definitions_are_not_recorded(cupy):
    kernels.use_on_gpu("portable")
    model = on_gpu(unet())
    assert _graph.predictor(model) == model.predict
    with pytest.raises(BackendError, match="TINYDIFF_CUPY_KERNELS=cupy"):
        _graph.predictor(model, True)
    with pytest.raises(BackendError, match="TINYDIFF_CUPY_KERNELS=cupy"):
        td.train(model, PROCESS, np.zeros((2, 8, 8, 1), np.float32), steps=1, batch_size=2, graph=True)


def test_what_other_kernels_recorded_is_not_replayed(cupy):
    """Whoever has the predictor already, in the midst of a sampling, gets what the chosen ones compute."""
    model = on_gpu(shaken(td.MLP(hidden=8)))
    predict, x, t = _graph.predictor(model), cupy.ones((2, 2), cupy.float32), np.array([1, 5])
    expected = [predict(x, t).get() for _ in range(_graph.WARM_UP + 1)][-1]
    assert recordings(model) == {2: True}
    kernels.use_on_gpu("portable")
    assert_allclose(predict(x, t).get(), expected, rtol=1e-5, atol=1e-6)
    assert recordings(model) == {2: False}


def test_what_cannot_be_recorded_runs_as_it_is(cupy):
    """With a warning: here the work waits for the device, which a recording may not."""
    ones = cupy.ones(3)

    def work():
        return cupy.asarray(float(ones.sum()))

    replayed = _graph.Replayed(work)
    for _ in range(_graph.WARM_UP):
        assert replayed() == 3
    with pytest.warns(RuntimeWarning, match="Steps are not recorded on this GPU, but run one by one: "):
        assert replayed() == 3
    ones[...] = 2
    assert replayed() == 6
