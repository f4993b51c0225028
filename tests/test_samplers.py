"""The samplers, to their true error.

The data is Gaussian, N(m, s^2 I), whose denoiser is known: E[x_0 | x_t] = m + k (x_t - a m) with a =
sqrt(abar_t) and k = a s^2 / (a^2 s^2 + 1 - abar_t). It is affine, so a step is x' = A x + B + sigma z, and
all of a walk, its mean and its variance follow from numbers that are computed here from abar alone.
"""

import math
import warnings
from itertools import pairwise
from types import SimpleNamespace

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

import tinydiff as td
from tinydiff.backend import to_numpy
from tinydiff.bound import prior_term, step_term
from tinydiff.samplers import SAMPLERS

PREDICTIONS = ["eps", "x0", "v", "flow"]
SCHEDULES = {"linear": td.linear_schedule, "cosine": td.cosine_schedule}
M, S = 0.7, 0.4  # mean and deviation of the data


def exact_denoiser(diffusion):
    """E[what `diffusion.prediction` names | x_t] for data N(M, S^2 I)."""

    def denoise(x, t):
        abar = diffusion.schedule.alphas_cumprod[to_numpy(t)].reshape(-1, *[1] * (x.ndim - 1))
        a, b = np.sqrt(abar), np.sqrt(1 - abar)
        x0 = M + a * S**2 / (abar * S**2 + 1 - abar) * (x - a * M)
        eps = (x - a * x0) / b
        return {"eps": eps, "x0": x0, "v": a * eps - b * x0, "flow": eps - x0}[diffusion.prediction]

    return denoise


def affine_steps(abars, sampler, eta=0.0, variance="fixed_small", m=M, s=S):
    """(A, B, sigma) of every step, the first one first, from abar at the visited times."""
    steps = []
    for i in reversed(range(len(abars))):
        abar, prev = abars[i], abars[i - 1] if i else 1.0
        a, b = math.sqrt(abar), math.sqrt(1 - abar)
        k = a * s**2 / (abar * s**2 + 1 - abar)  # x0 = m - k a m + k x
        beta = 1 - abar / prev
        posterior = beta * (1 - prev) / (1 - abar)
        if sampler == "ddpm":
            of_x0, of_x = (
                math.sqrt(prev) * beta / (1 - abar),
                math.sqrt(abar / prev) * (1 - prev) / (1 - abar),
            )
            sigma = math.sqrt(posterior if variance == "fixed_small" else beta)
        else:
            sigma = eta * math.sqrt(posterior)
            of_eps = math.sqrt(max(0.0, 1 - prev - sigma**2))
            of_x0, of_x = math.sqrt(prev) - of_eps * a / b, of_eps / b
        steps.append((of_x0 * k + of_x, of_x0 * (m - k * a * m), sigma if i else 0.0))
    return steps


def walked(steps, x, rng):
    for A, B, sigma in steps:
        x = A * x + B
        if sigma:
            x = x + sigma * rng.standard_normal(x.shape)
    return x


def visited(schedule, steps):
    timesteps = np.round(np.linspace(0, schedule.T - 1, steps)).astype(int) if steps > 1 else [schedule.T - 1]
    return schedule.alphas_cumprod[timesteps]


CHOICES = [
    ("ddpm", 0.0, "fixed_small"),
    ("ddpm", 0.0, "fixed_large"),
    ("ddim", 0.0, "fixed_small"),
    ("ddim", 0.5, "fixed_small"),
    ("ddim", 1.0, "fixed_small"),
]


# The walk


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(CHOICES),
    st.sampled_from(PREDICTIONS),
    st.sampled_from(list(SCHEDULES)),
    st.integers(1, 60),
    st.data(),
    st.integers(0, 2**32 - 1),
)
def test_every_walk_is_the_closed_recursion(choice, prediction, kind, T, data, seed):
    sampler, eta, variance = choice
    steps = data.draw(st.integers(1, T))
    diffusion = td.GaussianDiffusion(SCHEDULES[kind](T=T), prediction, variance)
    x_T = np.random.default_rng(seed).standard_normal((3, 2))
    start = x_T.copy()
    x = td.sample(
        exact_denoiser(diffusion),
        diffusion,
        (3, 2),
        sampler,
        steps,
        rng=np.random.default_rng(seed),
        eta=eta,
        x_T=x_T,
        progress=False,
    )
    abars = visited(diffusion.schedule, steps)
    expected = walked(affine_steps(abars, sampler, eta, variance), start, np.random.default_rng(seed))
    # One long jump to almost nothing keeps abar to 1e-16 absolute only (`respace`); eps divides by its root.
    rounding = 1e-16 / abars[-1] if prediction == "eps" else 0.0
    assert_allclose(x, expected, rtol=1e-10, atol=1e-10 + rounding)
    assert_array_equal(x_T, start)  # the caller's array is left alone


def walk_of_the_papers(network, diffusion, times, x, sampler, eta, clip, rng):
    """Each sampler as it stands in its paper, of a network that is not linear; the notation is theirs.

    Ho et al. 2020, eq. 7 and algorithm 2; Nichol & Dhariwal 2021, eq. 15; Song, Meng & Ermon 2021, eq. 12 and
    16; Lu et al. 2022, algorithm 2; Karras et al. 2022, algorithm 1.
    """
    abar, prediction = diffusion.schedule.alphas_cumprod, diffusion.prediction

    def seen(x, t):
        output = network(x, np.full(len(x), t))
        y, a, s = output[:, :2], np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        x0 = {"eps": (x - s * y) / a, "x0": y, "v": a * x - s * y, "flow": (x - s * y) / (a + s)}[prediction]
        x0 = np.clip(x0, -1, 1) if clip else x0
        return x0, (x - a * x0) / s, output[:, 2:]

    before = None  # lambda and the data of the step before
    for t, u in zip(times[::-1], times[-2::-1]):
        (x0, eps, nu), z = seen(x, t), rng.standard_normal(x.shape) if sampler == "ddpm" or eta else 0
        beta = 1 - abar[t] / abar[u]
        small = beta * (1 - abar[u]) / (1 - abar[t])
        (alpha, sigma), (alpha_u, sigma_u) = (np.sqrt([abar[i], 1 - abar[i]]) for i in (t, u))
        if sampler == "ddpm":
            v = {"fixed_small": 0, "fixed_large": 1}.get(diffusion.variance, (nu + 1) / 2)
            mean = alpha_u * beta / (1 - abar[t]) * x0 + np.sqrt(1 - beta) * sigma_u**2 / (1 - abar[t]) * x
            x = mean + np.exp((v * np.log(beta) + (1 - v) * np.log(small)) / 2) * z
        elif sampler == "ddim":
            x = alpha_u * x0 + np.sqrt(1 - abar[u] - eta**2 * small) * eps + eta * np.sqrt(small) * z
        elif sampler == "dpm++":
            lam, h = np.log(alpha / sigma), np.log(alpha_u / sigma_u) - np.log(alpha / sigma)
            D = x0
            if before is not None:
                r = (lam - before[0]) / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[1]
            before = lam, x0
            x = sigma_u / sigma * x - alpha_u * np.expm1(-h) * D
        else:
            x0_u, eps_u, _ = seen(alpha_u * x0 + sigma_u * eps, u)
            if sampler == "edm":
                x = alpha_u * (x / alpha + (sigma_u / alpha_u - sigma / alpha) * (eps + eps_u) / 2)
            else:
                v, v_u = alpha * eps - sigma * x0, alpha_u * eps_u - sigma_u * x0_u
                x = x + (np.arctan2(sigma_u, alpha_u) - np.arctan2(sigma, alpha)) * (v + v_u) / 2
    return seen(x, times[0])[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "eta", "variance"),
    [
        *(("ddpm", 0.0, variance) for variance in ("fixed_small", "fixed_large", "learned_range")),
        *(("ddim", eta, "learned_range") for eta in (0.0, 0.4, 1.0)),
        *((sampler, 0.0, "learned_range") for sampler in ("dpm++", "heun", "edm")),
    ],
)
def test_every_step_is_that_of_its_paper(sampler, eta, variance, prediction):
    """Of any network, with and without clipping, at times as uneven as one likes."""
    rng = np.random.default_rng(0)
    W, M = rng.standard_normal((2, 2)), rng.standard_normal((2, 4 if variance == "learned_range" else 2))
    network = lambda x, t: np.tanh(x @ W + np.sin(0.37 * t)[:, None]) @ M  # noqa: E731
    x_T = rng.standard_normal((5, 2))
    for kind, T, times in [("linear", 1, [0]), ("cosine", 2, [0, 1]), ("linear", 1000, [2, 3, 40, 700, 999])]:
        diffusion = td.GaussianDiffusion(SCHEDULES[kind](T), prediction, variance)
        for clip in (False, True):
            one, again = (np.random.default_rng(1) for _ in range(2))
            how = dict(eta=eta, clip=clip, x_T=x_T, rng=one)
            states = td.iterate_samples(network, diffusion, (5, 2), sampler, times, **how)
            expected = walk_of_the_papers(network, diffusion, times, x_T, sampler, eta, clip, again)
            assert_allclose(list(states)[-1].x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta", "variance"), CHOICES)
def test_samples_have_the_mean_and_variance_of_the_recursion(sampler, eta, variance, prediction):
    # The start drawn by the sampler itself, in float32. z-test and chi^2 test: each false alarm 1e-6.
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=50), prediction, variance)
    n, D = 20_000, 2
    x = td.sample(
        exact_denoiser(diffusion),
        diffusion,
        (n, D),
        sampler,
        20,
        rng=np.random.default_rng(7),
        eta=eta,
        progress=False,
    )
    mean, var = 0.0, 1.0
    for A, B, sigma in affine_steps(visited(diffusion.schedule, 20), sampler, eta, variance):
        mean, var = A * mean + B, A**2 * var + sigma**2
    z = (np.mean(x) - mean) * math.sqrt(n * D / var)
    assert 2 * stats.norm.sf(abs(z)) > 1e-6
    tail = stats.chi2.cdf(np.sum((x - mean) ** 2) / var, n * D)
    assert 2 * min(tail, 1 - tail) > 1e-6


def test_many_steps_find_the_data():
    # The recursion is itself an approximation to N(m, s^2): its error falls as 1 / steps.
    diffusion = td.GaussianDiffusion(td.cosine_schedule(T=4000), "v")
    x_T = np.array([[-1.0], [1.0]])
    errors = []
    for steps in (50, 200, 800):
        low, high = td.sample(
            exact_denoiser(diffusion),
            diffusion,
            (2, 1),
            "ddim",
            steps,
            rng=np.random.default_rng(0),
            x_T=x_T,
            progress=False,
        )[:, 0]
        assert_allclose((low + high) / 2, M, rtol=1e-4)
        errors.append(abs((high - low) / 2 - S))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 2e-3


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(PREDICTIONS), st.integers(1, 40), st.data(), st.booleans(), st.integers(0, 2**32 - 1))
def test_ddim_with_eta_1_is_ancestral_with_fixed_small(prediction, T, data, clip, seed):
    diffusion = td.GaussianDiffusion(td.cosine_schedule(T=T), prediction, "fixed_small")
    x_T = np.random.default_rng(seed).standard_normal((4, 3))

    def denoise(x, t):  # not linear, and not the truth either
        return np.tanh(x * (1 + t[:, None] / T)) + 0.1

    ends = [
        td.sample(
            denoise,
            diffusion,
            x_T.shape,
            sampler,
            steps=data.draw(st.shared(st.integers(1, T), key="steps")),
            rng=np.random.default_rng(seed),
            eta=eta,
            clip=clip,
            x_T=x_T,
            progress=False,
        )
        for sampler, eta in [("ddpm", 0.0), ("ddim", 1.0)]
    ]
    assert_allclose(ends[0], ends[1], rtol=1e-11, atol=1e-12 * max(1, np.max(np.abs(ends[0]))))


# What is handed out


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, None])
def test_states(sampler, steps):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=20))
    asked = []

    def denoise(x, t):
        assert t.shape == (3,)
        assert t.dtype == np.int64
        asked.append(t.tolist())
        return 0.1 * x

    arguments = (denoise, diffusion, (3, 2), sampler, steps)
    states = list(td.iterate_samples(*arguments, rng=np.random.default_rng(0)))
    count = 20 if steps is None else steps
    assert [state.steps_left for state in states] == list(range(count, -1, -1))
    times = [state.t for state in states]
    assert times[0] == 19
    assert times[-1] == -1
    assert count == 1 or times[-2] == 0
    assert all(later < earlier for earlier, later in pairwise(times))
    assert asked == [[t] * 3 for t in times[:-1]]  # the schedule's own times, also with fewer steps
    assert states[0].x0 is None
    assert_array_equal(states[-1].x, states[-1].x0)  # the last step takes the mean, which is x0
    for before, state in pairwise(states):
        assert_allclose(state.x0, diffusion.predict_x0(before.x, before.t, 0.1 * before.x), rtol=2e-6)
    x = td.sample(*arguments, rng=np.random.default_rng(0), progress=False)
    assert_array_equal(x, states[-1].x)
    assert x.dtype == np.float32


def test_the_start_is_standard_normal_or_given():
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=5))
    start = next(td.iterate_samples(lambda x, t: x, diffusion, (4, 2), rng=np.random.default_rng(1)))
    assert_array_equal(start.x, np.random.default_rng(1).standard_normal((4, 2), dtype=np.float32))
    x_T = np.ones((4, 2))
    start = next(td.iterate_samples(lambda x, t: x, diffusion, (4, 2), rng=np.random.default_rng(1), x_T=x_T))
    assert_array_equal(start.x, x_T)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_bounds_every_x0(sampler):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=20), "x0")

    def ends(clip):
        return list(
            td.iterate_samples(
                lambda x, t: 3 * x, diffusion, (50, 2), sampler, rng=np.random.default_rng(0), clip=clip
            )
        )[1:]

    assert max(np.max(np.abs(state.x0)) for state in ends(False)) > 1
    clipped = ends(True)
    assert max(np.max(np.abs(state.x0)) for state in clipped) == 1
    assert np.max(np.abs(clipped[-1].x)) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_rng_decides_everything(sampler):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))

    def draw(seed):
        return td.sample(
            lambda x, t: 0.5 * x, diffusion, (5, 2), sampler, rng=np.random.default_rng(seed), progress=False
        )

    assert_array_equal(draw(0), draw(0))
    assert np.all(draw(0) != draw(1))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_walk_apart_and_come_together(batch_size):
    # Without noise on the way, batches change nothing but the number of samples seen at a time.
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    x_T = np.random.default_rng(0).standard_normal((7, 2))
    sizes = []

    def denoise(x, t):
        sizes.append(x.shape[0])
        return np.tanh(x)

    arguments = dict(sampler="ddim", steps=4, rng=np.random.default_rng(0), x_T=x_T, progress=False)
    whole = td.sample(denoise, diffusion, (7, 2), **arguments)
    sizes.clear()
    parts = td.sample(denoise, diffusion, (7, 2), **arguments, batch_size=batch_size)
    assert_allclose(parts, whole, rtol=1e-13)
    assert sum(sizes) == 4 * 7
    assert max(sizes) == min(batch_size, 7)


def test_noise_differs_between_batches():
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    x = td.sample(
        lambda x, t: 0.5 * x, diffusion, (6, 2), rng=np.random.default_rng(0), batch_size=2, progress=False
    )
    assert x.shape == (6, 2)
    assert np.unique(x).size == 12


def test_progress(capsys):
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=5))
    for progress in (False, True):
        td.sample(
            lambda x, t: x, diffusion, (2, 1), rng=np.random.default_rng(0), batch_size=1, progress=progress
        )
        out, err = capsys.readouterr()
        assert out == ""
        assert ("sampling" in err and "/10" in err) if progress else err == ""


# Whom it asks


def test_a_model_is_asked_by_predict_and_lives_beside_its_weights():
    class Recorded(td.MLP):
        def __call__(self, x, t, rng=None):
            raise AssertionError("sampling needs no backward")

        def predict(self, x, t):
            return 0.5 * x

    diffusion = td.GaussianDiffusion(td.linear_schedule(T=5))
    model = Recorded(hidden=4, blocks=1, time_features=4)
    for dtype in (np.float32, np.float64):
        model.to(np, dtype)
        x = td.sample(model, diffusion, (3, 2), rng=np.random.default_rng(0), progress=False)
        assert x.dtype == dtype
        start = np.random.default_rng(0)
        x_T = start.standard_normal((3, 2), dtype=dtype)
        by_callable = td.sample(lambda x, t: 0.5 * x, diffusion, (3, 2), rng=start, x_T=x_T, progress=False)
        assert_array_equal(x, by_callable)


def test_a_chain_that_ends_in_pure_noise_cannot_do_with_eps():
    schedule = td.cosine_schedule(T=10, max_beta=1.0)
    for prediction in ("x0", "v", "flow"):
        diffusion = td.GaussianDiffusion(schedule, prediction)
        for sampler in ("ddpm", "ddim"):
            x = td.sample(
                exact_denoiser(diffusion),
                diffusion,
                (3, 2),
                sampler,
                rng=np.random.default_rng(0),
                progress=False,
            )
            assert np.all(np.isfinite(x))
    eps, x = td.GaussianDiffusion(schedule), np.ones((3, 2))
    for steps in (None, 4):  # the time is named at the call, as the caller counts it
        for asks in (
            lambda n: td.iterate_samples(lambda x, t: x, eps, x.shape, steps=n, rng=np.random.default_rng(0)),
            lambda n: td.ode_log_likelihood(lambda x, t: (x, lambda dy: dy), eps, x, n, progress=False),
        ):
            says = "nothing of x0 at t = 9, where alphas_cumprod is 0; expected 'x0', 'v' or 'flow', or steps"
            with pytest.raises(ValueError, match=says):
                asks(steps)


# What is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sampler": "euler"}, "sampler is 'euler'; expected one of 'ddpm', 'ddim'"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": 1.1}, "eta is 1.1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"eta": True}, "eta is True"),
        ({"eta": 0.5}, "eta is 0.5; expected 0: the sampler 'ddpm' has none"),
        ({"eta": 1, "sampler": "heun"}, "eta is 1; expected 0: the sampler 'heun' has none"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 11}, "steps is 11; expected at most T = 10"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": []}, r"^steps has shape \(0,\)"),
        ({"steps": [0.0, 9.0]}, "^steps has dtype float64"),
        ({"steps": [0, 10]}, r"^steps\[1\] is 10; expected .* integers in 0 \.\.\. 9"),
        ({"shape": ()}, r"shape is \(\)"),
        ({"shape": (0, 2)}, r"shape is \(0, 2\)"),
        ({"shape": 2}, r"shape is 2; expected \(N, \.\.\.\)"),
        ({"shape": (4.0, 2)}, r"shape is \(4\.0, 2\)"),
        ({"x_T": np.zeros((4, 2))}, r"x_T has shape \(4, 2\); expected \(3, 2\)"),
    ],
)
def test_what_does_not_fit_is_named_at_the_call(change, match):
    arguments = dict(shape=(3, 2), rng=np.random.default_rng(0)) | change
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    with pytest.raises(ValueError, match=match):
        td.iterate_samples(lambda x, t: x, diffusion, **arguments)  # before the first state is asked for
    with pytest.raises(ValueError, match=match):
        td.sample(lambda x, t: x, diffusion, **arguments, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (np.zeros((3, 2)), "numpy array of float64"),
        (np.zeros((3, 2), np.int64), "numpy array of int64"),
        (strict.zeros((3, 2), dtype=strict.float32), "array_api_strict array of array_api_strict.float32"),
    ],
    ids=["dtype", "integers", "library"],
)
def test_what_is_not_like_a_models_weights_is_named_as_the_caller_knows_it(x, came):
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    learned, rng = td.LearnedSchedule(), np.random.default_rng(0)
    shape, how = (3, 2), dict(rng=rng, x_T=x)
    for name, call in [
        ("x_T", lambda: td.iterate_samples(model, diffusion, shape, **how)),  # before a state is asked for
        ("x_T", lambda: td.sample(model, diffusion, shape, workers=2, progress=False, **how)),
        ("x0", lambda: td.invert(model, diffusion, x, progress=False)),
        ("x0", lambda: td.training_loss(model, diffusion, x, rng)),
        ("x0", lambda: td.learned_schedule_loss(model, learned, x, rng)),
        ("x", lambda: td.ode_log_likelihood(model, diffusion, x, progress=False)),
    ]:
        with pytest.raises(ValueError, match=rf"^{name} is a {came}; the model's weights are numpy arrays"):
            call()


def test_a_schedule_in_the_place_of_a_process_is_named():
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    schedule, rng = td.linear_schedule(T=10), np.random.default_rng(0)
    x, t = np.zeros((3, 2), np.float32), np.zeros(3, int)
    mixture = td.GaussianMixture([1, 1], [[0, 0], [1, 1]], 0.1)
    for call in [
        lambda: td.iterate_samples(model, schedule, (3, 2), rng=rng),
        lambda: td.sample(model, schedule, (3, 2), rng=rng, progress=False),
        lambda: td.invert(model, schedule, x, progress=False),
        lambda: td.ode_log_likelihood(model, schedule, x, progress=False),
        lambda: td.training_loss(model, schedule, x, rng),
        lambda: td.find_batch_size(model, schedule, x),
        lambda: td.variational_bound(model, schedule, x, rng=rng, progress=False),
        lambda: td.bits_per_dim(model, schedule, x - 1, rng=rng, progress=False),
        lambda: td.simple_loss(schedule, x, x, t, x),
        lambda: td.vlb_loss(schedule, x, x, t, x),
        lambda: td.hybrid_loss(schedule, x, x, t, x),
        lambda: td.min_snr_weight(schedule, t),
        lambda: step_term(schedule, x, x, x, t),
        lambda: prior_term(schedule, x),
        lambda: mixture.marginal(schedule, 0),
        lambda: mixture.posterior_mean(schedule, x, t),
        lambda: mixture.posterior_covariance(schedule, x, t),
        lambda: mixture.denoiser(schedule),
        lambda: mixture.optimal_bound(schedule),
    ]:
        with pytest.raises(TypeError, match=r"^diffusion is a NoiseSchedule; expected a GaussianDiffusion"):
            call()


@pytest.mark.parametrize("denoise", [td.MLP, 3, None])
def test_what_predicts_nothing_is_named(denoise):
    diffusion, rng = td.GaussianDiffusion(td.linear_schedule(T=10)), np.random.default_rng(0)
    for walk in (td.iterate_samples, td.sample):
        with pytest.raises(TypeError, match=r"^denoise is .*; expected a network, or another function"):
            walk(denoise, diffusion, (3, 2), rng=rng)


def test_what_train_returns_is_told_from_its_model():
    diffusion, rng = td.GaussianDiffusion(td.linear_schedule(T=10)), np.random.default_rng(0)
    result = td.training.TrainingResult(td.MLP(), np.zeros(1), 0.0)
    said = "^denoise is a TrainingResult; expected a network, .*; its attribute model is one\\.$"
    x = np.zeros((3, 2), np.float32)
    for call in (
        lambda: td.sample(result, diffusion, (3, 2), rng=rng),
        lambda: td.invert(result, diffusion, x),
        lambda: td.variational_bound(result, diffusion, x, rng=rng),
        lambda: td.continuous_bound(result, td.LearnedSchedule(), x, rng=rng),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(TypeError, match=said.replace("denoise", "model")):
        td.ode_log_likelihood(result, diffusion, x)
    with pytest.raises(TypeError, match=said.replace("denoise", "model")):
        td.training_loss(result, diffusion, x, rng)
    with pytest.raises(TypeError, match=said.replace("denoise", "model")):
        td.learned_schedule_loss(result, td.LearnedSchedule(), x, rng)
    with pytest.raises(TypeError, match=r"^model is a TrainingResult; expected a UNet, an MLP, or another"):
        td.find_batch_size(result, diffusion, x)


def test_a_state_may_be_written_into():
    """As inpainting does; the start that was given is another's."""
    diffusion, rng = td.GaussianDiffusion(td.linear_schedule(T=10)), np.random.default_rng(0)
    x_T = rng.standard_normal((3, 2))
    given = x_T.copy()
    for state in td.iterate_samples(lambda x, t: x, diffusion, (3, 2), rng=rng, x_T=x_T):
        state.x[0] = 7.0
    assert_array_equal(x_T, given)


@pytest.mark.parametrize(
    ("x", "what"),
    [([[0.0, 0.0]], "a list"), (SimpleNamespace(shape=(1, 2), ndim=2), "a SimpleNamespace")],  # or a table
)
def test_what_is_no_array_is_named(x, what):
    model = td.MLP(hidden=4, blocks=1, time_features=4)
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    rng = np.random.default_rng(0)
    for name, call in [
        ("x_T", lambda: td.sample(model, diffusion, (1, 2), rng=rng, x_T=x, progress=False)),
        ("x0", lambda: td.invert(model, diffusion, x, progress=False)),
        ("x0", lambda: td.training_loss(model, diffusion, x, rng)),
        ("x0", lambda: td.learned_schedule_loss(model, td.LearnedSchedule(), x, rng)),
        ("x", lambda: td.ode_log_likelihood(model, diffusion, x, progress=False)),
        ("data", lambda: td.variational_bound(model, diffusion, x, rng=rng, progress=False)),
        ("data", lambda: td.continuous_bound(model, td.LearnedSchedule(), x, rng=rng, progress=False)),
        ("x", lambda: td.GaussianMixture([1], [[0, 0]], 1).log_prob(x)),
    ]:
        with pytest.raises(TypeError, match=f"^{name} is {what}; expected an array"):
            call()


def test_batch_size_at_least_one():
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    with pytest.raises(ValueError, match="batch_size is 0"):
        td.sample(
            lambda x, t: x, diffusion, (3, 2), rng=np.random.default_rng(0), batch_size=0, progress=False
        )


@pytest.mark.parametrize(
    ("schedule", "sampler", "steps", "warned"),
    [
        (td.cosine_schedule(100), "edm", 20, True),
        (td.cosine_schedule(100), "edm", 50, False),
        (td.cosine_schedule(100), "edm", 1, False),
        (td.linear_schedule(100), "edm", 5, False),
        (td.cosine_schedule(100), "heun", 5, False),
        (td.cosine_schedule(100, max_beta=1.0), "heun", 5, False),
    ],
)
def test_a_first_step_of_edm_that_overshoots_is_told(schedule, sampler, steps, warned):
    diffusion, rng = td.GaussianDiffusion(schedule, "x0"), np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        td.sample(lambda x, t: x, diffusion, (3, 2), sampler, steps, rng=rng, batch_size=2, progress=False)
    assert len(said) == warned
    if warned:
        assert "divided by 158 in the first of 20 steps" in str(said[0].message)
        assert said[0].filename == __file__


@pytest.mark.parametrize(
    ("schedule", "steps", "left"),
    [
        (td.linear_schedule(), None, None),
        (td.linear_schedule(), list(range(0, 300, 30)), "t = 270, where 0.47 of"),
        (td.linear_schedule(100, 1e-4, 0.02), 10, "t = 99, where 0.36 of"),
        (td.cosine_schedule(), list(range(0, 800, 100)), "t = 700, where 0.2 of"),
        (td.cosine_schedule(), list(range(0, 1000, 100)), None),
    ],
)
def test_pure_noise_where_data_are_left_is_told(schedule, steps, left):
    diffusion, rng = td.GaussianDiffusion(schedule, "x0"), np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for x_T in (None, np.zeros((3, 2))):
            td.sample(lambda x, t: x, diffusion, (3, 2), "ddim", steps, rng=rng, x_T=x_T, progress=False)
    assert len(said) == (left is not None)
    if left:
        assert left in str(said[0].message) and said[0].filename == __file__


def test_an_output_of_the_wrong_shape_is_named():
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=10))
    with pytest.raises(ValueError, match="output"):
        td.sample(lambda x, t: x[:, :1], diffusion, (3, 2), rng=np.random.default_rng(0), progress=False)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_a_variance_that_rounds_to_more_than_the_noise_there_is(sampler, eta):
    """beta~_1 is 1 - abar_0 but for 1e-20 of it; here it is rounded up, and nothing is left for eps."""
    schedule = td.NoiseSchedule([1e-20, 0.037])
    assert schedule.posterior_variance[1] > schedule.one_minus_alphas_cumprod_prev[1]
    diffusion, rng = td.GaussianDiffusion(schedule, "x0"), np.random.default_rng(0)
    x = td.sample(lambda x, t: 0 * x, diffusion, (4, 2), sampler, eta=eta, rng=rng, progress=False)
    assert_array_equal(x, 0)
