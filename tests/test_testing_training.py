"""tinydiff.testing of a training: what it draws, its optimizer's steps and the average of its weights."""

import re
from functools import partial
from itertools import chain, count, cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import ABAR, EPS, LINEAR, A, S, refusal
from trainings import (
    ADAMS,
    AVERAGES,
    DRAWS,
    EARLY,
    SETTINGS,
    adam,
    average,
    on_ranks,
    once,
    shared,
    training,
    withheld,
)

import tinydiff as td
from tinydiff import testing
from tinydiff.testing import _adam, _draws, _ema

DRAWN = [(options, *row) for options, rows in DRAWS for row in rows.items()]


# What a training draws


def in_pairs(half, T):
    return np.concatenate([half, T - 1 - half], axis=-1)


def mirrored(rng, N, T=LINEAR.T):
    return in_pairs(rng.integers(T, size=N // 2), T)


def in_layers(rng, N):
    """One draw for all, as variational diffusion models have it; each t by itself is drawn evenly."""
    return ((rng.random() + np.arange(N) / N) % 1 * LINEAR.T).astype(int)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "t", [None, mirrored, in_layers, lambda rng, N: rng.permutation(LINEAR.T)[:N]], ids=range(4)
)
def test_right_draws_pass_however_they_are_made(t, seed):
    testing.assert_training_draws(training(t, seed=seed), EPS)
    testing.assert_training_draws(training(t, seed=seed), EPS, num_classes=10, shape=(32, 4))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_classes_may_be_withheld_from_any_share(share):
    for classes in (1, 10):
        draws = training(told=withheld(share, classes))
        testing.assert_training_draws(draws, EPS, num_classes=classes, label_dropout=share, shape=(16, 1, 3))


@pytest.mark.parametrize("T", [1, 2, 3, 200])
@pytest.mark.parametrize("N", [1, 2, 64, 9000])
def test_draws_of_any_chain_and_batch_pass(T, N):
    process = td.GaussianDiffusion(td.linear_schedule(T), "v", "learned_range")
    testing.assert_training_draws(our_draws(process), process, shape=(N, 3))
    testing.assert_training_draws(our_draws(process, axis=1), process, shape=(N, 3, 2, 2), axis=1)


def our_draws(process, axis=-1, t_sampler=None):
    """The loss that `td.train` steps by."""
    rng = np.random.default_rng(2)

    def loss(network, x0):
        def model(x, t, rng):
            assert network(x, t).shape[axis] == 2 * x.shape[axis]
            return np.concatenate([x, x], axis=-1), lambda dy: None

        return td.training_loss(
            model, process, x0, rng, "vlb" if t_sampler else "simple", t_sampler=t_sampler
        )

    return loss


def test_our_importance_sampling_draws_by_its_probabilities():
    t_sampler = td.LossSecondMomentSampler(LINEAR.T, history=1)
    t_sampler.update(np.arange(LINEAR.T), EARLY)
    t_sampler.update = lambda t, losses: None
    learned = td.GaussianDiffusion(LINEAR, "eps", "learned_range")
    draws = our_draws(learned, t_sampler=t_sampler)
    options = dict(probabilities=t_sampler.probabilities(), shape=(100, 3))
    testing.assert_training_draws(draws, learned, **options)
    assert "t = " in refusal(testing.assert_training_draws, draws, learned, shape=(100, 3))


@pytest.mark.parametrize(("options", "what", "yours"), DRAWN, ids=[row[1] for row in DRAWN])
def test_a_mistake_in_what_is_drawn_is_named(options, what, yours):
    said = refusal(testing.assert_training_draws, yours, EPS, **options)
    assert said.endswith(f"It is what comes of this: {what}."), said
    assert "\n" not in said  # the rest is right


def test_every_mistake_of_draws_is_planted(monkeypatch):
    listed = set()
    monkeypatch.setattr(_draws, "_known", lambda names: listed.update(names) or "")
    for options, _, yours in DRAWN:
        refusal(testing.assert_training_draws, yours, EPS, **options, shape=(40, 3, 2, 3))
    assert listed == {what for _, what, _ in DRAWN}


@pytest.mark.parametrize(
    ("noise", "axis", "said", "what"),
    [
        (shared(1), 1, "1 between two places along axis 1, where", "one noise for all channels"),
        (shared(1), -1, "1 between two places along axis 1, where", None),
        (lambda *of: 0.5 * shared()(*of) + 0.75**0.5 * shared(0)(*of), -1, "0.75 between two samples", None),
        (lambda *of: shared()(*of) + 0.3 * shared(1, 2, 3)(*of), -1, "0.08", None),
    ],
    ids=range(4),
)
def test_what_the_noise_goes_with_is_said_and_named_if_it_is_all(noise, axis, said, what):
    message = refusal(testing.assert_training_draws, training(noise=noise), EPS, axis=axis)
    assert message.startswith(f"The noise has the correlation {said}"), message
    assert (f"of this: {what}" if what else "None of the ") in message


def seeded_every(calls):
    losses = chain.from_iterable([training()] * calls for _ in count())
    return lambda *given: next(losses)(*given)


def kept(number):
    kept = np.random.default_rng(1).standard_normal((number, 8, 3, 4, 8)).astype(np.float32)
    return training(noise=lambda rng, shape: kept[rng.integers(number)])


def moved_on():
    """The noise of the call before, one place on."""
    now = np.zeros((8, 3, 4, 8))

    def noise(rng, shape):
        now[:] = np.roll(now, 1, axis=0)
        now[0] = rng.standard_normal(shape[1:])
        return now

    return training(noise=noise)


@pytest.mark.parametrize(
    ("loss", "share", "first"),
    [
        (on_ranks(0, 0), 1 / 2, (2, 1)),
        (on_ranks(0, 1, 2, 0), 1 / 4, (4, 1)),
        (seeded_every(300), 0.6, (301, 1)),
        (seeded_every(749), 1 / 750, (750, 1)),
        (kept(64), 0.915, None),
        (moved_on(), 7 / 8, (2, 1)),
    ],
    ids=["two ranks", "two of four", "every 300 calls", "every 749 calls", "kept", "at another place"],
)
def test_noise_that_comes_again_is_seen_whenever_and_wherever_it_does(loss, share, first):
    said = refusal(testing.assert_training_draws, loss, EPS)
    found = re.match(
        r"Of 6000 noises (\d+) were drawn in an earlier call, the first of them in call (\d+), as", said
    )
    assert abs(int(found[1]) / 6000 - share) < 0.005
    assert first is None or f"in call {first[0]}, as in call {first[1]}." in said
    assert said.endswith(f" It is what comes of this: {_draws.SEEDED}.") and "\n" not in said


@pytest.mark.parametrize("options", [{}, dict(num_classes=10)], ids=["", "with classes"])
def test_a_seed_at_every_call_is_not_called_anything_else(options):
    first, second = refusal(testing.assert_training_draws, seeded_every(1), EPS, **options).split("\n")
    assert first.startswith("Every call draws the t of the call before.")
    assert second.startswith(
        "Of 6000 noises 5992 were drawn in an earlier call, the first of them in call 2, as"
    )
    assert second.endswith("of this: the same noise at every call: drawn once, or after the same seed.")


def test_a_seed_at_every_call_but_few_is_not_called_one_at_every_call():
    losses = chain.from_iterable([training()] + [training(seed=n)] * (n % 100 == 5) for n in count())
    said = refusal(testing.assert_training_draws, lambda *given: next(losses)(*given), EPS)
    assert said.startswith("Of 6000 noises 59") and said.endswith(f"{_draws.SEEDED}.") and "\n" not in said


def test_noise_of_few_numbers_is_known_again_by_the_call():
    said = refusal(testing.assert_training_draws, on_ranks(0, 0), EPS, shape=(16, 2))
    assert said.startswith(
        "Of 375 noises 187 were drawn in an earlier call, the first of them in call 2, as in"
    )
    testing.assert_training_draws(on_ranks(0, 1), EPS, shape=(16, 2))


def test_the_same_noise_at_every_call_is_named_in_half_precision_too():
    loss = training(noise=once(shared()))
    in_half = lambda network, x0: loss(lambda x, t: network(x.astype(np.float16), t), x0)  # noqa: E731
    said = refusal(testing.assert_training_draws, in_half, EPS)
    assert said.startswith("The noise has the correlation 1 between a call and the next, where")
    assert said.endswith(f"It is what comes of this: {_draws.AGAIN_NOISE}.")


def test_of_two_calls_either_may_be_so():
    said = refusal(testing.assert_training_draws, on_ranks(0, 0), EPS, shape=(5000, 6))
    assert f"{_draws.SEEDED}; or of this: {_draws.AGAIN_NOISE}." in said


def test_noise_is_known_again_through_the_rounding_of_float32():
    ranks = cycle([np.random.default_rng(0), np.random.default_rng(0)])

    def loss(network, x0):
        noise = next(ranks).standard_normal(x0.shape, np.float32)
        t = np.random.default_rng().integers(LINEAR.T, size=len(x0))
        network(EPS.q_sample(x0.astype(np.float32), t, noise), t)

    said = refusal(testing.assert_training_draws, loss, EPS)
    assert "\n" not in said and said.endswith(f"{_draws.SEEDED}.")
    assert 2700 < int(re.match(r"Of 6000 noises (\d+) ", said)[1]) <= 3000  # few are not side by side


def test_ranks_with_seeds_of_their_own_pass():
    testing.assert_training_draws(on_ranks(0, 1, 2), EPS)


def test_few_numbers_that_are_alike_by_chance_are_not_called_drawn_before():
    said = refusal(testing.assert_training_draws, training(noise=shared(0, 1, 2, 3)), EPS)
    assert "in an earlier call" not in said and "one noise for all samples of a batch" in said


def test_noise_in_pairs_of_opposite_sign_is_not_independent():
    def noise(rng, shape):
        half = rng.standard_normal((4, *shape[1:]))
        return np.concatenate([half, -half])

    said = refusal(testing.assert_training_draws, training(noise=noise), EPS)
    assert said.startswith("The noise has the correlation -0.143 between two samples of a batch, where")


def test_one_number_of_noise_for_each_point_is_named():
    said = refusal(testing.assert_training_draws, training(noise=shared(1)), EPS, shape=(8, 2))
    assert said.endswith("It is what comes of this: one number of noise for all of a sample.")


def test_mistakes_in_several_draws_are_said_together():
    wrong = training(
        lambda rng, N: rng.integers(1, LINEAR.T, size=N),
        lambda rng, shape: rng.random(shape),
        lambda rng, labels: labels,
    )
    said = refusal(testing.assert_training_draws, wrong, EPS, num_classes=10)
    lines = said.split("\n")
    assert [line[-7:] for line in lines[:2]] == ["(E.28).", "(E.29)."]
    assert ": no class is ever withheld, or it is by a mask" in lines[2] and len(lines) == 3


def test_steps_that_are_not_to_be_drawn_are_no_mistake():
    """The tables of some codes have an entry more, for t = 0, which is no step (E.26)."""
    p = np.append(0.0, np.full(LINEAR.T - 1, 1 / (LINEAR.T - 1)))
    testing.assert_training_draws(training(lambda rng, N: rng.integers(1, 200, size=N)), EPS, probabilities=p)
    wrong = training(lambda rng, N: rng.integers(1, 199, size=N))
    said = refusal(testing.assert_training_draws, wrong, EPS, probabilities=p)
    assert said.endswith("this: t = T - 1 is never drawn, as by randint(0, T - 1) (E.28).")
    assert "t = 0 is drawn 29 times" in refusal(
        testing.assert_training_draws, training(), EPS, probabilities=p
    )


def test_a_step_that_is_never_drawn_is_named_whatever_the_probabilities():
    q = np.append(0.0, EARLY[1:] / np.sum(EARLY[1:]))
    wrong = training(lambda rng, N: rng.choice(LINEAR.T, N, p=q))
    said = refusal(testing.assert_training_draws, wrong, EPS, probabilities=EARLY)
    assert said.startswith("t = 0 is drawn 0 times in 6000, where 59.7 are expected.")
    assert said.endswith("this: t = 0 is never drawn, as by randint(1, T) (E.28).")


def test_what_is_rare_by_itself_is_judged_together():
    rare, often = np.full(100, 1e-5), np.full(100, 0.01 - 1e-5)
    too_often = np.append(rare + 1e-4, often - 1e-4)
    wrong = training(lambda rng, N: rng.choice(LINEAR.T, N, p=too_often))
    said = refusal(testing.assert_training_draws, wrong, EPS, probabilities=np.append(rare, often))
    assert "are expected. None of the " in said
    right = training(lambda rng, N: rng.choice(LINEAR.T, N, p=np.append(rare, often)))
    testing.assert_training_draws(right, EPS, probabilities=np.append(rare, often))


def test_classes_withheld_in_pairs_are_seen():
    process = td.GaussianDiffusion(td.linear_schedule(150))
    in_twos = lambda rng, labels: np.where(np.repeat(rng.random(4) < 0.1, 2), 10, labels)  # noqa: E731
    pairs = training(told=in_twos, process=process)
    said = refusal(testing.assert_training_draws, pairs, process, num_classes=10)
    assert "is withheld, and not of each by itself, where 0.1" in said


def test_draws_that_are_wrong_in_no_known_way_are_said_to_be():
    doubled = training(lambda rng, N: np.repeat(rng.integers(LINEAR.T, size=N // 2), 2))
    said = refusal(testing.assert_training_draws, doubled, EPS)
    assert (
        "have the same t with a probability of 0.149, where 0.00523 is exp" in said and "None of the " in said
    )
    of_another_network = training(told=withheld(0.2))
    said = refusal(testing.assert_training_draws, of_another_network, EPS, num_classes=10)
    assert "The class of 0.195 of" in said and "0.1 is expected. None of the " in said
    plus_one = training(told=lambda rng, labels: labels + 1)
    said = refusal(testing.assert_training_draws, plus_one, EPS, num_classes=10)
    assert "another class than its own of 0.899 of the samples. None of the " in said
    shifted = training(noise=lambda rng, shape: rng.normal(0.5, 1.0, shape))
    said = refusal(testing.assert_training_draws, shifted, EPS)
    assert said.startswith("The noise has the mean 0.501 and ") and "None of the " in said
    never = (
        refusal(testing.assert_training_draws, training(), EPS, num_classes=10, label_dropout=0.0),
        refusal(
            testing.assert_training_draws,
            training(told=lambda rng, labels: None),
            EPS,
            num_classes=10,
            label_dropout=0.0,
        ),
    )
    assert never[0].endswith("each alone.") and never[1].endswith(
        "this: every class is withheld, or told by another name than class_labels or y."
    )
    often = training(told=lambda rng, labels: None if rng.random() < 0.9 else labels)
    said = refusal(testing.assert_training_draws, often, EPS, num_classes=10)
    assert said.endswith("this: the classes of a batch are withheld together, or none of them.")
    grey = training(noise=lambda rng, shape: np.ones(shape))
    said = refusal(testing.assert_training_draws, grey, EPS)
    assert said.startswith("The noise has the standard deviation ") and "None of the 1 " in said
    again = refusal(testing.assert_training_draws, training(lambda rng, N: np.arange(N)), EPS)
    assert again.startswith("Every call draws the t of the call before. It is what comes of this: ")


@pytest.mark.parametrize(
    "x_t",
    [
        lambda x0, t, noise: ABAR[t, None] * x0 + S[t, None] * noise,
        lambda x0, t, noise: A[t, None] * x0 + S[t, None] ** 2 * noise,
        lambda x0, t, noise: EPS.q_sample((x0 + 1) / 2, t, noise),
        lambda x0, t, noise: EPS.q_sample(x0[::-1], t, noise),
    ],
)
def test_states_of_another_process_are_told_from_noise(x_t):
    def loss(network, x0):
        t = rng.integers(LINEAR.T, size=len(x0))
        return network(x_t(x0, t, rng.standard_normal(x0.shape)), t)

    rng = np.random.default_rng(0)
    said = refusal(testing.assert_training_draws, loss, EPS, shape=(8, 20))
    assert (
        said.startswith("The network is shown other states")
        and "assert_q_sample says more; or x_0 is " in said
    )


@pytest.mark.parametrize("shape", [(50, 2, 3, 4), (8, 3), (500, 2)])
def test_tests_refuse_what_is_right_as_rarely_as_they_should(shape, monkeypatch):
    """At a threshold of 1 in 100 for each: no formula for what chance alone does is too small."""
    monkeypatch.setattr(_draws, "RARE", 0.01)
    monkeypatch.setattr(_draws, "SURELY", 2.576)
    monkeypatch.setattr(_draws, "NUMBERS", 20_000)
    monkeypatch.setattr(_draws, "AT_LEAST", 1000)
    process, refused = td.GaussianDiffusion(td.linear_schedule(20)), []
    for seed in range(200):
        draws = training([None, partial(mirrored, T=20)][seed % 2], seed=seed, process=process)
        try:
            testing.assert_training_draws(draws, process, num_classes=10, shape=shape)
        except AssertionError as error:
            refused += str(error).split("\n")
    begin = {
        "t =": 2,
        "Two samples": 1,
        "The network": 2,
        "The class": 3,
        "Class": 3,
    }  # and how many tests each has
    begin |= {"The noise has the correlation": len(shape) + 2, "The noise has the mean": 4}
    found = {words: sum(line.startswith(words) for line in refused) for words in begin}
    assert sum(found.values()) == len(refused)
    for words, tests in begin.items():
        assert found[words] <= 2 * tests + 3 * np.sqrt(2 * tests), found


@pytest.mark.parametrize(
    ("rows", "N", "draw"),
    [
        (300, 8, lambda rng, size: rng.integers(20, size=size)),
        (40, 128, lambda rng, size: in_pairs(rng.integers(1000, size=(40, 64)), 1000)),
        (2, 2000, lambda rng, size: (rng.random(size) < 0.1).astype(int)),
        (100, 2, lambda rng, size: rng.integers(1000, size=size)),
        (30, 200, lambda rng, size: (20 * rng.random(size) ** 2).astype(int)),
    ],
    ids=["even", "mirrored", "two rows", "few pairs", "uneven"],
)
def test_draws_are_seldom_alike_by_chance(rows, N, draw, monkeypatch):
    monkeypatch.setattr(_draws, "RARE", 1e-3)
    monkeypatch.setattr(_draws, "SURELY", 3.09)
    rng = np.random.default_rng(0)
    assert sum(_draws._alike(draw(rng, (rows, N)))[2] for _ in range(2000)) <= 2 + 3 * np.sqrt(2)


def test_two_calls_are_looked_at_however_large_they_are(monkeypatch):
    monkeypatch.setattr(_draws, "NUMBERS", 10)
    testing.assert_training_draws(training(), EPS)
    said = refusal(testing.assert_training_draws, training(noise=once(shared())), EPS)
    assert said.endswith("this: the same noise at every call: drawn once, or after the same seed.")


@pytest.mark.parametrize(("T", "N"), [(1000, 64), (1000, 128), (200, 8), (200, 100), (999, 128), (50, 50)])
def test_layers_with_one_offset_for_a_batch_are_right(T, N):
    """They repeat themselves: of a batch only one t is drawn, and the rest follow."""
    rng, even = np.random.default_rng(0), np.full(T, 1 / T)
    rows = max(2, -(-max(30 * T, 5000) // N))
    for _ in range(200):
        offsets = rng.random((rows, 1)) + np.arange(N) / N
        assert _draws._wrong_times((offsets % 1 * T).astype(int), even) == ""


@pytest.mark.parametrize("N", [1, 8, 128, 1000])
def test_other_probabilities_are_seen_in_batches_of_any_size(N):
    falling = training(lambda rng, N: rng.choice(LINEAR.T, N, p=EARLY))
    assert "t = " in refusal(testing.assert_training_draws, falling, EPS, shape=(N, 2))
    testing.assert_training_draws(falling, EPS, probabilities=EARLY, shape=(N, 2))
    said = refusal(testing.assert_training_draws, training(), EPS, probabilities=EARLY, shape=(N, 2))
    assert said.endswith("this: every t is drawn equally often.")


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (lambda rng, labels: (labels + 1) % 10, None),
        (lambda rng, labels: rng.integers(0, 10, len(labels)), None),
        (lambda rng, labels: 0 * labels, None),
        (withheld(0.1, 0), "no class is told as class 0, which is one"),
        (lambda rng, labels: withheld(0.1)(rng, labels[::-1]), "the labels of other samples of the batch"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("shape", [(8, 3), (128, 4)])
def test_wrong_labels_are_named_only_if_all_that_is_told_is_so(told, what, shape):
    said = refusal(testing.assert_training_draws, training(told=told), EPS, num_classes=10, shape=shape)
    assert said.endswith(f"It is what comes of this: {what}." if what else "each alone."), said


def test_one_t_and_one_noise_for_a_batch_are_both_named():
    wrong = training(lambda rng, N: np.full(N, rng.integers(LINEAR.T)), shared(0))
    said = refusal(testing.assert_training_draws, wrong, EPS, shape=(64, 2)).split("\n")
    assert [line.split(": ")[1] for line in said] == [
        "one t for all samples of a batch.",
        "one noise for all samples of a batch.",
    ]


def test_one_class_that_is_withheld_is_not_a_share_of_all():
    wrong = training(told=lambda rng, labels: np.where(labels == 3, 10, labels))
    said = refusal(testing.assert_training_draws, wrong, EPS, num_classes=10)
    assert said.startswith("Class 3 is withheld ") and "None of the " in said


@pytest.mark.parametrize("by", [0.1, 0.03])
def test_noise_that_is_blurred_is_not_called_offset_noise(by):
    def blurred(rng, shape):
        noise = rng.standard_normal(shape)
        return (noise + by * np.roll(noise, 1, axis=-2)) / (1 + by**2) ** 0.5

    said = refusal(testing.assert_training_draws, training(noise=blurred), EPS)
    assert said.startswith("The noise has the correlation ") and "None of the " in said


def test_a_training_may_call_its_network_by_names_and_tell_it_more():
    rng = np.random.default_rng(0)

    def loss(network, x0):
        t = rng.integers(LINEAR.T, size=len(x0))
        x_t = EPS.q_sample(x0, t, rng.standard_normal(x0.shape))
        network(sample=x_t, timesteps=t)
        return network(x_t, t, np.zeros((len(x0), 77, 16)), hidden_states=x_t, time=t)

    testing.assert_training_draws(loss, EPS)


def test_offset_noise_of_the_usual_size_is_named():
    def noise(rng, shape):
        return rng.standard_normal(shape) + 0.1 * rng.standard_normal((shape[0], 1, 1, shape[3]))

    for seed in range(3):
        said = refusal(testing.assert_training_draws, training(noise=noise, seed=seed), EPS)
        assert "of this: offset noise" in said


def test_what_a_training_shows_first_counts():
    rng = np.random.default_rng(0)

    def twice(network, x0):
        t = rng.integers(LINEAR.T, size=len(x0))
        x_t = EPS.q_sample(x0, t, rng.standard_normal(x0.shape))
        return network(x_t, timestep=t, return_dict=False)[0] + network(0 * x_t, 0 * t)

    testing.assert_training_draws(twice, EPS)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda network, x0: 0.0, "loss does not ask the network."),
        (lambda network, x0: network(x0[:2], 0), "x of shape (2, 3, 4, 8); expected (8, 3, 4, 8)."),
        (lambda network, x0: network(x0, np.full(8, 200)), "expected whole numbers, 0 … 199 (E.13)."),
        (
            lambda network, x0: network(x0, 0.5),
            "the network is shown t = 0.5; expected whole numbers, 0 … 199",
        ),
        (
            lambda network, x0: network(x0, np.arange(8) / 200),
            "0 … 199 (of a network that is told t / T, hand",
        ),
        (
            lambda network, x0: network(x0 * np.nan, 3),
            "the network is shown an x that is not finite, at t = 3.",
        ),
        (lambda network, x0: network(x0, [1, 2]), "x of shape (8, 3, 4, 8) and t of shape (2,); expected"),
    ],
)
def test_what_is_no_training_is_said(loss, said):
    assert said in refusal(testing.assert_training_draws, loss, EPS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(probabilities=np.full(199, 1 / 199)),
            "probabilities has shape (199,) and dtype float64; expected 200",
        ),
        (dict(probabilities=np.full(200, 1.0)), "probabilities has sum 200 and minimum 1; expected 200"),
        (dict(probabilities=np.linspace(-1, 1, 200) + 1 / 200), "expected 200 numbers, not negative"),
        (dict(probabilities="abc"), "probabilities has shape () and dtype <U3; expected 200 numbers"),
        (dict(num_classes=0), "num_classes is 0"),
        (dict(num_classes=10, label_dropout=1.5), "label_dropout is 1.5; expected a number in [0, 1]"),
        (dict(shape=(8,)), "shape is (8,)"),
        (dict(axis=4), "axis is 4"),
    ],
)
def test_arguments_of_draws_are_checked(options, said):
    with pytest.raises(ValueError) as caught:
        testing.assert_training_draws(training(), EPS, **options)
    assert said in str(caught.value)


# Averages of the weights


def of_ours(weights, decay=0.999, dtype=np.float64):
    layer = td.nn.Linear(1, weights.shape[1], np.random.default_rng(0)).to(np, dtype)
    weight = layer.named_parameters()["weight"]
    weight.value = weights[:1].astype(dtype)
    ema, averages = td.EMA(layer, decay), []
    for row in weights[1:]:
        weight.value = row[None].astype(dtype)
        ema.update()
        averages.append(ema.model.named_parameters()["weight"].value[0].copy())
    return np.array(averages)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.999999])
def test_our_own_average_passes(decay):
    warming_up = lambda k: min(decay, (1 + k) / (10 + k))  # noqa: E731
    testing.assert_ema(lambda weights: of_ours(weights, decay), warming_up)
    testing.assert_ema(lambda weights: of_ours(weights, decay, np.float32), warming_up, tolerance=1e-3)
    testing.assert_ema(average(lambda k: decay), decay)


@pytest.mark.parametrize("what", AVERAGES)
def test_a_mistake_in_an_average_is_named(what):
    said = refusal(testing.assert_ema, AVERAGES[what], 0.99)
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_of_averages_is_planted():
    listed = _ema._mistakes(np.random.default_rng(0).standard_normal((101, 32)), np.full(100, 0.99), 0.99)
    assert {*listed, "kept in half precision (E.18)"} == {*AVERAGES, "a constant decay"}
    said = refusal(testing.assert_ema, average(), lambda k: min(0.99, (1 + k) / (10 + k)))
    assert said.endswith("this: a constant decay.")


@pytest.mark.parametrize(("k_wrong", "count"), [(1, 100), (50, 51), (100, 1)])
def test_one_wrong_update_is_enough_and_where_it_is_is_said(k_wrong, count):
    wrong = average(lambda k: 0.9 if k == k_wrong else 0.99)
    said = refusal(testing.assert_ema, wrong, 0.99)
    assert f"after {count} of 100 steps, first after step {k_wrong}. " in said and "None of the " in said


def test_how_far_an_average_is_off_is_a_part_of_how_far_it_should_have_moved():
    def path(ema):
        kept = []
        testing.assert_ema(lambda weights: kept.append(weights.copy()) or ema(weights), 0.99)
        return kept[0], ema(kept[0])

    weights, averages = path(average())
    moves = np.max(np.abs(averages - weights[0]), axis=0)
    off = np.max(np.abs(average(before=1)(weights) - averages) / moves)
    assert f"ema is off by {off:.3g} of the furthest" in refusal(testing.assert_ema, average(before=1), 0.99)


@pytest.mark.parametrize(
    "check", [partial(testing.assert_ema, decay=0.99), partial(testing.assert_adam, **SETTINGS)]
)
def test_a_copy_that_was_forgotten_is_named(check):
    def aliased(*given):
        found = (average() if len(given) == 1 else adam())(*given)
        return np.repeat(found[-1:], len(found), axis=0)

    assert refusal(check, aliased).endswith("this: each row is the last: it was kept without a copy.")


def test_an_average_may_rest_at_some_steps():
    testing.assert_ema(average(lambda k: 0.9 if k % 10 == 0 else 1.0), lambda k: 0.9 if k % 10 == 0 else 1)


def test_a_decay_that_is_rounded_to_1_far_out_passes():
    warming_up = lambda k: 1 - np.exp(-k / 10)  # noqa: E731
    testing.assert_ema(average(warming_up), warming_up)


@pytest.mark.parametrize(
    "ema", [lambda weights: 0 * weights[1:], lambda weights: np.round(average(lambda k: 0.5)(weights))]
)
def test_numbers_that_happen_to_be_short_are_not_called_half_precision(ema):
    assert "half precision" not in refusal(testing.assert_ema, ema, 0.99)


def test_float32_is_called_so():
    single = lambda x: x.astype(np.float32)  # noqa: E731
    said = refusal(testing.assert_ema, average(dtype=np.float32), 0.99, asarray=single, tolerance=1e-9)
    assert said.endswith("In float32 what is right can be off by as much: give tolerance=1e-3.")
    testing.assert_ema(average(dtype=np.float32), 0.99, asarray=single, tolerance=1e-3)


def test_bfloat16_is_half_precision_too():
    rounded = lambda x: x.astype(np.float32).view(np.uint32) >> 16 << 16  # noqa: E731
    half = lambda x: rounded(np.asarray(x)).view(np.float32).astype(float)  # noqa: E731
    said = refusal(testing.assert_ema, average(dtype=half), 0.99)
    assert said.endswith("this: kept in half precision (E.18).")


@pytest.mark.parametrize(
    ("ema", "said"),
    [
        (
            lambda weights: average()(weights)[:-1],
            "ema has shape (99, 32); expected (100, 32), a row after each step",
        ),
        (lambda weights: weights, "ema has shape (101, 32); expected (100, 32)"),
        (lambda weights: None, "ema is a NoneType; expected an array."),
        (
            lambda weights: np.full((100, 32), np.nan),
            "is off by inf of the furthest that it should have moved",
        ),
    ],
)
def test_what_is_no_average_is_said(ema, said):
    assert said in refusal(testing.assert_ema, ema)


def test_an_average_that_replaces_the_weights_is_said():
    def fed_back(weights):
        averages = average()(weights)
        weights[1:] = averages
        return averages

    said = refusal(testing.assert_ema, fed_back, 0.99)
    assert said.startswith("ema writes into the weights that it is given; expected to leave them")


@pytest.mark.parametrize(
    ("decay", "said"),
    [
        (1.0, "decay is 1.0; expected a number in [0, 1)"),
        (lambda k: k / 50, r"decay(51) is 1.02; expected a number in [0, 1]"),
        (lambda k: 1, "decay(k) is 1 for k = 1 … 100; expected an update in one step at least"),
        ("0.99", "decay is '0.99'"),
    ],
)
def test_decays_are_checked(decay, said):
    with pytest.raises((TypeError, ValueError)) as caught:
        testing.assert_ema(average(), decay)
    assert said in str(caught.value)


# Steps of Adam


def steps_of_ours(weights, gradients, dtype=np.float64, **settings):
    weight = (
        td.nn.Linear(1, len(weights), np.random.default_rng(0)).to(np, dtype).named_parameters()["weight"]
    )
    weight.value = weights[None].astype(dtype)
    optimizer, found = td.Adam([weight], **settings), []
    for row in gradients:
        weight.grad = row[None].astype(dtype)
        optimizer.step()
        found.append(weight.value[0].copy())
    return np.array(found)


@given(
    st.floats(1e-6, 1.0),
    st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.9999)),
    st.floats(1e-12, 1e-2),
    st.sampled_from([0.0, 1e-3, 0.5]),
)
def test_our_own_steps_pass(lr, betas, eps, weight_decay):
    settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    testing.assert_adam(partial(steps_of_ours, **settings), **settings)


def test_steps_from_the_paper_pass_and_so_do_ours_in_float32():
    testing.assert_adam(adam(), **SETTINGS)
    testing.assert_adam(adam(move=lambda w, step: w - 0.01 * step), **{**SETTINGS, "weight_decay": 0.0})
    for lr in (1e-2, 1e-3, 1e-4):
        settings = {**SETTINGS, "lr": lr}
        testing.assert_adam(partial(steps_of_ours, dtype=np.float32, **settings), **settings, tolerance=1e-3)


@pytest.mark.parametrize("what", ADAMS)
def test_a_mistake_in_an_optimizer_is_named(what):
    said = refusal(testing.assert_adam, ADAMS[what], **SETTINGS)
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_of_optimizers_is_planted():
    listed = _adam._mistakes(lambda **how: how, (0.9, 0.99), 0.01, 0.1)
    assert {*listed} == {*ADAMS}
    without = _adam._mistakes(lambda **how: how, (0.9, 0.99), 0.01, 0.0)
    by_default = "a weight decay of 0.01, the default of PyTorch's AdamW"
    assert {what for what in listed if "decay" not in what} == {*without} - {by_default}
    settings = {**SETTINGS, "weight_decay": 0.0}
    said = refusal(testing.assert_adam, adam(move=lambda w, step: w - 0.01 * step - 1e-4 * w), **settings)
    assert said.endswith(f"this: {by_default}.")


def test_one_wrong_step_is_enough_and_so_is_one_small_weight():
    late = adam(move=lambda w, step: w)  # never moves
    assert "after 30 of 30 steps, first after step 1. " in refusal(testing.assert_adam, late, **SETTINGS)

    def last_is_off(weights, gradients):
        found = adam()(weights, gradients)
        found[-1, 0] *= 1 + 1e-6  # whose gradients are a hundredth of eps
        return found

    assert "after 1 of 30 steps, first after step 30. " in refusal(
        testing.assert_adam, last_is_off, **SETTINGS
    )


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            lambda weights, gradients: weights,
            "adam has shape (33,); expected (30, 33), a row after each step",
        ),
        (lambda weights, gradients: "no", "adam has dtype"),
        (
            lambda weights, gradients: np.add(gradients, 1, out=gradients),
            "adam writes into the gradients that",
        ),
    ],
)
def test_what_are_no_steps_is_said(optimizer, said):
    assert said in refusal(testing.assert_adam, optimizer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(lr=0.0), "lr is 0.0; expected a positive number"),
        (dict(eps=-1.0), "eps is -1.0; expected a positive number"),
        (dict(betas=(0.9, 1.0)), "betas is (0.9, 1.0); expected two numbers in [0, 1)"),
        (dict(betas=0.9), "betas is 0.9; expected two numbers in [0, 1)"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; expected a number, not negative"),
        (dict(tolerance=0.0), "tolerance is 0.0"),
    ],
)
def test_settings_of_an_optimizer_are_checked(settings, said):
    with pytest.raises(ValueError) as caught:
        testing.assert_adam(adam(), **settings)
    assert said in str(caught.value)
