"""What docs/ says of PyTorch and diffusers: its blocks that need them, and what chapter 13 says of both.

Whoever has only the package cannot run such a block, so it is fenced as text; it opens with "# PyTorch".
"""

import functools

import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_docs import PAGES
from test_oracle_samplers import X_T, in_float64, nonlinear
from test_oracle_schedulers import PREDICTION_TYPE

import tinydiff as td

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle

WITH_PYTORCH = [page for page in PAGES if any(block.text.startswith("# PyTorch") for block in page.blocks)]


@functools.cache
def run(page):
    """The names that the page's blocks leave, those with PyTorch among them."""
    namespace = {"__name__": "__main__"}
    for block in page.blocks:
        if block.language == "python" or block.text.startswith("# PyTorch"):
            exec(compile("\n" * block.line + block.text, page.name, "exec", dont_inherit=True), namespace)
    return namespace


def chapter(name):
    (page,) = (page for page in PAGES if page.path.name == name)
    return run(page)


def chapter_13():
    return chapter("13-your-own-code.md")


@pytest.mark.parametrize("page", WITH_PYTORCH, ids=lambda page: page.path.name)
def test_blocks_with_pytorch_run(page):
    run(page)


def test_the_first_minute_of_chapter_13_ends_as_it_says():
    (page,) = (page for page in PAGES if page.path.name == "13-your-own-code.md")
    (said,) = (block.text for block in page.blocks if block.text.startswith("schedule: right"))
    printed = "\n".join(f"{name}: {verdict}" for name, verdict in chapter_13()["verdicts"].items())
    assert said.split() == printed.split()


def test_a_unet_with_a_mistake_is_off_by_what_chapter_13_says():
    names = chapter_13()
    yours, x, y, t = (names[name] for name in ("yours", "x", "y", "t"))
    off, first, last = (names[name] for name in ("off", "first", "last"))

    def seen(x_first, t, of=slice(None)):
        with torch.no_grad():
            return off(last(yours(x_first, torch.as_tensor(t)).sample)[of], y[of])

    assert isinstance(names["pictures"], torch.Tensor)
    assert seen(first(x), t, 0) < 1e-14 and seen(first(x), t) == pytest.approx(5e-7, rel=0.5)
    assert seen(torch.from_numpy(x).reshape(4, 3, 16, 16), t) == pytest.approx(1.1, rel=0.1)
    assert seen(first(x), t + 1) == pytest.approx(0.037, rel=0.1)
    for mistake, number in [
        ({"norm_eps": 1e-6}, 3.5e-6),
        ({"flip_sin_to_cos": False}, 0.086),
        ({"downsample_padding": 0}, 1.0),
    ]:
        wrong = td.interop.unet_from_diffusers({**yours.config, **mistake}, yours.state_dict())
        assert off(wrong.predict(x, t)[0], y[0]) == pytest.approx(number, rel=0.1)
    yours.train()
    torch.manual_seed(0)
    assert seen(first(x), t) == pytest.approx(0.16, rel=0.5)
    yours.eval()


@pytest.mark.filterwarnings("error")
def test_tensors_go_in_and_tensors_come_out():
    """Of the process, the losses, the bound and the exact denoiser, as chapter 13 says; the same numbers."""
    torch.set_warn_always(True)  # not only the first time, which may have been in another test
    diffusion = td.GaussianDiffusion(td.cosine_schedule(20), "v", "learned_range")
    mixture = td.GaussianMixture([0.4, 0.6], [[-1.0, 0.2], [0.5, 0.0]], 0.1)
    x0, noise = np.random.default_rng(0).standard_normal((2, 5, 2))
    t = np.array([0, 1, 7, 12, 19])

    def everything(x0, t, noise):
        x_t = diffusion.q_sample(x0, t, noise)
        output = mixture.denoiser(diffusion)(x_t, t)
        return [
            x_t,
            output,
            *diffusion.q_posterior_mean_variance(x0, x_t, t),
            *diffusion.p_mean_variance(x_t, t, output),
            *td.simple_loss(diffusion, output, x0, t, noise),
            *td.vlb_loss(diffusion, output, x0, t, noise),
            *td.hybrid_loss(diffusion, output, x0, t, noise),
        ]

    try:
        tensors = everything(torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(noise))
    finally:
        torch.set_warn_always(False)
    for tensor, array in zip(tensors, everything(x0, t, noise)):
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12, atol=1e-12)


def torch_path(optimizer_class, w, grads, dtype=torch.float64, **settings):
    """The weights after each step, as of chapter 13's `your_adam`."""
    weights = torch.nn.Parameter(torch.tensor(w, dtype=dtype))
    optimizer, path = optimizer_class([weights], lr=0.01, **settings), []
    for g in grads:
        weights.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        path.append(weights.detach().numpy().astype(float))
    return np.array(path)


def test_whose_weight_decay_is_whose():
    """Chapter 13: that of AdamW is ours, that of PyTorch's Adam is its `coupled`."""
    names = chapter_13()
    w, grads, path, moved, your_adam = (names[k] for k in ("w", "clipped", "path", "moved", "your_adam"))
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    assert moved(torch_path(adamw, w, grads, weight_decay=0.1), path) < 1e-11
    assert moved(torch_path(adamw, w, grads, torch.float32, weight_decay=0.1), path) < 1e-5
    coupled = torch_path(adam, w, grads, weight_decay=0.1)
    assert moved(coupled, your_adam(w, grads, coupled=True)) < 1e-11
    assert moved(coupled, path) > 1


def test_an_epsilon_beside_the_uncorrected_root_is_converted_as_chapter_13_says():
    rng = np.random.default_rng(0)
    p, m, v = td.Parameter(rng.standard_normal(5)), 0, 0
    w, adam = p.value.copy(), td.Adam([p], 0.01)
    for k in range(1, 20):
        p.grad = g = rng.standard_normal(5) * np.logspace(-8, 0, 5)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= 0.01 * np.sqrt(1 - 0.999**k) / (1 - 0.9**k) * m / (np.sqrt(v) + 1e-8)
        adam.eps = 1e-8 / np.sqrt(1 - 0.999**k)
        adam.step()
        assert_allclose(p.value, w, rtol=1e-12)


def test_clipping_is_off_by_what_chapter_13_says():
    names = chapter_13()
    grads, clipped, off = names["grads"], names["clipped"], names["off"]
    right, scaled = [], []
    for g in grads:
        weights = [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in g]
        for p, row in zip(weights, g):
            p.grad = torch.tensor(row)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        right.append(np.stack([p.grad.numpy() for p in weights]))
        # Of a scaled loss, before the scaler takes the scale out.
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(weights)
        optimizer.zero_grad()
        scaler.scale(sum((p * torch.tensor(row)).sum() for p, row in zip(weights, g))).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.unscale_(optimizer)
        scaled.append(np.stack([p.grad.numpy() for p in weights]))
    assert 1e-9 < off(right, clipped) < 1e-5  # PyTorch adds 1e-6 to the norm
    assert off(scaled, names["clip"](scale=1024)) < 1e-5


def rates(scheduler, steps, *how):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = scheduler(optimizer, *how), []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(seen)


def test_the_rates_of_diffusers_are_ours_but_where_chapter_13_says():
    from diffusers.optimization import get_cosine_schedule_with_warmup

    theirs = rates(get_cosine_schedule_with_warmup, 191, 10, 100)
    assert_allclose(theirs[10:100], chapter_13()["rates"][10:], atol=1e-12)
    assert_allclose(theirs[:10], np.arange(10) / 10)  # ours begin at 1 / 10
    assert theirs[100] < 1e-12 and theirs[190] > 1 - 1e-12 and td.warmup_cosine(190, 100, 10) == 0
    of_pytorch = rates(torch.optim.lr_scheduler.CosineAnnealingLR, 201, 100)
    assert of_pytorch[100] < 1e-12 and of_pytorch[200] > 1 - 1e-9


@pytest.mark.parametrize("how", [{}, {"decay": 0.3}, {"use_ema_warmup": True, "power": 0.75}])
def test_the_average_of_diffusers_is_ours_by_the_rule_of_chapter_13(how):
    from diffusers.training_utils import EMAModel

    names = chapter_13()
    path, layer = names["path"], td.nn.Linear(1, 4, np.random.default_rng(0)).to(np, np.float64)
    layer.bias.value = np.zeros(4)
    layer.weight.value = names["w"][:1]
    weights = torch.nn.Parameter(torch.tensor(names["w"][:1]))
    theirs, ours = EMAModel([weights], **how), td.EMA(layer, 0.9999)
    for k, now in enumerate(path[:, :1], 1):
        layer.weight.value = now
        weights.data = torch.tensor(now)
        theirs.step([weights])
        ours.steps, ours.decay = 10**9, theirs.cur_decay_value
        ours.update()
        assert_allclose(ours.model.weight.value, theirs.shadow_params[0].numpy(), rtol=1e-13)
        if "use_ema_warmup" not in how:
            assert theirs.cur_decay_value == (0 if k == 1 else min(k / (9 + k), how.get("decay", 0.9999)))


def test_an_average_of_nothing_is_taken_without_a_word():
    """Chapter 13: of a generator that the optimizer has used up."""
    from diffusers.training_utils import EMAModel

    layer = torch.nn.Linear(2, 2)
    parameters = layer.parameters()
    torch.optim.AdamW(parameters)
    theirs = EMAModel(parameters)
    before = layer.weight.detach().clone()
    theirs.step(layer.parameters())
    theirs.copy_to(layer.parameters())
    assert theirs.shadow_params == [] and torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype, stands, moves", [("float16", 1.48, 1.50), ("bfloat16", 4.88, 4.94)])
def test_an_average_in_half_precision_stands_still(dtype, stands, moves):
    """docs: E.18, of diffusers' EMAModel."""
    from diffusers.training_utils import EMAModel

    for now, still in [(stands, True), (moves, False)]:
        weights = torch.nn.Parameter(torch.ones(1, dtype=getattr(torch, dtype)))
        theirs = EMAModel([weights], decay=0.999, min_decay=0.999)
        theirs.optimization_step = 1  # the first update only copies
        weights.data.fill_(now)
        for _ in range(100):
            theirs.step([weights])
        assert theirs.shadow_params[0].dtype == weights.dtype
        assert (theirs.shadow_params[0].item() == 1) == still


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("prediction, called", [("eps", "epsilon"), ("v", "v_prediction")])
def test_pndm_adds_up_what_the_network_says_as_it_comes(prediction, called, steps):
    """docs: E.22, of diffusers' PNDMScheduler."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(prediction_type=called, skip_prk_steps=True, set_alpha_to_one=True)
    process = td.GaussianDiffusion(td.NoiseSchedule(scheduler.betas), prediction)
    best = td.GaussianMixture([1.0], [[-0.8]], 0.25).denoiser(process)
    scheduler.set_timesteps(steps)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        output = best(x.numpy(), np.full(2, int(t)))
        x = scheduler.step(torch.as_tensor(output), t, x).prev_sample
    centre, after = x.numpy()[:, 0]
    expected = chapter("09-reading-map.md")["plms"](prediction, steps)
    assert (centre, after - centre) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 11, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_sampler_that_chapter_6_writes_out_is_the_one_of_diffusers_it_names(prediction, steps):
    from diffusers import DPMSolverMultistepScheduler

    blocks = [block.text for page in PAGES for block in page.blocks if "def sde_dpm" in block.text]
    names = {"np": np}
    exec(blocks[0].partition("\n\n\nends")[0], names)
    scheduler = DPMSolverMultistepScheduler(
        100,
        beta_schedule="linear",
        prediction_type=PREDICTION_TYPE[prediction],
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    schedule, timesteps = in_float64(scheduler, steps)
    process, one, same = td.GaussianDiffusion(schedule, prediction), *map(np.random.default_rng, (1, 1))
    ours = names["sde_dpm"](nonlinear, process, X_T, timesteps, one)
    x = torch.as_tensor(X_T)
    for t in scheduler.timesteps:
        output, z = (
            torch.as_tensor(y) for y in (nonlinear(x.numpy(), np.full(4, int(t))), same.normal(size=x.shape))
        )
        x = scheduler.step(output, t, x, variance_noise=z).prev_sample
    assert_allclose(ours, x.numpy(), rtol=1e-6, atol=1e-6)  # it steps in float32
