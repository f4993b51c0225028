"""The judges of digits: the shipped classifier's accuracy, and that each number moves with what it is for."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist
from scripts import ROOT, script

from tinydiff.checkpoint import load_arrays
from tinydiff.datasets import mnist
from tinydiff.metrics import (
    class_shares,
    digit_classifier,
    digit_features,
    digit_frechet_distance,
    digit_probabilities,
    digit_report,
    digits,
    frechet_distance,
    nearest_distances,
)


@pytest.fixture(scope="module")
def subset():
    """The first 2,000 shipped training digits and their labels."""
    images, labels = mnist.load("subset")
    return mnist.to_model_range(images[:2000]), labels[:2000]


def corrupted(images, level, seed=0):
    noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
    return np.clip(images + level * noise, -1, 1)


# --- The classifier that travels with the package --------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    """Loads MNIST's own splits, where they are."""
    folder = Path(os.environ.get("TINYDIFF_DATA") or ROOT.parent / "shared" / "data" / "mnist")
    if not any((folder / f"t10k-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
        pytest.skip(f"MNIST's test digits are not in {folder}; set TINYDIFF_DATA to their folder")
    monkeypatch.setenv("TINYDIFF_DATA", str(folder))
    return mnist.load


def test_the_classifier_is_right_about_the_test_digits(full):
    images, labels = full("test")
    predicted = np.argmax(digit_probabilities(mnist.to_model_range(images)), axis=1)
    accuracy = np.mean(predicted == labels)
    assert accuracy >= 0.985
    assert accuracy == pytest.approx(load_arrays(digits.WEIGHTS)[1]["test_accuracy"], abs=2e-4)  # other BLAS


@pytest.mark.slow
def test_the_distance_of_real_digits_strays_as_the_card_of_the_weights_says(full):
    """Of 1000 test digits from all training digits, drawn 200 times."""
    of_data, of_test = (digit_features(mnist.to_model_range(full(split)[0])) for split in ("train", "test"))
    rng = np.random.default_rng(0)
    draws = [frechet_distance(rng.permutation(of_test)[:1000], of_data) for _ in range(200)]
    card = (ROOT / "tinydiff" / "pretrained" / "mnist_unet.md").read_text(encoding="utf-8")
    (card,) = re.findall(r"it is (.*?)\. The first row", card.replace("\n", " "))
    numbers = re.findall(r"\d\.\d+", card)
    found = [np.mean(draws), np.std(draws), *np.quantile(draws, [0.05, 0.95])]
    assert_allclose(np.array(numbers, float), found, atol=6e-4)
    assert " ± ".join(numbers[:2]) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_classifier_is_right_about_the_shipped_digits(subset):
    images, labels = subset
    assert np.mean(np.argmax(digit_probabilities(images), axis=1) == labels) >= 0.99  # it was trained on them


def test_the_weights_are_small_and_whole():
    assert digits.WEIGHTS.stat().st_size < 1_000_000
    arrays, metadata = load_arrays(digits.WEIGHTS)
    assert metadata["config"] == digit_classifier().config
    assert all(np.isfinite(array).all() and array.dtype == np.float32 for array in arrays.values())
    assert digit_classifier() is digit_classifier()


def test_features_and_probabilities_are_the_classifier_s(subset):
    images = subset[0][:7]
    model = digit_classifier()
    features = digit_features(images)
    assert features.shape == (7, 64) and features.dtype == np.float32
    assert_array_equal(features, model.features(images))
    odds = np.exp(model.predict(images).astype(np.float64))
    assert_allclose(digit_probabilities(images), odds / odds.sum(1, keepdims=True), rtol=1e-5)
    assert_allclose(digit_probabilities(images).sum(1), 1, rtol=1e-14)


def test_features_do_not_depend_on_the_batch(subset, monkeypatch):
    images = subset[0][:20]
    features = digit_features(images)
    monkeypatch.setattr(digits, "BATCH", 7)
    assert_allclose(digit_features(images), features, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tool():
    return script(ROOT / "tools" / "train_digit_classifier.py")


@pytest.fixture
def run_tool(tool, tmp_path, monkeypatch):
    """Run the tool on a few shipped digits; returns the arrays and metadata it wrote."""
    images, labels = mnist.load("subset")

    def run(digits, epochs, seed):
        splits = {"train": (images[:digits], labels[:digits]), "test": (images[-101:], labels[-101:])}
        monkeypatch.setattr(mnist, "load", splits.get)
        monkeypatch.setenv("TINYDIFF_DATA", "")  # the tool sets it: let it be undone
        arguments = f"--data nowhere --epochs {epochs} --batch-size 20 --seed {seed}".split()
        monkeypatch.setattr(sys, "argv", ["tool", *arguments, "--out", str(tmp_path / "weights")])
        tool.main()
        return load_arrays(tmp_path / "weights")

    return run


def test_the_tool_learns(run_tool, capsys):
    arrays, metadata = run_tool(600, epochs=4, seed=0)
    assert metadata["config"] == digit_classifier().config and metadata["epochs"] == 4
    shapes = {name: p.shape for name, p in digit_classifier().named_parameters().items()}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert metadata["test_accuracy"] > 0.3  # of 101 digits; chance is 0.1, of which 0.3 is 6.6 deviations off
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[4].rstrip(",")) for line in lines]
    assert np.all(np.diff(losses) < 0)
    assert f"test accuracy {metadata['test_accuracy']:.2%}" in lines[-1]


def test_the_tool_gives_the_same_weights_for_the_same_seed(run_tool):
    (first, _), (again, _), (other, _) = (run_tool(100, epochs=2, seed=seed) for seed in (0, 0, 1))
    for name, array in first.items():
        assert_array_equal(array, again[name], err_msg=name)
        assert np.any(array != other[name]), name


def test_the_tool_moves_digits(tool):
    images = np.random.default_rng(0).integers(1, 256, (3, 28, 28)).astype(np.uint8)
    windows = tool.shifted(images)
    assert windows.shape == (3, 5, 5, 28, 28)
    assert_array_equal(windows[:, 2, 2], images)
    assert_array_equal(windows[1, 4, 1][2:, :-1], images[1][:-2, 1:])  # two down, one to the left
    assert np.all(windows[1, 4, 1][:2] == 0) and np.all(windows[1, 4, 1][:, -1] == 0)


# --- What the numbers are for ----------------------------------------------------------------------------


def test_noise_raises_the_frechet_distance(subset):
    images = subset[0]
    data, real = images[:500], images[500:1000]
    of_data, levels = digit_features(data), (0, 0.2, 0.4, 0.6, 0.8)
    distances = [frechet_distance(digit_features(corrupted(real, level)), of_data) for level in levels]
    assert np.all(np.diff(distances) > 0)
    assert distances[-1] > 10 * distances[0]
    assert frechet_distance(of_data, of_data) < 1e-6
    assert digit_frechet_distance(real, data) == distances[0]


def test_noise_lowers_the_confidence(subset):
    confidence = [np.mean(digit_probabilities(corrupted(subset[0], s)).max(1)) for s in (0, 0.4, 0.6)]
    assert confidence[0] > 0.95
    assert np.all(np.diff(confidence) < 0)


def test_a_class_that_is_another_lowers_the_coverage(subset):
    images, labels = subset
    without = images[labels != 7][:1500]
    doubled = np.concat([without, images[labels == 1][: len(images) // 20]])
    whole, lacking = (class_shares(digit_probabilities(x)) for x in (images, doubled))
    assert_allclose(whole, np.bincount(labels) / len(labels), atol=0.005)
    assert lacking[7] < 0.005 and lacking[1] > whole[1]
    report = digit_report(doubled[-500:], images, images)
    assert report["samples"]["least_class_share"] == class_shares(digit_probabilities(doubled[:500])).min()
    assert report["samples"]["effective_classes"] < 9.2 < 9.8 < report["floor"]["effective_classes"] <= 10
    assert report["samples"]["frechet_distance"] > 2 * report["floor"]["frechet_distance"]


def test_class_shares_count_classes_that_never_occur():
    assert_array_equal(class_shares(np.eye(4)[[0, 2, 2, 0, 2]]), [0.4, 0, 0.6, 0])


# --- The nearest training digit --------------------------------------------------------------------------


def test_copies_are_at_distance_zero_and_others_are_not(subset):
    images = subset[0]
    assert_array_equal(nearest_distances(images[300:400], images), 0)
    assert nearest_distances(images[:100], images[100:]).min() > 1
    moved = images[:50].copy()
    moved[:, 5, 5, 0] += np.where(moved[:, 5, 5, 0] > 0, -0.25, 0.25).astype(np.float32)
    assert_allclose(nearest_distances(moved, images), 0.25, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_nearest_distance_is_the_least_of_all(seed, n, m):
    rng = np.random.default_rng(seed)
    x, y = (rng.uniform(-1, 1, (k, 28, 28, 1)).astype(np.float32) for k in (n, m))
    expected = cdist(x.reshape(n, -1).astype(float), y.reshape(m, -1).astype(float)).min(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "BATCH", 4)
        patch.setattr(digits, "BLOCK", 3)
        found = nearest_distances(x, y)
    assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float64


# --- The report ------------------------------------------------------------------------------------------

STATISTICS = {
    "frechet_distance",
    "confidence",
    "class_shares",
    "effective_classes",
    "least_class_share",
    "nearest_distance",
    "least_nearest_distance",
    "share_too_near",
}


def test_samples_that_are_the_held_out_digits_are_at_the_floor(subset):
    """The two halves of the report are one computation: the same digits, in another order, fare the same."""
    data, real = subset[0][:1600], subset[0][1600:]
    report = digit_report(real, data, real)
    assert report == json.loads(json.dumps(report))
    assert (report["n"], report["data"], report["heldout"]) == (400, 1600, "given")
    ours, floor = report["samples"], report["floor"]
    assert ours.keys() == floor.keys() == STATISTICS
    for name in STATISTICS:
        assert_allclose(ours[name], floor[name], rtol=1e-4, err_msg=name)
    probabilities, nearest = digit_probabilities(real), nearest_distances(real, data)
    assert_allclose(ours["frechet_distance"], digit_frechet_distance(real, data), rtol=1e-9)
    assert_allclose(ours["confidence"], probabilities.max(1).mean())
    shares = class_shares(probabilities)
    assert_array_equal(ours["class_shares"], shares)
    assert ours["least_class_share"] == shares.min()
    assert_allclose(ours["effective_classes"], np.prod(shares**-shares))
    assert_allclose(
        [ours["nearest_distance"], ours["least_nearest_distance"]], [nearest.mean(), nearest.min()]
    )
    assert ours["share_too_near"] == 0.01  # 4 of 400


def test_as_near_as_one_in_a_hundred_is_not_too_near(subset):
    """Of 101 the quantile is the second nearest itself, and only one is nearer."""
    data, real = subset[0][:200], subset[0][1600:1701]
    assert digit_report(real, data, real)["samples"]["share_too_near"] == 1 / 101


def test_other_real_digits_are_near_the_floor(subset):
    images = subset[0]
    report = digit_report(images[:400], images[400:1600], images[1600:])
    ours, floor = report["samples"], report["floor"]
    for name in ("confidence", "effective_classes", "nearest_distance"):
        assert_allclose(ours[name], floor[name], rtol=0.1, err_msg=name)
    assert 0.5 < ours["frechet_distance"] / floor["frechet_distance"] < 2
    assert ours["share_too_near"] < 0.05  # 20 of 400, where 4 are expected


def test_copies_look_perfect_but_for_the_nearest_distance(subset):
    images = subset[0]
    report = digit_report(images[:400], images)
    assert (report["data"], report["heldout"]) == (1600, "set aside from data")
    ours, floor = report["samples"], report["floor"]
    assert ours["frechet_distance"] < 1.2 * floor["frechet_distance"]
    assert ours["nearest_distance"] == ours["least_nearest_distance"] == 0
    assert ours["share_too_near"] == 1
    assert floor["least_nearest_distance"] > 0


def test_the_floor_is_drawn_with_the_rng(subset):
    images = subset[0]
    first, again, other = (
        digit_report(images[:50], images[:300], rng=rng)
        for rng in (None, np.random.default_rng(0), np.random.default_rng(5))
    )
    assert first == again
    assert first["floor"] != other["floor"]
    given, other = (
        digit_report(images[:20], images[:40], images[40:140], rng=np.random.default_rng(seed))
        for seed in (0, 5)
    )
    assert given["samples"]["nearest_distance"] == 0 and given["floor"] != other["floor"]


def test_the_fewest_digits_that_can_be_reported(subset):
    report = digit_report(subset[0][:2], subset[0][2:6])
    assert (report["n"], report["data"]) == (2, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_blank_samples_are_answered(subset, value):
    report = digit_report(np.full((20, 28, 28, 1), value, np.float32), subset[0][:200])
    json.dumps(report, allow_nan=False)
    assert report["samples"]["effective_classes"] == 1
    assert report["samples"]["frechet_distance"] > 5 * report["floor"]["frechet_distance"]


def test_what_does_not_fit_is_named():
    good = np.zeros((4, 28, 28, 1), np.float32)
    for wrong in (np.uint8, complex):
        with pytest.raises(TypeError, match=f"images has dtype {np.dtype(wrong)}; expected floating"):
            digit_features(good.astype(wrong))
    with pytest.raises(ValueError, match="images is a masked array; expected one in which every number"):
        digit_features(np.ma.masked_less(good, 0))
    for wrong in (good[..., 0], good[:, 1:]):
        with pytest.raises(ValueError, match=r"images has shape \(4, 2.*\); expected \(N, 28, 28, 1\)"):
            digit_features(wrong)
    with pytest.raises(ValueError, match="not empty"):
        digit_probabilities(good[:0])
    with pytest.raises(ValueError, match=r"samples has values from 0 to 255; expected \[-1, 1\]"):
        digit_frechet_distance(np.linspace(0, 255, 4 * 784).reshape(good.shape), good)
    for edge in (-1.0, 1.0):
        with pytest.raises(ValueError, match=r"images has values from .*; expected \[-1, 1\]"):
            digit_features(np.nextafter(good + np.float32(edge), np.float32(2 * edge)))
    with pytest.raises(ValueError, match=r"data contains NaN; expected numbers in \[-1, 1\]\.$"):
        nearest_distances(good, good * np.nan)
    with pytest.raises(ValueError, match="samples has 1 digits; expected at least 2"):
        digit_report(good[:1], good)
    with pytest.raises(ValueError, match="samples has 1 digits; expected at least 2"):
        digit_frechet_distance(good[:1], good)
    for judge in (digit_frechet_distance, lambda *given: digit_report(*given, good)):
        with pytest.raises(ValueError, match="data has 1 digits; expected at least 2"):
            judge(good, good[:1])
    with pytest.raises(ValueError, match="data has 4 digits; expected at least 8"):
        digit_report(good, good)
    with pytest.raises(TypeError, match="rng is an int"):
        digit_report(good, good, good, rng=0)
    with pytest.raises(ValueError, match="heldout has 3 digits; expected at least 4"):
        digit_report(good, good, good[:3])
    for wrong, match in [
        (np.ones(10), r"has shape \(10,\); expected \(N, K\), not empty"),
        (np.ones((0, 10)), r"has shape \(0, 10\); expected"),
        (np.full((1, 10), np.nan), "contains NaN"),
        (np.ma.masked_less(np.ones((1, 10)), 0), "is a masked array"),
        (np.ones((1, 10), complex), "has dtype complex128"),
    ]:
        with pytest.raises(ValueError, match=f"^probabilities {match}"):
            class_shares(wrong)
