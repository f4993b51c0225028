"""Both sides on one GPU: CuPy for tinydiff, CUDA for PyTorch, and a clock that runs on the device.

A step only queues work and returns, so the time is taken where the work is done: an event is queued before
the steps and one after them, and the device says how long passed between the two. Both libraries queue on
the default stream.

TF32 products are on for both sides or off for both: in PyTorch by its switches for matrix products and for
cuDNN (whose default is on), for tinydiff by CUPY_TF32, which CuPy reads at its first float32 product.
tinydiff's kernels call cuBLAS themselves and obey CUPY_TF32 in batched products, too. Attention with narrow
heads (32 channels at most) is a kernel of its own, without products of cuBLAS: it computes in float32 even
then. In the definitions CuPy 14 computes the batched products, those of attention, in float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import tinydiff as td

NEEDS_TORCH = (
    "--backend cupy compares with PyTorch on the same GPU, and {what}: pip install torch diffusers, in the "
    "build for your CUDA version (https://pytorch.org/get-started/locally)."
)


class EventClock:
    """Seconds a step, by events of the device; `milliseconds` is the time between two of them."""

    def __init__(self, event: Callable[[], Any], milliseconds: Callable[[Any, Any], float]) -> None:
        self.event, self.milliseconds = event, milliseconds

    def __call__(self, step: Callable[[], Any], n: int) -> float:
        start, stop = self.event(), self.event()
        start.record()
        for _ in range(n):
            step()
        stop.record()
        stop.synchronize()
        return self.milliseconds(start, stop) / 1e3 / n


class Gpu:
    """The one GPU that both sides run on.

    Raises
    ------
    BackendError
        If CuPy, PyTorch with CUDA, or a GPU is missing; one sentence that says what to install.
    """

    def __init__(self, tf32: bool = False) -> None:
        if tf32 and "cupy" in sys.modules and os.environ.get("CUPY_TF32") != "1":
            raise td.BackendError("CuPy was imported before --tf32 could reach it: set CUPY_TF32=1.")
        os.environ["CUPY_TF32"] = "1" if tf32 else "0"
        td.get_backend("cupy")
        try:
            import diffusers  # noqa: F401
            import torch
        except ImportError as error:
            raise td.BackendError(NEEDS_TORCH.format(what=f"{error.name} is not installed")) from None
        if not torch.cuda.is_available():
            raise td.BackendError(NEEDS_TORCH.format(what=f"PyTorch {torch.__version__} finds no GPU"))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True  # let cuDNN choose by trying, during the warm-up
        self.tf32 = tf32

    def ours(self) -> tuple[str, EventClock]:
        """tinydiff's backend and clock."""
        from cupy.cuda import Event, get_elapsed_time

        return "cupy", EventClock(Event, get_elapsed_time)

    def theirs(self) -> tuple[str, EventClock]:
        """PyTorch's device and clock."""
        import torch

        def event() -> Any:
            return torch.cuda.Event(enable_timing=True)

        return "cuda", EventClock(event, lambda start, stop: start.elapsed_time(stop))

    def about(self) -> dict[str, Any]:
        """What the numbers depend on beside the host."""
        import cupy
        import torch

        return {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cupy": cupy.__version__,
            "tf32": "on both" if self.tf32 else "off both",
        }
