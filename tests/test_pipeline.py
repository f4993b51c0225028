"""A process across the border to diffusers' schedulers, and pipelines on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logit
from test_interop import CONFIG, CONFIG_FILE, WEIGHTS_FILE, random_state

import tinydiff as td
from tinydiff.interop import (
    diffusion_from_diffusers,
    diffusion_to_diffusers,
    load_pipeline,
    save_diffusers,
    save_pipeline,
    unet_from_diffusers,
)

SCHEDULER_FILE = "scheduler_config.json"

# What google/ddpm-cifar10-32's scheduler_config.json holds.
PUBLISHED = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "timestep_values": None,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def unet(**more):
    model = unet_from_diffusers(CONFIG, random_state())
    other = td.UNet(**model.config, **more, rng=np.random.default_rng(0))
    other.load_state_dict(other.state_dict() | model.state_dict())
    return other


def betas(**entries):
    return diffusion_from_diffusers(entries).schedule.betas


# What a scheduler's config means


def test_the_published_process():
    diffusion = diffusion_from_diffusers(PUBLISHED)
    assert (diffusion.prediction, diffusion.variance) == ("eps", "fixed_large")
    assert_array_equal(diffusion.schedule.betas, td.linear_schedule(1000).betas)
    assert_array_equal(betas(), diffusion.schedule.betas)  # what it leaves out is the same


@given(st.integers(1, 40), st.floats(1e-5, 0.1), st.floats(0.2, 1.0))
def test_betas_by_what_is_even_in_them(T, start, end):
    """Of each kind, numbers that lie on a line, with its ends."""
    entries = dict(num_train_timesteps=T, beta_start=start, beta_end=end)
    line = np.linspace(start, end, T)  # of a single step diffusers takes the start
    assert_allclose(betas(**entries), line, rtol=1e-14)
    line = np.linspace(start**0.5, end**0.5, T)
    assert_allclose(np.sqrt(betas(beta_schedule="scaled_linear", **entries)), line, rtol=1e-14)
    part = (betas(beta_schedule="sigmoid", **entries) - start) / (end - start)
    assert_allclose(logit(part), np.linspace(-6, 6, T), rtol=1e-9, atol=1e-9)
    cosine = betas(beta_schedule="squaredcos_cap_v2", **entries)
    assert_array_equal(cosine, td.cosine_schedule(T).betas)


def test_rescaled_betas_end_in_noise_and_begin_as_before():
    entries = dict(num_train_timesteps=50, beta_schedule="scaled_linear", beta_end=0.05)
    before = diffusion_from_diffusers(entries).schedule
    after = diffusion_from_diffusers({**entries, "rescale_betas_zero_snr": True}).schedule
    assert after.betas[0] == before.betas[0] and after.alphas_cumprod[-1] == 0
    old, new = np.sqrt(before.alphas_cumprod), np.sqrt(after.alphas_cumprod)
    slopes = np.diff(new) / np.diff(old)  # shifted and scaled, nothing else
    assert_allclose(slopes, slopes[0], rtol=1e-10)
    assert_array_equal(betas(num_train_timesteps=2, rescale_betas_zero_snr=True), [1e-4, 1])
    single = dict(num_train_timesteps=1, beta_end=0.5)
    assert_array_equal(betas(**single, rescale_betas_zero_snr=True), betas(**single))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (None, "fixed_small"),
        ("fixed_small_log", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("learned_range", "learned_range"),
    ],
)
def test_variance(theirs, ours):
    assert diffusion_from_diffusers({"variance_type": theirs}).variance == ours
    assert diffusion_from_diffusers({}).variance == "fixed_small"


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20),
    st.sampled_from(["eps", "x0", "v"]),
    st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    st.booleans(),
)
def test_every_process_crosses_the_border_and_comes_back(betas, prediction, variance, clip):
    diffusion = td.GaussianDiffusion(td.NoiseSchedule(betas), prediction, variance)
    config = json.loads(json.dumps(diffusion_to_diffusers(diffusion, clip)))
    back = diffusion_from_diffusers(config)
    assert (back.prediction, back.variance) == (prediction, variance)
    assert_array_equal(back.schedule.betas, diffusion.schedule.betas)
    assert config["clip_sample"] is clip
    assert diffusion_to_diffusers(diffusion)["clip_sample"] is False


def test_the_flow_stays_on_this_side_of_the_border(tmp_path):
    """diffusers' schedulers with such a prediction show a network other states."""
    says = "^diffusion has prediction 'flow', .* expected one of eps, x0, v.$"
    flow = td.GaussianDiffusion(td.flow_schedule(20), "flow")
    with pytest.raises(ValueError, match=says):
        diffusion_to_diffusers(flow)
    with pytest.raises(ValueError, match=says):
        td.interop.save_pipeline(tmp_path / "pipeline", unet(), flow, sample_size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "one of DDPMScheduler, "),
        ({"_class_name": ["LCMScheduler"]}, "one of DDPMScheduler, "),
        ({"prediction_type": "flow_prediction"}, "one of 'epsilon', 'sample', 'v_prediction'"),
        ({"prediction_type": ["epsilon"]}, "one of 'epsilon'"),
        ({"predict_epsilon": False}, "True"),
        ({"use_flow_sigmas": True}, "False"),
        ({"timestep_type": "continuous"}, "'discrete'"),
        ({"snr_shift_scale": 3.0}, "1"),
        ({"variance_type": "learned"}, "one of None, 'fixed_small'"),
        ({"variance_type": "fixed_large_log"}, "one of None, 'fixed_small'"),
        ({"beta_schedule": "laplace"}, "one of linear, .* or trained_betas"),
        ({"beta_start": 0.0}, r"a number in \(0, 1\]"),
        ({"beta_end": 1.5}, r"a number in \(0, 1\]"),
        ({"beta_end": "0.02"}, r"a number in \(0, 1\]"),
        ({"num_train_timesteps": 0}, "a positive integer"),
        ({"num_train_timesteps": 10.0}, "a positive integer"),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, "2, as many as trained_betas"),
        ({"num_train_timesteps": 1, "trained_betas": [0.1, 0.2]}, "2, as many as trained_betas"),
        ({"rescale_betas_zero_snr": "no"}, "True or False"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(entry, expected):
    key = next(iter(entry))
    with pytest.raises(
        ValueError, match=rf"^config\['{key}'\] = .* is not supported .*; expected {expected}"
    ):
        diffusion_from_diffusers(entry)


def test_betas_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"betas\[1\] is 2"):
        diffusion_from_diffusers({"num_train_timesteps": 2, "trained_betas": [0.1, 2.0]})


def test_a_scheduler_just_made_that_has_no_betas_is_refused():
    """Its config does not say its class, unlike one that was read, but has all its entries."""
    made = {"num_train_timesteps": 1000, "shift": 3.0, "_use_default_values": ["num_train_timesteps"]}
    with pytest.raises(ValueError, match=r"no 'beta_schedule'; expected one of DDPMScheduler, DDIM"):
        diffusion_from_diffusers(made)
    known = {"beta_schedule": "linear", "_use_default_values": ["beta_schedule"]}
    assert_array_equal(diffusion_from_diffusers(known).schedule.betas, betas())


def test_what_is_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"config is a str; expected a mapping\.$"):
        diffusion_from_diffusers(SCHEDULER_FILE)
    scheduler = SimpleNamespace(config=PUBLISHED)
    with pytest.raises(TypeError, match="expected a mapping; its attribute config is one"):
        diffusion_from_diffusers(scheduler)
    with pytest.raises(TypeError, match="diffusion is a NoiseSchedule; expected a GaussianDiffusion"):
        diffusion_to_diffusers(td.linear_schedule())


# On disk


def test_a_pipeline_comes_back(tmp_path):
    model, diffusion = unet(), td.GaussianDiffusion(td.cosine_schedule(30), "v", "fixed_large")
    for size in (8.0, "8", None, 0, (8, -8)):
        with pytest.raises(ValueError, match=r"^sample_size is .*; expected an integer of at least 1"):
            save_pipeline(tmp_path / "new" / "pipeline", model, diffusion, size)
    for size in ((8,), (8, 8, 1), ()):
        with pytest.raises(ValueError, match=r"^sample_size is .*; expected one number, or height and width"):
            save_pipeline(tmp_path / "new" / "pipeline", model, diffusion, size)
    with pytest.raises(ValueError, match=r"^sample_size is '8'; expected an integer of at least 1"):
        save_diffusers(tmp_path / "new", model, "8")
    assert not (tmp_path / "new").exists()
    save_pipeline(tmp_path / "new" / "pipeline", model, diffusion, sample_size=8)
    again, process = load_pipeline(str(tmp_path / "new" / "pipeline"))
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert_array_equal(again.state_dict()[name], weight)
    assert_array_equal(process.schedule.betas, diffusion.schedule.betas)
    assert (process.prediction, process.variance) == ("v", "fixed_large")
    # A directory of a model alone is one that `load_diffusers` reads.
    assert td.interop.load_diffusers(tmp_path / "new" / "pipeline" / "unet").config == model.config


def test_files_side_by_side_as_published(tmp_path):
    save_diffusers(tmp_path, unet(), sample_size=8)
    (tmp_path / SCHEDULER_FILE).write_text(json.dumps(PUBLISHED))
    model, diffusion = load_pipeline(tmp_path)
    assert model.config == unet().config and diffusion.variance == "fixed_large"


def test_nothing_is_written_of_what_cannot_be(tmp_path):
    with pytest.raises(TypeError, match="model is an MLP"):
        save_pipeline(tmp_path / "a", td.MLP(), td.GaussianDiffusion(td.linear_schedule(9)), 8)
    with pytest.raises(TypeError, match="diffusion is a NoiseSchedule"):
        save_pipeline(tmp_path / "a", unet(), td.linear_schedule(9), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("outputs", "variance"), [(1, "learned_range"), (2, "fixed_small")])
def test_a_model_without_its_variance_is_refused(tmp_path, outputs, variance):
    model = td.UNet(1, outputs, block_channels=(4, 8), attention=(False, False), norm_groups=2, head_dim=4)
    diffusion = td.GaussianDiffusion(td.linear_schedule(9), variance=variance)
    said = f"in_channels=1 and out_channels={outputs}; expected {3 - outputs} for each, of the variance"
    with pytest.raises(ValueError, match=said):
        save_pipeline(tmp_path / "a", model, diffusion, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", [0, np.int64(2), 3])
def test_a_network_with_classes_has_a_pipeline_for_each(tmp_path, label):
    """A DDPMPipeline calls it without a class; the last is that of none."""
    rng, process = np.random.default_rng(0), td.GaussianDiffusion(td.linear_schedule(9))
    model = unet(num_classes=3)
    before = model.state_dict()
    save_pipeline(tmp_path, model, process, 8, label=label)
    alone, _ = load_pipeline(tmp_path)
    assert "num_classes" not in alone.config
    x, t = rng.standard_normal((5, 8, 8, 3), np.float32), np.arange(5)
    told = model.predict(x, t, labels=np.full(5, label))
    assert_allclose(alone.predict(x, t), told, atol=1e-5 * np.abs(told).max())
    assert label == 3 or np.abs(told - model.predict(x, t)).max() > 1e-2 * np.abs(told).max()
    for name, value in before.items():
        assert_array_equal(model.state_dict()[name], value)


@pytest.mark.parametrize("label", [None, 4, -1, True, 1.0, "1"])
def test_a_pipeline_of_a_network_with_classes_is_for_one_of_them(tmp_path, label):
    process, model = td.GaussianDiffusion(td.linear_schedule(9)), td.UNet(num_classes=3)
    with pytest.raises(ValueError) as caught:
        save_pipeline(tmp_path / "a", model, process, 8, label=label)
    assert f"label is {label!r}, and model has num_classes=3; expected 0 ... 3: a DDPM" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_a_label_is_for_a_network_with_classes(tmp_path):
    process = td.GaussianDiffusion(td.linear_schedule(9))
    with pytest.raises(ValueError, match="label is 0, and model has no classes; expected None"):
        save_pipeline(tmp_path / "a", td.UNet(), process, 8, label=0)
    assert not (tmp_path / "a").exists()


def test_on_a_full_disk_the_former_files_stay(tmp_path, full_disk):
    diffusion = td.GaussianDiffusion(td.linear_schedule(9))
    save_pipeline(tmp_path, unet(), diffusion, 8)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(before) == 4
    with full_disk(), pytest.raises(OSError, match=WEIGHTS_FILE):
        save_pipeline(tmp_path, td.UNet(), diffusion, 8)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("missing", [f"scheduler/{SCHEDULER_FILE}", f"unet/{CONFIG_FILE}"])
def test_what_is_missing_is_named(tmp_path, missing):
    save_pipeline(tmp_path, unet(), td.GaussianDiffusion(td.linear_schedule(9)), 8)
    (tmp_path / missing).unlink()
    folder, name = missing.split("/")
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*{folder}"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no {SCHEDULER_FILE} in .*; expected a diffusers pipeline"):
        load_pipeline(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"beta_schedule": 3}', r"config\['beta_schedule'\] = 3"),
    ],
)
def test_a_scheduler_that_cannot_be_read_is_named_with_its_file(tmp_path, text, message):
    save_pipeline(tmp_path, unet(), td.GaussianDiffusion(td.linear_schedule(9)), 8)
    (tmp_path / "scheduler" / SCHEDULER_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{SCHEDULER_FILE}.*{message}"):
        load_pipeline(tmp_path)
