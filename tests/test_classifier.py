"""The classifier and its loss: each against central differences, PyTorch, and what is known in advance."""

import array_api_strict as strict
import numpy as np
import pytest
from gradients import (
    Case,
    assert_central_differences_agree,
    assert_gradients_agree,
    gradients_of,
    normal,
    randomise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tinydiff.losses import cross_entropy
from tinydiff.models.classifier import Classifier

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def classifiers(draw):
    """A small classifier with random float64 weights, and images for it."""
    rng = np.random.default_rng(draw(SEEDS))
    groups = draw(st.sampled_from([1, 2]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    c, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    model = Classifier(c, classes, channels, groups, rng)
    for norm in model.norms:
        norm.eps = 1e-2  # as in gradients.py: no pole to differences where a group comes out alike
    n, h, w = (draw(st.integers(1, 7)) for _ in range(3))
    x = normal(rng, (min(n, 3), h, w, c))
    return Case(randomise(model, rng), [x], {"groups": groups, "eps": 1e-2}), rng


@settings(deadline=None, max_examples=25)
@given(classifiers())
def test_gradients_are_central_differences(drawn):
    assert_central_differences_agree(*drawn)


@pytest.mark.oracle
@settings(deadline=None, max_examples=25)
@given(classifiers())
def test_output_features_and_gradients_are_pytorch_s(drawn):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    case, rng = drawn
    p = {key: torch.tensor(q.value, requires_grad=True) for key, q in case.parameters.items()}
    x = torch.tensor(case.inputs[0], requires_grad=True)
    h = x.permute(0, 3, 1, 2)
    for i in range(len(case.layer.convs)):
        weight = p[f"convs.{i}.weight"].permute(3, 2, 0, 1).contiguous()
        h = F.conv2d(h, weight, p[f"convs.{i}.bias"], stride=1 if i == 0 else 2, padding=1)
        gain, bias = p[f"norms.{i}.weight"], p[f"norms.{i}.bias"]
        h = F.silu(torch.group_norm(h, case.settings["groups"], gain, bias, case.settings["eps"]))
    features = h.mean((2, 3))
    logits = features @ p["linear.weight"] + p["linear.bias"]
    dy = normal(rng, tuple(logits.shape))
    logits.backward(torch.tensor(dy))
    ours, gradients = gradients_of(case, dy)
    assert_allclose(ours, logits.detach().numpy(), rtol=0, atol=1e-10 * max(1, np.abs(ours).max()))
    assert_allclose(case.layer.features(case.inputs[0]), features.detach().numpy(), rtol=0, atol=1e-10)
    theirs = {"x0": x.grad.numpy()} | {key: q.grad.numpy() for key, q in p.items()}
    assert_gradients_agree(gradients, theirs, 1e-10)


def test_under_array_api_strict_it_is_the_same():
    rng = np.random.default_rng(0)
    model = randomise(Classifier(channels=[4, 4], norm_groups=2, rng=rng), rng, np.float32)
    x, dy = normal(rng, (2, 6, 6, 1), np.float32), normal(rng, (2, 10), np.float32)
    logits, backward = model(x)
    dx = backward(dy)
    dweight = model.convs[1].weight.grad
    model.to(strict)
    strict_logits, strict_backward = model(strict.asarray(x))
    strict_dx = strict_backward(strict.asarray(dy))
    assert strict_logits.dtype == strict_dx.dtype == strict.float32
    assert_allclose(np.asarray(strict_logits), logits, rtol=0, atol=1e-5)
    assert_allclose(np.asarray(strict_dx), dx, rtol=0, atol=1e-5)
    assert_allclose(np.asarray(model.convs[1].weight.grad), dweight, rtol=0, atol=1e-4)


def test_predict_is_the_call_and_the_last_layer_of_the_features():
    rng = np.random.default_rng(0)
    model = Classifier(rng=rng)
    x = normal(rng, (3, 28, 28, 1), np.float32)
    logits = model.predict(x)
    assert logits.shape == (3, 10) and logits.dtype == np.float32
    assert_array_equal(logits, model(x)[0])
    assert_array_equal(logits, model.linear(model.features(x))[0])
    assert_array_equal(np.concat([model.predict(x[:1]), model.predict(x[1:])]).argmax(1), logits.argmax(1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channels": ()}, "channels is empty"),
        ({"channels": (8, 0)}, "channels is 0"),
        ({"classes": 0}, "classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"channels": (8, 12)}, "norm_groups = 8 does not divide channels = 12"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        Classifier(**arguments)


def test_images_that_do_not_fit_are_named():
    model = Classifier(channels=(8,))
    with pytest.raises(ValueError, match=r"x has shape \(2, 28, 28\); expected \(N, H, W, 1\)"):
        model(np.zeros((2, 28, 28), np.float32))
    with pytest.raises(ValueError, match="float64"):
        model(np.zeros((2, 28, 28, 1)))
    with pytest.raises(TypeError, match="x is a list"):
        model([1.0])


# --- cross-entropy ---------------------------------------------------------------------------------------


@st.composite
def logits_and_labels(draw):
    rng = np.random.default_rng(draw(SEEDS))
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return draw(st.sampled_from([0.1, 1.0, 10.0])) * rng.standard_normal((n, k)), rng.integers(k, size=n)


@given(logits_and_labels())
def test_value_and_gradient_from_the_definitions(drawn):
    logits, labels = drawn
    p = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
    value, gradient = cross_entropy(logits, labels)
    assert value.shape == ()
    expected = np.mean([-np.log(p[n, label]) for n, label in enumerate(labels)])
    assert_allclose(value, expected, rtol=1e-10, atol=1e-14)
    h = 1e-5
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = h
        slope = (cross_entropy(logits + step, labels)[0] - cross_entropy(logits - step, labels)[0]) / (2 * h)
        assert_allclose(gradient[index], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.oracle
@given(logits_and_labels())
def test_value_and_gradient_are_pytorch_s(drawn):
    torch = pytest.importorskip("torch")
    logits, labels = drawn
    z = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(z, torch.tensor(labels))
    theirs.backward()
    value, gradient = cross_entropy(logits, labels)
    assert_allclose(value, theirs.item(), rtol=1e-10, atol=1e-15)
    assert_allclose(gradient, z.grad.numpy(), rtol=1e-10, atol=1e-15)


def test_equal_logits_cost_log_k_and_a_constant_changes_nothing():
    labels = np.array([0, 3, 9])
    assert_allclose(cross_entropy(np.full((3, 10), 7.0), labels)[0], np.log(10), rtol=1e-15)
    logits = np.random.default_rng(0).integers(-9, 9, (3, 10)).astype(np.float64)
    for ours, moved in zip(cross_entropy(logits, labels), cross_entropy(logits + 1024.0, labels)):
        assert_array_equal(ours, moved)


@pytest.mark.filterwarnings("error")
def test_large_logits_neither_overflow_nor_lose_the_loss():
    value, gradient = cross_entropy(np.array([[3e4, 0.0], [0.0, 3e4]], np.float32), np.array([1, 1]))
    assert value == 15_000  # one of the two is certain and wrong
    assert_array_equal(gradient, [[0.5, -0.5], [0, 0]])
    assert value.dtype == gradient.dtype == np.float32


def test_a_class_that_cannot_be_costs_the_others_nothing():
    value, gradient = cross_entropy(np.array([[0.0, -np.inf, 0.0]]), np.array([2]))
    assert_allclose(value, np.log(2), rtol=1e-15)
    assert_array_equal(gradient, [[0.5, 0.0, -0.5]])
    assert cross_entropy(np.array([[0.0, -np.inf]]), np.array([1]))[0] == np.inf


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_any_integers_are_labels_and_strict_arrays_pass(dtype):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((4, 3)), np.array([0, 2, 1, 2], dtype)
    value, gradient = cross_entropy(logits, labels)
    for like in (labels, strict.asarray(labels)):
        strict_value, strict_gradient = cross_entropy(strict.asarray(logits), like)
        assert_allclose(float(strict_value), value, rtol=1e-14)
        assert_allclose(np.asarray(strict_gradient), gradient, rtol=1e-14)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (np.zeros(3), np.zeros(3, int), ValueError, r"logits has shape \(3,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, "not empty"),
        (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"labels has shape \(3,\); expected \(2,\)"),
        (np.zeros((2, 3)), np.zeros(2), TypeError, "labels has dtype float64"),
        (np.zeros((2, 3)), np.array([0, 3]), ValueError, "labels has values 0 to 3; expected 0 to 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, "labels has values -1 to 0"),
    ],
)
def test_what_does_not_fit_is_named(logits, labels, error, match):
    with pytest.raises(error, match=match):
        cross_entropy(logits, labels)
