"""The mistakes of a training that tinydiff.testing names, in code of its own.

What it draws, how an optimizer steps and how its weights are averaged: by the name in the check's list, which
`test_testing_training.py` holds these tables to.
"""

from itertools import cycle

import numpy as np
from mistakes import EPS, LINEAR
from scipy.special import ndtri

# What a training draws

T = LINEAR.T
EVEN = np.full(T, 1 / T)
EARLY = np.arange(T, 0, -1) / np.sum(np.arange(T, 0, -1))  # probabilities that fall with t


def of_one_number(process=EPS):
    """A loss in which the number that says t says who is withheld, too."""
    rng = np.random.default_rng(0)

    def loss(network, x0, labels):
        u = rng.random(len(x0))
        x_t = process.q_sample(x0, times := (u * T).astype(int), rng.standard_normal(x0.shape))
        return network(x_t, times, np.where(u < 0.1, 10, labels))

    return loss


def noise_of_t(process=EPS):
    """A loss whose t come of the same uniform numbers as the first of its noise."""
    rng = np.random.default_rng(0)

    def loss(network, x0):
        u = rng.random(x0.shape)
        times = (u.ravel()[: len(x0)] * T).astype(int)
        return network(process.q_sample(x0, times, ndtri(u)), times)

    return loss


def training(t=None, noise=None, told=None, seed=0, process=EPS, classes=10):
    """A loss that draws its own: t of (rng, N), noise of (rng, shape), what is told of (rng, labels)."""
    rng = np.random.default_rng(seed)
    t = t or (lambda rng, N: rng.integers(process.T, size=N))
    noise = noise or (lambda rng, shape: rng.standard_normal(shape))
    told = told or withheld(0.1, classes)

    def loss(network, x0, labels=None):
        times, eps = t(rng, len(x0)), noise(rng, x0.shape)
        x_t = process.q_sample(x0, times, eps)
        if labels is None:
            return np.mean((network(x_t, times) - eps) ** 2)
        return np.mean((network(x_t, times, class_labels=told(rng, labels)) - eps) ** 2)

    return loss


def on_ranks(*seeds):
    """What several processes with these seeds draw, one after the other."""
    losses = cycle([training(seed=seed) for seed in seeds])
    return lambda *given: next(losses)(*given)


def withheld(share, none=10):
    return lambda rng, labels: np.where(rng.random(len(labels)) < share, none, labels)


def once(draw):
    """What `draw` gives the first time, again and again."""
    kept = {}
    return lambda rng, size: kept.setdefault(size, draw(rng, size))


def shared(*axes):
    """Noise that is the same along these axes of (N, ...)."""

    def noise(rng, shape):
        one = [1 if k in axes else n for k, n in enumerate(shape)]
        return np.broadcast_to(rng.standard_normal(one), shape)

    return noise


def offset(rng, shape):
    return rng.standard_normal(shape) + 0.3 * rng.standard_normal((shape[0], 1, 1, shape[3]))


def drawn_again(rng, shape):
    noise = rng.standard_normal((9, *shape))  # of which one at least is within 2, almost surely
    first = np.argmax(np.abs(noise) < 2, axis=0)
    return np.take_along_axis(noise, first[None], axis=0)[0]


DRAWS = [
    (
        {},
        {
            "one t for all samples of a batch": training(lambda rng, N: np.full(N, rng.integers(T))),
            "the same t at every call: drawn once, or after the same seed": training(
                once(lambda rng, N: rng.permutation(T)[:N])
            ),
            "t = 0 is never drawn, as by randint(1, T) (E.28)": training(
                lambda rng, N: rng.integers(1, T, size=N)
            ),
            "t = T - 1 is never drawn, as by randint(0, T - 1) (E.28)": training(
                lambda rng, N: rng.integers(T - 1, size=N)
            ),
            "neither t = 0 nor t = T - 1 is drawn (E.28)": training(
                lambda rng, N: rng.integers(1, T - 1, size=N)
            ),
            "T times the sigmoid of a normal number, as Stable Diffusion 3 draws its t": training(
                lambda rng, N: (T / (1 + np.exp(-rng.standard_normal(N)))).astype(int)
            ),
            "T (1 - u^3), as T2I-Adapter draws its t": training(
                lambda rng, N: np.minimum((1 - rng.random(N) ** 3) * T, T - 1).astype(int)
            ),
            "no noise is added": training(noise=lambda rng, shape: np.zeros(shape)),
            "one noise for all samples of a batch": training(noise=shared(0)),
            "the same noise at every call: drawn once, or after the same seed": training(
                noise=once(shared())
            ),
            "several generators have the same seed (E.24), or one is seeded again and again, or noise is "
            "kept and used again": on_ranks(0, 0),
            "one noise for all channels": training(noise=shared(3)),
            "one number of noise for all of a sample": training(noise=shared(1, 2, 3)),
            "offset noise, a number for each sample and channel, which is another process, and on purpose": (
                training(noise=offset)
            ),
            "the noise goes with t: both come of the same random numbers, or of the same key": noise_of_t(),
            "uniform in [0, 1): rand for randn (E.29)": training(noise=lambda rng, shape: rng.random(shape)),
            "uniform in [-1, 1)": training(noise=lambda rng, shape: rng.uniform(-1, 1, shape)),
            "uniform, of variance 1": training(
                noise=lambda rng, shape: rng.uniform(-(3**0.5), 3**0.5, shape)
            ),
            "normal, but drawn again beyond 2": training(noise=drawn_again),
            "normal, but clipped to [-1, 1]": training(
                noise=lambda rng, shape: np.clip(rng.standard_normal(shape), -1, 1)
            ),
            "normal, but only its size": training(
                noise=lambda rng, shape: np.abs(rng.standard_normal(shape))
            ),
            "normal noise of another size: scaled, or with more added to x_t alone, as by DDPM-IP": (
                training(noise=lambda rng, shape: rng.standard_normal(shape) + rng.normal(0, 0.2, shape))
            ),
        },
    ),
    (
        dict(probabilities=EARLY),
        {
            "every t is drawn equally often": training(),
            "the probabilities of T - 1 - t": training(lambda rng, N: rng.choice(T, N, p=EARLY[::-1])),
        },
    ),
    (
        dict(num_classes=10),
        {
            "no class is ever withheld, or it is by a mask or within your network, which is not here": (
                training(told=lambda rng, labels: labels)
            ),
            "every class is withheld, or told by another name than class_labels or y": training(
                told=lambda rng, labels: None
            ),
            "the share that is withheld and the share that is told are exchanged": training(
                told=withheld(0.9)
            ),
            "the classes of a batch are withheld together, or none of them": training(
                told=lambda rng, labels: None if rng.random() < 0.1 else labels
            ),
            "no class is told as class 0, which is one": training(told=withheld(0.1, 0)),
            "no class is told as the last class, which is one": training(told=withheld(0.1, 9)),
            "classes are withheld by t: the same random numbers, or the same key, say both": of_one_number(),
            "the labels of other samples of the batch": training(
                told=lambda rng, labels: withheld(0.1)(rng, labels[::-1])
            ),
        },
    ),
]


# Averages of the weights


def average(
    decay=lambda k: 0.99, rate=None, before=0, start=None, end=lambda average, k: average, dtype=np.float64
):
    """The averages after each step, of weights from before the first on."""

    def averages(weights):
        kept, found = dtype(weights[0]) if start is None else start * weights[0], []
        for k in range(1, len(weights)):
            share = dtype(1 - decay(k) if rate is None else rate(k))
            kept = dtype(kept + share * (dtype(weights[k - before]) - kept))
            found.append(end(kept, k))
        return np.array(found)

    return averages


class KeepsItsRate:
    """The example of diffusers for text to image until its pull request 1868."""

    def __init__(self):
        self.decay = 0.99

    def rate(self, k):
        self.decay = 0.99 if k == 1 else self.decay
        self.decay = 1 - min(self.decay, (1 + k) / (10 + k))
        return self.decay


AVERAGES = {
    "decay and 1 - decay exchanged (E.30)": average(rate=lambda k: 0.99),
    "the rate, 1 - min(decay, (1 + k) / (10 + k)), is kept as the next decay (E.30)": average(
        rate=KeepsItsRate().rate
    ),
    "it begins with zeros": average(start=0.0),
    "it begins with zeros, and is divided by 1 - decay^k, as Adam's moments are": average(
        start=0.0, end=lambda average, k: average / (1 - 0.99**k)
    ),
    "the weights before the step, not after it": average(before=1),
    "it is never updated": average(rate=lambda k: 0.0),
    "the weights themselves": lambda weights: weights[1:],
    "the mean of all weights": average(rate=lambda k: 1 / (k + 1)),
    "the mean of all weights after the first": average(rate=lambda k: 1 / k),
    "the first update copies the weights, as that of PyTorch's AveragedModel": average(
        lambda k: 0.99 if k > 1 else 0.0
    ),
    "min(decay, k / (9 + k)) at update k": average(lambda k: min(0.99, k / (9 + k))),
    "it is updated only after every 10th step": average(lambda k: 0.99 if k % 10 == 0 else 1.0),
    "min(decay, (1 + k) / (10 + k)) at update k, tinydiff's": average(
        lambda k: min(0.99, (1 + k) / (10 + k))
    ),
    "min(decay, k / (9 + k)) at update k, and 0 at the first, EMAModel's": average(
        lambda k: min(0.99, k / (9 + k)) if k > 1 else 0.0
    ),
    "min(decay, 1 - k^(-2/3)) at update k, ema_pytorch's, and EMAModel's with use_ema_warmup": average(
        lambda k: min(0.99, 1 - k ** (-2 / 3))
    ),
    **{
        f"it is updated {m} times a step, at each of {m} micro-batches (E.30)": average(
            lambda k, m=m: 0.99**m
        )
        for m in (2, 4, 8)
    },
    "kept in half precision (E.18)": average(dtype=np.float16),
}


# Steps of Adam


def adam(  # Kingma & Ba 2015, algorithm 1, with these settings
    of_m=lambda m, k, g: m / (1 - 0.9**k),
    of_v=lambda v, k: np.sqrt(v / (1 - 0.99**k)) + 1e-6,
    b1=0.9,
    b2=0.99,
    share=lambda b: 1 - b,
    move=lambda w, step: w - 0.01 * step - 0.01 * 0.1 * w,
    moments=lambda before, after: after,
    coupled=0.0,
    rests=lambda g: False,
):
    def path(weights, gradients):
        w, m, v, found = weights.copy(), 0 * weights, 0 * weights, []
        for k, g in enumerate(gradients, 1):
            g = g + coupled * w
            before, (m, v) = (m, v), (b1 * m + share(b1) * g, b2 * v + share(b2) * g * g)
            of = moments(before, (m, v))
            w = np.where(rests(g), w, move(w, of_m(of[0], k, g) / of_v(of[1], k)))
            m, v = np.where(rests(g), before, (m, v))
            found.append(w)
        return np.array(found)

    return path


def largest_so_far():
    """AMSGrad's second moment, over the steps of a path; the first of them begins anew."""
    top = []

    def of_v(v, k):
        top[:] = [v if k == 1 else np.maximum(top[0], v)]
        return np.sqrt(top[0] / (1 - 0.99**k)) + 1e-6

    return of_v


SETTINGS = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
no_decay = lambda w, step: w - 0.01 * step  # noqa: E731
ADAMS = {
    "the bias is corrected as after one step more": adam(
        lambda m, k, g: m / (1 - 0.9 ** (k + 1)), lambda v, k: np.sqrt(v / (1 - 0.99 ** (k + 1))) + 1e-6
    ),
    "no bias is corrected": adam(lambda m, k, g: m, lambda v, k: np.sqrt(v) + 1e-6),
    "the bias of the first moment alone is corrected": adam(of_v=lambda v, k: np.sqrt(v) + 1e-6),
    "the bias of the second moment alone is corrected": adam(lambda m, k, g: m),
    "eps inside the root": adam(of_v=lambda v, k: np.sqrt(v / (1 - 0.99**k) + 1e-6)),
    "eps beside the root before its bias is corrected, which is the paper's other eps": adam(
        of_v=lambda v, k: (np.sqrt(v) + 1e-6) / np.sqrt(1 - 0.99**k)
    ),
    "beta1 and beta2 exchanged": adam(
        lambda m, k, g: m / (1 - 0.99**k),
        lambda v, k: np.sqrt(v / (1 - 0.9**k)) + 1e-6,
        b1=0.99,
        b2=0.9,
    ),
    "the second moment without its root": adam(of_v=lambda v, k: v / (1 - 0.99**k) + 1e-6),
    "gradients and squares without their factors, 1 - beta": adam(share=lambda b: 1.0),
    "the moments before the gradient, not after it": adam(moments=lambda before, after: before),
    "the largest second moment so far, which is AMSGrad": adam(of_v=largest_so_far()),
    "the gradient in the place of the first moment": adam(lambda m, k, g: g),
    "the gradient in the place of the first moment, and no bias is corrected: RMSprop": adam(
        lambda m, k, g: g, lambda v, k: np.sqrt(v) + 1e-6
    ),
    "the first moment alone, without the second": adam(of_v=lambda v, k: 1.0),
    "a weight rests while its gradient is 0, as in SparseAdam": adam(rests=lambda g: g == 0),
    "up the gradient, not down": adam(move=lambda w, step: w + 0.01 * step - 0.01 * 0.1 * w),
    "no weight decay": adam(move=no_decay),
    "the weight decay is in the gradient, as in PyTorch's Adam, not AdamW": adam(move=no_decay, coupled=0.1),
    "the weight decay is not multiplied by lr, as in the paper of AdamW": adam(
        move=lambda w, step: w - 0.01 * step - 0.1 * w
    ),
    "the weight decay is that of the new weights": adam(
        move=lambda w, step: (w - 0.01 * step) * (1 - 0.01 * 0.1)
    ),
}
