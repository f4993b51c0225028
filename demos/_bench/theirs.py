"""PyTorch's side: diffusers' UNet2DModel, and the MLP written out, with the same weights.

Nothing of tinydiff is imported, so that a process that measures PyTorch's memory holds PyTorch's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from _bench.rounds import wall_clock

LR = 1e-4
VARIANTS = {"eager": "PyTorch", "channels_last": "PyTorch channels_last", "compile": "torch.compile"}


class Sinusoids(nn.Module):
    """The time's sines and cosines, computed in float64 as tinydiff does; diffusers rounds the angles."""

    omega: torch.Tensor

    def __init__(self, dim: int, shift: float = 0.0, flip: bool = True) -> None:
        super().__init__()
        half = dim // 2
        omega = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / (half - shift))
        self.register_buffer("omega", omega, persistent=False)
        self.flip = flip

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model to its device, but stay in float64."""
        self.omega = self.omega.to(fn(torch.empty(0)).device)
        return self

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.omega[None, :]
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([cos, sin] if self.flip else [sin, cos], dim=1)


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sinusoids: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class Block(nn.Module):
    def __init__(self, hidden: int, emb_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(hidden, hidden)
        self.time_emb_proj = nn.Linear(emb_features, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        r = self.linear_1(F.silu(h)) + self.time_emb_proj(emb)
        return h + self.linear_2(F.silu(r))


class MLP(nn.Module):
    """tinydiff's MLP, layer by layer; parameters have its names."""

    def __init__(
        self, in_features: int, out_features: int, hidden: int, blocks: int, time_features: int
    ) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_features, hidden)
        self.sinusoids = Sinusoids(time_features)
        self.time_embedding = TimeEmbedding(time_features)
        self.blocks = nn.ModuleList(Block(hidden, time_features) for _ in range(blocks))
        self.linear_out = nn.Linear(hidden, out_features)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        emb = F.silu(self.time_embedding(self.sinusoids(t).to(x.dtype)))
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.linear_out(F.silu(h))


class UNet(nn.Module):
    """diffusers' UNet2DModel, returning the bare tensor."""

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel.from_config(config)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, return_dict=False)[0]

    def use_exact_sinusoids(self) -> None:
        c = self.unet.config
        self.unet.time_proj = Sinusoids(c.block_out_channels[0], c.freq_shift, c.flip_sin_to_cos)


def build(kind: str, config: dict[str, Any], state: dict[str, np.ndarray] | None = None) -> nn.Module:
    """The network of this kind ("UNet" or "MLP"), with these weights, or PyTorch's own random ones."""
    model = UNet(config) if kind == "UNet" else MLP(**config)
    if state is not None:
        inner = model.unet if isinstance(model, UNet) else model
        inner.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model


def training_step(
    model: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, t: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Forward, loss, backward, Adam, gradients away."""
    loss = F.mse_loss(model(x, t), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class PyTorch:
    """One network of PyTorch's in one of three variants: eager, channels_last, compile.

    On a GPU the last is compiled with ``mode="reduce-overhead"``, into CUDA graphs: the next step overwrites
    what they return, so each step is announced, and what is to stay is copied.
    """

    def __init__(
        self,
        model: nn.Module,
        variant: str = "eager",
        device: str = "cpu",
        dtype: str = "float32",
        exact_time: bool = False,
        fused_adam: bool = False,
        clock: Any = None,
    ) -> None:
        if exact_time and isinstance(model, UNet):
            model.use_exact_sinusoids()
        self.name = VARIANTS[variant]
        self.device, self.dtype, self.fused_adam = device, getattr(torch, dtype), fused_adam
        self.format = torch.channels_last if variant == "channels_last" else torch.contiguous_format
        self.model: Any = model.to(device=device, dtype=self.dtype)
        if variant == "channels_last":
            self.model = model.to(memory_format=torch.channels_last)
        self.graphs = variant == "compile" and device != "cpu"
        if variant == "compile":
            self.model = torch.compile(model, mode="reduce-overhead" if self.graphs else None)
        self.clock = clock or wall_clock

    def close(self) -> None:
        pass

    def training(self, batch: Any) -> Callable[[], Any]:
        optimizer = torch.optim.Adam(self.model.parameters(), LR, fused=self.fused_adam or None)
        x, t, target = self._here(batch)

        def step() -> torch.Tensor:
            self._begin()
            return training_step(self.model, optimizer, x, t, target)

        return step

    def _begin(self) -> None:
        """Announce a step: what the one before returned is not needed any more."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def inference(self, batch: Any) -> Callable[[], Any]:
        x, t, _ = self._here(batch)

        def step() -> torch.Tensor:
            self._begin()
            with torch.inference_mode():
                y = self.model(x, t)
                return y.clone() if self.graphs else y

        return step

    def ddim(self, batch: Any, timesteps: np.ndarray, alphas_cumprod: np.ndarray) -> Callable[[], Any]:
        """From the noise `batch.x` to data, by DDIM: t' < t, x' = a' x0 + s' eps."""
        start, _, _ = self._here(batch)
        a, s = np.sqrt(alphas_cumprod).tolist(), np.sqrt(1 - alphas_cumprod).tolist()
        times = [torch.full((start.shape[0],), int(t), device=self.device) for t in timesteps]

        def walk() -> torch.Tensor:
            x = start
            with torch.inference_mode():
                for i in reversed(range(len(times))):
                    self._begin()
                    eps = self.model(x, times[i])  # used up before the next
                    x0 = (x - s[i] * eps) / a[i]
                    x = a[i - 1] * x0 + s[i - 1] * eps if i else x0
            return x

        return walk

    def output_and_gradients(self, batch: Any) -> dict[str, np.ndarray]:
        """The output in tinydiff's layout, and the gradient of the loss by each parameter, by name."""
        x, t, target = self._here(batch)
        y = self.model(x, t)
        F.mse_loss(y, target).backward()
        inner = self.model.unet if isinstance(self.model, UNet) else self.model
        gradients = {name: p.grad.cpu().numpy() for name, p in inner.named_parameters()}
        return {"output": as_host(y), **gradients}

    def _here(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Channels first (in channels_last's memory format they lie last), on the device."""

        def image(array: np.ndarray) -> torch.Tensor:
            if array.ndim == 4:
                array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
            tensor = torch.from_numpy(array).to(self.device, self.dtype)
            return tensor.contiguous(memory_format=self.format) if array.ndim == 4 else tensor

        x, t, target = batch
        return image(x), torch.from_numpy(t).to(self.device), image(target)


def as_host(y: torch.Tensor) -> np.ndarray:
    """In tinydiff's layout: channels last."""
    y = y.detach().cpu()
    return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()
