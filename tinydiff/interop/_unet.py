"""A U-Net across the border to diffusers' ``UNet2DModel``, in both directions.

Parameter names are the same on both sides; the layouts are not. PyTorch keeps a linear weight as (out, in)
and a convolution as (out, in, k, k); tinydiff as (in, out) and (k, k, in, out). A configuration that
tinydiff's U-Net does not compute exactly is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, class_or_kind
from tinydiff.backend import Array, get_backend
from tinydiff.checkpoint import check_sizes
from tinydiff.interop._config import check_mapping, is_count, is_number, require, require_fixed
from tinydiff.models._checks import check_own_layers, plain
from tinydiff.models.unet import UNet, misfit
from tinydiff.nn.module import on_the_host

__all__ = [
    "DEFAULTS",
    "FIXED",
    "IRRELEVANT",
    "check_sample_size",
    "unet_arguments",
    "unet_from_diffusers",
    "unet_to_diffusers",
]

# What tinydiff's U-Net can vary, as diffusers 0.42's UNet2DModel assumes it where its config is silent.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "add_attention": True,
    "num_class_embeds": None,
}

# The entries of the config by the arguments of `UNet`; its attention is in the types of the blocks.
THEIR_NAMES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "block_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "mid_attention": "add_attention",
    "norm_groups": "norm_num_groups",
    "norm_eps": "norm_eps",
    "head_dim": "attention_head_dim",
    "dropout": "dropout",
    "downsample_padding": "downsample_padding",
    "flip_sin_to_cos": "flip_sin_to_cos",
    "freq_shift": "freq_shift",
}

# What tinydiff's U-Net always is: the only values accepted.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
}

# What does not change the function computed.
IRRELEVANT = {"sample_size", "num_train_timesteps"}

# What diffusers' EMAModel.save_pretrained adds: how the weights were averaged.
AVERAGING = {
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
}

# What diffusers called attention weights until 0.16, as the published DDPM checkpoints still do.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet` that `config` asks for.

    Raises
    ------
    ValueError
        Naming the entry of `config` that tinydiff does not support.
    """
    config = {key: value for key, value in config.items() if not str(key).startswith("_")}
    c = {**DEFAULTS, **{k: v for k, v in config.items() if k in DEFAULTS}}
    _check_types(c)
    require_fixed(config, FIXED)
    for key, value in config.items():
        if key == "time_embedding_dim":
            four = 4 * c["block_out_channels"][0]
            require(config, key, value in (None, four), f"None, or 4 * block_out_channels[0] = {four}")
        elif key == "attn_norm_num_groups":
            require(config, key, value in (None, c["norm_num_groups"]), "None, or norm_num_groups")
        elif key not in {*DEFAULTS, *FIXED, *IRRELEVANT, *AVERAGING}:
            raise ValueError(f"config[{key!r}] = {value!r} is not known to tinydiff's U-Net.")
    arguments = {ours: c[theirs] for ours, theirs in THEIR_NAMES.items()}
    arguments["attention"] = [name == "AttnDownBlock2D" for name in c["down_block_types"]]
    if c["num_class_embeds"] is not None:
        arguments["num_classes"] = c["num_class_embeds"] - 1  # the last of them is that of no class
    if found := misfit(arguments):
        name, expected = found
        require(c, THEIR_NAMES[name], False, expected)
    return arguments


def _check_types(c: Mapping[str, Any]) -> None:
    """ValueError naming the first entry of `c` that `UNet` has no argument or no type for."""
    ask = functools.partial(require, c)
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        ask(key, is_count(c[key]), "a positive integer")
    for key in ("flip_sin_to_cos", "add_attention"):
        ask(key, isinstance(c[key], bool), "True or False")
    for key in ("norm_eps", "dropout", "freq_shift"):
        ask(key, is_number(c[key]), "a number")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        ask(key, isinstance(c[key], (list, tuple)), "a list")
    channels, head_dim = c["block_out_channels"], c["attention_head_dim"]
    ask("block_out_channels", bool(channels) and all(map(is_count, channels)), "positive integers")
    classes = c["num_class_embeds"]
    ask("num_class_embeds", classes is None or (is_count(classes) and classes > 1), "None, or at least 2")
    ask("attention_head_dim", head_dim is None or is_count(head_dim), "None, or a positive integer")
    down, up = c["down_block_types"], c["up_block_types"]
    mirror = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
    ask("down_block_types", all(name in list(mirror) for name in down), f"only {' and '.join(mirror)}")
    ask("block_out_channels", len(channels) == len(down), "as many as down_block_types")
    mirrored = [mirror[name] for name in reversed(down)]
    ask("up_block_types", list(up) == mirrored, "the mirror of down_block_types")


def unet_from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Array], backend: str | None = None
) -> UNet:
    """Build the U-Net that computes what diffusers' ``UNet2DModel`` with this config and these weights does.

    Parameters
    ----------
    config : mapping
        The model's configuration, as in diffusers' ``config.json``; what is left out has diffusers' default.
    state : mapping of str to array
        The weights by name, in PyTorch's layout, as arrays of real numbers that NumPy can read (PyTorch's:
        ``model.float().cpu().state_dict()``). Attention weights may have the names of older checkpoints
        (``query``, ``key``, ``value``, ``proj_attn``).
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.

    Returns
    -------
    UNet
        In float64 if the weights are, else in float32.

    Raises
    ------
    ValueError
        If an entry of `config` is not supported, or a weight is missing, unexpected, there twice, of another
        shape or not of real numbers that NumPy can read; the message names it.
    TypeError
        If `config` or `state` is not a mapping.
    """
    check_mapping("config", config)
    check_mapping("state", state)
    xp = get_backend(backend)
    arguments = unet_arguments(config)
    weights = {given: on_the_host(given, weight) for given, weight in state.items()}
    check_sizes(arguments, weights)
    model = UNet(**arguments, rng=np.random.default_rng(0), backend="numpy")
    parameters = model.named_parameters()
    arrays = {}
    given_as: dict[str, str] = {}
    for given, array in weights.items():
        name = _present_name(str(given))
        other = given_as.setdefault(name, given)
        if other != given:
            raise ValueError(f"state has both {other!r} and {given!r}, one weight's names; expected one.")
        if name in parameters:
            expected = _torch_shape(name, parameters[name].shape)
            if tuple(array.shape) != expected:
                raise ValueError(f"state[{given!r}] has shape {tuple(array.shape)}; expected {expected}.")
            array = _from_torch_layout(name, array)
        arrays[name] = array
    double = any("float64" in str(array.dtype) for array in arrays.values())
    model.to(np, np.float64 if double else np.float32)
    model.load_state_dict(arrays)
    return model.to(xp)


def unet_to_diffusers(
    model: UNet, sample_size: int | tuple[int, int] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return config and weights for diffusers' ``UNet2DModel``.

    Parameters
    ----------
    model : UNet
        The model.
    sample_size : int or pair of int, optional
        Height and width of its images, which diffusers' pipelines read from the config.

    Returns
    -------
    config : dict
        As in diffusers' ``config.json``: ``UNet2DModel.from_config(config)``.
    state : dict of str to ndarray
        Contiguous copies in PyTorch's layout, for ``load_state_dict`` or a safetensors file.

    Raises
    ------
    TypeError
        If `model` is not a `UNet` as its config makes it; a subclass may compute something else.
    ValueError
        If `sample_size` is given and is not of positive integers.
    """
    if sample_size is not None:
        check_sample_size(sample_size)
    if type(model) is not UNet:
        raise TypeError(f"model is {class_or_kind(model)}; expected a UNet, of tinydiff's own.")
    check_own_layers(model)
    c = model.config  # in which True may stand for 1, and 0 for False
    config = {
        "_class_name": "UNet2DModel",
        **plain(sample_size=sample_size),
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "freq_shift": 0 + c["freq_shift"],
        "flip_sin_to_cos": bool(c["flip_sin_to_cos"]),
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in c["attention"]],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c["attention"])],
        "block_out_channels": list(c["block_channels"]),
        "layers_per_block": c["layers_per_block"],
        "downsample_padding": int(c["downsample_padding"]),
        "dropout": float(c["dropout"]),
        "attention_head_dim": None if c["head_dim"] is None else int(c["head_dim"]),
        "norm_num_groups": int(c["norm_groups"]),
        "norm_eps": float(c["norm_eps"]),
        "add_attention": bool(c["mid_attention"]),
        "num_class_embeds": None if (classes := c.get("num_classes")) is None else classes + 1,
        **{key: accepted[0] for key, accepted in FIXED.items()},
    }
    return config, {name: _to_torch_layout(name, array) for name, array in model.state_dict().items()}


def check_sample_size(sample_size: Any) -> None:
    """ValueError unless it is a positive integer or two, in a list or a tuple."""
    sides = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size, sample_size]
    if len(sides) != 2:
        raise ValueError(f"sample_size is {sample_size!r}; expected one number, or height and width.")
    for side in sides:
        check_counts(sample_size=side)


def _present_name(name: str) -> str:
    """What diffusers calls the weight today; older checkpoints name attention weights otherwise."""
    parts = name.split(".")
    if len(parts) >= 2 and "attentions" in parts:
        parts[-2] = FORMER_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)


def _from_torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """(out, in) -> (in, out);  (out, in, k, k) -> (k, k, in, out);  rows and vectors as they are."""
    return np.ascontiguousarray(array.transpose(_FROM[_kind(name, array.shape)]))


def _to_torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(_TO[_kind(name, array.shape)]), order="C")


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO[_kind(name, shape)])


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if name == "class_embedding.weight":
        return "rows"
    return {1: "vector", 2: "matrix", 4: "taps"}[len(shape)]


_FROM = {"vector": (0,), "rows": (0, 1), "matrix": (1, 0), "taps": (2, 3, 1, 0)}
_TO = {"vector": (0,), "rows": (0, 1), "matrix": (1, 0), "taps": (3, 2, 0, 1)}
