"""Where the time goes: each layer's own forward and backward, beside the machine's rate of matrix products.

A module's own time is what it takes less what the modules inside it take; so all times add up to the step's.
FLOPs are those of the definition, two for a multiplication and an addition: a convolution's by every tap, and
twice as many in the backward (for dx and for dW). Winograd's convolutions make do with fewer, so their share
of the machine's rate may be more than they really reach, and even more than 1.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import tinydiff as td
from _bench.machine import product_gflops
from _bench.networks import Config
from _bench.ours import LR, training_step
from _bench.rounds import WARM_UP
from tinydiff.kernels import many_steps
from tinydiff.losses import mean_squared_error
from tinydiff.nn import Module


class Recorder:
    """Own seconds and FLOPs by (layer, "forward" or "backward"), while classes' calls are wrapped."""

    def __init__(self, model: Any) -> None:
        self.modules = {"": model, **{name: m for name, m in model._parts() if isinstance(m, Module)}}
        self.names = {id(module): name for name, module in self.modules.items()}
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._inside = [0.0]

    def timed(self, name: str, pass_: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            result = call(*args)
            elapsed = time.perf_counter() - began
            self.seconds[name, pass_] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed
            return result

        return timed_call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap the calls of every class of module in the model; put them back at the end."""
        classes = {type(module) for module in self.modules.values()}
        before = {cls: cls.__call__ for cls in classes}
        for cls, call in before.items():
            cls.__call__ = self._wrapped(call)
        try:
            yield
        finally:
            for cls, call in before.items():
                cls.__call__ = call

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(module: Any, *args: Any) -> Any:
            name = self.names.get(id(module))
            if name is None:  # of another model
                return call(module, *args)
            y, backward = self.timed(name, "forward", call)(module, *args)
            if hasattr(y, "shape"):
                self.shapes[name] = tuple(y.shape)
                self.flops[name] += flops(module, y.shape)
            return y, self.timed(name, "backward", backward)

        return wrapped


def flops(module: Any, shape: tuple[int, ...]) -> int:
    """FLOPs of the module's own products in one forward, from the shape of its output."""
    if isinstance(module, td.nn.Upsample):  # which doubles and convolves in one
        module = module.conv
    if isinstance(module, td.nn.Conv2d):
        return 2 * math.prod(shape) * math.prod(module.weight.shape[:3])
    if isinstance(module, td.nn.Linear):
        return 2 * math.prod(shape) * module.weight.shape[0]
    if isinstance(module, td.nn.SelfAttention):  # scores and mixtures; its projections are Linear
        n, h, w, c = shape
        return 2 * 2 * n * (h * w) ** 2 * c
    return 0


def kind(module: Any) -> str:
    """The kind by which layers are summed up."""
    if isinstance(module, td.nn.Upsample):
        return "doubling and convolution 3x3"
    if isinstance(module, td.nn.Conv2d):
        k, _, c, d = module.weight.shape
        stride = f", stride {module.stride}" if module.stride > 1 else ""
        return f"convolution {k}x{k}{stride}" + (", few channels" if min(c, d) < 16 else "")
    if isinstance(module, td.nn.Linear):
        return "linear"
    if isinstance(module, td.nn.GroupNorm):
        return "group normalisation" + (" and SiLU" if module.then_silu else "")
    if isinstance(module, td.nn.SelfAttention):
        return "attention: scores, softmax, mixtures"
    return "between layers: sums, SiLU, joining"


def profile(config: Config, batch_size: int, steps: int) -> dict[str, Any]:
    """The mean step's seconds by layer and by kind, after a warm-up; the model runs in this process."""
    gflops = product_gflops()
    model = config.model()
    optimizer: Any = td.Adam(model.named_parameters(), LR)
    batch = config.batch(batch_size)
    recorder = Recorder(model)
    timed = SimpleNamespace(
        step=recorder.timed("Adam", "backward", optimizer.step),
        zero_grad=recorder.timed("Adam", "backward", optimizer.zero_grad),
    )
    loss = recorder.timed("loss", "forward", mean_squared_error)
    with many_steps():
        for _ in range(WARM_UP):
            training_step(model, optimizer, batch)
        began = time.perf_counter()
        for _ in range(steps):
            training_step(model, optimizer, batch)
        bare = (time.perf_counter() - began) / steps
        with recorder.watching():
            began = time.perf_counter()
            for _ in range(steps):
                training_step(model, timed, batch, loss)
            watched = (time.perf_counter() - began) / steps
    gflops = max(gflops, product_gflops())
    layers = []
    for name in [*recorder.modules, "loss", "Adam"]:
        forward, backward = (recorder.seconds[name, p] / steps for p in ("forward", "backward"))
        module = recorder.modules.get(name)
        layers.append(
            {
                "layer": name or type(model).__name__,
                "kind": kind(module) if module is not None else name,
                "shape": recorder.shapes.get(name),
                "forward_seconds": forward,
                "backward_seconds": backward,
                "forward_gflop": recorder.flops[name] / steps / 1e9,
                "backward_gflop": 2 * recorder.flops[name] / steps / 1e9,
            }
        )
    return {
        "config": config.name,
        "batch": batch_size,
        "product_gflops": gflops,
        "step_seconds": bare,
        "step_seconds_watched": watched,
        "layers": layers,
        "kinds": summed(layers),
    }


def summed(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind, the longest first."""
    names = dict.fromkeys(layer["kind"] for layer in layers)
    kinds = [
        {"layer": name, "shape": None, **total([layer for layer in layers if layer["kind"] == name])}
        for name in names
    ]
    return sorted(kinds, key=lambda k: -k["forward_seconds"] - k["backward_seconds"])


def total(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Sums of seconds and GFLOP."""
    keys = ("forward_seconds", "backward_seconds", "forward_gflop", "backward_gflop")
    return {key: sum(layer[key] for layer in layers) for key in keys}


def table(measured: dict[str, Any], which: str, least: float = 0.0) -> list[str]:
    """The lines of "layers" or "kinds": milliseconds, share of the step, GFLOP, share of the product's rate.

    What takes less than `least` of the step is summed in one line.
    """
    rate = measured["product_gflops"]
    whole = sum(layer["forward_seconds"] + layer["backward_seconds"] for layer in measured["layers"])
    shown = [x for x in measured[which] if x["forward_seconds"] + x["backward_seconds"] >= least * whole]
    others = [x for x in measured[which] if x not in shown]
    if others:
        shown += [{**total(others), "layer": f"{len(others)} others, each below {least:.1%}", "shape": None}]
    shown += [{**total(measured[which]), "layer": "in all", "shape": None}]
    lines = [f"{'':58}{'forward':>9}{'backward':>9}{'share':>8}{'GFLOP':>8}{'of rate, f':>11}{'b':>6}"]
    for layer in shown:
        forward, backward = layer["forward_seconds"], layer["backward_seconds"]
        shape = "x".join(map(str, layer["shape"])) if layer["shape"] else ""
        flop = layer["forward_gflop"] + layer["backward_gflop"]

        def of_rate(gflop: float, seconds: float) -> str:
            return f"{gflop / seconds / rate:.0%}" if gflop and seconds else ""

        lines.append(
            f"{layer['layer']:42}{shape:>16}{1e3 * forward:9.3f}{1e3 * backward:9.3f}"
            f"{(forward + backward) / whole:8.1%}{f'{flop:.3f}' if flop else '':>8}"
            f"{of_rate(layer['forward_gflop'], forward):>11}{of_rate(layer['backward_gflop'], backward):>6}"
        )
    return lines
