"""Every layer against PyTorch: the same function of the same float64 numbers, differentiated by autograd.

The references are written in tinydiff's layout, with PyTorch's own convolution, normalisation and attention
in the middle, so that autograd's gradients need no translation.
"""

import numpy as np
import pytest
from gradients import LAYERS, assert_gradients_agree, cases, gradients_of, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from tinydiff import nn

torch = pytest.importorskip("torch")
diffusers_embeddings = pytest.importorskip("diffusers.models.embeddings")
F = torch.nn.functional

pytestmark = pytest.mark.oracle


def linear(x, p, name=""):
    return F.linear(x, p[f"{name}weight"].T, p[f"{name}bias"])


def conv(x, p, name="", stride=1, padding=(1, 1)):
    x = F.pad(x.permute(0, 3, 1, 2), (*padding, *padding))
    y = F.conv2d(x, p[f"{name}weight"].permute(3, 2, 0, 1).contiguous(), p[f"{name}bias"], stride)
    return y.permute(0, 2, 3, 1)


def group_norm(x, p, groups, eps, name=""):
    # Not F.group_norm, which refuses a group of one number.
    y = torch.group_norm(x.permute(0, 3, 1, 2), groups, p[f"{name}weight"], p[f"{name}bias"], eps)
    return y.permute(0, 2, 3, 1)


def upsample_nearest(x):
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)


def attention(x, p, heads, groups, eps):
    n, h, w, c = x.shape
    pixels = group_norm(x, p, groups, eps, "group_norm.").reshape(n, h * w, c)
    q, k, v = (linear(pixels, p, f"to_{m}.").unflatten(2, (heads, -1)).transpose(1, 2) for m in "qkv")
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + linear(out, p, "to_out.0.").reshape(x.shape)


def resnet_block(x, emb, p, groups, eps):
    h = conv(F.silu(group_norm(x, p, groups, eps, "norm1.")), p, "conv1.")
    h = h + linear(emb, p, "time_emb_proj.")[:, None, None]
    h = conv(F.silu(group_norm(h, p, groups, eps, "norm2.")), p, "conv2.")
    if "conv_shortcut.weight" in p:
        x = conv(x, p, "conv_shortcut.", padding=(0, 0))
    return x + h


def residual_block(x, emb, p, name=""):
    h = linear(F.silu(x), p, f"{name}linear_1.") + linear(emb, p, f"{name}time_emb_proj.")
    return x + linear(F.silu(h), p, f"{name}linear_2.")


def time_embedding(x, p, name=""):
    return linear(F.silu(linear(x, p, f"{name}linear_1.")), p, f"{name}linear_2.")


def class_embedding(emb, p, labels, name=""):
    return emb + F.embedding(torch.as_tensor(labels), p[f"{name}weight"])


def mlp(x, p, t, labels, config):
    sinusoids = nn.sinusoidal_embedding(t, config["time_features"], like=np.zeros(1))
    emb = time_embedding(torch.as_tensor(sinusoids), p, "time_embedding.")
    emb = F.silu(emb if labels is None else class_embedding(emb, p, labels, "class_embedding."))
    h = linear(x, p, "linear_in.")
    for i in range(config["blocks"]):
        h = residual_block(h, emb, p, f"blocks.{i}.")
    return linear(F.silu(h), p, "linear_out.")


REFERENCES = {
    "Linear": linear,
    "Conv2d": conv,
    "GroupNorm": group_norm,
    "GroupNorm, SiLU": lambda x, p, groups, eps: F.silu(group_norm(x, p, groups, eps)),
    "silu": lambda x, p: F.silu(x),
    "upsample_nearest": lambda x, p: upsample_nearest(x),
    "Downsample": lambda x, p, padding: conv(x, p, "conv.", 2, (padding, 1)),
    "Upsample": lambda x, p: conv(upsample_nearest(x), p, "conv."),
    "SelfAttention": attention,
    "TimestepEmbedding": time_embedding,
    "ClassEmbedding": class_embedding,
    "concat": lambda a, b, p: torch.cat([a, b], -1),
    "ResnetBlock": resnet_block,
    "MLP's block": residual_block,
    "MLP": mlp,
}


def test_every_layer_but_the_random_one_has_a_reference():
    assert LAYERS.keys() - REFERENCES.keys() == {"dropout"}


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_output_and_gradients(name, data):
    case, rng = data.draw(cases(name))
    xs = {f"x{i}": torch.tensor(x, requires_grad=True) for i, x in enumerate(case.inputs)}
    p = {key: torch.tensor(q.value, requires_grad=True) for key, q in case.parameters.items()}
    theirs = REFERENCES[name](*xs.values(), p, **case.settings)
    dy = normal(rng, tuple(theirs.shape))
    theirs.backward(torch.tensor(dy))
    ours, gradients = gradients_of(case, dy)
    expected = theirs.detach().numpy()
    assert np.linalg.norm(ours - expected) <= 1e-10 * np.linalg.norm(expected)
    assert_gradients_agree(gradients, {key: v.grad.numpy() for key, v in {**xs, **p}.items()}, 1e-10)


@settings(deadline=None)
@given(
    t=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
    dim=st.integers(4, 41),
    flip=st.booleans(),
    shift=st.sampled_from([0, 1]),
)
def test_sinusoidal_embedding(t, dim, flip, shift):
    """diffusers computes in float32: frequencies are known to 1e-7, and angles up to 1000 to 1e-4."""
    theirs = diffusers_embeddings.get_timestep_embedding(
        torch.tensor(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    ours = nn.sinusoidal_embedding(np.array(t), dim, like=np.zeros(1), flip_sin_to_cos=flip, freq_shift=shift)
    assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6 * max(1, max(t)))
