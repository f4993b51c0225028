"""A batch shared among processes is the batch: the same output and gradients, and nothing left behind."""

import contextlib
import copy
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradients import normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import kernels, parallel
from tinydiff.kernels import _threads, kernels_for
from tinydiff.nn.module import inference
from tinydiff.parallel import DataParallel, WorkerError, shared_out

pytestmark = pytest.mark.skipif(not parallel._can_fork(), reason="needs a system that forks")


@pytest.fixture(scope="module", autouse=True)
def blas_threads():
    """As many as BLAS finds."""


def unet(dropout=0.0, dtype=np.float64, seed=0, **more):
    rng = np.random.default_rng(seed)
    size = dict(block_channels=(8, 16), attention=(False, True), norm_groups=4)
    model = td.UNet(**size, dropout=dropout, rng=rng, **more)
    randomise(model, rng)
    model.to(np, dtype)
    model.load_state_dict(model.state_dict())  # copies that may be stepped in place
    return model


def batch(n, rng, dtype=np.float64):
    return normal(rng, (n, 6, 6, 1), dtype), rng.integers(1000, size=n)


def gradients(model):
    return {name: p.grad.copy() for name, p in model.named_parameters().items()}


def assert_close(actual, expected, what, tolerance=1e-11):
    error = np.linalg.norm(actual - expected)
    assert error <= tolerance * max(np.linalg.norm(expected), 1e-30), f"{what} is off by {error:.1e}"


def assert_gradients(model, expected):
    """To the rounding of the largest: a bias of the keys has none at all (docs: B.14)."""
    scale = max(np.linalg.norm(grad) for grad in expected.values())
    for name, grad in gradients(model).items():
        error = np.linalg.norm(grad - expected[name])
        assert error <= 1e-11 * scale, f"the gradient of {name} is off by {error:.1e}"


@settings(deadline=None, max_examples=12)
@given(n=st.integers(1, 9), workers=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), told=st.booleans())
def test_output_and_gradients_are_the_models_own(n, workers, seed, told):
    """docs: A.20.  More workers than samples, and shares of different sizes, among them."""
    rng = np.random.default_rng(seed)
    model = unet(seed=seed, num_classes=2)
    x, t = batch(n, rng)
    labels = {"labels": rng.integers(0, 3, n)} if told else {}
    y, backward = model(x, t, **labels)
    dy = normal(rng, y.shape, y.dtype)
    dx = backward(dy)
    expected = gradients(model)
    model.zero_grad()
    with DataParallel(model, workers) as shared:
        assert_close(shared.predict(x, t, **labels), y, "the prediction")
        with inference():
            assert_close(shared(x, t, **labels)[0], y, "the output in inference")
        y_shared, backward = shared(x, t, **labels)
        dx_shared = backward(dy)
    assert_close(y_shared, y, "y")
    assert_close(dx_shared, dx, "dx")
    assert_gradients(model, expected)


def test_points_are_shared_as_images_are():
    rng = np.random.default_rng(0)
    model = td.MLP(in_features=3, hidden=8, blocks=2, time_features=6, rng=rng)
    randomise(model, rng)
    model.to(np, np.float64)
    x, t = normal(rng, (7, 3), np.float64), rng.integers(1000, size=7)
    y, backward = model(x, t)
    dy = normal(rng, y.shape, y.dtype)
    dx = backward(dy)
    expected = gradients(model)
    with DataParallel(model, 3) as shared:
        for _ in range(2):  # the second time beside gradients that the workers have had
            model.zero_grad()
            y_shared, backward = shared(x, t, rng)
            assert_close(y_shared, y, "y")
            assert_close(backward(dy), dx, "dx")
            assert_gradients(model, expected)


class Told(td.nn.Module):
    """A network that says of each sample which process it was in, and how many calls that still keeps."""

    def __init__(self):
        self.weight, self.calls = td.nn.Parameter(np.zeros(1, np.float32)), weakref.WeakSet()

    def __call__(self, x, t, rng=None):
        def backward(dy):
            return dy

        self.calls.add(backward)
        return np.stack([np.full(len(x), os.getpid()), np.full(len(x), len(self.calls))], axis=1), backward


@pytest.mark.parametrize(("n", "workers"), [(7, 3), (8, 2), (2, 3), (1, 2)])
def test_each_process_has_an_even_share(n, workers):
    with DataParallel(Told(), workers) as shared:
        x, t = np.zeros((n, 2), np.float32), np.zeros(n, int)
        for said in (shared.predict(x, t), shared(x, t)[0]):
            processes, sizes = np.unique(said[:, 0], return_counts=True)
            assert len(processes) == min(n, workers) and max(sizes) - min(sizes) <= 1


def test_a_call_that_is_thrown_away_is_let_go_by_all():
    with DataParallel(Told(), 2) as shared:
        x, t = np.zeros((4, 2), np.float32), np.zeros(4, int)
        assert max(np.max(shared(x, t)[0][:, 1]) for _ in range(5)) <= 2
        kept = [shared(x, t) for _ in range(5)]
        assert np.min(kept[-1][0][:, 1]) >= 5


def test_calls_before_either_backward_and_gradients_that_add_up():
    rng = np.random.default_rng(0)
    model = unet()
    (x1, t1), (x2, t2) = batch(4, rng), batch(5, rng)
    for x, t in [(x1, t1), (x2, t2)]:
        y, backward = model(x, t)
        backward(np.ones_like(y))
    expected = gradients(model)
    model.zero_grad()
    with DataParallel(model, 2) as shared:
        y1, backward1 = shared(x1, t1)
        y2, backward2 = shared(x2, t2)
        backward1(np.ones_like(y1))
        backward2(np.ones_like(y2))
        with pytest.raises(RuntimeError, match="second time"):
            backward1(np.ones_like(y1))
    assert_gradients(model, expected)


def test_a_worker_without_a_share_adds_nothing():
    """What it found for a larger batch before is not added a second time."""
    model, rng = unet(), np.random.default_rng(0)
    few, many = batch(2, rng), batch(6, rng)
    model(*few)[1](few[0])
    expected = gradients(model)
    with DataParallel(model, 3) as shared:
        for x, t in (many, few):
            shared.zero_grad()
            shared(x, t)[1](x)
    assert_gradients(model, expected)


def test_workers_see_new_weights():
    """Stepped in place, as Adam does, and replaced, as load_state_dict does."""
    rng = np.random.default_rng(0)
    model, other = unet(seed=1), unet(seed=2)
    x, t = batch(4, rng)
    with DataParallel(model, 2) as shared:
        shared.predict(x, t)
        optimizer = td.Adam(model.named_parameters(), lr=0.1)
        for p in model.named_parameters().values():
            p.grad = normal(rng, p.shape, np.float64)
        optimizer.step()
        assert_close(shared.predict(x, t), model.predict(x, t), "after a step")
        shared.load_state_dict(other.state_dict())
        assert_close(shared.predict(x, t), other.predict(x, t), "after loading")


def test_weights_of_another_dtype_or_shape_are_shared_anew():
    rng = np.random.default_rng(0)
    model = td.MLP(hidden=8, blocks=1, time_features=4, rng=rng)
    randomise(model, rng, np.float32)
    x, t = normal(rng, (6, 2), np.float64), rng.integers(9, size=6)
    with DataParallel(model, 2) as shared:
        shared.predict(x.astype(np.float32), t)
        shared.to(np, np.float64)
        y, backward = shared(x, t)
        backward(y)
        assert all(p.value.dtype == p.grad.dtype == np.float64 for p in model.named_parameters().values())
        found = gradients(model)
        model.zero_grad()
        y_own, backward = model(x, t)
        backward(y_own)
        assert_close(y, y_own, "y")
        assert_gradients(model, found)
        out = model.linear_out
        out.weight.value, out.bias.value = out.weight.value[:, :1].copy(), out.bias.value[:1].copy()
        assert_close(shared.predict(x, t), y_own[:, :1], "one feature")
        assert out.weight.shape == (8, 1) and len(shared._workers) == 1
        strict = pytest.importorskip("array_api_strict")
        shared.to(strict)
        with pytest.raises(ValueError, match="not NumPy arrays"):
            shared.predict(strict.asarray(x), strict.asarray(t))


def test_the_optimizer_steps_the_weights_where_the_workers_see_them():
    """Or they would be copied there at every call."""
    model, rng = unet(dtype=np.float32), np.random.default_rng(0)
    optimizer = td.Adam(model.named_parameters(), lr=0.1)
    optimizer.step()  # before there are any workers it has them elsewhere
    x, t = batch(4, rng, np.float32)
    with DataParallel(model, 2) as crew:
        where = [p.value for p in optimizer.parameters]
        for _ in range(2):
            y, backward = crew(x, t)
            backward(np.ones_like(y))
            before = [p.value.copy() for p in optimizer.parameters]
            optimizer.step()
            assert all(p.value is value for p, value in zip(optimizer.parameters, where))
            assert any(np.any(p.value != value) for p, value in zip(optimizer.parameters, before))
            optimizer.zero_grad()
        assert_close(crew.predict(x, t), model.predict(x, t), "y", 1e-5)


def test_the_model_is_itself_again_afterwards():
    rng = np.random.default_rng(0)
    model = unet()
    x, t = batch(4, rng)
    before = model.predict(x, t)
    children = set(multiprocessing.active_children())
    with DataParallel(model, 3) as shared:
        assert len(set(multiprocessing.active_children()) - children) == 2
        assert shared.config == model.config
        assert shared.named_parameters().keys() == model.named_parameters().keys()
        shared.predict(x, t)
    assert set(multiprocessing.active_children()) == children
    np.testing.assert_array_equal(model.predict(x, t), before)
    assert all(p.value.base is None for p in model.named_parameters().values())


def test_weights_given_last_are_those_it_keeps():
    model, other = unet(), unet(seed=1)
    with DataParallel(model, 2):
        model.load_state_dict(other.state_dict())
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)


def test_networks_train_side_by_side_in_threads():
    """Each as it would by itself, to the bit: kernels and scratch are shared by all threads of a program.

    Within `many_steps`: else BLAS shares out what is left to it, or not, as other threads happen to hold it.
    """

    @kernels.many_steps()
    def trained(seed):
        rng = np.random.default_rng(seed)
        model = td.UNet(block_channels=(16, 32), attention=(False, True), norm_groups=4, rng=rng)
        randomise(model, rng, np.float32)
        optimizer = td.Adam(model.named_parameters())
        x, t = normal(rng, (6, 16, 16, 1), np.float32), rng.integers(1000, size=6)
        for _ in range(2):
            optimizer.zero_grad()
            y, backward = model(x, t)
            backward(y)
            td.clip_grad_norm(model.named_parameters(), 1.0)
            optimizer.step()
        return np.concatenate([p.value.ravel() for p in optimizer.parameters])

    alone, together = [trained(seed) for seed in range(3)], {}

    def work(seed):
        together[seed] = [trained(seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        for weights in together[seed]:
            np.testing.assert_array_equal(weights, alone[seed])


def test_threads_that_share_one_crew_take_turns():
    """Or one gets the other's answers, and its gradients."""
    model = unet()
    batches = [batch(n, np.random.default_rng(n)) for n in (4, 5)]
    predictions = [model.predict(x, t) for x, t in batches]
    for x, t in batches:
        for _ in range(8):
            model(x, t)[1](x)
    expected = gradients(model)
    model.zero_grad()
    with DataParallel(model, 2) as shared, ThreadPoolExecutor(2) as threads:

        def work(x, t):
            said = []
            for _ in range(8):
                said.append(shared.predict(x, t))
                y, backward = shared(x, t)
                backward(x)
                said.append(y)
            return said

        for said, prediction in zip(threads.map(work, *zip(*batches)), predictions):
            for y in said:
                assert_close(y, prediction, "the prediction")
    assert_gradients(model, expected)


def test_threads_end_in_any_order_and_blas_is_as_it_was():
    """Two hold BLAS to one thread; the first to come is the first to go, and the second the last."""
    if _threads._blas is None:
        pytest.skip("NumPy's BLAS cannot be asked")
    before = _threads._blas[0](), _threads.threads_in_reach()
    first, second = _threads.blas_on_one_thread(), _threads.alone()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _threads._blas[0]() == 1, "the second still holds it"
    second.__exit__(None, None, None)
    assert (_threads._blas[0](), _threads.threads_in_reach()) == before


def test_alone_is_said_of_one_thread_only():
    with _threads.alone():
        seen = []
        other = threading.Thread(target=lambda: seen.append(_threads.threads_in_reach()))
        other.start()
        other.join()
        assert _threads.threads_in_reach() == 1
    assert seen == [_threads.threads_in_reach()]
    with _threads.alone():
        with _threads.alone():
            pass
        assert _threads.threads_in_reach() == 1, "the inner one has ended, the outer has not"


def test_an_error_leaves_blas_as_it_was():
    if _threads._blas is None:
        pytest.skip("NumPy's BLAS cannot be asked")
    before = _threads._blas[0](), _threads.threads_in_reach()
    for held in (_threads.blas_on_one_thread, _threads.alone):
        with pytest.raises(ZeroDivisionError), held():
            1 / 0  # noqa: B018
        assert (_threads._blas[0](), _threads.threads_in_reach()) == before


def test_ctrl_c_while_blas_is_taken_leaves_it_as_it_was(monkeypatch):
    number = 4

    def put(n):
        nonlocal number
        number = n
        if n == 1:
            raise KeyboardInterrupt  # which Python raises where a call returns

    monkeypatch.setattr(_threads, "_blas", (lambda: number, put))
    monkeypatch.setattr(_threads, "_most_threads", lambda: 64)
    for held in (_threads.blas_on_one_thread, _threads.alone):
        with pytest.raises(KeyboardInterrupt), held():
            pass
        assert number == 4 == _threads.threads_in_reach()


def test_ctrl_c_before_blas_is_taken_leaves_it_as_it_is(monkeypatch):
    class Lock:
        """For which another thread has to be waited, the first time."""

        waits = True

        def __enter__(self):
            if self.waits:
                self.waits = False
                raise KeyboardInterrupt

        def __exit__(self, *exception):
            pass

    told = []
    monkeypatch.setattr(_threads, "_blas", (lambda: 4, told.append))
    monkeypatch.setattr(_threads, "_holding", Lock())
    with pytest.raises(KeyboardInterrupt), _threads.blas_on_one_thread():
        pass
    assert told == [] and _threads._holders == 0


def test_kernels_within_a_loop_leave_blas_to_it():
    """Each would be a moment in which Ctrl-C leaves BLAS on one thread as long as the traceback is kept."""
    if _threads._blas is None:
        pytest.skip("NumPy's BLAS cannot be asked")
    before = _threads._holders
    with kernels.many_steps():
        for parallel in (False, True):
            seen = _threads.in_parallel(lambda start, stop: _threads._holders, 4, parallel)
            assert set(seen) == {before + 1}


def test_a_thread_goes_on_where_the_program_has_come_to_its_end():
    """From there on it has no threads to share work out to, and computes the same by itself."""
    program = """
import threading, time
import numpy as np
import tinydiff as td

def trained():
    diffusion = td.GaussianDiffusion(td.cosine_schedule(4))
    model = td.UNet(block_channels=(16, 16), attention=(False, False), rng=np.random.default_rng(0))
    data = np.random.default_rng(1).standard_normal((8, 8, 8, 1))
    return td.train(model, diffusion, data, steps=4, batch_size=8, workers=1, progress=False).losses

expected = trained()

def at_the_end():
    threading.main_thread().join()
    time.sleep(0.1)
    assert np.array_equal(trained(), expected)
    print("the same")

threading.Thread(target=at_the_end).start()
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("the same\n"), done.stderr


def test_no_fork_waits_for_a_thread_that_it_has_not(monkeypatch):
    """The kernels are imported before, and no other thread is compiling any."""
    monkeypatch.setattr(kernels, "_twin", None)
    with DataParallel(unet(), 2):
        assert kernels._twin is not None
    pytest.importorskip("numba")
    from numba.core.compiler_lock import global_compiler_lock

    import tinydiff.kernels.numba  # noqa: F401

    compiling = threading.Event()

    def compile_something():
        with global_compiler_lock:
            compiling.set()
            time.sleep(0.2)

    def compile_too():
        with global_compiler_lock:
            pass

    other = threading.Thread(target=compile_something)
    other.start()
    compiling.wait()
    child = multiprocessing.get_context("fork").Process(target=compile_too)
    child.start()
    child.join(timeout=30)
    child.kill()
    other.join()
    assert child.exitcode == 0


def test_threads_that_a_fork_leaves_behind_are_not_warned_of(monkeypatch):
    """Python 3.12 and later warn of any that there are, as a progress bar's."""
    fork = os.fork

    def warning():
        said = "is multi-threaded, use of fork() may lead to deadlocks in the child."
        warnings.warn(f"This process (pid={os.getpid()}) {said}", DeprecationWarning, 2)
        return fork()

    monkeypatch.setattr(os, "fork", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DataParallel(unet(), 2).close()


def test_scratch_of_one_name_is_one_memory():
    views = [_threads.scratch("one memory", (size,), np.dtype(np.float32)) for size in (4, 8, 4, 2)]
    assert not np.shares_memory(*views[:2])  # it had to grow
    assert all(np.shares_memory(view, views[1]) for view in views[2:])


def test_a_copy_of_what_is_shared_is_the_model_alone():
    """So that a moving average, and `train`, take it as any model."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), prediction="v")
    data = np.random.default_rng(0).standard_normal((20, 6, 6, 1))
    how = dict(steps=2, batch_size=4, progress=False)
    with DataParallel(unet(), 2) as shared:
        by_hand = td.train(shared, diffusion, data, **how)
    by_itself = td.train(unet(), diffusion, data, workers=2, **how)
    assert type(by_hand.model) is td.UNet
    np.testing.assert_array_equal(by_hand.losses, by_itself.losses)
    for name, value in by_itself.model.state_dict().items():
        np.testing.assert_array_equal(by_hand.model.state_dict()[name], value, err_msg=name)
    with DataParallel(unet(), 2) as shared:
        one, same = copy.deepcopy([shared, shared._model])
    assert one is same


def test_a_gradient_of_another_shape_is_refused_and_a_closed_crew_is_the_model():
    model = unet()
    x, t = batch(4, np.random.default_rng(0))
    with DataParallel(model, 2) as shared:
        y, backward = shared(x, t)
        for wrong in (y[:3], np.concatenate([y, y])):
            with pytest.raises(ValueError, match="dy has shape"):
                backward(wrong)
        backward(y)
    np.testing.assert_array_equal(shared.predict(x, t), model.predict(x, t))
    assert not shared._workers and not multiprocessing.active_children()


def test_a_network_without_a_configuration_is_shared():
    class Own(td.nn.Module):
        def __init__(self):
            self.net = td.MLP(rng=np.random.default_rng(0))

        def __call__(self, x, t, rng=None):
            return self.net(x, t)

    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((5, 2)).astype(np.float32), rng.integers(10, size=5)
    own = Own()
    with DataParallel(own, 2) as shared:
        assert_close(shared(x, t)[0], own(x, t)[0], "the output", 1e-6)


def test_dropout_is_drawn_from_the_generator_given():
    model = unet(dropout=0.5)
    x, t = batch(6, np.random.default_rng(0))
    with DataParallel(model, 2) as shared:
        first, second, third = (shared(x, t, np.random.default_rng(seed))[0] for seed in (3, 3, 4))
        plain = shared(x, t)[0]
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[:3], third[:3]) and not np.array_equal(first[3:], third[3:])
    assert_close(plain, model(x, t)[0], "what is drawn without a generator")
    # Both processes draw, and not the same masks: the same image twice gives two outputs.
    twice = np.concatenate([x[:1], x[:1]])
    with DataParallel(model, 2) as shared:
        y, _ = shared(twice, np.array([5, 5]), np.random.default_rng(0))
    assert not np.array_equal(y[0], y[1])


class Noisy(td.MLP):
    """It has a configuration without dropout, and draws all the same."""

    def __call__(self, x, t, rng=None):
        y, backward = super().__call__(x, t)
        return (y if rng is None else y + rng.standard_normal(y.shape, np.float32)), backward


def test_a_subclass_is_shared_when_asked_only_and_draws(monkeypatch):
    monkeypatch.setattr(parallel, "threads_in_reach", lambda: 2)
    noisy = Noisy(hidden=96)
    with shared_out(noisy, 256) as same:
        assert same is noisy
    x, t = normal(np.random.default_rng(0), (6, 2), np.float32), np.arange(6)
    with shared_out(noisy, 6, 2) as shared:
        off = shared(x, t, np.random.default_rng(1))[0] - shared(x, t)[0]
    assert np.all(off != 0) and len(np.unique(off)) == off.size


def test_errors_of_the_model_come_out_and_leave_it_usable():
    rng = np.random.default_rng(0)
    model = unet()
    x, t = batch(4, rng)
    with DataParallel(model, 2) as shared:
        for wrong in [(x[:, :5], t), (x.astype(np.float32), t), (x, t[:3]), (x[0], t), ("x", t)]:
            with pytest.raises((ValueError, TypeError)) as of_the_model:
                model(*wrong)
            with pytest.raises(type(of_the_model.value)) as of_the_shared:
                shared(*wrong)
            assert str(of_the_shared.value) == str(of_the_model.value)  # not of a share of x
        assert_close(shared.predict(x, t), model.predict(x, t), "the prediction after errors")


def test_an_error_in_a_worker_comes_out(monkeypatch):
    model = unet()
    x, t = batch(4, np.random.default_rng(0))
    parent = os.getpid()
    conv2d = kernels_for(x).conv2d

    for error, expected in [(MemoryError, MemoryError), (ZeroDivisionError, RuntimeError)]:

        def fail(*arguments, error=error):
            if os.getpid() != parent:
                raise error("in the other process")
            return conv2d(*arguments)

        monkeypatch.setattr(kernels_for(x), "conv2d", fail)
        message = f"worker process failed: {error.__name__}: in the other process"
        with DataParallel(model, 2) as shared, pytest.raises(expected, match=message):
            shared(x, t)


def test_a_worker_that_died_is_reported_and_replaced():
    model = unet()
    x, t = batch(4, np.random.default_rng(0))
    with DataParallel(model, 2) as shared:
        os.kill(shared._workers[0][0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended unexpectedly"):
            shared.predict(x, t)
            shared.predict(x, t)  # the pipe may have taken the first question
        assert_close(shared.predict(x, t), model.predict(x, t), "the prediction of its successor")


def test_crews_that_begin_at_once_hear_of_the_death_of_their_own(monkeypatch):
    """No worker holds an end of another's line, be it of the same crew, begun before it or after: whoever
    waits for an answer would wait for ever.
    """
    both, ends = threading.Barrier(2), parallel.Line.ends

    def one_after_another():
        made = ends()
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        return made

    monkeypatch.setattr(parallel.Line, "ends", one_after_another)
    with ThreadPoolExecutor(2) as threads:
        crews = list(threads.map(lambda seed: DataParallel(unet(seed=seed), 3), range(2)))
    for crew, i in zip(crews, range(2)):
        process, line = crew._workers[i]
        os.kill(process.pid, signal.SIGKILL)
        assert line._arrived.poll(10_000)
    for crew in crews:
        crew.close()


def test_a_crew_that_began_within_inference_keeps_derivatives_after_it():
    model = unet()
    x, t = batch(4, np.random.default_rng(0))
    model(x, t)[1](x)
    expected = gradients(model)
    model.zero_grad()
    with inference():
        shared = DataParallel(model, 2)
    with shared:
        shared(x, t)[1](x)
    assert_gradients(model, expected)


def test_a_crew_ends_by_itself_whatever_began_after_it():
    with DataParallel(unet(), 2) as first, DataParallel(unet(), 2):
        process = first._workers[0][0]
        first.close()
        assert process.exitcode == 0


def test_a_fork_of_the_program_has_a_crew_and_weights_of_its_own():
    """As a web server forks that loaded the model before: their answers would be one another's."""
    model = unet()
    rng = np.random.default_rng(0)
    (mine, t), (other, _) = batch(4, rng), batch(4, rng)
    y, expected = model.predict(mine, t), model.predict(other, t)
    context = multiprocessing.get_context("fork")
    answer, answers = context.Pipe(False)
    with DataParallel(model, 2) as shared:

        def forked():
            said = [shared.predict(other, t) for _ in range(20)]
            for parameter in model.named_parameters().values():
                parameter.value *= 0  # the program that forked keeps its own
            said.append(shared.predict(other, t))
            answers.send(said)
            time.sleep(60)

        child = context.Process(target=forked)
        child.start()
        try:
            for _ in range(20):
                assert_close(shared.predict(mine, t), y, "the prediction")
            assert answer.poll(30), "the fork is still at it"
            *said, zeros = answer.recv()
            for prediction in said:
                assert_close(prediction, expected, "the fork's prediction")
            assert not zeros.any(), "the fork's own workers see its weights"
            assert_close(shared.predict(mine, t), y, "the prediction")
            worker = shared._workers[0][0]
            shared.close()
            assert worker.exitcode == 0, "the worker did not hear of the end: the fork held its line open"
        finally:
            child.kill()
            child.join()


def test_a_worker_ends_at_sigterm_whatever_the_process_that_leads_does_at_it(request):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with DataParallel(unet(), 2) as shared:
        process = shared._workers[0][0]
        shared.predict(*batch(4, np.random.default_rng(0)))  # it is at work by now
        os.kill(process.pid, signal.SIGTERM)
        process.join(timeout=10)
        assert process.exitcode == -signal.SIGTERM


def test_a_derivative_whose_processes_have_ended_says_so():
    """After `close`, and after a fork anew: for other weights, or because a call was interrupted."""
    model, rng = unet(), np.random.default_rng(0)
    (x, t), one = batch(4, rng), batch(1, rng)
    calls = []
    with DataParallel(model, 2) as shared:
        calls.append(shared(x, t)[1])
        shared._unanswered = True  # as Ctrl-C leaves it
        calls.append(shared(x, t)[1])  # the first one's processes have ended
        with pytest.raises(RuntimeError, match=r"processes that held this .* ended; call the model again"):
            calls[0](x)
        shared._unanswered = True
        with pytest.raises(RuntimeError, match="processes that held this derivative"):
            calls[1](x)
        calls.append(shared(x, t)[1])
        shared.to(np, np.float64)
        for p in model.named_parameters().values():
            p.value = p.value.astype(np.float32)
        shared.predict(x.astype(np.float32), t)  # forks anew
        with pytest.raises(RuntimeError, match="processes that held this derivative"):
            calls[2](x)
        shared.to(np, np.float64)
        last, alone = shared(x, t)[1], shared(*one)[1]
    model.zero_grad()
    with pytest.raises(RuntimeError, match="processes that held this derivative"):
        last(x)
    assert not any(np.any(p.grad) for p in model.named_parameters().values())  # not of a share either
    assert alone(one[0]).shape == one[0].shape  # which this process held


def test_an_interruption_loses_nothing_but_the_call():
    """Ctrl-C in the middle of a call, even while the answers are awaited: the next call is right."""
    model = unet()
    rng = np.random.default_rng(0)
    (x1, t1), (x2, t2) = batch(4, rng), batch(4, rng)
    with DataParallel(model, 2) as shared:

        class Interrupted:
            """The end of a line at which Ctrl-C comes while an answer is awaited."""

            def __init__(self, line):
                self.send, self.close = line.send, line.close

            def receive(self):
                raise KeyboardInterrupt

        process, line = shared._workers[0]
        shared._workers[0] = process, Interrupted(line)
        with pytest.raises(KeyboardInterrupt):
            shared.predict(x1, t1)
        assert_close(shared.predict(x2, t2), model.predict(x2, t2), "the next prediction")


def test_a_call_in_inference_keeps_nothing():
    model = unet()
    x, t = batch(4, np.random.default_rng(0))
    with DataParallel(model, 2) as shared, td.nn.inference():
        y, backward = shared(x, t)
        with pytest.raises(RuntimeError, match="inference"):
            backward(y)
        assert shared._calls == 0  # the workers were asked to predict, and keep nothing either


def test_what_cannot_be_shared_is_refused():
    model = unet()
    for workers in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="workers"):
            DataParallel(model, workers)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(2))
    with pytest.raises(TypeError, match="model is a function; expected a UNet"):
        DataParallel(lambda x, t: x, 2)
    with pytest.raises(TypeError, match="workers is 2, and the network a function; expected workers=1, or"):
        td.sample(lambda x, t: x, diffusion, (4, 2), rng=np.random.default_rng(0), workers=2)
    strict = pytest.importorskip("array_api_strict")
    model.to(strict, strict.float64)
    with pytest.raises(ValueError, match="NumPy"):
        DataParallel(model, 2)


@pytest.mark.parametrize("limit", [errno.EAGAIN, errno.ENOMEM])
def test_where_no_more_processes_may_begin_those_that_did_end(limit, monkeypatch):
    """A container limits their number, and a system may promise no more memory than it has."""
    model, fork = unet(), os.fork
    x, t = batch(6, np.random.default_rng(8))
    expected = model.predict(x, t)
    begun = []

    def limited():
        if begun:
            raise OSError(limit, os.strerror(limit))
        begun.append(fork())
        return begun[0]

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(WorkerError, match=rf"\[Errno {limit}\] .*workers=1"):
        DataParallel(model, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)
    assert_close(model.predict(x, t), expected, "the prediction")


def shares(workers):
    with shared_out(unet(), 64, workers) as shared:
        return type(shared).__name__


def test_a_process_of_a_pool_shares_nothing():
    """It is daemonic, and has no processes of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(shares, (None,)) == "UNet"
        with pytest.raises(RuntimeError, match=r"daemonic process.* expected workers=1"):
            pool.apply(shares, (2,))


def test_a_system_that_forks_but_is_not_linux_shares_nothing(monkeypatch):
    """macOS, whose Accelerate multiplies no matrices in a fork."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(parallel, "threads_in_reach", lambda: 2)
    assert shares(None) == "UNet"
    with pytest.raises(WorkerError, match="on Linux only; expected workers=1"):
        shares(2)


def test_shared_out_by_itself_where_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(parallel, "threads_in_reach", lambda: 2)
    model, points = unet(), td.MLP(hidden=96)  # 45,000 and 83,000 weights
    larger = td.UNet(block_channels=(16, 32), attention=(False, False))
    for each, n in [(model, 64), (larger, 2), (points, 256)]:
        with shared_out(each, n) as shared:
            assert isinstance(shared, DataParallel) and len(shared._workers) == 1
            with shared_out(shared, n) as same:
                assert same is shared
    for denoise, n, workers in [
        (model, 64, 1),
        (model, 5, None),
        (larger, 1, None),
        (points, 64, None),
        (len, 64, None),
    ]:
        with shared_out(denoise, n, workers) as same:
            assert same is denoise
    with shared_out(points, 64, 2) as shared:
        assert isinstance(shared, DataParallel)
    with shared_out(points, 2, 50) as shared:  # no process without a sample
        assert len(shared._workers) == 1
    with shared_out(points, 1, 50) as same:
        assert same is points


def test_sampling_is_the_same_shared_or_not():
    model = unet()
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), prediction="v")
    draw = lambda workers: td.sample(  # noqa: E731
        model, diffusion, (5, 6, 6, 1), rng=np.random.default_rng(0), workers=workers, progress=False,
        x_T=np.random.default_rng(1).standard_normal((5, 6, 6, 1)),
    )  # fmt: skip
    assert_close(draw(2), draw(1), "the samples", 1e-9)


def test_to_predict_moves_no_weights():
    """Or another thread that trains the model loses the step which it makes meanwhile."""
    model = unet()
    before = [p.value for p in model.named_parameters().values()]
    with shared_out(model, 4, 2, to_predict=True) as shared:
        shared.predict(*batch(4, np.random.default_rng(0)))
        assert all(p.value is value for p, value in zip(model.named_parameters().values(), before))
    diffusion = td.GaussianDiffusion(td.cosine_schedule(2), prediction="v")
    how = dict(rng=np.random.default_rng(0), workers=2, progress=False)
    x = td.sample(model, diffusion, (4, 6, 6, 1), **how)
    td.variational_bound(model, diffusion, x, **how)
    assert all(p.value is value for p, value in zip(model.named_parameters().values(), before))


def test_training_is_the_same_shared_or_not():
    """To rounding; and bit for bit with the same number of processes."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), prediction="v")
    data = np.random.default_rng(0).standard_normal((20, 6, 6, 1))

    def run(workers):
        how = dict(steps=4, batch_size=6, seed=1, progress=False)
        return td.train(unet(), diffusion, data, workers=workers, **how)

    alone, shared, again = run(1), run(3), run(3)
    np.testing.assert_array_equal(shared.losses, again.losses)
    assert_close(shared.losses, alone.losses, "the losses")
    for name, value in shared.model.state_dict().items():
        np.testing.assert_array_equal(value, again.model.state_dict()[name])
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("error", "ignore:data has a root mean square of 1e[+]38")
def test_a_loss_that_is_not_finite_ends_a_shared_training():
    """Not a warning, of this process or another."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), prediction="v")
    how = dict(steps=1, batch_size=6, workers=2, progress=False)
    with pytest.raises(FloatingPointError, match="at step 0"):
        td.train(unet(dtype=np.float32), diffusion, lambda n, rng: np.full((n, 6, 6, 1), 1e38), **how)


def test_an_interrupted_shared_training_is_resumed_to_the_bit(tmp_path):
    diffusion = td.GaussianDiffusion(td.cosine_schedule(10), prediction="v")

    def draw(stop_at):
        calls = iter(range(stop_at))

        def data(count, rng):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return rng.standard_normal((count, 6, 6, 1))

        return data

    how = dict(steps=5, batch_size=6, seed=1, progress=False, workers=2)
    whole = td.train(unet(), diffusion, draw(9), **how)
    with pytest.raises(KeyboardInterrupt):
        td.train(unet(), diffusion, draw(3), run_dir=tmp_path, **how)
    resumed = td.train(unet(), diffusion, draw(9), run_dir=tmp_path, resume=True, **how)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    for name, value in resumed.model.state_dict().items():
        np.testing.assert_array_equal(value, whole.model.state_dict()[name])
    assert not multiprocessing.active_children()


def test_a_network_without_a_derivative_is_named():
    """Also one whose share of two samples could be taken for an output and its derivative."""

    class OnlyOutput(td.MLP):
        def __call__(self, x, t, rng=None):
            return super().__call__(x, t, rng)[0]

    points = np.zeros((4, 2), np.float32)
    model = OnlyOutput(2, hidden=4, rng=np.random.default_rng(0))
    message = r"model\(x, t\) is an ndarray; expected \(output, backward\)"
    with shared_out(model, 4, workers=2) as shared, pytest.raises(TypeError, match=message):
        shared(points, np.zeros(4, int))
