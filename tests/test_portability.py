"""The whole path under array-api-strict, which has only what the array API standard promises.

What runs there, and refuses a mixture with NumPy arrays, asks the array for its library everywhere; CuPy then
finds nothing of NumPy's either. The numbers must be NumPy's, to rounding: the kernels differ.
"""

import array_api_strict as strict
import numpy as np
import pytest
from gradients import LAYERS, as_tuple, cases, gradients_of, normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td

TOLERANCE = {"float64": 1e-12, "float32": 2e-5}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def assert_same(ours, numpys, tolerance, what):
    """An array of array-api-strict with the dtype and, norm-wise, the numbers of NumPy's."""
    assert isinstance(ours, type(strict.zeros(1))), f"{what} is a {type(ours)}"
    assert str(ours.dtype).rpartition(".")[2] == numpys.dtype.name, what
    assert ours.shape == numpys.shape, what
    error = np.linalg.norm(np.asarray(ours) - numpys)
    assert error <= tolerance * max(np.linalg.norm(numpys), 1e-30), f"{what} is off by {error:.1e}"


@pytest.mark.parametrize("name", LAYERS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_layers(name, data):
    case, rng = data.draw(cases(name))
    y, _ = case.layer(*case.inputs)
    dy = normal(rng, y.shape)
    y, expected = gradients_of(case, dy)
    scale = np.sqrt(sum(np.sum(g * g) for g in expected.values()))
    for p in case.parameters.values():
        p.value = strict.asarray(p.value)
        p.zero_grad()
    y_strict, backward = case.layer(*map(strict.asarray, case.inputs))
    assert_same(y_strict, y, 1e-12, "y")
    gradients = {f"x{i}": g for i, g in enumerate(as_tuple(backward(strict.asarray(dy))))}
    gradients |= {key: p.grad for key, p in case.parameters.items()}
    for key, gradient in gradients.items():
        # Relative to all of them: some are zero but for rounding.
        own = max(np.linalg.norm(expected[key]), 1e-30)
        assert_same(gradient, expected[key], 1e-12 * scale / own, key)


def unet(dtype):
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
    return randomise(model.to(np, np.dtype(dtype)), rng, dtype), (3, 8, 4, 2)


def mlp(dtype):
    rng = np.random.default_rng(0)
    return randomise(td.MLP(2, 2, 8, 2, 6, rng=rng).to(np, np.dtype(dtype)), rng, dtype), (5, 2)


models = pytest.mark.parametrize("make", [unet, mlp])


def moved(model):
    """Copies of the model under array-api-strict and under NumPy, their dtype kept, to be written to."""
    twins = [type(model)(**model.config) for _ in range(2)]
    dtype = next(iter(model.state_dict().values())).dtype
    for twin, xp in zip(twins, (strict, np)):
        twin.to(np, dtype).load_state_dict(model.state_dict())
        twin.to(xp)
    return twins


@dtypes
@models
def test_moving_there_and_back_changes_nothing(make, dtype):
    model, _ = make(dtype)
    there, _ = moved(model)
    for name, p in there.named_parameters().items():
        assert_same(p.value, model.named_parameters()[name].value, 0.0, name)
    for name, value in there.to(np).state_dict().items():
        np.testing.assert_array_equal(value, model.state_dict()[name])


@dtypes
@pytest.mark.parametrize("make, prediction", [(unet, "v"), (mlp, "eps"), (mlp, "x0")])
def test_training_steps(make, dtype, prediction):
    """Forward process, network with dropout, loss, backward, clipping, AdamW, EMA: two steps."""
    model, shape = make(dtype)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(100), prediction)
    rng = np.random.default_rng(1)
    x0, noise = normal(rng, shape, dtype), normal(rng, shape, dtype)
    t = rng.integers(0, 100, shape[0])
    states = []
    for twin, xp in zip(moved(model), (strict, np)):
        optimiser = td.Adam(twin.named_parameters(), lr=1e-3, weight_decay=0.1)
        ema = td.EMA(twin, decay=0.9)
        state = {}
        for step in range(2):
            x0_, noise_, t_ = (xp.asarray(a) for a in (x0, noise, t))
            x_t = diffusion.q_sample(x0_, t_, noise_)
            output, backward = twin(x_t, t_, np.random.default_rng(step))
            loss, doutput = td.simple_loss(diffusion, output, x0_, t_, noise_)
            dx = backward(doutput)
            grad_norm = td.clip_grad_norm(twin.named_parameters(), 0.5)
            if step == 0:
                state |= {f"grad of {n}": p.grad for n, p in twin.named_parameters().items()}
            optimiser.step()
            optimiser.zero_grad()
            ema.update()
            state |= {f"output {step}": output, f"dx {step}": dx}
            state |= {f"loss {step}": loss, f"norm {step}": grad_norm}
        state |= {n: p.value for n, p in twin.named_parameters().items()}
        state |= {f"average of {n}": p.value for n, p in ema.model.named_parameters().items()}
        states.append(state)
    ours, numpys = states
    norm = float(numpys["norm 0"])
    assert norm > 0.5, "nothing was clipped: the test says less than it should"
    for name, value in numpys.items():
        value = np.asarray(value)
        tolerance = TOLERANCE[dtype]
        if name.startswith("grad of"):  # relative to all of them, whose norm is now 0.5
            tolerance *= 0.5 / max(np.linalg.norm(value), 1e-30)
        if "to_k.bias" in name:  # its gradient is rounding alone, and Adam divides by its size
            continue
        assert_same(ours[name], value, tolerance, name)


@dtypes
@models
@pytest.mark.parametrize("sampler, given_start", [("ddpm", False), ("ddim", True)])
def test_sampling(make, dtype, sampler, given_start):
    model, shape = make(dtype)
    diffusion = td.GaussianDiffusion(td.linear_schedule(50), prediction="v")
    x_T = normal(np.random.default_rng(1), shape, dtype)
    samples = [
        td.sample(
            twin,
            diffusion,
            shape,
            sampler,
            steps=4,
            rng=np.random.default_rng(2),
            eta=0.5,
            clip=True,
            x_T=xp.asarray(x_T) if given_start else None,
            batch_size=2,
            progress=False,
        )
        for twin, xp in zip(moved(model), (strict, np))
    ]
    assert_same(*samples, 10 * TOLERANCE[dtype], "the sample")


def test_arrays_of_two_libraries_are_not_mixed():
    """The network refuses them as array-api-strict does, and says what came."""
    for make in (unet, mlp):
        model, shape = make("float32")
        with pytest.raises(ValueError, match=r"^x is a array_api_strict array of .*float32; .* numpy arrays"):
            model(strict.zeros(shape, dtype=strict.float32), np.zeros(shape[0], int))
        there, _ = moved(model)
        with pytest.raises(ValueError, match=r"^x is a numpy array of float32; .* array_api_strict arrays"):
            there(np.zeros(shape, np.float32), np.zeros(shape[0], int))
