"""Adam by hand, the NumPy twins against their definition, clipping, the learning rate, the moving average."""

import copy
import importlib.util
import math
import pickle

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from namespaces import NAMES, space
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
import tinydiff.kernels
from tinydiff._together import EndToEnd, cut
from tinydiff.backend import to_numpy
from tinydiff.checkpoint import load_arrays, save_arrays
from tinydiff.kernels import _optim, portable, use
from tinydiff.nn import Parameter

BLOCK = _optim.BLOCK
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")
SEEDS = st.integers(0, 2**32 - 1)
# Around the borders of a block, where an off-by-one would leave elements out or step them twice.
SHAPES = st.sampled_from(
    [
        (),
        (0,),
        (1,),
        (7,),
        (3, 4),
        (2, 3, 4, 5),
        (BLOCK - 1,),
        (BLOCK,),
        (BLOCK + 1,),
        (3, BLOCK),
        (2 * BLOCK + 5,),
    ]
)


def laid_out(x, order):
    """A writeable copy of `x`: in C or Fortran order, or every other element of a larger array."""
    if order == "strided" and x.ndim:
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return np.array(x, order="F" if order == "F" else "C")


def parameter(value, grad=None):
    return Parameter(np.array(value), None if grad is None else np.array(grad))


# Adam


def test_two_steps_by_hand():
    p = parameter([1.0, -2.0])
    optimizer = td.Adam([p], lr=0.1, betas=(0.5, 0.75), eps=0.0625, weight_decay=0.5)
    p.grad = np.array([4.0, -1.0])
    optimizer.step()
    # Both corrections undo the first step exactly: m / (1 - beta1) = g and v / (1 - beta2) = g^2.
    first = np.array([1.0, -2.0]) * (1 - 0.05) - 0.1 * np.array([4 / 4.0625, -1 / 1.0625])
    assert_allclose(p.value, first, rtol=1e-15)
    p.grad = np.array([0.0, 3.0])
    optimizer.step()
    m = np.array([0.5 * 2 + 0, 0.5 * -0.5 + 0.5 * 3]) / 0.75
    v = np.array([0.75 * 4 + 0, 0.75 * 0.25 + 0.25 * 9]) / 0.4375
    assert_allclose(p.value, first * 0.95 - 0.1 * m / (np.sqrt(v) + 0.0625), rtol=1e-15)
    assert optimizer.steps == 2


def test_with_nothing_remembered_each_step_is_the_sign_of_its_gradient():
    p = parameter([1.0, -2.0])
    optimizer = td.Adam([p], lr=0.25, betas=(0.0, 0.0), eps=1e-20)
    for k, sign in enumerate([np.array([1, -1]), np.array([-1, -1]), np.array([1, 1])], 1):
        before, p.grad = p.value.copy(), sign * np.array([1e3, 1e-3]) * k
        optimizer.step()
        assert_allclose(p.value, before - 0.25 * sign, rtol=1e-14)


def test_by_default_the_settings_are_those_of_the_paper_without_decay():
    """Kingma & Ba 2015, algorithm 1; and an average over about a thousand steps."""
    ours, theirs = parameter([1.0, -2.0]), parameter([1.0, -2.0])
    optimizers = td.Adam([ours]), td.Adam([theirs], 0.001, (0.9, 0.999), 1e-8, 0.0)
    for grad in np.random.default_rng(0).standard_normal((4, 2)) * 1e-6:  # where eps counts, too
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = grad.copy()
            optimizer.step()
        assert_array_equal(ours.value, theirs.value)
    assert td.EMA(small_model()).decay == 0.999


def test_no_gradient_moves_nothing_but_by_decay():
    p, q = parameter([1.0, 2.0]), parameter([1.0, 2.0])
    td.Adam([p]).step()
    td.Adam([q], lr=0.5, weight_decay=0.5).step()
    assert_array_equal(p.value, [1.0, 2.0])
    assert_array_equal(q.value, [0.75, 1.5])


def test_the_learning_rate_may_change_between_steps():
    p = parameter([1.0])
    optimizer = td.Adam([p], lr=0.0)
    for lr, expected in [(0.0, 1.0), (0.25, 0.75)]:
        p.grad = np.array([3.0])
        optimizer.lr = lr
        optimizer.step()
        assert_allclose(p.value, [expected], rtol=1e-8)


def test_a_shared_parameter_is_stepped_once():
    grad = [0.5, -3.0]
    alone, shared = parameter([1.0, 2.0], grad), parameter([1.0, 2.0], grad)
    one, many = td.Adam([alone]), td.Adam({"a": shared, "b": shared})
    one.step()
    many.step()
    assert len(many.parameters) == len(many.m) == len(many.v) == 1
    assert_array_equal(shared.value, alone.value)


def test_zero_grad():
    p = parameter([1.0], [2.0])
    td.Adam([p]).zero_grad()
    assert_array_equal(p.grad, [0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_array_api_strict_and_in_the_given_dtype(dtype):
    rng = np.random.default_rng(0)
    value, grads = rng.standard_normal((3, 4)).astype(dtype), rng.standard_normal((5, 3, 4)).astype(dtype)
    results = []
    for xp in (np, strict):
        p = Parameter(xp.asarray(value.copy()))
        optimizer = td.Adam([p], lr=0.01, weight_decay=0.1)
        for grad in grads:
            p.grad = xp.asarray(grad)
            norm = td.clip_grad_norm([p], 1.0)
            optimizer.step()
        assert norm.dtype == p.value.dtype == optimizer.m[0].dtype == getattr(xp, dtype)
        results.append(to_numpy(p.value))
    assert_allclose(results[0], results[1], rtol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (-0.1, 0.9)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": 0.9}, "betas is 0.9; expected two numbers"),
        ({"betas": None}, "betas is None; expected two numbers"),
        ({"betas": ("0.9", "0.99")}, "betas is .*; expected two numbers"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": math.inf}, "eps is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
    ],
)
def test_settings_out_of_range_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        td.Adam([parameter([1.0])], **settings)


def test_a_model_is_not_its_parameters():
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    for call in (lambda: td.Adam(model), lambda: td.clip_grad_norm(model, 1.0)):
        with pytest.raises(TypeError, match=r"parameters is an MLP; expected model\.named_parameters\(\)"):
            call()


def test_a_norm_in_the_place_of_parameters_is_named():
    with pytest.raises(TypeError, match=r"^parameters is a float; expected model\.named_parameters\(\)"):
        td.clip_grad_norm(1.0, [parameter([1.0])])


def test_what_is_not_a_parameter_is_refused():
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    group = {"params": model.named_parameters(), "lr": 1e-3}
    for holder, what in ((model.state_dict(), "ndarray"), ([group], "dict"), (group, "dict")):
        for call in (lambda: td.Adam(holder), lambda: td.clip_grad_norm(holder, 1.0)):  # noqa: B023
            with pytest.raises(TypeError, match=f"parameters holds an? {what}; expected Parameter"):
                call()


def test_nothing_to_train_is_refused():
    for call in (lambda: td.Adam([]), lambda: td.clip_grad_norm({}, 1.0)):
        with pytest.raises(ValueError, match="parameters is empty"):
            call()


# The NumPy twins


@given(
    SHAPES,
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(["C", "F", "strided"]),
    SEEDS,
    st.booleans(),
)
def test_the_numpy_adam_step_is_the_definition(shape, dtype, order, seed, decays):
    rng = np.random.default_rng(seed)
    value, grad, m = (np.asarray(rng.standard_normal(shape), dtype) for _ in range(3))
    v = np.asarray(rng.random(shape), dtype)
    scalars = (0.01, 0.9, 0.999, 0.3, 1e-8, 0.99 if decays else 1.0)
    expected = portable.adam_step(value, grad, m, v, *scalars)
    given_grad = laid_out(grad, order)
    stepped = _optim.adam_step(
        laid_out(value, order), given_grad, laid_out(m, order), laid_out(v, order), *scalars
    )
    eps = np.finfo(dtype).eps
    for ours, definition in zip(stepped, expected):
        assert ours.shape == shape
        assert ours.dtype == dtype
        assert_allclose(ours, definition, rtol=8 * eps, atol=8 * eps)
    assert_array_equal(given_grad, grad)


@given(SHAPES, st.sampled_from([np.float32, np.float64]), st.sampled_from(["C", "F", "strided"]), SEEDS)
def test_the_numpy_ema_step_is_the_definition(shape, dtype, order, seed):
    rng = np.random.default_rng(seed)
    average, value = (np.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    expected = portable.ema_step(average, value, 0.1)
    given_value = laid_out(value, order)
    stepped = _optim.ema_step(laid_out(average, order), given_value, 0.1)
    assert stepped.shape == shape
    assert stepped.dtype == dtype
    eps = np.finfo(dtype).eps
    assert_allclose(stepped, expected, rtol=4 * eps, atol=4 * eps)
    assert_array_equal(given_value, value)


# Many arrays as one

# Of two dtypes, smaller and larger than a block, of one dtype alone, without elements, without dimensions.
MANY = [((3, 4), "f4"), ((), "f4"), ((BLOCK + 1,), "f4"), ((0,), "f4"), ((2, 3), "f8"), ((BLOCK - 1,), "f4"),
        ((5,), "f8"), ((2, 3, 4), "f4")]  # fmt: skip
LIBRARIES = [*NAMES, pytest.param("numba", marks=needs_numba)]


@pytest.fixture
def make(library, monkeypatch):
    """What makes arrays of the library; of NumPy's, with the twin in use until the end of the test."""
    if library not in ("numpy", "numba"):
        return space(library).array
    monkeypatch.setattr(tinydiff.kernels, "_twin", None)
    use(library)
    return np.array


def many(rng, make=np.array):
    return [Parameter(make(rng.standard_normal(shape).astype(dtype))) for shape, dtype in MANY]


def give_gradients(parameters, seed, make=np.array):
    rng = np.random.default_rng(seed)
    for p in parameters:
        p.grad = make(rng.standard_normal(p.shape).astype(to_numpy(p.value).dtype, order="F"))


def assert_stepped(optimizer, values, m, v, decay):
    """Step `optimizer`, and the definition for each array of it by itself; they must agree."""
    k, (beta1, beta2) = optimizer.steps + 1, optimizer.betas
    scalars = (optimizer.lr / (1 - beta1**k), beta1, beta2, math.sqrt(1 - beta2**k), optimizer.eps, decay)
    optimizer.step()
    for i, p in enumerate(optimizer.parameters):
        values[i], m[i], v[i] = portable.adam_step(values[i], to_numpy(p.grad), m[i], v[i], *scalars)
        for ours, definition in [(p.value, values[i]), (optimizer.m[i], m[i]), (optimizer.v[i], v[i])]:
            eps = np.finfo(definition.dtype).eps
            ours = to_numpy(ours)
            assert ours.shape == definition.shape and ours.dtype == definition.dtype
            assert_allclose(ours, definition, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_arrays_stepped_together_are_the_definition(library, make, weight_decay):
    """From what a checkpoint puts there, too; and but for that all stays where it is in memory."""
    parameters = many(np.random.default_rng(0), make)
    optimizer = td.Adam(parameters, lr=0.01, weight_decay=weight_decay)
    values = [to_numpy(p.value).copy() for p in parameters]
    m, v = ([np.zeros_like(value) for value in values] for _ in range(2))
    last = []
    for step in range(5):
        give_gradients(parameters, step, make)
        if step == 2:  # as after a checkpoint
            for i in range(len(m)):
                m[i], v[i] = m[i] + 1, v[i] + 2
                optimizer.m[i], optimizer.v[i] = make(m[i]), make(v[i])
        if step == 3:  # weights replaced
            for i in (0, 5):
                values[i] = values[i] + 1
                parameters[i].value = make(values[i])
        assert_stepped(optimizer, values, m, v, 1 - 0.01 * weight_decay)
        arrays = [*(p.value for p in parameters), *optimizer.m, *optimizer.v]
        if step in (1, 4):
            assert all(now is before for now, before in zip(arrays, last))
        last = arrays


def test_arrays_that_lie_end_to_end_are_left_there():
    """And only those: in this order, with nothing between them, of one dtype, and the whole of it."""
    flat = np.arange(10.0)
    parts = cut(flat, [(2, 3), (), (3,)])
    assert EndToEnd(cut(flat, [(2, 3), (), (3,)])).flat is flat
    for others in (
        parts[::-1],
        parts[:2],
        [flat[:6].reshape(2, 3), flat[7:]],
        [flat[:6].reshape(3, 2).T, parts[1], parts[2]],
        [*cut(flat.copy(), [(2, 3), ()]), parts[2]],
        [np.array(part) for part in parts],
        [flat[:5].view(np.int64), flat[5:].view(np.int64)],
    ):
        laid = EndToEnd(others)
        assert not np.shares_memory(laid.flat, flat)
        assert_array_equal(laid.flat, np.concatenate([np.ravel(other) for other in others]))
        for view, other in zip(laid.views, others):
            assert_array_equal(view, other)
            assert np.shares_memory(view, laid.flat)


def test_an_array_by_itself_may_lie_by_columns():
    value, grad = np.random.default_rng(0).standard_normal((2, 3, 4))
    rows, columns = Parameter(value.copy(), grad), Parameter(np.asfortranarray(value), grad)
    for p in (rows, columns):
        optimizer = td.Adam([p])
        for _ in range(2):
            optimizer.step()
    assert np.all(rows.value != value)
    assert_array_equal(columns.value, rows.value)


def test_an_array_by_itself_is_left_where_it_is():
    for array in (np.ones((2, 3)), np.ones(()), np.arange(8.0)[2:5], np.ones(0)):
        laid = EndToEnd([array])
        assert laid.views[0] is array and laid.flat.shape == (array.size,)
        laid.flat[...] = 7.0
        assert np.all(array == 7.0)
    array = np.ones((2, 3)).T  # whose elements are in another order
    assert not np.shares_memory(EndToEnd([array]).flat, array)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_average_of_arrays_together_is_the_definition(library, make):
    class Weights(td.nn.Module):
        def __init__(self):
            self.weights = many(np.random.default_rng(0), make)

    model = Weights()
    ema = td.EMA(model, 0.5)
    expected = [to_numpy(p.value).copy() for p in model.weights]
    for step in range(1, 5):
        for p in model.weights:
            p.value = p.value + 1.0
        if step == 3:  # as after a checkpoint
            ema.model.weights[0].value = make(expected[0] + 1)
            expected[0] = expected[0] + 1
        ema.update()
        rate = 1 - min(0.5, (1 + step) / (10 + step))
        for i, (average, weight) in enumerate(zip(ema.model.weights, model.weights)):
            expected[i] = portable.ema_step(expected[i], to_numpy(weight.value), rate)
            assert to_numpy(average.value).dtype == expected[i].dtype
            assert_allclose(to_numpy(average.value), expected[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("library", NAMES)
def test_what_changes_from_step_to_step_may_be_on_the_device(library):
    """As a recording of a step would need it: the same call again, with other numbers in the same arrays."""
    make, rng = space(library).array, np.random.default_rng(0)
    value, grad, m, v = (rng.standard_normal(5).astype(np.float32) ** 2 for _ in range(4))
    for step_size, root, decay, rate in [(0.1, 0.5, 1.0, 0.9), (0.01, 0.99, 0.98, 0.001)]:
        expected = [
            *portable.adam_step(value, grad, m, v, step_size, 0.9, 0.99, root, 1e-8, decay),
            portable.ema_step(value, grad, rate),
        ]
        there = [make(np.asarray(number, np.float32)) for number in (step_size, root, decay, rate)]
        arrays = [make(array) for array in (value, grad, m, v)]
        ours = portable.adam_step(*arrays, there[0], 0.9, 0.99, there[1], 1e-8, there[2])
        for actual, wanted in zip([*ours, portable.ema_step(*arrays[:2], there[3])], expected):
            assert to_numpy(actual).dtype == np.float32
            assert_allclose(to_numpy(actual), wanted, rtol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_clipping_many_arrays(library, make):
    """The norm is that of all of them, and each keeps its shape and dtype."""
    parameters = many(np.random.default_rng(0), make)
    give_gradients(parameters, 1, make)
    before = [to_numpy(p.grad).copy() for p in parameters]
    expected = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in before))
    assert_allclose(float(td.clip_grad_norm(parameters, 2.0)), expected, rtol=1e-6)
    for p, g in zip(parameters, before):
        assert to_numpy(p.grad).shape == g.shape and to_numpy(p.grad).dtype == g.dtype
        assert_allclose(to_numpy(p.grad), g * (2 / expected), rtol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_steps_are_repeatable_and_by_the_chosen_twin(library, make, monkeypatch):
    results = []
    for _ in range(2):
        parameters = many(np.random.default_rng(0), make)
        optimizer = td.Adam(parameters, lr=0.01)
        for step in range(3):
            give_gradients(parameters, step, make)
            optimizer.step()
        results.append([to_numpy(p.value) for p in parameters])
    for one, other in zip(*results):
        assert_array_equal(one, other)
    kernels = tinydiff.kernels.kernels_for(parameters[0].value)
    sizes, step = [], kernels.adam_step
    monkeypatch.setattr(kernels, "adam_step", lambda w, *a: sizes.append(math.prod(w.shape)) or step(w, *a))
    optimizer.step()
    of = {dtype: [math.prod(shape) for shape, d in MANY if d == dtype] for dtype in ("f4", "f8")}
    if library not in ("numpy", "numba"):
        assert sorted(sizes) == sorted(map(sum, of.values()))
    else:  # the large one where it is
        assert sorted(sizes) == sorted([BLOCK + 1, sum(of["f4"]) - (BLOCK + 1), sum(of["f8"])])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_the_optimizer_goes_its_own_way(copied):
    """What it moves must not be views of memory that it no longer has, nor the original's."""
    parameters = many(np.random.default_rng(0))
    first = td.Adam(parameters, lr=0.01)
    give_gradients(parameters, 0)
    first.step()
    second = copied(first)
    values, m, v = ([a.copy() for a in arrays] for arrays in
                    ([p.value for p in second.parameters], second.m, second.v))  # fmt: skip
    for step in range(1, 4):
        give_gradients(second.parameters, step)
        assert_stepped(second, values, m, v, 1.0)
    if second.m is not first.m:
        give_gradients(parameters, 0)
        before = [a.copy() for a in (*second.m, *(p.value for p in second.parameters))]
        first.step()
        for ours, theirs in zip((*second.m, *(p.value for p in second.parameters)), before):
            assert_array_equal(ours, theirs)


def test_two_optimizers_may_take_turns():
    """Each lays the weights out for itself; none works on weights that the other has left behind."""
    parameters, expected = many(np.random.default_rng(0)), many(np.random.default_rng(0))
    both = [td.Adam(parameters, lr=0.01), td.Adam(parameters, lr=0.1)]
    each = [[td.Adam([p], lr=lr) for p in expected] for lr in (0.01, 0.1)]
    for step in range(6):
        give_gradients(parameters, step)
        give_gradients(expected, step)
        both[step % 2].step()
        for optimizer in each[step % 2]:
            optimizer.step()
    for ours, theirs in zip(parameters, expected):
        assert_array_equal(ours.value, theirs.value)


def test_weights_may_leave_for_another_library():
    parameters = [parameter(np.ones(3)), parameter(np.ones(2))]
    optimizer = td.Adam(parameters, lr=0.1)
    give_gradients(parameters, 0)
    optimizer.step()
    for i, p in enumerate(parameters):
        p.value, p.grad = strict.asarray(p.value), strict.asarray(np.ones(p.shape))
        optimizer.m[i], optimizer.v[i] = strict.asarray(optimizer.m[i]), strict.asarray(optimizer.v[i])
    optimizer.step()
    assert all(type(p.value) is type(strict.ones(1)) for p in parameters)


def test_weights_may_leave_for_another_device():
    """What is laid out on one is not taken for what is on the other, of the same type."""
    there = strict.Device("device1")
    parameters = [Parameter(strict.ones(3)), Parameter(strict.ones(2))]
    optimizer = td.Adam(parameters, lr=0.1)
    for device in (strict.Device("CPU_DEVICE"), there):
        for arrays in (optimizer.m, optimizer.v):
            arrays[:] = [a.to_device(device) for a in arrays]
        for p in parameters:
            p.value = p.value.to_device(device)
            p.grad = strict.ones(p.shape, device=device)
        optimizer.step()
        assert all(p.value.device == device for p in parameters)


# Clipping


@given(SEEDS, st.floats(0.01, 100))
def test_clipping_keeps_the_direction_and_bounds_the_norm(seed, max_norm):
    rng = np.random.default_rng(seed)
    grads = [rng.standard_normal(shape) for shape in [(3,), (2, 2), ()]]
    parameters = {str(i): parameter(np.zeros_like(g), g) for i, g in enumerate(grads)}
    before = math.sqrt(sum(float(np.sum(g * g)) for g in grads))
    norm = td.clip_grad_norm(parameters, max_norm)
    assert norm.shape == ()
    assert_allclose(norm, before, rtol=1e-12)
    for p, g in zip(parameters.values(), grads):
        assert_allclose(p.grad, g * min(1.0, max_norm / before), rtol=1e-10)


@pytest.mark.parametrize("first, second", [(np.float32, np.float64), (np.float64, np.float32)])
def test_the_norm_is_in_the_finer_of_the_dtypes(first, second):
    parameters = [parameter(np.zeros(1, dtype), np.full(1, 3, dtype)) for dtype in (first, second)]
    norm = td.clip_grad_norm(parameters, math.inf)
    assert norm.dtype == np.float64
    assert_allclose(norm, 18**0.5, rtol=1e-15)


def test_clipping_counts_a_shared_parameter_once():
    p = parameter([0.0, 0.0], [3.0, 4.0])
    assert td.clip_grad_norm({"a": p, "b": p}, 1.0) == 5
    assert_allclose(p.grad, [0.6, 0.8], rtol=1e-11)


def test_clipping_leaves_zero_and_small_gradients_alone():
    for grad in ([0.0, 0.0], [0.3, 0.4], [3e-10, 4e-10], [0.0, 1e-12], [-3e-14, 4e-14], [1e-150, 0.0]):
        p = parameter([0.0, 0.0], grad)
        td.clip_grad_norm([p], 1.0)
        assert_array_equal(p.grad, grad)


def test_an_infinite_bound_only_measures():
    p = parameter([0.0, 0.0], [3e3, 4e3])
    assert td.clip_grad_norm([p], math.inf) == 5e3
    assert_array_equal(p.grad, [3e3, 4e3])


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, None, "1"])
def test_the_bound_is_positive(max_norm):
    with pytest.raises(ValueError, match="max_norm is"):
        td.clip_grad_norm([parameter([1.0])], max_norm)


# The learning rate


def test_warmup_cosine_s_exact_values():
    factors = [td.warmup_cosine(step, 12, warmup=4, final=0.2) for step in range(13)]
    assert_allclose(factors[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-15)
    assert_allclose(factors[6], 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, rtol=1e-15)
    assert_allclose(factors[8], 0.6, rtol=1e-15)  # half-way down
    assert_allclose(factors[12], 0.2, rtol=1e-15)
    assert td.warmup_cosine(100, 12, 4, 0.2) == factors[12]
    all_warmup = [td.warmup_cosine(step, 4, 4, 0.2) for step in (3, 4, 5)]
    assert all_warmup == [1.0, 0.2, 0.2]  # no fall


@given(st.data(), st.integers(1, 200), st.floats(0, 1))
def test_warmup_cosine_rises_then_falls(data, steps, final):
    warmup = data.draw(st.integers(0, steps))
    factors = np.array([td.warmup_cosine(step, steps, warmup, final) for step in range(steps)])
    assert np.all((factors > 0) & (factors <= 1))
    assert_allclose(np.diff(factors[:warmup]), 1 / max(warmup, 1))
    if warmup:
        assert factors[warmup - 1] == 1
    if warmup < steps:
        assert factors[warmup] == 1
        assert np.all(np.diff(factors[warmup:]) <= 1e-15)
        assert np.all(factors[warmup:] >= final - 1e-15)


def test_by_default_there_is_no_rise_and_the_fall_ends_at_nothing():
    assert_allclose([td.warmup_cosine(step, 8) for step in (0, 4, 8)], [1.0, 0.5, 0.0], rtol=1e-15)


def test_no_fall():
    assert {td.warmup_cosine(step, 10, 0, 1.0) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1, 10), "step is -1"),
        ((0, 0), "steps is 0"),
        ((0, 10, -1), "warmup is -1"),
        ((0, 10, 11), "warmup is 11"),
        ((0, 10, 0, 1.0625), "final is 1.0625"),
        ((0, 10, 0, -0.0625), "final is -0.0625"),
        ((0, 10, 0, math.nan), "final is nan"),
    ],
)
def test_warmup_cosine_names_what_is_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        td.warmup_cosine(*arguments)


# The moving average


def small_model():
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    model.to(np, np.float64)
    return model


@given(st.sampled_from([0.0, 0.5, 0.99]), st.integers(1, 30), SEEDS)
def test_ema_s_closed_form(decay, steps, seed):
    model = small_model()
    ema = td.EMA(model, decay)
    rng = np.random.default_rng(seed)
    history = [{name: p.value.copy() for name, p in model.named_parameters().items()}]
    for _ in range(steps):
        for p in model.named_parameters().values():
            p.value = p.value + rng.standard_normal(p.shape)
        history.append({name: p.value.copy() for name, p in model.named_parameters().items()})
        ema.update()
    # Weights of the history: w_j = (1 - d_j) d_{j+1} ... d_K, and d_1 ... d_K of the start.
    d = np.array([min(decay, (1 + k) / (10 + k)) for k in range(1, steps + 1)])
    weights = [np.prod(d)] + [(1 - d[j]) * np.prod(d[j + 1 :]) for j in range(steps)]
    assert_allclose(sum(weights), 1, rtol=1e-12)
    for name, p in ema.model.named_parameters().items():
        expected = sum(w * past[name] for w, past in zip(weights, history))
        assert_allclose(p.value, expected, rtol=1e-10, atol=1e-10)


def test_ema_is_a_copy_that_leaves_the_model_alone():
    model = small_model()
    model.linear_in.weight.grad = np.ones(model.linear_in.weight.shape)
    before = {name: p.value.copy() for name, p in model.named_parameters().items()}
    ema = td.EMA(model, 0.5)
    for p in ema.model.named_parameters().values():
        assert_array_equal(p.grad, np.zeros(p.shape))
        p.value = p.value + 1.0
    ema.update()
    for name, p in model.named_parameters().items():
        assert_array_equal(p.value, before[name])
        assert not np.shares_memory(p.value, ema.model.named_parameters()[name].value)


def test_ema_averages_a_shared_parameter_once():
    model = small_model()
    model.blocks = [model.blocks[0], model.blocks[0]]
    ema = td.EMA(model, 0.5)
    assert ema.model.blocks[0] is ema.model.blocks[1]
    weight = model.blocks[0].linear_1.weight
    start = weight.value.copy()
    weight.value = start + 11.0
    ema.update()
    assert_allclose(ema.model.blocks[1].linear_1.weight.value, start + 9.0, rtol=1e-12)  # 1 - 2/11 of the way


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_ema_s_decay_is_below_one(decay):
    with pytest.raises(ValueError, match="decay is"):
        td.EMA(small_model(), decay)


def test_ema_is_of_a_model():
    with pytest.raises(TypeError, match="model is a dict; expected a UNet, an MLP, or another network"):
        td.EMA(small_model().named_parameters())


# What a loop of one's own goes on from


def steps_of(model, optimizer, ema, steps):
    for step in steps:
        rng = np.random.default_rng(step)
        for p in model.named_parameters().values():
            p.grad = rng.standard_normal(p.shape)
        optimizer.step()
        ema.update()


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_array_equal(a[name], b[name], err_msg=name)


def parts_of(model):
    return {"model": model, "adam": td.Adam(model.named_parameters(), 0.01), "ema": td.EMA(model, 0.99)}


@pytest.mark.parametrize("at", [0, 1, 12])
def test_states_saved_and_loaded_go_on_as_if_nothing_had_been(at, tmp_path):
    """With steps that correct little and much: the moments' bias, and the average's warm-up."""
    whole = parts_of(small_model())
    steps_of(*whole.values(), range(15))
    first = parts_of(small_model())
    steps_of(*first.values(), range(at))
    arrays = {f"{k}/{name}": array for k, part in first.items() for name, array in part.state_dict().items()}
    save_arrays(tmp_path / "state.safetensors", arrays, {})

    model = small_model()
    for p in model.named_parameters().values():
        p.value = p.value + 1.0
    parts = parts_of(model)
    steps_of(*parts.values(), range(3))  # nothing may be left of these
    read, _ = load_arrays(tmp_path / "state.safetensors")
    for k, part in parts.items():
        part.load_state_dict({n.removeprefix(f"{k}/"): a for n, a in read.items() if n.startswith(f"{k}/")})
    for array in read.values():
        array[...] = 0  # what was loaded is copied
    steps_of(*parts.values(), range(at, 15))
    for k, part in parts.items():
        assert_same_state(part.state_dict(), whole[k].state_dict())


@pytest.mark.parametrize("which", ["adam", "ema"])
def test_a_state_that_does_not_fit_changes_nothing(which):
    part = parts_of(small_model())[which]
    state = {name: array.copy() for name, array in part.state_dict().items()}
    name = next(name for name in reversed(state) if state[name].ndim == 2)
    for other, match in [
        ({k: a for k, a in state.items() if k != "steps"}, "missing steps; unexpected none"),
        ({k: a for k, a in state.items() if k != name}, f"missing {name}"),
        (state | {"more": np.zeros(1)}, "missing none; unexpected more"),
        (state | {name: state[name].T + 1, "steps": np.asarray(7)}, rf"state\['{name}'\] has shape"),
    ]:
        other = {k: a if k in ("steps", name) else a + 1 for k, a in other.items()}
        with pytest.raises(ValueError, match=match):
            part.load_state_dict(other)
        assert_same_state(part.state_dict(), state)
