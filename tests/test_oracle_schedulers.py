"""Schedules and single reverse steps against diffusers' schedulers (walks: ``test_oracle_samplers.py``).

Where the conventions differ, and what is done about it here:

- diffusers keeps its tables in float32. Its betas and alphas_cumprod are compared as they come, to 1e-6. Its
  reverse step recovers beta_t as 1 - abar_t / abar_{t-1}, of which float32 leaves two or three digits at
  small t (x_{t-1} is off by 2e-4 at t = 2). So the steps are compared with its alphas_cumprod multiplied up
  in float64 from its own betas: to 1e-10.
- diffusers' linear betas do not scale with T: they are compared for explicit beta_start and beta_end.
- diffusers clips x0 unless told not to, and clamps fixed_small to 1e-20 (at t = 0, where it adds no noise).
- diffusers spaces fewer steps "leading" by default; any spacing is a choice of timesteps, and respacing takes
  it. DDIMScheduler's previous timestep is always t - T // steps, which is right for "leading", and for
  "trailing" where steps divides T.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tinydiff.diffusion import GaussianDiffusion
from tinydiff.schedules import NoiseSchedule, cosine_schedule, evenly_spaced_timesteps, linear_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle

PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KINDS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (3, 2, 2, 4)


def same_chain(cls, kind, T=1000, **config):
    """diffusers' scheduler with alphas_cumprod multiplied up in float64, and a NoiseSchedule of its betas."""
    scheduler = cls(num_train_timesteps=T, beta_schedule=KINDS[kind], **({"clip_sample": False} | config))
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler, NoiseSchedule(scheduler.betas)


def arrays(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)


def diffusers_step(scheduler, output, t, x_t, **kwargs):
    """diffusers' x_{t-1}, x0, and the noise that went into x_{t-1}."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    generator.manual_seed(0)
    step = scheduler.step(torch.asarray(output), t, torch.asarray(x_t), generator=generator, **kwargs)
    return step.prev_sample.numpy(), step.pred_original_sample.numpy(), noise.numpy()


def ancestral(diffusion, output, i, x_t, noise, clip=False):
    """x_{t-1} from mean and variance; no noise after the last step."""
    mean, variance = diffusion.p_mean_variance(x_t, i, output, clip=clip)
    return mean + np.sqrt(variance) * noise if i > 0 else mean


@pytest.mark.parametrize("T", [10, 100, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_tables(kind, T):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=KINDS[kind])
    schedule = linear_schedule(T, 1e-4, 0.02) if kind == "linear" else cosine_schedule(T)
    assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=0, atol=1e-6)
    assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-6)
    # Absolute agreement says little at the noisy end, where abar is 1e-5 and smaller; relative, 1 - 0.999 in
    # float32 is off by 1e-5.
    assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=2e-5)


def test_default_tables_are_the_papers():
    assert_allclose(linear_schedule().betas, diffusers.DDPMScheduler().betas.numpy(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_q_sample_and_velocity(kind):
    scheduler, schedule = same_chain(diffusers.DDPMScheduler, kind)
    diffusion = GaussianDiffusion(schedule, prediction="v")
    x0, eps = arrays(0)
    for t in ([0, 1, 2], [500, 998, 999]):
        theirs = scheduler.add_noise(torch.asarray(x0), torch.asarray(eps), torch.asarray(t))
        assert_allclose(diffusion.q_sample(x0, np.array(t), eps), theirs.numpy(), rtol=0, atol=1e-12)
        theirs = scheduler.get_velocity(torch.asarray(x0), torch.asarray(eps), torch.asarray(t))
        assert_allclose(diffusion.training_target(x0, np.array(t), eps), theirs.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clip"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_step(kind, prediction, variance, clip):
    scheduler, schedule = same_chain(
        diffusers.DDPMScheduler,
        kind,
        prediction_type=PREDICTION_TYPE[prediction],
        variance_type=variance,
        clip_sample=clip,
    )
    diffusion = GaussianDiffusion(schedule, prediction, variance)
    for t in (0, 1, 2, 100, 500, 998, 999):
        x_t, output = arrays(t)
        x_prev, x0, noise = diffusers_step(scheduler, output, t, x_t)
        # Their 1 - abar_t / abar_{t-1} cancels: float64 leaves it 1e-12 at t = 1, where beta is 1e-4.
        assert_allclose(ancestral(diffusion, output, t, x_t, noise, clip), x_prev, rtol=1e-10, atol=1e-10)
        if not clip:
            assert_allclose(diffusion.predict_x0(x_t, t, output), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_evenly_spaced_is_linspace_but_for_a_single_step(steps):
    scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    ours = evenly_spaced_timesteps(1000, steps).tolist()
    assert scheduler.timesteps.tolist() == ([0] if steps == 1 else ours[::-1])
    assert ours[-1] == 999


@pytest.mark.parametrize(
    ("cls", "times"),
    [
        ("DDPMScheduler", [0, 200, 400, 600, 800]),
        ("DDIMScheduler", [0, 200, 400, 600, 800]),
        ("DPMSolverMultistepScheduler", [200, 400, 599, 799, 999]),
        ("EulerDiscreteScheduler", [0, 249.75, 499.5, 749.25, 999]),
    ],
)
def test_which_end_is_left_out_by_default(cls, times):
    scheduler = getattr(diffusers, cls)()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == times[::-1]
    assert evenly_spaced_timesteps(1000, 5).tolist() == [0, 250, 500, 749, 999]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
def test_respaced_ancestral_step(prediction, variance, spacing):
    scheduler, schedule = same_chain(
        diffusers.DDPMScheduler,
        "linear",
        prediction_type=PREDICTION_TYPE[prediction],
        variance_type=variance,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(20)
    tau = scheduler.timesteps.numpy()[::-1]
    if spacing == "linspace":
        assert tau.tolist() == evenly_spaced_timesteps(1000, 20).tolist()
    diffusion = GaussianDiffusion(schedule.respace(tau), prediction, variance)
    # Step 0 of "trailing" is not timestep 0: diffusers still adds noise there, on top of the sample.
    for i in (0, 1, 10, 19) if tau[0] == 0 else (1, 10, 19):
        x_t, output = arrays(i)
        x_prev, _, noise = diffusers_step(scheduler, output, int(tau[i]), x_t)
        assert_allclose(ancestral(diffusion, output, i, x_t, noise), x_prev, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1000, 20])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_the_changes_of_variable_and_at_eta_1_the_ancestral_step(kind, prediction, steps):
    """At eta = 0, x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps (Song et al. 2020, eq. 12)."""
    scheduler, schedule = same_chain(
        diffusers.DDIMScheduler, kind, prediction_type=PREDICTION_TYPE[prediction]
    )
    scheduler.set_timesteps(steps)
    tau = scheduler.timesteps.numpy()[::-1]
    respaced = schedule.respace(tau)
    diffusion = GaussianDiffusion(respaced, prediction, "fixed_small")
    for i in (0, 1, steps // 2, steps - 1):
        x_t, output = arrays(i)
        x_prev, their_x0, _ = diffusers_step(scheduler, output, int(tau[i]), x_t, eta=0.0)
        x0, eps = diffusion.predict_x0(x_t, i, output), diffusion.predict_eps(x_t, i, output)
        abar_prev = respaced.alphas_cumprod_prev[i]
        assert_allclose(x0, their_x0, rtol=1e-10, atol=1e-10)
        assert_allclose(
            np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev) * eps, x_prev, rtol=1e-10, atol=1e-10
        )
        x_prev, _, noise = diffusers_step(scheduler, output, int(tau[i]), x_t, eta=1.0)
        assert_allclose(ancestral(diffusion, output, i, x_t, noise), x_prev, rtol=1e-9, atol=1e-9)


def test_unscaled_linear_schedule_is_the_trap():
    """The difference of convention, in a number: at T = 100 diffusers' chain keeps 36% of the variance."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    assert 0.36 < float(scheduler.alphas_cumprod[-1]) < 0.37
    assert linear_schedule(100).alphas_cumprod[-1] < 1e-4
