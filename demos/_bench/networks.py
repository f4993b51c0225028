"""What is measured: networks of tinydiff with random weights, and batches to put through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

import tinydiff as td

T = 1000


class Batch(NamedTuple):
    """The arrays of a step, on the host, in float32; `astype` gives the same numbers in float64."""

    x: np.ndarray  # (N, H, W, C) or (N, D)
    t: np.ndarray  # (N,), 0 … T-1
    target: np.ndarray  # of x's shape

    def astype(self, dtype: Any) -> Batch:
        return Batch(self.x.astype(dtype), self.t, self.target.astype(dtype))


@dataclass(frozen=True)
class Config:
    """A network, the shape of what it sees, and the batches for which its steps are timed."""

    name: str
    about: str
    network: type
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    training: tuple[int, ...] = ()
    inference: tuple[int, ...] = ()
    ddim: tuple[int, ...] = ()  # 50 steps from noise to data; on a GPU only

    def model(self, backend: str | None = "numpy", dtype: Any = np.float32) -> Any:
        """The network, with no weight zero: a fresh one ends in zeros, so most of its gradients are zero."""
        rng = np.random.default_rng(0)
        model = self.network(**self.arguments, backend="numpy")
        for parameter in model.named_parameters().values():
            shape = parameter.shape
            noise = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) > 1:
                parameter.value = noise / np.float32(math.sqrt(math.prod(shape[:-1])))
            else:  # gains around 1, biases around 0
                parameter.value = parameter.value + np.float32(0.2) * noise
        xp = td.get_backend(backend)
        return model.to(xp, getattr(xp, np.dtype(dtype).name))

    def batch(self, n: int) -> Batch:
        rng = np.random.default_rng(1)
        x, target = rng.standard_normal((2, n, *self.shape), dtype=np.float32)
        return Batch(x, rng.integers(T, size=n), target)

    def quick(self) -> Config:
        """The same in miniature: to see that everything runs, not how fast."""
        arguments = dict(self.arguments)
        if self.network is td.UNet:
            arguments["block_channels"] = [c // 4 for c in arguments["block_channels"]]
            arguments["norm_groups"] = 4
        few: dict[str, Any] = {
            work: tuple(dict.fromkeys(min(n, 2) for n in getattr(self, work)))
            for work in ("training", "inference", "ddim")
        }
        return replace(self, arguments=arguments, **few)


MNIST = dict(
    in_channels=1,
    out_channels=1,
    block_channels=[32, 64, 64],
    layers_per_block=1,
    attention=[False, False, True],
    norm_groups=8,
    head_dim=8,
)
# Heads and groups as diffusers has them by default.
CIFAR = dict(
    in_channels=3,
    out_channels=3,
    block_channels=[64, 128, 128, 128],
    layers_per_block=2,
    attention=[False, True, False, False],
    norm_groups=32,
    head_dim=8,
)

CONFIGS = {
    config.name: config
    for config in [
        Config(
            "mnist",
            "U-Net, 28x28x1, channels 32-64-64, a block per level, attention at 7x7",
            td.UNet,
            MNIST,
            (28, 28, 1),
            training=(64,),
            inference=(64,),
        ),
        Config(
            "cifar",
            "U-Net, 32x32x3, channels 64-128-128-128, 2 blocks per level, attention at 16x16",
            td.UNet,
            CIFAR,
            (32, 32, 3),
            training=(16,),
            inference=(16,),
        ),
        Config(
            "cifar128",
            "the network of cifar, batch 128 (a GPU's)",
            td.UNet,
            CIFAR,
            (32, 32, 3),
            training=(128,),
            inference=(128,),
        ),
        Config(
            "sampling",
            "the network of mnist, as a sampler asks it: inference, batch 64, 16 and 1",
            td.UNet,
            MNIST,
            (28, 28, 1),
            inference=(64, 16, 1),
            ddim=(64,),
        ),
        Config(
            "toy",
            "the plane's residual MLP, 3 blocks of width 96",
            td.MLP,
            dict(in_features=2, hidden=96, blocks=3),
            (2,),
            training=(256,),
            inference=(256,),
        ),
    ]
}
ON_THE_CPU = ["mnist", "cifar", "sampling", "toy"]
ON_A_GPU = ["mnist", "cifar", "cifar128", "sampling", "toy"]
