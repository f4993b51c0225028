"""The U-Net (and what the MLP shares with it): its definition, its derivative, its inputs, its sizes."""

import copy
import tracemalloc

import array_api_strict
import formulas
import numpy as np
import pytest
from gradients import Case, assert_central_differences_agree, labels_for, norm, normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
from tinydiff.models import _checks
from tinydiff.models.classifier import Classifier

SMALL = dict(
    in_channels=2,
    out_channels=3,
    block_channels=(4, 8),
    layers_per_block=1,
    attention=(False, True),
    norm_groups=2,
    norm_eps=1e-2,
    head_dim=4,
)


@pytest.fixture(scope="module", autouse=True)
def blas_threads():
    """As many as BLAS finds: whole networks, as they are called outside of `train` and `sample`."""


def small(rng, **changes):
    return randomise(td.UNet(**{**SMALL, **changes}, rng=rng).to(np, np.float64), rng)


@st.composite
def unets(draw):
    """A random configuration, its weights random too, with images, times and perhaps classes for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(1, 3))
    model = small(
        rng,
        in_channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 3)),
        block_channels=[draw(st.sampled_from([4, 8])) for _ in range(levels)],
        layers_per_block=draw(st.integers(1, 2)),
        attention=[draw(st.booleans()) for _ in range(levels)],
        mid_attention=draw(st.booleans()),
        norm_groups=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([None, 2, 4])),
        downsample_padding=draw(st.sampled_from([0, 1])),
        flip_sin_to_cos=draw(st.booleans()),
        freq_shift=draw(st.sampled_from([0.0, 1.0])),
        num_classes=draw(st.sampled_from([None, 2])),
    )
    h, w = (2 ** (levels - 1) * draw(st.integers(1, 2)) for _ in range(2))
    n = draw(st.integers(1, 2))
    x = normal(rng, (n, h, w, model.config["in_channels"]))
    return model, x, rng.integers(0, 1000, n), labels_for(model, n, rng), rng


@settings(deadline=None, max_examples=20)
@given(unets())
def test_the_function_is_its_definition(instance):
    model, x, t, labels, _ = instance
    c = model.config
    sinusoids = formulas.sinusoids(t, c["block_channels"][0], c["flip_sin_to_cos"], c["freq_shift"])
    p = {name: q.value for name, q in model.named_parameters().items()}
    for told in (labels, None):
        expected = formulas.unet(x, sinusoids, p, c, told)
        y, _ = model(x, t, labels=told)
        assert y.shape == expected.shape
        assert norm([y - expected]) <= 1e-11 * norm([expected])


@settings(deadline=None, max_examples=20)
@given(unets())
def test_derivative_along_a_random_direction(instance):
    """All inputs and parameters move together, each by its own random amount."""
    model, x, t, labels, rng = instance
    y, backward = model(x, t, labels=labels)
    dy = normal(rng, y.shape)
    dx = backward(dy)
    p = model.named_parameters()
    at = {name: q.value for name, q in p.items()}
    direction = {name: rng.standard_normal(value.shape) for name, value in at.items()}
    direction_x = rng.standard_normal(x.shape)

    def loss(step):
        for name, q in p.items():
            q.value = at[name] + step * direction[name]
        return np.sum(model(x + step * direction_x, t, labels=labels)[0] * dy)

    h = 1e-7  # groups of two numbers curve: at 2e-6 the fifth derivative was once seen above the tolerance
    numeric = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    ours = np.sum(dx * direction_x) + sum(np.sum(q.grad * direction[name]) for name, q in p.items())
    assert abs(numeric - ours) <= 1e-6 * norm([dx, *(q.grad for q in p.values())])


def test_every_parameter_against_central_differences():
    rng = np.random.default_rng(0)
    model = small(rng, dropout=0.5, in_channels=1, out_channels=1)
    t = np.array([3, 700])

    def layer(x):
        """The dropout masks are the same at every call."""
        return model(x, t, np.random.default_rng(1))

    case = Case(layer, [normal(rng, (2, 4, 2, 1))], module=model)
    assert_central_differences_agree(case, rng)


def test_what_is_embedded_beside_the_time_is_learned():
    """The map of a sentence, say, added to the sinusoids: in the place of these it has a gradient, too."""
    rng = np.random.default_rng(0)
    model = small(rng, block_channels=(4, 4), attention=(False, False))
    inputs = [normal(rng, (3, 4, 2, 2)), normal(rng, (3, 4))]
    assert_central_differences_agree(Case(model.run_embedded, inputs, module=model), rng)


class Doubled(td.nn.Module):
    """Twice a layer: something in its place that has no weights by the layer's names."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        y, backward = self.layer(x)
        return 2 * y, lambda dy: backward(2 * dy)


def without_weights(layer):
    """A function that computes the same, as fixed features of the input may: it has no weights to find."""
    return lambda x: layer(x)


@pytest.mark.parametrize("other", [Doubled, without_weights])
@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: td.UNet(1, 1, (4,), 1, (False,), norm_groups=2, head_dim=4), "conv_in", (2, 2, 2, 1)),
        (lambda: td.MLP(2, hidden=4, blocks=1, time_features=4), "linear_in", (2, 2)),
        (lambda: Classifier(channels=(4,), norm_groups=2), "linear", (2, 4, 4, 1)),
        (lambda: td.nn.SelfAttention(4, None, 2, 1e-5, np.random.default_rng(0)), "group_norm", (2, 2, 2, 4)),
    ],
)
def test_the_input_is_compared_with_whatever_weights_are_there(make, name, shape, other):
    """Those of an adapter, say, around the layer that is there at first, or those of other layers."""
    rng = np.random.default_rng(0)
    model = make()
    setattr(model, name, other(getattr(model, name)))
    times = (np.array([3, 900]),) if isinstance(model, (td.MLP, td.UNet)) else ()
    td.testing.assert_backward(model, normal(rng, shape), *times)


@pytest.mark.parametrize("last_first", [False, True])
def test_two_calls_before_either_backward(last_first):
    rng = np.random.default_rng(0)
    model = small(rng, layers_per_block=2)
    xs, dys = ([normal(rng, (2, 4, 4, c)) for _ in range(2)] for c in (2, 3))
    ts = [np.array([1, 2]), np.array([30, 999])]
    alone = []
    for x, t, dy in zip(xs, ts, dys):
        y, backward = model(x, t)
        dx = backward(dy)
        alone.append((y, dx, {name: p.grad for name, p in model.named_parameters().items()}))
        model.zero_grad()
    calls = [model(x, t) for x, t in zip(xs, ts)]
    for i in (1, 0) if last_first else (0, 1):
        assert_array_equal(calls[i][1](dys[i]), alone[i][1])
        assert_array_equal(calls[i][0], alone[i][0])
        with pytest.raises(RuntimeError, match="second time"):
            calls[i][1](dys[i])
    for name, p in model.named_parameters().items():
        assert_array_equal(p.grad, alone[0][2][name] + alone[1][2][name], err_msg=name)


def test_images_of_a_batch_do_not_see_each_other():
    rng = np.random.default_rng(0)
    model = small(rng)
    x, t = normal(rng, (3, 4, 4, 2)), np.array([0, 500, 999])
    together = model.predict(x, t)
    for i in range(3):
        assert_allclose(model.predict(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=0, atol=1e-12)


def test_predict_is_the_call_without_dropout():
    rng = np.random.default_rng(0)
    model = small(rng, dropout=0.5)
    x, t = normal(rng, (2, 4, 4, 2)), np.array([0, 999])
    y, _ = model(x, t)
    assert_array_equal(model.predict(x, t), y)
    assert np.abs(model(x, t, rng)[0] - y).max() > 0.01


def test_a_rate_of_false_is_zero():
    rng = np.random.default_rng(0)
    model = small(rng, dropout=False)
    x, t = normal(rng, (2, 4, 4, 2)), np.array([0, 999])
    assert_array_equal(model(x, t, rng)[0], model.predict(x, t))


def test_every_residual_block_drops():
    """Each of them alone changes the output: on the way down, in the middle, on the way up."""
    rng = np.random.default_rng(0)
    model = small(rng, dropout=0.5)
    x, t = normal(rng, (2, 4, 2, 2)), np.array([0, 999])
    plain = model.predict(x, t)
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    assert [resnet.dropout_rate for resnet in resnets] == [0.5] * 8
    for one in resnets:
        for resnet in resnets:
            resnet.dropout_rate = 0.5 * (resnet is one)
        assert np.abs(model(x, t, np.random.default_rng(1))[0] - plain).max() > 0.01


def test_predict_keeps_nothing():
    """What the call holds for its backward, level upon level, predict has let go on the way."""
    model = td.UNet(block_channels=(8, 8, 8, 8), attention=(False,) * 4)
    x, t = np.zeros((1, 64, 64, 1), np.float32), np.array([0])
    model.predict(x, t)  # whatever is allocated once
    peaks = []
    for run in (model.predict, model):
        tracemalloc.start()
        run(x, t)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 0.4 * peaks[1], peaks


def test_a_new_network_predicts_zero_and_its_blocks_are_their_shortcuts():
    """The last layer of every residual branch begins at zero (Ho et al. 2020, released code)."""
    rng = np.random.default_rng(0)
    x, t = normal(rng, (2, 8, 8, 1), np.float32), np.array([0, 999])
    model = td.UNet(rng=rng)
    assert_array_equal(model.predict(x, t), np.zeros_like(x))
    zero = [
        name for name, p in model.named_parameters().items() if name.endswith("weight") and not p.value.any()
    ]
    for name in model.named_parameters():
        ends_a_branch = name.endswith(("conv2.weight", "to_out.0.weight")) or name == "conv_out.weight"
        assert (name in zero) == ends_a_branch, name
    points = td.MLP(rng=rng).predict(normal(rng, (5, 2), np.float32), np.arange(5))
    assert_array_equal(points, np.zeros((5, 2)))


def test_rng_alone_decides_the_weights():
    first, same, other = (td.UNet(**SMALL, rng=np.random.default_rng(s)).state_dict() for s in (1, 1, 2))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["conv_in.weight"], other["conv_in.weight"])
    default, zero = (
        td.UNet(**SMALL, **given).state_dict() for given in ({}, {"rng": np.random.default_rng(0)})
    )
    assert all(np.array_equal(default[name], zero[name]) for name in default)


@pytest.mark.parametrize("make", [lambda: td.UNet(**SMALL), lambda: td.MLP(3, 2, 8, 2, 6)])
def test_config_builds_the_same_network_and_copies_are_independent(make):
    model = make()
    again = type(model)(**model.config)
    assert {n: p.shape for n, p in again.named_parameters().items()} == {
        n: p.shape for n, p in model.named_parameters().items()
    }
    twin = copy.deepcopy(model)
    for p in twin.named_parameters().values():
        p.value = p.value + 1
    for name, value in model.state_dict().items():
        assert_array_equal(twin.state_dict()[name], value + np.float32(1))


def test_repr_says_how_it_is_made_and_how_large_it_is():
    model = td.MLP(2, hidden=8, blocks=1, time_features=4)
    said, _, size = repr(model).rpartition(" of ")
    assert eval(said, vars(td)).config == model.config
    assert size == f"{sum(np.size(a) for a in model.state_dict().values())} parameters"
    assert repr(model.linear_in) == "Linear of 24 parameters"


def test_names_are_those_of_diffusers():
    """Written out for one small network; against diffusers itself in test_oracle_unet.py."""

    def weights(*names):
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    def inside(block, *names):
        return [f"{block}.{name}" for name in names]

    resnet = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    wider = [*resnet, "conv_shortcut"]
    attention = ["group_norm", "to_q", "to_k", "to_v", "to_out.0"]
    expected = weights(
        "conv_in",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        *inside("down_blocks.0.resnets.0", *resnet),
        "down_blocks.0.downsamplers.0.conv",
        *inside("down_blocks.1.resnets.0", *wider),
        *inside("down_blocks.1.attentions.0", *attention),
        *inside("mid_block.resnets.0", *resnet),
        *inside("mid_block.attentions.0", *attention),
        *inside("mid_block.resnets.1", *resnet),
        *inside("up_blocks.0.resnets.0", *wider),
        *inside("up_blocks.0.resnets.1", *wider),
        *inside("up_blocks.0.attentions.0", *attention),
        *inside("up_blocks.0.attentions.1", *attention),
        "up_blocks.0.upsamplers.0.conv",
        *inside("up_blocks.1.resnets.0", *wider),
        *inside("up_blocks.1.resnets.1", *wider),
        "conv_norm_out",
        "conv_out",
    )
    assert set(td.UNet(**SMALL).named_parameters()) == expected


# The published networks


PUBLISHED = dict(in_channels=3, out_channels=3, layers_per_block=2, norm_groups=32, head_dim=None)


def test_size_of_the_published_cifar10_network():
    """35.7 million parameters (Ho et al. 2020, appendix B)."""
    model = td.UNet(block_channels=(128, 256, 256, 256), attention=(False, True, False, False), **PUBLISHED)
    assert model.num_parameters() == 35_746_307


@pytest.mark.slow  # 0.5 GB and seconds: the weights are drawn
def test_size_of_the_published_256_pixel_network():
    """114 million parameters (Ho et al. 2020, appendix B): LSUN and CelebA-HQ."""
    model = td.UNet(
        block_channels=(128, 128, 256, 256, 512, 512),
        attention=(False, False, False, False, True, False),
        **PUBLISHED,
    )
    assert model.num_parameters() == 113_673_219


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(block_channels=(), attention=()), r"^block_channels is \[\]; expected at least one"),
        (dict(block_channels=(4, 0)), r"^block_channels\[1\] is 0; expected an integer of at least 1"),
        (dict(block_channels=(4.5, 8)), r"^block_channels\[0\] is 4.5; expected an integer"),
        (dict(block_channels=32), r"^block_channels is 32; expected a sequence, one entry per level"),
        (dict(attention=True), r"^attention is True; expected a sequence"),
        (dict(attention=(True,)), r"^attention is \[True\]; expected 2 entries"),
        (dict(attention=(False, False, True)), r"^attention is \[False, False, True\]; expected 2 entries"),
        (dict(layers_per_block=0), r"^layers_per_block is 0; expected an integer of at least 1"),
        (dict(in_channels=0), r"^in_channels is 0; expected an integer of at least 1"),
        (dict(out_channels=-1), r"^out_channels is -1; expected an integer of at least 1"),
        (dict(dropout=1.0), r"^dropout is 1.0; expected a rate in \[0, 1\)"),
        (dict(dropout=-0.1), r"^dropout is -0.1"),
        (dict(dropout=float("nan")), r"^dropout is nan"),
        (dict(downsample_padding=2), r"^downsample_padding is 2; expected 0 or 1"),
        (dict(norm_groups=3), r"^norm_groups is 3; expected a divisor of .*\[4, 8\]"),
        (dict(norm_groups=8), r"^norm_groups is 8; expected a divisor of .*\[4, 8\]"),
        (dict(norm_eps=-1.0), r"^norm_eps is -1.0; expected a positive number"),
        (dict(norm_eps=0.0), r"^norm_eps is 0.0; expected a positive number"),
        (dict(norm_eps=None), r"^norm_eps is None; expected a number"),
        (dict(dropout="0.1"), r"^dropout is '0.1'; expected a number"),
        (dict(freq_shift=None), r"^freq_shift is None; expected a number"),
        (dict(norm_groups=2.0), r"^norm_groups is 2.0; expected an integer of at least 1"),
        (dict(norm_groups=None), r"^norm_groups is None; expected an integer of at least 1"),
        (dict(head_dim=4.0), r"^head_dim is 4.0; expected an integer of at least 1"),
        (dict(head_dim=3), r"^head_dim is 3; expected None, or a divisor of .*\[8\]"),
        (
            dict(freq_shift=2.0),
            r"^freq_shift is 2.0; expected less than half of the first level's channels, 4",
        ),
        (dict(block_channels=(5, 8), norm_groups=1, freq_shift=2.2), r"half of the first .*, 5, rounded"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        td.UNet(**{**SMALL, **changes})


@pytest.mark.parametrize("name", ["in_features", "out_features", "hidden", "blocks", "time_features"])
def test_mlp_sizes(name):
    with pytest.raises(ValueError, match=f"^{name} is 0; expected an integer of at least 1"):
        td.MLP(**{"in_features": 2, name: 0})


X, T = np.zeros((2, 4, 4, 2), np.float32), np.zeros(2, int)


@pytest.mark.parametrize("run", ["__call__", "predict"])
@pytest.mark.parametrize(
    "x, t, message",
    [
        (X[0], T, r"^x has shape \(4, 4, 2\); expected \(N, H, W, 2\)"),
        (X[..., :1], T, r"^x has shape \(2, 4, 4, 1\); expected \(N, H, W, 2\)"),
        (X.transpose(0, 3, 1, 2), T, r"^x has shape \(2, 2, 4, 4\)"),
        (X[:, :3], T, r"^x has shape \(2, 3, 4, 2\).* H and W divisible by 2"),
        (X[:, :, :3], T, r"^x has shape \(2, 4, 3, 2\)"),
        (X, T[:1], r"^t has shape \(1,\); expected \(2,\)"),
        (X, np.int64(3), r"^t has shape \(\); expected \(2,\)"),
        (X, 3, r"^t is an int; expected an array"),
        (X, [3, 4], r"^t is a list; expected an array"),
        (X.tolist(), T, r"^x is a list; expected an array"),
        (
            X.astype(np.float64),
            T,
            r"^x is a numpy array of float64; the model's weights are numpy arrays of float32",
        ),
        (X.astype(np.int64), T, r"^x is a numpy array of int64"),
        (array_api_strict.asarray(X), T, r"^x is a array_api_strict.* array of .*float32.*numpy arrays"),
    ],
)
def test_inputs_that_do_not_fit(run, x, t, message):
    model = td.UNet(**SMALL)
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(model, run)(x, t)


@pytest.mark.parametrize("run", ["__call__", "predict"])
@pytest.mark.parametrize(
    "x, t, message",
    [
        (np.zeros((2, 3), np.float32), T, r"^x has shape \(2, 3\); expected \(N, 2\)"),
        (np.zeros(2, np.float32), T, r"^x has shape \(2,\); expected \(N, 2\)"),
        (np.zeros((2, 2), np.float32), T[:1], r"^t has shape \(1,\); expected \(2,\)"),
        (np.zeros((2, 2), np.float32), 3, r"^t is an int; expected an array"),
        (np.zeros((2, 2)), T, r"^x is a numpy array of float64; .* float32"),
        (array_api_strict.zeros((2, 2)), T, r"^x is a array_api_strict"),
    ],
)
def test_mlp_inputs_that_do_not_fit(run, x, t, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(td.MLP(), run)(x, t)


@pytest.mark.parametrize(("t", "embedded"), [([5, 5, 5], 1), ([5, 6, 5], 3), ([5], 1), ([], 0)])
def test_mlp_embeds_one_time_once_where_it_predicts(monkeypatch, t, embedded):
    """As a sampler asks: all at one time. A training step's derivative has a row of its own for each."""
    rng = np.random.default_rng(0)
    mlp = randomise(td.MLP(hidden=6, blocks=2, time_features=4, rng=rng).to(np, np.float64), rng)
    embed, rows = mlp.time_embedding, []
    monkeypatch.setattr(mlp, "time_embedding", lambda s: rows.append(len(s)) or embed(s))
    x, t = rng.normal(size=(len(t), 2)), np.array(t, dtype=int)
    assert_allclose(mlp.predict(x, t), mlp(x, t)[0], rtol=1e-13, atol=1e-13)
    assert rows == [embedded, len(t)]


@pytest.mark.parametrize(("of_x", "of_weights"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_all_is_on_the_gpu_that_is_current(monkeypatch, of_x, of_weights):
    """In a new thread that is the first one, wherever the weights are; there a kernel may not reach them."""

    class Device:
        def __init__(self, number=0):
            self.number = number

        def __eq__(self, other):
            return self.number == other.number

        def __repr__(self):
            return f"<CUDA Device {self.number}>"

    class There(np.ndarray):
        device = property(lambda self: Device(self.number))

    x, weights = (np.ones(3, np.float32).view(There) for _ in range(2))
    x.number, weights.number = of_x, of_weights
    monkeypatch.setattr(_checks, "is_cupy_array", lambda array: type(array) is There)
    if of_x == of_weights == 0:
        return _checks.check_like_weights(x, weights)
    says = f"^x is on <CUDA Device {of_x}>, the model's weights are on <CUDA Device {of_weights}>.*Device 0>"
    with pytest.raises(ValueError, match=says):
        _checks.check_like_weights(x, weights)


@pytest.mark.parametrize(("model", "x"), [(td.UNet(**SMALL), X), (td.MLP(), X[:, 0, 0])])
def test_only_float32_and_float64_are_computed_in(model, x):
    """In float16 the variance of a large image is infinite: pictures came out finite, and wrong."""
    model = copy.deepcopy(model).to(np, np.float16)
    with pytest.raises(ValueError, match=r"^the model's weights are of float16; expected float32 or float64"):
        model.predict(x.astype(np.float16), T)
