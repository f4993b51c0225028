"""Layers, one idea a file, each with its derivative written by hand beneath it."""

from tinydiff.nn.attention import SelfAttention
from tinydiff.nn.class_embedding import ClassEmbedding
from tinydiff.nn.concat import concat
from tinydiff.nn.conv import Conv2d
from tinydiff.nn.dropout import dropout
from tinydiff.nn.group_norm import GroupNorm
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module, Parameter, derivative_of, inference, once
from tinydiff.nn.resample import Downsample, Upsample, upsample_nearest
from tinydiff.nn.resnet_block import ResnetBlock
from tinydiff.nn.silu import silu
from tinydiff.nn.time_embedding import TimestepEmbedding, sinusoidal_embedding

__all__ = [
    "ClassEmbedding",
    "Conv2d",
    "Downsample",
    "GroupNorm",
    "Linear",
    "Module",
    "Parameter",
    "ResnetBlock",
    "SelfAttention",
    "TimestepEmbedding",
    "Upsample",
    "concat",
    "derivative_of",
    "dropout",
    "inference",
    "once",
    "silu",
    "sinusoidal_embedding",
    "upsample_nearest",
]
