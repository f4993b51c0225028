"""Whether a training draws what it should: for each sample a t, noise, and whether its class is withheld.

The network that the loss asks is shown x_t and t. The x_0 are known, so the noise is what must have been
added: eps = (x_t - a_t x_0) / s_t. What is drawn is random, and so is compared by its statistics: each is
refused if what is right were that far off once in 10^9 times. A mistake is named if what it draws would not
be refused in this way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, check_number
from tinydiff.backend import column_like
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.testing._asked import (
    SHAPE,
    Function,
    answering,
    batch_shown,
    called,
    check_shape,
    classes_told,
    laid_out,
    output_shape,
    steps_shown,
)
from tinydiff.testing._judge import named

__all__ = ["assert_training_draws"]

RARE = 1e-9  # how often what is right is refused, by each of the tests
SURELY = 6.2  # standard deviations from the mean that are as rare
OF_EACH_T = 30  # draws at least: all t are drawn then, as surely
AT_LEAST, NUMBERS = 5000, 4_000_000  # samples, and numbers of noise that are looked at
FEW = 6  # numbers that are not alike by chance

NO_NOISE = "no noise is added"
ONE_NOISE = "one noise for all samples of a batch"
AGAIN_NOISE = "the same noise at every call: drawn once, or after the same seed"
SEEDED = (
    "several generators have the same seed (E.24), or one is seeded again and again, or noise is kept and "
    "used again"
)
ONE_CHANNEL = "one noise for all channels"
ONE_NUMBER = "one number of noise for all of a sample"
OFFSET = "offset noise, a number for each sample and channel, which is another process, and on purpose"
NORMAL = "normal noise of another size: scaled, or with more added to x_t alone, as by DDPM-IP"
ONE_T = "one t for all samples of a batch"
AGAIN_T = "the same t at every call: drawn once, or after the same seed"
FIRST_CLASS, LAST_CLASS = (
    "no class is told as class 0, which is one",
    "no class is told as the last class, which is one",
)
OTHER_LABELS = "the labels of other samples of the batch"
TOGETHER = "the classes of a batch are withheld together, or none of them"
NEVER = "no class is ever withheld, or it is by a mask or within your network, which is not here"
ALWAYS = "every class is withheld, or told by another name than class_labels or y"
BY_T = "classes are withheld by t: the same random numbers, or the same key, say both"
NOISE_BY_T = "the noise goes with t: both come of the same random numbers, or of the same key"
EXCHANGED = "the share that is withheld and the share that is told are exchanged"


def assert_training_draws(
    loss: Function,
    diffusion: GaussianDiffusion,
    *,
    probabilities: Any = None,
    num_classes: int | None = None,
    label_dropout: float = 0.1,
    axis: int = -1,
    shape: tuple[int, ...] = SHAPE,
    asarray: Function = np.asarray,
) -> None:
    """Raise unless ``loss(network, x0)`` draws t, noise and withheld classes as it should (docs: L.9, V.6).

    The loss is called as in training, and draws for itself: for each sample t from all of 0 … T-1, and noise
    from N(0, I), independently of other samples and calls. So the verdict is random, unlike those of the
    other checks; but code that is right is refused about once in 10^8 times.

    Parameters
    ----------
    loss : callable
        Takes ``network(x_t, t)`` and x0 of `shape`, in [-1, 1]; with `num_classes` also labels (N,), and may
        ask ``network(x_t, t, labels)``, or tell them as ``class_labels`` or ``y``; no class is None, or any
        number but 0 … num_classes - 1: if yours has a mask, or withholds classes within the network, do that
        in a wrapper, ``lambda x, t, y, mask: network(x, t, where(mask, -1, y))``. What the loss returns is
        not looked at. The network answers zeros; of its calls in a loss the first counts.
    diffusion : GaussianDiffusion
        The process: T, and the rates of data and noise.
    probabilities : array of shape (T,), optional
        With which each t is drawn; default: all equal. With `LossSecondMomentSampler` they are its
        ``probabilities()``.
    num_classes : int, optional
        How many classes the labels are drawn from; default: none are given.
    label_dropout : float
        The share of the samples, in [0, 1], whose class is withheld.
    axis : int
        The axis of your channels, 1 for (N, C, H, W).
    shape, asarray
        As in `assert_q_sample`. At least 30 T samples are asked for, and at least 5000: the larger N, the
        fewer calls.

    Raises
    ------
    AssertionError
        If what is drawn is not what it should be; the message says by how much, and by which mistake if it
        is one of those known here. Also if the network is not asked, or is shown something other than x_t
        and t.
    TypeError, ValueError
        If an argument is not of the right kind or out of range.
    """
    check_diffusion(diffusion)
    check_shape(shape, axis)
    p = _checked(probabilities, diffusion.T)
    if num_classes is not None:
        check_counts(num_classes=num_classes)
    check_number("label_dropout", label_dropout, lambda share: 0 <= share <= 1, "a number in [0, 1]")
    t, noise, x0, labels, told = _asked(loss, diffusion, num_classes, axis, shape, asarray)
    before, every = _drawn_before(noise)
    if before and not every:  # what else is drawn comes again, too, and says nothing
        raise AssertionError(before)
    found = [_wrong_times(t, p), before or _wrong_noise(noise, x0, t[: len(noise)], axis)]
    if num_classes is not None and not before:
        found.append(_wrong_labels(told, labels, t, num_classes, label_dropout))
    wrong = [said for said in found if said]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _checked(probabilities: Any, T: int) -> np.ndarray:
    """The probabilities (T,), in float64; ValueError unless they are some."""
    if probabilities is None:
        return np.full(T, 1 / T)
    p = np.asarray(probabilities)
    expected = f"expected {T} numbers, not negative, whose sum is 1"
    if p.shape != (T,) or p.dtype.kind not in "fiu":
        raise ValueError(f"probabilities has shape {p.shape} and dtype {p.dtype}; {expected}.")
    p = p.astype(np.float64)
    if not np.all(p >= 0) or not abs(np.sum(p) - 1) < 1e-6:
        raise ValueError(f"probabilities has sum {np.sum(p):.6g} and minimum {np.min(p):.6g}; {expected}.")
    return p


def _asked(
    loss: Function,
    diffusion: GaussianDiffusion,
    num_classes: int | None,
    axis: int,
    shape: tuple[int, ...],
    asarray: Function,
) -> tuple[np.ndarray, ...]:
    """t (calls, N), noise and x_0 of the first calls, the labels, and what the network is told of them."""
    N, T = shape[0], diffusion.T
    rng = np.random.default_rng(200611239)  # a seed that yours does not have
    signature = "loss(network, x0)" if num_classes is None else "loss(network, x0, labels)"
    a, s = np.sqrt(diffusion.schedule.alphas_cumprod), np.sqrt(diffusion.schedule.one_minus_alphas_cumprod)
    calls = max(2, -(-max(OF_EACH_T * T, AT_LEAST) // N))
    kept = max(2, NUMBERS // math.prod(shape))
    zeros = laid_out(diffusion, axis, np.zeros(output_shape(diffusion, shape)))
    every: list[tuple[np.ndarray, ...]] = []
    shown: list[tuple[np.ndarray, ...]] = []

    def network(x: Any, t: Any, labels: Any) -> Any:
        x, t = batch_shown(x, t)
        if x.shape != shape:
            raise AssertionError(f"the network is shown x of shape {x.shape}; expected {shape}.")
        if not np.all(np.isfinite(x)):
            raise AssertionError(f"the network is shown an x that is not finite, at t = {t}.")
        told = classes_told(x, labels, num_classes) if num_classes else np.zeros(N, np.int64)
        shown.append((x, np.broadcast_to(steps_shown(t, T), N), told))
        answer = asarray(zeros.copy())
        return answer.requires_grad_() if hasattr(answer, "requires_grad_") else answer  # a step may ask it

    for call in range(calls):
        x0, labels = rng.uniform(-1, 1, shape), rng.integers(0, num_classes or 1, N)
        given = [x0.copy()] if num_classes is None else [x0.copy(), labels.copy()]
        shown.clear()
        called(loss, signature, answering(network, with_labels=True), *map(asarray, given))
        if not shown:
            raise AssertionError("loss does not ask the network.")
        x, t, told = shown[0]
        some = N if call < kept else 0
        noise = (x - column_like(a[t], x) * x0)[:some] / column_like(s[t], x)[:some]
        every.append((t, noise, x0[:some], labels, told))
    columns = zip(*every, strict=True)
    return tuple(np.stack([part for part in column if len(part)]) for column in columns)


# t


def _wrong_times(t: np.ndarray, p: np.ndarray) -> str:
    """What is wrong with the times (calls, N), which are to have probabilities p; nothing if it is empty."""
    counts = np.bincount(t.ravel(), minlength=len(p))
    share, by_chance, more, fewer = _alike(t)
    together = t.shape[1] if fewer else 2  # of layers with one offset, one t says the others; or T - 1 - t
    again = by_chance < 1 and bool(np.all(t[1:] == t[:-1]))
    if not more and not again and _fits(counts, p, together):
        return ""
    names = {ONE_T: more and share == 1, AGAIN_T: again}
    for what, q in _wrong_probabilities(p).items():
        names[what] = not more and not again and _fits(counts, q, together)
    if again:
        return f"Every call draws the t of the call before. {_known(names)}"
    if more:
        return (
            f"Two samples of a batch have the same t with a probability of {share:.3g}, where "
            f"{by_chance:.3g} is expected. {_known(names)}"
        )
    expected = t.size * p
    worst = int(np.argmax(np.abs(counts - expected) / np.sqrt(np.maximum(expected, 1))))
    return (
        f"t = {worst} is drawn {counts[worst]} times in {t.size}, where {expected[worst]:.3g} are expected. "
        f"{_known(names)}"
    )


def _wrong_probabilities(p: np.ndarray) -> dict[str, np.ndarray]:
    """Probabilities (T,) that are mistaken for p."""
    from scipy.special import logit, ndtr

    T = len(p)
    u = np.linspace(0, 1, T + 1)

    def without(*left_out: int) -> np.ndarray:
        q = p.copy()
        q[list(left_out)] = 0
        return q / np.sum(q) if np.any(q) else q

    wrong = {
        "t = 0 is never drawn, as by randint(1, T) (E.28)": without(0),
        "t = T - 1 is never drawn, as by randint(0, T - 1) (E.28)": without(T - 1),
        "neither t = 0 nor t = T - 1 is drawn (E.28)": without(0, T - 1),
        "every t is drawn equally often": np.full(T, 1 / T),
        "the probabilities of T - 1 - t": p[::-1],
        "T times the sigmoid of a normal number, as Stable Diffusion 3 draws its t": np.diff(ndtr(logit(u))),
        "T (1 - u^3), as T2I-Adapter draws its t": np.diff(1 - np.cbrt(1 - u)),
    }
    others: list[np.ndarray] = [p]
    for what in [*wrong]:  # what is no mistake here, or the same as one before it
        if any(np.array_equal(wrong[what], other) for other in others):
            del wrong[what]
        else:
            others.append(wrong[what])
    return wrong


# Noise


def _wrong_noise(noise: np.ndarray, x0: np.ndarray, t: np.ndarray, axis: int) -> str:
    """What is wrong with the noise (calls, N, ...), added to x_0 at t (calls, N); nothing if it is empty."""
    centre, size = float(np.mean(noise)), float(np.std(noise))
    if size < 1e-3:
        names = {NO_NOISE: abs(centre) < 1e-3}
        return f"The noise has the standard deviation {size:.3g}, where 1 is expected. {_known(names)}"
    z = (noise - centre) / size
    return (
        _other_states(z, x0, t)
        or _wrong_relation(z, t)
        or _wrong_dependence(z, size**2, axis)
        or _wrong_distribution(noise.ravel(), centre, size)
    )


def _drawn_before(noise: np.ndarray) -> tuple[str, bool]:
    """That noise (calls, N, ...) was drawn in an earlier call, empty if none was; and whether all was."""
    calls = len(noise)
    rows = noise.reshape(-1, math.prod(noise.shape[2:]))
    if rows.shape[1] < FEW:
        rows = noise.reshape(calls, -1)
    if len(np.unique(np.round(rows[0], 4))) < FEW:  # rows may be alike by chance
        return "", False
    order = np.argsort(rows[:, 0])
    group = np.empty(len(rows), np.int64)  # of equals, but for rounding
    group[order] = np.cumsum(np.append(0, np.mean(np.diff(rows[order], axis=0) ** 2, axis=1) > 1e-8))
    call = np.arange(len(rows)) // (len(rows) // calls)
    first = np.full(group.max() + 1, calls)
    np.minimum.at(first, group, call)
    earlier = first[group]
    again = np.flatnonzero(earlier < call)
    if len(again) == 0:
        return "", False
    k = again[0]
    every = len(again) == int(np.sum(call > 0))
    names = {AGAIN_NOISE: every, SEEDED: not every or calls == 2}
    said = (
        f"Of {len(rows)} noises {len(again)} were drawn in an earlier call, the first of them in call "
        f"{call[k] + 1}, as in call {earlier[k] + 1}. {_known(names)}"
    )
    return said, every


def _wrong_relation(z: np.ndarray, t: np.ndarray) -> str:
    """Whether the first numbers of a batch's noise go with its times; nothing if they do not."""
    if np.all(t == t[:, :1]):  # a batch counts but once
        return ""
    first = z.reshape(len(z), -1)[:, : t.shape[1]]
    rho = float(np.mean((t - np.mean(t)) / np.std(t) * first))
    if abs(rho) * math.sqrt(first.size) <= SURELY:
        return ""
    said = f"The noise has the correlation {rho:.3g} with t, where there should be none."
    return f"{said} {_known({NOISE_BY_T: True})}"


def _wrong_dependence(z: np.ndarray, variance: float, axis: int) -> str:
    """Whether numbers z (calls, N, ...), standardised, go with each other; nothing if they do not."""
    after = float(np.mean(z[1:] * z[:-1]))
    surely = {0: after} if abs(after) * math.sqrt(z[1:].size) > SURELY else {}
    found = {k: _correlation(z, k) for k in range(1, z.ndim)}
    surely |= {k: rho for k, (rho, rare) in found.items() if rare}
    if not surely:
        return ""
    # Where much goes together there are fewer numbers than it seems, and small correlations are chance.
    largest = max(map(abs, surely.values()))
    surely = {k: rho for k, rho in sorted(surely.items()) if abs(rho) > largest / 10}
    where = {0: "a call and the next", 1: "two samples of a batch"}
    said = [
        f"{rho:.3g} between {where.get(k, f'two places along axis {k - 1}')}" for k, rho in surely.items()
    ]
    one = {k for k, rho in surely.items() if rho > 0.99}
    data = {k for k in range(2, z.ndim) if z.shape[k] > 1}
    channels = axis + 1 if axis > 0 else z.ndim - 1
    common = (variance - 1) / variance  # if they have that in common, beside what is each one's own
    near = SURELY * 2 / math.sqrt(z.size)  # for both are estimates
    names = {
        AGAIN_NOISE: 0 in one,
        ONE_NOISE: 1 in one,
        ONE_CHANNEL: one & data == {channels} != data,
        ONE_NUMBER: bool(data) and data <= one,
        OFFSET: common > near / 3
        and surely.keys() <= data - {channels}
        and all(abs(found[k][0] - common) < near for k in data - {channels}),
    }
    return f"The noise has the correlation {' and '.join(said)}, where there should be none. {_known(names)}"


def _correlation(z: np.ndarray, axis: int) -> tuple[float, bool]:
    """The correlation of numbers at different places of an axis, and whether it is not by chance."""
    from scipy.special import chdtr, chdtrc

    n = z.shape[axis]
    if n == 1:
        return 0.0, False
    squares = float(np.sum(np.sum(z, axis=axis) ** 2))
    # Of independent normal numbers each sum of n has the variance n.
    rare = min(chdtr(z.size / n, squares / n), chdtrc(z.size / n, squares / n)) < RARE / 2
    return (squares / z.size - 1) / (n - 1), bool(rare)


def _other_states(z: np.ndarray, x0: np.ndarray, t: np.ndarray) -> str:
    """Whether what is taken for noise depends on x_0 or on t."""
    of_x0 = float(np.mean(z * x0)) * math.sqrt(3)  # which is uniform in [-1, 1]
    late = t > np.median(t)
    squares = np.mean(z.reshape(*t.shape, -1) ** 2, axis=2)
    many, few = int(np.sum(~late)), int(np.sum(late))
    of_each = few > 0 and not np.all(t == t[:, :1])  # else a batch counts but once
    change = float(np.mean(squares[late]) - np.mean(squares[~late])) if of_each else 0.0
    limit = SURELY * float(np.std(squares)) * math.sqrt(1 / many + 1 / max(few, 1))
    if abs(of_x0) * math.sqrt(z.size) <= SURELY and abs(change) <= limit:
        return ""
    changes = f"{abs(change):.3g} {'larger' if change > 0 else 'smaller'}"
    return (
        "The network is shown other states than a_t x_0 + s_t eps: what is taken for eps has the correlation "
        f"{of_x0:.3g} with x_0, and a variance that is {changes} in the later half of t. "
        "assert_q_sample says more; or x_0 is flipped, shuffled or rescaled before, which is to be left out."
    )


def _wrong_distribution(noise: np.ndarray, centre: float, size: float) -> str:
    """What is wrong with how numbers (n,) are distributed, which are to be normal."""
    from scipy.special import ndtr, ndtri

    edges = ndtri(np.arange(1, 33) / 33)
    counts = np.bincount(np.searchsorted(edges, noise), minlength=33)

    def drawn_from(cdf: Function) -> bool:
        return _fits(counts, np.diff(cdf(edges), prepend=0.0, append=1.0))

    off = max(abs(centre), abs(size**2 - 1) / math.sqrt(2)) * math.sqrt(noise.size)
    if off <= SURELY and drawn_from(ndtr):
        return ""
    return (
        f"The noise has the mean {centre:.3g} and the standard deviation {size:.4g}"
        f"{'' if off > SURELY else ', but is not normal'}; expected N(0, I). "
        f"{_known({what: drawn_from(cdf) for what, cdf in _distributions(size).items()})}"
    )


def _distributions(size: float) -> dict[str, Function]:
    """Distribution functions that are mistaken for the normal one."""
    from scipy.special import ndtr

    def uniform(low: float, high: float) -> Function:
        return lambda x: np.clip((x - low) / (high - low), 0, 1)

    return {
        "uniform in [0, 1): rand for randn (E.29)": uniform(0, 1),
        "uniform in [-1, 1)": uniform(-1, 1),
        "uniform, of variance 1": uniform(-math.sqrt(3), math.sqrt(3)),
        "normal, but drawn again beyond 2": lambda x: np.clip(
            (ndtr(x) - ndtr(-2)) / (1 - 2 * ndtr(-2)), 0, 1
        ),
        "normal, but clipped to [-1, 1]": lambda x: np.where(x < -1, 0, np.where(x >= 1, 1, ndtr(x))),
        "normal, but only its size": lambda x: np.where(x < 0, 0, 2 * ndtr(x) - 1),
        NORMAL: lambda x: ndtr(x / size),
    }


# Classes


def _wrong_labels(told: np.ndarray, labels: np.ndarray, t: np.ndarray, num_classes: int, share: float) -> str:
    """What is wrong with the classes told (calls, N), -1 where withheld; nothing if it is empty."""
    withheld = told < 0
    other = ~withheld & (told != labels)
    if np.any(other):
        odds = share * (1 - 1 / num_classes)  # that a class is withheld, and is not the one told instead
        instead = not np.any(withheld) and _fits(
            np.bincount(other.ravel(), minlength=2), np.array([1 - odds, odds])
        )

        def times_told(row: np.ndarray) -> np.ndarray:
            return np.bincount(row[row >= 0], minlength=num_classes)

        rows = zip(told, labels, strict=True)
        names = {
            FIRST_CLASS: instead and np.all(told[other] == 0),
            LAST_CLASS: instead and np.all(told[other] == num_classes - 1),
            OTHER_LABELS: all(np.all(times_told(row) <= times_told(given)) for row, given in rows),
        }
        return (
            f"The network is told another class than its own of {np.mean(other):.3g} of the samples. "
            f"{_known(names)}"
        )
    counts, expected = np.bincount(withheld.ravel(), minlength=2), np.array([1 - share, share])
    together, _, more, _ = _alike(withheld.astype(np.int64))
    if not more and _fits(counts, expected):
        return _withheld_by(withheld, labels, t, num_classes)
    names = {
        TOGETHER: more and together == 1,
        NEVER: counts[1] == 0,
        ALWAYS: counts[0] == 0,
        EXCHANGED: not more and np.all(counts > 0) and _fits(counts, expected[::-1]),
    }
    said = ", and not of each by itself" if more else ""
    return (
        f"The class of {np.mean(withheld):.3g} of the samples is withheld{said}, where {share:.3g} is "
        f"expected. {_known(names)}"
    )


def _withheld_by(withheld: np.ndarray, labels: np.ndarray, t: np.ndarray, num_classes: int) -> str:
    """Whether it depends on t or on the class if a class is withheld; nothing if it does not."""
    n = int(np.sum(withheld))
    if n in (0, withheld.size):
        return ""
    spread = float(np.std(t)) * math.sqrt(1 / n - 1 / withheld.size)
    if abs(np.mean(t[withheld]) - np.mean(t)) > SURELY * spread:
        return (
            f"Classes are withheld where t is {np.mean(t[withheld]):.4g} on average, and {np.mean(t):.4g} of "
            f"all samples; expected the same. {_known({BY_T: True})}"
        )
    counts = np.bincount(labels[withheld], minlength=num_classes)
    if _fits(counts, np.full(num_classes, 1 / num_classes)):
        return ""
    worst = int(np.argmax(np.abs(counts - n / num_classes)))
    return (
        f"Class {worst} is withheld {counts[worst]} times, where {n / num_classes:.3g} are expected, as of "
        f"others. {_known({BY_T: False})}"
    )


# By chance


def _fits(counts: np.ndarray, p: np.ndarray, together: int = 1) -> bool:
    """Whether numbers that were drawn that often may have the probabilities p.

    Of those that are drawn `together` each alone is, but one may follow from the other, as T - 1 - t from t;
    then their squares come in groups, all alike, and there are so many times fewer independent ones.
    """
    from scipy.special import chdtrc, pdtr, pdtrc

    expected = np.sum(counts) * p
    at_least = np.where(counts > 0, pdtrc(np.maximum(counts - 1, 0), expected), 1.0)
    if np.any(np.minimum(pdtr(counts, expected), at_least) < RARE / len(p)):
        return False
    often = expected >= 5
    observed, wanted = (np.append(x[often], np.sum(x[~often])) for x in (counts, expected))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    squares = np.sum((observed - wanted) ** 2 / wanted)
    return bool(chdtrc(max(len(wanted) - 1, 1) / together, squares / together) >= RARE)


def _alike(drawn: np.ndarray) -> tuple[float, float, bool, bool]:
    """The share of equal pairs in a row (., N), that by chance, and if it is surely more or likely less."""
    from scipy.special import chdtrc

    (rows, N), n = drawn.shape, drawn.size
    ordered = np.sort(drawn, axis=1)
    first = np.concat([np.ones((rows, 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    sizes = np.diff(np.flatnonzero(first), append=n)  # of each group of equals
    equal, pairs = float(np.sum(sizes * (sizes - 1))) / 2, n * (N - 1) / 2
    shares = np.bincount(drawn.ravel()) / n
    by_chance, of_three = (float(np.sum(shares**2)) * n - 1) / (n - 1), float(np.sum(shares**3))
    # The variance of a pair, once the shares are those that were found; and how many normal numbers have as
    # many squares as there are pairs by chance. Half as many, if t and T - 1 - t are drawn together.
    variance = by_chance - 2 * of_three + by_chance**2
    if pairs == 0 or variance <= 0:
        return 0.0, by_chance, False, False
    of = rows * (1 - by_chance) ** 2 / variance / 2
    deviation = math.sqrt(2 * variance * pairs)
    z = (equal - by_chance * pairs - 10) / deviation  # but for 10, if they are few
    more = bool(chdtrc(of, of + z * math.sqrt(2 * of)) < RARE)
    return equal / pairs, by_chance, more, equal - by_chance * pairs < -2 * deviation


def _known(names: dict[str, Any]) -> str:
    """A sentence that names those mistakes that are so, or says that there is none."""
    return named({what: 0.0 if so else math.inf for what, so in names.items()}, 1.0, 1e-3)
