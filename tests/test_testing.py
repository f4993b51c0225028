"""tinydiff.testing: what is right passes, and a mistake is called by its name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import testing
from tinydiff.bound import step_term
from tinydiff.samplers import SAMPLERS
from tinydiff.testing._judge import Claim
from tinydiff.testing._wrong_steps import walked, wrong_steps

LINEAR, COSINE = td.linear_schedule(200), td.cosine_schedule(50)
TO_NOISE = td.cosine_schedule(40, max_beta=1.0)  # nothing of the data is left at its end
SCHEDULES = {"linear": LINEAR, "cosine": COSINE, "to noise": TO_NOISE}
ABAR, BETAS = LINEAR.alphas_cumprod, LINEAR.betas
EPS, V = td.GaussianDiffusion(LINEAR), td.GaussianDiffusion(LINEAR, "v")
LARGE = td.GaussianDiffusion(LINEAR, "eps", "fixed_large")
LEARNED = td.GaussianDiffusion(COSINE, "v", "learned_range")
PREDICTIONS, VARIANCES = ("eps", "x0", "v"), ("fixed_small", "fixed_large", "learned_range")


def terms_of(process, decoder="density"):
    return lambda x0, x_t, t, output: step_term(process, output, x0, x_t, t, decoder)[0]


def checks_of(process):
    """Everything that can be asked of a process's functions, each with the function of ours."""
    schedule = process.schedule
    return [
        (testing.assert_q_sample, process.q_sample, schedule),
        (testing.assert_training_target, process.training_target, process),
        (testing.assert_q_posterior, process.q_posterior_mean_variance, schedule),
        (testing.assert_p_mean_variance, process.p_mean_variance, process),
        (testing.assert_bound_terms, terms_of(process), process),
    ]


def column(numbers):
    return numbers.reshape(-1, 1, 1, 1)


def refusal(check, *args, **options):
    with pytest.raises(AssertionError) as caught:
        check(*args, **options)
    return str(caught.value)


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


# What is right passes


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_our_own_functions_pass(schedule, prediction, variance):
    process = td.GaussianDiffusion(schedule, prediction, variance)
    for check, function, against in checks_of(process):
        check(function, against)
    testing.assert_p_mean_variance(
        lambda *given: process.p_mean_variance(*given, clip=True), process, clip=True, shape=(3, 5)
    )
    testing.assert_bound_terms(terms_of(process, "8bit"), process, decoder="8bit")
    testing.assert_predict_x0(td.GaussianDiffusion(schedule, prediction).predict_x0, process)
    testing.assert_schedule(schedule.alphas_cumprod, schedule)


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

    def rootless(x0, t, noise):
        return q_sample(x0, t, noise * column(np.sqrt(1 - abar[t])))

    assert "1 - abar_t in front of the noise" in refusal(testing.assert_q_sample, rootless, schedule)


@pytest.mark.parametrize("t_wrong", [0, 1, 100, 199])
def test_one_wrong_t_is_enough_and_the_tolerance_is_what_it_says(t_wrong):
    def but_for_one(by):
        return lambda x0, t, noise: EPS.q_sample(x0, t, noise) * (1 + by * column(t == t_wrong))

    testing.assert_q_sample(but_for_one(0.99e-5), LINEAR)
    said = refusal(testing.assert_q_sample, but_for_one(1.01e-5), LINEAR)
    assert f"at t = {t_wrong}; off by more than 1e-05 at 1 of 200 t, {t_wrong} to {t_wrong}." in said
    testing.assert_q_sample(but_for_one(1.01e-5), LINEAR, tolerance=2e-5)


def test_functions_may_write_into_what_they_are_given():
    def q_sample(x0, t, noise, power=0.5):
        x0 *= column(np.sqrt(ABAR[t]))
        noise *= column(1 - ABAR[t]) ** power
        x0 += noise
        return x0

    testing.assert_q_sample(q_sample, LINEAR)
    said = refusal(testing.assert_q_sample, lambda *given: q_sample(*given, power=1), LINEAR)
    assert "1 - abar_t in front of the noise" in said

    def sampler(denoise, x, tau, noise, last=1.0):
        for i in reversed(range(len(tau))):
            eps = denoise(x, tau[i])
            after = ABAR[tau[i - 1]] if i else last
            x -= np.sqrt(1 - ABAR[tau[i]]) * eps
            x *= np.sqrt(after / ABAR[tau[i]])
            x += np.sqrt(1 - after) * eps
        return x

    testing.assert_sampler(sampler, EPS, "ddim", 7)
    said = refusal(testing.assert_sampler, lambda *given: sampler(*given, last=ABAR[0]), EPS, "ddim", 7)
    assert "it is the last step" in said and "not to 1, the data" in said


def test_what_no_noise_depends_on_does_not_matter():
    """Variances at t = 0, and a term of the bound that has one of them in it."""

    def step(*given):
        mean, variance = LARGE.p_mean_variance(*given)
        return mean, np.where(column(given[1]) == 0, 7.0, variance)

    def terms(x0, x_t, t, output):
        return np.where(t == 0, 7.0, terms_of(LARGE)(x0, x_t, t, output))

    testing.assert_p_mean_variance(step, LARGE)
    testing.assert_bound_terms(terms, LARGE)
    refusal(testing.assert_bound_terms, terms, EPS)


def test_there_may_be_nothing_to_compare():
    process = td.GaussianDiffusion(td.NoiseSchedule([0.5]), "eps", "fixed_large")
    with pytest.raises(ValueError, match="bound_terms has nothing to compare: at t = 0"):
        testing.assert_bound_terms(terms_of(process), process)
    testing.assert_p_mean_variance(process.p_mean_variance, process)  # the mean is left


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

    def sampler(denoise, x, tau, noise):
        def on_the_last(x, t):
            return np.concat(np.split(denoise(x, t), 2, axis=axis), axis=-1)

        return ours("ddpm", LEARNED)(on_the_last, x, tau, noise)

    testing.assert_sampler(sampler, LEARNED, steps=4, **options)
    with pytest.raises(ValueError, match="axis is 4; expected one of the data, 1 … 3 or -1"):
        testing.assert_sampler(sampler, LEARNED, axis=4)


def test_what_a_network_of_a_learned_variance_says_is_in_its_range():
    process, said = td.GaussianDiffusion(LINEAR, "eps", "learned_range"), []

    def listening(denoise, x, tau, noise):
        said.append(denoise(x, tau[0])[..., x.shape[-1] :])
        return x

    refusal(testing.assert_sampler, listening, process, steps=5)
    assert said[0].shape == (4, 3, 4, 4) and np.max(np.abs(said[0])) <= 1


# A mistake is called by its name


def rates(t, mistake=""):
    t = t - 1 if mistake == "early" else t
    power = 1.0 if mistake == "no root" else 0.5
    a, s = np.where(t < 0, 1.0, ABAR[t]) ** power, np.where(t < 0, 0.0, 1 - ABAR[t]) ** power
    return (a, s) if mistake == "no column" else (column(a), column(s))


def noisy(mistake):
    def q_sample(x0, t, noise):
        a, s = rates(np.maximum(t, mistake == "early"), mistake)  # at t = 0 as at t = 0
        return a * x0 + s * noise

    return q_sample


def posterior(mistake):
    previous = {"rolled": np.roll(ABAR, 1), "not shifted": ABAR}.get(mistake, np.append(1.0, ABAR[:-1]))

    def q_posterior(x0, x_t, t):
        first = ABAR if mistake == "wrong root" else previous
        of_x0 = np.sqrt(first) * BETAS / (1 - ABAR)
        of_x_t = np.sqrt(1 - BETAS) * (1 - previous) / (1 - ABAR)
        variance = BETAS if mistake == "beta" else BETAS * (1 - previous) / (1 - ABAR)
        return column(of_x0[t]) * x0 + column(of_x_t[t]) * x_t, variance[t]

    return q_posterior


def reverse_step(factor=None, f=None, outside=False):
    """Ho et al. 2020, eq. 11, or Nichol & Dhariwal 2021, eq. 15, of the cosine chain in 50 steps."""

    def fixed(x_t, t, eps):
        of_eps = column(BETAS[t]) / column(np.sqrt(1 - ABAR[t])) if factor is None else column(factor[t])
        return (x_t - of_eps * eps) / column(np.sqrt(1 - BETAS[t])), BETAS[t]

    def learned(x_t, t, output):
        mean, _ = td.GaussianDiffusion(COSINE, "v").p_mean_variance(x_t, t, output[..., :8])
        low, high = (column(np.exp(table[t])) for table in LEARNED.log_variance_range)
        weight = f(output[..., 8:])
        return mean, weight * high + (1 - weight) * low if outside else high**weight * low ** (1 - weight)

    return fixed if f is None else learned


def factor_of_terms(factor):
    return lambda *given: factor * terms_of(EPS)(*given)


PLANTED = {
    "t - 1 in the place of t": (testing.assert_q_sample, noisy("early"), LINEAR),
    "both rates without their roots": (testing.assert_q_sample, noisy("no root"), LINEAR),
    "rates (N,) that spread": (testing.assert_q_sample, noisy("no column"), LINEAR),
    "the sign": (testing.assert_training_target, lambda x0, t, noise: -V.training_target(x0, t, noise), V),
    "the target is v": (testing.assert_training_target, V.training_target, EPS),
    "taken for -v": (testing.assert_predict_x0, lambda x, t, v: V.predict_x0(x, t, -v), V),
    "rolled, so that it begins with abar_T (E.7)": (testing.assert_q_posterior, posterior("rolled"), LINEAR),
    "abar_t in the place of abar_{t-1} (E.7)": (testing.assert_q_posterior, posterior("not shifted"), LINEAR),
    "sqrt(abar_t) for sqrt(abar_{t-1})": (testing.assert_q_posterior, posterior("wrong root"), LINEAR),
    "the variance is beta_t": (testing.assert_q_posterior, posterior("beta"), LINEAR),
    "beta_t in front of eps": (testing.assert_p_mean_variance, reverse_step(BETAS), LARGE),
    "sqrt(1 - abar_t) in front of eps": (
        testing.assert_p_mean_variance,
        reverse_step(np.sqrt(1 - ABAR)),
        LARGE,
    ),
    "fixed_small": (testing.assert_p_mean_variance, EPS.p_mean_variance, LARGE),
    "outside the logarithm (E.12)": (
        testing.assert_p_mean_variance,
        reverse_step(f=lambda nu: (nu + 1) / 2, outside=True),
        LEARNED,
    ),
    "nu taken for the fraction": (testing.assert_p_mean_variance, reverse_step(f=lambda nu: nu), LEARNED),
    "bits, not nats": (testing.assert_bound_terms, factor_of_terms(1 / np.log(2)), EPS),
    "bits for each number": (testing.assert_bound_terms, factor_of_terms(1 / np.log(2) / 96), EPS),
}


@pytest.mark.parametrize(("what", "planted"), PLANTED.items(), ids=PLANTED)
def test_a_mistake_in_code_from_the_papers_is_named(what, planted):
    said = refusal(*planted)
    assert what in said and "; or of this: " not in said, said


def test_the_same_code_without_a_mistake_passes():
    testing.assert_q_sample(noisy(""), LINEAR)
    testing.assert_q_posterior(posterior(""), LINEAR)
    testing.assert_p_mean_variance(reverse_step(), LARGE)
    testing.assert_p_mean_variance(reverse_step(f=lambda nu: (nu + 1) / 2), LEARNED)


def of_betas(betas):
    return np.cumprod(1 - betas)


def cosine_betas(T, power=2, s=0.008, cap=0.999):
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** power
    return np.minimum(1 - f[1:] / f[:-1], cap)


TABLES = {
    "without its square (E.1)": (of_betas(cosine_betas(50, power=1)), COSINE),
    "without its offset": (of_betas(cosine_betas(50, s=0.0)), COSINE),
    "up to 0.9999": (of_betas(cosine_betas(1000, cap=0.9999)), td.cosine_schedule(1000)),
    "not divided by the first (E.2)": (
        np.cos((np.linspace(0, 1, 50) + 0.008) / 1.008 * np.pi / 2) ** 2,
        COSINE,
    ),
    "linear betas from 1e-4 to 0.02, whatever T is (E.4)": (
        of_betas(np.linspace(1e-4, 0.02, 50, dtype=np.float32)),
        td.linear_schedule(50),
    ),
    "'scaled_linear'": (of_betas(np.linspace(0.00085**0.5, 0.012**0.5, LINEAR.T) ** 2), LINEAR),
    "a step late": (np.append(1.0, COSINE.alphas_cumprod[:-1]), COSINE),
    "its end to its beginning": (COSINE.alphas_cumprod[::-1], COSINE),
    "the root of": (np.sqrt(ABAR), LINEAR),
    "betas": (BETAS, LINEAR),
}


@pytest.mark.parametrize(("what", "planted"), TABLES.items(), ids=TABLES)
def test_a_table_of_another_schedule_is_named(what, planted):
    said = refusal(testing.assert_schedule, *planted)
    assert what in said and "; or of this: " not in said, said


def two_of_posterior(x0, x_t, t):
    """Rolled, and a variance that is a standard deviation."""
    mean, variance = posterior("rolled")(x0, x_t, t)
    return mean, np.sqrt(variance)


def right_at_0_alone(x0, x_t, t):
    mean, variance = posterior("rolled")(x0, x_t, t)
    return mean * column(t == 0), variance


def rescaled(schedule):
    r = np.sqrt(schedule.alphas_cumprod)
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])) ** 2


ALMOST = {
    "divided by alpha": (
        testing.assert_predict_x0,
        lambda x, t, o: (x - column(np.sqrt(1 - ABAR[t])) * o) / column(np.sqrt(1 - BETAS[t])),
        EPS,
        "sqrt(alpha_t) of one step divides",
    ),
    "no root anywhere": (
        testing.assert_predict_x0,
        lambda x, t, o: (x - column(1 - ABAR[t]) * o) / column(ABAR[t]),
        EPS,
        None,
    ),
    "alpha for the data alone": (
        testing.assert_q_sample,
        lambda x0, t, noise: column(np.sqrt(1 - BETAS[t])) * x0 + column(np.sqrt(1 - ABAR[t])) * noise,
        LINEAR,
        "alpha_t in the place of abar_t in front of the data",
    ),
    "two at once": (testing.assert_q_posterior, two_of_posterior, LINEAR, None),
    "as rolled at t = 0": (testing.assert_q_posterior, right_at_0_alone, LINEAR, None),
    "zeros": (testing.assert_bound_terms, lambda x0, x_t, t, o: np.zeros(len(t)), EPS, None),
    "a mean, and negative": (testing.assert_bound_terms, factor_of_terms(-1 / 96), EPS, None),
    "T / D": (testing.assert_bound_terms, factor_of_terms(200 / 96), EPS, None),
    "a step late, and squared": (
        testing.assert_schedule,
        np.append(1.0, COSINE.alphas_cumprod[:-1] ** 2),
        COSINE,
        None,
    ),
    "rescaled": (testing.assert_schedule, rescaled(LINEAR), LINEAR, "rescaled to end in noise"),
    "arguments": (
        testing.assert_q_posterior,
        lambda x_t, x0, t: posterior("")(x0, x_t, t),
        LINEAR,
        "or the arguments x0 and x_t, exchanged",
    ),
}


@pytest.mark.parametrize(("check", "yours", "against", "what"), ALMOST.values(), ids=ALMOST)
def test_what_is_almost_a_mistake_of_the_list_is_not_called_so(check, yours, against, what):
    with np.errstate(invalid="ignore"):
        said = refusal(check, yours, against)
    assert "; or of this: " not in said
    assert ("None of the" if what is None else what) in said, said


def claims_of(process, monkeypatch):
    """What the checks of a process judge by, and what with."""
    claims = []
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "judge", lambda self, yours, *rest: claims.append((self, rest)))
        for check, function, against in checks_of(process):
            check(function, against)
        testing.assert_predict_x0(process.predict_x0, process)
        testing.assert_p_mean_variance(process.p_mean_variance, process, clip=True)
    return claims


def test_every_mistake_of_the_lists_is_told_from_all_others(monkeypatch):
    """Planted as it stands in the list, each is named, and at most one other with it."""
    listed, found = set(), set()
    pairs = [("eps", "fixed_small"), ("x0", "fixed_large"), ("v", "learned_range"), ("eps", "learned_range")]
    for prediction, variance in pairs:
        process = td.GaussianDiffusion(td.linear_schedule(8), prediction, variance)
        for claim, rest in claims_of(process, monkeypatch):
            for what, mistake in claim.mistakes.items():
                listed.add((claim.name, what))
                try:
                    with np.errstate(divide="ignore"):  # the logarithm of a variance of 0
                        claim.judge(lambda *given, of=mistake: tuple(of(*given).values()), *rest)
                except AssertionError as error:
                    assert what in str(error), (claim.name, what, str(error))
                    assert str(error).count("; or of this: ") <= 1, str(error)
                    found.add((claim.name, what))
    assert listed == found  # each is a mistake of some process


# Samplers


def ancestral(mistake=""):
    """Ho et al. 2020, algorithm 2, with eq. 11 and fixed_large."""

    def sampler(denoise, x, tau, noise):
        abar = ABAR[tau]
        beta = 1 - abar / np.append(1.0, abar[:-1])
        for i in reversed(range(len(tau))):
            eps = denoise(x, int(tau[i]) + (mistake == "shown 1 … T"))
            wrong = {"E.11": beta[i], "E.11 too": np.sqrt(1 - abar[i])}
            x = (x - wrong.get(mistake, beta[i] / np.sqrt(1 - abar[i])) * eps) / np.sqrt(1 - beta[i])
            variance = BETAS[tau[i]] if mistake == "long" else beta[i]
            if i > 0 or mistake == "at the end":
                x = x + (variance if mistake == "no root" else np.sqrt(variance)) * noise()
        return x

    return sampler


def ddim(mistake="", eta=0.0):
    """Song, Meng & Ermon 2021, eq. 12."""

    def sampler(denoise, x, tau, noise):
        if mistake == "leading":
            tau = np.arange(len(tau)) * (LINEAR.T // len(tau))
        for i in reversed(range(len(tau))):
            eps = denoise(x, np.full(len(x), tau[i]))
            after = tau[i] - LINEAR.T // len(tau) if mistake == "computed" else tau[i - 1] if i else -1
            a2, b2 = (
                ABAR[tau[i]],
                ABAR[after] if after >= 0 else ABAR[0] if mistake == "not to 1" else 1.0,
            )
            sigma = eta * np.sqrt((1 - b2) / (1 - a2) * (1 - a2 / b2))
            x0 = (x - np.sqrt(1 - a2) * eps) / np.sqrt(a2)
            x0 = np.clip(x0, -1, 1) if mistake == "clipped x_0" else x0
            rest = 1 - b2 if mistake == "not reduced" else 1 - b2 - sigma**2
            x = np.sqrt(b2) * x0 + np.sqrt(rest) * eps + (sigma * noise() if eta else 0.0)
        return x

    return sampler


@pytest.mark.parametrize("steps", [1, 7, None])
def test_samplers_from_the_papers_pass(steps):
    testing.assert_sampler(ancestral(), LARGE, "ddpm", steps)
    for eta in (0.0, 0.3, 1.0):
        testing.assert_sampler(ddim(eta=eta), EPS, "ddim", steps, eta=eta)


def but_for_the_last_step(denoise, x, tau, noise):
    states = td.iterate_samples(denoise, V, x.shape, "ddpm", tau, rng=Noise(noise), x_T=x)
    return list(states)[-2].x


def one_noise(denoise, x, tau, noise):
    z = noise()
    return ours("ddpm", V, rng=Noise(lambda: z))(denoise, x, tau, noise)


WALKS = {
    "noise at the last step (E.9)": (ancestral("at the end"), LARGE, "ddpm", {}),
    "as a standard deviation (E.10)": (ancestral("no root"), LARGE, "ddpm", {}),
    "the variance of the long chain (E.8)": (ancestral("long"), LARGE, "ddpm", {}),
    "beta_t in front of eps": (ancestral("E.11"), LARGE, "ddpm", {}),
    "sqrt(1 - abar_t) in front of eps": (ancestral("E.11 too"), LARGE, "ddpm", {}),
    "the variance fixed_large": (ancestral(), EPS, "ddpm", {}),
    "the variance fixed_small": (ours("ddpm", EPS), LARGE, "ddpm", {}),
    "eps of an x_0 that is not clipped": (ddim("clipped x_0"), EPS, "ddim", dict(clip=True)),
    "leave out the last, T - 1 (E.3)": (ddim("leading"), EPS, "ddim", {}),
    "not looked up (E.16)": (ddim("computed"), EPS, "ddim", {}),
    "not to 1, the data": (ddim("not to 1"), EPS, "ddim", dict(steps=[9, 50, 120, 199])),
    "not taken out": (ddim("not reduced", 0.5), EPS, "ddim", dict(eta=0.5)),
    "the estimate of x_0 is not clipped": (ddim(), EPS, "ddim", dict(clip=True)),
    "the sampler is heun": (ours("heun", V), V, "edm", {}),
    "shown t + 1 (E.13)": (ours("ddim", V, lambda t, tau: np.minimum(t + 1, 199)), V, "ddim", {}),
    "shown t - 1": (ours("ddim", V, lambda t, tau: np.maximum(t - 1, 0)), V, "ddim", {}),
    "shown T - 1 - t": (ours("heun", V, lambda t, tau: 199 - t), V, "heun", {}),
    "shown the number of the step": (
        ours("dpm++", V, lambda t, tau: np.searchsorted(tau, t)),
        V,
        "dpm++",
        {},
    ),
    "shown the time of the first": (ours("edm", V, every_second_call()), V, "edm", {}),
    "leave out the first, 0": (ours("ddim", V, steps=np.arange(9, 200, 10)), V, "ddim", {}),
    "the first step is left out": (lambda d, x, tau, z: ours("ddim", V)(d, x, tau[:-1], z), V, "ddim", {}),
    "the last step is left out": (but_for_the_last_step, V, "ddpm", {}),
    "the same noise in every step": (one_noise, V, "ddpm", {}),
    "the output is taken for x_0": (ours("ddim", td.GaussianDiffusion(LINEAR, "x0")), V, "ddim", {}),
}


@pytest.mark.parametrize(("what", "walk"), WALKS.items(), ids=WALKS)
def test_a_mistake_in_a_sampler_from_the_papers_is_named(what, walk):
    sampler, process, name, options = walk
    said = refusal(testing.assert_sampler, sampler, process, name, **{"steps": 20, **options})
    assert what in said and "; or of this: " not in said, said


def test_every_wrong_step_is_told_from_all_others():
    listed, found, tau = set(), set(), np.array([10, 90, 199])
    for name, variance, eta in [
        ("ddpm", "fixed_small", 0.0),
        ("ddpm", "learned_range", 0.0),
        ("ddim", "fixed_large", 0.5),
        ("dpm++", "fixed_small", 0.0),
    ]:
        process = td.GaussianDiffusion(LINEAR, "v", variance)
        walk = td.GaussianDiffusion(LINEAR.respace(tau), "v", variance)
        for what, step in wrong_steps(process, walk, tau, name, eta, False).items():
            listed.add((name, what))

            def sampler(denoise, x, tau, noise, step=step):
                return walked(step, denoise, x, tau, Noise(noise))

            try:
                testing.assert_sampler(sampler, process, name, tau, eta=eta, shape=(4, 5))
            except AssertionError as error:
                assert what in str(error), (what, str(error))
                assert str(error).count("; or of this: ") <= 1, str(error)
                found.add((name, what))
    # That one is right here, and that one is where nothing is clipped: both are planted above.
    assert listed - found == {
        ("ddpm", "the variance fixed_small"),
        ("ddim", "eps of an x_0 that is not clipped"),
    }


def test_where_a_sampler_first_goes_astray_is_said():
    tau = [0, 20, 60, 140, 199]
    assert "shown t = 200; expected a whole number, 0 … 199 (E.13)" in refusal(
        testing.assert_sampler, ancestral("shown 1 … T"), LARGE, "ddpm", tau
    )
    assert "it is the last step" in refusal(
        testing.assert_sampler, ancestral("at the end"), LARGE, "ddpm", tau
    )
    said = refusal(testing.assert_sampler, ancestral("no root"), LARGE, "ddpm", tau)
    assert "Call 2 of the network, at t = 140, is the first with another state" in said
    said = refusal(testing.assert_sampler, ddim("leading"), EPS, "ddim", tau)
    assert "Call 1 of the network is at t = 160; expected 199" in said
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
        (lambda x0, t, noise: None, "q_sample is a NoneType; expected an array"),
        (lambda x0, t, noise: {"sample": x0}, "q_sample is a dict; expected an array"),
        (lambda x0, t, noise: [x0, [1.0]], "q_sample is a list ("),
        (
            lambda x0, t, noise: np.where(column(t) == 7, np.nan, EPS.q_sample(x0, t, noise)),
            "q_sample is not finite at t = 7; off by more than 1e-05 at 1 of 200 t",
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
    said = refusal(testing.assert_p_mean_variance, with_variance(np.zeros(3)), EPS)
    assert "the variance of p_mean_variance has shape (3,); expected (8, 1, 1, 1)" in said


def test_an_error_of_ones_own_says_how_it_was_called():
    with pytest.raises(IndexError) as caught:
        testing.assert_q_sample(lambda x0, noise, t: ABAR[t], LINEAR)
    if hasattr(caught.value, "__notes__"):  # Python 3.11
        assert caught.value.__notes__ == ["tinydiff.testing called it as q_sample(x0, t, noise)."]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda denoise, x: denoise(x, 0.5), "shown t = 0.5; expected a whole number, 0 … 199"),
        (lambda denoise, x: denoise(x, np.zeros(3)), "x of shape (4, 3, 4, 4) and t of shape (3,)"),
        (lambda denoise, x: denoise(x, None), "the t that the network is shown is a NoneType"),
        (lambda denoise, x: denoise(x, 0) * np.nan, "arrives at no finite numbers, not where ddpm does"),
        (
            lambda denoise, x: denoise(x, 0)[:2],
            "what sampler returned has shape (2, 3, 4, 4); expected (4, 3, 4, 4)",
        ),
        (lambda denoise, x: (x, [x]), "what sampler returned is a tuple ("),
        (lambda denoise, x: denoise(x, 0, y=None), "noise() is called 0 times; expected 4."),
    ],
)
def test_what_is_no_walk_is_said(ask, said):
    assert said in refusal(testing.assert_sampler, lambda denoise, x, *_: ask(denoise, x), EPS, steps=5)


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


def test_tables_that_are_none():
    assert "51 entries, the first is 1" in refusal(
        testing.assert_schedule, np.append(1.0, COSINE.alphas_cumprod), COSINE
    )
    assert "shape (49,); expected (50,)" in refusal(testing.assert_schedule, COSINE.betas[:-1], COSINE)
    assert "off by inf" in refusal(testing.assert_schedule, 2 + COSINE.betas, COSINE)


@pytest.mark.parametrize(
    ("check", "given", "options", "error"),
    [
        (testing.assert_schedule, (ABAR, BETAS), {}, "schedule is a ndarray; expected a NoiseSchedule"),
        (testing.assert_q_sample, (EPS.q_sample, EPS), {}, "schedule is a GaussianDiffusion"),
        (testing.assert_predict_x0, (EPS.predict_x0, LINEAR), {}, "diffusion is a NoiseSchedule"),
        (testing.assert_q_sample, (EPS.q_sample, LINEAR), dict(shape=(4,)), "shape is (4,); expected"),
        (testing.assert_q_sample, (EPS.q_sample, LINEAR), dict(tolerance=0), "tolerance is 0; expected"),
        (testing.assert_sampler, (ddim(), EPS, "ddmp"), {}, "sampler is 'ddmp'; expected one of"),
        (testing.assert_bound_terms, (terms_of(EPS), EPS), dict(decoder="8"), "decoder is '8'; expected"),
    ],
)
def test_bad_arguments_are_named(check, given, options, error):
    with pytest.raises((TypeError, ValueError)) as caught:
        check(*given, **options)
    assert error in str(caught.value)
