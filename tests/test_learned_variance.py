"""Learned reverse variances, the losses that teach them, the weights of the simple loss, the choice of t."""

import array_api_strict as strict
import numpy as np
import pytest
from gradients import Case, as_layer, assert_central_differences_agree, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tinydiff.bound import step_term
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.importance import LossSecondMomentSampler
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss, vlb_loss
from tinydiff.mixture import GaussianMixture
from tinydiff.samplers import sample
from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule

PREDICTIONS = ["eps", "x0", "v", "flow"]
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_schedule = pytest.mark.parametrize(
    "schedule",
    [linear_schedule(20), cosine_schedule(20), linear_schedule(2)],
    ids=["linear", "cosine", "two"],
)
seeds = st.integers(0, 2**32 - 1)


def batch(diffusion, shape, seed=0):
    """(output, x0, t, noise, x_t), the first and the last of t among them."""
    rng = np.random.default_rng(seed)
    x0, noise = rng.standard_normal((2, *shape))
    t = rng.integers(diffusion.T, size=shape[0])
    t[0], t[-1] = 0, diffusion.T - 1
    width = 2 if diffusion.variance == "learned_range" else 1
    output = rng.standard_normal((*shape[:-1], width * shape[-1]))
    return output, x0, t, noise, diffusion.q_sample(x0, t, noise)


# The reverse step


@every_prediction
@every_schedule
def test_extremes_are_the_fixed_variances(prediction, schedule):
    learned = GaussianDiffusion(schedule, prediction, "learned_range")
    x_t = np.random.default_rng(0).standard_normal((schedule.T, 3, 2))
    first = np.random.default_rng(1).standard_normal(x_t.shape)
    t = np.arange(schedule.T)
    for nu, variance in [(-1.0, "fixed_small"), (1.0, "fixed_large")]:
        fixed = GaussianDiffusion(schedule, prediction, variance)
        output = np.concat([first, np.full_like(first, nu)], axis=-1)
        mean, learned_variance = learned.p_mean_variance(x_t, t, output)
        expected_mean, expected = fixed.p_mean_variance(x_t, t, first)
        assert_array_equal(mean, expected_mean)
        assert learned_variance.shape == x_t.shape
        expected = np.broadcast_to(expected, x_t.shape)
        assert_allclose(learned_variance[1:], expected[1:], rtol=1e-13)
        assert_allclose(
            learned_variance[0], schedule.posterior_variance[1] if nu < 0 else expected[0], rtol=1e-13
        )
        assert_allclose(
            learned.model_log_variance(x_t, t, output),
            np.broadcast_to(fixed.model_log_variance(x_t, t, first), x_t.shape),
            rtol=1e-14,
            atol=1e-15,  # near variance 1, of which the logarithm is 0
        )


@every_schedule
def test_between_the_extremes_it_is_their_geometric_mean(schedule):
    """Not the arithmetic mean: the interpolation is between logarithms. And it goes on beyond them."""
    learned = GaussianDiffusion(schedule, "x0", "learned_range")
    t = np.arange(1, schedule.T)
    small, large = schedule.posterior_variance[t], schedule.betas[t]
    zero = np.zeros((t.size, 1))
    for nu in (-1.5, -0.5, 0.0, 0.3, 2.0):
        _, variance = learned.p_mean_variance(zero, t, np.concat([zero, zero + nu], axis=1))
        assert_allclose(variance[:, 0], large ** ((1 + nu) / 2) * small ** ((1 - nu) / 2), rtol=1e-12)


def test_each_element_has_its_own_variance():
    diffusion = GaussianDiffusion(linear_schedule(5), "x0", "learned_range")
    output, _, t, _, x_t = batch(diffusion, (3, 2, 2))
    _, variance = diffusion.p_mean_variance(x_t, t, output)
    output[1, 0, 3] += 1  # nu of sample 1, pixel 0, channel 1
    _, moved = diffusion.p_mean_variance(x_t, t, output)
    assert_array_equal(np.argwhere(moved != variance), [[1, 0, 1]])


@every_prediction
def test_the_second_half_is_not_part_of_the_prediction(prediction):
    learned = GaussianDiffusion(linear_schedule(5), prediction, "learned_range")
    fixed = GaussianDiffusion(learned.schedule, prediction)
    output, x0, t, _, x_t = batch(learned, (4, 3, 2))
    first = output[..., :2]
    for method in ("predict_x0", "predict_eps", "predict_v"):
        assert_array_equal(getattr(learned, method)(x_t, t, output), getattr(fixed, method)(x_t, t, first))
        # What is given by name is not a network's output, and has one half only.
        estimate = getattr(learned, method)(x_t, t, x0, given="x0")
        assert_array_equal(estimate, getattr(fixed, method)(x_t, t, x0, given="x0"))
    for clip in (False, True):
        mean, _ = learned.p_mean_variance(x_t, t, output, clip)
        assert_array_equal(mean, fixed.p_mean_variance(x_t, t, first, clip)[0])


def test_a_single_step_has_one_variance():
    diffusion = GaussianDiffusion(NoiseSchedule([0.3]), "x0", "learned_range")
    _, variance = diffusion.p_mean_variance(np.zeros((2, 1)), 0, np.array([[0.0, -1.0], [0.0, 1.0]]))
    assert_allclose(variance, 0.3, rtol=1e-14)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [7, 20])
def test_samplers_take_both_halves(sampler, steps):
    mixture = GaussianMixture([1, 1], [[-1.0, 0], [1, 0]], 0.1)
    diffusion = GaussianDiffusion(linear_schedule(20), "eps", "learned_range")
    # A denoiser of 20 steps; on 7, nu is only a choice in the wider range of the longer steps.
    x = sample(
        mixture.denoiser(diffusion),
        diffusion,
        (50, 2),
        sampler,
        steps,
        rng=np.random.default_rng(0),
        progress=False,
    )
    assert x.shape == (50, 2) and np.all(np.isfinite(x))
    assert np.mean(np.min(np.linalg.norm(x[:, None] - mixture.means, axis=2), axis=1)) < 1


def test_outputs_of_the_wrong_size_are_named():
    diffusion = GaussianDiffusion(linear_schedule(5), "eps", "learned_range")
    for method in (diffusion.predict_x0, diffusion.p_mean_variance, diffusion.model_log_variance):
        with pytest.raises(ValueError, match=r"output has shape \(3, 2\).*learned_range.*prediction and nu"):
            method(np.zeros((3, 2)), 0, np.zeros((3, 2)))
        with pytest.raises(ValueError, match="output has dtype int64"):
            method(np.zeros((3, 2)), 0, np.zeros((3, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="output has shape"):
        diffusion.predict_x0(np.zeros(4), 0, np.zeros(8))
    with pytest.raises(ValueError, match=r"output has shape \(3, 4\)"):
        GaussianDiffusion(linear_schedule(5)).predict_x0(np.zeros((3, 2)), 0, np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"variance is 'learned'; expected one of .*'learned_range'"):
        GaussianDiffusion(linear_schedule(5), "eps", "learned")


@pytest.mark.parametrize("loss", [simple_loss, vlb_loss, hybrid_loss])
def test_an_output_of_another_library_is_named(loss):
    diffusion, x0 = GaussianDiffusion(linear_schedule(5), "eps", "learned_range"), np.zeros((3, 2))
    output = strict.zeros((3, 4))
    with pytest.raises(TypeError, match=r"^output is an array of array_api_strict; expected numpy, like x_t"):
        loss(diffusion, output, x0, np.array([0, 1, 4]), x0)


def test_tables_survive_betas_of_any_size():
    for betas in ([1e-300, 1e-300, 0.5], [1.0, 1.0], [5e-324, 0.1], [5e-324] * 2, [0.999, 1e-12]):
        diffusion = GaussianDiffusion(NoiseSchedule(betas), "x0", "learned_range")
        for table in diffusion.log_variance_range:
            assert np.all(np.isfinite(table)), betas


# Losses


@every_prediction
@settings(max_examples=10)
@given(seed=seeds)
def test_simple_loss_teaches_the_prediction_only(prediction, seed):
    learned = GaussianDiffusion(linear_schedule(6), prediction, "learned_range")
    fixed = GaussianDiffusion(learned.schedule, prediction)
    output, x0, t, noise, _ = batch(learned, (4, 2, 3), seed)
    value, gradient = simple_loss(learned, output, x0, t, noise)
    expected, expected_gradient = simple_loss(fixed, output[..., :3], x0, t, noise)
    assert value == expected
    assert_array_equal(gradient, np.concat([expected_gradient, np.zeros_like(expected_gradient)], axis=-1))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@every_prediction
@settings(max_examples=10)
@given(seed=seeds)
def test_vlb_loss_is_the_bound_in_bits_per_dimension(prediction, variance, seed):
    diffusion = GaussianDiffusion(linear_schedule(6), prediction, variance)
    output, x0, t, noise, x_t = batch(diffusion, (4, 2, 3), seed)
    weights = np.random.default_rng(seed).uniform(0.1, 2, 4)
    terms, _ = step_term(diffusion, output, x0, x_t, t)
    value, _ = vlb_loss(diffusion, output, x0, t, noise, weights=weights)
    rounding = dict(rtol=1e-12, atol=1e-14)  # terms of a density cancel
    assert_allclose(value, 6 * np.mean(weights * terms) / (6 * np.log(2)), **rounding)  # T / (D log 2)
    assert_allclose(vlb_loss(diffusion, output, x0, t, noise)[0], np.mean(terms) / np.log(2), **rounding)

    layer = as_layer(lambda output: vlb_loss(diffusion, output, x0, t, noise, weights=weights))
    assert_central_differences_agree(Case(layer, [frozen(output)]), np.random.default_rng(seed))


@pytest.mark.parametrize("decoder", ["density", "8bit"])
@every_prediction
@settings(max_examples=5)
@given(seed=seeds)
def test_hybrid_loss_stops_the_mean(prediction, decoder, seed):
    diffusion = GaussianDiffusion(linear_schedule(6), prediction, "learned_range")
    output, x0, t, noise, _ = batch(diffusion, (4, 3), seed)
    x0 = 2 * np.round(np.clip(x0, -1, 1) * 127.5 + 127.5) / 255 - 1  # 8-bit levels
    weights = np.random.default_rng(seed).uniform(0.1, 2, 4)  # of L_simple only

    def hybrid(output):
        how = dict(vlb_weight=0.5, decoder=decoder, weights=weights)
        return hybrid_loss(diffusion, output, x0, t, noise, **how)

    value, gradient = hybrid(output)
    simple, simple_gradient = simple_loss(diffusion, output, x0, t, noise, weights)
    vlb, vlb_gradient = vlb_loss(diffusion, output, x0, t, noise, decoder=decoder)
    assert_allclose(value, simple + 0.5 * vlb, rtol=1e-12)
    # On the prediction nothing but L_simple, though L_vlb would have something to say;
    assert_array_equal(gradient[:, :3], simple_gradient[:, :3])
    assert np.max(abs(vlb_gradient[:, :3])) > 1e-3
    # on nu the derivative of the whole, by differences.
    h = 1e-5
    for index in np.ndindex(4, 3):
        step = np.zeros_like(output)
        step[index[0], 3 + index[1]] = h
        up, down = hybrid(output + step)[0], hybrid(output - step)[0]
        assert_allclose(
            gradient[index[0], 3 + index[1]], (up - down) / (2 * h), rtol=1e-6, atol=1e-6 * abs(value)
        )


def test_a_weight_that_is_a_numpy_number_makes_no_float64():
    diffusion = GaussianDiffusion(linear_schedule(6), variance="learned_range")
    output, x0, t, noise, _ = batch(diffusion, (4, 3))
    output, x0, noise = (a.astype(np.float32) for a in (output, x0, noise))
    value, gradient = hybrid_loss(diffusion, output, x0, t, noise, vlb_weight=np.float64(0.5))
    assert value.dtype == gradient.dtype == np.float32


def test_hybrid_loss_needs_a_variance_to_learn():
    diffusion = GaussianDiffusion(linear_schedule(6))
    output, x0, t, noise, _ = batch(diffusion, (4, 3))
    with pytest.raises(ValueError, match="diffusion has variance 'fixed_small'; expected 'learned_range'"):
        hybrid_loss(diffusion, output, x0, t, noise)


def test_the_best_variance_is_where_the_gradient_vanishes():
    """Averaged over the data, L_vlb's gradient with respect to nu is 0 at the exact denoiser's (5 sigma)."""
    mixture = GaussianMixture([0.3, 0.7], [[-1.2], [0.5]], [0.1, 0.3])
    diffusion = GaussianDiffusion(linear_schedule(10), "eps", "learned_range")
    rng, n = np.random.default_rng(0), 20_000
    x0, noise, t = mixture.sample(n, rng), rng.standard_normal((n, 1)), np.arange(n) % 10
    output = mixture.denoiser(diffusion)(diffusion.q_sample(x0, t, noise), t)
    _, gradient = vlb_loss(diffusion, output, x0, t, noise)
    for i in range(10):
        for half in gradient[t == i].T:
            assert abs(np.mean(half)) < 5 * np.std(half) / np.sqrt(n / 10)
    _, elsewhere = vlb_loss(diffusion, output + np.array([0, 0.5]), x0, t, noise)
    # Not at t = 0, where the two ends of the range are almost one.
    for i in range(1, 10):
        half = elsewhere[t == i, 1]
        assert np.mean(half) > 5 * np.std(half) / np.sqrt(n / 10)


@pytest.mark.parametrize("loss", [simple_loss, vlb_loss, hybrid_loss])
def test_losses_under_array_api_strict_and_in_float32(loss):
    diffusion = GaussianDiffusion(linear_schedule(6), "v", "learned_range")
    output, x0, t, noise, _ = batch(diffusion, (4, 2, 3))
    weights = np.array([0.5, 1, 2, 3])
    value, gradient = loss(diffusion, output, x0, t, noise, weights=weights)
    foreign = [strict.asarray(v) for v in (output, x0, t, noise)]
    there, gradient_there = loss(diffusion, *foreign, weights=weights)
    assert_allclose(float(there), value, rtol=1e-12)
    assert_allclose(np.from_dlpack(gradient_there), gradient, rtol=1e-12, atol=1e-14)
    single = [v.astype(np.float32) for v in (output, x0)]
    value32, gradient32 = loss(diffusion, *single, t, noise.astype(np.float32), weights=weights)
    assert value32.dtype == gradient32.dtype == np.float32
    assert_allclose(value32, value, rtol=1e-5)


# Min-SNR weights


@every_prediction
@every_schedule
def test_min_snr_weights_are_one_weight_on_x0(prediction, schedule):
    """Whatever the network predicts, errors of x0 count for min(snr, gamma)."""
    diffusion = GaussianDiffusion(schedule, prediction)
    n, T = 3, schedule.T
    rng = np.random.default_rng(0)
    t = np.repeat(np.arange(T), n)
    x0, noise, output = rng.standard_normal((3, t.size, 2))
    value, _ = simple_loss(diffusion, output, x0, t, noise, min_snr_weight(diffusion, t, gamma=2.0))
    guess = diffusion.predict_x0(diffusion.q_sample(x0, t, noise), t, output)
    weight = np.minimum(schedule.snr[t], 2.0)[:, None]
    assert_allclose(value, np.mean(weight * (guess - x0) ** 2), rtol=1e-9)


@every_prediction
@settings(max_examples=10)
@given(seed=seeds)
def test_gradient_of_the_weighted_loss(prediction, seed):
    diffusion = GaussianDiffusion(linear_schedule(6), prediction)
    output, x0, t, noise, _ = batch(diffusion, (4, 2, 3), seed)
    weights = np.random.default_rng(seed).uniform(0, 3, 4)

    layer = as_layer(lambda output: simple_loss(diffusion, output, x0, t, noise, weights))
    assert_central_differences_agree(Case(layer, [frozen(output)]), np.random.default_rng(seed))
    ones, _ = simple_loss(diffusion, output, x0, t, noise, np.ones(4))
    assert_allclose(ones, simple_loss(diffusion, output, x0, t, noise)[0], rtol=1e-14)


def test_min_snr_weights_at_the_ends():
    schedule = NoiseSchedule([1e-310, 0.5, 1.0])  # snr is inf, 1 and 0
    for prediction, expected in [
        ("eps", [0, 1, 1]),
        ("x0", [5, 1, 0]),
        ("v", [0, 0.5, 0]),
        ("flow", [0, 0.25, 0]),
    ]:
        weight = min_snr_weight(GaussianDiffusion(schedule, prediction), np.arange(3))
        assert_allclose(weight, expected, atol=1e-15)
    diffusion = GaussianDiffusion(schedule)
    with pytest.raises(ValueError, match="gamma is 0"):
        min_snr_weight(diffusion, np.arange(3), 0)
    with pytest.raises(ValueError, match=r"t is \[3\]; expected integers in 0 ... 2"):
        min_snr_weight(diffusion, np.array([3]))
    output, x0, t, noise, _ = batch(diffusion, (4, 2))
    with pytest.raises(ValueError, match=r"weights has shape \(4, 1\); expected \(4,\)"):
        simple_loss(diffusion, output, x0, t, noise, np.ones((4, 1)))
    with pytest.raises(TypeError, match="weights is a list; expected an array"):
        simple_loss(diffusion, output, x0, t, noise, [1.0] * 4)
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match=rf"weights holds {wrong}; expected numbers of at least 0"):
            simple_loss(diffusion, output, x0, t, noise, np.array([1, 1, wrong, 1]))


def test_a_sample_of_no_weight_counts_for_nothing():
    diffusion = GaussianDiffusion(linear_schedule(6))
    output, x0, t, noise, _ = batch(diffusion, (4, 3))
    value, gradient = simple_loss(diffusion, output, x0, t, noise, np.array([0, 0, 0, 4]))
    alone, gradient_alone = simple_loss(diffusion, output[3:], x0[3:], t[3:], noise[3:])
    assert_allclose(value, alone, rtol=1e-14)
    assert_allclose(gradient, np.concat([np.zeros((3, 3)), gradient_alone]), rtol=1e-14)


# Importance sampling of t


def full_sampler(losses, history=3, **options):
    sampler = LossSecondMomentSampler(len(losses), history, **options)
    for _ in range(history):
        sampler.update(np.arange(len(losses)), np.asarray(losses, dtype=float))
    return sampler


def test_uniform_until_every_t_has_a_history():
    sampler = LossSecondMomentSampler(3, history=2)
    for t in ([0, 0, 0, 1, 1, 2], []):
        sampler.update(np.array(t, dtype=np.int64), np.ones(len(t)))
        assert_array_equal(sampler.probabilities(), 1 / 3)
        t, weights = sampler.sample(5, np.random.default_rng(0))
        assert t.shape == (5,)
        assert_allclose(weights, 1, rtol=1e-15)
    sampler.update(np.array([2]), np.array([7.0]))
    assert np.ptp(sampler.probabilities()) > 0.1


def test_probabilities_are_roots_of_second_moments_of_the_last_terms():
    sampler = LossSecondMomentSampler(2, history=3, uniform=0.01)
    for first, second in [(100, 1), (1, -2), (2, 2), (3, 4)]:  # the first pair is forgotten
        sampler.update(np.array([1, 0]), np.array([second, first]))
    root = np.sqrt([(1 + 4 + 9) / 3, (4 + 4 + 16) / 3])
    assert_allclose(sampler.probabilities(), 0.99 * root / root.sum() + 0.005, rtol=1e-12)


@given(st.integers(2, 8), st.sampled_from([1e-200, 1e200, -1.0, -1e-200]), seeds)
def test_probabilities_depend_on_neither_unit_nor_sign(T, unit, seed):
    """Of a density's terms some are negative, and all may be."""
    losses = np.append(0.0, np.random.default_rng(seed).uniform(0.1, 1, T - 1))
    expected = full_sampler(losses).probabilities()
    assert np.ptp(expected) > 0.05
    assert_allclose(full_sampler(unit * losses).probabilities(), expected, rtol=1e-12)


def test_a_share_of_one_is_uniform_whatever_is_remembered():
    sampler = full_sampler([100.0, 1.0, 0.0], uniform=1)
    assert_allclose(sampler.probabilities(), 1 / 3, rtol=1e-15)
    _, weights = sampler.sample(20, np.random.default_rng(0))
    assert_allclose(weights, 1, rtol=1e-15)


@pytest.mark.parametrize("n", [0, -1, 2.0, None, (2, 3)])
def test_only_a_count_of_times_is_drawn(n):
    with pytest.raises(ValueError, match=r"^n is .*; expected an integer of at least 1"):
        LossSecondMomentSampler(3).sample(n, np.random.default_rng(0))


def test_by_default_ten_terms_are_remembered_and_one_t_in_a_thousand_is_uniform():
    sampler = LossSecondMomentSampler(2)
    for losses in ([9.0, 9.0], *[[1.0, 0.0]] * 9):
        assert_array_equal(sampler.probabilities(), 0.5)
        sampler.update(np.arange(2), np.array(losses))
    assert sampler.probabilities()[1] > 0.4
    sampler.update(np.arange(2), np.array([1.0, 0.0]))
    assert_allclose(sampler.probabilities(), [0.9995, 0.0005], rtol=1e-12)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), seeds)
def test_weighted_terms_are_an_unbiased_estimate(losses, seed):
    """By enumeration: sum_t p_t w_t L_t is the mean of L_t, also where the history did not foresee them."""
    sampler = full_sampler(losses)
    t, weights = sampler.sample(50, np.random.default_rng(seed))
    p = sampler.probabilities()
    assert_allclose(np.sum(p), 1, rtol=1e-12)
    assert np.all(p > 0)
    assert_allclose(weights, 1 / (len(losses) * p[t]), rtol=1e-12)
    others = np.random.default_rng(seed).uniform(0, 1, len(losses))
    assert_allclose(np.sum(p * others / (len(losses) * p)), np.mean(others), rtol=1e-12)


def test_t_is_drawn_with_the_probabilities():
    """Counts within 5 standard deviations (4 numbers: false alarm 3e-6); the estimate spreads less."""
    losses = np.array([100.0, 10.0, 1.0, 0.0])
    sampler, n = full_sampler(losses), 100_000
    t, weights = sampler.sample(n, np.random.default_rng(0))
    p = sampler.probabilities()
    assert np.all(abs(np.bincount(t, minlength=4) - n * p) < 5 * np.sqrt(n * p * (1 - p)))
    assert abs(np.mean(weights * losses[t]) - losses.mean()) < 5 * np.std(weights * losses[t]) / np.sqrt(n)
    assert np.std(weights * losses[t]) < 0.1 * np.std(losses)


def test_state_is_saved_and_restored():
    sampler = LossSecondMomentSampler(4, history=3)
    rng = np.random.default_rng(0)
    sampler.update(rng.integers(4, size=100), rng.uniform(size=100))
    state = sampler.state_dict()
    assert {k: (v.shape, v.dtype.kind) for k, v in state.items()} == {
        "history": ((4, 3), "f"),
        "counts": ((4,), "i"),
    }
    other = LossSecondMomentSampler(4, history=3)
    other.load_state_dict(state)
    for s in (sampler, other):  # the state is a copy: what comes later does not reach it
        s.update(np.array([1, 1, 2]), np.array([3.0, 5.0, 7.0]))
    assert_array_equal(sampler.probabilities(), other.probabilities())
    assert state["counts"].sum() == 100
    with pytest.raises(ValueError, match=r"state\['history'\] has shape \(4, 3\); expected \(5, 3\)"):
        LossSecondMomentSampler(5, history=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state\['counts'\] has shape None"):
        other.load_state_dict({"history": state["history"]})


def test_a_bad_term_is_refused_and_nothing_is_remembered():
    sampler = LossSecondMomentSampler(2, history=1)
    for t, losses, message in [
        ([0, 2], [1.0, 1.0], "expected integers in 0 ... 1"),
        ([0, 1], [1.0, np.nan], "not finite"),
        ([0, 1], [1.0], "losses has shape"),
        ([0.0, 1.0], [1.0, 1.0], "expected integers in 0 ... 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler.update(np.array(t), np.array(losses))
    assert sampler.state_dict()["counts"].sum() == 0
    with pytest.raises(TypeError, match="rng is an int; expected a numpy"):
        sampler.sample(3, 0)
    for options in (dict(T=0), dict(T=2, history=0), dict(T=2, uniform=0.0), dict(T=2, uniform=2)):
        with pytest.raises(ValueError, match="expected"):
            LossSecondMomentSampler(**options)
