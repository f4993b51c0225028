"""tinydiff.testing.assert_attention: what is right passes, and a mistake is called by its name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import refusal

from tinydiff import testing
from tinydiff.kernels import portable
from tinydiff.testing import _attention

HEADS = 4


def softmax(scores, axis=-1):
    e = np.exp(scores - scores.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def heads_of(x, heads=HEADS):
    """A list, each (N, L, d)."""
    return np.split(x, heads, axis=2)


def by_heads(attend, heads=HEADS, split=heads_of):
    """A function of (q, k, v), from one of each head's."""
    return lambda *given: np.concatenate(
        [attend(*parts) for parts in zip(*(split(x, heads) for x in given), strict=True)], axis=2
    )


def attention(
    heads=HEADS, scale=lambda d, C, L: d**-0.5, weights=softmax, mix="nij,njd->nid", split=heads_of
):
    """Vaswani et al. 2017, eq. 1 and section 3.2.2, head by head."""

    def attend(q, k, v):
        L, d = q.shape[1:]
        return np.einsum(mix, weights(np.einsum("nid,njd->nij", q, k) * scale(d, heads * d, L)), v)

    return by_heads(attend, heads, split)


def over_heads(q, k, v):
    return joined(attended(*map(in_torch_s_order, (q, k, v)), axis=1))


def over_samples_and_heads(q, k, v):  # softmax(dim=0) of scores (N heads, L, L)
    a, b, c = (in_torch_s_order(x).reshape(-1, x.shape[1], x.shape[2] // HEADS) for x in (q, k, v))
    y = softmax(a @ b.swapaxes(1, 2) / a.shape[2] ** 0.5, 0) @ c
    return joined(y.reshape(len(q), HEADS, *y.shape[1:]))


def in_torch_s_order(x):
    """(N, heads, L, d)"""
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)


def attended(q, k, v, axis=-1):
    """Of (N, heads, L, d)."""
    return softmax(np.einsum("nhid,nhjd->nhij", q, k) / q.shape[3] ** 0.5, axis) @ v


def cut_as_it_lies(x):
    N, L, C = x.shape
    return x.reshape(N, HEADS, L, C // HEADS)


def joined(x):
    N, heads, L, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(N, L, heads * d)


def packed_by_heads(*given):
    return np.concatenate(
        [part for of_head in zip(*map(heads_of, given), strict=True) for part in of_head], axis=2
    )


def read_by_heads(*given):
    parts = np.split(np.concatenate(given, axis=2), 3 * HEADS, axis=2)
    return [np.concatenate(parts[i::3], axis=2) for i in range(3)]


def taken_for(names):
    return lambda *given: attention()(*(dict(zip("qkv", given, strict=True))[name] for name in names))


def samples(q, k, v):  # PyTorch's MultiheadAttention without batch_first=True
    y = np.empty_like(q)
    for pixel in range(q.shape[1]):
        y[:, pixel] = attention()(q[None, :, pixel], k[None, :, pixel], v[None, :, pixel])[0]
    return y


def heads(q, k, v):
    y = np.empty_like(q)
    for n, pixel in np.ndindex(*q.shape[:2]):
        a, b, c = (x[n, pixel].reshape(HEADS, -1) for x in (q, k, v))
        y[n, pixel] = (softmax(a @ b.T / a.shape[1] ** 0.5) @ c).ravel()
    return y


@by_heads
def channels(q, k, v):
    return np.einsum("nij,nlj->nli", softmax(np.einsum("nli,nlj->nij", q, k) / q.shape[2] ** 0.5), v)


def linear(power):
    @by_heads
    def attend(q, k, v):
        context = np.einsum("nld,nle->nde", softmax(k, 1), v)
        return np.einsum("nde,nld->nle", context, softmax(q) * q.shape[2] ** power)

    return attend


PLANTED = {
    "the softmax is over the queries, not over the keys (E.33)": attention(weights=lambda s: softmax(s, 1)),
    "the softmax is over the heads": over_heads,
    "the softmax is over the samples": attention(weights=lambda s: softmax(s, 0)),
    "the softmax is over samples and heads": over_samples_and_heads,
    "the softmax is over queries and keys together": attention(weights=lambda s: softmax(s, (1, 2))),
    "no softmax": attention(weights=lambda s: s),
    "scores that are not divided by sqrt(d)": attention(scale=lambda d, C, L: 1),
    "scores divided by d: queries and keys were each divided by sqrt(d)": attention(
        scale=lambda d, C, L: 1 / d
    ),
    "scores divided by the root of sqrt(d): of queries and keys only one was divided by it": attention(
        scale=lambda d, C, L: d**-0.25
    ),
    "scores divided by the root of all channels, not of a head's": attention(scale=lambda d, C, L: C**-0.5),
    "scores divided by the root of the number of pixels": attention(scale=lambda d, C, L: L**-0.5),
    "scores multiplied by sqrt(d)": attention(scale=lambda d, C, L: d**0.5),
    "weights divided by sqrt(d), not scores: after the softmax, not before": lambda q, k, v: (
        attention(scale=lambda d, C, L: 1)(q, k, v) / (q.shape[2] / HEADS) ** 0.5
    ),
    **{
        f"q, k, v are taken for {', '.join(names)}": taken_for(names)
        for names in ("kqv", "qvk", "vkq", "kvq", "vqk", "qkk", "qkq", "qqv", "kkv")
    },
    "the weights are transposed after the softmax": attention(mix="nji,njd->nid"),
    "a causal mask: no pixel sees those after it": attention(
        weights=lambda s: softmax(s + np.triu(np.full(s.shape[1:], -1e300), 1))
    ),
    "one head of all channels": attention(heads=1),
    "each head has every heads-th channel, not the next d": lambda q, k, v: np.stack(
        np.split(
            attention(split=lambda x, heads: [x[:, :, i::heads] for i in range(heads)])(q, k, v),
            HEADS,
            axis=2,
        ),
        axis=3,
    ).reshape(q.shape),
    "each head has every heads-th channel, but gives the next d": attention(
        split=lambda x, heads: [x[:, :, i::heads] for i in range(heads)]
    ),
    "heads are cut by a reshape without a transposition, and joined so: they are of pixels": lambda q, k, v: (
        attended(*map(cut_as_it_lies, (q, k, v))).reshape(q.shape)
    ),
    "heads are cut by a reshape without a transposition": lambda q, k, v: joined(
        attended(*map(cut_as_it_lies, (q, k, v)))
    ),
    "heads are joined by a reshape without a transposition": lambda q, k, v: attended(
        *map(in_torch_s_order, (q, k, v))
    ).reshape(q.shape),
    "q, k, v side by side are read as if they were packed by heads (E.34)": lambda q, k, v: attention()(
        *read_by_heads(q, k, v)
    ),
    "q, k, v packed by heads are read as if they were side by side (E.34)": lambda q, k, v: attention()(
        *np.split(packed_by_heads(q, k, v), 3, axis=2)
    ),
    "channels ask channels, not pixels pixels": channels,
    "samples ask samples, not pixels pixels: (L, N, C) for (N, L, C)": samples,
    "the heads of a pixel ask each other, not the pixels": heads,
    "linear attention (Shen et al. 2021)": linear(0),
    "linear attention, divided by sqrt(d), as in denoising-diffusion-pytorch": linear(-0.5),
}


def ours(heads):
    def attend(q, k, v):
        N, L, C = q.shape
        split = [x.reshape(N, L, heads, C // heads).transpose(0, 2, 1, 3) for x in (q, k, v)]
        return joined(portable.attention(*split, (C // heads) ** -0.5)[0])

    return attend


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_our_own_attention_passes(N, L, heads, d):
    testing.assert_attention(ours(heads), heads, shape=(N, L, heads * d))
    testing.assert_attention(attention(heads), heads, shape=(N, L, heads * d), tolerance=1e-12)


@pytest.mark.parametrize("what", PLANTED)
def test_a_mistake_is_named(what):
    said = refusal(testing.assert_attention, PLANTED[what], HEADS)
    assert said.endswith(f"It is what comes of this: {what}."), said


def test_every_mistake_is_planted():
    assert _attention._mistakes(HEADS, (3, 10, 24)).keys() == PLANTED.keys()


def of_numbers(dtype, factor=1):
    return lambda *given: factor * attention()(*(x.astype(dtype) for x in given))


def test_float32_passes_and_half_precision_is_called_so():
    testing.assert_attention(of_numbers(np.float32), HEADS)
    excuse = "In half precision what is right can be off by as much: ask in float32."
    assert refusal(testing.assert_attention, of_numbers(np.float16), HEADS).endswith(excuse)
    assert excuse not in refusal(testing.assert_attention, of_numbers(np.float64, 0.98), HEADS)
    testing.assert_attention(of_numbers(np.float16), HEADS, tolerance=0.05)


def test_what_is_almost_a_mistake_of_the_list_is_not_called_so():
    for what in ("no softmax", "scores that are not divided by sqrt(d)"):
        almost = lambda *given, yours=PLANTED[what]: 1.02 * yours(*given)  # noqa: E731
        assert "None of the " in refusal(testing.assert_attention, almost, HEADS)


def test_a_function_may_write_into_what_it_is_given():
    def scaled_in_place(q, k, v):
        q *= 6**-0.5
        return attention(scale=lambda d, C, L: 1)(q, k, v)

    testing.assert_attention(scaled_in_place, HEADS)


@pytest.mark.parametrize("sample", [0, 2])
def test_one_number_is_enough_and_the_tolerance_is_what_it_says(sample):
    def yours(q, k, v, by):
        y = attention()(q, k, v)
        y[sample, 3, 4] += by * np.max(np.abs(y[sample]))
        return y

    testing.assert_attention(lambda *given: yours(*given, 0.9e-5), HEADS)
    said = refusal(testing.assert_attention, lambda *given: yours(*given, 2e-5), HEADS)
    assert "is off by 2e-05 of its largest number, by more than 1e-05 in 1 of 3 samples." in said


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda q, k, v: attention()(q, k, v)[0], "attention has shape (10, 24); expected (3, 10, 24)."),
        (lambda q, k, v: None, "attention is a NoneType"),
        (
            lambda q, k, v: attention()(q, k, v) * np.nan,
            "attention is not finite in 3 of 3 samples. Expected",
        ),
    ],
)
def test_what_is_no_attention_is_said(yours, said):
    assert refusal(testing.assert_attention, yours, HEADS).startswith(said)


@pytest.mark.parametrize(
    ("heads", "options", "said"),
    [
        (0, {}, "heads is 0; expected an integer of at least 1"),
        (5, {}, "shape is (3, 10, 24); expected (N, L, C), with C a multiple of heads = 5"),
        (4, dict(shape=(3, 24)), "shape is (3, 24); expected (N, L, C), with C a multiple of heads = 4"),
        (4, dict(shape=(3, 0, 24)), "shape is (3, 0, 24); expected (N, ...)"),
        (4, dict(tolerance=0), "tolerance is 0; expected a positive number"),
    ],
)
def test_arguments_are_checked(heads, options, said):
    with pytest.raises(ValueError) as caught:
        testing.assert_attention(attention(), heads, **options)
    assert str(caught.value).startswith(said)
