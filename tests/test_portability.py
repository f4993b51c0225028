"""The whole path under NumPy, array-api-strict and, with ``pytest -m gpu``, CuPy, against one reference.

What runs under array-api-strict, and refuses a mixture with NumPy arrays, asks the array for its library and
device everywhere; CuPy then finds nothing of NumPy's either. The bodies are the same for all three.
"""

import array_api_strict as strict
import numpy as np
import pytest
from gradients import LAYERS, as_tuple, cases, gradients_of, normal, randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from namespaces import (
    assert_same,
    assert_there,
    definitions,
    dtypes,
    named,
    representable,
    space,
)
from numpy.testing import assert_array_equal

import tinydiff as td
from tinydiff.backend import clip_to_unit, generator_beside, standard_normal, to_numpy
from tinydiff.bound import prior_term
from tinydiff.losses import cross_entropy, mean_squared_error

# Layers


@named
@dtypes
@pytest.mark.parametrize("layer", LAYERS)
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_layers(name, dtype, layer, data):
    where = space(name)
    case, rng = data.draw(cases(layer))
    case.inputs = [representable(x) for x in case.inputs]
    for p in case.parameters.values():
        p.value = representable(p.value)
    with definitions():
        y, _ = case.layer(*case.inputs)
        dy = representable(normal(rng, y.shape))
        y, expected = gradients_of(case, dy)
    scale = np.sqrt(sum(np.sum(g * g) for g in expected.values()))
    size = max(np.linalg.norm(array) for array in [y, *case.inputs])  # a sum of two branches may cancel
    case.inputs = [where.array(x, dtype) for x in case.inputs]
    for p in case.parameters.values():
        p.value = where.array(p.value, dtype)
    y_there, gradients = gradients_of(case, where.array(dy, dtype))
    assert_same(y_there, y, where, dtype, "y", scale=size)
    for key, gradient in gradients.items():  # relative to all of them: some are zero but for rounding
        assert_same(gradient, expected[key], where, dtype, key, scale=scale)


# Networks


def unet():
    rng = np.random.default_rng(0)
    model = td.UNet(
        in_channels=2,
        out_channels=2,
        block_channels=(4, 8, 8),
        layers_per_block=2,
        attention=(False, True, False),
        norm_groups=2,
        head_dim=4,
        dropout=0.2,
        downsample_padding=0,
        rng=rng,
    )
    return randomise(model, rng, np.float32), (3, 8, 4, 2)


def mlp():
    rng = np.random.default_rng(0)
    return randomise(td.MLP(2, 2, 8, 2, 6, rng=rng), rng, np.float32), (5, 2)


models = pytest.mark.parametrize("make", [unet, mlp])


def moved(model, where, dtype):
    """A copy of the model there, and the reference: a copy under NumPy in float64. Both to be written to."""
    twins = [type(model)(**model.config) for _ in range(2)]
    for twin in twins:
        twin.load_state_dict(model.state_dict())
    return where.module(twins[0], dtype), twins[1].to(np, np.float64)


@named
@dtypes
@models
def test_moving_there_and_back_changes_nothing(name, make, dtype):
    model, _ = make()
    there, _ = moved(model, space(name), dtype)
    for key, p in there.named_parameters().items():
        assert_there(p.value, space(name), dtype, key)
        assert_there(p.grad, space(name), dtype, key)
    for key, value in there.to(np).state_dict().items():
        assert_array_equal(value, model.state_dict()[key])


@named
@dtypes
@pytest.mark.parametrize("make, prediction", [(unet, "v"), (mlp, "eps"), (mlp, "x0")])
def test_training_steps(name, make, dtype, prediction):
    """Forward process, network with dropout, loss, backward, clipping, AdamW, EMA: two steps."""
    eps = 1e-8 if dtype == "float64" else 1e-4  # Adam divides by the size of gradients that may be rounding
    model, shape = make()
    where = space(name)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(100), prediction)
    rng = np.random.default_rng(1)
    x0, noise = (representable(normal(rng, shape)) for _ in range(2))
    t = rng.integers(0, 100, shape[0])

    def two_steps(twin, x0, t, noise):
        optimizer = td.Adam(twin.named_parameters(), lr=1e-3, eps=eps, weight_decay=0.1)
        ema = td.EMA(twin, decay=0.9)
        state = {}
        for step in range(2):
            x_t = diffusion.q_sample(x0, t, noise)
            output, backward = twin(x_t, t, np.random.default_rng(step))
            loss, doutput = td.simple_loss(diffusion, output, x0, t, noise)
            dx = backward(doutput)
            norm = td.clip_grad_norm(twin.named_parameters(), 0.5)
            if step == 0:
                state |= {f"grad of {n}": p.grad for n, p in twin.named_parameters().items()}
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            state |= {f"output {step}": output, f"dx {step}": dx, f"loss {step}": loss, f"norm {step}": norm}
        state |= {n: p.value for n, p in twin.named_parameters().items()}
        return state | {f"average of {n}": p.value for n, p in ema.model.named_parameters().items()}

    there, reference = moved(model, where, dtype)
    with definitions():
        expected = two_steps(reference, x0, t, noise)
    ours = two_steps(there, where.array(x0, dtype), where.array(t), where.array(noise, dtype))
    assert float(expected["norm 0"]) > 0.5, "nothing was clipped: the test says less than it should"
    for key, value in expected.items():
        scale = 0.5 if key.startswith("grad of") else None  # relative to all of them, whose norm is now 0.5
        if "to_k.bias" in key and scale is None:  # its gradient is rounding, and Adam divides by its size
            continue
        assert_same(ours[key], value, where, dtype, key, scale=scale)


# The process and the losses

choices = dict(
    prediction=st.sampled_from(["eps", "x0", "v", "flow"]),
    variance=st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    schedule=st.sampled_from([td.linear_schedule(20), td.cosine_schedule(20)]),
    shape=st.sampled_from([(3, 2), (2, 4, 4, 1), (1, 5)]),
    seed=st.integers(0, 2**32 - 1),
)


def draw(shape, variance, seed):
    """x0, noise, output and times for a batch."""
    rng = np.random.default_rng(seed)
    wide = (*shape[:-1], shape[-1] * (2 if variance == "learned_range" else 1))
    arrays = [representable(np.clip(rng.standard_normal(s), -3, 3)) for s in (shape, shape, wide)]
    return [*arrays, rng.integers(20, size=shape[0])]


def process(diffusion, x0, noise, output, t):
    """Everything that a GaussianDiffusion computes of them."""
    x_t = diffusion.q_sample(x0, t, noise)
    results = {
        "q_step": diffusion.q_step(x0, t, noise),
        "q_sample": x_t,
        "q_mean_variance": diffusion.q_mean_variance(x0, t),
        "q_posterior_mean_variance": diffusion.q_posterior_mean_variance(x0, x_t, t),
        "training_target": diffusion.training_target(x0, t, noise),
        "predict_x0": diffusion.predict_x0(x_t, t, output),
        "predict_eps": diffusion.predict_eps(x_t, t, output),
        "predict_v": diffusion.predict_v(x_t, t, output),
        "p_mean_variance": diffusion.p_mean_variance(x_t, t, output),
        "clipped": diffusion.p_mean_variance(x_t, t, output, clip=True),
        "model_log_variance": diffusion.model_log_variance(x_t, t, output),
        "clip_to_unit": clip_to_unit(x0),
    }
    return {f"{key} {i}": a for key, r in results.items() for i, a in enumerate(as_tuple(r))}


@named
@dtypes
@pytest.mark.parametrize("t_there", [False, True])
@settings(deadline=None, max_examples=12)
@given(**choices)
def test_the_process(name, dtype, t_there, prediction, variance, schedule, shape, seed):
    where = space(name)
    diffusion = td.GaussianDiffusion(schedule, prediction, variance)
    *arrays, t = draw(shape, variance, seed)
    expected = process(diffusion, *arrays, t)
    there = [where.array(a, dtype) for a in arrays]
    ours = process(diffusion, *there, where.array(t) if t_there else t)
    # Dividing by a or s near 0 magnifies what float32 lost in x_t, in the reference's size too.
    scale = max(np.linalg.norm(value) for value in expected.values())
    for key, value in expected.items():
        assert_same(ours[key], value, where, dtype, key, scale=scale)


def losses(diffusion, x0, noise, output, t, weights):
    """Value and gradient of every loss that fits the process."""
    results = {
        "mse": mean_squared_error(x0, noise),
        "simple": td.simple_loss(diffusion, output, x0, t, noise),
        "weighted": td.simple_loss(diffusion, output, x0, t, noise, weights),
        "vlb": td.losses.vlb_loss(diffusion, output, x0, t, noise, weights=weights),
        "prior": (prior_term(diffusion, x0),),
    }
    if diffusion.variance == "learned_range":
        results["hybrid"] = td.losses.hybrid_loss(diffusion, output, x0, t, noise, weights=weights)
    return {f"{key} {i}": a for key, r in results.items() for i, a in enumerate(r)}


@named
@dtypes
@settings(deadline=None, max_examples=12)
@given(**choices)
@example(  # L_0, a density's, cancels most of the other terms
    prediction="eps", variance="fixed_large", schedule=td.cosine_schedule(20), shape=(3, 2), seed=618244
)
def test_losses(name, dtype, prediction, variance, schedule, shape, seed):
    where = space(name)
    diffusion = td.GaussianDiffusion(schedule, prediction, variance)
    x0, noise, output, t = draw(shape, variance, seed)
    weights = representable(np.random.default_rng(seed).random(shape[0]))
    expected = losses(diffusion, x0, noise, output, t, weights)
    there = [where.array(a, dtype) for a in (x0, noise, output)]
    ours = losses(diffusion, *there, t, where.array(weights, dtype))
    recorded = []
    td.losses.vlb_loss(diffusion, output, x0, t, noise, record=recorded.append)
    terms = weights * recorded[0]
    summed = abs(expected["vlb 0"]) * np.sum(np.abs(terms)) / abs(np.sum(terms))  # before anything cancels
    for key, value in expected.items():
        assert_same(ours[key], value, where, dtype, key, scale=summed if key == "vlb 0" else None)


@named
@dtypes
def test_likelihood_of_8_bit_levels(name, dtype):
    where = space(name)
    diffusion = td.GaussianDiffusion(td.linear_schedule(10), "v", "learned_range")
    rng = np.random.default_rng(0)
    x0 = representable(rng.integers(256, size=(4, 2, 2, 1)) / 127.5 - 1)
    noise, output = (representable(0.1 * rng.standard_normal((4, 2, 2, c))) for c in (1, 2))
    t = np.array([0, 3, 0, 9])

    def value_and_gradient(x0, noise, output):
        return td.losses.vlb_loss(diffusion, output, x0, t, noise, decoder="8bit")

    expected = value_and_gradient(x0, noise, output)
    ours = value_and_gradient(*(where.array(a, dtype) for a in (x0, noise, output)))
    for what, one, other in zip(["value", "gradient"], ours, expected):
        assert_same(one, other, where, dtype, what)


@named
@dtypes
def test_cross_entropy(name, dtype):
    where = space(name)
    logits, labels = representable(5 * normal(np.random.default_rng(0), (6, 4))), np.array([0, 3, 1, 2, 2, 0])
    ours = cross_entropy(where.array(logits, dtype), where.array(labels))
    for what, one, other in zip(["value", "gradient"], ours, cross_entropy(logits, labels)):
        assert_same(one, other, where, dtype, what)


# From noise to data, and back


@named
@dtypes
@pytest.mark.parametrize("make, sampler", [(unet, "ddpm"), *((mlp, s) for s in td.samplers.SAMPLERS)])
def test_sampling(name, make, dtype, sampler):
    model, shape = make()
    where = space(name)
    diffusion = td.GaussianDiffusion(td.linear_schedule(50), prediction="v")
    x_T = representable(normal(np.random.default_rng(1), shape))

    def sample(twin, rng, x_T):
        how = dict(eta=0.5 * (sampler == "ddim"), clip=True, batch_size=2, progress=False)
        return td.sample(twin, diffusion, shape, sampler, steps=4, rng=rng, x_T=x_T, **how)

    there, reference = moved(model, where, dtype)
    with definitions():
        expected = sample(reference, SameDraws(2), x_T)
    ours = sample(there, SameDraws(2), where.array(x_T, dtype))
    assert_same(ours, expected, where, dtype, "the sample", factor=10)


class SameDraws(np.random.Generator):
    """Draws float32 numbers whatever dtype they are asked for in, so that both precisions get the same."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        return super().standard_normal(size, dtype=np.float32).astype(dtype)


@named
@dtypes
def test_where_a_sample_begins(name, dtype):
    """Without a start, noise is drawn on the host and put beside the weights: the same on every backend."""
    where = space(name)
    model, shape = mlp()
    there, _ = moved(model, where, dtype)
    diffusion = td.GaussianDiffusion(td.linear_schedule(50))
    states = td.iterate_samples(there, diffusion, shape, steps=2, rng=np.random.default_rng(3))
    first = next(states).x
    assert_there(first, where, dtype, "x_T")
    assert_array_equal(to_numpy(first), np.random.default_rng(3).standard_normal(shape, dtype=dtype))


@named
@dtypes
def test_inversion_and_likelihood(name, dtype):
    where = space(name)
    model, shape = mlp()
    there, reference = moved(model, where, dtype)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(20), prediction="v")
    x = representable(normal(np.random.default_rng(1), shape))
    with definitions():
        noise = td.invert(reference, diffusion, x, steps=4, progress=False)
        log_p = td.ode_log_likelihood(reference, diffusion, x, steps=4, progress=False)
    ours = td.invert(there, diffusion, where.array(x, dtype), steps=4, progress=False)
    assert_same(ours, noise, where, dtype, "the noise", factor=10)
    ours = td.ode_log_likelihood(there, diffusion, where.array(x, dtype), steps=4, progress=False)
    assert isinstance(ours, np.ndarray)
    assert_same(where.array(ours, dtype), log_p, where, dtype, "log p", factor=10)


# Random numbers


@named
@dtypes
def test_a_generator_beside_an_array_draws_there(name, dtype):
    where = space(name)
    like = where.array(np.zeros(1), dtype)
    draws = []
    for _ in range(2):
        rng = generator_beside(like, np.random.default_rng(4))
        drawn = standard_normal(rng, (64, 32), like)
        assert_there(drawn, where, dtype, "the noise")
        masked, backward = td.nn.dropout(drawn, 0.25, rng)
        assert_there(masked, where, dtype, "the masked noise")
        draws.append([to_numpy(drawn), to_numpy(masked), to_numpy(backward(drawn))])
    for one, other in zip(*draws):
        assert_array_equal(one, other)
    noise, masked, gradient = draws[0]
    assert_array_equal(masked, gradient)
    # Of 2048 standard normal numbers: six standard errors.
    assert abs(noise.mean()) < 6 / 2048**0.5
    assert abs(np.square(noise).mean() - 1) < 6 * (2 / 2048) ** 0.5
    assert abs(np.mean(masked == 0) - 0.25) < 6 * (0.25 * 0.75 / 2048) ** 0.5


# What is written to disk


@named
@dtypes
@models
def test_a_model_on_disk(name, make, dtype, tmp_path):
    where = space(name)
    model, _ = make()
    there, _ = moved(model, where, dtype)
    td.save_model(tmp_path / "model.safetensors", there, {"about": name})
    back, metadata = td.load_model(
        tmp_path / "model.safetensors", backend="cupy" if name == "cupy" else "numpy"
    )
    assert metadata["about"] == name
    back = where.module(back, dtype)
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, p in back.named_parameters().items():
        assert_there(p.value, where, dtype, key)
        assert_array_equal(to_numpy(p.value), model.state_dict()[key])


# What does not mix


def test_arrays_of_two_libraries_are_not_mixed():
    """The network refuses them as array-api-strict does, and says what came."""
    for make in (unet, mlp):
        model, shape = make()
        with pytest.raises(ValueError, match=r"^x is a array_api_strict array of .*float32; .* numpy arrays"):
            model(strict.zeros(shape, dtype=strict.float32), np.zeros(shape[0], int))
        there, _ = moved(model, space("strict"), "float32")
        with pytest.raises(ValueError, match=r"^x is a numpy array of float32; .* array_api_strict arrays"):
            there(np.zeros(shape, np.float32), np.zeros(shape[0], int))
