"""tinydiff.testing: what is right passes, and a mistake is called by its name."""

import inspect
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistakes import (
    ABAR,
    BETAS,
    COSINE,
    EPS,
    FLOW,
    FLOW_TIMES,
    KARRAS,
    LARGE,
    LARGE_OF_PAPERS,
    LEARNED_EPS,
    LEARNED_V,
    LINEAR,
    LOW,
    MIN_SNR,
    PLANTED,
    SIGMAS,
    SNR,
    TABLES,
    TAKEN_TO_DATA,
    TO_NOISE,
    WALKS,
    X0,
    A,
    S,
    V,
    ancestral,
    bound_terms,
    column,
    ddim,
    dpm_solver,
    flow_matching,
    guidance,
    hybrid,
    karras,
    learned_step,
    linear,
    loss,
    nll,
    nll_of_levels,
    of_eps,
    ours,
    posterior,
    posterior_with,
    refusal,
    reverse_step,
    right_variance,
    rotations,
    rounded_to_bfloat16,
    straight,
    terms_of,
    times_ours,
    velocity,
)
from scipy.special import ndtr

import tinydiff as td
from tinydiff import testing
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss
from tinydiff.samplers import SAMPLERS
from tinydiff.testing import _sampler, _schedule
from tinydiff.testing._judge import Claim, distance, named

SCHEDULES = {"linear": LINEAR, "cosine": COSINE, "to noise": TO_NOISE}
LEARNED = td.GaussianDiffusion(COSINE, "v", "learned_range")
PREDICTIONS, VARIANCES = ("eps", "x0", "v", "flow"), ("fixed_small", "fixed_large", "learned_range")
ROWS = [(*asked, *row) for *asked, rows in PLANTED for row in rows.items()]
STEPS = [(*asked, *row) for *asked, rows in WALKS for row in rows.items()]


# What is right passes


def simple_loss_of(process, gamma=None):
    def loss(network, x0, t, noise):
        weights = None if gamma is None else min_snr_weight(process, t, gamma)
        output = network(process.q_sample(x0, t, noise), t)
        return simple_loss(process, output, x0, t, noise, weights)[0]

    return loss


def hybrid_gradient_of(process, x0, t, noise, output, **how):
    return hybrid_loss(process, output, x0, t, noise, **how)[1]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_our_own_functions_pass(schedule, prediction, variance):
    process = td.GaussianDiffusion(schedule, prediction, variance)
    testing.assert_q_sample(process.q_sample, schedule)
    testing.assert_training_target(process.training_target, process)
    testing.assert_q_posterior(process.q_posterior_mean_variance, schedule)
    testing.assert_p_mean_variance(process.p_mean_variance, process)
    testing.assert_bound_terms(terms_of(process), process)
    testing.assert_p_mean_variance(
        lambda *given: process.p_mean_variance(*given, clip=True), process, clip=True, shape=(3, 5)
    )
    testing.assert_p_mean_variance(process.p_mean_variance, process, clip=np.False_, shape=(3, 5))
    testing.assert_bound_terms(terms_of(process, "8bit"), process, decoder="8bit")
    for gamma in (None, 5.0):
        testing.assert_loss(simple_loss_of(process, gamma), process, min_snr_gamma=gamma)
    if variance == "learned_range":
        for decoder in ("density", "8bit"):
            gradient = partial(hybrid_gradient_of, process, decoder=decoder)
            testing.assert_hybrid_gradient(gradient, process, decoder=decoder)
    testing.assert_predict_x0(td.GaussianDiffusion(schedule, prediction).predict_x0, process)
    testing.assert_schedule(schedule.alphas_cumprod, schedule)


def guided_of(process, w=3.0, num_classes=10):
    def guided(network, x, t, labels):
        told = lambda x, t, labels: network(x, t, class_labels=labels)  # noqa: E731
        return td.guided(told, process, labels, w, num_classes)(x, t)

    return guided


@pytest.mark.parametrize("w", [-2.0, 0.5, 3.0, 1e3])
@pytest.mark.parametrize("variance", VARIANCES)
def test_our_own_guidance_passes(variance, w):
    process = td.GaussianDiffusion(LINEAR, "v", variance)
    testing.assert_guided(guided_of(process, w), process, guidance_scale=w)
    options = dict(guidance_scale=w, num_classes=1, shape=(3, 5))
    testing.assert_guided(guided_of(process, w, 1), process, **options)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_our_own_samplers_pass(name, variance):
    process = td.GaussianDiffusion(LINEAR, "v", variance)
    testing.assert_sampler(ours(name, process), process, name, 20)
    testing.assert_sampler(
        ours(name, process, clip=True), process, name, [3, 10, 150], clip=True, shape=(5, 2)
    )
    testing.assert_sampler(ours("ddim", process, eta=0.5), process, "ddim", 20, eta=0.5)


@settings(max_examples=25)
@given(st.lists(st.floats(1e-4, 0.999), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_code_from_the_papers_passes_on_any_chain(betas, N, C):
    """Written without tinydiff's tables: Ho et al. 2020, eq. 4, 7 and 15, Nichol & Dhariwal 2021, eq. 15."""
    betas = np.array(betas)
    schedule = td.NoiseSchedule(betas)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    small = betas * (1 - before) / (1 - abar)

    def q_sample(x0, t, noise):
        return np.sqrt(abar)[t, None] * x0 + np.sqrt(1 - abar)[t, None] * noise

    def posterior(x0, x_t, t):
        of_x0 = np.sqrt(before) * betas / (1 - abar)
        of_x_t = np.sqrt(1 - betas) * (1 - before) / (1 - abar)
        return of_x0[t, None] * x0 + of_x_t[t, None] * x_t, small[t]  # the variance (N,) is enough

    def predict_x0(x_t, t, eps):
        return (x_t - np.sqrt(1 - abar)[t, None] * eps) / np.sqrt(abar)[t, None]

    def step(x_t, t, output):
        eps, f = output[:, :C], (output[:, C:] + 1) / 2
        mean, _ = posterior(predict_x0(x_t, t, eps), x_t, t)
        low = np.append(small[1:2] if len(betas) > 1 else betas, small[1:])
        return mean, betas[t, None] ** f * low[t, None] ** (1 - f)

    learned = td.GaussianDiffusion(schedule, "eps", "learned_range")
    options = dict(shape=(N, C), tolerance=1e-8)
    testing.assert_schedule(abar, schedule)
    testing.assert_q_sample(q_sample, schedule, **options)
    testing.assert_q_posterior(posterior, schedule, **options)
    testing.assert_predict_x0(predict_x0, learned, **options)
    testing.assert_p_mean_variance(step, learned, **options)


def test_what_is_right_in_float32_passes_or_is_told_from_a_mistake():
    schedule = td.linear_schedule(1000)
    betas = schedule.betas.astype(np.float32)
    abar = np.cumprod(1 - betas)
    before = np.append(np.float32(1), abar[:-1])

    def q_sample(x0, t, noise):
        return column(np.sqrt(abar[t])) * x0 + column(np.sqrt(1 - abar[t])) * noise

    def posterior(x0, x_t, t):
        of_x0, of_x_t = np.sqrt(before) * betas / (1 - abar), np.sqrt(1 - betas) * (1 - before) / (1 - abar)
        return column(of_x0[t]) * x0 + column(of_x_t[t]) * x_t, (betas * (1 - before) / (1 - abar))[t]

    assert betas.dtype == abar.dtype == np.float32
    testing.assert_schedule(abar, schedule)
    testing.assert_q_sample(q_sample, schedule)
    said = refusal(testing.assert_q_posterior, posterior, schedule)
    assert "None of the" in said and "(E.6)" in said
    testing.assert_q_posterior(posterior, schedule, tolerance=1e-3)

    def rounded(function):
        return lambda *given: tuple(part.astype(np.float32) for part in function(*given))

    def off(by, first, last):
        right = td.GaussianDiffusion(schedule).q_posterior_mean_variance
        return lambda x0, x_t, t: (
            right(x0, x_t, t)[0] * (1 + by * column((t >= first) & (t < last))),
            right(x0, x_t, t)[1],
        )

    for yours, might_be in [
        (rounded(off(0.04, 0, 20)), True),
        (off(0.04, 0, 20), False),
        (off(0.009, 0, 20), True),
        (rounded(off(0.06, 0, 20)), False),
        (rounded(off(0.04, 200, 220)), False),
        (off(0.0019, 200, 220), True),
        (rounded(off(0.0021, 200, 220)), False),
        (rounded(off(0.0019, 0, 600)), False),
    ]:
        assert ("(E.6)" in refusal(testing.assert_q_posterior, yours, schedule)) == might_be

    def rootless(x0, t, noise):
        return q_sample(x0, t, noise * column(np.sqrt(1 - abar[t])))

    assert "1 - abar_t in front of the noise" in refusal(testing.assert_q_sample, rootless, schedule)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_bound_in_float32_is_told_from_a_mistake_where_its_terms_are_next_to_nothing(prediction, variance):
    process = td.GaussianDiffusion(td.linear_schedule(250), prediction, variance)
    right = terms_of(process)

    def rounded(x0, x_t, t, output):
        """As if each number were off by 3e-7, of logarithms."""
        return right(x0, x_t, t, output) + 96 * 3e-7 * np.cos(t)

    assert "(E.6)" in refusal(testing.assert_bound_terms, rounded, process)
    testing.assert_bound_terms(lambda *given: right(*given) + 1e-12, process)

    if variance == "fixed_large":  # with the other variance at t = 0, too
        small = terms_of(td.GaussianDiffusion(process.schedule, prediction))

        def of_papers(x0, x_t, t, output):
            return np.where(t == 0, small(x0, x_t, t, output), rounded(x0, x_t, t, output))

        assert "(E.6)" in refusal(testing.assert_bound_terms, of_papers, process)

    def other(x0, x_t, t, output):
        return right(x0, x_t, t, output) + 1e-3 * np.cos(t)

    assert "(E.6)" not in refusal(testing.assert_bound_terms, other, process)


@pytest.mark.parametrize("t_wrong", [0, 1, 100, 199])
def test_one_wrong_t_is_enough_and_the_tolerance_is_what_it_says(t_wrong):
    def but_for_one(by):
        return lambda x0, t, noise: EPS.q_sample(x0, t, noise) * (1 + by * column(t == t_wrong))

    testing.assert_q_sample(but_for_one(0.99e-5), LINEAR)
    said = refusal(testing.assert_q_sample, but_for_one(1.01e-5), LINEAR)
    assert f"at t = {t_wrong}; off by more than 1e-05 at no other t." in said
    testing.assert_q_sample(but_for_one(1.01e-5), LINEAR, tolerance=2e-5)
    said = refusal(testing.assert_q_sample, but_for_one(0.5), LINEAR)
    assert "(E.6)" not in said  # too far off for float32


def test_how_far_and_where_is_said():
    def all_but(t_right, by):
        return lambda x0, t, noise: EPS.q_sample(x0, t, noise) * (1 + by * column(t != t_right))

    said = refusal(testing.assert_q_sample, all_but(7, 5e-4), LINEAR)
    assert "off by 0.0005 of its largest number" in said and "at 199 of 200 t, between 0 and 199." in said
    assert "(E.6)" not in said  # at too many t for float32
    assert "by more than 1e-05 at all 200 t." in refusal(testing.assert_q_sample, all_but(-1, 0.5), LINEAR)


@pytest.mark.parametrize(
    ("distances", "worst", "tolerance", "found"),
    [
        ({"a": 9e-4}, 1.0, 1e-5, ["a"]),
        ({"a": 1.1e-3}, 1.0, 1e-5, []),
        ({"a": 9e-3}, 1.0, 1e-2, ["a"]),
        ({"a": 6e-5}, 1e-3, 1e-5, []),
        ({"a": np.inf}, np.inf, 1e-5, []),
        ({"c": 2.1e-6, "b": 1.9e-6, "a": 1e-6}, 1.0, 1e-5, ["a", "b"]),
        ({"a": 0.0, "b": 9e-10, "c": 2e-9}, 1.0, 1e-5, ["a", "b"]),
    ],
)
def test_the_nearest_mistakes_are_named_if_they_are_near(distances, worst, tolerance, found):
    said = named(distances, worst, tolerance)
    assert [what for what in "abc" if f"of this: {what}" in said] == found
    assert ("None of the" in said) == (not found)


@pytest.mark.parametrize(
    ("yours", "other", "right", "apart"),
    [
        ([2.0, 1.0], [4.0, 1.0], [1.0, 1.0], 0.5),
        ([1e-17, 0.0], [3e-17, 0.0], [1.0, 0.0], 2e-11),  # rounding, not two thirds
        ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0], 1.0),
        ([np.inf, 1.0], [np.nan, 1.0], [1.0, 1.0], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [-np.inf, 1.0], [1.0, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 2.0], [1.0, 1.0], 0.5),
    ],
)
def test_distance_of_a_sample(yours, other, right, apart):
    assert distance(*np.array([[yours], [other], [right]])) == pytest.approx(apart, rel=1e-12)


def test_the_tolerance_of_a_table_and_of_a_sampler_is_what_it_says():
    def table(by):  # in log-SNR
        return 1 / (1 + np.exp(by) * (1 - ABAR) / ABAR)

    first, second = np.arange(200) < 100, np.arange(200) >= 100
    testing.assert_schedule(table(0.0099 * first + 0.00099 * second), LINEAR)
    testing.assert_schedule(table(0.0099).astype(np.float32), LINEAR)
    testing.assert_schedule(table(0.0099).astype(np.float32).astype(float), LINEAR)
    for by in (0.0101 * first, 0.00101 * second, 0.002 * first + 0.00101 * second):
        said = refusal(testing.assert_schedule, table(by), LINEAR)
        assert (
            "In float32" not in said and "by more than 0.01, 0.001 from t = 100 on, at 100 of 200 t" in said
        )
    assert "off by 0.00101 at t = 1" in said
    assert "In float32" in refusal(testing.assert_schedule, table(0.03).astype(np.float32), LINEAR)
    assert "In float32" not in refusal(testing.assert_schedule, table(0.06).astype(np.float32), LINEAR)

    def samples(by):
        return lambda *given: ours("ddim", V)(*given) * (1 + by)

    testing.assert_sampler(samples(0.99e-5), V, "ddim", 5)

    def single(by):
        return lambda *given: samples(by)(*given).astype(np.float32)

    assert "In float32" in refusal(testing.assert_sampler, samples(1.01e-5), V, "ddim", 5)
    assert "In float32" in refusal(testing.assert_sampler, samples(0.0019), V, "ddim", 5)
    assert "In float32" not in refusal(testing.assert_sampler, samples(0.0021), V, "ddim", 5)
    assert "In float32" in refusal(testing.assert_sampler, single(0.04), V, "ddim", 5)
    assert "In float32" not in refusal(testing.assert_sampler, single(0.06), V, "ddim", 5)

    def without_0(denoise, x, tau, noise):
        return ours("ddim", V)(denoise, x, tau[1:], noise)

    said = refusal(testing.assert_sampler, without_0, V, "ddim", 50)
    assert "called 49 times; expected 50" in said and "arrives 0.00" in said and "In float32" not in said


@pytest.mark.parametrize(("prediction", "last"), [("eps", 38), ("x0", 39), ("v", 39)])
def test_pure_noise_is_asked_about_if_the_output_says_something_there(prediction, last):
    process, asked = td.GaussianDiffusion(TO_NOISE, prediction), []

    def listening(function):
        return lambda *given: asked.extend(given[-2]) or function(*given)

    for check, function in [
        (testing.assert_predict_x0, process.predict_x0),
        (testing.assert_p_mean_variance, process.p_mean_variance),
        (testing.assert_bound_terms, terms_of(process)),
    ]:
        asked.clear()
        check(listening(function), process)
        assert set(asked) == set(range(last + 1))


@pytest.mark.parametrize("betas", [[1.0], [1.0, 0.1]])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_a_chain_of_pure_noise_is_one_of_which_an_eps_says_nothing(betas, prediction):
    process = td.GaussianDiffusion(td.NoiseSchedule(betas), prediction)
    for check, function in [
        (testing.assert_predict_x0, process.predict_x0),
        (testing.assert_p_mean_variance, process.p_mean_variance),
        (testing.assert_bound_terms, terms_of(process)),
        (partial(testing.assert_sampler, name="ddim"), ours("ddim", process)),
    ]:
        if prediction == "eps":
            with pytest.raises(
                ValueError, match=r"^diffusion has prediction 'eps', .* expected 'x0', 'v' or 'flow'"
            ):
                check(function, process)
        else:
            check(function, process)


def test_data_that_is_asked_about_fills_its_range_and_keeps_to_it():
    """Yours may refuse data outside [-1, 1]; of data all alike some mistakes could not be told."""
    asked = []

    def listening(function, place):
        return lambda *given: asked.append(given[place]) or function(*given)

    for check, function, place, against, options in [
        (testing.assert_q_sample, EPS.q_sample, 0, LINEAR, {}),
        (testing.assert_training_target, V.training_target, 0, V, {}),
        (testing.assert_loss, simple_loss_of(V), 1, V, {}),
        (testing.assert_loss, lambda *given: np.mean(simple_loss_of(V)(*given)), 1, V, {}),
        (testing.assert_bound_terms, terms_of(V), 0, V, {}),
        (testing.assert_bound_terms, terms_of(V, "8bit"), 0, V, dict(decoder="8bit")),
    ]:
        asked.clear()
        check(listening(function, place), against, **options)
        for x0 in asked:
            assert np.max(np.abs(x0)) <= 1 and np.min(x0) < -0.9 and np.max(x0) > 0.9


@pytest.mark.parametrize("gamma", [1e-3, 1, 1e3])
def test_any_positive_gamma_will_do_and_a_refusal_says_that_there_is_one(gamma):
    process = td.GaussianDiffusion(td.linear_schedule(10), "v")
    right, options = simple_loss_of(process, gamma), dict(min_snr_gamma=gamma)
    testing.assert_loss(right, process, **options)
    said = refusal(testing.assert_loss, lambda *given: 3 * right(*given), process, **options)
    assert "(docs: L.9), weighed (docs: L.10);" in said
    assert "weighed" not in refusal(testing.assert_loss, lambda *given: 3 * right(*given), process)


@pytest.mark.parametrize(
    ("check", "yours", "against", "arguments"),
    [
        (testing.assert_q_sample, EPS.q_sample, LINEAR, "x0, t, noise"),
        (testing.assert_training_target, V.training_target, V, "x0, t, noise"),
        (testing.assert_predict_x0, EPS.predict_x0, EPS, "x_t, t, output"),
        (testing.assert_q_posterior, EPS.q_posterior_mean_variance, LINEAR, "x0, x_t, t"),
        (testing.assert_p_mean_variance, EPS.p_mean_variance, EPS, "x_t, t, output"),
        (testing.assert_bound_terms, terms_of(EPS), EPS, "x0, x_t, t, output"),
        (testing.assert_bound_terms, terms_of(LARGE), LARGE, "x0, x_t, t, output"),
        (testing.assert_loss, simple_loss_of(EPS), EPS, "network, x0, t, noise"),
        (
            testing.assert_loss,
            lambda *given: np.mean(simple_loss_of(EPS)(*given)),
            EPS,
            "network, x0, t, noise",
        ),
        (testing.assert_guided, guided_of(EPS), EPS, "network, x, t, labels"),
    ],
)
def test_what_is_written_into_is_said(check, yours, against, arguments):
    for place, name in enumerate(arguments.split(", ")):

        def writing(*given, place=place):
            result = yours(*given)
            given[place][:1] *= 0
            return result

        if name == "output":  # which is its own
            check(writing, against)
        elif name != "network":
            said = refusal(check, writing, against)
            assert f"returns what it should, but writes into {name}, which others may still need: exp" in said


def test_functions_that_write_into_what_they_are_given_are_asked_all_the_same():
    def q_sample(x0, t, noise, power=0.5):
        x0 *= column(np.sqrt(ABAR[t]))
        noise *= column(1 - ABAR[t]) ** power
        x0 += noise
        return x0

    assert refusal(testing.assert_q_sample, q_sample, LINEAR).startswith(
        "q_sample returns what it should, but writes into noise and x0, which others may still need: expected"
    )
    testing.assert_q_sample(lambda x0, t, noise: q_sample(x0.copy(), t, noise.copy()), LINEAR)
    said = refusal(testing.assert_q_sample, lambda *given: q_sample(*given, power=1), LINEAR)
    assert "1 - abar_t in front of the noise" in said and "It writes into noise and x0, which others" in said


def test_a_sampler_may_write_into_what_it_is_given():
    def sampler(denoise, x, tau, noise, last=1.0):
        for i in reversed(range(len(tau))):
            eps = denoise(x, tau[i])
            after = ABAR[tau[i - 1]] if i else last
            x -= np.sqrt(1 - ABAR[tau[i]]) * eps
            x *= np.sqrt(after / ABAR[tau[i]])
            x += np.sqrt(1 - after) * eps
        tau[:] = 0
        return x

    testing.assert_sampler(sampler, EPS, "ddim", 7)
    said = refusal(testing.assert_sampler, lambda *given: sampler(*given, last=ABAR[0]), EPS, "ddim", 7)
    assert "it is the last step" in said and "not to 1, the data" in said


def test_what_no_noise_depends_on_does_not_matter():
    """Variances at t = 0."""

    def step(*given, free=0):
        mean, variance = LARGE.p_mean_variance(*given)
        return mean, np.where(column(given[1]) == free, 7.0, variance)

    testing.assert_p_mean_variance(step, LARGE)
    said = refusal(testing.assert_p_mean_variance, partial(step, free=1), LARGE)
    assert "at t = 1; off by more than 1e-05 at no other t." in said


@pytest.mark.parametrize("variance", [BETAS, LARGE_OF_PAPERS], ids=["beta_0", "beta~_1"])
@pytest.mark.parametrize("decoder", ["density", "8bit"])
def test_of_the_two_variances_of_the_last_term_the_message_takes_yours(variance, decoder):
    right = bound_terms(
        nll=nll if decoder == "density" else lambda *given: nll_of_levels(*given, ndtr), variance=variance
    )

    def off_at_100(x0, x_t, t, output):
        return right(x0, x_t, t, output) * np.where(t == 100, 1.0003, 1)

    said = refusal(testing.assert_bound_terms, off_at_100, LARGE, decoder=decoder)
    assert "is off by 0.0003 of its largest number at t = 100; off by more than 1e-05 at no other t" in said
    assert "None of the" in said


@pytest.mark.parametrize("decoder", ["density", "8bit"])
@pytest.mark.parametrize("variance", [BETAS, LARGE_OF_PAPERS], ids=["ours", "the papers'"])
def test_the_last_term_of_fixed_large_has_either_variance_and_is_asked_all_the_same(variance, decoder):
    likelihood = {"density": nll, "8bit": partial(nll_of_levels, cdf=ndtr)}[decoder]
    check = partial(testing.assert_bound_terms, decoder=decoder)
    check(bound_terms(nll=likelihood, variance=variance), LARGE)
    for wrong in (
        lambda *given: -likelihood(*given),
        lambda *given: likelihood(*given) / 2,
        lambda x, mean, p: likelihood(x, mean, p) - np.log(2 * np.pi) / 2,
        lambda x, mean, p: likelihood(x, mean, 1.001 * p),
    ):
        said = refusal(check, bound_terms(nll=wrong, variance=variance), LARGE)
        assert "at t = 0; off by more than 1e-05 at no other t." in said


def test_arrays_may_be_of_any_library():
    import array_api_strict as xp

    def q_sample(x0, t, noise):
        assert isinstance(x0, type(xp.asarray(0.0))) and isinstance(t, type(x0))
        return LEARNED.q_sample(x0, t, noise)

    testing.assert_q_sample(q_sample, COSINE, asarray=xp.asarray)
    testing.assert_p_mean_variance(LEARNED.p_mean_variance, LEARNED, asarray=xp.asarray)
    testing.assert_sampler(ours("dpm++", LEARNED), LEARNED, "dpm++", 5, asarray=xp.asarray)
    testing.assert_schedule(xp.asarray(COSINE.alphas_cumprod), COSINE)


def test_a_chain_of_one_step():
    process = td.GaussianDiffusion(td.NoiseSchedule([0.5]), "eps", "fixed_large")
    testing.assert_bound_terms(terms_of(process), process)
    testing.assert_p_mean_variance(process.p_mean_variance, process)  # of which the mean is asked


def test_a_result_may_be_overwritten_by_the_next():
    memory = np.empty((8, 3, 4, 8))

    def q_sample(*given):
        memory[...] = EPS.q_sample(*given)
        return memory

    testing.assert_q_sample(q_sample, LINEAR)


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_the_halves_of_an_output_may_lie_on_another_axis(axis):
    def laid_out(function, place):
        def yours(*given):
            given = list(given)
            given[place] = np.concat(np.split(given[place], 2, axis=axis), axis=-1)
            return function(*given)

        return yours

    options = dict(axis=axis, shape=(4, 6, 4, 2))
    testing.assert_p_mean_variance(laid_out(LEARNED.p_mean_variance, 2), LEARNED, **options)
    testing.assert_bound_terms(laid_out(terms_of(LEARNED), 3), LEARNED, **options)

    def on_the_last(network):
        return lambda *given, **told: np.concat(np.split(network(*given, **told), 2, axis=axis), axis=-1)

    def loss(network, *given):
        return simple_loss_of(LEARNED)(on_the_last(network), *given)

    def sampler(denoise, *given):
        return ours("ddpm", LEARNED)(on_the_last(denoise), *given)

    def guided(network, *given):
        mixed = guided_of(LEARNED)(on_the_last(network), *given)
        return np.concat(np.split(mixed, 2, axis=-1), axis=axis)

    testing.assert_loss(loss, LEARNED, **options)
    testing.assert_sampler(sampler, LEARNED, steps=4, **options)
    testing.assert_guided(guided, LEARNED, **options)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"axis is {wrong}; expected one of the data, 1 … 3 or -1"):
            testing.assert_sampler(sampler, LEARNED, axis=wrong)


def test_what_a_network_of_a_learned_variance_says_is_in_its_range_and_a_little_above():
    process, said = td.GaussianDiffusion(LINEAR, "eps", "learned_range"), []

    def listening(denoise, x, tau, noise):
        said.append(denoise(x, tau[0])[..., x.shape[-1] :])
        return x

    refusal(testing.assert_sampler, listening, process, steps=5)
    assert said[0].shape == (4, 3, 4, 4) and np.min(said[0]) >= -1 and 1 < np.max(said[0]) <= 1.2
    for check, function in [
        (testing.assert_p_mean_variance, process.p_mean_variance),
        (testing.assert_bound_terms, terms_of(process)),
    ]:
        said.clear()
        check(lambda *given, f=function: said.append(given[-1][..., 8:]) or f(*given), process)
        for nu in said:
            assert nu.shape == (8, 3, 4, 8)
            assert -1 <= np.min(nu) < -0.9 and 1.1 < np.max(nu) <= 1.2


# A mistake is called by its name


@pytest.mark.parametrize(("check", "against", "what", "yours"), ROWS, ids=[row[2] for row in ROWS])
def test_a_mistake_in_code_from_the_papers_is_named(check, against, what, yours):
    said = refusal(check, yours, against, shape=(20, 1, 2, 20))
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_of_the_lists_is_planted(monkeypatch):
    claims, planted, listed = [], set(), set()
    monkeypatch.setattr(Claim, "refusal", lambda claim, *_: claims.append(claim))
    for check, against, what, yours in ROWS:
        check(yours, against)
        planted.add((claims[-1].name, what))
        listed |= {(claims[-1].name, mistake) for mistake in claims[-1].mistakes}
    assert planted == listed


def test_the_flow_of_the_other_sign_has_the_same_nu():
    process = td.GaussianDiffusion(LINEAR, "flow", "learned_range")

    def other_way(x, output):
        flow, nu = np.split(output, 2, axis=-1)
        return np.concat([-flow, nu], axis=-1)

    def step(x_t, t, output):
        return process.p_mean_variance(x_t, t, other_way(x_t, output))

    def sampler(denoise, x, tau, noise):
        return ours("ddpm", process)(lambda x, t: other_way(x, denoise(x, t)), x, tau, noise)

    for said in (
        refusal(testing.assert_p_mean_variance, step, process),
        refusal(testing.assert_sampler, sampler, process, "ddpm", 7),
    ):
        assert said.endswith(f"It is what comes of this: {TAKEN_TO_DATA}."), said


def test_what_is_expected_of_flow_matching_is_said():
    says = refusal(testing.assert_predict_x0, lambda x_t, t, output: x_t, FLOW)
    assert "(x_t - sqrt(1 - abar_t) flow) / (sqrt(abar_t) + sqrt(1 - abar_t)) (docs: F.11)" in says
    says = refusal(testing.assert_training_target, lambda x0, t, noise: x0, FLOW)
    assert "Expected eps - x_0 (docs: F.10)" in says


def test_the_same_code_without_a_mistake_passes():
    testing.assert_q_sample(linear(A, S), LINEAR)
    testing.assert_training_target(linear(-S, A), V)
    testing.assert_predict_x0(of_eps, EPS)
    testing.assert_predict_x0(linear(A, -S), V)
    testing.assert_q_posterior(posterior(), LINEAR)
    testing.assert_guided(guidance(), EPS)
    testing.assert_guided(guidance(), LEARNED_V)
    testing.assert_hybrid_gradient(hybrid(), LEARNED_EPS)
    testing.assert_hybrid_gradient(
        hybrid(weight=lambda D: 0.5 * 200 / D / np.log(2)), LEARNED_EPS, vlb_weight=0.5
    )
    testing.assert_p_mean_variance(reverse_step(), LARGE)
    testing.assert_p_mean_variance(learned_step(), LEARNED_EPS)
    testing.assert_loss(loss(), EPS)
    testing.assert_loss(loss(velocity, end=lambda each, w: np.mean(each)), V)
    testing.assert_loss(loss(weights=MIN_SNR / SNR), EPS, min_snr_gamma=5)
    testing.assert_loss(loss(lambda x0, t, noise: x0, weights=MIN_SNR), X0, min_snr_gamma=5)
    testing.assert_loss(loss(velocity, weights=MIN_SNR / (SNR + 1)), V, min_snr_gamma=5)
    testing.assert_loss(loss(lambda x0, t, noise: noise - x0), FLOW)
    testing.assert_loss(
        loss(lambda x0, t, noise: noise - x0, weights=MIN_SNR * FLOW_TIMES**2), FLOW, min_snr_gamma=5
    )
    testing.assert_training_target(lambda x0, t, noise: noise - x0, FLOW)
    testing.assert_predict_x0(linear(1 / (A + S), -FLOW_TIMES), FLOW)
    testing.assert_bound_terms(bound_terms(), LARGE)
    testing.assert_bound_terms(bound_terms(variance=LOW), EPS)
    exact = bound_terms(nll=lambda *given: nll_of_levels(*given, ndtr), variance=LOW)
    testing.assert_bound_terms(exact, EPS, decoder="8bit")
    of_x0 = bound_terms(
        nll=lambda *given: nll_of_levels(*given, ndtr), variance=LOW, estimate=lambda x_t, t, output: output
    )
    testing.assert_bound_terms(of_x0, X0, decoder="8bit")
    testing.assert_bound_terms(bound_terms(learned=right_variance), LEARNED_EPS)


@pytest.mark.parametrize(
    ("schedule", "what", "table"), [(schedule, *row) for schedule, rows in TABLES for row in rows.items()]
)
def test_a_table_of_another_schedule_is_named(schedule, what, table):
    said = refusal(testing.assert_schedule, table, schedule)
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_of_tables_is_planted():
    assert _schedule._mistakes(LINEAR).keys() == {what for _, rows in TABLES for what in rows}


def two_of_posterior(x0, x_t, t):
    """Rolled, and a variance that is a standard deviation."""
    mean, variance = posterior_with(np.roll(ABAR, 1))(x0, x_t, t)
    return mean, np.sqrt(variance)


def right_at_0_alone(x0, x_t, t):
    mean, variance = posterior_with(np.roll(ABAR, 1))(x0, x_t, t)
    return mean * column(t == 0), variance


ALMOST = {
    "no root anywhere": (
        testing.assert_predict_x0,
        lambda x, t, o: (x - column(1 - ABAR[t]) * o) / column(ABAR[t]),
        EPS,
    ),
    "two at once": (testing.assert_q_posterior, two_of_posterior, LINEAR),
    "as rolled at t = 0": (testing.assert_q_posterior, right_at_0_alone, LINEAR),
    "zeros": (testing.assert_bound_terms, lambda x0, x_t, t, o: np.zeros(len(t)), EPS),
    "a mean, and negative": (testing.assert_bound_terms, times_ours(-1 / 96), EPS),
    "T / D": (testing.assert_bound_terms, times_ours(200 / 96), EPS),
    "a step late, and squared": (
        testing.assert_schedule,
        np.append(1.0, COSINE.alphas_cumprod[:-1] ** 2),
        COSINE,
    ),
    **{
        f"a level's open end {end}": (
            partial(testing.assert_bound_terms, decoder="8bit"),
            bound_terms(nll=lambda x, mean, p, end=end: nll_of_levels(x, mean, p, ndtr, end), variance=LOW),
            EPS,
        )
        for end in (-1, 1)
    },
}


@pytest.mark.parametrize(("check", "yours", "against"), ALMOST.values(), ids=ALMOST)
def test_what_is_almost_a_mistake_of_the_list_is_not_called_so(check, yours, against):
    with np.errstate(invalid="ignore"):
        said = refusal(check, yours, against)
    assert "None of the" in said and "; or of this: " not in said, said


# Samplers


@pytest.mark.parametrize("steps", [1, 7, None])
def test_samplers_from_the_papers_pass(steps):
    testing.assert_sampler(ancestral(), LARGE, "ddpm", steps)
    testing.assert_sampler(dpm_solver(), EPS, "dpm++", steps)
    testing.assert_sampler(karras(), EPS, "edm", steps)
    testing.assert_sampler(karras(sigmas=SIGMAS), KARRAS, "edm", steps)
    testing.assert_sampler(rotations(), V, "heun", steps)
    for eta in (0.0, 0.3, 1.0):
        testing.assert_sampler(ddim(eta=eta), EPS, "ddim", steps, eta=eta)


@pytest.mark.parametrize(
    ("process", "name", "options", "what", "yours"), STEPS, ids=[row[3] for row in STEPS]
)
def test_a_mistake_in_a_sampler_from_the_papers_is_named(process, name, options, what, yours):
    said = refusal(testing.assert_sampler, yours, process, name, **({"steps": 7} | options))
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_of_samplers_is_planted(monkeypatch):
    listed = set()
    monkeypatch.setattr(_sampler, "named", lambda distances, *_: str(listed.update(distances)))
    for process, name, options, _ in WALKS:
        options = {"steps": 3} | options
        refusal(testing.assert_sampler, lambda denoise, x, *_: 0 * x, process, name, **options)
    assert listed == {what for *_, rows in WALKS for what in rows}


def test_flow_matching_is_ddim_of_states_that_are_scaled():
    """Its rates sum to 1, the squares of ours do."""
    testing.assert_sampler(straight(), FLOW, "ddim", 12)
    scale = np.sqrt((1 - FLOW_TIMES) ** 2 + FLOW_TIMES**2)
    testing.assert_q_sample(
        lambda x0, t, noise: flow_matching(FLOW_TIMES[t], x0, noise) / column(scale[t]), LINEAR
    )


def test_where_a_sampler_first_goes_astray_is_said():
    tau = [0, 20, 60, 140, 199]
    assert "shown t = 200; expected a whole number, 0 … 199 (E.13)" in refusal(
        testing.assert_sampler, ancestral(mistake="shown 1 … T"), LARGE, "ddpm", tau
    )
    assert "it is the last step" in refusal(
        testing.assert_sampler, ancestral(mistake="at the end"), LARGE, "ddpm", tau
    )
    said = refusal(testing.assert_sampler, ancestral(deviation=lambda beta, small: beta), LARGE, "ddpm", tau)
    where = "Call 2 of the network, at t = 140, is the first with another state, after the step from t = 199."
    assert where in said
    said = refusal(
        testing.assert_sampler, lambda denoise, x, *_: ddim()(denoise, 2 * x, *_), EPS, "ddim", tau
    )
    assert "The first call of the network, at t = 199, has another state than x_T." in said
    said = refusal(testing.assert_sampler, ddim("leading"), EPS, "ddim", tau)
    assert "Call 1 of the network is at t = 160; expected 199" in said
    said = refusal(testing.assert_sampler, ancestral(), LARGE, "ddim", tau)
    assert "noise() is called 4 times; expected 0." in said

    def masked(denoise, x, tau, noise, factor=1.001):
        return factor * ddim()(denoise, x, tau, noise) + sum(0 * noise() for _ in tau)

    testing.assert_sampler(partial(masked, factor=1), EPS, "ddim", tau)
    said = refusal(testing.assert_sampler, masked, EPS, "ddim", tau)
    assert "noise() is called 5 times; expected 0." in said
    assert said.endswith(" Noise that is drawn and then multiplied by 0 is no mistake.")
    each = refusal(testing.assert_sampler, lambda denoise, x, *_: denoise(x, np.arange(4)), EPS, "ddim", tau)
    assert "shown t = [0 1 2 3]; expected one time for all of a batch" in each
    said = refusal(testing.assert_sampler, ddim(), V, "ddim", tau)  # eps, where the network says v
    assert "Call 2" in said and "the output is taken for eps" in said

    def once_more(denoise, x, tau, noise):
        return ddim()(denoise, x, tau, noise) + 0 * denoise(x, 0)

    testing.assert_sampler(
        once_more, EPS, "ddim", tau
    )  # what is asked does not matter, if the samples are right
    said = refusal(testing.assert_sampler, lambda *given: 2 * once_more(*given), EPS, "ddim", tau)
    assert "called 6 times; expected 5" in said


# What comes is not what can be compared


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda x0, t, noise: x0[0], "q_sample has shape (3, 4, 8); expected (8, 3, 4, 8)"),
        (lambda x0, t, noise: (x0, noise), "q_sample returned 2 arrays; expected 1"),
        (lambda x0, t, noise: x0 > 0, "q_sample has dtype bool; expected real numbers"),
        (lambda x0, t, noise: x0 + 0j, "q_sample has dtype complex128; expected real numbers"),
        (lambda x0, t, noise: None, "q_sample is a NoneType; expected an array"),
        (lambda x0, t, noise: {"sample": x0}, "q_sample is a dict; expected an array"),
        (lambda x0, t, noise: [x0, [1.0]], "q_sample is a list ("),
        (
            lambda x0, t, noise: np.where(column(t) == 7, np.nan, EPS.q_sample(x0, t, noise)),
            "q_sample is not finite at t = 7; off by more than 1e-05 at no other t",
        ),
    ],
)
def test_what_is_no_result_is_said(yours, said):
    assert said in refusal(testing.assert_q_sample, yours, LINEAR)


def test_shapes_of_two_results():
    def with_variance(*variance):
        return lambda *given: (EPS.p_mean_variance(*given)[0], *variance)

    for rest in [(), (np.ones(8), np.ones(8))]:
        said = refusal(testing.assert_p_mean_variance, with_variance(*rest), EPS)
        assert f"p_mean_variance returned {1 + len(rest)} arrays; expected 2, mean and variance" in said
    for shape in [(3,), (8, 8), (1, 1, 1, 1), (8, 7, 1, 1)]:
        said = refusal(testing.assert_p_mean_variance, with_variance(np.zeros(shape)), EPS)
        assert f"the variance of p_mean_variance has shape {shape}; expected (8, 1, 1, 1)" in said
    testing.assert_p_mean_variance(lambda *given: list(EPS.p_mean_variance(*given)), EPS)


def test_an_error_of_ones_own_says_how_it_was_called():
    with pytest.raises(IndexError) as caught:
        testing.assert_q_sample(lambda x0, noise, t: ABAR[t], LINEAR)
    if hasattr(caught.value, "add_note"):  # Python 3.11
        assert caught.value.__notes__ == ["tinydiff.testing called it as q_sample(x0, t, noise)."]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda denoise, x: denoise(x, 0.5),
            "a whole number, 0 … 199 (in a time of your own: lambda x, u: denoise(x, 200 * u), say; of sigm",
        ),
        (lambda denoise, x: denoise(x, 146.42), "t = 146.42; expected a whole number, 0 … 199 (of sigmas be"),
        (lambda denoise, x: denoise(x, np.zeros(3)), "x of shape (4, 3, 4, 4) and t of shape (3,)"),
        (lambda denoise, x: denoise(x, np.zeros(1)), "x of shape (4, 3, 4, 4) and t of shape (1,)"),
        (lambda denoise, x: denoise(x, None), "the t that the network is shown is a NoneType"),
        (lambda denoise, x: denoise(x, 0) * np.nan, "arrives at no finite numbers, not where ddpm does"),
        (
            lambda denoise, x: denoise(x, 0)[:2],
            "what sampler returned has shape (2, 3, 4, 4); expected (4, 3, 4, 4)",
        ),
        (lambda denoise, x: denoise(1e200 * x, 0), "arrives at no finite numbers"),
        (lambda denoise, x: (x, [x]), "what sampler returned is a tuple ("),
        (
            lambda denoise, x: np.uint8(127.5 * np.clip(x + 1, 0, 2)),
            "what sampler returned has dtype uint8, as pictures have; expected the samples before that",
        ),
        (
            lambda denoise, x: denoise(x, 995.0),
            "t = 995.0; expected a whole number, 0 … 199 (in a time of your own, 10",
        ),
        (lambda denoise, x: denoise(x, 0, y=None), "noise() is called 0 times; expected 4."),
        (lambda denoise, x: denoise(x, timestep=199), "noise() is called 0 times; expected 4."),
        (lambda denoise, x: denoise(x=x, t=199), "noise() is called 0 times; expected 4."),
    ],
)
def test_what_is_no_walk_is_said(ask, said):
    assert said in refusal(testing.assert_sampler, lambda denoise, x, *_: ask(denoise, x), EPS, steps=5)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda network, x0, t, noise: 0.0, "loss does not ask the network."),
        (lambda network, x0, t, noise: network(x0, t), "an x_t that is off by "),
        (lambda network, x0, t, noise: network(x0[:2], t), "x of shape (2, 3, 4, 8); expected (8, 3, 4, 8)."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1] - 1), "(E.13)."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1] + 1), "(E.13)."),
        (
            lambda network, *given: network(EPS.q_sample(*given), given[1] / 200),
            "u: network(x, 200 * u), say).",
        ),
        (
            lambda network, *given: network(EPS.q_sample(*given), 5 * given[1]),
            "u: network(x, 0.2 * u), say).",
        ),
        (
            lambda network, *given: network(EPS.q_sample(*given), (given[1] + 1) / np.float32(200)),
            "u: network(x, 200 * u - 1), say).",
        ),
        (lambda network, *given: network(EPS.q_sample(*given), 199 - given[1]), "], not T - 1 - t."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1][::-1]), "], each sample its own."),
        (lambda network, *given: network(EPS.q_sample(*given), 0 * given[1]), "]."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1] ** 2), "]."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1][0]), "t of shape (); expected (8,)."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1]), "(8, 3, 4, 8); expected (8,)."),
        (lambda network, *given: network(EPS.q_sample(*given), given[1])[:7, 0, 0, 0], "has shape (7,)"),
    ],
)
def test_what_is_no_loss_is_said(loss, said):
    assert said in refusal(testing.assert_loss, loss, EPS)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda f, x, t, y: f(x, t[:3], y), "x of shape (8, 3, 4, 8) and t of shape (3,); expected (N, ...)"),
        (lambda f, x, t, y: f(x, t, y[:, None]), "x of shape (8, 3, 4, 8) and labels of shape (8, 1); exp"),
        (lambda f, x, t, y: f(np.tile(x, (2, 1, 1, 1)), 3, y), "(16, 3, 4, 8) and labels of shape (8,); exp"),
        (lambda f, x, t, y: f(x, t + 0.5, y), "expected whole numbers, 0 … 199 (E.13)"),
        (lambda f, x, t, y: f(x, t + 1, y), "expected whole numbers, 0 … 199 (E.13)"),
        (lambda f, x, t, y: f(x, t - 1, y), "expected whole numbers, 0 … 199 (E.13)"),
        (lambda f, x, t, y: f(x, t, "a cat"), "what the network is told has dtype"),
        (lambda f, x, t, y: f(x, t, y)[:4], "guided has shape (4, 3, 4, 8); expected (8, 3, 4, 8)"),
        (lambda f, x, t, y: 0 * x, "None of the"),
    ],
)
def test_what_is_no_guidance_is_said(ask, said):
    assert said in refusal(testing.assert_guided, ask, EPS)


def test_guidance_shown_times_in_bfloat16_beyond_the_last():
    process = td.GaussianDiffusion(td.linear_schedule())
    said = refusal(testing.assert_guided, lambda f, x, t, y: f(x, rounded_to_bfloat16(t)), process)
    assert said.endswith("expected whole numbers, 0 … 999 (E.13; or E.14, in bfloat16).")


@pytest.mark.parametrize("none", [None, -1, 10, 1000])
def test_no_class_may_be_told_in_more_than_one_way(none):
    def guided(network, x, t, labels):
        sample = network(x, t, None if none is None else np.full_like(labels, none), return_dict=False)[0]
        return sample + 3 * (network(x, t[0] if len(x) == 1 else t, y=labels) - sample)

    testing.assert_guided(guided, EPS)
    testing.assert_guided(guided, EPS, shape=(1, 4))


def test_a_network_in_a_loss_may_be_asked_twice_and_told_more():
    """For an estimate of x_0 that it is then shown; and what it said is the loss's own, to write in."""

    def self_conditioned(network, x0, t, noise):
        x_t = EPS.q_sample(x0, t, noise)
        first = network(x_t, t)
        first *= 0
        again = network(x_t, timestep=t, x_self_cond=first, return_dict=False)[0]
        return np.mean((again - noise) ** 2)

    testing.assert_loss(self_conditioned, EPS)
    testing.assert_loss(self_conditioned, EPS, shape=(1, 5))


@pytest.mark.parametrize("t_wrong", [0, 100, 199])
def test_one_number_for_a_batch_does_not_hide_what_counts_little(t_wrong):
    """In the mean of a batch of many t it would: the weights of the last t are a millionth of the largest."""
    weights = MIN_SNR * np.where(np.arange(200) == t_wrong, 2, 1)
    wrong = loss(lambda x0, t, noise: x0, weights=weights, end=lambda each, w: np.mean(column(w) * each))
    said = refusal(testing.assert_loss, wrong, X0, min_snr_gamma=5.0)
    assert f"off by 1 of its largest number at t = {t_wrong}; off by more than 1e-05 at no other t." in said


@pytest.mark.parametrize(("shape", "of_batch"), [((8, 3, 4, 8), True), ((6, 3, 4, 8), False)])
def test_a_sum_over_the_batch_is_told_from_one_over_the_last_axis_where_it_can_be(shape, of_batch):
    def summed(axis, network, x0, t, noise):
        return np.mean(np.sum((network(EPS.q_sample(x0, t, noise), t) - noise) ** 2, axis=axis))

    for axis, over in [(0, "the batch"), (-1, "the last axis")]:
        both = "the batch or over the last axis" if of_batch else over
        said = refusal(testing.assert_loss, partial(summed, axis), EPS, shape=shape)
        assert said.endswith(f"It is what comes of this: a sum over {both}, not a mean."), said


@pytest.mark.parametrize(
    ("process", "weights", "what"),
    [
        (EPS, 1 / SNR, "an error of x_0"),
        (EPS, (SNR + 1) / SNR, "an error of v"),
        (X0, SNR, "an error of eps, as denoising-diffusion-pytorch weighs them all"),
        (X0, SNR + 1, "an error of v"),
        (V, 1 / (SNR + 1), "an error of x_0"),
        (V, SNR / (SNR + 1), "an error of eps, as denoising-diffusion-pytorch weighs them all"),
    ],
)
def test_the_error_of_another_prediction_is_named(process, weights, what):
    def wrong(network, x0, t, noise):
        output = network(process.q_sample(x0, t, noise), t)
        squares = np.mean((output - process.training_target(x0, t, noise)) ** 2, axis=(1, 2, 3))
        return np.mean(weights[t] * squares)

    said = refusal(testing.assert_loss, wrong, process)
    assert said.endswith(f"It is what comes of this: {what}."), said


@pytest.mark.parametrize("end", [lambda d: np.mean(d**2), lambda d: np.mean(d**2, axis=1)])
@pytest.mark.parametrize("shape", [(8, 1), (8, 1, 1, 1)])
def test_answers_held_against_all_targets_are_named(shape, end):
    def loss(network, x0, t, noise):
        return end(network(EPS.q_sample(x0, t, noise), t).reshape(8, 1) - noise.reshape(8))

    said = refusal(testing.assert_loss, loss, EPS, shape=shape)
    assert said.endswith("of this: (N, 1) less (N,), which is (N, N): every answer against every target.")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_times_may_have_been_divided_and_multiplied(dtype):
    """Of which t / T * T does not always come back whole."""
    process = td.GaussianDiffusion(td.linear_schedule(50), "v")

    def there_and_back(t, *_):
        return np.asarray(t, dtype) / 50 * 50

    assert np.any(there_and_back(np.arange(50)) != np.arange(50))

    def loss(network, x0, t, noise):
        output = network(process.q_sample(x0, t, noise), there_and_back(t))
        return np.mean((output - process.training_target(x0, t, noise)) ** 2)

    testing.assert_loss(loss, process)
    testing.assert_sampler(ours("ddim", process, there_and_back), process, "ddim")


@pytest.mark.parametrize("end", [np.mean, np.asarray])
def test_weights_that_are_normalised_are_not_called_none(end):
    def wrong(network, x0, t, noise):
        squares = np.mean((network(linear(A, S)(x0, t, noise), t) - noise) ** 2, axis=(1, 2, 3))
        weights = MIN_SNR[t] / SNR[t]
        return end(weights * squares / np.mean(weights))

    said = refusal(testing.assert_loss, wrong, EPS, min_snr_gamma=5.0)
    assert said.endswith("It is what comes of this: the weights, divided by their mean in the batch."), said


@pytest.mark.parametrize("front", [-1.0, 0.0])
def test_walks_that_end_alike_because_they_are_clipped_are_told_apart(front):
    """What is clipped to [-1, 1] ends there, however it went; the network has seen the rest."""
    process = td.GaussianDiffusion(td.linear_schedule())

    def sampler(denoise, x, tau, noise):
        abar = process.schedule.alphas_cumprod[tau]
        for i in reversed(range(len(tau))):
            after = abar[i - 1] if i else 1.0
            x0 = np.clip((x - np.sqrt(1 - abar[i]) * denoise(x, tau[i])) / np.sqrt(abar[i]), -1, 1)
            eps = (x - np.sqrt(abar[i]) * x0) / np.sqrt(1 - abar[i])
            x = np.sqrt(after) * x0 + front * np.sqrt(1 - after) * eps
        return x

    said = refusal(testing.assert_sampler, sampler, process, "ddim", 200, clip=True)
    assert said.endswith(f"It is what comes of this: eps {'subtracted' if front else 'left out'}."), said


def test_times_in_bfloat16_are_called_so():
    long = td.GaussianDiffusion(td.linear_schedule())

    def loss(network, x0, t, noise):
        return np.mean((network(long.q_sample(x0, t, noise), rounded_to_bfloat16(t)) - noise) ** 2)

    assert "(in bfloat16, E.14)." in refusal(testing.assert_loss, loss, long)
    said = refusal(testing.assert_sampler, ours("ddim", long, rounded_to_bfloat16), long, "ddim", 10)
    assert "shown t = 1000; expected a whole number, 0 … 999 (E.13; or E.14, in bfloat16)." in said
    long = td.GaussianDiffusion(td.linear_schedule(257))  # all of whose times it has
    testing.assert_loss(loss, long)


@pytest.mark.parametrize("T", [1, 2, 8])
def test_what_is_nowhere_a_number_has_no_name(T):
    process = td.GaussianDiffusion(td.cosine_schedule(T, max_beta=1.0))

    def no_number(network, x0, t, noise):
        return 0 * np.mean(network(process.q_sample(x0, t, noise), t)) * np.nan

    said = refusal(testing.assert_loss, no_number, process, min_snr_gamma=5.0)
    assert "not finite" in said and "None of the" in said


def test_a_loss_in_float32_passes():
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float32))

    def loss(network, x0, t, noise):
        x0, noise = x0.astype(np.float32), noise.astype(np.float32)
        x_t = column(np.sqrt(abar[t])) * x0 + column(np.sqrt(1 - abar[t])) * noise
        return np.mean((network(x_t, t).astype(np.float32) - noise) ** 2)

    testing.assert_loss(loss, td.GaussianDiffusion(td.linear_schedule()))


@pytest.mark.parametrize(
    "ask",
    [
        lambda noise, x: noise(),
        lambda noise, x: noise(x),
        lambda noise, x: noise(x, dtype=x.dtype),
        lambda noise, x: noise(*x.shape),
        lambda noise, x: noise(x.shape, generator=None),
        lambda noise, x: noise(size=x.shape),
        lambda noise, x: noise(np.zeros(2, np.uint32), x.shape),  # a key, as JAX has it
        lambda noise, x: noise(np.zeros(2, np.uint32), shape=list(x.shape)),
        lambda noise, x: noise(np.zeros(2, np.uint32)),
        lambda noise, x: noise(x[:, :, :2], None).astype(float),  # what is no shape, is ignored
        lambda noise, x: noise(len(x), x[0].size).reshape(x.shape),
        lambda noise, x: noise(np.concat([x, x]))[len(x) :],
    ],
)
def test_noise_may_be_asked_for_as_libraries_are(ask):
    def sampler(denoise, x, tau, noise):
        return ancestral()(denoise, x, tau, lambda: ask(noise, x))

    testing.assert_sampler(sampler, LARGE, steps=7)


@pytest.mark.parametrize(
    "sizes", [(4, 1, 4, 4), (4, 3, 1, 1), (4, 4), (1,), (4, 1, 1, 1), (4, 3, 4, 1)], ids=str
)
def test_noise_of_a_smaller_shape_is_seen(sizes):
    """Which broadcasts."""

    def sampler(denoise, x, tau, noise):
        return ancestral()(denoise, x, tau, lambda: noise(sizes))

    said = refusal(testing.assert_sampler, sampler, LARGE, steps=7)
    assert f" noise() is asked for shape {sizes}; expected (4, 3, 4, 4)." in said and "None of the" in said


def test_mistakes_that_cannot_be_made_are_left_out():
    """EDM's clock does not begin at pure noise, nor does an eps say anything there."""
    process = td.GaussianDiffusion(TO_NOISE, "v")
    said = refusal(testing.assert_sampler, lambda denoise, x, *_: 0 * x, process, "ddim", 4)
    assert "None of the" in said
    other = refusal(testing.assert_sampler, lambda denoise, x, *_: 0 * x, V, "ddim", 4)
    assert int(said.split("None of the ")[1].split()[0]) < int(other.split("None of the ")[1].split()[0])


def test_a_network_may_be_asked_twice():
    """For guidance: half by half, or one after the other."""

    def twice(denoise):
        return lambda x, t: denoise(x, t) + 0.5 * (denoise(x, t) - denoise(x, t, "nothing"))

    def doubled(denoise):
        return lambda x, t: np.split(denoise(np.concat([x, x]), np.concat([t, t])), 2)[1]

    for guided in (twice, doubled):
        testing.assert_sampler(
            lambda denoise, *given, g=guided: ours("heun", V)(g(denoise), *given), V, "heun", 7
        )
    said = refusal(
        testing.assert_sampler, lambda d, x, tau, z: 2 * ddim()(twice(d), x, tau, z), EPS, "ddim", 7
    )
    assert "it is the last step that differs" in said


@pytest.mark.parametrize("T", [50, 1000, 4000, 10_000])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_tables_whose_betas_were_float32_pass(kind, T):
    one, of_f = np.float32(1), np.arange(T + 1, dtype=np.float32) / np.float32(T)
    f = np.cos((of_f + np.float32(0.008)) / np.float32(1.008) * np.float32(np.pi) / 2) ** 2
    betas = {
        "linear": np.linspace(0.1 / T, 20 / T, T, dtype=np.float32),
        "cosine": np.minimum(1 - f[1:] / f[:-1], np.float32(0.999)),
    }[kind]
    schedule = {"linear": td.linear_schedule, "cosine": td.cosine_schedule}[kind](T)
    assert betas.dtype == np.float32
    for table in (
        np.cumprod(1 - betas.astype(float)),
        np.cumprod((one - betas).astype(float)),
        np.cumprod(one - betas),
        np.cumprod(one - betas).astype(float),
    ):
        testing.assert_schedule(table, schedule)


def test_tables_that_are_none():
    assert "51 entries, the first is 1, the data itself; expected the other 50" in refusal(
        testing.assert_schedule, np.append(1.0, COSINE.alphas_cumprod), COSINE
    )
    assert "shape (49,); expected (50,)" in refusal(testing.assert_schedule, COSINE.betas[:-1], COSINE)
    for none in (2 + COSINE.betas, -COSINE.alphas_cumprod):
        assert "off by inf" in refusal(testing.assert_schedule, none, COSINE)


def test_nothing_is_left_of_the_data_by_whatever_rounding():
    f = np.cos((np.arange(41) / 40 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert f[-1] > TO_NOISE.alphas_cumprod[-1] == 0
    testing.assert_schedule(f[1:] / f[0], TO_NOISE)


@pytest.mark.parametrize(
    ("check", "yours", "against"),
    [
        (testing.assert_q_sample, EPS.q_sample, LINEAR),
        (testing.assert_training_target, EPS.training_target, EPS),
        (testing.assert_predict_x0, EPS.predict_x0, EPS),
        (testing.assert_q_posterior, EPS.q_posterior_mean_variance, LINEAR),
        (testing.assert_p_mean_variance, EPS.p_mean_variance, EPS),
        (testing.assert_bound_terms, terms_of(EPS), EPS),
        (testing.assert_loss, loss(), EPS),
        (testing.assert_guided, guidance(), EPS),
        (testing.assert_sampler, ddim(), EPS),
    ],
)
def test_a_shape_or_an_axis_that_fits_no_batch_is_named_by_every_check(check, yours, against):
    for shape in ((4,), (), 4, [4, 3], None, (0, 3), (4, 0), (4, 1.0), (4, 3, -1)):
        with pytest.raises(ValueError, match=r"^shape is .*; expected") as caught:
            check(yours, against, shape=shape)
        assert f"shape is {shape!r}; expected (N, ...), two or more integers" in str(caught.value)
    if "axis" in inspect.signature(check).parameters:
        for axis in (0, 4, -2, 1.5):
            with pytest.raises(ValueError, match=rf"^axis is {axis}; expected one of the data, 1 … 3 or -1"):
                check(yours, against, axis=axis)


@pytest.mark.parametrize(
    ("check", "given", "options", "error"),
    [
        (testing.assert_schedule, (ABAR, BETAS), {}, "schedule is an ndarray; expected a NoiseSchedule"),
        (testing.assert_q_sample, (EPS.q_sample, EPS), {}, "schedule is a GaussianDiffusion"),
        (testing.assert_predict_x0, (EPS.predict_x0, LINEAR), {}, "diffusion is a NoiseSchedule"),
        (
            testing.assert_q_sample,
            (EPS.q_sample, LINEAR),
            dict(shape=(4,)),
            "(4,); expected (N, ...), two or more",
        ),
        (testing.assert_q_sample, (EPS.q_sample, LINEAR), dict(shape=(0, 3)), "shape is (0, 3); expected"),
        (testing.assert_q_sample, (EPS.q_sample, LINEAR), dict(tolerance=0), "tolerance is 0; expected"),
        (
            testing.assert_q_sample,
            (EPS.q_sample, LINEAR),
            dict(tolerance=np.inf),
            "tolerance is inf; expected",
        ),
        (testing.assert_sampler, (ddim(), EPS, "ddmp"), {}, "sampler is 'ddmp'; expected one of"),
        (testing.assert_bound_terms, (terms_of(EPS), EPS), dict(decoder="8"), "decoder is '8'; expected"),
        (testing.assert_loss, (loss(), LINEAR), {}, "diffusion is a NoiseSchedule"),
        (testing.assert_guided, (guidance(), LINEAR), {}, "diffusion is a NoiseSchedule"),
        (testing.assert_guided, (guidance(), EPS), dict(num_classes=0), "num_classes is 0; expected an int"),
        *(
            (
                testing.assert_guided,
                (guidance(), EPS),
                dict(guidance_scale=w),
                f"guidance_scale is {w!r}; expected a finite number, but 0 and 1, which do not show both",
            )
            for w in (0, 1.0, np.inf, "3")
        ),
        (testing.assert_loss, (loss(), EPS), dict(tolerance=0), "tolerance is 0; expected"),
        (testing.assert_loss, (loss(), EPS), dict(min_snr_gamma=0), "min_snr_gamma is 0; expected a posit"),
        (testing.assert_loss, (loss(), EPS), dict(min_snr_gamma=True), "min_snr_gamma is True; expected a"),
    ],
)
def test_bad_arguments_are_named(check, given, options, error):
    with pytest.raises((TypeError, ValueError)) as caught:
        check(*given, **options)
    assert error in str(caught.value)


# The hybrid loss's gradient


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_gradient_in_float32_passes(prediction):
    process = td.GaussianDiffusion(td.linear_schedule(), prediction, "learned_range")
    single = lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x  # noqa: E731
    testing.assert_hybrid_gradient(
        partial(hybrid_gradient_of, process), process, asarray=single, tolerance=1e-4
    )


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_gradient_has_its_halves_where_the_output_has_them(axis):
    def gradient(x0, t, noise, output, lost=1):
        last = np.concatenate(np.split(output, 2, axis=axis), axis=-1)
        halves = np.split(hybrid_gradient_of(LEARNED, x0, t, noise, last), 2, axis=-1)
        return np.concatenate([halves[0], lost * halves[1]], axis=axis)

    testing.assert_hybrid_gradient(gradient, LEARNED, axis=axis)
    said = refusal(testing.assert_hybrid_gradient, partial(gradient, lost=0), LEARNED, axis=axis)
    assert "this: nu learns nothing: its gradient is stopped as well" in said
    short = refusal(testing.assert_hybrid_gradient, lambda *given: gradient(*given)[:7], LEARNED, axis=axis)
    assert short.startswith("gradient has shape (7, ")


def test_a_gradient_is_asked_about_outside_of_the_range_of_nu():
    def clipped(x0, t, noise, output):
        gradient = hybrid_gradient_of(LEARNED, x0, t, noise, output)
        gradient[..., 8:] *= np.abs(output[..., 8:]) <= 1
        return gradient

    assert "None of the " in refusal(testing.assert_hybrid_gradient, clipped, LEARNED)


def test_a_probability_that_is_never_below_1e_12_passes_where_x0_is_predicted():
    process = td.GaussianDiffusion(LINEAR, "x0", "learned_range")
    low, high = np.log(LOW[0]), np.log(BETAS[0])

    def gradient(x0, t, noise, output):
        found = hybrid_gradient_of(process, x0, t, noise, output, decoder="8bit")
        guess, nu = np.split(output, 2, axis=-1)
        up, down = (
            nll_of_levels(x0, guess, np.exp((1 + v) / 2 * high + (1 - v) / 2 * low), ndtr)
            for v in (nu + 1e-6, nu - 1e-6)
        )
        slope = (up - down) / 2e-6 * 1e-3 * 200 / x0.size / np.log(2)
        found[..., 8:] = np.where(column(t) == 0, slope, found[..., 8:])
        return found

    testing.assert_hybrid_gradient(gradient, process, decoder="8bit")


@pytest.mark.parametrize(
    ("process", "options", "said"),
    [
        (EPS, {}, "diffusion has variance 'fixed_small'; expected 'learned_range'."),
        (LEARNED, dict(vlb_weight=0.0), "vlb_weight is 0.0; expected a positive number"),
        (LEARNED, dict(vlb_weight=np.inf), "vlb_weight is inf; expected a positive number"),
        (LEARNED, dict(decoder="8 bit"), "decoder is '8 bit'"),
        (LEARNED, dict(axis=4), "axis is 4"),
        (LEARNED, dict(tolerance=0), "tolerance is 0; expected a positive number"),
    ],
)
def test_arguments_of_a_gradient_are_checked(process, options, said):
    with pytest.raises(ValueError) as caught:
        testing.assert_hybrid_gradient(hybrid(), process, **options)
    assert said in str(caught.value)
