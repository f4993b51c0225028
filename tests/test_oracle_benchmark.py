"""The benchmark with PyTorch beside it: both sides compute the same, and what is measured is told of both."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import benchmark_in_brief, demo

import tinydiff as td
from tinydiff.schedules import evenly_spaced_timesteps

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def in_brief():
    threads = torch.get_num_threads()
    with benchmark_in_brief():
        yield
    torch.set_num_threads(threads)


def both(name, dtype="float32", exact_time=True):
    from _bench.networks import CONFIGS

    module = demo("benchmark")
    args = module.parse(["--quick", "--no-compile", "--threads", "1"])
    args.threads = 1
    run = module.Benchmark(args)
    config = CONFIGS[name].quick()
    return config, run.ours(config, dtype), run.theirs(config, "eager", dtype, exact_time)


@pytest.mark.parametrize("name", ["mnist", "cifar", "toy"])
def test_both_sides_take_the_same_steps(name):
    """Four training steps from the same weights end in the same weights: forward, backward, Adam, zeroing."""
    config, ours, theirs = both(name, "float64")
    batch = config.batch(2).astype(np.float64)
    before = ours.inference(batch)()
    steps = ours.training(batch), theirs.training(batch)
    for _ in range(4):
        losses = [float(step()) for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    from _bench.theirs import as_host

    y, expected = ours.inference(batch)(), as_host(theirs.inference(batch)())
    assert np.linalg.norm(y - before) > 1e-3 * np.linalg.norm(y), "nothing was trained"
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)
    ours.close()


def test_both_sides_walk_the_same_way_from_noise():
    from _bench.networks import T
    from _bench.theirs import as_host

    config, ours, theirs = both("sampling", "float64")
    batch = config.batch(2).astype(np.float64)
    timesteps = evenly_spaced_timesteps(T, 5)
    x = ours.ddim(batch, 5)()
    expected = as_host(theirs.ddim(batch, timesteps, td.cosine_schedule(T).alphas_cumprod[timesteps])())
    assert np.linalg.norm(x - expected) <= 1e-9 * np.linalg.norm(expected)
    ours.close()


def test_channels_last_lies_so_in_memory_and_computes_the_same():
    from _bench.networks import CONFIGS

    module = demo("benchmark")
    args = module.parse(["--quick", "--threads", "1"])
    run = module.Benchmark(args)
    config = CONFIGS["mnist"].quick()
    sides = [run.theirs(config, variant) for variant in ("eager", "channels_last")]
    x = sides[1]._here(config.batch(2))[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    a, b = (side.output_and_gradients(config.batch(2)) for side in sides)
    for name, value in a.items():
        if not name.endswith("to_k.bias"):  # whose gradient is 0, but for rounding
            assert np.linalg.norm(b[name] - value) <= 1e-4 * np.linalg.norm(value), name


def test_compiled_on_a_gpu_it_is_pytorchs_cuda_graphs(monkeypatch):
    """On PyTorch's device without memory: a step is announced before each, on a GPU only."""
    from _bench import theirs
    from _bench.networks import CONFIGS

    modes, begun = [], []
    monkeypatch.setattr(torch, "compile", lambda model, mode: (modes.append(mode), model)[1])
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    config = CONFIGS["toy"].quick()
    batch = config.batch(2)

    def side(device):
        return theirs.PyTorch(theirs.build("MLP", config.model().config), "compile", device)

    assert side("cpu").training(batch)().ndim == 0 and not begun
    on_a_gpu = side("meta")
    assert modes == [None, "reduce-overhead"] and on_a_gpu.name == "torch.compile"
    for work, steps in [(on_a_gpu.training(batch), 1), (on_a_gpu.inference(batch), 1)]:
        begun.clear()
        work()
        assert len(begun) == steps
    begun.clear()
    on_a_gpu.ddim(batch, np.array([0, 5, 9]), np.array([0.9, 0.5, 0.1]))()
    assert len(begun) == 3


def test_a_quick_run_tells_of_both_sides(tmp_path, capsys, monkeypatch):
    from _bench import memory

    def of_one(job, measured=memory.measured):
        """The processes take seconds to import what they need: one, that of a U-Net in PyTorch, is run."""
        return measured(job) if (job["config"], job["side"]) == ("mnist", "eager") else made_up

    made_up = {"peak_mib": None, "imported_mib": None, "children": False}
    monkeypatch.setattr(memory, "measured", of_one)
    file = tmp_path / "found.json"
    flags = ["--quick", "--no-compile", "--threads", "1", "--configs", "mnist", "toy", "--json", str(file)]
    demo("benchmark").main(flags)
    said = capsys.readouterr().out
    assert "ratio of errors" in said and "tinydiff / it" in said and "by layer" not in said
    found = json.loads(file.read_text())
    for agreement in found["agreement"].values():
        assert agreement["same"] and agreement["accurate"]
        assert 0 < agreement["float64_difference"]["gradients"] < 1e-9
    for of in found["times"]:
        for name, ratio in of["ratio"].items():
            medians = of["seconds"]
            assert ratio["ratio"] == pytest.approx(medians["tinydiff"] / medians[name])
    sides = {name: of["sides"] for name, of in found["memory"].items()}
    assert set(sides["mnist"]) == {"tinydiff", "PyTorch", "PyTorch channels_last"}
    assert set(sides["toy"]) == {"tinydiff", "PyTorch"}, "points have no channels"
    told = sides["mnist"]["PyTorch"]
    assert told["peak_mib"] is None or told["peak_mib"] > told["imported_mib"] > 50


def test_a_side_that_computes_something_else_is_not_timed(capsys, monkeypatch):
    from _bench import ours

    layout = ours.in_torch_layout

    def wrong(model):  # PyTorch is handed other weights by a part in a million
        return {k: v * (1 + 1e-6) if k == "linear_in.weight" else v for k, v in layout(model).items()}

    monkeypatch.setattr(ours, "in_torch_layout", wrong)
    monkeypatch.setattr(ours.Tinydiff, "output_and_gradients", _with_layout(ours, layout))
    with pytest.raises(SystemExit) as end:
        demo("benchmark").main(["--quick", "--no-compile", "--threads", "1", "--configs", "toy"])
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "do not agree in float64" in said.err and "median of" not in said.out


def _with_layout(ours, layout):
    original = ours.Tinydiff.output_and_gradients

    def output_and_gradients(self, batch):
        current, ours.in_torch_layout = ours.in_torch_layout, layout
        try:
            return original(self, batch)
        finally:
            ours.in_torch_layout = current

    return output_and_gradients


class OnTheHost:
    """Stands in for a GPU: the same run on the CPU, with events that look at the clock."""

    def __init__(self, tf32=False):
        self.times = 0

    def ours(self):
        return "numpy", self.clock()

    def theirs(self):
        return "cpu", self.clock()

    def clock(self):
        from _bench.gpu import EventClock

        def event():
            mark = SimpleNamespace(synchronize=lambda: None)
            mark.record = lambda: setattr(mark, "at", time.perf_counter())
            return mark

        def milliseconds(start, stop):
            self.times += 1
            return 1e3 * (stop.at - start.at)

        return EventClock(event, milliseconds)

    def about(self):
        return {"gpu": "none"}


def test_the_run_of_a_gpu_with_the_host_in_its_place(tmp_path, capsys, monkeypatch):
    from _bench import gpu

    monkeypatch.setattr(gpu, "Gpu", OnTheHost)
    file = tmp_path / "found.json"
    flags = ["--backend", "cupy", "--quick", "--no-compile", "--no-memory", "--threads", "1"]
    demo("benchmark").main([*flags, "--configs", "cifar128", "sampling", "--json", str(file)])
    found = json.loads(file.read_text())
    works = [(t["config"], t["work"]) for t in found["times"]]
    assert works == [
        ("cifar128", "training"),
        ("cifar128", "inference"),
        ("sampling", "inference"),
        ("sampling", "inference"),
        ("sampling", "ddim"),
    ]
    assert found["environment"]["gpu"] == "none" and "2 DDIM steps, batch 2:" in capsys.readouterr().out
