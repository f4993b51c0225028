"""The names, arguments and defaults that code outside relies on: there may be more, none of these changes."""

import dataclasses
import inspect

import numpy as np
import pytest

import tinydiff as td

SURFACE = """
Adam(parameters, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)
DataParallel(model, workers)
EMA(model, decay=0.999)
GaussianDiffusion(schedule, prediction='eps', variance='fixed_small')
GaussianMixture(weights, means, covariances)
LearnedSchedule(gamma_0=-13.3, gamma_1=5.0, units=32)
LossSecondMomentSampler(T, history=10, uniform=0.001)
MLP(in_features=2, out_features=None, hidden=128, blocks=3, time_features=64, rng=None, backend=None,
    *, num_classes=None)
NoiseSchedule(betas)
Parameter(value, grad=None)
UNet(in_channels=1, out_channels=1, block_channels=(32, 64, 64), layers_per_block=1, attention=(False,
    False, True), mid_attention=True, norm_groups=8, norm_eps=1e-05, head_dim=8, dropout=0.0,
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0.0, rng=None, backend=None, *,
    num_classes=None)
bits_per_dim(denoise, diffusion, data, *, rng, clip=True, t_samples=None, batch_size=256, workers=None,
    progress=True)
clip_grad_norm(parameters, max_norm)
continuous_bound(denoise, learned, data, *, rng, T=1000, prediction='v', decoder='density', t_samples=1,
    even=True, batch_size=256, progress=True)
cosine_schedule(T=1000, s=0.008, max_beta=0.999)
find_batch_size(model, diffusion, data, *, most=1024, loss='simple', min_snr_gamma=None,
    decoder='density')
flow_schedule(T=1000, shift=1.0)
get_backend(name=None, device=None)
guided(denoise, diffusion, labels, guidance_scale, num_classes)
hybrid_loss(diffusion, output, x0, t, noise, *, vlb_weight=0.001, decoder='density', weights=None)
invert(denoise, diffusion, x0, steps=None, *, progress=True)
iterate_samples(denoise, diffusion, shape, sampler='ddpm', steps=None, *, rng, eta=0.0, clip=False,
    x_T=None, labels=None, guidance_scale=1.0)
learned_schedule_loss(model, learned, x0, rng, *, T=1000, prediction='v', decoder='density', even=True,
    reconstructions=None)
linear_schedule(T=1000, beta_start=None, beta_end=None)
load_model(path, backend=None)
min_snr_weight(diffusion, t, gamma=5.0)
ode_log_likelihood(model, diffusion, x, steps=None, *, probes=None, rng=None, progress=True)
sample(denoise, diffusion, shape, sampler='ddpm', steps=None, *, rng, eta=0.0, clip=False, x_T=None,
    labels=None, guidance_scale=1.0, batch_size=None, workers=None, progress=True)
save_model(path, model, metadata=None, diffusion=None)
simple_loss(diffusion, output, x0, t, noise, weights=None)
train(model, diffusion, data, *, steps, batch_size, labels=None, label_dropout=0.1, loss='simple',
    min_snr_gamma=None, decoder='density', importance_sampling=False, seed=0, lr=0.001, warmup=None,
    final_lr=0.0, weight_decay=0.0, clip_norm=1.0, ema_decay=0.999, data_name='', run_dir=None,
    resume=False, checkpoint_every=500, log_every=50, workers=None, graph=None, progress=True)
train_learned_schedule(model, data, *, T=1000, steps, batch_size, seed=0, lr=0.001, schedule_lr=0.01,
    gamma_0=-13.3, gamma_1=5.0, units=32, prediction='v', decoder='density', even=True, warmup=None,
    final_lr=0.0, clip_norm=1.0, ema_decay=0.999, data_name='', run_dir=None, resume=False,
    checkpoint_every=500, log_every=50, workers=None, progress=True)
training_loss(model, diffusion, x0, rng, loss='simple', *, min_snr_gamma=None, decoder='density',
    t_sampler=None, labels=None)
variational_bound(denoise, diffusion, data, *, rng, decoder='density', clip=False, t_samples=None,
    batch_size=256, workers=None, progress=True)
vlb_loss(diffusion, output, x0, t, noise, *, decoder='density', weights=None, record=None)
warmup_cosine(step, steps, warmup=0, final=0.0)
"""


def arguments(function):
    """Each as it is written, before and after the star."""
    before, after = [], []
    for p in inspect.signature(function).parameters.values():
        written = p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        (after if p.kind is p.KEYWORD_ONLY else before).append(written)
    return before, after


@pytest.mark.parametrize("line", SURFACE.replace("\n    ", " ").strip().splitlines())
def test_what_is_public_keeps_its_arguments_and_defaults(line):
    name, _, rest = line.removesuffix(")").partition("(")
    positional, by_name = arguments(eval(f"lambda {rest}: None"))
    is_positional, is_by_name = arguments(getattr(td, name))
    assert is_positional[: len(positional)] == positional
    assert set(by_name) <= set(is_by_name)


@pytest.mark.parametrize(
    "kind",
    [
        td.bound.Bound,
        td.metrics.PermutationResult,
        td.samplers.SamplerState,
        td.schedule_training.LearnedScheduleResult,
        td.training.TrainingResult,
    ],
)
def test_what_holds_arrays_is_found_in_a_list_and_in_a_set(kind):
    one, other = (kind(**{field.name: np.ones(2) for field in dataclasses.fields(kind)}) for _ in range(2))
    assert [other, one].index(one) == 1
    assert other not in {one}
