"""Processes and pipelines beside diffusers' own."""

import inspect
import json

import numpy as np
import pytest
from test_interop import CONFIG
from test_pipeline import unet

import tinydiff as td
from tinydiff.interop import diffusion_from_diffusers, load_pipeline, save_pipeline
from tinydiff.interop._process import DEFAULTS, FIXED, SCHEDULERS

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.oracle,
    # Of how diffusers calls NumPy, thousands of times.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

# How a scheduler walks, and no more.
WALK = {
    *(
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "disable_corrector",
        "dynamic_thresholding_ratio",
    ),
    *("euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped"),
    *(
        "lower_order_final",
        "predict_x0",
        "sample_max_value",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_max",
    ),
    *(
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "thresholding",
    ),
    *("time_shift_type", "timestep_spacing", "use_beta_sigmas", "use_dynamic_shifting"),
    *("use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas"),
}


def accepted(name, **entries):
    """The class, and those of `entries` that it knows."""
    which = getattr(diffusers, name)
    return which, {key: value for key, value in entries.items() if key in inspect.signature(which).parameters}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_entry_is_the_process_or_the_walk(name):
    known = {*DEFAULTS, *FIXED, *WALK}
    assert not set(inspect.signature(getattr(diffusers, name)).parameters) - known


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "entries",
    [
        {},
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300),
        dict(beta_start=0.001, beta_end=0.05, num_train_timesteps=200),
        dict(trained_betas=[0.01, 0.02, 0.5], num_train_timesteps=3),
        dict(rescale_betas_zero_snr=True),
    ],
    ids=str,
)
def test_betas(name, entries, tmp_path):
    """As it is saved, and as it is in memory: there its config names no class."""
    which, entries = accepted(name, **entries)
    scheduler = which(**entries)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    theirs = scheduler.alphas_cumprod.double().numpy()
    close = 2**-12 if "rescale_betas_zero_snr" in entries else 2e-6  # some have 2^-24 in the place of 0
    for config in (written, scheduler.config, {"_class_name": name, **entries}):
        ours = diffusion_from_diffusers(config).schedule.alphas_cumprod
        assert ours.shape == theirs.shape
        assert np.max(np.abs(np.sqrt(ours) - np.sqrt(theirs))) <= close


def test_betas_of_a_sigmoid():
    entries = dict(beta_schedule="sigmoid", num_train_timesteps=100)
    theirs = diffusers.DDPMScheduler(**entries).betas.numpy()
    np.testing.assert_allclose(diffusion_from_diffusers(entries).schedule.betas, theirs, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_a_step_backwards(prediction, variance):
    """Mean and variance, of what the scheduler makes of its own noise."""
    entries = dict(num_train_timesteps=50, beta_start=0.01, clip_sample=False)  # of 1e-4 it keeps 3 digits
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type=variance, **entries)
    process = diffusion_from_diffusers(scheduler.config)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 4, 2))
    output = rng.standard_normal((1, 3, 4, 4 if variance == "learned_range" else 2))
    first = lambda a: torch.from_numpy(a).permute(0, 3, 1, 2)  # noqa: E731
    for t in (1, 20, 49):
        draw = lambda: torch.Generator().manual_seed(t)  # noqa: B023, E731
        step = scheduler.step(first(output), t, first(x), generator=draw()).prev_sample.permute(0, 2, 3, 1)
        noise = torch.randn((1, 2, 3, 4), generator=draw(), dtype=torch.float64).permute(0, 2, 3, 1)
        mean, var = process.p_mean_variance(x, t, output)
        np.testing.assert_allclose(mean + np.sqrt(var) * noise.numpy(), step.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["EDMEuler", "FlowMatchEulerDiscrete", "IPNDM", "CogVideoXDDIM"])
def test_of_another_scheduler_just_made_nothing_is_made(name):
    with pytest.raises(ValueError, match=r"no 'beta_schedule'|snr_shift_scale"):
        diffusion_from_diffusers(getattr(diffusers, f"{name}Scheduler")().config)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("told", [{}, {"labels": np.array([1, 1])}])
def test_diffusers_draws_what_we_draw_from_a_pipeline_of_ours(tmp_path, prediction, told):
    model = unet(**{"num_classes": 2} if told else {})
    diffusion = td.GaussianDiffusion(td.cosine_schedule(12), prediction)
    save_pipeline(tmp_path, model, diffusion, sample_size=8, clip=True, label=1 if told else None)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(pipeline.scheduler) is diffusers.DDPMScheduler
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=5, output_type="np").images.shape == (1, 8, 8, 3)
    times = td.schedules.evenly_spaced_timesteps(12, 5)  # docs: S.7
    np.testing.assert_array_equal(pipeline.scheduler.timesteps.numpy()[::-1], times)

    # In float64, but for diffusers' sinusoids: what float32 rounds, twelve steps of random weights multiply.
    ddim = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    ddim.alphas_cumprod = torch.cumprod(1 - torch.tensor(ddim.config.trained_betas, dtype=torch.float64), 0)
    ddim.set_timesteps(12)
    theirs = pipeline.unet.double()
    loaded, process = load_pipeline(tmp_path)
    for network in (model, loaded):
        for parameter in network.named_parameters().values():
            parameter.value = parameter.value.astype(np.float64)
    x_T = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    x = torch.from_numpy(x_T).permute(0, 3, 1, 2)
    with torch.no_grad():
        said = theirs(x, torch.tensor([3, 11])).sample.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(said, model.predict(x_T, np.array([3, 11]), **told), rtol=1e-6, atol=1e-6)
        for t in ddim.timesteps:
            x = ddim.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    how = dict(clip=True, x_T=x_T, rng=np.random.default_rng(0), progress=False)
    ours = td.sample(loaded, process, x_T.shape, "ddim", **how)
    assert np.max(np.abs(ours - x.permute(0, 2, 3, 1).numpy())) < 1e-5


def test_we_load_what_diffusers_saves(tmp_path):
    theirs = diffusers.UNet2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    diffusers.DDIMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    model, diffusion = load_pipeline(tmp_path)
    assert repr(diffusion) == repr(td.GaussianDiffusion(td.cosine_schedule(1000), "v"))
    x, t = np.random.default_rng(0).standard_normal((2, 8, 8, 3), dtype=np.float32), np.array([1, 998])
    with torch.no_grad():
        y = (
            theirs(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t))
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
    assert np.linalg.norm(model.predict(x, t) - y) <= 1e-4 * np.linalg.norm(y)
