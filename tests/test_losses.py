"""The loss: its value by an independent formula, its gradient by central differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from numpy.testing import assert_allclose, assert_array_equal

import tinydiff as td
from tinydiff.losses import mean_squared_error, simple_loss

PREDICTIONS = ["eps", "x0", "v", "flow"]


def batch(shape, seed, T=50):
    rng = np.random.default_rng(seed)
    x0, noise, output = rng.standard_normal((3, *shape))
    return output, x0, rng.integers(T, size=shape[0]), noise


@given(
    array_shapes(min_dims=1, max_dims=4, max_side=5), st.integers(0, 2**32 - 1), st.sampled_from(PREDICTIONS)
)
def test_value_is_the_mean_squared_distance_to_the_target(shape, seed, prediction):
    schedule = td.cosine_schedule(T=50)
    output, x0, t, noise = batch(shape, seed)
    total = 0.0
    for n in range(shape[0]):  # sample by sample, from the definitions
        a, s = np.sqrt(schedule.alphas_cumprod[t[n]]), np.sqrt(1 - schedule.alphas_cumprod[t[n]])
        v, flow = a * noise[n] - s * x0[n], noise[n] - x0[n]
        target = {"eps": noise[n], "x0": x0[n], "v": v, "flow": flow}[prediction]
        total += np.sum(np.square(output[n] - target))
    value, _ = simple_loss(td.GaussianDiffusion(schedule, prediction), output, x0, t, noise)
    assert value.shape == ()
    assert_allclose(value, total / output.size, rtol=1e-12)


@given(
    array_shapes(min_dims=1, max_dims=4, max_side=3), st.integers(0, 2**32 - 1), st.sampled_from(PREDICTIONS)
)
def test_gradient_is_the_derivative(shape, seed, prediction):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=50), prediction)
    output, x0, t, noise = batch(shape, seed)
    _, gradient = simple_loss(diffusion, output, x0, t, noise)
    assert gradient.shape == output.shape
    h = 1e-3  # the loss is quadratic: central differences are exact but for rounding
    for index in np.ndindex(output.shape):
        step = np.zeros_like(output)
        step[index] = h
        up, _ = simple_loss(diffusion, output + step, x0, t, noise)
        down, _ = simple_loss(diffusion, output - step, x0, t, noise)
        assert_allclose(gradient[index], (up - down) / (2 * h), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(prediction):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=50), prediction)
    _, x0, t, noise = batch((4, 3), 0)
    value, gradient = simple_loss(diffusion, diffusion.training_target(x0, t, noise), x0, t, noise)
    assert value == 0
    assert_array_equal(gradient, 0)


@pytest.mark.parametrize("target_dtype", [np.float32, np.float64])
def test_the_output_decides_the_dtype(target_dtype):
    output, x0, t, noise = batch((4, 3), 0)
    x0, noise = x0.astype(target_dtype), noise.astype(target_dtype)
    value, gradient = simple_loss(
        td.GaussianDiffusion(td.linear_schedule(T=50), "v"), output.astype(np.float32), x0, t, noise
    )
    assert value.dtype == gradient.dtype == np.float32


def test_what_does_not_fit_is_named():
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=50))
    output, x0, t, noise = batch((4, 3), 0)
    with pytest.raises(ValueError, match=r"output has shape \(4, 2\); expected \(4, 3\)"):
        simple_loss(diffusion, output[:, :2], x0, t, noise)
    with pytest.raises(ValueError, match="noise"):
        simple_loss(diffusion, output, x0, t, noise[:2])
    with pytest.raises(ValueError, match=r"^t "):
        simple_loss(diffusion, output, x0, t + 50, noise)
    with pytest.raises(ValueError, match=r"output has shape \(0, 3\); expected at least one number"):
        simple_loss(diffusion, output[:0], x0[:0], t[:0], noise[:0])
    learned = td.GaussianDiffusion(diffusion.schedule, "eps", "learned_range")
    for weight in (-1e-3, np.nan, np.inf, None, "1e-3"):
        with pytest.raises(ValueError, match=r"^vlb_weight is .*; expected a finite number, not negative"):
            td.hybrid_loss(learned, np.tile(output, 2), x0, t, noise, vlb_weight=weight)
    with pytest.raises(ValueError, match=r"output has shape \(3,\); expected \(1,\)"):
        mean_squared_error(np.zeros(3), np.zeros(1))  # would broadcast
