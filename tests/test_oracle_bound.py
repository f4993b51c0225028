"""The bound's gradients against PyTorch's autograd, through formulas written here from the papers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff.bound import discretized_gaussian_nll, gaussian_kl, gaussian_nll, step_term
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import hybrid_loss, vlb_loss
from tinydiff.schedules import NoiseSchedule

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")

PREDICTIONS = ["eps", "x0", "v", "flow"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
LEVELS = 2 * np.arange(256) / 255 - 1
seeds = st.integers(0, 2**32 - 1)


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.max(abs(ours - theirs)) <= 1e-10 * max(1e-12, np.max(abs(theirs)))


def kl(mean1, log_variance1, mean2, log_variance2):
    p, q = (
        torch.distributions.Normal(m, (v / 2).exp())
        for m, v in ((mean1, log_variance1), (mean2, log_variance2))
    )
    return torch.distributions.kl_divergence(p, q)


def nll(x, mean, log_variance):
    return -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(x)


def discretized_nll(x, mean, log_variance):
    """By log Phi and log(1 - exp), at the mirror image of bins above the mean."""
    sigma = (log_variance / 2).exp()
    upper, lower = (x + 1 / 255 - mean) / sigma, (x - 1 / 255 - mean) / sigma
    log_cdf, log_sf = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    flip = upper + lower > 0
    high, low = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    inner = log_high + torch.log(-torch.expm1(log_low - log_high))
    return -torch.where(x < -0.999, log_cdf, torch.where(x > 0.999, log_sf, inner))


def with_gradients(f, *arrays):
    """f's value and d sum(f * dy) / d arrays, dy being 1, 2, 3, ... over f's elements."""
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    value = f(*leaves)
    dy = 1 + torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
    return value, torch.autograd.grad((value * dy).sum(), leaves), dy.numpy()


@settings(max_examples=20)
@given(seeds, st.booleans())
def test_elementwise_terms(seed, broadcast):
    rng = np.random.default_rng(seed)
    narrow = (3, 1) if broadcast else (3, 4)
    mean1, mean2 = rng.uniform(-1.3, 1.3, (2, 3, 4))
    log_variance1, log_variance2 = rng.uniform(-3, 1, (2, *narrow))
    x, level = rng.standard_normal((3, 4)), LEVELS[rng.choice([0, 1, 100, 254, 255], (3, 4))]
    for ours, theirs, arguments in [
        (gaussian_kl, kl, (mean1, log_variance1, mean2, log_variance2)),
        (lambda m, v: gaussian_nll(x, m, v), lambda m, v: nll(torch.tensor(x), m, v), (mean1, log_variance1)),
        (
            lambda m, v: discretized_gaussian_nll(level, m, v),
            lambda m, v: discretized_nll(torch.tensor(level), m, v),
            (mean1, log_variance1),
        ),
    ]:
        value, gradients, dy = with_gradients(theirs, *arguments)
        own, backward = ours(*arguments)
        assert_close(own, value)
        for ours_gradient, gradient in zip(backward(dy), gradients):
            assert_close(ours_gradient, gradient)


def term(diffusion, output, x0, x_t, t, decoder, clip=False, stop_mean=False):
    """One sample's term, from Ho et al. (2020) and Nichol & Dhariwal (2021), in torch."""
    beta = torch.tensor(diffusion.schedule.betas)
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=beta.dtype), abar[:-1]])
    small = beta * (1 - before) / (1 - abar)
    small = torch.cat([small[1:2], small[1:]])
    C = x0.shape[-1]
    prediction = output[..., :C]
    a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
    guess = {
        "eps": (x_t - s * prediction) / a,
        "x0": prediction,
        "v": a * x_t - s * prediction,
        "flow": (x_t - s * prediction) / (a + s),
    }[diffusion.prediction]
    guess = guess.clamp(-1, 1) if clip else guess
    if stop_mean:
        guess = guess.detach()
    if diffusion.variance == "learned_range":
        f = (output[..., C:] + 1) / 2
        log_variance = f * beta[t].log() + (1 - f) * small[t].log()
    else:
        log_variance = (small if diffusion.variance == "fixed_small" else beta)[t].log() + 0 * x0
    if t == 0:
        return (nll if decoder == "density" else discretized_nll)(x0, guess, log_variance).sum()
    k = (1 - beta[t]).sqrt() * (1 - before[t]) / (1 - abar[t])
    w = before[t].sqrt() * beta[t] / (1 - abar[t])
    return kl(k * x_t + w * x0, small[t].log() + 0 * x0, k * x_t + w * guess, log_variance).sum()


def batch(diffusion, decoder, seed):
    rng = np.random.default_rng(seed)
    shape = (5, 2, 2, 2)
    x0 = LEVELS[rng.integers(256, size=shape)] if decoder == "8bit" else rng.standard_normal(shape)
    t, noise = np.array([0, 3, 1, 2, 0]), rng.standard_normal(shape)
    output = rng.standard_normal((*shape[:-1], 4 if diffusion.variance == "learned_range" else 2))
    return output, x0, t, noise, diffusion.q_sample(x0, t, noise)


@pytest.mark.parametrize("decoder", ["density", "8bit"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_terms_and_losses(prediction, variance, decoder, seed):
    diffusion = GaussianDiffusion(NoiseSchedule([0.05, 0.1, 0.2, 0.4]), prediction, variance)
    output, x0, t, noise, x_t = batch(diffusion, decoder, seed)

    def terms(o, **how):
        rows = [
            term(diffusion, o[n], torch.tensor(x0[n]), torch.tensor(x_t[n]), int(t[n]), decoder, **how)
            for n in range(5)
        ]
        return torch.stack(rows)

    for clip in (False, True):
        value, (gradient,), dy = with_gradients(lambda o, clip=clip: terms(o, clip=clip), output)
        own, backward = step_term(diffusion, output, x0, x_t, t, decoder, clip)
        assert_close(own, value)
        assert_close(backward(dy), gradient)

    scale = 4 / (8 * math.log(2))  # T / (D log 2)
    weights = np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    value, (gradient,), _ = with_gradients(
        lambda o: scale * (torch.tensor(weights) * terms(o)).mean(), output
    )
    own, own_gradient = vlb_loss(diffusion, output, x0, t, noise, decoder=decoder, weights=weights)
    assert_close(own, value)
    assert_close(own_gradient, gradient)

    if variance == "learned_range":
        target = torch.tensor(diffusion.training_target(x0, t, noise))

        def hybrid(o):  # the weights are those of L_simple
            simple = torch.tensor(weights) * ((o[..., :2] - target) ** 2).mean(dim=(1, 2, 3))
            return simple.mean() + 0.3 * scale * terms(o, stop_mean=True).mean()

        value, (gradient,), _ = with_gradients(hybrid, output)
        own, own_gradient = hybrid_loss(
            diffusion, output, x0, t, noise, vlb_weight=0.3, decoder=decoder, weights=weights
        )
        assert_close(own, value)
        assert_close(own_gradient, gradient)
