"""tinydiff.testing.assert_time_embedding: what is right passes, and a mistake is called by its name."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import refusal

from tinydiff import testing
from tinydiff.nn import sinusoidal_embedding
from tinydiff.testing._judge import Claim

DIM, T = 32, 1000
HALF = DIM // 2


def embedding(
    order="cosines, then sines",
    exponent=lambda k: k / HALF,
    period=10_000,
    of_t=lambda t: t,
    second=np.sin,
):
    """Vaswani et al. 2017, section 3.5, in a loop over the numbers."""

    def embed(t):
        y = np.zeros((len(t), DIM))
        for k in range(HALF):
            angle = of_t(np.asarray(t, float)) / period ** exponent(k)
            cos, sin = np.cos(angle), second(angle)
            if order == "cosines, then sines":
                y[:, k], y[:, HALF + k] = cos, sin
            elif order == "sines, then cosines":
                y[:, k], y[:, HALF + k] = sin, cos
            elif order == "sines and cosines by turns":
                y[:, 2 * k], y[:, 2 * k + 1] = sin, cos
            else:
                y[:, 2 * k], y[:, 2 * k + 1] = cos, sin
        return y

    return embed


def by_itself(power):
    columns = [(np.cos if i % 2 else np.sin, 10_000 ** (power * i / DIM)) for i in range(DIM)]
    return lambda t: np.stack([function(t / period) for function, period in columns], axis=1)


def angles(exponent, t):
    return np.array([[i / 10_000 ** exponent(j) for j in range(DIM)] for i in t])


def in_every_second_row(y):
    y[::2], y[1::2] = np.sin(y[::2]), np.cos(y[1::2])
    return y


def backwards(y):  # as DDPM implementations copied from one another have it: chapter 9, E.32
    even = np.arange(0, T, 2)
    y[even] = np.sin(y[even])
    y[1 - even] = np.cos(y[even])
    return y


def table(cut, exponent):
    rows = cut(angles(exponent, range(T)))
    return lambda t: rows[t]


def in_bfloat16(t):  # of which the mantissa has 8 bits: every second number above 256, and so on
    steps = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(t, 1))) - 7, 0)
    return np.round(t / steps) * steps


ORDERS = (
    "cosines, then sines",
    "sines, then cosines",
    "sines and cosines by turns",
    "cosines and sines by turns",
)
SHOWN = {
    "t - 1 in the place of t": lambda t: np.maximum(t - 1, 0),
    "t - 1 in the place of t, and T - 1 in that of 0": lambda t: (t - 1) % T,
    "t + 1 in the place of t (E.13)": lambda t: np.minimum(t + 1, T - 1),
    "T - 1 - t in the place of t": lambda t: 999 - t,
    "times in bfloat16 (E.14)": in_bfloat16,
    "t / T in the place of t": lambda t: t / T,
    "2 pi t in the place of t": lambda t: 2 * np.pi * t,
}
EACH = {
    "i / dim": lambda j: j / DIM,
    "2 i / dim": lambda j: 2 * j / DIM,
    "2 (i // 2) / dim": lambda j: (j - j % 2) / DIM,
}
CONVENTIONS = {
    f"another convention: {order}, freq_shift {shift} (E.14)": (
        order,
        lambda k, shift=shift: k / (HALF - shift),
    )
    for order, shift in product(ORDERS, (0, 1))
}
RIGHT = CONVENTIONS.pop("another convention: cosines, then sines, freq_shift 0 (E.14)")
PLANTED = {
    **{what: embedding(*convention) for what, convention in CONVENTIONS.items()},
    **{what: embedding(of_t=of_t) for what, of_t in SHOWN.items()},
    **{
        f"{what}; and {shown}": embedding(*CONVENTIONS[what], of_t=SHOWN[shown])
        for what, shown in product(CONVENTIONS, SHOWN)
    },
    **{
        f"{order}, and twice the exponent, as of a k that goes by twos and is doubled": embedding(
            order, lambda k: 2 * (2 * k) / DIM
        )
        for order in ORDERS
    },
    **{
        f"{order}, and half the exponent, k / dim for k / half": embedding(order, lambda k: k / DIM)
        for order in ORDERS
    },
    "sines and cosines by turns, each number with an exponent of its own, i / dim": by_itself(1),
    "sines and cosines by turns, each number with an exponent of its own, 2 i / dim": by_itself(2),
    **{
        f"sines and cosines by rows of a table, with exponents {what} (E.32)": table(
            in_every_second_row, EACH[what]
        )
        for what in EACH
    },
    **{
        f"sines and cosines by rows of a table, half of them backwards, with exponents {what} (E.32)": table(
            backwards, EACH[what]
        )
        for what in EACH
    },
    "cosines in the place of sines, too": embedding(second=np.cos),
    "sines in the place of cosines, too": lambda t: np.tile(embedding()(t)[:, HALF:], 2),
    "the slowest frequency first": embedding(exponent=lambda k: (HALF - 1 - k) / HALF),
    "frequencies that grow": embedding(exponent=lambda k: -k / HALF),
    "exponents from k = 1 on": embedding(exponent=lambda k: (k + 1) / HALF),
    "a max_period of T, 1000": embedding(period=T),
}


@given(
    st.integers(4, 70),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, -2.0]),
    st.sampled_from([10_000.0, 100]),
    st.integers(1, 40),
)
def test_our_own_sinusoids_pass(dim, flip_sin_to_cos, freq_shift, max_period, T):
    convention = dict(flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift, max_period=max_period)
    like = np.zeros(0, np.float32)
    testing.assert_time_embedding(
        lambda t: sinusoidal_embedding(t, dim, like=like, **convention), dim, T=T, **convention
    )


def test_the_same_code_without_a_mistake_passes():
    testing.assert_time_embedding(embedding(), DIM, tolerance=1e-12)
    hos = embedding("sines, then cosines", lambda k: k / (HALF - 1))
    testing.assert_time_embedding(hos, DIM, flip_sin_to_cos=False, freq_shift=1, tolerance=1e-12)


@pytest.mark.parametrize("what", PLANTED)
def test_a_mistake_is_named(what):
    said = refusal(testing.assert_time_embedding, PLANTED[what], DIM)
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_a_mistake_is_named_in_another_convention_and_of_an_odd_length():
    named = dict(flip_sin_to_cos=False, freq_shift=1.0, max_period=100.0, T=300)

    def of(scale=1.0, period=100.0, shift=1, sin=np.sin, cos=np.cos):
        def embed(t):
            angles = scale * t[:, None] / period ** (np.arange(16) / (16 - shift))
            return np.concatenate([sin(angles), cos(angles), 0 * t[:, None]], axis=1)

        return embed

    testing.assert_time_embedding(of(), 33, **named)
    for what, yours in {
        "cosines in the place of sines, too": of(sin=np.cos),
        "sines in the place of cosines, too": of(cos=np.sin),
        "a max_period of T, 300": of(period=300.0),
        "t / T in the place of t": of(1 / 300),
        "2 pi t in the place of t": of(2 * np.pi),
        "another convention: sines, then cosines, freq_shift 0 (E.14)": of(shift=0),
        "another convention: cosines, then sines, freq_shift 1 (E.14)": of(sin=np.cos, cos=np.sin),
    }.items():
        said = refusal(testing.assert_time_embedding, yours, 33, **named)
        assert "Expected [sin, cos] of t max_period^(-k / (dim / 2 - freq_shift)), freq_shift 1 (" in said
        assert said.endswith(f"It is what comes of this: {what}."), said


def test_a_chain_of_one_step_has_a_table_of_one_row():
    assert "None of the " in refusal(testing.assert_time_embedding, lambda t: embedding()(t) + 1, DIM, T=1)


def test_the_default_is_another_convention_for_ho_et_al():
    hos = dict(flip_sin_to_cos=False, freq_shift=1.0)
    right = "another convention: cosines, then sines, freq_shift 0 (E.14)"
    assert refusal(testing.assert_time_embedding, embedding(), DIM, **hos).endswith(f"of this: {right}.")
    late = embedding(of_t=SHOWN["t + 1 in the place of t (E.13)"])
    said = refusal(testing.assert_time_embedding, late, DIM, **hos)
    assert said.endswith(f"of this: {right}; and t + 1 in the place of t (E.13).")


def test_sines_and_cosines_by_turns_are_asked_about_without_their_turns():
    turns = embedding("sines and cosines by turns")
    testing.assert_time_embedding(lambda t: turns(t)[:, [*range(1, DIM, 2), *range(0, DIM, 2)]], DIM)
    testing.assert_time_embedding(
        lambda t: turns(t)[:, [*range(0, DIM, 2), *range(1, DIM, 2)]], DIM, flip_sin_to_cos=False
    )


@pytest.mark.parametrize("exponent", [lambda j: 2 * j / DIM, lambda j: -2 * j / DIM, lambda j: j / DIM])
def test_what_depends_on_the_place_in_a_batch_is_said(exponent):
    by_rows = lambda t: in_every_second_row(angles(exponent, t))  # noqa: E731
    said = refusal(testing.assert_time_embedding, by_rows, DIM)
    assert said.startswith("time_embedding gives something else for t = [") and "row of a batch" in said
    refusal(testing.assert_time_embedding, by_rows, DIM, T=1)
    slightly = lambda t: embedding()(t) + 1e-2 * (np.arange(len(t)) % 2)[:, None]  # noqa: E731
    assert "gives something else" in refusal(testing.assert_time_embedding, slightly, DIM)
    assert "or where one t is taken for all" in refusal(
        testing.assert_time_embedding, lambda t: embedding()(t[:1] + 0 * t), DIM
    )


def test_every_mistake_is_planted(monkeypatch):
    claims = []
    monkeypatch.setattr(Claim, "refusal", lambda claim, *_: claims.append(claim))
    testing.assert_time_embedding(embedding(), DIM)
    assert claims[0].mistakes.keys() == PLANTED.keys()


def angles_in(dtype):
    def embed(t):
        omega = (10_000.0 ** (-np.arange(HALF) / HALF)).astype(dtype)
        angles = t.astype(dtype)[:, None] * omega
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    return embed


def test_float32_passes_and_angles_in_half_precision_do_not():
    testing.assert_time_embedding(angles_in(np.float32), DIM)
    testing.assert_time_embedding(lambda t: embedding()(t).astype(np.float16), DIM)
    assert f"None of the {len(PLANTED)} mistakes" in refusal(
        testing.assert_time_embedding, angles_in(np.float16), DIM
    )
    refusal(testing.assert_time_embedding, angles_in(np.float32), DIM, tolerance=1e-5)


@pytest.mark.parametrize("t_wrong", [0, 1, 500, T - 1])
def test_one_wrong_t_is_enough(t_wrong):
    wrong = embedding(of_t=lambda t: np.where(t == t_wrong, t + 0.01, t))
    said = refusal(testing.assert_time_embedding, wrong, DIM)
    assert f"at t = {t_wrong}; off by more than 0.001 at no other t" in said


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda t: embedding()(t)[:, :-1], "time_embedding has shape (8, 31); expected (8, 32)."),
        (lambda t: embedding()(t).T, "time_embedding has shape (32, 8); expected (8, 32)."),
        (lambda t: None, "time_embedding is a NoneType"),
        (
            lambda t: embedding()(t.__imul__(1)) + 0 * t.__iadd__(1)[:, None],
            "time_embedding writes into the t that it is given",
        ),
    ],
)
def test_what_is_no_embedding_is_said(yours, said):
    assert refusal(testing.assert_time_embedding, yours, DIM).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(dim=3), "dim is 3; expected at least 4, for two frequencies"),
        (dict(dim=32.0), "dim is 32.0; expected an integer"),
        (dict(freq_shift=16), "freq_shift is 16; expected a number less than dim / 2, 16"),
        (dict(freq_shift=np.nan), "freq_shift is nan; expected a number less than dim / 2, 16"),
        (dict(freq_shift=-np.inf), "freq_shift is -inf; expected a number less than dim / 2, 16"),
        (dict(flip_sin_to_cos="x"), "flip_sin_to_cos is 'x'; expected one of True, False"),
        (dict(max_period=0), "max_period is 0; expected a positive number"),
        (dict(T=0), "T is 0; expected an integer of at least 1"),
        (dict(tolerance=0), "tolerance is 0; expected a positive number"),
    ],
)
def test_arguments_are_checked(options, said):
    with pytest.raises(ValueError) as caught:
        testing.assert_time_embedding(embedding(), **(dict(dim=DIM) | options))
    assert str(caught.value).startswith(said)
