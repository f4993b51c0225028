"""The demos leave what they promise, go on where they were interrupted, and end mistakes in one sentence."""

import argparse
import errno
import io
import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from namespaces import OnDevice, assert_there, space
from PIL import Image
from runs import raising
from scripts import DEMOS, demo, run

import tinydiff as td
from tinydiff.checkpoint import load_arrays

PICTURES = ["forward.png", "reverse.png", "samples.png", "training.png"]
FILES = ["checkpoint.safetensors", "metrics.json", "metrics.jsonl", "model.safetensors", "samples.npy"]

TOY = ["--steps", "30", "--T", "20", "--batch", "16", "--samples", "200", "--seed", "3"]
MNIST = ["--steps", "3", "--T", "8", "--batch", "2", "--channels", "8", "8", "--samples", "5"]


@pytest.fixture(scope="module", autouse=True)
def demos_on_the_path():
    """As if python were run on a file beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        patch.delenv("TINYDIFF_BACKEND", raising=False)
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "new" / "run"
    run("train_toy2d", *TOY, "--shape", "rings", "--out", out, "--quiet")
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("mnist")
    run("train_mnist", *MNIST, "--out", out, "--quiet")
    return out


# What is left in DIR


@pytest.mark.parametrize("name", ["toy", "digits"])
def test_the_run_leaves_the_files_and_nothing_else(name, request):
    out = request.getfixturevalue(name)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES + PICTURES)
    for picture in PICTURES:
        with Image.open(out / picture) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 16, f"{picture} is empty"


def test_toy_samples_and_metrics(toy):
    samples = np.load(toy / "samples.npy")
    assert samples.shape == (200, 2) and samples.dtype == np.float32 and np.isfinite(samples).all()
    metrics = json.loads((toy / "metrics.json").read_text())
    assert metrics["ratio"] == pytest.approx(metrics["sliced_wasserstein"] / metrics["sampling_floor"])
    assert (metrics["n"], metrics["steps"]) == (200, 30)
    assert metrics["settings"]["shape"] == "rings" and metrics["settings"]["sampling_steps"] == 20
    losses = load_arrays(toy / "checkpoint.safetensors")[0]["losses"]
    assert len(losses) == 30 and metrics["final_loss"] == losses[-1]
    for key in ["training_seconds", "sampling_seconds"]:
        assert metrics[key] > 0, key
    assert metrics["peak_memory_mib"] is None or metrics["peak_memory_mib"] > 0  # Windows does not say


def test_distance_and_floor_measure_what_they_say():
    toy2d = demo("train_toy2d")
    rng = np.random.default_rng(0)
    fresh = td.datasets.toy2d.sample("heart", 2000, rng)
    data, distance, floor = toy2d.distance_and_floor(fresh, "heart", rng)
    assert data.shape == fresh.shape and not np.array_equal(data, fresh)
    # Fresh data is at the floor, which is of order 1 / sqrt(n); the ratio strays by a few tenths.
    assert 0.2 / np.sqrt(2000) < floor < 3 / np.sqrt(2000)
    assert 0.5 < distance / floor < 2
    # A shift by d moves the projection on a random direction by d |cos|, 2 d / pi on average.
    _, distance, _ = toy2d.distance_and_floor(fresh + np.float32([3, 4]), "heart", rng)
    assert distance == pytest.approx(10 / np.pi, rel=0.02)


def test_digits_samples_and_metrics(digits):
    samples = np.load(digits / "samples.npy")
    assert samples.shape == (5, 28, 28, 1) and samples.dtype == np.float32
    assert np.abs(samples).max() <= 1
    metrics = json.loads((digits / "metrics.json").read_text())
    x = td.datasets.mnist.to_model_range(td.datasets.mnist.load()[0])
    pixels = metrics["pixels"]
    assert pixels["data"]["mean"] == pytest.approx(x.mean(), rel=1e-4)
    assert pixels["data"]["std"] == pytest.approx(x.std(), rel=1e-4)
    assert pixels["data"]["ink"] == (x > 0).mean()
    assert pixels["samples"]["mean"] == pytest.approx(samples.mean(), rel=1e-4)
    assert metrics["settings"]["channels"] == [8, 8]
    assert metrics["training_seconds"] > 0 and metrics["sampling_seconds"] > 0


def test_with_classes_the_network_is_told_which_digit_each_picture_shows(tmp_path, monkeypatch):
    given = {}

    def train(model, diffusion, data, **how):
        given.update(data=data, **how)
        return original(model, diffusion, data, **how)

    original = td.train
    monkeypatch.setattr(td, "train", train)
    run("train_mnist", *MNIST, "--classes", "--out", tmp_path, "--quiet")
    read = np.argmax(td.metrics.digit_probabilities(given["data"][:500]), axis=1)
    assert np.mean(read == given["labels"][:500]) > 0.95
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["share_as_asked"] <= 1 and metrics["settings"]["guidance"] == 2
    model, diffusion, _ = td.pretrained.load(tmp_path / "model.safetensors")
    assert model.config["num_classes"] == 10 and diffusion.T == 8


@pytest.mark.parametrize(("name", "kind"), [("toy", td.MLP), ("digits", td.UNet)])
def test_the_model_is_the_moving_average_and_says_what_it_is(name, kind, request):
    out = request.getfixturevalue(name)
    model, about = td.load_model(out / "model.safetensors")
    assert isinstance(model, kind)
    settings = json.loads((out / "metrics.json").read_text())["settings"]
    for key in ["schedule", "T", "prediction", "steps", "seed", "shape" if name == "toy" else "data"]:
        assert about[key] == settings[key], key
    arrays, _ = load_arrays(out / "checkpoint.safetensors")
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, arrays[f"ema.model.{key}"])
    assert any(not np.array_equal(v, arrays[f"model.{k}"]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["train_toy2d", "sample_mnist", "compare_schedules"])
def test_a_letter_that_the_output_cannot_hold_ends_no_run(name, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(written, encoding="ascii", newline="\n", write_through=True)
    )
    with pytest.raises(SystemExit):
        demo(name).main(["--help"])
    print("β ± …")
    assert written.getvalue().endswith(b"\n? ? ?\n")


@pytest.mark.parametrize(("schedule", "prediction"), [("cosine", "v"), ("flow", "flow")])
@pytest.mark.usefixtures("no_pictures")
def test_every_choice_of_process_and_sampler_works(schedule, prediction, tmp_path):
    choices = ["--schedule", schedule, "--prediction", prediction, "--sampler", "ddim", "--sampling-steps", 4]
    run("train_toy2d", *TOY, *choices, "--out", tmp_path, "--quiet")
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["sampler"] == "ddim"
    _, about = td.load_model(tmp_path / "model.safetensors")
    assert (about["schedule"], about["prediction"]) == (schedule, prediction)


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
@pytest.mark.parametrize("name", ["train_toy2d", "train_mnist"])
@pytest.mark.usefixtures("no_pictures")
def test_with_the_other_losses_the_network_learns_a_variance(name, loss, tmp_path):
    flags = TOY if name == "train_toy2d" else MNIST
    run(name, *flags, "--loss", loss, "--out", tmp_path, "--quiet")
    arrays, metadata = load_arrays(tmp_path / "checkpoint.safetensors")
    assert (metadata["settings"]["loss"], metadata["settings"]["variance"]) == (loss, "learned_range")
    assert metadata["settings"]["decoder"] == ("density" if name == "train_toy2d" else "8bit")
    assert ("t_sampler.history" in arrays) == (loss == "vlb")
    model, about = td.load_model(tmp_path / "model.safetensors")
    assert about["loss"] == loss
    assert model.config["out_features" if name == "train_toy2d" else "out_channels"] in (4, 2)
    assert np.isfinite(np.load(tmp_path / "samples.npy")).all()


@pytest.mark.usefixtures("no_pictures")
def test_the_seed_decides_and_a_second_run_replaces_the_first(toy, tmp_path):
    for seed in [4, 3]:  # the second run is another, and begins anew: the first is finished
        run("train_toy2d", *TOY, "--shape", "rings", "--out", tmp_path, "--quiet", "--seed", seed)
        same = np.array_equal(np.load(tmp_path / "samples.npy"), np.load(toy / "samples.npy"))
        assert same == (seed == 3)


# What is said


def test_it_ends_by_saying_where_the_pictures_are_and_how_far_the_samples(tmp_path, capsys):
    said = run("train_toy2d", *TOY, "--out", tmp_path, capsys=capsys)
    distance, pictures = said.out.splitlines()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for number in (metrics["sliced_wasserstein"], metrics["sampling_floor"]):
        assert f"{number:.4f}" in distance
    assert str(tmp_path) in pictures and all(name in pictures for name in PICTURES)
    assert "training" in said.err and "sampling" in said.err, "progress bars"


@pytest.mark.parametrize(("name", "flags"), [("train_toy2d", TOY), ("train_mnist", MNIST)])
def test_quiet_prints_nothing(name, flags, tmp_path, capsys):
    assert run(name, *flags, "--out", tmp_path, "--quiet", capsys=capsys) == ("", "")


@pytest.mark.parametrize("name", ["train_toy2d", "train_mnist"])
def test_help_names_every_flag_its_default_and_an_example(name, capsys):
    module = demo(name)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = "out steps seed quiet resume backend device tf32 batch lr loss schedule prediction T samples"
    for flag in [
        *flags.split(),
        "workers",
        "sampler",
        "sampling-steps",
        *(["shape"] if name == "train_toy2d" else ["data", "channels", "classes", "digits", "guidance"]),
    ]:
        assert f"--{flag} " in text, flag
    for value in module.DEFAULTS.values():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        assert f"(default: {shown}" in text, value
    assert "None" not in text and f"python demos/{name}.py --" in text


@pytest.mark.usefixtures("no_pictures")
def test_the_full_set_falls_back_to_the_subset_with_one_line(tmp_path, capsys, monkeypatch):
    def offline(split):
        assert split == "train"
        warnings.warn("using the subset: no network", stacklevel=2)
        return images, labels

    images, labels = td.datasets.mnist.load("subset")
    monkeypatch.setattr(td.datasets.mnist, "load", offline)
    said = run("train_mnist", *MNIST, "--data", "full", "--out", tmp_path, capsys=capsys)
    assert said.err.splitlines()[0] == "using the subset: no network"
    assert td.load_model(tmp_path / "model.safetensors")[1]["data"] == "subset"


# What goes wrong


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("train_toy2d", ["--shape", "bananas"], ["shape", "bananas", "moons", "heart"]),
        ("train_toy2d", ["--steps", "0"], ["--steps", "'0'", "at least 1"]),
        ("train_toy2d", ["--steps", "many"], ["--steps", "'many'"]),
        ("train_toy2d", ["--seed", "-1"], ["--seed", "'-1'"]),
        ("train_toy2d", ["--lr", "nan"], ["--lr", "'nan'", "positive"]),
        ("train_toy2d", ["--T", "20", "--sampling-steps", "21"], ["--sampling-steps", "21", "20"]),
        ("train_toy2d", ["--backend", "abacus"], ["--backend", "abacus", "cupy"]),
        ("train_toy2d", ["--backend"], ["--backend", "expected one argument"]),
        ("train_toy2d", ["--batch", "few"], ["--batch", "'few'", "at least 1, nor auto"]),
        ("train_toy2d", ["--device", "0"], ["device is 0", "numpy", "TINYDIFF_BACKEND=cupy"]),
        ("train_toy2d", ["--device", "x"], ["--device", "'x'"]),
        ("train_toy2d", ["--tf32"], ["--tf32", "--backend cupy"]),
        ("train_toy2d", ["--workers", "0"], ["--workers", "'0'", "at least 1"]),
        ("train_toy2d", ["--unknown"], ["--unknown"]),
        ("train_toy2d", ["--schedule", "flow", "--prediction", "eps"], ["--prediction", "noise alone"]),
        ("train_toy2d", ["--schedule", "flow", "--sampler", "edm"], ["--sampler", "noise alone", "heun can"]),
        ("train_toy2d", ["--lr", "1e30"], ["loss", "smaller lr"]),
        ("train_mnist", ["--samples", "0"], ["--samples", "'0'"]),
        ("train_mnist", ["--channels", "8", "9"], ["9", "8"]),
        ("train_mnist", ["--digits", "3"], ["--digits", "--classes"]),
        ("train_mnist", ["--guidance", "3"], ["--guidance", "--classes"]),
        ("train_mnist", ["--classes", "--digits", "3", "ten"], ["--digits", "'ten'", "0 to 9"]),
        ("train_mnist", ["--channels", "8", "8", "8", "8"], ["28", "divisible by 8"]),
    ],
)
def test_a_mistake_ends_in_one_sentence(name, flags, words, tmp_path, capsys):
    said = run(name, "--out", tmp_path / "out", "--quiet", *flags, capsys=capsys, expect=2)
    assert said.out == "" and len(said.err.splitlines()) == 1
    for word in words:
        assert word in said.err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("variable", "value", "flags", "words"),
    [
        ("TINYDIFF_BACKEND", "abacus", [], ["TINYDIFF_BACKEND", "abacus", "numpy"]),
        ("TINYDIFF_DATA", "nowhere", ["--data", "full"], ["TINYDIFF_DATA", "nowhere", "train-images"]),
        ("TINYDIFF_DATA", "~nobody-so", ["--data", "full"], ["TINYDIFF_DATA, ", "nobody-so"]),
    ],
)
def test_a_wrong_environment_ends_in_one_sentence(
    variable, value, flags, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(variable, value)
    said = run("train_mnist", *MNIST, *flags, "--out", tmp_path / "out", capsys=capsys, expect=2)
    assert said.out == "" and len(said.err.splitlines()) == 1 and all(word in said.err for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["tinydiff", "array_api_compat"])
def test_without_tinydiff_a_demo_says_how_to_install_it(missing, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("tinydiff", missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf'{missing}.*pip install "\.\[demos\]"'):
        demo("_common")


@pytest.mark.parametrize(("missing", "flags"), [("cupy", ["--backend", "cupy"]), ("matplotlib", [])])
def test_a_missing_library_is_named_before_anything_is_trained(missing, flags, tmp_path, capsys, monkeypatch):
    module = demo("train_toy2d")
    monkeypatch.setitem(sys.modules, missing, None)
    said = run(module, *TOY, *flags, "--out", tmp_path / "out", capsys=capsys, expect=2)
    assert len(said.err.splitlines()) == 1 and "pip install" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "out",
    [
        "x" * 300,
        pytest.param(
            "~nobody-of-this-name/run",
            marks=pytest.mark.skipif(os.name == "nt", reason="Windows takes any name for that of a user"),
        ),
    ],
)
def test_an_out_that_is_out_of_reach_ends_in_one_sentence(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("train_toy2d", *TOY, "--out", out, "--quiet", capsys=capsys, expect=2)
    assert len(said.err.splitlines()) == 1 and out in said.err
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_a_file_is_left_alone(tmp_path, capsys):
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    said = run("train_toy2d", *TOY, "--out", path, capsys=capsys, expect=2)
    assert "--out" in said.err and "not a directory" in said.err
    assert path.read_text() == "years of work"


@pytest.mark.parametrize("name", ["samples.npy", "metrics.json"])
def test_what_a_full_disk_refuses_is_named_and_the_old_file_stays(name, tmp_path, full_disk):
    common = demo("_common")
    write = {
        "samples.npy": lambda n: common.write_samples(tmp_path, np.zeros((n, 2))),
        "metrics.json": lambda n: common.write_metrics(argparse.Namespace(out=tmp_path), losses=[0.5] * n),
    }[name]
    write(1)
    before = (tmp_path / name).read_bytes()
    with full_disk(), pytest.raises(OSError, match=name):
        write(1000)
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


# On a GPU


@pytest.fixture
def accelerator(monkeypatch):
    """The cupy backend, but its arrays are those of array-api-strict, on a device that is not the host."""
    where = space("strict")
    monkeypatch.setattr(td.backend, "_cupy_namespace", lambda number=None: OnDevice(where.device))
    return where


def test_the_cupy_backend_has_defaults_of_its_own(monkeypatch, capsys):
    mnist = demo("train_mnist")
    ours, theirs = mnist.DEFAULTS, {**mnist.DEFAULTS, **mnist.ON_A_GPU}
    for environment, flags, expected in [
        ("", [], ours),
        ("cupy", [], theirs),
        ("", ["--backend", "cupy"], theirs),
        ("", ["--backend=cupy"], theirs),
        ("cupy", ["--backend", "numpy"], ours),
        ("cupy", ["--steps", "7", "--data", "subset"], {**theirs, "steps": 7, "data": "subset"}),
    ]:
        monkeypatch.setenv("TINYDIFF_BACKEND", environment)
        args = vars(mnist.parse(flags))
        assert {key: args[key] for key in expected} == expected
        assert args["largest_batch"] == (1024 if expected["steps"] != ours["steps"] else ours["batch"])
    with pytest.raises(SystemExit):
        mnist.main(["--help"])
    said = capsys.readouterr().out.partition("with --backend cupy the defaults are")[2]
    for key, value in mnist.ON_A_GPU.items():
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        assert f"--{key.replace('_', '-')} {value}" in said


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train_toy2d", [*TOY, "--shape", "rings"]),
        ("train_mnist", [*MNIST, "--data", "subset", "--lr", "0.002"]),
    ],
)
def test_the_whole_demo_on_a_device_that_is_not_the_host(
    name, flags, toy, digits, tmp_path, monkeypatch, accelerator
):
    trained = []

    def train(model, *args, **kwargs):
        trained.append(model)
        return original(model, *args, **kwargs)

    original = td.train
    monkeypatch.setattr(td, "train", train)
    monkeypatch.setenv("TINYDIFF_BACKEND", "cupy")
    run(name, *flags, "--out", tmp_path, "--quiet", "--device", "0")
    for p in trained[0].named_parameters().values():
        assert_there(p.value, accelerator, "float32", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES + PICTURES)
    samples = np.load(tmp_path / "samples.npy")
    assert samples.dtype == np.float32
    on_the_host = np.load((toy if name == "train_toy2d" else digits) / "samples.npy")
    np.testing.assert_allclose(samples, on_the_host, atol=1e-3)
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert (settings["backend"], settings["device"], settings["tf32"]) == ("cupy", 0, False)


def test_the_settings_say_where_it_ran(toy, monkeypatch, accelerator):
    import _common

    settings = json.loads((toy / "metrics.json").read_text())["settings"]
    assert (settings["backend"], settings["device"], settings["tf32"]) == ("numpy", None, False)
    for backend, tf32, flags, expected in [
        ("", "1", [], ("numpy", None, False)),
        (" CuPy", "", [], ("cupy", 0, False)),
        ("numpy", "1", ["--backend", "cupy", "--device", "1"], ("cupy", 1, True)),
        ("cupy", "1", ["--backend", "numpy"], ("numpy", None, False)),
    ]:
        monkeypatch.setenv("TINYDIFF_BACKEND", backend)
        monkeypatch.setenv("CUPY_TF32", tf32)
        args = demo("train_mnist").parse(flags)
        _common.choose_device(args)
        assert (args.backend, args.device, args.tf32) == expected


def test_tf32_is_cupys_own_setting(monkeypatch, accelerator):
    import _common

    for flags, expected in [([], "0"), (["--tf32"], "1")]:
        monkeypatch.setenv("CUPY_TF32", "0")
        _common.choose_device(demo("train_mnist").parse(["--backend", "cupy", *flags]))
        assert os.environ["CUPY_TF32"] == expected


def test_batch_auto_is_what_fits_or_that_of_the_run_which_is_resumed(toy, tmp_path, monkeypatch, capsys):
    import _common

    tried = []

    def find(model, diffusion, data, **how):
        tried.append((model, diffusion, data, how))
        return 32

    monkeypatch.setattr(td, "find_batch_size", find)
    for out, flags, batch in [
        (tmp_path, [], 32),
        (tmp_path, ["--resume"], 32),  # there is nothing to resume
        (toy, ["--resume"], 16),  # what fits now is another question
        (toy, ["--batch", "8"], 8),
    ]:
        flags = ["--backend", "cupy", "--batch", "auto", "--out", str(out), *flags]
        args = demo("train_mnist").parse(flags)
        _common.settle_batch(args, "model", "diffusion", "data", "8bit")
        assert args.batch == batch
        assert capsys.readouterr().out == ("" if batch == 8 else f"--batch {batch}\n")
    how = dict(loss="simple", decoder="8bit", most=1024)
    assert tried == [("model", "diffusion", "data", how)] * 2


def test_resume_says_where_there_is_no_run_to_continue(toy, tmp_path, capsys):
    import _common

    begins = f"no checkpoint in {tmp_path}: the run begins with step 1\n"
    for out, flags, said in [
        (tmp_path, ["--resume"], begins),
        (tmp_path, ["--resume", "--quiet"], ""),
        (tmp_path, [], ""),
        (toy, ["--resume"], ""),
    ]:
        _common.say_if_nothing_resumes(demo("train_mnist").parse(["--out", str(out), *flags]))
        assert capsys.readouterr().out == said


@pytest.mark.usefixtures("no_pictures")
def test_batch_auto_on_the_host_is_at_most_the_default(tmp_path):
    run("train_mnist", *MNIST, "--batch", "auto", "--steps", "1", "--out", tmp_path, "--quiet")
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["batch"] in (16, 32, 64)


def test_a_worker_that_fails_ends_in_one_sentence(tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise td.parallel.WorkerError("a worker process has ended unexpectedly; workers=1 does without.")

    monkeypatch.setattr(td, "train", fails)
    said = run("train_toy2d", *TOY, "--out", tmp_path, "--quiet", capsys=capsys, expect=2)
    assert len(said.err.splitlines()) == 1 and "workers=1" in said.err


def test_out_of_memory_ends_in_one_sentence(tmp_path, capsys, monkeypatch):
    def too_little(model, x, t, rng=None):
        if x.shape[0] > 5:
            raise MemoryError("Out of memory allocating 1,024 bytes (allocated so far: 0 bytes).")
        return original(model, x, t, rng)

    original = td.MLP.__call__
    monkeypatch.setattr(td.MLP, "__call__", too_little)
    said = run("train_toy2d", *TOY, "--out", tmp_path, "--quiet", capsys=capsys, expect=2)
    assert len(said.err.splitlines()) == 1 and "try batch_size=4" in said.err


# Interruption


class Interrupting:
    """toy2d.sample, but the user presses Ctrl-C, or somebody sends a signal, at the given training step."""

    def __init__(self, at, by):
        self.batches, self.at, self.by, self.sample = 0, at, by, td.datasets.toy2d.sample

    def __call__(self, name, n, rng):
        self.batches += n == 16
        if self.batches > self.at:
            if self.by == "Ctrl-C":
                raise KeyboardInterrupt
            signal.raise_signal(getattr(signal, self.by))
        return self.sample(name, n, rng)


def interrupted(tmp_path, capsys, at, by="Ctrl-C", more=()):
    """Run a toy demo that is interrupted at a step; return what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(td.datasets.toy2d, "sample", Interrupting(at, by))
        flags = [*TOY, "--shape", "rings", "--out", tmp_path, "--quiet", *more]
        return run("train_toy2d", *flags, capsys=capsys, expect=130)


def test_an_interrupted_run_keeps_a_checkpoint_from_which_resume_makes_the_same(toy, tmp_path, capsys):
    said = interrupted(tmp_path, capsys, at=14)
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "checkpoint.safetensors" in said.err and "--resume" in said.err
    assert load_arrays(tmp_path / "checkpoint.safetensors")[1]["step"] == 14

    flags = [*TOY, "--shape", "rings", "--out", tmp_path, "--quiet"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused = run("train_toy2d", *flags, capsys=capsys, expect=2)
    assert len(refused.err.splitlines()) == 1 and "--resume" in refused.err and "step 14 of 30" in refused.err
    changed = run("train_toy2d", *flags, "--resume", "--lr", "0.5", capsys=capsys, expect=2)
    assert len(changed.err.splitlines()) == 1 and "lr was" in changed.err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}, "something was changed"

    run("train_toy2d", *flags, "--resume")
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), np.load(toy / "samples.npy"))
    for name in PICTURES:
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes(), name
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured["training_seconds"] == last["seconds"], "of the run, not of the last call"


@pytest.mark.parametrize("by", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_it_leaves_a_checkpoint_unless_it_is_ignored(by, tmp_path, capsys):
    """As a cluster, and a terminal that is closed, end it; but not after nohup."""
    if not hasattr(signal, by):
        pytest.skip("this system has no such signal")
    end = getattr(signal, by)
    before = signal.signal(end, signal.SIG_DFL)
    try:
        said = interrupted(tmp_path, capsys, at=14, by=by)
        assert said.out == "" and len(said.err.splitlines()) == 1
        assert "checkpoint.safetensors" in said.err and "--resume" in said.err
        assert load_arrays(tmp_path / "checkpoint.safetensors")[1]["step"] == 14
        signal.signal(end, signal.SIG_IGN)
        with demo("_common").explained_errors(tmp_path):
            signal.raise_signal(end)
        assert signal.getsignal(end) == signal.SIG_IGN
    finally:
        signal.signal(end, before)


def test_ctrl_c_before_the_first_step_promises_no_checkpoint(tmp_path, capsys):
    said = interrupted(tmp_path, capsys, at=0)
    assert len(said.err.splitlines()) == 1 and "nothing of this run is kept" in said.err
    run("train_toy2d", *TOY, "--seed", "5", "--out", tmp_path, "--quiet")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert interrupted(tmp_path, capsys, at=0).err == said.err, "the checkpoint is that of another run"
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_ctrl_c_before_the_next_step_of_a_resumed_run_promises_the_checkpoint_that_was_there(
    tmp_path, capsys
):
    said = interrupted(tmp_path, capsys, at=14)
    assert interrupted(tmp_path, capsys, at=0, more=["--resume"]).err == said.err


@pytest.mark.parametrize("why", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("too much")])
def test_what_fails_after_the_training_does_not_cost_the_training(why, toy, tmp_path, capsys, monkeypatch):
    """Without --resume the same command would train again."""
    flags = [*TOY, "--shape", "rings", "--out", tmp_path, "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(td.plotting, "save", raising(None, at=0, error=why))
        sentence, hint = run("train_toy2d", *flags, capsys=capsys, expect=2).err.splitlines()
        assert str(why) in sentence and "checkpoint.safetensors" in hint and "--resume" in hint
        patch.setattr(td.plotting, "save", raising(None, at=0, error=why))
        again = run("train_toy2d", *flags, "--resume", capsys=capsys, expect=2)
        assert again.err.splitlines() == [sentence], "nothing new is kept"
    monkeypatch.setattr(td.datasets.toy2d, "sample", Interrupting(0, "Ctrl-C"))  # at a step of training
    run("train_toy2d", *flags, "--resume")
    for name in ("samples.npy", *PICTURES):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes(), name


# The comparison of schedules

COMPARE = ["--T", "20", "--batch", "2", "--channels", "8", "8", "--steps", "4", "--samples", "8"]
COMPARE += ["--draws", "16", "--sampling-steps", "5", "2", "--only", "learned", "linear-simple", "cosine-vlb"]


@pytest.fixture(scope="module")
def few_digits():
    """The data are small, so that their features are soon there."""
    images, labels = td.datasets.mnist.load("subset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(td.datasets.mnist, "load", lambda split="subset": (images[:1300], labels[:1300]))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, few_digits):
    out = tmp_path_factory.mktemp("compare")
    run("compare_schedules", *COMPARE, "--out", out, "--quiet")
    return out


def test_the_comparison_leaves_a_table_a_picture_and_the_numbers(compared):
    rows = json.loads((compared / "metrics.json").read_text())["rows"]
    assert [(row["schedule"], row["loss"], row["variance"]) for row in rows] == [
        ("linear", "simple", "fixed_large"),
        ("linear", "simple", "fixed_small"),
        ("cosine", "vlb", "learned_range"),
        ("learned", "continuous bound", "fixed_large"),
        ("learned", "continuous bound", "fixed_small"),
    ]
    table = (compared / "table.md").read_text(encoding="utf-8")
    for row in rows:
        assert list(row["bound"]) == ["2", "5", "20"] and list(row["frechet_distance"]) == ["2", "5"]
        for measured in row["bound"].values():
            assert 0 < measured["L_0"] < measured["value"] and measured["standard_error"] > 0
            assert f"{measured['value']:.3f} ± {measured['standard_error']:.3f}" in table
        for number in row["frechet_distance"].values():
            assert number > 0 and f"{number:.2f}" in table
    with Image.open(compared / "compare.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 16


@pytest.mark.skipif(not td.parallel._can_fork(), reason="needs a system that forks")
@pytest.mark.parametrize(
    ("name", "flags", "times"),
    [
        ("train_toy2d", TOY, 2),  # training, sampling
        ("train_mnist", MNIST, 2),
        # Training, and for each of two variances three measurements.
        ("compare_schedules", [*COMPARE, "--sampling-steps", "2", "--only", "learned"], 7),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_workers_share_whatever_takes_time(name, flags, times, tmp_path, few_digits, monkeypatch):
    asked = []

    class Noted(td.parallel.DataParallel):
        def __init__(self, model, workers):
            asked.append(workers)
            super().__init__(model, workers)

    monkeypatch.setattr(td.parallel, "DataParallel", Noted)
    run(name, *flags, "--workers", "2", "--out", tmp_path, "--quiet")
    assert asked == [2] * times
    asked.clear()
    run(name, *flags, "--workers", "1", "--out", tmp_path / "alone", "--quiet")
    assert asked == []


def test_what_was_compared_is_not_made_again(compared, capsys, monkeypatch):
    before = {name: (compared / name).read_bytes() for name in ("table.md", "compare.png")}

    def never(*args, **kwargs):
        raise AssertionError("made again")

    module = demo("compare_schedules")
    monkeypatch.setattr(td, "sample", never)
    monkeypatch.setattr(td.training, "training_loss", never)
    monkeypatch.setattr(td.schedule_training, "learned_schedule_loss", never)
    monkeypatch.setattr(module, "step_term", never)
    assert run(module, *COMPARE, "--out", compared, "--quiet", capsys=capsys) == ("", "")
    assert before == {name: (compared / name).read_bytes() for name in before}
    # Nor is it given for what it is not.
    for flags, words in [(["--lr", "0.5"], ["lr was"]), (["--lr", "0.5", "--only", "learned"], ["lr was"])]:
        said = run(module, *COMPARE, *flags, "--out", compared, capsys=capsys, expect=2)
        assert all(word in said.err.splitlines()[-1] for word in words)


@pytest.mark.parametrize(("owner", "name", "at"), [(td.training, "training_loss", 6), (td, "sample", 3)])
@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_comparison_continues(owner, name, at, compared, tmp_path, capsys, monkeypatch):
    flags = [*COMPARE, "--out", tmp_path, "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(getattr(owner, name), at))
        said = run("compare_schedules", *flags, capsys=capsys, expect=130)
    assert len(said.err.splitlines()) == 1 and "same command continues" in said.err
    run("compare_schedules", *flags)
    assert (tmp_path / "table.md").read_bytes() == (compared / "table.md").read_bytes()


def test_the_comparison_s_bound_is_the_bound():
    """From even draws of t, the mean of the complete sum (5 sigma) and the variance of uniform draws."""
    module, T = demo("compare_schedules"), 20
    diffusion = td.GaussianDiffusion(td.cosine_schedule(T), "v", "fixed_large")
    x = td.datasets.mnist.to_model_range(td.datasets.mnist.load()[0][:60])

    class Guessing(td.MLP):
        """All that is asked of a network, and knows a little about digits."""

        def predict(self, x, t):
            return diffusion.predict_v(x, np.asarray(t), np.clip(x - 0.5, -1, 1), given="x0")

    model = Guessing()
    parser = module.Plain("", "", out="", defaults=module.DEFAULTS)
    args = parser.parse_args(["--quiet"])
    args.draws = 2000
    found = module.bound(model, diffusion, T, x, args)
    whole = td.bits_per_dim(model, diffusion, x, rng=np.random.default_rng(1), progress=False)
    error = np.hypot(found["standard_error"], whole.standard_error)
    assert error < 0.05 * whole.value and abs(found["value"] - whole.value) < 5 * error
    assert found["L_0"] == pytest.approx(whole.L_t[0], rel=0.1)
    rng, n = np.random.default_rng(2), 4000
    t, chosen = rng.integers(T, size=n), rng.integers(len(x), size=n)
    x0 = x[chosen]
    x_t = diffusion.q_sample(x0, t, rng.standard_normal(x0.shape, dtype=np.float32))
    terms = td.bound.step_term(diffusion, model.predict(x_t, t), x0, x_t, t, "8bit", clip=True)[0]
    draws = T * terms / (784 * np.log(2))
    assert found["variance"] == pytest.approx(np.var(draws), rel=0.2)
    later = (T - 1) / T * draws[t > 0]
    assert found["variance_without_L_0"] == pytest.approx(np.var(later), rel=0.2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "quadratic"], ["--only", "quadratic", "cosine-hybrid"]),
        (["--T", "20", "--sampling-steps", "5", "21"], ["--sampling-steps", "21", "20"]),
        (["--samples", "1"], ["--samples", "at least 2"]),
        (["--T", "1", "--sampling-steps", "1"], ["--T", "at least 2"]),
    ],
)
def test_a_mistake_in_a_comparison_ends_in_one_sentence(flags, words, tmp_path, capsys):
    said = run("compare_schedules", *flags, "--out", tmp_path / "out", capsys=capsys, expect=2)
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words) and not (tmp_path / "out").exists()


def test_help_of_the_comparison_names_its_defaults(capsys):
    module = demo("compare_schedules")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag, value in module.DEFAULTS.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        assert f"--{flag.replace('_', '-')} " in text and f"(default: {shown}" in text
    for name in module.CONFIGURATIONS:
        assert name in text.replace("- ", "-")  # a line may be broken there
    assert "None" not in text and "python demos/compare_schedules.py --" in text


# The gallery


def leave_a_run(out, samples, ratio=1.0):
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps({"ratio": ratio}))
    np.save(out / "samples.npy", samples)


def test_the_gallery_shows_each_shape_above_its_samples_and_the_digits_in_order(tmp_path):
    gallery, rng = demo("gallery"), np.random.default_rng(0)
    shapes = td.datasets.toy2d.SHAPES
    drawn = {shape: rng.standard_normal((5000, 2)) for shape in shapes}
    for k, (shape, samples) in enumerate(drawn.items()):
        leave_a_run(tmp_path / shape, samples, ratio=1 + k / 8)
    digits = rng.uniform(-1, 1, (80, 28, 28, 1))
    *panels, sheet = gallery.draw({shape: tmp_path / shape for shape in shapes}, digits).axes
    data_rng = np.random.default_rng(0)
    for k, shape in enumerate(shapes):
        data, samples = panels[2 * k : 2 * k + 2]
        for row, ax in enumerate((data, samples)):
            place = ax.get_subplotspec()
            assert (place.rowspan.start, place.colspan.start) == (row, k)
            assert ax.get_xlim() == ax.get_ylim() == panels[0].get_xlim()
        assert data.get_title() == shape.replace("_", " ")
        assert samples.get_xlabel() == f"{1 + k / 8:.2f} × floor"
        for ax, points in ((data, td.datasets.toy2d.sample(shape, 4000, data_rng)), (samples, drawn[shape])):
            (dots,) = ax.collections
            np.testing.assert_array_equal(dots.get_offsets(), points[:4000])
    assert (panels[0].get_ylabel(), panels[1].get_ylabel()) == ("data", "samples")
    (image,) = sheet.images
    assert image.get_clim() == (-1, 1)
    tiles = np.asarray(image.get_array()).reshape(3, 28, 24, 28).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(tiles.reshape(72, 28, 28), digits[:72, :, :, 0])


def test_the_gallery_without_matplotlib_says_what_is_missing(monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    gallery = demo("gallery")
    for flags, code in ((["--help"], 0), (["--runs", str(tmp_path)], 2)):
        monkeypatch.setattr(sys, "argv", ["gallery.py", *flags])
        with pytest.raises(SystemExit) as end:
            gallery.main()
        assert end.value.code == code
    said = capsys.readouterr()
    assert said.out.startswith("usage: gallery.py") and "where the sheet goes" in said.out
    assert said.err == 'gallery.py: Pictures need matplotlib: pip install "tinydiff[demos]".\n'


def test_the_gallery_makes_what_is_missing_and_nothing_again(tmp_path, monkeypatch, capsys):
    gallery, rng, asked, code = demo("gallery"), np.random.default_rng(0), [], 0

    def run(command):
        python, demo, *flags, out = command
        asked.append((demo.name, *flags, out.name))
        assert python == sys.executable and demo.is_file()
        points = demo.name == "train_toy2d.py"
        if not code:
            leave_a_run(out, rng.uniform(-1, 1, (10, 2) if points else (72, 28, 28, 1)))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    runs, picture = tmp_path / "runs", tmp_path / "new" / "gallery.png"
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--runs", str(runs), "--out", str(picture)])
    gallery.main()
    assert asked == [
        *[
            ("train_toy2d.py", "--shape", shape, "--resume", "--out", f"toy2d-{shape}")
            for shape in td.datasets.toy2d.SHAPES
        ],
        ("sample_mnist.py", "--samples", "72", "--out", "gallery-digits"),
    ]
    assert capsys.readouterr().out == f"{picture}\n"
    with Image.open(picture) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 16
    asked.clear()
    gallery.main()
    assert asked == []
    (runs / "toy2d-rings" / "metrics.json").unlink()  # as where it was interrupted
    code = 3
    with pytest.raises(SystemExit) as end:
        gallery.main()
    assert end.value.code == 3 and [name for name, *_ in asked] == ["train_toy2d.py"]


def test_the_interrupted_gallery_asks_for_no_flag_that_it_does_not_have(tmp_path, monkeypatch, capsys):
    gallery = demo("gallery")
    monkeypatch.setattr(subprocess, "run", raising(None, at=0))
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gallery.main()
    said = capsys.readouterr().err
    assert end.value.code == 130 and "no --resume" in said and "the same command continues" in said


def test_tilde_is_the_home_folder_also_where_no_shell_has_expanded_it(tmp_path, monkeypatch, capsys):
    gallery, asked = demo("gallery"), []
    for name in ("HOME", "USERPROFILE"):  # the second on Windows
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(gallery, "run", asked.append)
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--runs=~/runs", "--out=~/sheet.png"])
    gallery.main()
    assert [(args.runs, args.out) for args in asked] == [(tmp_path / "runs", tmp_path / "sheet.png")]
    flags = ["--model=~/mine.safetensors", "--out=~/drawn", "--quiet"]
    said = run("sample_mnist", *flags, capsys=capsys, expect=2)
    assert said.err.endswith(f": no file at {tmp_path / 'mine.safetensors'}.\n")


def test_as_a_program_in_another_directory(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(DEMOS.parent)}
    command = [sys.executable, str(DEMOS / "train_toy2d.py"), *TOY, "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "runs" / "toy2d-moons" / "samples.png").exists()
    done = subprocess.run(
        [*command, "--shape", "x"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("train_toy2d.py: ")
