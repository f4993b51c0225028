"""tinydiff's side: a training step and an inference step, as closures over one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

import tinydiff as td
from _bench.networks import Batch, Config, T
from _bench.rounds import wall_clock
from tinydiff import _graph, interop
from tinydiff.backend import to_numpy
from tinydiff.kernels import many_steps, use_on_gpu
from tinydiff.losses import mean_squared_error
from tinydiff.parallel import shared_out

LR = 1e-4


def training_step(
    model: Any, optimizer: Any, batch: Batch, loss: Callable[..., Any] = mean_squared_error
) -> Any:
    """Forward, loss, backward, Adam, gradients back to zero."""
    y, backward = model(batch.x, batch.t)
    value, gradient = loss(y, batch.target)
    backward(gradient)
    optimizer.step()
    optimizer.zero_grad()
    return value


class Tinydiff:
    """One network of tinydiff's, held ready until `close`.

    It runs as in `td.train` and `td.sample`: its batches are shared out to processes where that pays, or to
    as many `workers` as given. On a GPU, `kernels` ("cupy" or "portable") and `recorded` (whether its steps
    are recorded) replace the defaults.
    """

    def __init__(
        self,
        config: Config,
        backend: str = "numpy",
        dtype: Any = np.float32,
        clock: Any = None,
        workers: int | None = None,
        kernels: str | None = None,
        recorded: bool | None = None,
        name: str = "tinydiff",
    ) -> None:
        self.name, self.kernels = name, kernels
        self.config = config
        self.xp = td.get_backend(backend)
        self.clock = clock or wall_clock
        model = config.model(backend, dtype)
        largest = max((*config.training, *config.inference, *config.ddim))
        with ExitStack() as stack:
            stack.enter_context(many_steps())
            self.model = stack.enter_context(shared_out(model, largest, workers))
            self._stack = stack.pop_all()
        self.on_a_gpu = backend == "cupy"
        self.choose_kernels()
        self.recorded = _graph.is_wanted(self.model, recorded)

    def close(self) -> None:
        self._stack.close()

    def choose_kernels(self) -> None:
        """Use this side's kernels: another may have had its turn."""
        if self.on_a_gpu:
            use_on_gpu(self.kernels)

    def _in_turn(self, work: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> Any:
            self.choose_kernels()
            return work()

        return step

    def training(self, batch: Batch) -> Callable[[], Any]:
        optimizer = td.Adam(self.model.named_parameters(), LR)
        here = self._here(batch)
        if not self.recorded:
            return self._in_turn(lambda: training_step(self.model, optimizer, here))
        given = (self.model, here.x, here.target, here.t)
        replayed = _graph.Replayed(functools.partial(_graph.loss_and_backward, *given))

        def step() -> Any:
            value, backward = replayed()
            backward()
            optimizer.step()
            optimizer.zero_grad()
            return value

        return self._in_turn(step)

    def inference(self, batch: Batch) -> Callable[[], Any]:
        here = self._here(batch)
        self.choose_kernels()  # a side made since may have chosen the definitions, which are not recorded
        predict = _graph.predictor(self.model, self.recorded)
        return self._in_turn(lambda: predict(here.x, here.t))

    def ddim(self, batch: Batch, steps: int) -> Callable[[], Any]:
        """From the noise `batch.x` to data, by DDIM."""
        diffusion = td.GaussianDiffusion(td.cosine_schedule(T))
        x, rng = self._here(batch).x, np.random.default_rng(0)
        how: dict[str, Any] = dict(sampler="ddim", steps=steps, rng=rng, x_T=x, progress=False)

        def walk() -> Any:
            denoise = _graph.predictor(self.model, self.recorded)
            return td.sample(denoise, diffusion, tuple(x.shape), **how)

        return self._in_turn(walk)

    def output_and_gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """The output, and the gradient of the loss by each parameter in PyTorch's layout, by name."""
        self.choose_kernels()
        here = self._here(batch)
        y, backward = self.model(here.x, here.t)
        backward(mean_squared_error(y, here.target)[1])
        gradients = self.config.model()  # to carry the gradients across as weights are
        for name, parameter in gradients.named_parameters().items():
            parameter.value = to_numpy(self.model.named_parameters()[name].grad)
        self.model.zero_grad()
        return {"output": to_numpy(y), **in_torch_layout(gradients)}

    def _here(self, batch: Batch) -> Batch:
        return Batch(*(self.xp.asarray(array) for array in batch))


def in_torch_layout(model: Any) -> dict[str, np.ndarray]:
    """The weights of a model as PyTorch keeps them, by name."""
    if isinstance(model, td.UNet):
        return interop.unet_to_diffusers(model)[1]
    return {name: np.ascontiguousarray(array.T) for name, array in model.state_dict().items()}
