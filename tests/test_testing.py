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


def ours(name, process, **options):
    """tinydiff's sampler, as a checker would hand over theirs."""

    def sampler(denoise, x_T, timesteps, noise):
        class Noise:
            def standard_normal(self, shape, dtype=None):
                return noise()

        return td.sample(
            denoise, process, x_T.shape, name, timesteps, rng=Noise(), x_T=x_T, progress=False, **options
        )

    return sampler


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
    assert f"at t = {t_wrong}, and by more than 1e-05 at 1 of 200 t, {t_wrong} to {t_wrong}." in said
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
    "a step early": (testing.assert_q_sample, noisy("early"), LINEAR),
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
    "up to 0.9999": (of_betas(cosine_betas(50, cap=0.9999)), COSINE),
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
    for prediction in PREDICTIONS:
        for variance in VARIANCES:
            process = td.GaussianDiffusion(td.linear_schedule(8), prediction, variance)
            for claim, rest in claims_of(process, monkeypatch):
                for what, mistake in claim.mistakes.items():
                    listed.add((claim.name, what))
                    try:
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
                ABAR[after] if after >= 0 else ABAR[tau[0]] if mistake == "not to 1" else 1.0,
            )
            sigma = eta * np.sqrt((1 - b2) / (1 - a2) * (1 - a2 / b2))
            x0 = (x - np.sqrt(1 - a2) * eps) / np.sqrt(a2)
            rest = 1 - b2 if mistake == "not reduced" else 1 - b2 - sigma**2
            x = np.sqrt(b2) * x0 + np.sqrt(rest) * eps + (sigma * noise() if eta else 0.0)
        return x

    return sampler


@pytest.mark.parametrize("steps", [1, 7, None])
def test_samplers_from_the_papers_pass(steps):
    testing.assert_sampler(ancestral(), LARGE, "ddpm", steps)
    for eta in (0.0, 0.3, 1.0):
        testing.assert_sampler(ddim(eta=eta), EPS, "ddim", steps, eta=eta)


WALKS = {
    "noise at the last step (E.9)": (ancestral("at the end"), LARGE, "ddpm", {}),
    "as a standard deviation (E.10)": (ancestral("no root"), LARGE, "ddpm", {}),
    "the variance of the long chain (E.8)": (ancestral("long"), LARGE, "ddpm", {}),
    "beta_t in front of eps": (ancestral("E.11"), LARGE, "ddpm", {}),
    "sqrt(1 - abar_t) in front of eps": (ancestral("E.11 too"), LARGE, "ddpm", {}),
    "the variance fixed_large": (ancestral(), EPS, "ddpm", {}),
    "leave out the last, T - 1 (E.3)": (ddim("leading"), EPS, "ddim", {}),
    "not looked up (E.16)": (ddim("computed"), EPS, "ddim", {}),
    "not to 1, the data": (ddim("not to 1"), EPS, "ddim", {}),
    "not taken out": (ddim("not reduced", 0.5), EPS, "ddim", dict(eta=0.5)),
    "the estimate of x_0 is not clipped": (ddim(), EPS, "ddim", dict(clip=True)),
    "the sampler is heun": (ours("heun", V), V, "edm", {}),
}


@pytest.mark.parametrize(("what", "walk"), WALKS.items(), ids=WALKS)
def test_a_mistake_in_a_sampler_from_the_papers_is_named(what, walk):
    sampler, process, name, options = walk
    said = refusal(testing.assert_sampler, sampler, process, name, 20, **options)
    assert what in said and "; or of this: " not in said, said


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "options", [dict(name="ddpm"), dict(name="ddim", eta=0.5), dict(name="ddim", clip=True)]
)
def test_every_wrong_step_is_told_from_all_others(options, variance):
    process, tau = td.GaussianDiffusion(LINEAR, "v", variance), np.array([10, 40, 90, 199])
    walk = td.GaussianDiffusion(LINEAR.respace(tau), "v", variance)
    eta, clip = options.get("eta", 0.0), options.get("clip", False)
    for what, step in wrong_steps(process, walk, tau, options["name"], eta, clip).items():

        class Noise:
            def __init__(self, noise):
                self.standard_normal = lambda shape: noise()

        try:
            testing.assert_sampler(
                lambda denoise, x, tau, noise, step=step: walked(step, denoise, x, tau, Noise(noise)),
                process,
                steps=tau,
                **options,
            )
        except AssertionError as error:
            assert what in str(error), (what, str(error))


def test_where_a_sampler_first_goes_astray_is_said():
    tau = [0, 20, 60, 140, 199]
    assert "expected 0 … 199 (E.13)" in refusal(
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
    assert "shows the network t = [0 1 2 3]; expected an integer or (N,) equal ones" in each
    said = refusal(testing.assert_sampler, ddim(), V, "ddim", tau)  # eps, where the network says v
    assert "Call 2" in said and "None of the" in said

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
        (lambda x0, t, noise: np.nan * x0, "is off by inf"),
    ],
)
def test_what_is_no_result_is_said(yours, said):
    assert said in refusal(testing.assert_q_sample, yours, LINEAR)


def test_shapes_of_two_results():
    def with_variance(*variance):
        return lambda *given: (EPS.p_mean_variance(*given)[0], *variance)

    said = refusal(testing.assert_p_mean_variance, with_variance(), EPS)
    assert "p_mean_variance returned 1 arrays; expected 2" in said
    said = refusal(testing.assert_p_mean_variance, with_variance(np.zeros(3)), EPS)
    assert "the variance of p_mean_variance has shape (3,); expected (8, 1, 1, 1)" in said


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
