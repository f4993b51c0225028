"""The benchmark without torch: what it says of times, memory, layers and errors is what it measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import DEMOS, benchmark_in_brief, demo, run

import tinydiff as td
from tinydiff.kernels import _threads


@pytest.fixture(autouse=True)
def in_brief():
    with benchmark_in_brief():
        yield


def test_where_the_threads_of_blas_cannot_be_set_it_says_so(monkeypatch, capsys):
    """As on macOS, where NumPy's BLAS is Accelerate."""
    with monkeypatch.context() as patch:
        patch.setattr(_threads, "_blas", None)
        demo("benchmark").set_threads(1)
    assert "more threads than --threads says" in capsys.readouterr().err
    assert os.environ["VECLIB_MAXIMUM_THREADS"] == "1"


def test_threads_without_a_core_are_not_other_programs(monkeypatch):
    demo("benchmark")
    from _bench import machine

    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    wall, used = iter([0.0, 1.0, 1.0]), iter([0.0, 2.0])
    clocks = SimpleNamespace(perf_counter=wall.__next__, process_time=used.__next__)
    monkeypatch.setattr(machine, "time", clocks)
    assert machine.share_given(5) == 1.0


def test_ddim_is_timed_on_a_gpu_only(capsys):
    with pytest.raises(SystemExit):
        demo("benchmark").main(["--configs", "toy", "--work", "ddim"])
    assert "argument --work: ddim only with --backend cupy" in capsys.readouterr().err


def test_without_torch_it_measures_tinydiff_alone(tmp_path, capsys, monkeypatch):
    module = demo("benchmark")
    monkeypatch.setattr(module, "has_torch", lambda: False)
    file = tmp_path / "found.json"
    flags = ["--quick", "--threads", "1", "--configs", "mnist", "toy", "--json", str(file)]
    module.main(flags)
    said = capsys.readouterr().out
    assert 'pip install ".[oracle]"' in said and "by layer" in said and "PyTorch  " not in said
    found = json.loads(file.read_text())
    assert found["failures"] == [] and found["environment"]["threads"] == 1
    works = {(t["config"], t["work"]): t for t in found["times"]}
    assert set(works) == {(c, w) for c in ("mnist", "toy") for w in ("training", "inference")}
    for of in works.values():
        assert of["seconds"]["tinydiff"] == np.median(of["rounds"]["tinydiff"]) > 0 and not of["ratio"]
    for memory in found["memory"].values():
        told = memory["sides"]["tinydiff"]
        assert told["peak_mib"] is None or told["peak_mib"] > told["imported_mib"] > 5
    for profile in found["profile"]:
        layers = profile["layers"]
        inside = sum(x["forward_seconds"] + x["backward_seconds"] for x in layers)
        assert 0 < inside <= profile["step_seconds_watched"], "each layer's own time, once"
        assert {x["layer"] for x in layers} >= {"loss", "Adam"}
        by_kind = sum(x["forward_seconds"] + x["backward_seconds"] for x in profile["kinds"])
        assert by_kind == pytest.approx(inside)


def test_growth_without_torch(tmp_path, monkeypatch):
    module = demo("benchmark")
    monkeypatch.setattr(module, "has_torch", lambda: False)
    file = tmp_path / "found.json"
    flags = ["--quick", "--rounds", "1", "--no-memory", "--growth", "--configs", "toy", "--json", str(file)]
    module.main([*flags, "--threads", "1", "--work", "inference"])
    found = json.loads(file.read_text())
    assert [t["work"] for t in found["times"]] == ["inference"]
    grown = found["growth"]
    assert grown["batch"]["sizes"] == [8, 16] and grown["pixels"]["sizes"] == [16 * 16, 32 * 32]
    for of in grown.values():
        assert np.isfinite(of["sides"]["tinydiff"]["exponent"])


def test_exponent():
    from _bench.growth import exponent

    assert exponent([8, 16, 64], [3 * n**1.5 for n in (8, 16, 64)]) == pytest.approx(1.5)


def test_turns_alternate_and_the_ratio_is_of_medians():
    from _bench.rounds import WARM_UP, compared, in_turn

    order = []
    seconds = {
        "tinydiff": iter([9.0] * WARM_UP + [2.0, 2.0, 8.0]),
        "other": iter([9.0] * WARM_UP + [1, 2, 2]),
    }
    clocks = {
        name: lambda step, n, name=name: (order.append((name, n)), next(seconds[name]))[1] for name in seconds
    }
    times = in_turn({name: lambda: None for name in seconds}, clocks, rounds=3)
    assert [name for name, _ in order[2 * WARM_UP :]] == ["tinydiff", "other"] * 3
    assert times == {"tinydiff": [2, 2, 8], "other": [1, 2, 2]}
    found = compared(times)
    assert found["seconds"] == {"tinydiff": 2, "other": 2}
    assert found["ratio"]["other"] == {"ratio": 1.0, "lower_quartile": 1.5, "upper_quartile": 3.0}


def test_a_turn_of_short_steps_is_many_of_them_after_one_that_does_not_count():
    from _bench.rounds import WARM_UP, in_turn

    counted, calls = [], []

    def clock(step, n):
        counted.append(n)
        return 0.01

    in_turn({"tinydiff": lambda: calls.append(1)}, {"tinydiff": clock}, rounds=2, seconds_a_turn=0.1)
    assert counted == [1] * WARM_UP + [10, 10] and len(calls) == 2


def test_flops_are_those_of_the_definition_and_the_calls_are_put_back():
    from _bench import layers
    from _bench.networks import Config

    config = Config(
        "small",
        "",
        td.UNet,
        dict(block_channels=[8, 16], attention=[False, True], layers_per_block=1, norm_groups=4, head_dim=8),
        (4, 6, 1),
        training=(3,),
    )
    call = td.nn.Conv2d.__call__
    measured = layers.profile(config, 3, steps=2)
    assert td.nn.Conv2d.__call__ is call
    flop = {x["layer"]: x["forward_gflop"] * 1e9 for x in measured["layers"]}
    assert flop["conv_in"] == pytest.approx(2 * 3 * 4 * 6 * 9 * 1 * 8)
    assert flop["down_blocks.0.downsamplers.0.conv"] == pytest.approx(2 * 3 * 2 * 3 * 9 * 8 * 8)
    assert flop["up_blocks.0.upsamplers.0"] == pytest.approx(2 * 3 * 4 * 6 * 9 * 16 * 16)
    assert flop["down_blocks.1.attentions.0.to_q"] == pytest.approx(2 * 3 * 6 * 16 * 16)
    assert flop["down_blocks.1.attentions.0"] == pytest.approx(2 * 2 * 3 * 6 * 6 * 16)
    assert flop["conv_norm_out"] == 0
    table = "\n".join(layers.table(measured, "layers", least=0.02))
    assert "others, each below 2.0%" in table and "in all" in table


def test_no_weight_of_a_configuration_is_zero_and_the_batch_is_the_same_in_both_precisions():
    from _bench.networks import CONFIGS

    for config in CONFIGS.values():
        small = config.quick()
        assert all((p.value != 0).all() for p in small.model().named_parameters().values())
        single, double = small.batch(2), small.batch(2).astype(np.float64)
        assert single.x.dtype == np.float32 and double.x.dtype == np.float64
        np.testing.assert_array_equal(single.x, double.x)


# What is judged


def both_sides(error_ours=1e-7, error_theirs=1e-7, error_64=1e-15):
    rng = np.random.default_rng(0)
    exact = {"output": rng.standard_normal(500), "w": rng.standard_normal(500), "a.to_k.bias": np.zeros(3)}

    def near(error):
        return {k: v + error * rng.standard_normal(v.shape) for k, v in exact.items()}

    return dict(ours=near(error_ours), theirs=near(error_theirs), ours_64=near(error_64), theirs_64=exact)


def test_agreement_sees_each_kind_of_mistake():
    from _bench.agreement import compare

    found = compare(**both_sides())
    assert found["same"] and found["accurate"]
    assert found["error_ratio"]["output"] == pytest.approx(1, rel=0.2)
    found = compare(**both_sides(error_ours=6e-7))
    assert found["same"] and not found["accurate"]
    assert found["error_ratio"]["gradients"] == pytest.approx(6, rel=0.2)
    assert not compare(**both_sides(error_64=1e-8))["same"]
    wrong = both_sides()
    wrong["ours_64"]["w"] = -wrong["ours_64"]["w"]
    assert not compare(**wrong)["same"]
    del wrong["ours_64"]["w"]
    with pytest.raises(ValueError, match="same parameters"):
        compare(**wrong)


# Memory


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/smaps_rollup").exists(),
    reason="Linux's account of memory",
)
def test_memory_of_a_process_and_of_those_below_it():
    from _bench.memory import descendants, peak_mib, pss_mib, resident_mib

    assert peak_mib() >= resident_mib() > 10
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        while not (below := descendants(child.pid)):
            assert child.poll() is None
        assert len(below) == 1 and below[0] in descendants(os.getpid())
        assert 0 < pss_mib(child.pid) < 100
    finally:
        child.communicate(b"\n", timeout=60)


def test_a_measurement_that_fails_says_why():
    from _bench.memory import measured

    with pytest.raises(RuntimeError, match="KeyError"):
        measured({"side": "tinydiff", "config": "nowhere", "batch": 1, "shape": [2]})


# The clock of a GPU, with its events stood in for


def test_event_clock_times_between_its_two_events():
    from _bench.gpu import EventClock

    queue = []

    def event():
        mark = SimpleNamespace()
        mark.record = lambda: (queue.append("event"), setattr(mark, "at", len(queue)))
        mark.synchronize = lambda: queue.append("wait")
        return mark

    clock = EventClock(event, lambda start, stop: 1000.0 * (stop.at - start.at))
    assert clock(lambda: queue.append("step"), 4) == 5 / 4
    assert queue == ["event", "step", "step", "step", "step", "event", "wait"]


def test_on_a_gpu_the_sides_are_those_of_tinydiff_by_default_and_what_it_is_beside(monkeypatch):
    """Each chooses its kernels before its turn, and its step is recorded or not."""
    from _bench import ours
    from _bench.networks import CONFIGS

    module, chosen = demo("benchmark"), []
    monkeypatch.setattr(module, "has_torch", lambda: False)
    monkeypatch.setattr(td, "get_backend", lambda name=None: np)
    monkeypatch.setattr(ours, "use_on_gpu", chosen.append)

    def is_wanted(model, asked=None):
        assert not asked or chosen[-1] != "portable"  # which cannot be recorded
        return asked is not False

    monkeypatch.setattr(ours._graph, "is_wanted", is_wanted)
    args = module.parse(["--backend", "cupy", "--definitions", "--quick", "--configs", "toy"])
    args.threads = 1
    device = SimpleNamespace(about=dict, ours=lambda: ("cupy", None))
    config = CONFIGS["toy"].quick()
    sides = module.Benchmark(args, device).sides(config)
    assert [(side.name, side.kernels, side.recorded) for side in sides.values()] == [
        ("tinydiff", None, True),
        ("tinydiff, unrecorded", "cupy", False),
        ("tinydiff, definitions", "portable", False),
    ]
    sides["tinydiff"].inference(config.batch(2))
    steps = [sides[name].training(config.batch(2)) for name in list(sides)[:0:-1]]
    chosen.clear()
    for step in steps:
        step()
    assert chosen == ["portable", "cupy"]
    for side in sides.values():
        side.close()


# What is said


def test_help_is_enough(capsys):
    with pytest.raises(SystemExit) as end:
        demo("benchmark").main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    flags = "configs work rounds threads workers quick no-compile no-memory profile growth json backend tf32"
    for flag in [*flags.split(), "fused-adam", "definitions"]:
        assert f"--{flag} " in said, flag
    words = ["A B A B", "median", "quartiles", "torch.set_num_threads", "many_steps", "VmHWM", "PSS"]
    for word in [*words, "CUDA graphs", 'mode="reduce-overhead"', "in float32 even then"]:
        assert word in said, word


@pytest.mark.skipif(not td.parallel._can_fork(), reason="needs a system that forks")
def test_workers_share_the_points():
    from _bench.networks import CONFIGS
    from _bench.ours import Tinydiff

    config = CONFIGS["toy"].quick()
    for workers, expected in [(2, 2), (None, 1)]:
        side = Tinydiff(config, workers=workers)
        try:
            assert getattr(side.model, "_count", 1) == expected
            side.training(config.batch(2))()
        finally:
            side.close()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--configs", "imagenet"], ["imagenet", "mnist", "toy"]),
        (["--configs", "cifar128"], ["cifar128"]),
        (["--work", "rest"], ["--work", "rest", "training", "inference", "ddim"]),
        (["--rounds", "0"], ["--rounds", "'0'"]),
        (["--json", "nowhere/found.json"], ["--json", "nowhere"]),
        (["--tf32"], ["--tf32", "--backend cupy"]),
        (["--definitions"], ["--definitions", "--backend cupy"]),
        (["--backend", "cupy", "--workers", "2"], ["--workers", "--backend numpy"]),
        (["--backend", "cupy", "--growth"], ["--growth", "--backend numpy"]),
        (["--backend", "jax"], ["jax", "cupy"]),
    ],
)
def test_a_wrong_flag(argv, words, capsys):
    said = run("benchmark", *argv, capsys=capsys, expect=2).err.splitlines()[-1]
    assert all(word in said for word in words)


def test_cupy_missing_is_said_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = run("benchmark", "--backend", "cupy", capsys=capsys, expect=2).err
    assert len(said.splitlines()) == 1 and "CuPy" in said and "pip install" in said


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_torch_missing_beside_cupy_is_said_in_one_sentence(missing, capsys, monkeypatch):
    monkeypatch.setattr(td, "get_backend", lambda name: np)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "diffusers":
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    else:
        monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace())
    said = run("benchmark", "--backend", "cupy", capsys=capsys, expect=2).err
    assert len(said.splitlines()) == 1 and f"{missing} is not installed" in said and "pip install" in said


def test_what_is_asked_of_it_on_a_gpu_is_there():
    """Each line of .ci/gpu, which only runs where there is one."""
    from _bench import networks

    script = (DEMOS.parent / ".ci" / "gpu").read_text(encoding="utf-8")
    rows = [line.split()[1:-1] for line in script.splitlines() if line.startswith("  benchmark ")]
    flags = [part.split() for part in re.findall(r"^\w+\(\) { rows(.*?); }", script, re.MULTILINE)]
    asked = [[*row, *more] for row in rows for more in flags]
    assert len(asked) == 6
    for argv in asked:
        args = demo("benchmark").parse(["--backend", "cupy", *argv])
        assert all(getattr(networks.CONFIGS[name], work) for name in args.configs for work in args.work)
