"""Learned forward variances against PyTorch's autograd, through formulas written here from the paper.

Kingma et al. 2021: the network of appendix H with all its layers, its slope by autograd; the loss of eq. 17
in terms of eps, whatever is predicted, with the gradient through the network's input left to autograd.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff import nn
from tinydiff.continuous_bound import learned_schedule_loss
from tinydiff.learned_schedule import LearnedSchedule

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
softplus = torch.nn.functional.softplus

TOLERANCE = 1e-10
seeds = st.integers(0, 2**32 - 1)
LEVELS = 2 * np.arange(256) / 255 - 1


def assert_close(ours, theirs, scale):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.max(abs(ours - theirs)) <= TOLERANCE * scale


def random_schedule(rng, units):
    learned = LearnedSchedule(-rng.uniform(0.5, 6), rng.uniform(0.5, 4), units)
    for p in learned.rise.named_parameters().values():
        p.value = p.value + rng.standard_normal(p.shape)
    return learned


def leaves_of(module):
    return {n: torch.tensor(p.value, requires_grad=True) for n, p in module.named_parameters().items()}


def gamma_and_slope(leaves, u, weight=1.0, bias=0.0, shift=0.0):
    """l1(u) + l3(sigmoid(l2(l1(u)))), moved to its end points; the slope by autograd.

    weight, bias and shift are those of l1 and of l3, which ours has not. The same function with l1 has l2's
    weights over l1's weight, its bias less that of l1, and l3's weights times l1's.
    """
    slope = softplus(leaves["rise.slope"]) / weight
    height = softplus(leaves["rise.height"]) * weight

    def raw(u):
        y = weight * u + bias
        hidden = torch.sigmoid(y[:, None] * slope + leaves["rise.bias"] - bias * slope)
        return y + hidden @ height + shift

    first, last = raw(torch.zeros(1, dtype=torch.float64)), raw(torch.ones(1, dtype=torch.float64))
    low, high = -softplus(leaves["start"]), softplus(leaves["end"])
    gamma = low + (high - low) * (raw(u) - first) / (last - first)
    (slope,) = torch.autograd.grad(gamma.sum(), u, create_graph=True)
    return gamma, slope


@settings(max_examples=30)
@given(seeds, st.integers(1, 12))
def test_gamma_its_slope_and_their_gradients(seed, units):
    """docs: S.14, S.15"""
    rng = np.random.default_rng(seed)
    learned, n = random_schedule(rng, units), 7
    u, dgamma, dslope = rng.random(n), *rng.standard_normal((2, n))
    leaves, times = leaves_of(learned), torch.tensor(u, requires_grad=True)
    l1 = dict(weight=rng.uniform(0.3, 3), bias=rng.standard_normal(), shift=rng.standard_normal())
    gamma, slope = gamma_and_slope(leaves, times, **l1)
    loss = (gamma * torch.tensor(dgamma) + slope * torch.tensor(dslope)).sum()
    expected = torch.autograd.grad(loss, [times, *leaves.values()])

    (own_gamma, own_slope), backward = learned(u)
    gradients = [backward(dgamma, dslope), *(p.grad for p in learned.named_parameters().values())]
    scale = max(float(g.abs().max()) for g in expected)
    assert_close(own_gamma, gamma, float(gamma.detach().abs().max()))
    assert_close(own_slope, slope, float(slope.detach().max()))
    for ours, theirs in zip(gradients, expected):
        assert_close(ours, theirs, scale)


class Network(nn.Module):
    """tanh(z A + t b): not linear, so that the gradient through its input depends on where it is."""

    def __init__(self, rng, D):
        self.A = nn.Parameter(rng.standard_normal((D, D)) / D**0.5)
        self.b = nn.Parameter(rng.standard_normal(D))

    def __call__(self, z, t, rng=None):
        y = np.tanh(z @ self.A.value + t[:, None] / 10 * self.b.value)

        def backward(dy):
            dh = dy * (1 - y * y)
            self.A.accumulate(z.T @ dh)
            self.b.accumulate(t / 10 @ dh)
            return dh @ self.A.value.T

        return y, backward


def rates(gamma):
    return torch.sigmoid(-gamma).sqrt()[:, None], torch.sigmoid(gamma).sqrt()[:, None]


def guesses(z, output, gamma, prediction):
    """eps^ and x_0^ of an output."""
    a, s = rates(gamma)
    if prediction == "eps":
        return output, (z - s * output) / a
    if prediction == "x0":
        return (z - a * output) / s, output
    if prediction == "flow":
        return (z + a * output) / (a + s), (z - s * output) / (a + s)
    return s * z + a * output, a * z - s * output


@settings(max_examples=30)
@given(seeds, st.sampled_from(["eps", "x0", "v", "flow"]), st.sampled_from(["density", "8bit"]))
def test_the_loss_and_its_gradients(seed, prediction, decoder):
    """docs: S.10, S.12, S.13"""
    rng = np.random.default_rng(seed)
    N, D, T, n = 8, 3, 20, 3
    learned, network = random_schedule(rng, 4), Network(rng, D)
    if decoder == "8bit":  # where levels are told apart, but not beyond all doubt
        learned.start.value = np.array([rng.uniform(3, 5)])
    x0 = rng.choice(LEVELS[[0, 1, 100, 254, 255]] if decoder == "8bit" else rng.standard_normal(9), (N, D))
    options = dict(T=T, prediction=prediction, decoder=decoder, reconstructions=n)
    loss, backward = learned_schedule_loss(network, learned, x0, np.random.default_rng(1), **options)
    backward()

    draw = np.random.default_rng(1)
    times = torch.tensor((draw.random() + np.arange(N) / N) % 1.0, requires_grad=True)
    eps, eps_0 = torch.tensor(draw.standard_normal((N, D))), torch.tensor(draw.standard_normal((n, D)))
    data, leaves, weights = torch.tensor(x0), leaves_of(learned), leaves_of(network)

    def ask(z, t):
        return torch.tanh(z @ weights["A"] + t[:, None] / 10 * weights["b"])

    gamma, slope = gamma_and_slope(leaves, times)
    a, s = rates(gamma)
    z = a * data + s * eps
    guess, _ = guesses(z, ask(z, (T - 1) * times.detach()), gamma, prediction)
    terms = slope / 2 * ((eps - guess) ** 2).sum(1)

    at_start = -softplus(leaves["start"]) * torch.ones(n, dtype=torch.float64)
    a, s = rates(at_start)
    z = a * data[:n] + s * eps_0
    _, mean = guesses(z, ask(z, torch.zeros(n, dtype=torch.float64)), at_start, prediction)
    if decoder == "density":
        likelihood = torch.distributions.Normal(mean, s).log_prob(data[:n])
    else:
        likelihood = discretised(data[:n], mean, s)
    a, s = rates(softplus(leaves["end"]))
    standard = torch.distributions.Normal(torch.zeros_like(data), 1.0)
    prior = torch.distributions.kl_divergence(torch.distributions.Normal(a * data, s), standard).sum(1)
    expected = (terms.mean() - likelihood.sum(1).mean() + prior.mean()) / (D * math.log(2))
    assert_close(loss, expected, float(expected.detach().abs()))

    ends = [leaves["start"], leaves["end"]]
    gradients = torch.autograd.grad(expected, [*weights.values(), *ends])
    own = [p.grad for p in network.named_parameters().values()] + [learned.start.grad, learned.end.grad]
    scale = max(float(g.abs().max()) for g in gradients)
    for ours, theirs in zip(own, gradients):
        assert_close(ours, theirs, scale)


def discretised(x, mean, sigma):
    """log P of a level's bin, the outer ones open, by log Phi at the side of small tails."""
    upper, lower = (x + 1 / 255 - mean) / sigma, (x - 1 / 255 - mean) / sigma
    flip = upper + lower > 0
    log_cdf, log_sf = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    high, low = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    inner = log_high + torch.log(-torch.expm1(log_low - log_high))
    return torch.where(x < -0.999, log_cdf, torch.where(x > 0.999, log_sf, inner))


@given(seeds)
def test_what_is_between_the_end_points_learns_the_variance(seed):
    """The paper's own gradient of E L^2, by autograd through gamma and through r(gamma) (docs: S.13).

    In expectation over u: the two differ sample by sample, so both are integrated, here to rounding.
    """
    rng = np.random.default_rng(seed)
    learned = random_schedule(rng, 4)
    x, w = np.polynomial.legendre.leggauss(100)
    u = np.concat([(i + (x + 1) / 2) / 8 for i in range(8)])
    weights = np.tile(w / 16, 8)
    leaves, times = leaves_of(learned), torch.tensor(u, requires_grad=True)
    gamma, slope = gamma_and_slope(leaves, times)
    r = 0.4 * torch.sigmoid(-gamma) / (0.4 * torch.sigmoid(-gamma) + torch.sigmoid(gamma))  # of N(0, 0.4)
    L = slope / 2 * r
    names = ["rise.height", "rise.slope", "rise.bias"]
    expected = torch.autograd.grad((torch.tensor(weights) * L**2).sum(), [leaves[name] for name in names])
    learned.separate(u)[1](0 * u, 0 * u, L.detach().numpy() * np.sqrt(weights))
    scale = max(float(g.abs().max()) for g in expected)
    for name, theirs in zip(names, expected):
        assert_close(learned.named_parameters()[name].grad, theirs, scale)
