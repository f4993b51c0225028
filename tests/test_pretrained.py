"""A saved model says which process it was trained for, and sample_mnist.py draws from it."""

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import failing
from scripts import DEMOS, run, script

import tinydiff as td
from tinydiff import pretrained

ABOUT = {"schedule": "cosine", "T": 12, "prediction": "v"}


def tiny(**changes):
    arguments = dict(block_channels=[8, 8], layers_per_block=1, attention=[False, True], norm_groups=4)
    model = td.UNet(**{**arguments, **changes}, rng=np.random.default_rng(5))
    for p in model.named_parameters().values():  # a fresh network predicts 0 whatever it is asked
        p.value = p.value + np.float32(0.1)
    return model


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    td.save_model(path, tiny(), ABOUT)
    return path


@pytest.fixture
def demo(monkeypatch, capsys):
    """Run sample_mnist.py in this process; return what it said."""
    monkeypatch.syspath_prepend(DEMOS)
    monkeypatch.setattr(sys, "argv", ["sample_mnist.py"])
    return functools.partial(run, script(DEMOS / "sample_mnist.py"), capsys=capsys)


# The process from the metadata


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("variance", [None, "fixed_large"])
def test_metadata_suffices_to_rebuild_the_process(schedule, variance, tmp_path):
    about = {**ABOUT, "schedule": schedule} | ({"variance": variance} if variance else {})
    td.save_model(tmp_path / "m.safetensors", tiny(), about)
    model, diffusion, metadata = pretrained.load(tmp_path / "m.safetensors")
    expected = getattr(td, f"{schedule}_schedule")(12)
    np.testing.assert_array_equal(diffusion.schedule.betas, expected.betas)
    assert diffusion.prediction == "v" and diffusion.variance == (variance or "fixed_small")
    assert metadata["T"] == 12
    for name, value in tiny().state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value)


def test_a_schedule_that_is_none_of_the_demos_is_known_by_its_betas(tmp_path):
    schedule = td.linear_schedule(100, 1e-3, 0.1)
    process = td.GaussianDiffusion(schedule, "v", "fixed_large")
    td.save_model(tmp_path / "m.safetensors", tiny(), {"data": "digits"}, diffusion=process)
    _, diffusion, metadata = pretrained.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(diffusion.schedule.betas, schedule.betas)
    assert diffusion.prediction == "v" and diffusion.variance == "fixed_large"
    assert metadata["data"] == "digits"
    with pytest.raises(TypeError, match="diffusion is a NoiseSchedule; expected a GaussianDiffusion"):
        td.save_model(tmp_path / "n.safetensors", tiny(), diffusion=schedule)
    with pytest.raises(TypeError, match="metadata is a GaussianDiffusion, which goes to diffusion; expected"):
        td.save_model(tmp_path / "n.safetensors", tiny(), process)
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"betas": [0.1, 2.0]}, ["betas[1] is 2.0"]),
        ({"betas": "many"}, ["betas"]),
        ({"betas": [0.1], "prediction": None}, ["does not say the prediction"]),
        (
            {"schedule": None},
            ["does not say the schedule", "load_model", "save_model(path, model, diffusion="],
        ),
        ({"T": None}, ["does not say the T"]),
        ({"prediction": None}, ["does not say the prediction"]),
        ({"schedule": "quadratic"}, ["'quadratic'", "linear", "cosine"]),
        ({"schedule": ["linear"]}, ["schedule ['linear']", "cosine"]),
        ({"T": -1}, ["T is -1"]),
        ({"T": "many"}, ["T is", "many"]),
        ({"prediction": "score"}, ["prediction", "score"]),
        ({"variance": "none"}, ["variance", "none"]),
    ],
)
def test_metadata_that_does_not_suffice(change, words, tmp_path):
    about = {k: v for k, v in {**ABOUT, **change}.items() if v is not None}
    path = tmp_path / "m.safetensors"
    td.save_model(path, tiny(), about)
    with pytest.raises(ValueError) as caught:
        pretrained.load(path)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file at"):
        pretrained.load(tmp_path / "m.safetensors")
    for name, flag in (("MNIST", ""), ("MNIST_CLASSES", " --classes")):
        monkeypatch.setattr(pretrained, name, tmp_path / f"{name}.safetensors")
        with pytest.raises(FileNotFoundError, match=rf"without {name}\.safe.*train_mnist\.py{flag}`"):
            td.pretrained.mnist(classes=bool(flag))


def test_mnist_is_the_packages_file(saved, monkeypatch):
    assert pretrained.MNIST.parent == Path(td.__file__).parent / "pretrained"
    monkeypatch.setattr(pretrained, "MNIST", saved)
    model, diffusion, _ = td.pretrained.mnist()
    rng = np.random.default_rng(0)
    x = td.sample(model, diffusion, (2, 28, 28, 1), steps=3, clip=True, rng=rng, progress=False)
    assert x.shape == (2, 28, 28, 1) and np.isfinite(x).all()


@pytest.mark.parametrize("classes", [False, True])
def test_the_shipped_weights_are_of_digits_and_small(classes):
    file = pretrained.MNIST_CLASSES if classes else pretrained.MNIST
    if not file.is_file():
        pytest.skip("the weights are not in this checkout")
    model, diffusion, about = td.pretrained.mnist(classes=classes)
    assert file.stat().st_size <= 5e6
    assert model.config["in_channels"] == 1 and about["T"] == diffusion.T
    assert model.config.get("num_classes") == (10 if classes else None)
    card = file.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{sum(p.value.size for p in model.named_parameters().values()):,} numbers" in card
    assert f"--data {about['data']} " in card and f"--steps {about['steps']} " in card
    assert f"Seed {about['seed']};" in card and f"{about['schedule']} schedule of {about['T']} steps" in card
    rng = np.random.default_rng(0)
    asked = np.array([3, 1, 4, 1, 5, 9, 2, 6, 7, 0, 8]) if classes else None
    how = dict(labels=asked, clip=True, rng=rng, progress=False)
    x = td.sample(model, diffusion, (11, 28, 28, 1), "ddim", 15, **how)
    read = td.metrics.digits.digit_probabilities(x)
    assert read.max(axis=1).mean() > 0.8
    assert asked is None or np.mean(np.argmax(read, axis=1) == asked) > 0.8


# The demo


def test_it_leaves_what_it_promises(saved, demo, tmp_path, monkeypatch):
    out, said_in, save = tmp_path / "new" / "run", {}, td.plotting.save

    def noted(fig, path):
        said_in[path.name] = [text.get_text() for text in fig.texts]
        save(fig, path)

    monkeypatch.setattr(td.plotting, "save", noted)
    said = demo("--model", saved, "--out", out, "--samples", 5, "--sampling-steps", 4, "--quiet")
    assert said == ("", "")
    assert sorted(p.name for p in out.iterdir()) == [
        "metrics.json",
        "reverse.png",
        "samples.npy",
        "samples.png",
    ]
    assert "4 DDPM steps" in said_in["samples.png"]
    samples = np.load(out / "samples.npy")
    assert samples.shape == (5, 28, 28, 1) and samples.dtype == np.float32 and np.abs(samples).max() <= 1
    for name in ["samples.png", "reverse.png"]:
        with Image.open(out / name) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 16
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 5 and metrics["sampling_seconds"] > 0 and "digits" not in metrics
    assert metrics["settings"]["sampling_steps"] == 4 and metrics["trained"]["prediction"] == "v"
    assert metrics["pixels"]["samples"]["mean"] == pytest.approx(samples.mean(), rel=1e-4)
    data = td.datasets.mnist.to_model_range(td.datasets.mnist.load()[0])
    assert metrics["pixels"]["data"]["mean"] == pytest.approx(data.mean(), rel=1e-4)
    assert metrics["seconds_a_digit"] == pytest.approx(metrics["sampling_seconds"] / 5, abs=1e-3)


@pytest.mark.parametrize(
    ("sampler", "steps", "title"),
    [("heun", 1, "1 Heun step"), ("dpm++", 2, "2 DPM++ steps"), ("edm", 1, "1 EDM step")],
)
@pytest.mark.usefixtures("no_pictures")
def test_title_and_last_line_count_as_one_speaks(sampler, steps, title, saved, demo, tmp_path, monkeypatch):
    titles, draw = [], td.plotting.samples_beside_data
    monkeypatch.setattr(td.plotting, "samples_beside_data", lambda *a: titles.append(a[2]) or draw(*a))
    walk = ("--sampler", sampler, "--sampling-steps", steps)
    said, _ = demo("--model", saved, "--out", tmp_path, "--samples", steps, *walk)
    assert titles == [title] and f"{steps} digit{'s' * (steps - 1)} in " in said


@pytest.mark.usefixtures("no_pictures")
def test_a_training_is_looked_at_before_it_ends(demo, tmp_path):
    data = failing(np.full((4, 28, 28, 1), -1, np.float32), 3, KeyboardInterrupt())
    process, how = td.GaussianDiffusion(td.linear_schedule(9)), dict(steps=5, batch_size=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        td.train(tiny(), process, data, **how, run_dir=tmp_path / "run")
    out = tmp_path / "out"
    demo("--model", tmp_path / "run" / "checkpoint.safetensors", "--out", out, "--samples", 2, "--quiet")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trained"]["step"] == 3 and metrics["settings"]["sampling_steps"] == 9
    assert "betas" not in metrics["trained"]


@pytest.mark.usefixtures("no_pictures")
def test_the_seed_decides_and_so_does_the_sampler(saved, demo, tmp_path):
    def samples(*flags):
        demo(
            "--model",
            saved,
            "--out",
            tmp_path / "out",
            "--samples",
            2,
            "--sampling-steps",
            3,
            "--quiet",
            *flags,
        )
        return np.load(tmp_path / "out" / "samples.npy")

    first = samples()
    np.testing.assert_array_equal(samples(), first)
    for flags in [("--seed", 1), ("--sampler", "ddim"), ("--sampling-steps", 2)]:
        assert not np.array_equal(samples(*flags), first), flags


@pytest.mark.usefixtures("no_pictures")
def test_by_default_it_walks_at_most_the_steps_there_are(saved, demo, tmp_path):
    demo("--model", saved, "--out", tmp_path / "out", "--samples", 1, "--quiet")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["sampling_steps"] == 12
    for T, steps in ((12, 12), (60, 50)):
        args = argparse.Namespace(sampling_steps=None, report=False, digits=None, guidance=None)
        diffusion = td.GaussianDiffusion(td.cosine_schedule(T))
        importlib.import_module("sample_mnist").check(args, tiny(), diffusion, default_steps=50)
        assert args.sampling_steps == steps


@pytest.mark.usefixtures("no_pictures")
def test_the_report_is_the_digits_report(saved, demo, tmp_path):
    said = demo("--model", saved, "--out", tmp_path, "--samples", 4, "--sampling-steps", 2, "--report")
    report = json.loads((tmp_path / "metrics.json").read_text())["digits"]
    assert report["n"] == 4 and report["heldout"] == "set aside from data"
    assert f"confidence: {report['samples']['confidence']:.3f}" in said.out
    assert said.out.startswith("Fréchet distance: ")
    assert f"(real digits: {report['floor']['confidence']:.3f})" in said.out
    assert str(tmp_path) in said.out.splitlines()[-1]


@pytest.mark.usefixtures("no_pictures")
def test_with_all_digits_the_report_is_beside_those_not_trained_on(saved, demo, tmp_path, monkeypatch):
    digits, labels = td.datasets.mnist.load()
    full = {"train": (digits[:60], labels[:60]), "test": (digits[60:100], labels[60:100])}
    monkeypatch.setattr(td.datasets.mnist, "load", full.get)
    flags = [
        "--model",
        saved,
        "--out",
        tmp_path,
        "--sampling-steps",
        2,
        "--report",
        "--data",
        "full",
        "--quiet",
    ]
    demo(*flags, "--samples", 40)  # more than half of the data: none of them need be set aside
    report = json.loads((tmp_path / "metrics.json").read_text())["digits"]
    assert (report["n"], report["data"], report["heldout"]) == (40, 60, "given")
    assert report["floor"]["least_nearest_distance"] > 0
    said = demo(*flags, "--samples", 41, expect=2)
    assert "--data full, --report can judge 40." in said.err


@pytest.mark.usefixtures("no_pictures")
def test_a_model_of_train_mnist_is_sampled_from(demo, tmp_path):
    train = importlib.import_module("train_mnist")
    flags = ["--steps", "2", "--T", "8", "--batch", "2", "--channels", "8", "8", "--samples", "1", "--quiet"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    demo(
        "--model",
        tmp_path / "run" / "model.safetensors",
        "--out",
        tmp_path / "out",
        "--samples",
        2,
        "--quiet",
    )
    about = json.loads((tmp_path / "out" / "metrics.json").read_text())["trained"]
    assert about["variance"] == "fixed_small" and about["steps"] == 2


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("flags", "asked", "scale"),
    [([], [0, 1, 2, 3, 4], 2.0), (["--digits", 7, 0, "--guidance", -1.5], [7, 0, 7, 0, 7], -1.5)],
)
def test_a_network_with_classes_draws_the_digits_asked_for(flags, asked, scale, demo, tmp_path, monkeypatch):
    """In turn; and the report says how many of them are read as such."""
    train = importlib.import_module("train_mnist")
    sizes = ["--steps", "2", "--T", "8", "--batch", "2", "--channels", "8", "8", "--samples", "1", "--quiet"]
    train.main([*sizes, "--classes", "--out", str(tmp_path / "run")])
    model = tmp_path / "run" / "model.safetensors"
    assert td.load_model(model)[0].config["num_classes"] == 10
    seen = []
    monkeypatch.setattr(
        td, "sample", lambda *a, original=td.sample, **how: seen.append(how) or original(*a, **how)
    )
    shown = []
    beside = lambda samples, *rest: shown.append(samples)  # noqa: E731
    monkeypatch.setattr(importlib.import_module("train_mnist").plotting, "samples_beside_data", beside)
    read = np.eye(10)[[7, 1, 7, 0, 4]]
    monkeypatch.setattr(importlib.import_module("train_mnist"), "digit_probabilities", lambda samples: read)
    said = demo("--model", model, "--out", tmp_path / "out", "--samples", 5, *flags)
    ((how,),) = [seen]
    assert how["labels"].tolist() == asked and how["guidance_scale"] == scale
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = np.mean(np.argmax(read, axis=1) == asked)
    assert metrics["share_as_asked"] == right and metrics["settings"]["guidance"] == scale
    assert f"read as the digits asked for: {right:.0%}\n" in said.out
    (picture,) = shown  # in which like is beside like
    alike = [i for k in dict.fromkeys(asked) for i in range(5) if asked[i] == k]
    np.testing.assert_array_equal(picture, np.load(tmp_path / "out" / "samples.npy")[alike])


def test_help_names_every_flag_and_its_default(demo, capsys):
    with pytest.raises(SystemExit) as end:
        demo("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = "out seed quiet samples sampler sampling-steps backend model report data digits guidance"
    for flag in flags.split():
        assert f"--{flag} " in text, flag
    for value in ("subset", 64, "ddpm", 50, "runs/mnist-samples", "all ten", 2):
        assert f"(default: {value}" in text, value
    assert "--resume" not in text and "None" not in text and "python demos/sample_mnist.py --" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sampling-steps", "13"], ["13", "12 steps"]),
        (["--sampler", "euler"], ["euler", "ddim"]),
        (["--samples", "0"], ["'0'"]),
        (["--report", "--samples", "1"], ["--report", "2"]),
        (["--report", "--samples", "5001"], ["--samples", "5001", "--data subset", "5000"]),
        (["--resume"], ["--resume"]),
        (["--digits", "3"], ["--digits", "train_mnist.py --classes", "model.safetensors was not"]),
        (["--guidance", "3"], ["--guidance", "train_mnist.py --classes", "model.safetensors was not"]),
        (["--digits", "10"], ["--digits", "'10'", "0 to 9"]),
        (["--digits"], ["--digits", "expected at least one argument"]),
        (["--guidance", "inf"], ["--guidance", "'inf'", "not a number"]),
        (["--model", "nowhere.safetensors"], ["nowhere.safetensors"]),
    ],
)
def test_a_mistake_ends_in_one_sentence(flags, words, saved, demo, tmp_path):
    said = demo("--model", saved, "--out", tmp_path / "out", "--quiet", *flags, expect=2)
    assert said.out == "" and len(said.err.splitlines()) == 1 and all(word in said.err for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [(tiny(in_channels=3, out_channels=3), ["3 channels"]), (td.MLP(hidden=8, blocks=1), ["MLP", "UNet"])],
)
def test_a_model_of_something_else_is_refused(model, words, demo, tmp_path):
    td.save_model(tmp_path / "m.safetensors", model, ABOUT)
    said = demo("--model", tmp_path / "m.safetensors", "--out", tmp_path / "out", expect=2)
    assert len(said.err.splitlines()) == 1 and all(word in said.err for word in words)


@pytest.mark.parametrize(
    ("flags", "name"),
    [([], "MNIST"), (["--digits", 3, 1], "MNIST_CLASSES"), (["--guidance", 0], "MNIST_CLASSES")],
)
def test_without_a_model_named_it_takes_the_packages(flags, name, demo, tmp_path, monkeypatch):
    """That with classes, if digits are asked for; and without it, it says how to make it."""
    monkeypatch.setattr(pretrained, "MNIST", tmp_path / "MNIST.safetensors")
    monkeypatch.setattr(pretrained, "MNIST_CLASSES", tmp_path / "MNIST_CLASSES.safetensors")
    said = demo("--out", tmp_path / "out", *flags, expect=2)
    assert len(said.err.splitlines()) == 1 and "train_mnist.py" in said.err and f"{name}.safe" in said.err
    classes = {"num_classes": 10} if flags else {}
    td.save_model(tmp_path / f"{name}.safetensors", tiny(**classes), ABOUT)
    demo("--out", tmp_path / "out", "--samples", 2, "--sampling-steps", 2, "--quiet", *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert ("share_as_asked" in metrics) == bool(flags)


def test_matplotlib_missing_is_said_before_anything_is_drawn(saved, demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = demo("--model", saved, "--out", tmp_path / "out", "--quiet", expect=2)
    assert len(said.err.splitlines()) == 1 and "pip install" in said.err
    assert not (tmp_path / "out").exists()
