"""Steps recorded on a GPU, and the same steps taken launch by launch: the same numbers.

Not yet run on one. Under an emulated CUDA, whose recordings are lists of launches, they are the same bits.
"""

import numpy as np
import pytest
from namespaces import space
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
from tinydiff import _graph, kernels
from tinydiff.backend import BackendError, to_numpy

pytestmark = pytest.mark.gpu

PROCESS = td.GaussianDiffusion(td.cosine_schedule(20), "v")


@pytest.fixture
def cupy(monkeypatch):
    space("cupy")  # or the test is skipped, with the reason
    monkeypatch.setattr(kernels, "_on_gpu", None)
    kernels.use_on_gpu("cupy")
    return pytest.importorskip("cupy")


def shaken(model):
    rng = np.random.default_rng(1)
    for p in model.named_parameters().values():  # no zeros
        p.value = p.value + 0.1 * rng.standard_normal(p.shape).astype(np.float32)
    return model


def unet():
    return shaken(td.UNet(block_channels=(8, 16), attention=(False, True), norm_groups=4))


NETWORKS = {"unet": (unet, (8, 8, 1)), "mlp": (lambda: shaken(td.MLP(2, hidden=16, blocks=2)), (2,))}
networks = pytest.mark.parametrize("name", NETWORKS)


def on_gpu(model):
    return model.to(td.get_backend("cupy"))


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
        result = td.train(model, PROCESS, data, **how, weight_decay=0.01, graph=graph)
        results.append((result.losses, model.state_dict(), result.model.state_dict()))
    (losses, weights, averages), (losses_r, weights_r, averages_r) = results
    assert_allclose(losses_r, losses, rtol=1e-5)
    assert len(set(losses)) == len(losses)
    for plain, recorded in ((weights, weights_r), (averages, averages_r)):
        for key in plain:
            if key.endswith(
                "to_k.bias"
            ):  # softmax does not feel it: its gradient is rounding, which Adam scales up
                continue
            assert_allclose(recorded[key], plain[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_a_recorded_training_ends_where_its_loss_is_not_finite(cupy):
    model = on_gpu(td.MLP(2, hidden=8))
    calls = iter(range(100))
    points = np.ones((4, 2), np.float32)
    with pytest.raises(FloatingPointError, match=r"at step 7 .*after 5 steps"):
        data = lambda n, rng: points * np.float32(1e30 if next(calls) == 7 else 1)  # noqa: E731
        td.train(model, PROCESS, data, steps=12, batch_size=4, log_every=5, graph=True, progress=False)
    assert all(np.isfinite(weight).all() for weight in model.state_dict().values())


@networks
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++"])
def test_a_recorded_sampling_is_the_sampling(cupy, monkeypatch, name, sampler):
    """Also when the weights change in place, and when others take their place."""
    make, shape = NETWORKS[name]
    model = on_gpu(make())

    def sampled(recorded):
        monkeypatch.setenv("TINYDIFF_RECORD", recorded)
        how = dict(sampler=sampler, steps=6, rng=np.random.default_rng(0), progress=False, batch_size=3)
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
        assert len(_graph._recorded[model][1]) == 2  # a batch of 3, and the last one of 2
        seen.append(plain)
        change(in_place)
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])


def test_what_a_replay_returns_is_not_written_over(cupy):
    model = on_gpu(unet())
    predict = _graph.predictor(model, True)
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
    predict = _graph.predictor(model, True)
    expected = [predict(x, t).get() for _ in range(4)]
    beside = [cupy.full(2**k, cupy.nan, cupy.float32) for k in range(20) for _ in range(4)]
    ones = [cupy.ones(2**k, cupy.float32) for k in range(16) for _ in range(4)]
    assert_array_equal(predict(x, t).get(), expected[-1])
    assert all(bool((a == 1).all()) for a in ones) and all(bool(cupy.isnan(a).all()) for a in beside)


def test_the_definitions_are_not_recorded(cupy):
    kernels.use_on_gpu("portable")
    with pytest.raises(BackendError, match="TINYDIFF_CUPY_KERNELS=cupy"):
        _graph.predictor(on_gpu(unet()), True)
    assert _graph.is_wanted(np.zeros(1), True) is False
