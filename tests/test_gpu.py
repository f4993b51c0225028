"""What only a GPU can show: that the host does not wait, and that running out of its memory ends well.

That the numbers are right there is shown by the bodies of ``test_portability.py`` and ``test_resident.py``,
which run under CuPy with ``pytest -m gpu``, too; that a recorded step is the step, by ``test_graph.py``.
"""

import gc

import numpy as np
import pytest
from namespaces import space, training_step

import tinydiff as td
from tinydiff import _graph, backend

pytestmark = pytest.mark.gpu

PROCESS = td.GaussianDiffusion(td.cosine_schedule(100), "v")


@pytest.fixture
def cupy():
    space("cupy")  # or the test is skipped, with the reason
    return pytest.importorskip("cupy")


@pytest.fixture
def real(cupy):
    if "emulated" in cupy.__version__:
        pytest.skip("an emulated GPU does not run ahead of the host, and would take hours for such a batch")


def test_the_host_runs_ahead_of_a_step(real, cupy):
    """A second of work is put before three steps: the host is through with them while it still runs.

    Of a small network, whose three steps are some 400 launches: the driver's queue holds about a thousand,
    and where it is full the host waits.
    """
    model = td.MLP(hidden=8, blocks=1, time_features=8, backend="cupy")
    step = training_step(model, PROCESS, cupy.zeros((4, 2), dtype=cupy.float32))
    big = cupy.ones((8192, 8192), dtype=cupy.float32)
    rng = np.random.default_rng(0)

    def steps(n):
        for _ in range(n):
            step(rng)

    steps(5)  # compiles, and fills the pools: to allocate is to wait
    product = big @ big
    # Pinned memory comes back to CuPy's pool when what was sent from it has arrived: after the products.
    pinned = [cupy.cuda.alloc_pinned_memory(size) for size in (512, 1024, 2048) for _ in range(64)]
    del pinned
    cupy.cuda.get_current_stream().synchronize()
    for _ in range(40):
        cupy.matmul(big, big, out=product)
    before = cupy.cuda.Event()
    before.record()
    steps(3)
    assert not before.done


def test_a_constant_is_there_before_another_stream_may_read_it(cupy, monkeypatch):
    """It is sent once, on the stream of who asks first; nobody else's launches wait for that."""
    monkeypatch.setattr(backend, "_constants", {})
    like = cupy.zeros(1)
    for _ in range(2):
        with cupy.cuda.Stream(non_blocking=True):
            ones = backend.constant_like(np.ones, 3, like=like, dtype=np.float64)
    assert (ones.get() == 1).all()


def test_weights_may_lie_in_another_order_in_memory(cupy):
    """As those of another framework do when they are transposed: a state keeps the order it is given."""
    model = td.UNet(block_channels=(8, 16), attention=(False, True), norm_groups=4, backend="numpy")
    rng = np.random.default_rng(0)
    for p in model.named_parameters().values():  # no zeros
        p.value = p.value + 0.1 * rng.standard_normal(p.shape).astype(np.float32)
    state = {name: np.asfortranarray(array) for name, array in model.state_dict().items()}
    there = td.UNet(**model.config, backend="cupy")
    there.load_state_dict(state)
    assert not there.conv_in.weight.value.flags.c_contiguous
    x, t = rng.standard_normal((2, 8, 8, 1)).astype(np.float32), np.array([3, 700])
    y = there.predict(cupy.asarray(x), t).get()
    np.testing.assert_allclose(y, model.predict(x, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("record", ["0", ""])
def test_out_of_memory_ends_in_a_batch_that_fits(real, cupy, monkeypatch, record):
    """With the fourth step, or the recording that is made of it, too."""
    monkeypatch.setenv("TINYDIFF_RECORD", record)
    pool = cupy.get_default_memory_pool()
    model = td.UNet(block_channels=(16, 32), attention=(False, True), backend="cupy")
    data = np.zeros((64, 16, 16, 1), np.float32)
    how = dict(steps=5, progress=False)
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 384 * 2**20)
    try:
        with pytest.raises(MemoryError, match=r"try batch_size=\d+\.$") as caught:
            td.train(model, PROCESS, data, batch_size=8192, **how)
        td.train(model, PROCESS, data, batch_size=int(str(caught.value).split("=")[-1][:-1]), **how)
        found = td.find_batch_size(model, PROCESS, data, most=8192)
        assert 1 <= found < 8192
        td.train(model, PROCESS, data, batch_size=found, **how)
    finally:
        pool.set_limit(size=0)


def test_a_recording_that_does_not_fit_ends_in_a_batch_that_does(cupy, monkeypatch):
    """The steps before it fit, and what they took is given back; but somebody else takes it."""
    monkeypatch.delenv("TINYDIFF_RECORD", raising=False)
    pool = cupy.get_default_memory_pool()
    model = td.UNet(block_channels=(8, 16), attention=(False, True), norm_groups=4, backend="cupy")
    if not _graph.is_wanted(model):
        pytest.skip("the definitions are not recorded")
    data = np.zeros((8, 8, 8, 1), np.float32)
    used = []

    def limited(self, work, make=_graph.Recording.__init__):
        used.append(pool.used_bytes())
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() if len(used) == 1 else 0)
        try:
            make(self, work)
        finally:
            pool.set_limit(size=0)

    with monkeypatch.context() as patch:
        patch.setattr(_graph.Recording, "__init__", limited)
        with pytest.raises(MemoryError, match=r"batch_size=8 does not fit .*try batch_size=4\.$"):
            td.train(model, PROCESS, data, steps=6, batch_size=8, progress=False)
    gc.collect()
    assert len(used) == 2 and pool.used_bytes() <= used[0]
    td.train(model, PROCESS, data, steps=6, batch_size=8, progress=False)
