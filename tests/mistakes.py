"""The mistakes that tinydiff.testing names, in code of its own: the papers' formulas, each with one wrong.

By check, and by the name in the check's list, which `test_testing.py` holds these tables to.
"""

from functools import partial

import numpy as np
import pytest
from scipy.special import huber, ndtr

import tinydiff as td
from tinydiff import testing
from tinydiff.bound import step_term

LINEAR, COSINE = td.linear_schedule(200), td.cosine_schedule(50)
TO_NOISE = td.cosine_schedule(40, max_beta=1.0)  # nothing of the data is left at its end
ABAR, BETAS = LINEAR.alphas_cumprod, LINEAR.betas
A, S = np.sqrt(ABAR), np.sqrt(1 - ABAR)
BEFORE = np.append(1.0, ABAR[:-1])
SMALL = BETAS * (1 - BEFORE) / (1 - ABAR)
LOW = np.append(SMALL[1], SMALL[1:])  # in a bound and a learned variance
LARGE_OF_PAPERS = np.append(SMALL[1], BETAS[1:])  # `fixed_large` in their code
OF_X0, OF_X_T = np.sqrt(BEFORE) * BETAS / (1 - ABAR), np.sqrt(1 - BETAS) * (1 - BEFORE) / (1 - ABAR)
ONE = np.ones(LINEAR.T)

EPS, X0, V, FLOW = (td.GaussianDiffusion(LINEAR, prediction) for prediction in ("eps", "x0", "v", "flow"))
LARGE = td.GaussianDiffusion(LINEAR, "eps", "fixed_large")
TO_400 = td.GaussianDiffusion(td.linear_schedule(401))  # the last of whose times is one in bfloat16
LEARNED_EPS, LEARNED_V = (
    td.GaussianDiffusion(LINEAR, prediction, "learned_range") for prediction in ("eps", "v")
)


def refusal(check, *args, **options):
    with pytest.raises(AssertionError) as caught:
        check(*args, **options)
    return str(caught.value)


def column(numbers):
    return numbers.reshape(-1, 1, 1, 1)


# Functions of a process


def linear(of_first, of_second):
    return lambda first, t, second: column(of_first[t]) * first + column(of_second[t]) * second


def posterior(of_x0=OF_X0, of_x_t=OF_X_T, variance=SMALL):
    """Ho et al. 2020, eq. 6 and 7."""
    return lambda x0, x_t, t: (linear(of_x0, of_x_t)(x0, t, x_t), variance[t])


def posterior_with(before):
    """The same, with another abar_{t-1}."""
    rest = 1 - ABAR
    return posterior(
        np.sqrt(before) * BETAS / rest, np.sqrt(1 - BETAS) * (1 - before) / rest, BETAS * (1 - before) / rest
    )


def divided_by_the_one_before(x0, x_t, t):
    with np.errstate(divide="ignore"):
        of_x0, of_x_t = np.sqrt(BEFORE) * BETAS / (1 - BEFORE), np.sqrt(1 - BETAS)  # at t = 0 inf, not nan
    return linear(of_x0, of_x_t)(x0, t, x_t), BETAS[t]


of_eps = linear(1 / A, -S / A)  # the estimate of x_0, Ho et al. 2020, eq. 15


def clipped(x_t, t, eps):
    return np.clip(of_eps(x_t, t, eps), -1, 1)


def step_to(estimate, variance=SMALL):
    """The posterior of an estimate of x_0, a function of (x_t, t, output)."""
    return lambda x_t, t, output: posterior(variance=variance)(estimate(x_t, t, output), x_t, t)


def eq_11(x_t, eps, beta, abar):
    """Ho et al. 2020, eq. 11."""
    return (x_t - beta / np.sqrt(1 - abar) * eps) / np.sqrt(1 - beta)


MEANS = {
    "beta_t in front of eps, not beta_t / sqrt(1 - abar_t) (E.11)": lambda x, eps, beta, abar: (
        (x - beta * eps) / np.sqrt(1 - beta)
    ),
    "sqrt(1 - abar_t) in front of eps, not beta_t over it (E.11)": lambda x, eps, beta, abar: (
        (x - np.sqrt(1 - abar) * eps) / np.sqrt(1 - beta)
    ),
    "beta_t / (1 - abar_t) in front of eps, without the root": lambda x, eps, beta, abar: (
        (x - beta / (1 - abar) * eps) / np.sqrt(1 - beta)
    ),
    "sqrt(beta_t / (1 - abar_t)) in front of eps": lambda x, eps, beta, abar: (
        (x - np.sqrt(beta / (1 - abar)) * eps) / np.sqrt(1 - beta)
    ),
    "eps added": lambda x, eps, beta, abar: eq_11(x, -eps, beta, abar),
    "1 / alpha_t in front, without the root": lambda x, eps, beta, abar: (
        (x - beta / np.sqrt(1 - abar) * eps) / (1 - beta)
    ),
    "1 / sqrt(abar_t) in front, not 1 / sqrt(alpha_t)": lambda x, eps, beta, abar: (
        (x - beta / np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    ),
    "sqrt(alpha_t) in front, not 1 over it": lambda x, eps, beta, abar: (
        np.sqrt(1 - beta) * (x - beta / np.sqrt(1 - abar) * eps)
    ),
    "nothing divides by sqrt(alpha_t)": lambda x, eps, beta, abar: x - beta / np.sqrt(1 - abar) * eps,
    "sqrt(alpha_t) divides x_t alone": lambda x, eps, beta, abar: (
        x / np.sqrt(1 - beta) - beta / np.sqrt(1 - abar) * eps
    ),
    "the mean is x_0": lambda x, eps, beta, abar: (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar),
    "the mean is the clipped x_0": lambda x, eps, beta, abar: np.clip(
        (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar), -1, 1
    ),
}


def reverse_step(mean=eq_11, variance=BETAS):
    return lambda x_t, t, eps: (mean(x_t, eps, column(BETAS[t]), column(ABAR[t])), variance[t])


def right_variance(nu, low, high):
    """Nichol & Dhariwal 2021, eq. 15."""
    return np.exp((nu + 1) / 2 * np.log(high) + (1 - nu) / 2 * np.log(low))


LEARNED_VARIANCES = {
    "the variance interpolated outside the logarithm (E.12)": lambda nu, low, high: (
        (nu + 1) / 2 * high + (1 - nu) / 2 * low
    ),
    "nu taken for the fraction (nu + 1) / 2": lambda nu, low, high: high**nu * low ** (1 - nu),
    "nu clipped to [0, 1] for the fraction": lambda nu, low, high: np.where(
        nu > 1, high, np.where(nu > 0, high**nu * low ** (1 - nu), low)
    ),
    "nu clipped to [-1, 1]": lambda nu, low, high: right_variance(np.clip(nu, -1, 1), low, high),
    "a sigmoid of nu for the fraction": lambda nu, low, high: (
        high ** (0.5 + np.tanh(nu / 2) / 2) * low ** (0.5 - np.tanh(nu / 2) / 2)
    ),
    "nu from beta_t at -1 to beta~_t at 1": lambda nu, low, high: right_variance(nu, high, low),
    "nu taken for the variance's logarithm": lambda nu, low, high: np.exp(nu),
}


def learned_variance(variance, t, nu):
    return variance(nu, column(LOW[t]), column(BETAS[t]))


def learned_step(variance=right_variance):
    def step(x_t, t, output):
        eps, nu = np.split(output, 2, axis=-1)
        return eq_11(x_t, eps, column(BETAS[t]), column(ABAR[t])), learned_variance(variance, t, nu)

    return step


def kl(d, q, p):
    """Between normals of variances q and p, whose means are d apart."""
    return (np.log(p / q) - 1 + q / p + d**2 / p) / 2


def nll(x, mean, p):
    return (np.log(2 * np.pi * p) + (x - mean) ** 2 / p) / 2


def bound_terms(kl=kl, nll=nll, variance=BETAS, estimate=of_eps, learned=None):
    """Ho et al. 2020, eq. 5; beta~_1 stands for beta~_0, which is 0."""

    def terms(x0, x_t, t, output):
        eps, nu = np.split(output, 2, axis=-1) if learned else (output, None)
        p = learned_variance(learned, t, nu) if learned else column(variance[t])
        guess = estimate(x_t, t, eps)
        each = np.where(
            column(t) > 0, kl(column(OF_X0[t]) * (x0 - guess), column(LOW[t]), p), nll(x0, guess, p)
        )
        return np.sum(each, axis=(1, 2, 3))

    return terms


def by_tanh(z):
    return 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))


def nll_of_levels(x, mean, p, cdf=by_tanh, closed=(), half=1 / 255):
    """`discretized_gaussian_log_likelihood` of the papers' code."""

    def log(P):
        return np.log(np.maximum(P, 1e-12))

    high, low = cdf((x - mean + half) / np.sqrt(p)), cdf((x - mean - half) / np.sqrt(p))
    outer = np.where(np.abs(x) > 0.999, np.sign(x), 0)
    outer = np.where(np.isin(outer, closed), 0, outer)
    return -np.where(outer < 0, log(high), np.where(outer > 0, log(1 - low), log(high - low)))


def of_exact_levels(**how):
    return bound_terms(nll=partial(nll_of_levels, cdf=ndtr, **how), variance=LOW)


def times_width(x, mean, p):
    return nll(x, mean, p) + np.log(255 / 2)


def loss(target=lambda x0, t, noise: noise, size=np.square, weights=ONE, end=None):
    """Ho et al. 2020, algorithm 1, line 5, of each sample; `end` makes one number of squares and weights."""

    def of_batch(network, x0, t, noise):
        each = size(network(linear(A, S)(x0, t, noise), t) - target(x0, t, noise))
        return end(each, weights[t]) if end else weights[t] * np.mean(each, axis=(1, 2, 3))

    return of_batch


OF_FLOW = "the target is the flow, eps - x_0"
TAKEN_TO_DATA = "the output is taken for x_0 - eps, the flow where t runs from noise to data"
TO_DATA = "the target is x_0 - eps, the flow where t runs from noise to data"
FLOW_TIMES = S / (A + S)  # where (1 - t) x_0 + t eps has this chain's SNR


def flow_matching(t, x0, noise):
    """Liu et al. 2022, Lipman et al. 2022: straight lines, here from data to noise."""
    return (1 - column(t)) * x0 + column(t) * noise


SNR = ABAR / (1 - ABAR)
MIN_SNR = np.minimum(SNR, 5.0)  # Hang et al. 2023, what an error of x_0 counts
velocity = linear(-S, A)


def of_estimates(estimate, target):
    """The error of what a network's answer means, and not of what it says."""

    def of_batch(network, x0, t, noise):
        x_t = linear(A, S)(x0, t, noise)
        return np.mean((estimate(x_t, t, network(x_t, t)) - target(x0, noise)) ** 2)

    return of_batch


def late(numbers, by):
    return numbers[np.clip(np.arange(200) + by, 0, 199)]


def weighed_by_a_quotient(network, x0, t, noise):
    """Where the SNR is 0, too."""
    with np.errstate(invalid="ignore"):
        weights = np.minimum(TO_NOISE.snr, 5.0) / TO_NOISE.snr
    output = network(td.GaussianDiffusion(TO_NOISE).q_sample(x0, t, noise), t)
    return weights[t] * np.mean((output - noise) ** 2, axis=(1, 2, 3))


def of_the_other_half(network, x0, t, noise):
    _, nu = np.split(network(linear(A, S)(x0, t, noise), t), 2, axis=-1)
    return np.mean((nu - noise) ** 2)


def hybrid(
    simple=1.0,
    mean=lambda t: 0.0,
    nu=1.0,
    weight=lambda D: 1e-3 * 200 / D / np.log(2),
    whole=lambda N, D: 1.0,
    nll=None,
    f=lambda v: (1 + v) / 2,
    slope=0.5,
    guess=of_eps,
):
    """The gradient of Nichol & Dhariwal 2021, eq. 16, where eps is predicted.

    What the mean learns from the bound is multiplied by mean(t), what the variance learns by nu.
    """

    def gradient(x0, t, noise, output):
        eps, v = np.split(output, 2, axis=-1)
        N, D, first = len(x0), x0[0].size, column(t) == 0
        x_t = linear(A, S)(x0, t, noise)
        low, beta = np.log(column(LOW[t])), np.log(column(BETAS[t]))
        p = np.exp(f(v) * beta + (1 - f(v)) * low)
        d = column(OF_X0[t]) * (guess(x_t, t, eps) - x0)
        by_log_p = (1 - (np.where(first, 0.0, column(SMALL[t])) + d**2) / p) / 2
        by_v = by_log_p * slope * (beta - low)
        if nll is not None:
            up, down = (np.exp(np.log(p) + side * (beta - low) / 2) for side in (1e-6, -1e-6))
            at_0 = (nll(x0, of_eps(x_t, t, eps), up) - nll(x0, of_eps(x_t, t, eps), down)) / 2e-6
            by_v = np.where(first, at_0, by_v)
        by_eps = -d / p * column(OF_X0[t] * S[t] / A[t])
        halves = [
            simple * 2 * (eps - noise) / D + weight(D) * column(mean(t) + 0.0 * t) * by_eps,
            nu * weight(D) * by_v,
        ]
        return whole(N, D) * np.concatenate(halves, axis=-1) / N

    return gradient


def times_lambda(factor):
    return lambda D: factor * 1e-3 * 200 / D / np.log(2)


def terms_of(process, decoder="density"):
    return lambda x0, x_t, t, output: step_term(process, output, x0, x_t, t, decoder)[0]


def times_ours(factor):
    return lambda *given: factor * terms_of(EPS)(*given)


def moved(function, place):
    """The function with its t, the argument at `place`, moved."""

    def asked_at(t_of):
        return lambda *given: function(*given[:place], t_of(given[place]), *given[place + 1 :])

    return {
        "t - 1 in the place of t": asked_at(lambda t: np.where(t > 0, t - 1, 0)),
        "t - 1 in the place of t, and T - 1 in that of 0": asked_at(lambda t: (t - 1) % 200),
        "t + 1 in the place of t (E.13)": asked_at(lambda t: np.where(t < 199, t + 1, 199)),
    }


def of_both(told, none, w=2):
    """Ho & Salimans 2022, eq. 6."""
    return (1 + w) * told - w * none


def guidance(
    mix=of_both,
    ask=lambda network, x, t, y: (network(x, t, y), network(x, t)),
    nu=lambda told, none: told,
):
    def guided(network, x, t, labels):
        told, none = (np.split(half, [x.shape[-1]], axis=-1) for half in ask(network, x, t, labels))
        return np.concat([mix(told[0], none[0]), nu(told[1], none[1])], axis=-1)

    return guided


def by_turns(network, x, t, y, first="none"):
    """x twice, end to end, with two labels for each sample beside each other."""
    none = np.full_like(y, 10)
    labels = np.stack([none, y] if first == "none" else [y, none], axis=1).reshape(-1)
    halves = np.split(network(np.tile(x, (2, 1, 1, 1)), np.tile(t, 2), labels), 2)
    return halves[::-1] if first == "none" else halves


def rescaled_guidance(share):
    """Lin et al. 2023, section 3.4."""

    def mix(told, none):
        guided = of_both(told, none)
        deviation = lambda x: np.array([[[[np.std(one)]]] for one in x])  # noqa: E731
        return share * guided * deviation(told) / deviation(guided) + (1 - share) * guided

    return mix


def guided_in_bfloat16(network, x, t, labels):
    return guidance()(network, x, rounded_to_bfloat16(t), labels)


TIMES_WIDTH = "a density times the width of a level, 2/255, for the level's probability"
BY_TANH = "the normal distribution by a tanh, at least 1e-12, which is what the papers' code takes"
PLANTED = [
    (
        testing.assert_q_sample,
        LINEAR,
        {
            **moved(linear(A, S), 1),
            "abar_{t-1} in the place of abar_t": linear(np.sqrt(BEFORE), np.sqrt(1 - BEFORE)),
            "both rates without their roots": linear(ABAR, 1 - ABAR),
            "1 - abar_t in front of the noise, without its root (E.23)": linear(A, 1 - ABAR),
            "abar_t in front of the data, without its root": linear(ABAR, S),
            "1 - sqrt(abar_t) in front of the noise": linear(A, 1 - A),
            "the two rates, or the arguments x0 and noise, exchanged": lambda x0, t, noise: EPS.q_sample(
                noise, t, x0
            ),
            "the noise subtracted": linear(A, -S),
            "data that is not scaled down": linear(ONE, S),
            "data that is not scaled down, noise times s/a, which is another convention, EDM's": linear(
                ONE, np.sqrt(1 / ABAR - 1)
            ),
            "both rates divided by their sum, 1 - t and t, which is another convention, flow matching's": (
                lambda x0, t, noise: flow_matching(FLOW_TIMES[t], x0, noise)
            ),
            "alpha_t of one step in the place of abar_t of all": EPS.q_step,
            "alpha_t in the place of abar_t in front of the data": linear(np.sqrt(1 - BETAS), S),
            "beta_t in the place of 1 - abar_t in front of the noise": linear(A, np.sqrt(BETAS)),
            "rates (N,) that spread along the last axis": lambda x0, t, noise: A[t] * x0 + S[t] * noise,
        },
    ),
    (
        testing.assert_training_target,
        V,
        {
            **moved(linear(-S, A), 1),
            "the target is eps, or the arguments x0 and noise are exchanged": lambda x0, t, noise: noise,
            "the target is x_0, or the arguments x0 and noise are exchanged": lambda x0, t, noise: x0,
            "the sign; -v is another convention, EDM's": linear(S, -A),
            "the rates of v exchanged, s eps - a x_0": linear(-A, S),
            "the arguments x0 and noise of v exchanged, a x_0 - s eps": linear(A, -S),
            "the target is x_t": linear(A, S),
            "the target is the noise as it was added, s eps": linear(0 * A, S),
            OF_FLOW: lambda x0, t, noise: noise - x0,
            TO_DATA: lambda x0, t, noise: x0 - noise,
        },
    ),
    (testing.assert_training_target, EPS, {"the target is v": linear(-S, A)}),
    (testing.assert_training_target, FLOW, {TO_DATA: lambda x0, t, noise: x0 - noise}),
    (
        testing.assert_predict_x0,
        EPS,
        {
            **moved(of_eps, 1),
            "the output is taken for v": linear(A, -S),
            "the estimate is clipped": clipped,
            "x_t is clipped": lambda x, t, eps: of_eps(np.clip(x, -1, 1), t, eps),
            "sqrt(alpha_t) of one step divides, not sqrt(abar_t)": lambda x, t, eps: (
                linear(ONE, -S)(x, t, eps) / column(np.sqrt(1 - BETAS[t]))
            ),
            "sqrt(abar_t) multiplies": lambda x, t, eps: column(A[t]) * linear(ONE, -S)(x, t, eps),
            "sqrt(abar_t) divides x_t alone": linear(1 / A, -S),
            "sqrt(abar_t) divides eps alone": linear(ONE, -S / A),
            "1 - sqrt(abar_t) in front of eps": linear(1 / A, 1 - 1 / A),
            "nothing divides by sqrt(abar_t)": linear(ONE, -S),
            "abar_t divides, without its root": linear(1 / ABAR, -S / ABAR),
            "1 - abar_t in front of eps, without its root": linear(1 / A, A - 1 / A),
            "eps is added": linear(1 / A, S / A),
            "the output is subtracted as it is": lambda x, t, eps: x - eps,
        },
    ),
    (
        testing.assert_predict_x0,
        V,
        {
            "the output is taken for eps": lambda x, t, v: linear(ONE, -S)(x, t, v) / column(A[t]),
            "the output is taken for x_0": lambda x, t, v: v,
            "the output is taken for -v": linear(A, S),
            "the output is taken for the flow, eps - x_0": linear(1 / (A + S), -FLOW_TIMES),
            TAKEN_TO_DATA: linear(1 / (A + S), FLOW_TIMES),
            "the rates of v exchanged, s x_t - a v": linear(S, -A),
            "the output's eps, not its x_0": linear(S, A),
        },
    ),
    (
        testing.assert_predict_x0,
        FLOW,
        {"x_t is not divided by a + s, as if it were flow matching's": linear(ONE, -FLOW_TIMES)},
    ),
    (
        testing.assert_q_posterior,
        LINEAR,
        {
            **moved(posterior(), 2),
            "abar_{t-1} rolled, so that it begins with abar_T (E.7)": posterior_with(np.roll(ABAR, 1)),
            "abar_{t-1} padded with 0, not 1 (E.7)": posterior_with(np.pad(ABAR[:-1], (1, 0))),
            "abar_{t-1} padded with abar_0, not 1 (E.7)": posterior_with(np.concat([ABAR[:1], ABAR[:-1]])),
            "abar_t in the place of abar_{t-1} (E.7)": posterior_with(ABAR),
            "sqrt(abar_t) for sqrt(abar_{t-1}) in front of x_0": posterior(A * BETAS / (1 - ABAR)),
            "abar_{t-1} in front of x_0, without its root": posterior(BEFORE * BETAS / (1 - ABAR)),
            "alpha_t in front of x_t, without its root": posterior(
                of_x_t=(1 - BETAS) * (1 - BEFORE) / (1 - ABAR)
            ),
            "sqrt(abar_t) for sqrt(alpha_t) in front of x_t": posterior(of_x_t=A * (1 - BEFORE) / (1 - ABAR)),
            "the two weights, or the arguments x0 and x_t, exchanged": lambda x0, x_t, t: posterior()(
                x_t, x0, t
            ),
            "x_t subtracted": posterior(of_x_t=-OF_X_T),
            "1 - abar_{t-1} divides, not 1 - abar_t": divided_by_the_one_before,
            "the variance is beta_t": posterior(variance=BETAS),
            "the variance is a standard deviation (E.10)": posterior(variance=np.sqrt(SMALL)),
            "the variance is its logarithm": posterior(variance=np.log(np.maximum(SMALL, 1e-20))),
            "the mean is x_0": posterior(ONE, 0 * ONE),
            "the mean is that of x_t given x_0": posterior(A, 0 * ONE),
            "x_0 is clipped": lambda x0, x_t, t: posterior()(np.clip(x0, -1, 1), x_t, t),
        },
    ),
    (
        testing.assert_p_mean_variance,
        LARGE,
        {
            **{what: reverse_step(mean) for what, mean in MEANS.items()},
            **moved(reverse_step(), 1),
            "the estimate of x_0 is clipped": step_to(clipped, BETAS),
            "the output is taken for x_0": step_to(lambda x, t, eps: eps, BETAS),
            "the output is taken for v": step_to(linear(A, -S), BETAS),
            "the variance is a standard deviation (E.10)": reverse_step(variance=np.sqrt(BETAS)),
            "the variance is its logarithm": reverse_step(variance=np.log(BETAS)),
            "the variance is fixed_small, beta~_t": reverse_step(variance=SMALL),
        },
    ),
    (
        testing.assert_p_mean_variance,
        V,
        {
            "the output is taken for eps": step_to(of_eps),
            "the output is taken for the flow, eps - x_0": step_to(linear(1 / (A + S), -FLOW_TIMES)),
            TAKEN_TO_DATA: step_to(linear(1 / (A + S), FLOW_TIMES)),
            "the variance is fixed_large, beta_t": step_to(linear(A, -S), BETAS),
        },
    ),
    (
        testing.assert_p_mean_variance,
        LEARNED_EPS,
        {
            **{what: learned_step(variance) for what, variance in LEARNED_VARIANCES.items()},
            "nu comes first, the prediction after it": lambda x, t, output: learned_step()(
                x, t, np.concat(np.split(output, 2, axis=-1)[::-1], axis=-1)
            ),
        },
    ),
    (
        partial(testing.assert_p_mean_variance, clip=True),
        LARGE,
        {"the estimate of x_0 is not clipped": reverse_step()},
    ),
    (
        testing.assert_loss,
        V,
        {
            **{what: loss(target) for what, target in moved(velocity, 1).items()},
            "the target is eps": loss(),
            "the target is -eps": loss(lambda x0, t, noise: -noise),
            "the target is x_0": loss(lambda x0, t, noise: x0),
            "the target is -v, which is another convention, EDM's": loss(linear(S, -A)),
            "the target is x_t": loss(linear(A, S)),
            "the target is the noise as it was added, s eps": loss(linear(0 * A, S)),
            OF_FLOW: loss(lambda x0, t, noise: noise - x0),
            TO_DATA: loss(lambda x0, t, noise: x0 - noise),
            "an error of eps, as denoising-diffusion-pytorch weighs them all": of_estimates(
                linear(S, A), lambda x0, noise: noise
            ),
        },
    ),
    (
        testing.assert_loss,
        X0,
        {
            "an error of v": loss(lambda x0, t, noise: x0, weights=1 / (1 - ABAR)),
            "an error of the flow, eps - x_0": loss(lambda x0, t, noise: x0, weights=FLOW_TIMES**-2),
        },
    ),
    (
        testing.assert_loss,
        EPS,
        {
            "the target is v": loss(velocity),
            "a sum over the numbers of a sample, as Ho et al. write it, not a mean": lambda *given: (
                given[1][0].size * loss()(*given)
            ),
            "half of it": loss(end=lambda each, w: np.mean(each / 2)),
            "the root of it": lambda *given: loss()(*given) ** 0.5,
            "the root of the batch's mean": loss(end=lambda each, w: np.mean(each) ** 0.5),
            "Min-SNR weights with gamma 5, which min_snr_gamma=5 expects": loss(weights=MIN_SNR / SNR),
            "the weights of P2 with k = 1 and gamma = 1, 1 / (1 + snr)": loss(weights=1 - ABAR),
            "the weights of a debiased estimate, 1 / sqrt(snr) with snr at most 1000": loss(
                weights=np.maximum(S / A, 1e-3**0.5)
            ),
            "the absolute difference, not its square": loss(size=np.abs, end=lambda each, w: np.mean(each)),
            "Huber's loss, half the square up to 1 and then linear": loss(size=partial(huber, 1.0)),
            "a sum over the last axis, not a mean": lambda *given: given[1].shape[-1] * loss()(*given),
            "a sum over the batch or over the last axis, not a mean": loss(
                end=lambda each, w: np.mean(np.sum(each, axis=-1))
            ),
            "a sum over all numbers of the batch, not a mean": loss(end=lambda each, w: np.sum(each)),
            "an error of x_0": of_estimates(of_eps, lambda x0, noise: x0),
            "an error of v": loss(weights=1 / ABAR),
        },
    ),
    (
        partial(testing.assert_loss, min_snr_gamma=5.0),
        V,
        {
            "no weights": loss(velocity),
            "the weights of an error of x_0": loss(velocity, weights=MIN_SNR),
            "the weights of an error of eps (E.19)": loss(velocity, weights=MIN_SNR / SNR),
            "the weights of an error of eps, and 1 more (E.19)": loss(velocity, weights=MIN_SNR / SNR + 1),
            "min(snr + 1, gamma) / (snr + 1) (E.19)": loss(
                velocity, weights=np.minimum(SNR + 1, 5.0) / (SNR + 1)
            ),
            "snr as it is, not at most gamma": loss(velocity, weights=SNR / (SNR + 1)),
            "gamma, where it should be the smaller of snr and gamma": loss(velocity, weights=5 / (SNR + 1)),
            "the square of snr": loss(velocity, weights=np.minimum(SNR**2, 5.0) / (SNR**2 + 1)),
            "the weights, squared": loss(velocity, weights=(MIN_SNR / (SNR + 1)) ** 2),
            "the weights of t - 1": loss(velocity, weights=late(MIN_SNR / (SNR + 1), -1)),
            "the weights of t + 1": loss(velocity, weights=late(MIN_SNR / (SNR + 1), 1)),
            "1 / snr for snr": loss(velocity, weights=np.minimum(1 / SNR, 5.0) / (1 / SNR + 1)),
            "the mean of the batch, times the weights; or their (N,) times (N, 1, ...) (E.20)": loss(
                velocity, weights=MIN_SNR / (SNR + 1), end=lambda each, w: np.mean(np.mean(each) * w)
            ),
            "the weights, divided by their mean in the batch": loss(
                velocity,
                weights=MIN_SNR / (SNR + 1),
                end=lambda each, w: np.mean(w / np.mean(w) * np.mean(each, axis=(1, 2, 3))),
            ),
            "weights (N,) that spread along the last axis (E.20)": loss(
                velocity, weights=MIN_SNR / (SNR + 1), end=lambda each, w: np.mean(each * w)
            ),
        },
    ),
    (
        partial(testing.assert_loss, min_snr_gamma=5.0),
        EPS,
        {
            "the weights of an error of v": loss(weights=MIN_SNR / (SNR + 1)),
            "the weights of an error of the flow, eps - x_0": loss(weights=MIN_SNR * FLOW_TIMES**2),
            "snr gamma / (snr + gamma), soft Min-SNR": loss(weights=1 / (1 / 5 + 1 / SNR) / SNR),
            "the larger of snr and gamma, not the smaller (E.19)": loss(weights=np.maximum(SNR, 5.0) / SNR),
            "the root of snr, a ratio of rates": loss(weights=np.minimum(A / S, 5.0) * S / A),
        },
    ),
    (
        partial(testing.assert_loss, min_snr_gamma=5.0),
        td.GaussianDiffusion(TO_NOISE),
        {"0 / 0 where snr is 0, of min(snr, gamma) / snr": weighed_by_a_quotient},
    ),
    (
        testing.assert_loss,
        LEARNED_EPS,
        {"nu, the second half of the output, for the prediction": of_the_other_half},
    ),
    (
        testing.assert_hybrid_gradient,
        LEARNED_EPS,
        {
            "the mean learns from L_vlb too: its gradient is not stopped (E.31)": hybrid(mean=lambda t: 1.0),
            "at t = 0 the mean learns from L_vlb too: its gradient is stopped only beyond (E.31)": hybrid(
                mean=lambda t: t == 0
            ),
            "nu learns nothing: its gradient is stopped as well, or L_vlb is left out": hybrid(nu=0.0),
            "the mean learns from L_vlb, and nu does not: the other half is stopped (E.31)": hybrid(
                mean=lambda t: 1.0, nu=0.0
            ),
            "the prediction learns nothing: L_simple is left out": hybrid(simple=0.0),
            "L_vlb alone, in both halves": hybrid(simple=0.0, mean=lambda t: 1.0),
            "nu, from -1 to 1, is taken for f, from 0 to 1": hybrid(f=lambda v: v, slope=1.0),
            "the ends of nu's range are exchanged: beta~ at 1, beta at -1": hybrid(
                f=lambda v: (1 - v) / 2, slope=-0.5
            ),
            "the estimate of x_0 is clipped in L_vlb": hybrid(guess=clipped),
            "the two halves of the output are exchanged": lambda x0, t, noise, output: np.roll(
                hybrid()(x0, t, noise, np.roll(output, x0.shape[-1], axis=-1)), x0.shape[-1], axis=-1
            ),
            "lambda is 1": hybrid(weight=times_lambda(1000)),
            "lambda counts one term, not the sum over T, as in LearnedGaussianDiffusion": hybrid(
                weight=times_lambda(1 / 200)
            ),
            "L_vlb is in nats for each number, not in bits": hybrid(weight=lambda D: 1e-3 * 200 / D),
            "L_vlb is in bits for a sample, not for each number": hybrid(
                weight=lambda D: 1e-3 * 200 / np.log(2)
            ),
            "L_vlb is in nats for a sample, and lambda counts one term": hybrid(weight=lambda D: 1e-3),
            BY_TANH: hybrid(nll=nll_of_levels),
            "a sum over the batch, not a mean": hybrid(whole=lambda N, D: N),
            "a sum over all numbers of the batch, not a mean": hybrid(whole=lambda N, D: N * D),
            "minus the gradient": hybrid(whole=lambda N, D: -1),
        },
    ),
    (
        testing.assert_guided,
        EPS,
        {
            **moved(guidance(), 2),
            "1 + w in the place of w, which is another convention, that of Ho & Salimans": guidance(
                partial(of_both, w=3)
            ),
            "w - 1 in the place of w": guidance(partial(of_both, w=1)),
            "the two predictions exchanged": guidance(lambda told, none: of_both(none, told)),
            "w times the difference alone, without f(x)": guidance(lambda told, none: 3 * (told - none)),
            "f(x) + w f(x, y), not the difference": guidance(lambda told, none: none + 3 * told),
            "f(x, y) alone: no guidance, or the network is told the class in both predictions (E.27)": (
                guidance(ask=lambda network, x, t, y: (network(x, t, y), network(x, t, y)))
            ),
            "f(x) alone: the network is told no class in either prediction": (
                lambda network, x, t, labels: network(x, t)
            ),
            "no class is told as class 0, which is one": guidance(
                ask=lambda network, x, t, y: (network(x, t, y), network(x, t, np.zeros_like(y)))
            ),
            "no class is told as the last class, which is one": guidance(
                ask=lambda network, x, t, y: (network(x, t, y=y), network(x, t, y=np.full_like(y, 9)))
            ),
            "f(x) is not shown x_t, but zeros (E.27)": guidance(
                ask=lambda network, x, t, y: (network(x, t, class_labels=y), network(np.zeros_like(x), t))
            ),
            "x twice, end to end, and the labels by turns, no class first": guidance(ask=by_turns),
            "x twice, end to end, and the labels by turns, the class first": guidance(
                ask=partial(by_turns, first="class")
            ),
            "rescaled to the deviation of f(x, y) (Lin et al. 2023)": guidance(rescaled_guidance(1.0)),
            "rescaled by 0.7 to the deviation of f(x, y) (Lin et al. 2023)": guidance(rescaled_guidance(0.7)),
            "the guided prediction is clipped": guidance(lambda *both: np.clip(of_both(*both), -1, 1)),
            "only the first three channels are guided, as DiT's forward_with_cfg does and says": guidance(
                lambda told, none: np.where(np.arange(told.shape[-1]) < 3, of_both(told, none), told)
            ),
        },
    ),
    (testing.assert_guided, TO_400, {"the network is shown t in bfloat16 (E.14)": guided_in_bfloat16}),
    (
        testing.assert_guided,
        LEARNED_V,
        {
            "nu is guided as well": guidance(nu=of_both),
            "nu is that of f(x)": guidance(nu=lambda told, none: none),
        },
    ),
    (
        testing.assert_bound_terms,
        LARGE,
        {
            "the divergence the other way round, KL(p || q)": bound_terms(lambda d, q, p: kl(d, p, q)),
            "the squares alone, of the divergence": bound_terms(lambda d, q, p: d**2 / (2 * p)),
            "the variance is fixed_small, beta~_t": bound_terms(variance=LOW),
        },
    ),
    (
        testing.assert_bound_terms,
        EPS,
        {
            **moved(bound_terms(variance=LOW), 2),
            "a mean over the numbers of a sample, not a sum": times_ours(1 / 40),
            "bits, not nats": times_ours(1 / np.log(2)),
            "bits for each number, not nats": times_ours(1 / np.log(2) / 40),
            "the sign": times_ours(-1),
            "half of each term": times_ours(1 / 2),
            "twice each term": times_ours(2),
            "T times each term": times_ours(200),
            "T - 1 times each term": times_ours(199),
            "a divergence at t = 0, not a likelihood": bound_terms(
                nll=lambda x, mean, p: kl(x - mean, SMALL[1], p), variance=LOW
            ),
            "the estimate of x_0 is clipped": bound_terms(variance=LOW, estimate=clipped),
            "the variance is fixed_large, beta_t": bound_terms(),
            TIMES_WIDTH: bound_terms(nll=times_width, variance=LOW),
            "the probability of a level, not a density; decoder='8bit' expects it": bound_terms(
                nll=partial(nll_of_levels, cdf=ndtr), variance=LOW
            ),
        },
    ),
    (
        testing.assert_bound_terms,
        LEARNED_EPS,
        {what: bound_terms(learned=variance) for what, variance in LEARNED_VARIANCES.items()},
    ),
    (
        partial(testing.assert_bound_terms, decoder="8bit"),
        EPS,
        {
            BY_TANH: bound_terms(nll=nll_of_levels, variance=LOW),
            "1/256 on both sides of a level, not 1/255": of_exact_levels(half=1 / 256),
            "1/127.5 on both sides of a level, not 1/255": of_exact_levels(half=2 / 255),
            "levels 0 and 255 closed at the outer end, like the others": of_exact_levels(closed=(-1, 1)),
            "a density, not the probability of a level; decoder='density' expects it": bound_terms(
                variance=LOW
            ),
        },
    ),
    (
        partial(testing.assert_bound_terms, decoder="8bit"),
        LARGE,
        {
            TIMES_WIDTH: bound_terms(nll=times_width),
            BY_TANH: bound_terms(nll=nll_of_levels, variance=LARGE_OF_PAPERS),
        },
    ),
    (
        partial(testing.assert_bound_terms, decoder="8bit"),
        X0,  # whose estimate is anywhere, and most levels less likely than 1e-12
        {BY_TANH: bound_terms(nll=nll_of_levels, variance=LOW, estimate=lambda x_t, t, x0: x0)},
    ),
]


# Tables of a schedule


def of_betas(betas):
    return np.cumprod(1 - betas)


def squared_cosine(u, power=2, s=0.008):
    """Nichol & Dhariwal 2021, eq. 17."""
    return np.cos((u + s) / (1 + s) * np.pi / 2) ** power


def cosine_betas(T, power=2, s=0.008, cap=0.999):
    """`betas_for_alpha_bar` of the papers' code."""
    f = [squared_cosine(i / T, power, s) for i in range(T + 1)]
    return np.array([min(1 - f[i + 1] / f[i], cap) for i in range(T)])


def rescaled(schedule):
    """Lin et al. 2023, algorithm 1."""
    r = np.sqrt(schedule.alphas_cumprod)
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])) ** 2


def of_share(r):
    """Liu, Gong & Liu 2023: (1 - r) x_0 + r eps, scaled to unit variance."""
    return (1 - r) ** 2 / ((1 - r) ** 2 + r**2)


LONG_COSINE = td.cosine_schedule(1000)
RISING = np.arange(1, 51) / 50
TABLES = [
    (
        COSINE,
        {
            "the cosine schedule without its square (E.1)": of_betas(cosine_betas(50, power=1)),
            "the cosine schedule without its offset s": of_betas(cosine_betas(50, s=0.0)),
            "the cosine at T points for T + 1 (E.2)": (
                squared_cosine(np.linspace(0, 1, 50)) / squared_cosine(0.0)
            ),
            "the cosine at T points for T + 1, not divided by the first (E.2)": squared_cosine(
                np.linspace(0, 1, 50)
            ),
            "the linear schedule, its betas times 1000 / T": of_betas(np.linspace(0.002, 0.4, 50)),
            "flow matching's schedule, r = (t + 1) / T": of_share(RISING),
            "alphas_cumprod a step late, from 1 on": np.append(1.0, COSINE.alphas_cumprod[:-1]),
            "alphas_cumprod from its end to its beginning": COSINE.alphas_cumprod[::-1],
        },
    ),
    (
        td.flow_schedule(50),
        {
            "flow matching's schedule, r = linspace(0, 1, T)": of_share(np.linspace(0, 1, 50)),
            "flow matching's schedule with a shift of 3": of_share(3 * RISING / (1 + 2 * RISING)),
        },
    ),
    (
        td.flow_schedule(50, shift=3),
        {"flow matching's schedule with a shift of 3, made twice": of_share(9 * RISING / (1 + 8 * RISING))},
    ),
    (
        LONG_COSINE,
        {
            "the cosine schedule with betas up to 0.9999": of_betas(cosine_betas(1000, cap=0.9999)),
            "the cosine schedule with betas from 1e-4 to 0.9999": of_betas(
                np.maximum(cosine_betas(1000, cap=0.9999), 1e-4)
            ),
            "the cosine schedule with betas from 1e-4 to 0.02, the ends of the linear one (E.4)": of_betas(
                np.clip(cosine_betas(1000), 1e-4, 0.02)
            ),
            "the cosine schedule without a cap on its betas": (
                squared_cosine(np.arange(1, 1001) / 1000) / squared_cosine(0.0)
            ),
        },
    ),
    (
        LINEAR,
        {
            "the cosine schedule": of_betas(cosine_betas(200)),
            "linear betas from 1e-4 to 0.02, whatever T is (E.4)": of_betas(
                np.linspace(1e-4, 0.02, 200, dtype=np.float32)
            ),
            "linear betas from 8.5e-4 to 0.012": of_betas(np.linspace(0.00085, 0.012, 200)),
            "betas even in their root, 8.5e-4 to 0.012 ('scaled_linear')": of_betas(
                np.linspace(0.00085**0.5, 0.012**0.5, 200) ** 2
            ),
            "betas even in their root, 1e-4 to 0.02": of_betas(np.linspace(1e-4**0.5, 0.02**0.5, 200) ** 2),
            "rescaled to end in noise (Lin et al. 2023)": rescaled(LINEAR),
            "betas from the last to the first": of_betas(BETAS[::-1]),
            "the betas multiplied up, not the alphas": np.cumprod(BETAS),
            "the root of alphas_cumprod, a rate": A,
            "the square of alphas_cumprod": ABAR * ABAR,
            "1 - alphas_cumprod": 1 - ABAR,
            "alphas, not multiplied up": 1 - BETAS,
            "betas": BETAS,
        },
    ),
    (
        td.linear_schedule(4000),
        {
            "linear betas of linspace(..., T, endpoint=False)": of_betas(
                np.linspace(2.5e-5, 0.005, 4000, endpoint=False)
            ),
            "linear betas of linspace(..., T + 1), without the first": of_betas(
                np.linspace(2.5e-5, 0.005, 4001)[1:]
            ),
            "linear betas at T + 1 points, the first of which is in all abar_t, but is no step (E.26)": (
                of_betas(np.linspace(2.5e-5, 0.005, 4001))[1:]
            ),
        },
    ),
    (
        td.linear_schedule(50, 1e-4, 0.02),
        {"1 minus the sum of the betas": 1 - np.cumsum(np.linspace(1e-4, 0.02, 50))},
    ),
]


# Samplers


class Noise:
    """What is drawn, in the place of a generator."""

    def __init__(self, draw):
        self.standard_normal = lambda shape, dtype=None: draw()


def ours(name, process, shown=lambda t, tau: t, **options):
    """tinydiff's sampler, as a checker would hand over theirs; `shown` may show the network another time."""

    def sampler(denoise, x_T, tau, noise):
        return td.sample(
            lambda x, t: denoise(x, shown(t, tau)),
            process,
            x_T.shape,
            name,
            **{"steps": tau, "rng": Noise(noise), "x_T": x_T, "progress": False, **options},
        )

    return sampler


def every_second_call():
    calls = []

    def shown(t, tau):
        calls.append(t)
        return t if len(calls) % 2 else calls[-2]

    return shown


def ancestral(mean=eq_11, deviation=lambda beta, small: np.sqrt(beta), learned=None, mistake=""):
    """Ho et al. 2020, algorithm 2, with fixed_large; or with what a network says of the variance."""

    def sampler(denoise, x, tau, noise):
        abar = np.cumprod(1 - BETAS[tau]) if mistake == "betas[tau]" else ABAR[tau]
        before = np.append(1.0, abar[:-1])
        beta = 1 - abar / before
        small = beta * (1 - before) / (1 - abar)
        last = int(mistake == "range(1, T)")
        for i in reversed(range(last, len(tau))):
            output = denoise(x, int(tau[i]) + (mistake == "shown 1 … T"))
            eps, nu = np.split(output, 2, axis=-1) if learned else (output, None)
            high = BETAS[tau[i]] if mistake == "long" else beta[i]
            sd = np.sqrt(learned(nu, small[max(i, 1)], high)) if learned else deviation(high, small[i])
            x = mean(x, eps, beta[i], abar[i])
            fresh = (lambda eps=eps: eps) if mistake == "eps again" else noise
            x = x + (sd * fresh() if i > (last or mistake == "i > 1") or mistake == "at the end" else 0.0)
            x = np.clip(x, -1, 1) if mistake == "clipped" else x
        return x

    return sampler


def ddim(mistake="", eta=0.0, sigma=None, of_x0=lambda a2, b2: np.sqrt(b2), of_eps=None):
    """Song, Meng & Ermon 2021, eq. 12 and 16, from abar a2 to b2."""

    def sampler(denoise, x, tau, noise):
        if mistake == "leading":
            tau = np.arange(len(tau)) * (LINEAR.T // len(tau))
        for i in reversed(range(len(tau))):
            eps = denoise(x, np.full(len(x), tau[i]))
            after = tau[i - 1] if i else -1
            others = {"computed": tau[i] - LINEAR.T // len(tau), "t - 1": tau[i] - 1, "too far": after - 1}
            after = others.get(mistake, after)
            a2, b2 = ABAR[tau[i]], ABAR[after] if after >= 0 else 1.0
            if i == 0 and mistake == "from the end of T":
                b2 = ABAR[tau[i] - (tau[1] - tau[0])]
            if i == 0 and mistake == "from the end of T + 1":
                b2 = np.append(1.0, ABAR)[tau[i] + 1 - (tau[1] - tau[0])]
            if i == 0 and mistake == "not to 1":
                b2 = ABAR[0]
            small = (1 - b2) / (1 - a2) * (1 - a2 / b2)
            sd = sigma(small, tau[i]) if sigma else eta and eta * np.sqrt(small)
            x0 = (x - np.sqrt(1 - a2) * eps) / np.sqrt(a2)
            x0 = np.clip(x0, -1, 1) if mistake in ("clipped x_0", "clipped state") else x0
            if mistake == "clipped state":
                eps = (x - np.sqrt(a2) * x0) / np.sqrt(1 - a2)
            rest = of_eps(a2, b2, sd) if of_eps else np.sqrt(1 - b2 - sd**2)
            x = of_x0(a2, b2) * x0 + rest * eps + (sd * noise() if sd else 0.0)
            x = np.clip(x, -1, 1) if mistake == "clipped state" else x
        return x

    return sampler


def dpm_solver(weight=lambda h, h_before: h / h_before / 2):
    """Lu et al. 2022, DPM-Solver++ 2M; its first step, and that to the data, are of first order."""

    def sampler(denoise, x, tau, noise):
        x0_before, h_before = None, None
        for i in reversed(range(len(tau))):
            a, s = np.sqrt(ABAR[tau[i]]), np.sqrt(1 - ABAR[tau[i]])
            x0 = (x - s * denoise(x, tau[i])) / a
            if i == 0:
                return x0
            a_after, s_after = np.sqrt(ABAR[tau[i - 1]]), np.sqrt(1 - ABAR[tau[i - 1]])
            h = np.log(a_after / s_after) - np.log(a / s)
            D = x0 + weight(h, h_before) * (x0 - x0_before) if h_before else x0
            x = s_after / s * x - a_after * np.expm1(-h) * D
            x0_before, h_before = x0, h

    return sampler


def corrected_as_it_comes(to_eps):
    """A second-order step of two answers of a network, of which only then an eps is made."""

    def sampler(denoise, x, tau, noise):
        before, h_before = None, None
        for i in reversed(range(len(tau))):
            a, s = A[tau[i]], S[tau[i]]
            said = denoise(x, tau[i])
            if i == 0:
                return (x - s * to_eps(x, said, a, s)) / a
            h = np.log(A[tau[i - 1]] / S[tau[i - 1]]) - np.log(a / s)
            corrected = said + h / h_before / 2 * (said - before) if h_before else said
            x = A[tau[i - 1]] / a * x - S[tau[i - 1]] * np.expm1(h) * to_eps(x, corrected, a, s)
            before, h_before = said, h

    return sampler


def root(sigma):
    return np.sqrt(1 + sigma**2)


def karras(first=0.5, second=0.5, ahead=True, over=None, start=root, shown=root, sigmas=None):
    """Karras et al. 2022, algorithm 1: x = x_0 + sigma eps, and Euler's rule in the last step.

    The network says eps; D, if the sigmas are given.
    """

    def sampler(denoise, x, tau, noise):
        sigma = np.sqrt((1 - ABAR[tau]) / ABAR[tau]) if sigmas is None else sigmas[tau]

        def slope(x, i):  # (x - D) / sigma, which is eps
            said = denoise(x / shown(sigma[i]), tau[i])
            return said if sigmas is None else (x - said) / sigma[i]

        x = x * start(sigma[-1])
        for i in reversed(range(1, len(tau))):
            h, d = sigma[i - 1] - sigma[i], slope(x, i)
            there = x + h * d if ahead else x
            data = there - sigma[i - 1] * slope(there, i - 1)
            x = x + h * (first * d + second * (there - data) / sigma[i if over == "now" else i - 1])
        return x - sigma[0] * slope(x, 0)

    return sampler


def rotations(first=0.5, second=0.5, ahead="ddim", turned=False):
    """Heun's rule for dx/dphi = v, x = cos(phi) x_0 + sin(phi) eps; ddim turns x by the angle between."""

    def sampler(denoise, x, tau, noise):
        phi = np.arccos(np.sqrt(ABAR[tau]))
        for i in reversed(range(1, len(tau))):
            h, v = phi[i - 1] - phi[i], denoise(x, tau[i])
            there = {"ddim": np.cos(h) * x + np.sin(h) * v, "Euler": x + h * v, "here": x}[ahead]
            v = first * v + second * denoise(there, tau[i - 1])
            x = np.cos(h) * x + np.sin(h) * v if turned else x + h * v
        return np.cos(phi[0]) * x - np.sin(phi[0]) * denoise(x, tau[0])

    return sampler


def straight(scaled=True, sign=1):
    """Euler's rule for flow matching, z = (1 - r) x_0 + r eps, of which the network sees z / |(1 - r, r)|."""

    def sampler(denoise, x, tau, noise):
        times = np.append(FLOW_TIMES[tau][::-1], 0.0)
        size = np.sqrt((1 - times) ** 2 + times**2)
        z = size[0] * x
        for t, now, after, norm in zip(tau[::-1], times, times[1:], size):
            z = z + sign * (after - now) * denoise(z / norm if scaled else z, t)
        return z

    return sampler


def drawn(end):
    """Samples that were made pictures."""
    return lambda *given: end(ours("ddim", V)(*given))


def but_for_the_last_step(denoise, x, tau, noise):
    states = td.iterate_samples(denoise, V, x.shape, "ddpm", tau, rng=Noise(noise), x_T=x)
    return list(states)[-2].x


def one_noise(denoise, x, tau, noise):
    z = noise()
    return ours("ddpm", V, rng=Noise(lambda: z))(denoise, x, tau, noise)


def whole_step_of_the_long_chain(denoise, x, tau, noise):
    for t in tau[::-1]:
        mean, variance = reverse_step()(x, np.array([t]), denoise(x, t))
        x = mean + (np.sqrt(variance) * noise() if t else 0.0)
    return x


def last_step_of_the_long_chain(denoise, x, tau, noise):
    states = td.iterate_samples(denoise, LARGE, x.shape, "ddpm", tau, rng=Noise(noise), x_T=x)
    x = next(state.x for state in states if state.steps_left == 1)
    return reverse_step()(x, tau[:1], denoise(x, tau[0]))[0]


def nu_first(denoise, x, tau, noise):
    def network(x, t):
        return np.concat(np.split(denoise(x, t), 2, axis=-1)[::-1], axis=-1)

    return ours("ddpm", LEARNED_V)(network, x, tau, noise)


def rounded_to_bfloat16(t, tau=None):
    """Eight bits, the first of which is 1: of times below 1024."""
    step = np.where(t < 256, 1, np.where(t < 512, 2, 4))
    return (step * np.round(t / step)).astype(int)


LONG_V = td.GaussianDiffusion(td.linear_schedule(), "v")
SIGMAS = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18) ** 7  # Karras et al. 2022, eq. 5
LEVELS = 1 / (1 + SIGMAS**2)
KARRAS = td.GaussianDiffusion(td.NoiseSchedule(1 - LEVELS / np.append(1, LEVELS[:-1])), "x0")
HALF = dict(eta=0.5)
STARTS_AS_EDM = (
    "it starts from sigma_T x_T, and not from sqrt(1 + sigma_T^2) x_T; the first is another convention, EDM's"
)
OF_OUTPUTS = "the correction of the output, not of x_0 (E.22; where that is eps, DPM-Solver without ++)"
WALKS = [
    (
        LARGE,
        "ddpm",
        {},
        {
            "noise at the last step (E.9)": ancestral(mistake="at the end"),
            "no noise in the last two steps": ancestral(mistake="i > 1"),
            "one noise for all of the batch": lambda denoise, x, tau, noise: ancestral()(
                denoise, x, tau, lambda: noise(x[:1])
            ),
            "the last step is left out, and the one before it adds no noise": ancestral(
                mistake="range(1, T)"
            ),
            "the variance as a standard deviation (E.10)": ancestral(deviation=lambda beta, small: beta),
            "the fourth root of the variance as a standard deviation": ancestral(
                deviation=lambda beta, small: beta**0.25
            ),
            "no noise": ancestral(deviation=lambda beta, small: 0.0),
            "the noise that the network predicts, and not fresh noise": ancestral(mistake="eps again"),
            "the variance of the long chain (E.8)": ancestral(mistake="long"),
            "the whole step of the long chain (E.8)": whole_step_of_the_long_chain,
            "a chain of betas[timesteps], without the betas between them (E.8)": ancestral(
                mistake="betas[tau]"
            ),
            "the state clipped after each step": ancestral(mistake="clipped"),
            "the variance fixed_small": ancestral(deviation=lambda beta, small: np.sqrt(small)),
            **{what: ancestral(mean) for what, mean in MEANS.items()},
        },
    ),
    (
        LARGE,
        "ddpm",
        dict(steps=[9, 50, 120, 199]),
        {
            "the last step is that of the long chain, which does not lead to the data (E.26)": (
                last_step_of_the_long_chain
            )
        },
    ),
    (
        EPS,
        "ddpm",
        {},
        {"the variance fixed_large": ancestral()},
    ),
    (
        LEARNED_EPS,
        "ddpm",
        {},
        {
            **{what: ancestral(learned=variance) for what, variance in LEARNED_VARIANCES.items()},
            "beta_t of the long chain as the upper end of the variance (E.8)": ancestral(
                learned=right_variance, mistake="long"
            ),
        },
    ),
    (LEARNED_V, "ddpm", {}, {"nu comes first, the prediction after it": nu_first}),
    (
        V,
        "ddpm",
        {},
        {
            "the last step is left out, or leads to abar of the first time": but_for_the_last_step,
            "the same noise in every step": one_noise,
        },
    ),
    (
        EPS,
        "ddim",
        HALF,
        {
            "sigma_t^2 of the long chain (E.8)": ddim(
                sigma=lambda small, t: 0.5 * np.sqrt(SMALL[t]),
                of_eps=lambda a2, b2, sd: np.sqrt(max(1 - b2 - sd**2, 0)),
            ),
            "eta for eta^2 in sigma_t^2": ddim(sigma=lambda small, t: np.sqrt(0.5 * small)),
            "sigma_t^2 not taken out of what stands in front of eps": ddim(
                **HALF, of_eps=lambda a2, b2, sd: np.sqrt(1 - b2)
            ),
            "sigma_t, not its square, taken out under the root": ddim(
                **HALF, of_eps=lambda a2, b2, sd: np.sqrt(max(1 - b2 - sd, 0))
            ),
            "sigma_t taken out beside the root": ddim(**HALF, of_eps=lambda a2, b2, sd: np.sqrt(1 - b2) - sd),
            "eta^2 (1 - abar) of now for sigma_t^2": ddim(
                sigma=lambda small, t: 0.5 * np.sqrt(1 - ABAR[t]),
                of_eps=lambda a2, b2, sd: np.sqrt(max(1 - b2 - sd**2, 0)),
            ),
            "sigma_t is 0": ddim(),
            "1 - abar of now, not of the next state, in front of eps": ddim(
                **HALF, of_eps=lambda a2, b2, sd: np.sqrt(1 - a2 - sd**2)
            ),
            "1 - abar in front of eps, without its root": ddim(
                **HALF, of_eps=lambda a2, b2, sd: 1 - b2 - sd**2
            ),
            "the next time computed, t - T / S, and not looked up (E.16)": ddim("computed", **HALF),
            "the next state is that of t - 1": ddim("t - 1", **HALF),
            "the next state is a step too far, abar_{t-1} at its t": ddim("too far", **HALF),
            "sigma_t in front of eps, not the root of 1 - abar - sigma_t^2": ddim(
                **HALF, of_eps=lambda a2, b2, sd: sd
            ),
            "eps left out": ddim(**HALF, of_eps=lambda a2, b2, sd: 0),
            "eps subtracted": ddim(**HALF, of_eps=lambda a2, b2, sd: -np.sqrt(1 - b2 - sd**2)),
        },
    ),
    (
        EPS,
        "ddim",
        {},
        {
            "x_0 is clipped, and eps is of the one that is not, which is diffusers' default": ddim(
                "clipped x_0"
            ),
            "1 - sqrt(abar) in front of eps": ddim(of_eps=lambda a2, b2, sd: 1 - np.sqrt(b2)),
            "sqrt(abar) of now, not of the next state, in front of x_0": ddim(
                of_x0=lambda a2, b2: np.sqrt(a2)
            ),
            "abar in front of x_0, without its root": ddim(of_x0=lambda a2, b2: b2),
            "the last step leads to a time below 0, an index from the end of T entries (E.16)": ddim(
                "from the end of T"
            ),
            "the last step leads to a time below 0, an index from the end of T + 1 entries (E.16)": ddim(
                "from the end of T + 1"
            ),
            "steps 0, r, 2 r, ... that leave out the last, T - 1 (E.3)": ddim("leading"),
        },
    ),
    (LARGE, "ddim", HALF, {"eta is 1": ddim(eta=1.0), "the sampler is ddpm": ancestral()}),
    (
        EPS,
        "ddim",
        dict(steps=[9, 50, 120, 199], eta=0.5),
        {"the last step leads to abar of t = 0, not to 1, the data": ddim("not to 1", eta=0.5)},
    ),
    (
        EPS,
        "ddim",
        dict(clip=True),
        {
            "eps of an x_0 that is not clipped (diffusers, unless use_clipped_model_output=True)": ddim(
                "clipped x_0"
            ),
            "the state clipped after each step": ddim("clipped state"),
            "the estimate of x_0 is not clipped": ddim(),
        },
    ),
    (
        V,
        "ddim",
        {},
        {
            "the network is shown t + 1 (E.13)": ours("ddim", V, lambda t, tau: np.minimum(t + 1, 199)),
            "the network is shown t - 1": ours("ddim", V, lambda t, tau: np.maximum(t - 1, 0)),
            "the network is shown T - 1 - t": ours("ddim", V, lambda t, tau: 199 - t),
            "the network is shown the number of the step, not its t": ours(
                "ddim", V, lambda t, tau: np.searchsorted(tau, t)
            ),
            "the estimate of x_0 is clipped": ours("ddim", V, clip=True),
            "the output is taken for eps": ours("ddim", EPS),
            "the output is taken for x_0": ours("ddim", X0),
            "the output is taken for the flow, eps - x_0": ours("ddim", FLOW),
            "steps ..., T - 1 - r, T - 1 that leave out the first, 0": ours(
                "ddim", V, steps=199 - 28 * np.arange(7)[::-1]
            ),
            "the first step is left out, or x_T is shown at the next time, not its own (E.21)": (
                lambda denoise, x, tau, z: ours("ddim", V)(denoise, x, tau[:-1], z)
            ),
            "the network is shown t = 0 at each step, as of a rate that is made an integer": ours(
                "ddim", V, lambda t, tau: (A[t] * 0.99).astype(int)
            ),
            "the samples are clipped at the end, as pictures are": drawn(lambda x: np.clip(x, -1, 1)),
            "(x + 1) / 2 of the samples, as pictures are": drawn(lambda x: 0.5 * x + 0.5),
            "(x + 1) / 2 of the samples, clipped, as pictures are": drawn(
                lambda x: np.clip(0.5 * x + 0.5, 0, 1)
            ),
            "the sampler is dpm++": ours("dpm++", V),
            "the sampler is heun": ours("heun", V),
            "the sampler is edm": ours("edm", V),
        },
    ),
    (
        LONG_V,
        "ddim",
        dict(steps=[1, 101, 337, 555, 777, 937]),
        {"the network is shown t in bfloat16 (E.14)": ours("ddim", LONG_V, rounded_to_bfloat16)},
    ),
    (
        EPS,
        "dpm++",
        {},
        {
            "the output is taken for v": ours("dpm++", V),
            "the sampler is ddim": ours("ddim", EPS),
            "h_before / h in the correction, not h / h_before": dpm_solver(lambda h, before: before / h / 2),
            "the correction without its half": dpm_solver(lambda h, before: h / before),
            "the correction as if all steps were equal": dpm_solver(lambda h, before: 0.5),
            "the correction's sign": dpm_solver(lambda h, before: -h / before / 2),
            OF_OUTPUTS: corrected_as_it_comes(lambda x, eps, a, s: eps),
            "the correction integrated exactly, diffusers' solver_type='heun', which is another rule": (
                dpm_solver(lambda h, before: (1 - (1 - np.exp(-h)) / h) / (1 - np.exp(-h)) * h / before)
            ),
        },
    ),
    (
        FLOW,
        "ddim",
        {},
        {
            "the network is shown x / (a + s), flow matching's state": straight(scaled=False),
            TAKEN_TO_DATA: straight(sign=-1),
        },
    ),
    (V, "dpm++", {}, {OF_OUTPUTS: corrected_as_it_comes(lambda x, v, a, s: a * v + s * x)}),
    (
        V,
        "edm",
        {},
        {
            "the second call of a step is shown the time of the first": ours("edm", V, every_second_call()),
            "the mean of both outputs, not of both slopes (E.22)": rotations(turned=True),
        },
    ),
    (
        EPS,
        "edm",
        dict(steps=[9, 50, 120, 150]),
        {
            "the network is shown x / a, a state that is not scaled down": karras(shown=lambda sigma: 1.0),
            STARTS_AS_EDM: karras(start=lambda sigma: sigma),
            "it starts from x_T as it is, and not from sqrt(1 + sigma_T^2) x_T": karras(
                start=lambda sigma: 1.0
            ),
        },
    ),
    (
        KARRAS,
        "edm",
        dict(steps=None),
        {STARTS_AS_EDM: karras(start=lambda sigma: sigma, sigmas=SIGMAS)},
    ),
    (
        EPS,
        "edm",
        {},
        {
            "the sampler is ddim": karras(1.0, 0.0),
            "the sum of both slopes, not their mean": karras(1.0, 1.0),
            "the second slope alone, not the mean of both": karras(0.0, 1.0),
            "the second call of a step is shown the state before it": karras(ahead=False),
            "the second slope over the sigma of the first": karras(over="now"),
        },
    ),
    (
        V,
        "heun",
        {},
        {
            "the sum of both slopes, not their mean": rotations(1.0, 1.0),
            "the second slope alone, not the mean of both": rotations(0.0, 1.0),
            "the second call of a step is shown the state before it": rotations(ahead="here"),
            "the second call of a step is shown where Euler's rule leads, not ddim": rotations(ahead="Euler"),
        },
    ),
]
