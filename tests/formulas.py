"""The networks written a second time: from their definitions, with loops, slowly, and forwards only.

They hold tinydiff to the definitions where PyTorch is not installed. ``p`` maps names to weights.
"""

import math

import numpy as np
from scipy.special import expit


def convolve(x, w, b, stride, padding):
    before, after = padding
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    k = w.shape[0]
    h, w_out = ((size - k) // stride + 1 for size in x.shape[1:3])
    y = np.empty((x.shape[0], h, w_out, w.shape[3]))
    for p in range(h):
        for q in range(w_out):
            window = x[:, stride * p : stride * p + k, stride * q : stride * q + k, :]
            y[:, p, q, :] = np.tensordot(window, w, 3) + b
    return y


def normalise(x, weight, bias, groups, eps):
    y = np.empty_like(x)
    size = x.shape[3] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            members = np.s_[n, :, :, g * size : (g + 1) * size]
            y[members] = (x[members] - x[members].mean()) / np.sqrt(x[members].var() + eps)
    return y * weight + bias


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def attend(x, p, heads, groups, eps):
    normed = normalise(x, p["group_norm.weight"], p["group_norm.bias"], groups, eps)
    y = np.array(x)
    size = x.shape[3] // heads
    for n in range(x.shape[0]):
        pixels = normed[n].reshape(-1, x.shape[3])
        q, k, v = (pixels @ p[f"to_{m}.weight"] + p[f"to_{m}.bias"] for m in "qkv")
        out = np.empty_like(q)
        for h in range(heads):
            own = np.s_[h * size : (h + 1) * size]
            for i in range(len(q)):
                weights = np.exp(k[:, own] @ q[i, own] / math.sqrt(size))
                out[i, own] = weights / weights.sum() @ v[:, own]
        y[n] += (out @ p["to_out.0.weight"] + p["to_out.0.bias"]).reshape(x.shape[1:])
    return y


def swish(x):
    return x * expit(x)


def resnet(x, emb, p, groups, eps):
    def norm(i, h):
        return swish(normalise(h, p[f"norm{i}.weight"], p[f"norm{i}.bias"], groups, eps))

    def conv3(i, h):
        return convolve(h, p[f"conv{i}.weight"], p[f"conv{i}.bias"], 1, (1, 1))

    e = emb @ p["time_emb_proj.weight"] + p["time_emb_proj.bias"]
    h = conv3(2, norm(2, conv3(1, norm(1, x)) + e.reshape(len(e), 1, 1, -1)))
    if "conv_shortcut.weight" in p:
        x = x @ p["conv_shortcut.weight"][0, 0] + p["conv_shortcut.bias"]
    return x + h


def affine(x, p, name):
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def residual(x, emb, p, prefix=""):
    h = affine(swish(x), p, f"{prefix}linear_1") + affine(emb, p, f"{prefix}time_emb_proj")
    return x + affine(swish(h), p, f"{prefix}linear_2")


def sinusoids(t, dim, flip=True, shift=0.0, period=10_000.0):
    omega = period ** (-np.arange(dim // 2) / (dim // 2 - shift))
    angles = np.outer(t, omega)
    parts = [np.cos(angles), np.sin(angles)]
    return np.concatenate(parts if flip else parts[::-1], axis=1)


def embed(sinusoids, p, labels):
    """The time's embedding, with the rows of the classes, the last of which is for none; and SiLU."""
    emb = affine(swish(affine(sinusoids, p, "time_embedding.linear_1")), p, "time_embedding.linear_2")
    if "class_embedding.weight" in p:
        for n in range(len(emb)):
            emb[n] += p["class_embedding.weight"][-1 if labels is None else labels[n]]
    return swish(emb)


def whole_mlp(x, p, t, labels, config):
    emb = embed(sinusoids(t, config["time_features"]), p, labels)
    h = affine(x, p, "linear_in")
    for i in range(config["blocks"]):
        h = residual(h, emb, p, f"blocks.{i}.")
    return affine(swish(h), p, "linear_out")


FORMULAS = {
    "Linear": lambda x, p: x @ p["weight"] + p["bias"],
    "Conv2d": lambda x, p, stride, padding: convolve(x, p["weight"], p["bias"], stride, padding),
    "GroupNorm": lambda x, p, groups, eps: normalise(x, p["weight"], p["bias"], groups, eps),
    "GroupNorm, SiLU": lambda x, p, groups, eps: swish(normalise(x, p["weight"], p["bias"], groups, eps)),
    "silu": lambda x, p: swish(x),
    "upsample_nearest": lambda x, p: double(x),
    "Downsample": lambda x, p, padding: convolve(x, p["conv.weight"], p["conv.bias"], 2, (padding, 1)),
    "Upsample": lambda x, p: convolve(double(x), p["conv.weight"], p["conv.bias"], 1, (1, 1)),
    "SelfAttention": attend,
    "TimestepEmbedding": lambda x, p: affine(swish(affine(x, p, "linear_1")), p, "linear_2"),
    "concat": lambda a, b, p: np.concatenate([a, b], axis=-1),
    "ResnetBlock": resnet,
    "MLP's block": residual,
    "ClassEmbedding": lambda emb, p, labels: emb + np.stack([p["weight"][k] for k in labels]),
    "MLP": whole_mlp,
}


def unet(x, sinusoids, p, config, labels=None):
    """Ho et al. 2020, appendix B: down, middle, up; each result of the way down is used once more."""
    c = config
    groups, eps, levels = c["norm_groups"], c["norm_eps"], len(c["block_channels"])

    def inner(prefix):
        return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}

    def block(h, where, i):
        h = resnet(h, emb, inner(f"{where}.resnets.{i}."), groups, eps)
        attention = inner(f"{where}.attentions.{i}.")
        heads = h.shape[3] // (c["head_dim"] or h.shape[3])
        return attend(h, attention, heads, groups, eps) if attention else h

    def conv(h, name, stride=1, padding=(1, 1)):
        return convolve(h, p[f"{name}.weight"], p[f"{name}.bias"], stride, padding)

    emb = embed(sinusoids, p, labels)
    h = conv(x, "conv_in")
    skips = [h]
    for level in range(levels):
        for i in range(c["layers_per_block"]):
            h = block(h, f"down_blocks.{level}", i)
            skips.append(h)
        if level + 1 < levels:
            h = conv(h, f"down_blocks.{level}.downsamplers.0.conv", 2, (c["downsample_padding"], 1))
            skips.append(h)
    h = block(h, "mid_block", 0)
    h = resnet(h, emb, inner("mid_block.resnets.1."), groups, eps)
    for level in range(levels):
        for i in range(c["layers_per_block"] + 1):
            h = block(np.concatenate([h, skips.pop()], axis=3), f"up_blocks.{level}", i)
        if level + 1 < levels:
            h = conv(double(h), f"up_blocks.{level}.upsamplers.0.conv")
    return conv(
        swish(normalise(h, p["conv_norm_out.weight"], p["conv_norm_out.bias"], groups, eps)), "conv_out"
    )
