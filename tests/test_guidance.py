"""Networks that are told a class (B.27), and guidance (R.15)."""

import contextlib
import re

import numpy as np
import pytest
from gradients import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
from tinydiff.datasets import mnist
from tinydiff.metrics import digit_probabilities

SCHEDULE = td.cosine_schedule(20)
K = 3  # classes; this is the label of none


def network(rng, out=2, dtype=np.float64):
    return randomise(td.MLP(2, out, hidden=6, blocks=1, time_features=4, num_classes=K).to(np, dtype), rng)


def given_to(model, rng, n):
    return rng.standard_normal((n, 2)), rng.integers(0, 20, n), rng.integers(0, K + 1, n)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["eps", "x0", "v", "flow"]),
    st.sampled_from(["eps", "x0", "v", "flow"]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 4.0]),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_in_whatever_the_network_predicts_guidance_is_the_same_mixture(prediction, seen_as, w, n, seed):
    """Of noise, data, velocity or flow; docs: R.15."""
    rng = np.random.default_rng(seed)
    model, diffusion = network(rng), td.GaussianDiffusion(SCHEDULE, prediction)
    x, t, y = given_to(model, rng, n)
    predict = getattr(diffusion, f"predict_{seen_as}")
    mixed = td.guided(model.predict, diffusion, y, w, K)(x, t)
    without, told = (predict(x, t, model.predict(x, t, labels=labels)) for labels in (np.full(n, K), y))
    expected = (1 - w) * without + w * told
    assert_allclose(predict(x, t, mixed), expected, rtol=0, atol=1e-9 * np.abs([without, told]).max())


@pytest.mark.parametrize(("w", "asked"), [(0, "none"), (1, "told"), (1.0, "told"), (2, "both"), (-1, "both")])
def test_only_what_counts_is_asked_for(w, asked):
    """In one call, in which the classes come after none."""
    seen = []

    def denoise(x, t, labels):
        seen.append((x, t, labels))
        return x

    x, t, y = np.ones((2, 2)), np.array([3, 5]), np.array([0, 2], np.uint8)
    td.guided(denoise, td.GaussianDiffusion(SCHEDULE), y, w, K)(x, t)
    ((x_seen, t_seen, labels),) = seen
    assert labels.tolist() == {"none": [K, K], "told": [0, 2], "both": [K, K, 0, 2]}[asked]
    assert_array_equal(t_seen, np.resize(t, len(labels)))
    assert_array_equal(x_seen, np.resize(x, (len(labels), 2)))


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_a_learned_variance_is_that_of_the_class(w):
    """But with none: there it is that of none."""
    rng = np.random.default_rng(0)
    model, diffusion = network(rng, out=4), td.GaussianDiffusion(SCHEDULE, "v", "learned_range")
    x, t, y = given_to(model, rng, 3)
    mixed = td.guided(model.predict, diffusion, y, w, K)(x, t)
    without, told = model.predict(x, t), model.predict(x, t, labels=y)
    assert_allclose(mixed[:, :2], without[:, :2] + w * (told - without)[:, :2], rtol=1e-10)
    assert_allclose(mixed[:, 2:], (told if w else without)[:, 2:], rtol=1e-10)


class Exact(td.nn.Module):
    """The best network of two bells, class 0 on the left and 1 on the right."""

    def __init__(self, diffusion):
        self.config = {"num_classes": 2}
        self.like = td.nn.Parameter(np.zeros(1))
        of = [td.GaussianMixture([1.0], [[m]], 0.25) for m in (-1.0, 1.0)]
        of.append(td.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.25, 0.25]))
        self.denoisers = [mixture.denoiser(diffusion) for mixture in of]

    def __call__(self, x, t, rng=None, labels=None):
        labels = np.full(len(x), 2) if labels is None else labels
        rows = [self.denoisers[k](x[i : i + 1], t[i : i + 1]) for i, k in enumerate(labels)]
        return np.concatenate(rows), None


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("sampler", td.samplers.SAMPLERS)
def test_sampling_walks_by_the_mixture(sampler, batch_size):
    """docs: R.15.  Each sample by its own label, whatever batch it is in; as chapter 6 writes it out."""
    diffusion = td.GaussianDiffusion(td.linear_schedule(20), "v")
    model, y = Exact(diffusion), np.array([0, 1, 2, 1, 1, 0])
    x_T = np.random.default_rng(0).standard_normal((6, 1))
    parts = [slice(0, 6)] if batch_size is None else [slice(0, 4), slice(4, 6)]
    how = dict(sampler=sampler, steps=5, progress=False)
    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    x = td.sample(
        model, diffusion, (6, 1), **how, rng=rng, x_T=x_T, labels=y, guidance_scale=3, batch_size=batch_size
    )
    for part in parts:

        def recipe(x, t, labels=y[part]):
            plain = model.predict(x, t)
            return plain + 3 * (model.predict(x, t, labels=labels) - plain)

        expected = td.sample(recipe, diffusion, x[part].shape, **how, rng=again, x_T=x_T[part])
        assert_allclose(x[part], expected, rtol=0, atol=1e-12)


def test_labels_alone_draw_the_class_and_none_is_none():
    rng = np.random.default_rng(0)
    diffusion = td.GaussianDiffusion(td.linear_schedule(200), "v")
    model, how = Exact(diffusion), dict(steps=25, progress=False)
    y = np.repeat([0, 1], 400)
    x = td.sample(model, diffusion, (800, 1), "ddim", rng=rng, labels=y, **how)[:, 0]
    for k, mean in ((0, -1), (1, 1)):
        assert abs(np.mean(x[y == k]) - mean) < 0.1 and abs(np.std(x[y == k]) - 0.5) < 0.08
    x_T = rng.standard_normal((5, 1))
    plain, told = (
        td.sample(model, diffusion, (5, 1), "ddim", rng=rng, x_T=x_T, **how, **given)
        for given in ({}, {"labels": np.full(5, 2), "guidance_scale": 7.0})
    )
    assert_allclose(told, plain, rtol=1e-12)


# Labels, where a network is asked


LEARNED = td.LearnedSchedule(-5.0, 4.0)


def told(model, y, batch_size, times):
    """The function of x and t that tells the network `y`, in a walk over batches, each asked `times`."""
    starts = iter(np.repeat(np.arange(0, len(y), batch_size), times))

    def denoise(x, t):
        start = next(starts)
        return model.predict(x, t, labels=y[start : start + batch_size])

    return denoise


@pytest.mark.parametrize("batch_size", [6, 4])
@pytest.mark.parametrize(
    ("bound", "how", "times"),
    [
        (td.variational_bound, dict(diffusion=td.GaussianDiffusion(SCHEDULE, "v")), 20),
        (td.variational_bound, dict(diffusion=td.GaussianDiffusion(SCHEDULE, "v"), t_samples=3), 4),
        (td.bits_per_dim, dict(diffusion=td.GaussianDiffusion(SCHEDULE, "v"), t_samples=3), 4),
        (td.continuous_bound, dict(learned=LEARNED, T=20, t_samples=2), 3),
    ],
)
def test_a_bound_given_the_classes_tells_them(bound, how, times, batch_size):
    """Each sample its own, whatever batch it is in."""
    rng = np.random.default_rng(0)
    model, data, y = network(rng), rng.integers(0, 256, (6, 2)) / 127.5 - 1, np.array([0, 3, 1, 1, 2, 0])
    how = dict(data=data, batch_size=batch_size, progress=False) | how
    values = [
        bound(denoise, **how, **given, rng=np.random.default_rng(1)).value
        for denoise, given in [
            (model, dict(labels=y.astype(np.uint8))),
            (told(model, y, batch_size, times), {}),
            (model, {}),
        ]
    ]
    assert_allclose(values[0], values[1], rtol=1e-12)
    assert abs(values[0] / values[2] - 1) > 1e-6


@pytest.mark.parametrize("probes", [None, 2])
def test_a_likelihood_and_an_encoding_given_the_classes(probes):
    rng = np.random.default_rng(0)
    model, diffusion = network(rng), td.GaussianDiffusion(SCHEDULE, "v")
    x, y = rng.standard_normal((4, 2)), np.array([0, 3, 1, 2])
    how = dict(steps=5, probes=probes, progress=False)
    found, expected, plain = (
        td.ode_log_likelihood(of, diffusion, x, **how, **given, rng=np.random.default_rng(1))
        for of, given in [
            (model, dict(labels=y)),
            (lambda x, t: model(x, t, labels=y), {}),
            (model, {}),
        ]
    )
    assert_allclose(found, expected, rtol=1e-12)
    assert np.all(np.abs(found - plain)[y != K] > 1e-6) and found[1] == plain[1]
    mixed = lambda x, t: 3 * model.predict(x, t, labels=y) - 2 * model.predict(x, t)  # noqa: E731
    assert_allclose(
        td.invert(model, diffusion, x, 5, labels=y, guidance_scale=3.0, progress=False),
        td.invert(mixed, diffusion, x, 5, progress=False),
        rtol=1e-9,
    )


def test_given_its_class_a_sample_is_likelier():
    """Of the exact networks of two bells: the bound on either's own samples is that of the bell alone."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(40), "v", "fixed_large")
    rng, model, y = np.random.default_rng(0), Exact(diffusion), np.repeat([0, 1], 500)
    data = 2 * y[:, None] - 1 + 0.5 * rng.standard_normal((1000, 1))
    own, wrong, none = (
        td.variational_bound(model, diffusion, data, rng=rng, labels=labels, progress=False).value
        for labels in (y, 1 - y, None)
    )
    best = td.GaussianMixture([1.0], [[1.0]], 0.25).optimal_bound(diffusion).value
    assert abs(own - best) < 0.08  # two deviations, of a mean over 1000
    assert own + 0.3 < none and own + 3 < wrong  # log 2 less a little; 2 / 0.25


@pytest.mark.parametrize("workers", [1, 2])
def test_a_network_is_asked_as_its_own_predict(workers):
    rng = np.random.default_rng(0)
    model = randomise(
        td.UNet(block_channels=(4,), attention=(True,), norm_groups=2, head_dim=4, num_classes=K),
        rng,
        np.float32,
    )
    diffusion, x_T = td.GaussianDiffusion(SCHEDULE, "v"), rng.standard_normal((3, 4, 4, 1), np.float32)
    y = np.array([1, 3, 0], np.int32)
    mixed = td.guided(model.predict, diffusion, y, 2.0, K)
    walks = [
        td.sample(denoise, diffusion, x_T.shape, "ddim", 4, rng=rng, x_T=x_T, progress=False, **given)
        for denoise, given in ((mixed, {}), (model, dict(labels=y, guidance_scale=2.0, workers=workers)))
    ]
    assert_allclose(*walks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("w", "together"), [(1.0, 3), (0.0, 3), (2.0, 6)])
def test_both_predictions_of_a_batch_are_shared_out_to_processes(monkeypatch, w, together):
    seen = []

    def shared_out(model, batch_size, workers, to_predict):
        seen.append(batch_size)
        return contextlib.nullcontext(model)

    monkeypatch.setattr(td.samplers, "shared_out", shared_out)
    how = dict(steps=2, rng=np.random.default_rng(0), batch_size=3, progress=False)
    td.sample(MODEL, DIFFUSION, (5, 2), labels=np.zeros(5, int), guidance_scale=w, **how)
    assert seen == [together]


MODEL, DIFFUSION = td.MLP(num_classes=K), td.GaussianDiffusion(SCHEDULE)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": np.zeros(3, int)}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
        ({"labels": np.zeros((4, 1), int)}, ValueError, r"labels has shape \(4, 1\); expected \(4,\)"),
        ({"labels": np.full(4, 4)}, ValueError, "labels has values 4 to 4; expected 0 to 3"),
        ({"labels": np.full(4, -1)}, ValueError, "labels has values -1 to -1; expected 0 to 3"),
        ({"labels": np.zeros(4)}, TypeError, "labels has dtype float64; expected integers"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels is a list; expected an array"),
        ({"labels": 3}, TypeError, "labels is an int; expected an array"),
        ({"guidance_scale": np.inf}, ValueError, "guidance_scale is inf; expected a finite number"),
        ({"guidance_scale": "3"}, ValueError, "guidance_scale is '3'; expected a finite number"),
        ({"guidance_scale": True}, ValueError, "guidance_scale is True; expected a finite number"),
        ({"guidance_scale": 3.0, "labels": None}, ValueError, "guidance_scale is 3.0; expected 1, or labels"),
        ({"denoise": td.MLP()}, ValueError, "labels are given, and denoise is an MLP without classes"),
        (
            {"denoise": lambda x, t: x},
            ValueError,
            "labels are given, and denoise is a function without classes",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, error, match):
    arguments = dict(denoise=MODEL, diffusion=DIFFUSION, shape=(4, 2), labels=np.arange(4)) | change
    for draw in (td.sample, td.iterate_samples):
        with pytest.raises(error, match=match):
            draw(**arguments, rng=np.random.default_rng(0))
    x = np.zeros((4, 2), np.float32)
    arguments["x0"] = x[: arguments.pop("shape")[0]]
    with pytest.raises(error, match=match):
        td.invert(**arguments)
    if "guidance_scale" in change:
        return
    denoise, labels, rng = arguments["denoise"], arguments["labels"], np.random.default_rng(0)
    for bound, of in (
        (td.variational_bound, DIFFUSION),
        (td.bits_per_dim, DIFFUSION),
        (td.continuous_bound, LEARNED),
    ):
        with pytest.raises(error, match=match):
            bound(denoise, of, x, labels=labels, rng=rng)
    with pytest.raises(error, match=match.replace("denoise", "model")):
        td.ode_log_likelihood(denoise, DIFFUSION, x, labels=labels)


@pytest.mark.parametrize("num_classes", [0, 2.0, None])
def test_a_number_of_classes_that_is_none_is_named(num_classes):
    with pytest.raises(ValueError, match=f"^num_classes is {num_classes}; expected an integer of at least 1"):
        td.guided(MODEL.predict, DIFFUSION, np.zeros(4, int), 2.0, num_classes)


@pytest.mark.parametrize("call", [MODEL, MODEL.predict])
@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.zeros(3, int), r"labels has shape \(3,\); expected \(4,\)"),
        (np.full(4, K + 1), "labels has values 4 to 4; expected 0 to 3"),
        (np.ones(4, bool), "labels has dtype bool; expected integers"),
        ([0, 0, 0, 0], "labels is a list; expected an array"),
    ],
)
def test_labels_that_do_not_fit_a_call(call, labels, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(np.zeros((4, 2), np.float32), np.zeros(4, int), labels=labels)


def test_a_network_without_classes_is_told_so():
    for model in (td.MLP(), td.UNet()):
        shape = (4, 2) if isinstance(model, td.MLP) else (4, 4, 4, 1)
        with pytest.raises(
            ValueError, match=re.escape("without classes; expected None, or a network made with")
        ):
            model(np.zeros(shape, np.float32), np.zeros(4, int), labels=np.zeros(4, int))
        assert "num_classes" not in model.config  # as in files that older versions wrote, and read


@pytest.mark.parametrize("make", [td.MLP, td.UNet])
@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "3"])
def test_numbers_of_classes_that_do_not_fit(make, num_classes):
    with pytest.raises(
        ValueError, match=f"^num_classes is {num_classes!r}; expected an integer of at least 1"
    ):
        make(num_classes=num_classes)


@pytest.mark.parametrize("make", [td.MLP, td.UNet])
def test_with_classes_the_other_weights_begin_alike(make):
    """So a seed's network is the same with classes, until it is told one."""
    plain, told = (make(num_classes=n, rng=np.random.default_rng(0)).state_dict() for n in (None, 2))
    rows = told.pop("class_embedding.weight")
    assert rows.shape[0] == 3 and 0.8 < rows.std() < 1.2
    for name, weight in plain.items():
        assert_array_equal(told[name], weight)


@pytest.mark.parametrize("make", [td.MLP, td.UNet])
def test_a_file_keeps_the_classes(make, tmp_path):
    model = make(num_classes=2)
    td.save_model(tmp_path / "model.safetensors", model)
    again, _ = td.load_model(tmp_path / "model.safetensors")
    assert again.config == model.config and again.config["num_classes"] == 2
    assert_array_equal(again.class_embedding.weight.value, model.class_embedding.weight.value)


@pytest.mark.slow
def test_a_network_told_a_digit_draws_it():
    """Of 14 x 14 pixels, each the mean of four."""
    rng = np.random.default_rng(0)
    images, labels = mnist.load("train")
    small = mnist.to_model_range(images).reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)).astype(np.float32)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(), "v")
    unet = td.UNet(block_channels=(32, 64), attention=(False, True), num_classes=10, rng=rng)
    settings = dict(steps=600, batch_size=64, lr=2e-3, warmup=50, ema_decay=0.99, progress=False)
    net = td.train(unet, diffusion, small, labels=labels, **settings).model
    asked = np.arange(200) % 10

    def right(w):
        how = dict(labels=asked, guidance_scale=w, clip=True, rng=rng, progress=False)
        x = td.sample(net, diffusion, (200, 14, 14, 1), "ddim", 25, **how)
        large = x.repeat(2, axis=1).repeat(2, axis=2)
        return np.mean(np.argmax(digit_probabilities(large), axis=1) == asked)

    found = right(1.0), right(3.0)
    assert found[0] > 0.6 and found[1] > 0.95
