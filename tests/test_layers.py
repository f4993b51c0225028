"""Every layer: its derivative against central differences, its function against its formula, its contract."""

import gc
import math
import re
import weakref

import numpy as np
import pytest
from formulas import FORMULAS, affine, convolve, normalise, sinusoids, swish
from gradients import (
    LAYERS,
    Case,
    as_tuple,
    assert_central_differences_agree,
    assert_gradients_agree,
    cases,
    frozen,
    gradients_of,
    normal,
    randomise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import binom

from tinydiff import EMA, Adam, nn
from tinydiff.nn import init, module

every_layer = pytest.mark.parametrize("name", LAYERS)


# Derivatives


@every_layer
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_central_differences(name, data):
    case, rng = data.draw(cases(name))
    assert_central_differences_agree(case, rng)


def test_the_judge_finds_a_wrong_derivative():
    """One element of one gradient off by a part in a thousand is seen."""
    rng = np.random.default_rng(0)
    layer = randomise(nn.Linear(7, 5, rng), rng)

    class Wrong(nn.Module):
        def __init__(self):
            self.layer = layer

        def __call__(self, x):
            y, backward = self.layer(x)

            def wrong(dy):
                dx = backward(dy)
                layer.weight.grad[3, 2] *= 1.001
                return dx

            return y, wrong

    with pytest.raises(AssertionError, match=r"gradient of parameter 'layer.weight' is off"):
        assert_central_differences_agree(Case(Wrong(), [normal(rng, (4, 7))]), rng)


# Functions


@pytest.mark.parametrize("name", FORMULAS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_the_function_is_its_formula(name, data):
    case, _ = data.draw(cases(name))
    y, _ = case.layer(*case.inputs)
    p = {key: parameter.value for key, parameter in case.parameters.items()}
    expected = FORMULAS[name](*case.inputs, p, **case.settings)
    assert y.shape == expected.shape
    assert_allclose(y, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))


@settings(deadline=None)
@given(
    t=st.lists(st.integers(0, 4000), min_size=1, max_size=5),
    half=st.integers(2, 20),
    flip=st.booleans(),
    shift=st.sampled_from([0.0, 1.0, 1.5]),
    period=st.sampled_from([10_000.0, 500.0]),
)
def test_sinusoidal_embedding(t, half, flip, shift, period):
    t = np.array(t)
    options = dict(flip_sin_to_cos=flip, freq_shift=shift, max_period=period)
    expected = sinusoids(t, 2 * half, flip, shift, period)
    # The argument reaches 4000, whose last bit is 1e-12 of a turn.
    y = nn.sinusoidal_embedding(t, 2 * half, like=np.zeros(1), **options)
    assert_allclose(y, expected, rtol=0, atol=2e-12)
    odd = nn.sinusoidal_embedding(t, 2 * half + 1, like=np.zeros(1), **options)
    assert_array_equal(odd[:, :-1], y)
    assert not odd[:, -1].any()
    # float32 is rounded once, at the end.
    single = nn.sinusoidal_embedding(t, 2 * half, like=np.zeros(1, np.float32), **options)
    assert_array_equal(single, y.astype(np.float32))
    between = nn.sinusoidal_embedding(t + 0.3, 2 * half, like=np.zeros(1), **options)
    assert_allclose(between, sinusoids(t + 0.3, 2 * half, flip, shift, period), rtol=0, atol=2e-12)
    single = nn.sinusoidal_embedding(t + 0.3, 2 * half, like=np.zeros(1, np.float32), **options)
    assert_array_equal(single, between.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sinusoids_from_the_table_are_those_computed(dtype):
    """In every bit, wherever the times lie; and nobody can write into the table."""
    like = np.zeros(1, dtype)
    for t in ([0], [5, 999, 5], [1023, 1024], [4095, 7], [4096, 1], [-1, 3], [], [10**6]):
        for kind in (np.int64, np.int32):
            whole = np.array(t, kind)
            looked_up = nn.sinusoidal_embedding(whole, 7, like=like, freq_shift=0.5)
            assert looked_up.dtype == dtype and looked_up.shape == (len(t), 7)
            computed = nn.sinusoidal_embedding(whole.astype(np.float64), 7, like=like, freq_shift=0.5)
            assert_array_equal(looked_up, computed)
            looked_up += 1.0
            assert_array_equal(nn.sinusoidal_embedding(whole, 7, like=like, freq_shift=0.5), computed)


def test_an_embedding_of_one_number_is_zero():
    """Half of one is none, and odd lengths end in a zero."""
    assert_array_equal(nn.sinusoidal_embedding(np.array([3, 5]), 1, like=np.zeros(1)), np.zeros((2, 1)))
    assert_array_equal(nn.sinusoidal_embedding(np.array([3.5]), 1, like=np.zeros(1)), np.zeros((1, 1)))


def test_sinusoids_at_their_ends():
    """Frequency 1 comes first; the last is 1/10000 exactly if the shift is 1, and short of it if 0."""
    t = np.array([0, 1])
    y = nn.sinusoidal_embedding(t, 4, like=np.zeros(1), freq_shift=1.0, flip_sin_to_cos=False)
    assert_allclose(y, [[0, 0, 1, 1], [math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]], rtol=1e-14)
    y = nn.sinusoidal_embedding(t, 4, like=np.zeros(1))
    assert_allclose(y, [[1, 1, 0, 0], [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]], rtol=1e-14)


def test_arguments_far_out_neither_overflow_nor_lose_the_tail():
    with np.errstate(all="raise", under="ignore"):
        x = np.array([-1000.0, -50.0, 0.0, 50.0, 1000.0])
        y, backward = nn.silu(x)
        assert_allclose(y, [0.0, -50 * math.exp(-50), 0, 50, 1000], rtol=1e-14)
        assert_allclose(backward(np.ones(5)), [0.0, -49 * math.exp(-50), 0.5, 1, 1], rtol=1e-13)
        rng = np.random.default_rng(0)
        layer = randomise(nn.SelfAttention(4, 2, 2, 1e-5, rng), rng)
        layer.to_q.weight.value = 1e4 * layer.to_q.weight.value  # the largest score takes all
        y, backward = layer(normal(rng, (2, 3, 3, 4)))
        assert np.isfinite(y).all() and np.isfinite(backward(np.ones_like(y))).all()


# Dropout


# All counts together reject a correct mask once in a million choices of the seed.
COUNTS = 3 * 4
FALSE_ALARM = 1e-6 / COUNTS


def assert_plausible(count, n, probability):
    low, high = binom.interval(1 - FALSE_ALARM, n, probability)
    assert low <= count <= high, f"{count} of {n}; expected {low} ... {high}"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_statistics(rate):
    shape = (20, 30, 10, 40)
    y, backward = nn.dropout(np.ones(shape), rate, np.random.default_rng(1))
    kept = y != 0
    assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-15)
    assert_plausible(kept.sum(), kept.size, 1 - rate)
    # Neighbours along rows, columns and channels are independent: a mask per pixel or per channel is not.
    for axis in (1, 2, 3):
        even, odd = (np.take(kept, np.arange(i, shape[axis], 2), axis) for i in (0, 1))
        assert_plausible((even & odd).sum(), even.size, (1 - rate) ** 2)
    # The derivative uses the mask of the forward.
    dy = np.random.default_rng(2).standard_normal(shape)
    assert_array_equal(backward(dy), dy * y)


def test_a_rate_that_is_a_numpy_number_makes_no_float64():
    x = np.ones((3, 4), np.float32)
    y, backward = nn.dropout(x, np.float64(0.5), np.random.default_rng(0))
    assert y.dtype == backward(x).dtype == np.float32


def test_dropout_draws_anew_from_its_rng():
    rng = np.random.default_rng(0)
    x = np.ones((50, 50))
    first, second = nn.dropout(x, 0.5, rng)[0], nn.dropout(x, 0.5, rng)[0]
    assert np.any(first != second)
    assert_array_equal(first, nn.dropout(x, 0.5, np.random.default_rng(0))[0])


@pytest.mark.parametrize("rate, rng", [(0.5, None), (0.0, np.random.default_rng(0))])
def test_dropout_is_off_without_rng_or_rate(rate, rng):
    x = normal(np.random.default_rng(0), (3, 4))
    y, backward = nn.dropout(x, rate, rng)
    assert_array_equal(y, x)
    assert_array_equal(backward(x), x)


def test_dropout_sits_in_the_residual_block_before_the_second_convolution():
    rng = np.random.default_rng(0)
    block = randomise(nn.ResnetBlock(4, 4, 3, 2, 1e-5, 0.5, rng), rng)
    x, emb = normal(rng, (2, 3, 3, 4)), normal(rng, (2, 3))
    without, _ = block(x, emb)
    dropped, _ = block(x, emb, np.random.default_rng(7))
    # The same by hand, with the mask that this generator draws.
    mask = (np.random.default_rng(7).random((2, 3, 3, 4), dtype=np.float32) >= 0.5) * 2.0
    p = {name: q.value for name, q in block.named_parameters().items()}
    h = convolve(
        swish(normalise(x, p["norm1.weight"], p["norm1.bias"], 2, 1e-5)), p["conv1.weight"], 0, 1, (1, 1)
    )
    h = h + p["conv1.bias"] + affine(emb, p, "time_emb_proj")[:, None, None]
    h = swish(normalise(h, p["norm2.weight"], p["norm2.bias"], 2, 1e-5)) * mask
    assert_allclose(dropped, x + convolve(h, p["conv2.weight"], p["conv2.bias"], 1, (1, 1)), rtol=1e-12)
    assert np.abs(dropped - without).max() > 0.1

    # And its derivative, with the generator started again at every call.
    case = Case(lambda x, emb: block(x, emb, np.random.default_rng(7)), [x, emb], module=block)
    assert_central_differences_agree(case, rng)


# The contract: called twice, called once, shared, accumulated, kept apart


@every_layer
@settings(deadline=None, max_examples=10)
@given(data=st.data(), last_first=st.booleans())
def test_two_calls_before_either_backward(name, data, last_first):
    """Bit for bit what two separate calls give, in either order; inputs are read-only (gradients.py)."""
    case, rng = data.draw(cases(name))
    inputs = [case.inputs, [normal(rng, x.shape) for x in case.inputs]]
    expected = []
    for case.inputs in inputs:
        y, _ = case.layer(*case.inputs)
        dy = normal(rng, y.shape)
        y, gradients = gradients_of(case, dy)
        copies = {key: g.copy() for key, g in gradients.items()}
        expected.append((y.copy(), dy, copies))
    for p in case.parameters.values():
        p.zero_grad()
    calls = [case.layer(*each) for each in inputs]
    for (y, _), (y_alone, _, _) in zip(calls, expected):
        assert_array_equal(y, y_alone)
    dxs = [None, None]
    for i in (1, 0) if last_first else (0, 1):
        dxs[i] = as_tuple(calls[i][1](expected[i][1]))
    for i in range(2):
        # Not overwritten by the other call, nor by the backwards.
        assert_array_equal(calls[i][0], expected[i][0])
        for j, dx in enumerate(dxs[i]):
            assert_array_equal(dx, expected[i][2][f"x{j}"])
    for key, p in case.parameters.items():
        assert_array_equal(p.grad, expected[0][2][key] + expected[1][2][key], err_msg=key)


@every_layer
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_backward_is_called_once(name, data):
    case, rng = data.draw(cases(name))
    y, backward = case.layer(*case.inputs)
    dy = normal(rng, y.shape)
    backward(dy)
    before = {key: p.grad for key, p in case.parameters.items()}
    with pytest.raises(RuntimeError, match="backward was called a second time"):
        backward(dy)
    for key, p in case.parameters.items():
        assert_array_equal(p.grad, before[key])


@every_layer
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_a_gradient_of_another_shape_is_refused_and_counts_for_nothing(name, data):
    """A kernel would read on where dy ends: what lies there is nobody's. The right one may come after."""
    case, rng = data.draw(cases(name))
    y, backward = case.layer(*case.inputs)
    axis = data.draw(st.integers(0, y.ndim - 1))
    wrong = list(y.shape)
    wrong[axis] += data.draw(st.sampled_from([-1, 1]))
    for shape in (tuple(wrong), (1, *y.shape)):  # the second of the right size
        with pytest.raises(ValueError, match=re.escape(f"expected {y.shape}")):
            backward(normal(rng, shape))
    for key, p in case.parameters.items():
        assert not p.grad.any(), key
    dy = normal(rng, y.shape)
    for dx, expected in zip(as_tuple(backward(dy)), as_tuple(case.layer(*case.inputs)[1](dy))):
        assert_array_equal(dx, expected)


@every_layer
@settings(deadline=None, max_examples=5)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float32])
def test_a_gradient_of_another_dtype_is_taken_for_its_numbers(name, dtype, data):
    """A loss by hand may return signs, which are integers: a bias would have their sum for its gradient."""
    case, rng = data.draw(cases(name))
    y, _ = case.layer(*case.inputs)
    signs = rng.choice([-1, 0, 1], y.shape)
    _, expected = gradients_of(case, signs.astype(y.dtype))
    expected = {key: gradient.copy() for key, gradient in expected.items()}
    for p in case.parameters.values():
        p.zero_grad()
    _, gradients = gradients_of(case, signs.astype(dtype))
    for key, gradient in gradients.items():
        assert gradient.dtype == expected[key].dtype, key
        assert_array_equal(gradient, expected[key], err_msg=key)


@pytest.mark.parametrize("dy", [None, [1.0, 2.0], np.ones((4, 3), complex), np.ones((4, 3), bool)])
def test_what_is_no_gradient_is_refused(dy):
    layer = nn.Linear(2, 3, np.random.default_rng(0))
    _, backward = layer(np.ones((4, 2), np.float32))
    with pytest.raises(TypeError, match=r"^dy (is a|has dtype) .*; expected"):
        backward(dy)
    backward(np.ones((4, 3), np.float32))


def test_inference_within_inference_ends_with_the_outer():
    layer, x, dy = nn.Linear(2, 3, np.random.default_rng(0)), np.ones((4, 2), np.float32), np.ones((4, 3))
    with nn.inference():
        with nn.inference():
            pass
        _, backward = layer(x)
    with pytest.raises(RuntimeError, match="inference"):
        backward(dy)
    layer(x)[1](dy)


def test_ctrl_c_in_a_prediction_leaves_derivatives_kept(monkeypatch):
    """It may come as soon as they are no longer kept; no later step of the session could differentiate."""
    keeping = module._keeping

    class Interrupted:
        get, reset = keeping.get, keeping.reset

        def set(self, keep):
            keeping.set(keep)
            if not keep:
                raise KeyboardInterrupt  # which Python raises where a call returns

    monkeypatch.setattr(module, "_keeping", Interrupted())
    layer, x = nn.Linear(2, 3, np.random.default_rng(0)), np.ones((4, 2), np.float32)
    with pytest.raises(KeyboardInterrupt):
        layer.predict(x)
    with pytest.raises(KeyboardInterrupt), nn.inference():
        pass
    layer(x)[1](np.ones((4, 3), np.float32))


def test_a_layer_that_changes_its_dtype_leaves_its_gradient_behind():
    layer = nn.Linear(2, 3, np.random.default_rng(0))
    layer(np.ones((4, 2), np.float32))[1](np.ones((4, 3), np.float32))
    assert all(p.grad.any() for p in layer.named_parameters().values())
    layer.to(np, np.float64)
    for p in layer.named_parameters().values():
        assert p.grad.dtype == np.float64 and not p.grad.any()


def test_the_eps_of_a_group_norm_is_1e_5_unless_it_is_given():
    x = np.array([1e-3, -1e-3]).reshape(1, 1, 2, 1)
    norm = nn.GroupNorm(1, 1).to(np, np.float64)
    assert_allclose(norm(x)[0], x / (1e-6 + 1e-5) ** 0.5, rtol=1e-12)


def test_layers_in_mappings_have_names_and_a_network_of_ones_own_predicts():
    rng = np.random.default_rng(0)

    class Own(nn.Module):
        def __init__(self):
            self.layers = {"first": nn.Linear(2, 3, rng), "then": [nn.Linear(3, 2, rng)]}

        def __call__(self, x):
            h, backward_first = self.layers["first"](x)
            y, backward_then = self.layers["then"][0](h)
            return y, lambda dy: backward_first(backward_then(dy))

    own = Own()
    assert list(own.named_parameters()) == [
        f"layers.{name}.{of}" for name in ("first", "then.0") for of in ("weight", "bias")
    ]
    x = normal(rng, (4, 2)).astype(np.float32)
    assert_array_equal(own.predict(x), own(x)[0])


def test_a_module_that_is_a_mapping_too_names_what_it_has_as_a_module():
    own = nn.Module()
    own.table = type("Table", (nn.Module, dict), {})(size=3)
    own.table.rows = nn.Parameter(np.zeros(3))
    assert list(own.named_parameters()) == ["table.rows"]


@pytest.mark.parametrize("keys", [("a.b", "a"), (0, "0")])
def test_two_parameters_of_one_name_are_refused(keys):
    """Or one of them would never be trained, nor saved."""
    first, second = (nn.Parameter(np.zeros(size)) for size in (1, 2))
    own = nn.Module()
    own.layers = {keys[0]: first, keys[1]: {"b": second} if keys[1] == "a" else second}
    with pytest.raises(ValueError, match=r"two parameters are called 'layers\.(a\.b|0)'"):
        own.named_parameters()


@every_layer
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_float32_in_float32_out(name, data):
    """Nothing in between makes float64 of float32; and the numbers are those of float64, rounded."""
    case, rng = data.draw(cases(name))
    y, _ = case.layer(*case.inputs)
    dy = normal(rng, y.shape)
    y, gradients = gradients_of(case, dy)
    case.inputs = [x.astype(np.float32) for x in case.inputs]
    for p in case.parameters.values():
        p.value = p.value.astype(np.float32)
    y_single, gradients_single = gradients_of(case, dy.astype(np.float32))
    for key, value in {"y": y_single, **gradients_single}.items():
        assert value.dtype == np.float32, key
    assert_allclose(y_single, y, rtol=0, atol=1e-4 * max(1.0, np.abs(y).max()))
    assert_gradients_agree(gradients_single, gradients, 1e-4)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "GroupNorm"])
def test_one_parameter_in_two_layers(kind):
    """Its gradient is the sum of both uses', it has one name, and counts once."""
    rng = np.random.default_rng(0)

    def make():
        layer = {
            "Linear": lambda: nn.Linear(4, 4, rng),
            "Conv2d": lambda: nn.Conv2d(4, 4, 3, rng=rng),
            "GroupNorm": lambda: nn.GroupNorm(2, 4),
        }[kind]()
        return randomise(layer, rng)

    class Two(nn.Module):
        def __init__(self, first, second):
            self.first, self.second = first, second

        def __call__(self, x):
            h, backward_first = self.first(x)
            y, backward_second = self.second(h)
            return y, lambda dy: backward_first(backward_second(dy))

    tied, apart = Two(make(), make()), Two(make(), make())
    tied.second.weight = tied.first.weight
    for layer, twin in [(apart.first, tied.first), (apart.second, tied.second)]:
        layer.weight.value, layer.bias.value = twin.weight.value, twin.bias.value
    x, dy = normal(rng, (2, 3, 3, 4)), normal(rng, (2, 3, 3, 4))
    results = [model(x) for model in (tied, apart)]
    assert_array_equal(results[0][0], results[1][0])
    dxs = [backward(dy) for _, backward in results]
    assert_array_equal(*dxs)
    assert_array_equal(tied.first.weight.grad, apart.second.weight.grad + apart.first.weight.grad)
    assert list(tied.named_parameters()) == ["first.weight", "first.bias", "second.bias"]
    assert list(tied.state_dict()) == ["first.weight", "first.bias", "second.bias"]
    assert tied.num_parameters() == apart.num_parameters() - math.prod(tied.first.weight.shape)
    assert_central_differences_agree(Case(tied, [x]), rng)
    # Moving to another dtype keeps the two one.
    tied.to(np, np.float32)
    assert tied.second.weight is tied.first.weight


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_what_backward_held_is_let_go(kind):
    rng = np.random.default_rng(0)
    layer = nn.Linear(3, 3, rng) if kind == "Linear" else nn.Conv2d(3, 3, 3, rng=rng)
    x = np.ones((1, 4, 4, 3), np.float32)
    held = weakref.ref(x)
    y, backward = layer(x)
    del x
    gc.collect()
    assert held() is not None, "the layer kept nothing: this test says nothing"
    backward(y)
    gc.collect()
    assert held() is None


# Parameters and modules


def test_gradient_is_zero_until_a_backward_has_run_and_adds_up():
    p = nn.Parameter(np.ones((2, 3), np.float32))
    assert_array_equal(p.grad, np.zeros((2, 3)))
    assert p.grad.dtype == np.float32
    g = frozen(np.full((2, 3), 2.0, np.float32))
    p.accumulate(g)
    p.accumulate(g)
    assert_array_equal(p.grad, np.full((2, 3), 4.0))
    p.zero_grad()
    assert_array_equal(p.grad, np.zeros((2, 3)))


@pytest.mark.parametrize("shape", [(), (3, 2), (6,), (1, 2, 3)])
def test_a_gradient_of_another_shape_than_its_value_is_refused(shape):
    """Transposed, as PyTorch has its weights, it would fit between others', and step what it is not of."""
    p = nn.Parameter(np.ones((2, 3), np.float32))
    wrong = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=re.escape(f"grad has shape {shape}; expected (2, 3), the value's.")):
        p.accumulate(wrong)
    with pytest.raises(ValueError, match="grad has shape"):
        p.grad = wrong
    with pytest.raises(ValueError, match="grad has shape"):
        nn.Parameter(p.value, wrong)
    assert not p.grad.any()


def test_a_gradient_handed_over_is_not_written_to_later():
    given_grad = np.ones(3)
    p = nn.Parameter(np.zeros(3))
    p.accumulate(given_grad)
    p.accumulate(np.ones(3))
    assert_array_equal(given_grad, np.ones(3))


def test_load_state_dict_refuses_what_does_not_fit_and_changes_nothing():
    rng = np.random.default_rng(0)
    layer = nn.Linear(2, 3, rng)
    before = {name: value.copy() for name, value in layer.state_dict().items()}
    for state, message in [
        ({"weight": np.ones((2, 3))}, r"missing bias; unexpected none"),
        ({"weight": np.ones((2, 3)), "bias": np.ones(3), "b": 0}, r"missing none; unexpected b"),
        (
            {"weight": np.ones((2, 3)), "bias": np.ones((3, 1))},
            r"state\['bias'\] has shape \(3, 1\); expected \(3,\)",
        ),
        ({f"{i}": 0 for i in range(9)}, r"9 in all"),
        (
            {"weight": np.ones((2, 3)), "bias": np.full(3, "a")},
            r"state\['bias'\] is an ndarray of <U1; expected an array of real numbers",
        ),
        (
            {"weight": np.ones((2, 3)), "bias": np.ones(3, complex)},
            r"state\['bias'\] is an ndarray of complex128; expected an array of real numbers",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict(state)
        for name, value in layer.state_dict().items():
            assert_array_equal(value, before[name])


def test_a_module_in_the_place_of_its_state_is_named():
    layer = nn.Linear(2, 3, np.random.default_rng(0))
    for part in (layer, Adam(layer.named_parameters()), EMA(layer)):
        with pytest.raises(TypeError, match=r"^state is a Linear; expected a mapping, what state_dict\(\)"):
            part.load_state_dict(layer)


def test_load_state_dict_copies_and_keeps_the_dtype():
    layer = nn.Linear(2, 3, np.random.default_rng(0))
    for dtype in (np.float32, np.float64):
        state = {"weight": np.ones((2, 3), dtype), "bias": np.ones(3, np.float16)}
        layer.load_state_dict(state)
        state["weight"][...] = 7
        assert_array_equal(layer.weight.value, np.ones((2, 3)))
    assert layer.weight.value.dtype == layer.bias.value.dtype == np.float32


@pytest.mark.parametrize(
    "make, fan",
    [
        (lambda rng: init.uniform(rng, (3, 3, 100, 300)), 9 * 200),
        (lambda rng: nn.Conv2d(100, 300, 3, rng=rng).weight, 9 * 200),
        (lambda rng: nn.Conv2d(300, 100, 1, rng=rng).weight, 200),
        (lambda rng: nn.Linear(500, 300, rng).weight, 400),
        (lambda rng: nn.Conv2d(100, 300, 3, rng=rng, scale=0.25).weight, 9 * 200 / 0.25),
        (lambda rng: nn.Linear(500, 300, rng, scale=0.25).weight, 400 / 0.25),
    ],
)
def test_initial_weights(make, fan):
    """Uniform, variance scale / mean(fan_in, fan_out); drawn in float32."""
    value = make(np.random.default_rng(0)).value
    assert value.dtype == np.float32
    assert np.abs(value).max() <= math.sqrt(3 / fan)
    # The standard error of the mean square is 0.9 / sqrt(n) of it; 6 of them.
    assert_allclose(np.mean(np.square(value, dtype=np.float64)), 1 / fan, rtol=5.4 / math.sqrt(value.size))
    assert abs(value.mean(dtype=np.float64)) < 6 / math.sqrt(fan * value.size)


def test_what_begins_at_zero():
    """Scale 0, and so the last layer of a residual branch: a new block is the identity, to the last bit."""
    rng = np.random.default_rng(0)
    x, emb = normal(rng, (2, 3, 3, 4)), normal(rng, (2, 5))
    assert not init.uniform(rng, (3, 4), 0.0).value.any()
    assert_array_equal(nn.ResnetBlock(4, 4, 5, 2, 1e-5, 0.0, rng).to(np, np.float64)(x, emb)[0], x)
    assert_array_equal(nn.SelfAttention(4, 2, 2, 1e-5, rng).to(np, np.float64)(x)[0], x)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_padding_keeps_the_size_unless_it_is_given(kernel_size):
    """And with taps that are 0 but in the middle, each pixel where it is."""
    x = normal(np.random.default_rng(0), (1, 4, 6, 2))
    conv = nn.Conv2d(2, 2, kernel_size, rng=np.random.default_rng(0)).to(np, np.float64)
    middle = np.zeros_like(conv.weight.value)
    middle[kernel_size // 2, kernel_size // 2] = np.eye(2)
    conv.weight.value = middle
    assert_array_equal(conv(x)[0], x)


@pytest.mark.parametrize("padding", [0, 1, np.int64(2)])
def test_one_number_pads_both_ends(padding):
    x, rng = np.ones((1, 5, 5, 2), np.float32), np.random.default_rng
    one, two = (nn.Conv2d(2, 3, 3, rng=rng(0), padding=given) for given in (padding, (padding, padding)))
    assert_array_equal(one(x)[0], two(x)[0])


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda rng: nn.GroupNorm(3, 4), r"norm_groups = 3 does not divide channels = 4"),
        (lambda rng: nn.GroupNorm(0, 4), r"norm_groups is 0; expected an integer of at least 1"),
        (lambda rng: nn.SelfAttention(6, 4, 2, 1e-5, rng), r"head_dim = 4 does not divide channels = 6"),
        (
            lambda rng: nn.SelfAttention(6, 0, 2, 1e-5, rng),
            r"head_dim is 0; expected an integer of at least 1",
        ),
        (lambda rng: nn.Linear(3, 4 / 2, rng), r"out_features is 2.0; expected an integer of at least 1"),
        (lambda rng: nn.Linear(-1, 2, rng), r"in_features is -1; expected an integer of at least 1"),
        (lambda rng: nn.Linear(3, 2, rng, scale=-1.0), r"scale is -1.0; expected a number of at least 0"),
        (lambda rng: nn.Conv2d(3, True, 3, rng=rng), r"out_channels is True; expected an integer"),
        (lambda rng: nn.Conv2d(None, 2, 3, rng=rng), r"in_channels is None; expected an integer"),
        (lambda rng: nn.Conv2d(3, 2, 0, rng=rng), r"kernel_size is 0; expected an integer of at least 1"),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng, stride=(1, 1)), r"stride is \(1, 1\); expected an integer"),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng, padding=-1), r"padding is -1; expected one number of zeros"),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng, padding=(1,)), r"padding is \(1,\); expected one number"),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng, padding=(1, 0.5)), r"padding is \(1, 0.5\); expected one"),
        (lambda rng: nn.Conv2d(3, 2, 3, rng=rng, padding="same"), r"padding is 'same'; expected one number"),
        (lambda rng: nn.GroupNorm(4.0, 8), r"norm_groups is 4.0; expected an integer of at least 1"),
        (lambda rng: nn.SelfAttention(8, 8 / 2, 2, 1e-5, rng), r"head_dim is 4.0; expected an integer"),
        (lambda rng: nn.Downsample(3, 2, rng), r"padding is 2; expected one of 0, 1"),
        (lambda rng: nn.dropout(np.ones(3), 1.0, rng), r"rate is 1.0; expected a probability in \[0, 1\)"),
        (lambda rng: nn.dropout(np.ones(3), -0.1, None), r"rate is -0.1; expected a probability"),
        (lambda rng: nn.dropout(np.ones(3), 50, rng), r"rate is 50; expected a probability"),
        (
            lambda rng: nn.sinusoidal_embedding(np.ones((2, 1), int), 4, like=np.ones(1)),
            r"t has shape \(2, 1\); expected \(N,\)",
        ),
        (
            lambda rng: nn.sinusoidal_embedding(np.array(3), 4, like=np.ones(1)),
            r"t has shape \(\); expected \(N,\)",
        ),
        (
            lambda rng: nn.sinusoidal_embedding(np.arange(3), 8 / 2, like=np.ones(1)),
            r"dim is 4.0; expected an integer of at least 1",
        ),
        (lambda rng: nn.SelfAttention(6, 3, 4, 1e-5, rng), r"norm_groups = 4 does not divide channels = 6"),
        (
            lambda rng: nn.ResnetBlock(6, 8, 4, 4, 1e-5, 0.0, rng),
            r"norm_groups = 4 does not divide channels = 6",
        ),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.random.default_rng(0))


def test_four_copies_of_one_pixel_are_four_numbers():
    """Not one number seen four times, which nobody may change."""
    y, _ = nn.upsample_nearest(np.ones((1, 1, 1, 1), np.float32))
    y[0, 0, 0, 0] = 2.0
    assert np.sum(y) == 5.0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda rng: nn.Linear(16, 4, rng), "(..., 16)"),
        (lambda rng: nn.Conv2d(16, 4, 3, rng=rng), "(N, H, W, 16)"),
        (lambda rng: nn.Conv2d(16, 4, 1, rng=rng), "(N, H, W, 16)"),
        (lambda rng: nn.GroupNorm(4, 16), "(N, H, W, 16)"),
        (lambda rng: nn.GroupNorm(4, 16, then_silu=True), "(N, H, W, 16)"),
        (lambda rng: nn.Downsample(16, 1, rng), "(N, H, W, 16)"),
        (lambda rng: nn.Upsample(16, rng), "(N, H, W, 16)"),
        (lambda rng: nn.SelfAttention(16, 8, 4, 1e-5, rng), "(N, H, W, 16)"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 8, 8, 32), (2, 16, 8, 8), (2, 8, 8, 1), (2, 8), (8,)])
def test_an_input_of_another_shape_is_refused_before_a_kernel_sees_it(make, expected, shape):
    """A compiled one goes as far as the weights do: with other channels it wrote where others' memory is."""
    layer = make(np.random.default_rng(0))
    with pytest.raises(ValueError, match=re.escape(f"x has shape {shape}; expected {expected}.")):
        layer(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: nn.silu,
        lambda rng: nn.Conv2d(16, 4, 3, rng=rng),
        lambda rng: nn.GroupNorm(4, 16),
        lambda rng: nn.GroupNorm(4, 16, then_silu=True),
        lambda rng: nn.Upsample(16, rng),
        lambda rng: nn.SelfAttention(16, 8, 4, 1e-5, rng),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_an_input_of_other_numbers_is_refused(make, dtype):
    layer = make(np.random.default_rng(0))
    expected = f"x has dtype {np.dtype(dtype)}; expected a real floating one."
    with pytest.raises(TypeError, match=re.escape(expected)):
        layer(np.ones((2, 8, 8, 16), dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(1.0), "value is a float; expected an array"),
        (lambda: nn.Parameter(np.ones(2), [1.0, 1.0]), "grad is a list; expected an array"),
        (lambda: nn.Parameter(np.ones(2)).accumulate(1.0), "grad is a float; expected an array"),
        (lambda: nn.Linear(2, 3, np.random.default_rng(0))([[1.0, 2.0]]), "x is a list; expected an array"),
        (lambda: nn.SelfAttention(4, 2, 2, 1e-5, np.random.default_rng(0))([1.0]), "x is a list; expected"),
        (lambda: nn.dropout(np.ones(3), 0.5, 0), "rng is an int; expected a numpy.random.Generator"),
        (lambda: nn.GroupNorm(2, 4).to("cupy"), "xp is 'cupy'; expected the namespace of an array library"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_silu_of_the_other_byte_order(dtype):
    """As a file of another machine may have it."""
    x = np.array([-1e4, -1.0, 0.0, 2.0, 1e4], dtype)
    y, backward = nn.silu(x.astype(x.dtype.newbyteorder()))
    expected, backward_expected = nn.silu(x)
    rtol = 4 * np.finfo(dtype).eps  # the compiled twin leaves it to NumPy's
    assert_allclose(y, expected, rtol=rtol)
    assert_allclose(backward(np.ones_like(x)), backward_expected(np.ones_like(x)), rtol=rtol)
