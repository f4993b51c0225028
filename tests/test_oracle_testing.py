"""tinydiff.testing pointed at diffusers: what is right there passes, what is not is called by its name."""

from functools import partial
from itertools import cycle

import numpy as np
import pytest
from test_oracle_schedulers import KINDS, PREDICTION_TYPE, same_chain

import tinydiff as td
from tinydiff import testing

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle


def assert_walk(scheduler, process, name, monkeypatch, steps=20, clip=False, **options):
    """Of a scheduler's loop as it is written everywhere, with the noise that it is handed."""
    scheduler.set_timesteps(steps)

    def sampler(denoise, x, timesteps, noise):
        module = f"diffusers.schedulers.{type(scheduler).__module__.split('.')[-1]}"
        monkeypatch.setattr(f"{module}.randn_tensor", noise)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t), t, x, **options).prev_sample
        return x

    tau = scheduler.timesteps.numpy()[::-1]
    testing.assert_sampler(sampler, process, name, tau, clip=clip, asarray=torch.as_tensor, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_forward_process_pass_as_they_come(kind):
    scheduler = diffusers.DDPMScheduler(beta_schedule=KINDS[kind])
    schedule = {"linear": td.linear_schedule, "cosine": td.cosine_schedule}[kind]()
    testing.assert_schedule(scheduler.alphas_cumprod, schedule)
    testing.assert_q_sample(
        lambda x0, t, noise: scheduler.add_noise(x0, noise, t), schedule, asarray=torch.as_tensor
    )
    testing.assert_training_target(
        lambda x0, t, noise: scheduler.get_velocity(x0, noise, t),
        td.GaussianDiffusion(schedule, "v"),
        asarray=torch.as_tensor,
    )


def test_a_tensor_may_have_a_gradient():
    schedule = td.linear_schedule(20)
    abar = torch.tensor(schedule.alphas_cumprod, requires_grad=True)

    def q_sample(x0, t, noise):
        a2 = abar[t].reshape(-1, 1, 1, 1)
        return a2.sqrt() * x0 + (1 - a2).sqrt() * noise

    testing.assert_schedule(abar, schedule)
    testing.assert_q_sample(q_sample, schedule, asarray=torch.as_tensor)


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (lambda x: torch.randn_like(x), None),
        (lambda x: torch.randn_like(x, dtype=torch.float64), None),
        (lambda x: torch.randn(x.shape, dtype=x.dtype), None),
        (lambda x: torch.randn(*x.shape), None),
        (lambda x: torch.randn_like(x[:1]), "one noise for all of the batch"),
        (lambda x: torch.randn(1), r"noise\(\) is asked for shape \(1,\); expected \(4, 3, 4, 4\)."),
    ],
)
def test_noise_stands_for_that_of_torch(drawn, said, monkeypatch):
    process = td.GaussianDiffusion(td.linear_schedule(20), "x0", "fixed_large")

    def sampler(denoise, x, timesteps, noise):
        monkeypatch.setattr("torch.randn_like", noise)
        monkeypatch.setattr("torch.randn", noise)
        for t in timesteps[::-1]:
            mean, variance = process.p_mean_variance(x.numpy(), t, denoise(x, t).numpy())
            x = torch.as_tensor(mean) + (torch.as_tensor(variance).sqrt() * drawn(x) if t else 0)
        return x

    if said is None:
        return testing.assert_sampler(sampler, process, asarray=torch.as_tensor)
    with pytest.raises(AssertionError, match=said):
        testing.assert_sampler(sampler, process, asarray=torch.as_tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tensor_may_be_of_half_precision(dtype):
    schedule = td.linear_schedule(20)
    process = td.GaussianDiffusion(schedule)
    testing.assert_q_sample(
        lambda *given: torch.as_tensor(process.q_sample(*given)).to(dtype), schedule, tolerance=0.01
    )


def test_a_tensor_of_no_numbers_is_said():
    with pytest.raises(AssertionError, match=r"q_sample is a Tensor (.*); expected an array"):
        testing.assert_q_sample(lambda x0, *_: torch.empty(x0.shape, device="meta"), td.linear_schedule(20))


def test_what_is_compiled_by_jax_is_asked_uncompiled():
    jax = pytest.importorskip("jax")
    process = td.GaussianDiffusion(td.linear_schedule(20))
    abar = process.schedule.alphas_cumprod.reshape(-1, 1, 1, 1)

    def loss(network, *given):
        @jax.jit
        def compiled(x0, t, noise):
            rates = jax.numpy.asarray(abar)[t]
            return jax.numpy.mean((network(rates**0.5 * x0 + (1 - rates) ** 0.5 * noise, t) - noise) ** 2)

        return compiled(*given)

    with pytest.raises(
        AssertionError, match=r"Tracer .* expected an array\. Under jax\.disable_jit\(\) it is"
    ):
        testing.assert_loss(loss, process, asarray=jax.numpy.asarray)
    with jax.disable_jit():
        testing.assert_loss(loss, process, asarray=jax.numpy.asarray)


def test_short_chains_are_told_apart():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    with pytest.raises(AssertionError, match=r"whatever T is \(E.4\)"):
        testing.assert_schedule(scheduler.alphas_cumprod, td.linear_schedule(100))


def weights_of_the_examples(prediction, snr, gamma):
    """In diffusers' examples/text_to_image: each divided by what an error of x_0 is then multiplied by."""
    least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return least / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]


def weights_of_some(prediction, snr, gamma):
    """In others, of dreambooth: for v 1 more than for eps, and for x_0 as for eps."""
    of_eps = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    return of_eps + 1 if prediction == "v" else of_eps


@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
def test_min_snr_of_the_training_examples(prediction):
    scheduler, schedule = same_chain(diffusers.DDPMScheduler, "linear")
    process = td.GaussianDiffusion(schedule, prediction)

    def with_weights(weights_of):
        def loss(network, x0, t, noise):
            output = network(scheduler.add_noise(x0, noise, t), t)
            target = {"eps": noise, "x0": x0, "v": scheduler.get_velocity(x0, noise, t)}[prediction]
            each = torch.nn.functional.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
            weights = weights_of(prediction, diffusers.training_utils.compute_snr(scheduler, t), 5.0)
            return (weights * each).mean()

        return loss

    def judged(weights_of):
        testing.assert_loss(with_weights(weights_of), process, min_snr_gamma=5.0, asarray=torch.as_tensor)

    judged(weights_of_the_examples)
    if prediction == "eps":
        return judged(weights_of_some)
    more = {"x0": "", "v": ", and 1 more"}[prediction]
    with pytest.raises(AssertionError, match=rf"of this: the weights of an error of eps{more} \(E.19\).$"):
        judged(weights_of_some)


def test_times_in_bfloat16_are_called_so():
    """docs: E.14, in PyTorch's rounding."""
    scheduler, schedule = same_chain(diffusers.DDPMScheduler, "linear")

    def loss(network, x0, t, noise):
        output = network(scheduler.add_noise(x0, noise, t), t.to(torch.bfloat16))
        return torch.nn.functional.mse_loss(output, noise)

    with pytest.raises(AssertionError, match=r"\(in bfloat16, E.14\)."):
        testing.assert_loss(loss, td.GaussianDiffusion(schedule), asarray=torch.as_tensor)


@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_ddpm_passes(spacing, variance, prediction, monkeypatch):
    scheduler, schedule = same_chain(
        diffusers.DDPMScheduler,
        "linear",
        variance_type=variance,
        prediction_type=PREDICTION_TYPE[prediction],
        timestep_spacing=spacing,
    )
    assert_walk(scheduler, td.GaussianDiffusion(schedule, prediction, variance), "ddpm", monkeypatch)


def test_the_grain_of_ddpm_is_named(monkeypatch):
    scheduler, schedule = same_chain(
        diffusers.DDPMScheduler, "linear", variance_type="fixed_large", timestep_spacing="trailing"
    )
    process = td.GaussianDiffusion(schedule, "eps", "fixed_large")
    with pytest.raises(AssertionError, match=r"10 times; expected 9.\nIt is .* at the last step \(E.9\).$"):
        assert_walk(scheduler, process, "ddpm", monkeypatch, steps=10)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTION_TYPE)
def test_ddim_passes_by_default(prediction, eta, monkeypatch):
    scheduler, schedule = same_chain(
        diffusers.DDIMScheduler, "linear", prediction_type=PREDICTION_TYPE[prediction]
    )
    assert_walk(scheduler, td.GaussianDiffusion(schedule, prediction), "ddim", monkeypatch, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_linspace_of_ddim_is_named(eta, monkeypatch):
    scheduler, schedule = same_chain(diffusers.DDIMScheduler, "linear", timestep_spacing="linspace")
    with pytest.raises(AssertionError, match=r"of this: the next time computed, .* not looked up \(E.16\).$"):
        assert_walk(scheduler, td.GaussianDiffusion(schedule), "ddim", monkeypatch, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_end_of_ddim_in_stable_diffusion_is_named(eta, monkeypatch):
    scheduler, schedule = same_chain(
        diffusers.DDIMScheduler, "linear", set_alpha_to_one=False, steps_offset=1
    )
    with pytest.raises(AssertionError, match="of this: the last step leads to abar of t = 0, not to 1"):
        assert_walk(scheduler, td.GaussianDiffusion(schedule), "ddim", monkeypatch, eta=eta)


def test_dpm_solver_passes(monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace")
    process = td.GaussianDiffusion(td.NoiseSchedule(scheduler.betas))
    assert_walk(scheduler, process, "dpm++", monkeypatch)


def test_the_other_correction_of_dpm_solver_is_named(monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace", solver_type="heun")
    process = td.GaussianDiffusion(td.NoiseSchedule(scheduler.betas))
    with pytest.raises(AssertionError, match="of this: the correction integrated exactly"):
        assert_walk(scheduler, process, "dpm++", monkeypatch)


def in_sigma(scheduler, scaled=True, start=None):
    """The loop over a scheduler whose states are not scaled down; `start` is what x_T is multiplied by."""

    def sampler(denoise, x, timesteps, noise):
        x = x * (scheduler.init_noise_sigma if start is None else start)
        for t in scheduler.timesteps:
            shown = scheduler.scale_model_input(x, t)
            x = scheduler.step(denoise(shown if scaled else x, t), t, x).prev_sample
        return x

    return sampler


@pytest.mark.parametrize(
    ("spacing", "options", "said"),
    [
        ("leading", {}, None),
        ("linspace", {}, "it starts from sigma_T x_T, and not from .* another convention, EDM's.$"),
        ("leading", dict(start=1.0), "it starts from x_T as it is, and not from"),
        ("leading", dict(scaled=False), "the network is shown x / a, a state"),
    ],
)
def test_a_walk_of_states_that_are_not_scaled_down(spacing, options, said):
    scheduler = diffusers.HeunDiscreteScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    tau = np.unique(scheduler.timesteps.numpy().astype(int))
    process = td.GaussianDiffusion(td.NoiseSchedule(scheduler.betas))

    def judged():
        testing.assert_sampler(
            in_sigma(scheduler, **options), process, "edm", tau, asarray=torch.as_tensor, tolerance=1e-4
        )

    if said is None:
        return judged()
    with pytest.raises(AssertionError, match=f"of this: {said}"):
        judged()


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        (True, "eps of an x_0 that is not clipped"),
        (False, "x_0 is clipped, and eps is of the one that is not"),
    ],
)
def test_eps_of_what_was_not_clipped_is_named(clip, said, monkeypatch):
    scheduler, schedule = same_chain(diffusers.DDIMScheduler, "linear", clip_sample=True)
    with pytest.raises(AssertionError, match=f"of this: {said}"):
        assert_walk(scheduler, td.GaussianDiffusion(schedule), "ddim", monkeypatch, clip=clip)


def chain_of(abar):
    return td.NoiseSchedule(1 - abar / np.append(1, abar[:-1]))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("EulerDiscreteScheduler", "ddim", {}),
        ("DPMSolverMultistepScheduler", "dpm++", dict(final_sigmas_type="zero", lower_order_final=False)),
    ],
)
def test_zero_terminal_snr_is_compared_on_the_times_walked_alone(kind, name, options):
    """Where the last abar is 2^-24, above the one before it."""
    scheduler = getattr(diffusers, kind)(
        beta_end=0.02,
        beta_start=1e-4,
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        **options,
    )
    scheduler.set_timesteps(20)
    abar = scheduler.alphas_cumprod.double().numpy()
    assert abar[-1] == 2.0**-24 > abar[-2]
    schedule = chain_of(abar[scheduler.timesteps.numpy().astype(int)[::-1]])

    def sampler(denoise, x, timesteps, noise):
        x = x * scheduler.init_noise_sigma
        for k, t in zip(timesteps[::-1], scheduler.timesteps, strict=True):
            x = scheduler.step(denoise(scheduler.scale_model_input(x, t), k), t, x).prev_sample
        return x

    testing.assert_sampler(sampler, td.GaussianDiffusion(schedule, "v"), name, asarray=torch.as_tensor)


def of_flow_matching(shift, **times):
    """diffusers' scheduler, and our process at its times."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if times:
        scheduler.set_timesteps(**times)
    r = scheduler.sigmas.double().numpy()
    r = np.sort(r[r > 0])
    size2 = (1 - r) ** 2 + r**2
    schedule = chain_of((1 - r) ** 2 / size2)
    return scheduler, td.GaussianDiffusion(schedule, "flow"), torch.as_tensor(np.sqrt(size2))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_of_diffusers(shift):
    scheduler, process, size = of_flow_matching(shift)
    testing.assert_schedule(process.schedule.alphas_cumprod, td.flow_schedule(1000, shift))

    def q_sample(x0, t, noise):
        return scheduler.scale_noise(x0, scheduler.timesteps[999 - t], noise) / size[t][:, None, None, None]

    testing.assert_q_sample(q_sample, td.flow_schedule(1000, shift), asarray=torch.as_tensor, tolerance=1e-4)

    even = np.linspace(1, 0.001, 28)
    scheduler, process, size = of_flow_matching(shift, sigmas=even)

    def sampler(denoise, x, timesteps, noise):
        z = x * size[-1]
        for k, t in zip(timesteps[::-1], scheduler.timesteps, strict=True):
            z = scheduler.step(denoise(z / size[k], k), t, z).prev_sample
        return z

    testing.assert_sampler(sampler, process, "ddim", asarray=torch.as_tensor, tolerance=1e-4)


def test_diffusers_shifts_the_smallest_time_twice():
    """As chapter 13 says; huggingface/diffusers, issue 13243."""
    for given, last in [
        (dict(num_inference_steps=28), 0.0089),
        (dict(sigmas=np.linspace(1, 1e-3, 28)), 0.003),
    ]:
        scheduler, _, _ = of_flow_matching(3.0, **given)
        assert abs(scheduler.sigmas[27].item() / last - 1) < 0.01
    once = td.flow_schedule(1000, 3.0)
    assert abs(1 / (1 + once.snr[0] ** 0.5) / 0.003 - 1) < 0.01


def path_of(optimizer_class, **settings):
    def path(weights, gradients):
        p = torch.nn.Parameter(weights.clone())
        optimizer, found = optimizer_class([p], **settings), []
        for p.grad in gradients.clone():
            optimizer.step()
            found.append(p.detach().clone())
        return torch.stack(found)

    return path


@pytest.mark.parametrize("settings", [{}, dict(lr=0.01, betas=(0.5, 0.9), eps=1e-4)], ids=["plain", "set"])
def test_the_optimizers_of_pytorch_are_known(settings):
    lr = settings.get("lr", 1e-3)
    decay = dict(weight_decay=0.1)
    ask = partial(testing.assert_adam, asarray=torch.as_tensor, **settings)
    ask(path_of(torch.optim.Adam, **settings))

    def single(weights, gradients):
        return path_of(torch.optim.Adam, **settings)(weights.float(), gradients.float())

    ask(single, tolerance=1e-3)
    ask(path_of(torch.optim.AdamW, **settings, **decay), **decay)
    for optimizer_class, how, asked, what in [
        (
            torch.optim.Adam,
            decay,
            decay,
            "the weight decay is in the gradient, as in PyTorch's Adam, not AdamW.",
        ),
        (torch.optim.AdamW, decay | dict(weight_decay=0.1 / lr), decay, "as in the paper of AdamW."),
        (torch.optim.Adam, dict(amsgrad=True), {}, "the largest second moment so far, which is AMSGrad."),
        (torch.optim.Adam, dict(maximize=True), {}, "up the gradient, not down."),
    ]:
        with pytest.raises(AssertionError) as caught:
            ask(path_of(optimizer_class, **settings | how), **asked)
        assert str(caught.value).endswith(what)
    rate = dict(alpha=settings.get("betas", (0.9, 0.999))[1], eps=settings.get("eps", 1e-8), lr=lr)
    with pytest.raises(AssertionError, match="and no bias is corrected: RMSprop"):
        ask(path_of(torch.optim.RMSprop, **rate))


def test_the_average_of_pytorch_is_known():
    def averages(weights):
        net = torch.nn.Linear(1, 32, bias=False).double()
        net.weight.data = weights[0][:, None].clone()
        of = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        average, found = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=of), []
        for row in weights[1:]:
            net.weight.data = row[:, None].clone()
            average.update_parameters(net)
            found.append(average.module.weight.data[:, 0].clone())
        return torch.stack(found)

    testing.assert_ema(averages, lambda k: 0.99 if k > 1 else 0, asarray=torch.as_tensor)
    with pytest.raises(AssertionError, match="as that of PyTorch's AveragedModel"):
        testing.assert_ema(averages, 0.99, asarray=torch.as_tensor)


def test_a_training_in_pytorch_is_asked_what_it_draws():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=200)
    process = td.GaussianDiffusion(td.NoiseSchedule(scheduler.betas))

    def loss(network, x0, labels, last=200, none=10):
        t, noise = torch.randint(0, last, (len(x0),)), torch.randn_like(x0)
        told = torch.where(torch.rand(len(x0)) < 0.1, none, labels)
        return torch.nn.functional.mse_loss(network(scheduler.add_noise(x0, noise, t), t, told), noise)

    options = dict(num_classes=10, axis=1, shape=(32, 3, 4, 4), asarray=torch.as_tensor)
    torch.manual_seed(0)
    testing.assert_training_draws(loss, process, **options)
    testing.assert_training_draws(
        lambda network, *given: loss(network, *(x.float() if x.is_floating_point() else x for x in given)),
        process,
        **options,
    )
    with pytest.raises(AssertionError) as caught:
        testing.assert_training_draws(partial(loss, last=199, none=0), process, **options)
    stepped = lambda network, *given: loss(network, *given).backward()  # noqa: E731
    testing.assert_training_draws(stepped, process, **options)
    first, second = str(caught.value).split("\n")
    assert first.endswith("this: t = T - 1 is never drawn, as by randint(0, T - 1) (E.28).")
    assert second.endswith("this: no class is told as class 0, which is one.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_seed_for_two_processes_in_pytorch_is_seen(dtype):
    process = td.GaussianDiffusion(td.linear_schedule(200))
    a, s = (
        torch.tensor(x) ** 0.5 for x in (process.schedule.alphas_cumprod, 1 - process.schedule.alphas_cumprod)
    )

    def processes(*seeds):
        ranks = cycle([torch.Generator().manual_seed(seed) for seed in seeds])

        def loss(network, x0):
            rng, x0 = next(ranks), x0.to(dtype)
            t = torch.randint(0, 200, (len(x0),), generator=rng)
            noise = torch.randn(x0.shape, generator=rng, dtype=dtype)
            x_t = a[t].to(dtype)[:, None] * x0 + s[t].to(dtype)[:, None] * noise
            return torch.nn.functional.mse_loss(network(x_t, t), noise)

        return loss

    options = dict(shape=(32, 16), asarray=torch.as_tensor)
    testing.assert_training_draws(processes(0, 1), process, **options)
    with pytest.raises(AssertionError, match=r"in call 2, as in call 1\. .* have the same seed \(E\.24\)"):
        testing.assert_training_draws(processes(0, 0), process, **options)


@pytest.mark.parametrize("dim", [64, 33])
def test_the_sinusoids_of_diffusers_pass_in_their_convention(dim):
    embed = diffusers.models.embeddings.get_timestep_embedding
    as_default = dict(flip_sin_to_cos=True, downscale_freq_shift=0)
    ask = partial(testing.assert_time_embedding, dim=dim, asarray=torch.as_tensor)
    ask(lambda t: embed(t, dim, **as_default))
    ask(lambda t: embed(t, dim), flip_sin_to_cos=False, freq_shift=1)
    for t_of, how, what in [
        (lambda t: t, {}, "another convention: sines, then cosines, freq_shift 1 (E.14)"),
        (lambda t: t.to(torch.bfloat16), as_default, "times in bfloat16 (E.14)"),
        (lambda t: t + 1, as_default, "t + 1 in the place of t (E.13)"),
    ]:
        with pytest.raises(AssertionError) as caught:
            ask(lambda t, t_of=t_of, how=how: embed(torch.clamp(t_of(t), max=999), dim, **how))
        assert str(caught.value).endswith(f"It is what comes of this: {what}.")


def test_a_frechet_distance_in_pytorch_has_digits_enough_in_float64_alone():
    def distance(a, b):
        S_a, S_b = torch.cov(a.T), torch.cov(b.T)
        roots = torch.linalg.eigvals(S_a @ S_b).sqrt().real
        return (a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * roots.sum()

    testing.assert_frechet_distance(distance, asarray=torch.as_tensor)
    with pytest.raises(AssertionError, match="so digits may be lost: by float32"):
        testing.assert_frechet_distance(distance, asarray=lambda x: torch.as_tensor(x, dtype=torch.float32))
