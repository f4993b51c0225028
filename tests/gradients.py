"""How a hand-written derivative is judged, and random instances of every layer to judge.

A layer returns y and backward; ``sum(y * dy)`` is a scalar whose derivative backward(dy) claims to be. Two
judges: central differences, by `testing.assert_backward`; and PyTorch's autograd, in
``test_oracle_layers.py``.

Every parameter is randomised: layers that begin at zero hide the errors of those before them. Inputs,
parameters and dy are made read-only, so that a layer that writes in somebody else's array fails at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinydiff import nn, testing
from tinydiff.models import MLP
from tinydiff.models.mlp import ResidualBlock


@dataclass
class Case:
    """A layer with random parameters, and inputs for it; ``layer(*inputs)`` returns y and backward."""

    layer: Callable[..., Any]
    inputs: list[np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)  # what a reference has to be told
    module: nn.Module | None = None  # whose parameters; the layer, if that is one

    @property
    def parameters(self):
        module = self.module or self.layer
        return module.named_parameters() if isinstance(module, nn.Module) else {}


def normal(rng, shape, dtype=np.float64):
    """Standard normal numbers in a read-only array."""
    return frozen(rng.standard_normal(shape).astype(dtype))


def frozen(array):
    array.flags.writeable = False
    return array


def randomise(module, rng, dtype=np.float64):
    """Every parameter becomes normal, read-only, of a size that keeps activations near 1; returns the module.

    Gains, of normalisations, are spread around 1.
    """
    for name, p in module.named_parameters().items():
        gain = name.endswith("weight") and len(p.shape) == 1
        fan_in = np.prod(p.shape[:-1]) if len(p.shape) > 1 else 4
        p.value = frozen((gain + rng.standard_normal(p.shape) / np.sqrt(fan_in)).astype(dtype))
        p.zero_grad()
    return module


def as_tuple(gradients):
    return gradients if isinstance(gradients, tuple) else (gradients,)


def gradients_of(case, dy):
    """y, and name -> gradient of sum(y * dy) for the inputs ("x0", "x1", ...) and every parameter."""
    for p in case.parameters.values():
        p.zero_grad()
    y, backward = case.layer(*case.inputs)
    named = {f"x{i}": g for i, g in enumerate(as_tuple(backward(dy)))}
    return y, named | {name: p.grad for name, p in case.parameters.items()}


def as_layer(loss):
    """A loss of one array, value and gradient, as a layer that returns a number."""

    def layer(x):
        value, gradient = loss(x)
        return value, lambda dy: dy * gradient

    return layer


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(a)) for a in arrays))


def assert_gradients_agree(ours, theirs, tolerance):
    """Norm-wise, against the norm of all of the layer's gradients.

    Not each against its own: some gradients are zero in exact arithmetic (the bias of attention's keys, what
    a normalisation removes), and there only rounding is left to compare.
    """
    assert ours.keys() == theirs.keys()
    scale = norm(theirs.values())
    for name, gradient in ours.items():
        assert gradient.shape == theirs[name].shape, name
        error = norm([gradient - theirs[name]])
        assert error <= tolerance * scale, f"the gradient of {name} is off by {error:.1e}; all: {scale:.1e}"


def assert_central_differences_agree(case, rng):
    """The case keeps what `testing.assert_backward` asks of a layer."""
    seed = int(rng.integers(2**32))
    testing.assert_backward(case.layer, *case.inputs, parameters=case.parameters, seed=seed)


# Random instances. Each takes Hypothesis' `draw` and a generator for the numbers.

sizes = st.integers(1, 5)
features = st.integers(1, 6)
# The NumPy kernel of 3x3 convolutions changes its algorithm at 16 channels.
channels = st.sampled_from([1, 2, 3, 4, 5, 16, 17])
# Of normalisations: so large that a group whose numbers come out alike is no pole to differences of STEP, and
# that eps cannot be forgotten unnoticed.
EPS = 1e-2


def linear(draw, rng):
    lead = draw(st.sampled_from([(), (2,), (2, 3), (1, 2, 3)]))
    a, b = draw(features), draw(features)
    return Case(randomise(nn.Linear(a, b, rng), rng), [normal(rng, (*lead, a))])


def conv(draw, rng):
    k, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    default = (k // 2, k // 2)
    before, after = draw(st.sampled_from([default, (0, 0), (0, 1), (1, 1), (1, 0), (0, 2)]))
    smallest = max(1, k - before - after)
    h, w = (draw(st.integers(smallest, smallest + 5)) for _ in range(2))
    c, d = draw(channels), draw(channels)
    layer = nn.Conv2d(c, d, k, rng=rng, stride=stride, padding=(before, after))
    return Case(
        randomise(layer, rng),
        [normal(rng, (draw(st.integers(1, 3)), h, w, c))],
        {"stride": stride, "padding": (before, after)},
    )


def group_norm(draw, rng, then_silu=False):
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    eps = draw(st.sampled_from([EPS, 1.0]))
    layer = randomise(nn.GroupNorm(groups, groups * per_group, eps, then_silu), rng)
    x = image(draw, rng, groups * per_group)
    return Case(layer, [frozen(2 * x + 1)], {"groups": groups, "eps": eps})


def group_norm_silu(draw, rng):
    return group_norm(draw, rng, then_silu=True)


def silu(draw, rng):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    return Case(nn.silu, [frozen(3 * rng.standard_normal(shape))])


def image(draw, rng, c, even=False):
    n, h, w = draw(st.integers(1, 2)), draw(sizes), draw(sizes)
    return normal(rng, (n, 2 * h, 2 * w, c) if even else (n, h, w, c))


def upsample_nearest(draw, rng):
    return Case(nn.upsample_nearest, [image(draw, rng, draw(features))])


def downsample(draw, rng):
    c, padding = draw(channels), draw(st.sampled_from([0, 1]))
    layer = randomise(nn.Downsample(c, padding, rng), rng)
    return Case(layer, [image(draw, rng, c, even=True)], {"padding": padding})


def upsample(draw, rng):
    c = draw(channels)
    return Case(randomise(nn.Upsample(c, rng), rng), [image(draw, rng, c)])


def attention(draw, rng):
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    c = heads * head_dim
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    layer = nn.SelfAttention(c, None if heads == 1 else head_dim, groups, EPS, rng)
    return Case(
        randomise(layer, rng),
        [image(draw, rng, c)],
        {"heads": heads, "groups": groups, "eps": EPS},
    )


def time_embedding(draw, rng):
    dim = draw(features)
    layer = randomise(nn.TimestepEmbedding(dim, draw(features), rng), rng)
    return Case(layer, [normal(rng, (draw(st.integers(1, 3)), dim))])


def class_embedding(draw, rng):
    num_classes, f, n = draw(st.integers(1, 4)), draw(features), draw(st.integers(1, 5))
    layer = randomise(nn.ClassEmbedding(num_classes, f, rng), rng)
    labels = rng.integers(0, num_classes + 1, n)
    return Case(lambda emb: layer(emb, labels), [normal(rng, (n, f))], {"labels": labels}, layer)


def dropout(draw, rng):
    rate, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])), draw(st.integers(0, 99))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))

    def layer(x):
        return nn.dropout(x, rate, np.random.default_rng(seed))

    return Case(layer, [normal(rng, shape)])


def concat(draw, rng):
    lead = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return Case(nn.concat, [normal(rng, (*lead, draw(features))) for _ in range(2)])


def resnet_block(draw, rng):
    groups = draw(st.sampled_from([1, 2]))
    c = groups * draw(st.integers(1, 2))
    d = draw(st.sampled_from([c, groups * 3, 16]))
    e = draw(features)
    layer = randomise(nn.ResnetBlock(c, d, e, groups, EPS, 0.0, rng), rng)
    x = image(draw, rng, c)
    return Case(layer, [x, normal(rng, (x.shape[0], e))], {"groups": groups, "eps": EPS})


def residual_block(draw, rng):
    f, e, n = draw(features), draw(features), draw(st.integers(1, 3))
    layer = randomise(ResidualBlock(f, e, rng), rng)
    return Case(layer, [normal(rng, (n, f)), normal(rng, (n, e))])


def labels_for(model, n, rng):
    """Classes for a network that can be told them, "no class" among them; else None."""
    classes = model.config.get("num_classes")
    return None if classes is None else frozen(rng.integers(0, classes + 1, n))


def mlp(draw, rng):
    d, n = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), draw(features), draw(st.integers(1, 3)), 2 * draw(sizes))
    model = MLP(d, *shape, rng, num_classes=draw(st.sampled_from([None, 2])))
    t, labels = rng.integers(0, 1000, n), labels_for(model, n, rng)
    randomise(model, rng)
    settings = {"t": t, "labels": labels, "config": model.config}
    return Case(lambda x: model(x, t, labels=labels), [normal(rng, (n, d))], settings, model)


LAYERS = {
    "Linear": linear,
    "Conv2d": conv,
    "GroupNorm": group_norm,
    "GroupNorm, SiLU": group_norm_silu,
    "silu": silu,
    "upsample_nearest": upsample_nearest,
    "Downsample": downsample,
    "Upsample": upsample,
    "SelfAttention": attention,
    "TimestepEmbedding": time_embedding,
    "ClassEmbedding": class_embedding,
    "dropout": dropout,
    "concat": concat,
    "ResnetBlock": resnet_block,
    "MLP's block": residual_block,
    "MLP": mlp,
}


@st.composite
def cases(draw, name):
    """An instance of the layer `name`, and the generator its numbers came from."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return LAYERS[name](draw, rng), rng
