"""JAX differentiates the very code whose derivative is written beneath it; and its arrays go in as they are.

PyTorch's references are written a second time, and could leave out what the code leaves out. Central
differences are of the code itself, but to 1e-6. Here the forward as it stands is differentiated, to the last
digits.
"""

import warnings

import numpy as np
import pytest
from gradients import (
    LAYERS,
    Case,
    as_layer,
    assert_gradients_agree,
    cases,
    gradients_of,
    normal,
    randomise,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import tinydiff as td
from tinydiff import testing
from tinydiff.bound import gaussian_kl, gaussian_nll, step_term
from tinydiff.learned_schedule import LearnedSchedule
from tinydiff.losses import cross_entropy, hybrid_loss, simple_loss, vlb_loss
from tinydiff.models.classifier import Classifier
from tinydiff.parallel import DataParallel
from tinydiff.samplers import SAMPLERS

jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.oracle
TOLERANCE = 1e-12
PREDICTIONS = ["eps", "x0", "v", "flow"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
seeds = st.integers(0, 2**32 - 1)
# Each instance is compiled: few, and a failure is shown as it was found, not sought a smaller one of.
few = settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@pytest.fixture(autouse=True, scope="module")
def _float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


# Derivatives


def assert_derivative(case):
    """The gradients of sum(y * dy), as they are written out and by JAX, for inputs and parameters."""

    def at(inputs, values):
        case.inputs = inputs
        for name, value in values.items():
            case.parameters[name].value = value
        return case

    def output(*given):
        return at(*given).layer(*case.inputs)[0]

    @jax.jit
    def both(inputs, values, dy):
        of_inputs, of_values = jax.vjp(output, inputs, values)[1](dy)
        _, ours = gradients_of(at(inputs, values), dy)
        return ours, {f"x{i}": g for i, g in enumerate(of_inputs)} | of_values

    given = case.inputs, {name: p.value for name, p in case.parameters.items()}
    dy = normal(np.random.default_rng(0), jax.eval_shape(output, *given).shape)
    assert_gradients_agree(*both(*given, dy), TOLERANCE)


@pytest.mark.parametrize("layer", LAYERS)
@few
@given(data=st.data())
def test_layers(layer, data):
    case, _ = data.draw(cases(layer))
    assert_derivative(case)


@pytest.mark.parametrize(
    "config, shape",
    [
        (dict(block_channels=(4, 8), attention=(False, True), head_dim=4, norm_groups=2), (2, 4, 6, 1)),
        (
            dict(block_channels=(4, 8), attention=(True, False), layers_per_block=2, norm_groups=2)
            | dict(in_channels=3, out_channels=6, mid_attention=False, head_dim=None, dropout=0.3)
            | dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, num_classes=2),
            (3, 4, 6, 3),
        ),
    ],
    ids=["defaults", "the other of each choice"],
)
def test_the_unet(config, shape):
    rng = np.random.default_rng(0)
    model, t = randomise(td.UNet(**config), rng), rng.integers(1000, size=shape[0])
    labels = np.array([2, 0, 2]) if "num_classes" in config else None

    def layer(x):
        return model(x, t, np.random.default_rng(5), labels)

    assert_derivative(Case(layer, [normal(rng, shape)], module=model))


def test_the_classifier():
    rng = np.random.default_rng(0)
    model = randomise(Classifier(1, 5, (4, 8), norm_groups=2), rng)
    assert_derivative(Case(model, [normal(rng, (2, 6, 6, 1))]))


@few
@given(seeds, st.integers(1, 5))
def test_a_learned_schedule(seed, units):
    rng = np.random.default_rng(seed)
    learned, u = randomise(LearnedSchedule(-4, 3, units), rng), rng.random(6)

    def levels():
        (gamma, slope), backward = learned(u)

        def of_parameters(dy):
            backward(*dy)
            return ()

        return jnp.stack([gamma, slope]), of_parameters

    assert_derivative(Case(levels, [], module=learned))


@few
@given(seeds)
def test_elements_of_the_bound(seed):
    rng = np.random.default_rng(seed)
    x, *given = (normal(rng, (3, 2)) for _ in range(5))
    assert_derivative(Case(gaussian_kl, given))
    assert_derivative(Case(lambda *given: gaussian_nll(jnp.asarray(x), *given), given[:2]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@few
@given(seeds)
def test_losses(prediction, variance, seed):
    rng = np.random.default_rng(seed)
    diffusion = td.GaussianDiffusion(td.cosine_schedule(20), prediction, variance)
    output = normal(rng, (4, 6 if variance == "learned_range" else 3))
    x0, noise, weights = (jnp.asarray(rng.random(shape)) for shape in [(4, 3), (4, 3), 4])
    t = np.array([0, 1, *rng.integers(20, size=2)])
    x_t = diffusion.q_sample(x0, t, noise)

    def simple(output):
        return simple_loss(diffusion, output, x0, t, noise, weights)

    def vlb(output):
        return vlb_loss(diffusion, output, x0, t, noise, weights=weights)

    for clip in (False, True):
        assert_derivative(
            Case(lambda output, clip=clip: step_term(diffusion, output, x0, x_t, t, clip=clip), [output])
        )
    assert_derivative(Case(as_layer(simple), [output]))
    assert_derivative(Case(as_layer(vlb), [output]))
    if variance != "learned_range":
        return

    def stopped(output):
        """L_hybrid, with the stop of the mean's gradient said in JAX's words."""
        held = jnp.concat([jax.lax.stop_gradient(output[:, :3]), output[:, 3:]], axis=1)
        return simple(output)[0] + 1e-3 * vlb_loss(diffusion, held, x0, t, noise)[0]

    def hybrid(output):
        _, gradient = hybrid_loss(diffusion, output, x0, t, noise, weights=weights)
        return stopped(output), gradient

    assert_derivative(Case(as_layer(hybrid), [output]))


def test_cross_entropy():
    logits = 5 * normal(np.random.default_rng(0), (6, 4))
    labels = np.array([0, 3, 1, 2, 2, 0])
    assert_derivative(Case(as_layer(lambda logits: cross_entropy(logits, labels)), [logits]))


# Its arrays go in as they are


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_samplers(sampler, dtype):
    diffusion = td.GaussianDiffusion(td.linear_schedule(50), "v")
    x_T = np.random.default_rng(0).standard_normal((5, 2)).astype(dtype)

    def samples(xp, x_T):
        how = dict(steps=4, clip=True, x_T=x_T, rng=np.random.default_rng(1), progress=False)
        return td.sample(lambda x, t: xp.tanh(x + t[:, None] / 50), diffusion, x_T.shape, sampler, **how)

    came, expected = samples(jnp, jnp.asarray(x_T)), samples(np, x_T)
    assert isinstance(came, jax.Array) and came.dtype == dtype
    assert_allclose(came, expected, atol={"float64": 1e-12, "float32": 1e-5}[dtype])


@pytest.fixture
def _float32():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.usefixtures("_float32")
@pytest.mark.filterwarnings("error")
def test_as_jax_is_by_default_without_a_warning():
    """It has int32 only, and warns whoever asks for int64."""
    diffusion = td.GaussianDiffusion(td.linear_schedule(10), "v")
    x0 = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    t = np.array([0, 3, 9, 1, 0])

    def numbers(xp, x0):
        def network(x, t):
            return xp.tanh(x + t[:, None] / 50)

        def differentiable(x, t):
            y = network(x, t)
            return y, lambda dy: dy * (1 - y * y)

        how = dict(rng=np.random.default_rng(1), progress=False)
        yield from (td.sample(network, diffusion, (5, 2), s, x_T=x0, **how) for s in SAMPLERS)
        yield td.invert(network, diffusion, x0, progress=False)
        yield td.ode_log_likelihood(differentiable, diffusion, x0, progress=False)
        yield td.vlb_loss(diffusion, network(x0, t), x0, t, x0)[0]
        yield td.variational_bound(network, diffusion, x0, **how).value

    for came, expected in zip(numbers(jnp, jnp.asarray(x0)), numbers(np, x0), strict=True):
        assert_allclose(came, expected, rtol=1e-4, atol=1e-4)


def test_the_exact_network_of_a_mixture():
    diffusion = td.GaussianDiffusion(td.cosine_schedule(20))
    mixture = td.GaussianMixture([0.4, 0.6], [[-1.2, 0.0], [1.1, 0.5]], [0.1, 0.2])
    x, t = np.random.default_rng(0).standard_normal((20, 2)), np.arange(20)
    came = mixture.denoiser(diffusion)(jnp.asarray(x), t)
    assert isinstance(came, jax.Array)
    assert_allclose(came, mixture.denoiser(diffusion)(x, t), rtol=1e-12)


def test_processes_are_forked_beside_it_without_a_word():
    """JAX warns of a deadlock. But a process that shares a batch computes with NumPy alone."""
    jnp.zeros(1).block_until_ready()
    x, t, model = np.zeros((6, 2), np.float32), np.zeros(6, int), td.MLP(2, hidden=8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        with DataParallel(model, 3) as crew:
            assert_allclose(crew.predict(x, t), model.predict(x, t), atol=1e-6)
    assert not [w for w in said if issubclass(w.category, RuntimeWarning)]


# Code in JAX, judged by tinydiff.testing


def column(of_t):
    return of_t[:, None, None, None]


@pytest.mark.parametrize("schedule", [td.linear_schedule(100), td.cosine_schedule(100)])
def test_the_forward_process_is_judged_as_jax_compiles_it(schedule):
    abar = jnp.asarray(schedule.alphas_cumprod)
    testing.assert_schedule(abar, schedule)

    @jax.jit
    def q_sample(x0, t, noise):
        return column(abar[t]) ** 0.5 * x0 + column(1 - abar[t]) ** 0.5 * noise

    @jax.jit
    def without_root(x0, t, noise):
        return column(abar[t]) ** 0.5 * x0 + column(1 - abar[t]) * noise

    testing.assert_q_sample(q_sample, schedule, asarray=jnp.asarray)
    with pytest.raises(AssertionError, match="of this: 1 - abar_t in front of the noise, without its root"):
        testing.assert_q_sample(without_root, schedule, asarray=jnp.asarray)


def test_one_sample_at_a_time_is_a_batch_by_vmap():
    schedule = td.linear_schedule(50)
    abar = jnp.asarray(schedule.alphas_cumprod)
    of_one = jax.vmap(lambda x0, t, noise: abar[t] ** 0.5 * x0 + (1 - abar[t]) ** 0.5 * noise)
    testing.assert_q_sample(of_one, schedule, asarray=jnp.asarray)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    process = td.GaussianDiffusion(td.linear_schedule(20))
    testing.assert_q_sample(
        lambda *given: process.q_sample(*given).astype(dtype),
        process.schedule,
        asarray=jnp.asarray,
        tolerance=0.01,
    )


def test_a_loop_that_jax_compiles():
    """lax.scan, from which the network, which is NumPy's, is called back."""
    diffusion = td.GaussianDiffusion(td.cosine_schedule(100), "v")

    def ddim(denoise, x, timesteps, noise, rest_of_now=False):
        abar = jnp.asarray(np.append(1.0, diffusion.schedule.alphas_cumprod[timesteps]))
        t = jnp.asarray(timesteps)

        def step(x, i):
            v = jax.pure_callback(denoise, jax.ShapeDtypeStruct(x.shape, x.dtype), x, t[i])
            now, after = abar[i + 1], abar[i]
            x0, eps = now**0.5 * x - (1 - now) ** 0.5 * v, (1 - now) ** 0.5 * x + now**0.5 * v
            rest = 1 - (now if rest_of_now else after)
            return after**0.5 * x0 + rest**0.5 * eps, None

        return jax.lax.scan(step, x, jnp.arange(len(timesteps))[::-1])[0]

    testing.assert_sampler(ddim, diffusion, "ddim", 20, asarray=jnp.asarray)
    with pytest.raises(AssertionError, match="of this: 1 - abar of now, not of the next state, in front of"):
        testing.assert_sampler(
            lambda *given: ddim(*given, rest_of_now=True), diffusion, "ddim", 20, asarray=jnp.asarray
        )
