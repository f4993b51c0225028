"""Whether attention lets every pixel ask all pixels, in heads, as it should."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tinydiff._checks import check_counts
from tinydiff.testing._asked import Function, answer_of, check_shape, check_tolerance
from tinydiff.testing._judge import distance, named, single

__all__ = ["assert_attention"]


def assert_attention(
    attention: Function,
    heads: int,
    *,
    shape: tuple[int, int, int] = (3, 10, 24),
    asarray: Function = np.asarray,
    tolerance: float = 1e-5,
) -> None:
    """Raise unless ``attention(q, k, v)`` is softmax(q k.T / sqrt(d)) v in every head (docs: B.12).

    Parameters
    ----------
    attention : callable
        Takes queries, keys and values of `shape`, as the three projections make them, and returns what the
        last projection takes; it may write into them. If yours makes them of x itself, put these in the place
        of what it makes.
    heads : int
        How many there are; they share the C channels, d = C / heads each, the first has 0 … d - 1.
    shape : tuple of int
        (N, L, C): samples, pixels, channels.
    asarray : callable
        As in `assert_q_sample`.
    tolerance : float
        The largest difference that passes, relative to the largest number of its sample.

    Raises
    ------
    AssertionError
        If it is something else. The message says how far off it is, and names the mistake that gives it, if
        it is known here.
    ValueError
        If `heads`, `shape` or `tolerance` is not as said above.
    """
    check_tolerance(tolerance)
    check_counts(heads=heads)
    check_shape(shape)
    if len(shape) != 3 or shape[2] % heads:
        raise ValueError(f"shape is {shape!r}; expected (N, L, C), with C a multiple of heads = {heads}.")
    q, k, v = 1.5 * np.random.default_rng(0).standard_normal((3, *shape))
    came = answer_of(attention, "attention(q, k, v)", {"q": q, "k": k, "v": v}, asarray, shape, to_keep=False)
    right = _attention(heads)(q, k, v)
    off = distance(came, right, right)
    if np.max(off) <= tolerance:
        return
    others = {what: wrong(q, k, v) for what, wrong in _mistakes(heads, shape).items()}
    distances = {what: float(np.max(distance(came, other, right))) for what, other in others.items()}
    worst, count = float(np.max(off)), f"in {np.count_nonzero(off > tolerance)} of {len(off)} samples"
    size = f"off by {worst:.3g} of its largest number, by more than {tolerance:.3g} {count}"
    unknown = (
        " In half precision what is right can be off by as much: ask in float32."
        if single(worst, came)
        else ""
    )
    raise AssertionError(
        f"attention is {size if np.isfinite(worst) else f'not finite {count}'}. Expected softmax(q k.T / "
        f"sqrt({shape[2] // heads})) v in each of {heads} heads (docs: B.12).\n"
        f"{named(distances, worst, tolerance, unknown)}"
    )


# Of its parts, one of which may be wrong


def softmax(scores: np.ndarray, axis: int | tuple[int, int] = -1) -> np.ndarray:
    from scipy.special import softmax as along

    return np.asarray(along(scores, axis=axis))


def in_blocks(x: np.ndarray, heads: int) -> np.ndarray:
    """(N, L, C) -> (N, heads, L, d), each head with the next d channels."""
    N, L, C = x.shape
    return x.reshape(N, L, heads, C // heads).swapaxes(1, 2)


def of_blocks(x: np.ndarray) -> np.ndarray:
    """And back."""
    N, heads, L, d = x.shape
    return x.swapaxes(1, 2).reshape(N, L, heads * d)


def by_turns(x: np.ndarray, heads: int) -> np.ndarray:
    """(N, L, C) -> (N, heads, L, d), each head with every `heads`-th channel."""
    N, L, C = x.shape
    return np.moveaxis(x.reshape(N, L, C // heads, heads), -1, 1)


def of_turns(x: np.ndarray) -> np.ndarray:
    """And back."""
    N, heads, L, d = x.shape
    return np.moveaxis(x, 1, -1).reshape(N, L, heads * d)


def as_it_lies(x: np.ndarray, heads: int) -> np.ndarray:
    """(N, L, C) -> (N, heads, L, d), without a transposition: the first pixels are the first head."""
    N, L, C = x.shape
    return x.reshape(N, heads, L, C // heads)


def laid_down(x: np.ndarray) -> np.ndarray:
    """And back."""
    N, heads, L, d = x.shape
    return x.reshape(N, L, heads * d)


def _attention(
    heads: int,
    *,
    split: Function = in_blocks,
    join: Function = of_blocks,
    scale: float | None = None,
    weights: Function = softmax,
    mixed: Function = np.matmul,
    ordered: Callable[..., tuple[np.ndarray, ...]] = lambda q, k, v: (q, k, v),
) -> Function:
    """softmax(scale q k.T) v in every head."""

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (split(x, heads) for x in ordered(q, k, v))
        scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return np.asarray(join(mixed(weights(scores), v)))

    return attention


def _mistakes(heads: int, shape: tuple[int, ...]) -> dict[str, Function]:
    """What is mistaken for attention."""
    N, L, C = shape
    d = C // heads

    def packed_by_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(N, L, 3 C): of each head its queries, keys and values."""
        return np.stack([x.reshape(N, L, heads, d) for x in (q, k, v)], axis=3).reshape(N, L, 3 * C)

    def read_by_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.concatenate([q, k, v], axis=2).reshape(N, L, heads, 3, d)
        return tuple(parts[:, :, :, i].reshape(N, L, C) for i in range(3))

    def of_channels(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (in_blocks(x, heads) for x in (q, k, v))
        return of_blocks(v @ softmax(q.swapaxes(-1, -2) @ k / math.sqrt(d)).swapaxes(-1, -2))

    def linear(scale: float) -> Function:
        def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            q, k, v = (in_blocks(x, heads) for x in (q, k, v))
            return of_blocks(scale * softmax(q) @ (softmax(k, axis=-2).swapaxes(-1, -2) @ v))

        return attention

    def of_samples(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        swapped = [x.swapaxes(0, 1) for x in (q, k, v)]
        return np.asarray(_attention(heads)(*swapped).swapaxes(0, 1))

    def of_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (x.reshape(N, L, heads, d) for x in (q, k, v))
        return np.asarray(softmax(q @ k.swapaxes(-1, -2) / math.sqrt(d)) @ v).reshape(shape)

    def causal(scores: np.ndarray) -> np.ndarray:
        return softmax(np.where(np.tri(L, dtype=bool), scores, -np.inf))

    def in_order(names: str) -> Function:
        return lambda q, k, v: tuple({"q": q, "k": k, "v": v}[name] for name in names)

    def built(**part: object) -> Function:
        return _attention(heads, **part)  # type: ignore[arg-type]

    def over(axis: int | tuple[int, int]) -> Function:
        return lambda scores: softmax(scores, axis)

    return {
        "the softmax is over the queries, not over the keys (E.33)": built(weights=over(-2)),
        "the softmax is over the heads": built(weights=over(1)),
        "the softmax is over the samples": built(weights=over(0)),
        "the softmax is over samples and heads": built(weights=over((0, 1))),
        "the softmax is over queries and keys together": built(weights=over((-2, -1))),
        "no softmax": built(weights=np.positive),
        "scores that are not divided by sqrt(d)": built(scale=1.0),
        "scores divided by d: queries and keys were each divided by sqrt(d)": built(scale=1 / d),
        "scores divided by the root of sqrt(d): of queries and keys only one was divided by it": built(
            scale=d**-0.25
        ),
        "scores divided by the root of all channels, not of a head's": built(scale=C**-0.5),
        "scores divided by the root of the number of pixels": built(scale=L**-0.5),
        "scores multiplied by sqrt(d)": built(scale=d**0.5),
        "weights divided by sqrt(d), not scores: after the softmax, not before": built(
            scale=1.0, weights=lambda scores: softmax(scores) / math.sqrt(d)
        ),
        **{
            f"q, k, v are taken for {', '.join(names)}": built(ordered=in_order(names))
            for names in ("kqv", "qvk", "vkq", "kvq", "vqk", "qkk", "qkq", "qqv", "kkv")
        },
        "the weights are transposed after the softmax": built(
            mixed=lambda weights, v: weights.swapaxes(-1, -2) @ v
        ),
        "a causal mask: no pixel sees those after it": built(weights=causal),
        "one head of all channels": _attention(1),
        "each head has every heads-th channel, not the next d": built(split=by_turns, join=of_turns),
        "each head has every heads-th channel, but gives the next d": built(split=by_turns),
        "heads are cut by a reshape without a transposition, and joined so: they are of pixels": built(
            split=as_it_lies, join=laid_down
        ),
        "heads are cut by a reshape without a transposition": built(split=as_it_lies),
        "heads are joined by a reshape without a transposition": built(join=laid_down),
        "q, k, v side by side are read as if they were packed by heads (E.34)": built(ordered=read_by_heads),
        "q, k, v packed by heads are read as if they were side by side (E.34)": built(
            ordered=lambda q, k, v: tuple(np.split(packed_by_heads(q, k, v), 3, axis=2))
        ),
        "channels ask channels, not pixels pixels": of_channels,
        "samples ask samples, not pixels pixels: (L, N, C) for (N, L, C)": of_samples,
        "the heads of a pixel ask each other, not the pixels": of_heads,
        "linear attention (Shen et al. 2021)": linear(1.0),
        "linear attention, divided by sqrt(d), as in denoising-diffusion-pytorch": linear(1 / math.sqrt(d)),
    }
