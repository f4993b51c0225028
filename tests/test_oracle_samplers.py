"""Whole walks against diffusers' schedulers: the same network, start and noise, and the same samples."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_oracle_schedulers import KINDS, PREDICTION_TYPE, same_chain

import tinydiff as td

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle

X_T = np.random.default_rng(0).standard_normal((4, 3))

chapter_9 = pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:3])) > (0, 42, 1),
    reason="chapter 9 speaks of diffusers 0.42.1",
)


class TorchNoise:
    """Draws as torch's generator does, where a numpy.random.Generator is expected."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def standard_normal(self, shape, dtype):
        assert dtype == np.float64
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).numpy()


def nonlinear(x, t):
    return np.tanh(x * (0.5 + t[:, None] / 100)) + 0.1


def sample(diffusion, sampler, steps, **options):
    options = dict(rng=TorchNoise(), x_T=X_T, progress=False) | options
    return td.sample(nonlinear, diffusion, X_T.shape, sampler, steps, **options)


def walk_of_diffusers(scheduler, denoise, x_T, times, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.as_tensor(x_T)
    for t, time in zip(scheduler.timesteps, times):
        output = torch.as_tensor(denoise(x.numpy(), np.full(x.shape[0], time)))
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x.numpy()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 9, 100])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_with_linspace(kind, prediction, variance, steps, clip):
    scheduler, schedule = same_chain(
        diffusers.DDPMScheduler,
        kind,
        100,
        prediction_type=PREDICTION_TYPE[prediction],
        variance_type=variance,
        clip_sample=clip,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    x = sample(td.GaussianDiffusion(schedule, prediction, variance), "ddpm", steps, clip=clip)
    reference = walk_of_diffusers(scheduler, nonlinear, X_T, scheduler.timesteps.tolist())
    assert_allclose(x, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 9, 100])
def test_ddim_on_the_respaced_chain(prediction, eta, steps, clip):
    # Its DDIMScheduler takes t - T // steps for the time before t, which is wrong for these (docs: E.16).
    # So it is given the respaced chain and walks all of it.
    diffusion = td.GaussianDiffusion(td.cosine_schedule(T=100), prediction)
    times = np.round(np.linspace(0, 99, steps)).astype(int) if steps > 1 else np.array([99])
    betas = diffusion.schedule.respace(times).betas
    scheduler = diffusers.DDIMScheduler(
        steps, trained_betas=betas, prediction_type=PREDICTION_TYPE[prediction], clip_sample=clip
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.tensor(betas), 0)
    scheduler.set_timesteps(steps)
    x = sample(diffusion, "ddim", steps, eta=eta, clip=clip)
    reference = walk_of_diffusers(
        scheduler, nonlinear, X_T, times[::-1], eta=eta, use_clipped_model_output=True
    )
    assert_allclose(x, reference, rtol=1e-9, atol=1e-9)


def in_float64(scheduler, steps, heun=False):
    """Its tables are float32. From its betas on, they are made anew to all digits."""
    schedule = td.NoiseSchedule(scheduler.betas)
    scheduler.set_timesteps(steps)
    timesteps = np.unique(scheduler.timesteps.numpy()).astype(int)
    sigma = np.sqrt(schedule.one_minus_alphas_cumprod / schedule.alphas_cumprod)[timesteps[::-1]]
    if heun:  # each but the first is asked for twice
        sigma = np.concat([sigma[:1], np.repeat(sigma[1:], 2)])
    assert len(scheduler.sigmas) == len(sigma) + 1
    assert_allclose(scheduler.sigmas[:-1], sigma, rtol=1e-4)
    scheduler.sigmas = torch.tensor([*sigma, 0.0], dtype=torch.float64)
    return schedule, timesteps


@pytest.mark.parametrize("steps", [1, 2, 3, 11, 50])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
def test_dpm_solver(prediction, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        100,
        beta_schedule="linear",
        prediction_type=PREDICTION_TYPE[prediction],
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    schedule, timesteps = in_float64(scheduler, steps)
    x = sample(td.GaussianDiffusion(schedule, prediction), "dpm++", timesteps)
    reference = walk_of_diffusers(scheduler, nonlinear, X_T, scheduler.timesteps.tolist())
    assert_allclose(x, reference, rtol=1e-6, atol=1e-6)  # it steps in float32


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_heun(prediction):
    """It walks in x / a, from x_T / a_T, and scales what the network sees back to x."""
    scheduler = diffusers.HeunDiscreteScheduler(
        101,
        beta_schedule="linear",
        beta_start=1e-3,
        beta_end=0.05,
        prediction_type=PREDICTION_TYPE[prediction],
        timestep_spacing="linspace",
    )
    schedule, timesteps = in_float64(scheduler, 11, heun=True)
    assert timesteps.tolist() == list(range(0, 101, 10))
    y = torch.as_tensor(X_T / math.sqrt(schedule.alphas_cumprod[-1]))
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(y, t)
        y = scheduler.step(torch.as_tensor(nonlinear(x.numpy(), np.full(4, int(t)))), t, y).prev_sample
    x = sample(td.GaussianDiffusion(schedule, prediction), "edm", timesteps)
    assert_allclose(x, y.numpy(), rtol=1e-10, atol=1e-10)


# What chapter 9 says of diffusers


@chapter_9
def test_where_ddim_arrives_with_linspace():
    """docs: E.16"""
    scheduler, schedule = same_chain(diffusers.DDIMScheduler, "linear", timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    best = td.GaussianMixture([1.0], [[-0.8]], 0.5**2).denoiser(td.GaussianDiffusion(schedule))
    x_T = np.array([[0.0], [1.0]])
    ends = walk_of_diffusers(scheduler, best, x_T, scheduler.timesteps.tolist())
    assert_allclose([ends[0, 0], ends[1, 0] - ends[0, 0]], [-0.758, 0.419], atol=5e-4)


@chapter_9
@pytest.mark.parametrize(
    ("spacing", "steps", "agree"),
    [("leading", 13, True), ("trailing", 10, True), ("trailing", 13, False), ("linspace", 10, False)],
)
def test_whether_ddim_goes_to_the_time_that_it_shows_next(spacing, steps, agree):
    """docs: E.16"""
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    abar, zero, one = scheduler.alphas_cumprod, torch.zeros(1), torch.ones(1)
    # Of a state without noise a step leaves a'/a.
    reached = [abar[t] * scheduler.step(zero, t, one).prev_sample[0] ** 2 for t in scheduler.timesteps[:-1]]
    assert torch.allclose(torch.stack(reached), abar[scheduler.timesteps[1:]], rtol=3e-5, atol=0) == agree


@chapter_9
@pytest.mark.parametrize(("variance", "levels"), [("fixed_small", 0.0), ("fixed_large", 41.0)])
def test_the_grain_that_trailing_times_leave(variance, levels):
    """docs: E.9"""
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", variance_type=variance)
    scheduler.set_timesteps(10)
    grey = torch.zeros(1, 100_000)
    last = scheduler.step(grey, scheduler.timesteps[-1], grey, generator=torch.Generator().manual_seed(0))
    assert abs(float(torch.std(last.prev_sample - last.pred_original_sample)) * 127.5 - levels) < 0.5
