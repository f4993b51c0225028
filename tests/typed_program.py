"""A program as its author types it, which mypy reads and nobody runs.

Where it is right mypy must say nothing. Where it is wrong mypy is told to ignore the error, and complains of
an ignore that nothing needs: so a mistake that the annotations let pass is an error, too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinydiff as td
from tinydiff.nn import Linear, Module


class Mine(Module):
    def __init__(self, rng: np.random.Generator) -> None:
        self.linear = Linear(2, 2, rng)

    def __call__(
        self, x: np.ndarray, t: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        return self.linear(x)


def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return -x


def right(data: np.ndarray, rng: np.random.Generator) -> None:
    diffusion = td.GaussianDiffusion(td.cosine_schedule(100), prediction="v", variance="fixed_large")
    mine: Mine = td.train(Mine(rng), diffusion, data, steps=9, batch_size=4, run_dir=Path("run")).model
    drawn: td.MLP = td.train(td.MLP(), diffusion, lambda n, rng: data[:n], steps=9, batch_size=4).model
    mine = mine.to(np, dtype=np.float64)
    mine = td.EMA(mine).model
    td.save_model(Path("model"), drawn, {"note": "mine"}, diffusion=diffusion)
    anything: tuple[Any, td.GaussianDiffusion, dict[str, Any]] = td.pretrained.load("model")
    times = np.array([0, 50, 99])
    shape = data.shape
    for steps in (None, 10, [0, 99], range(0, 100, 9), times):
        td.sample(mine, diffusion, shape, steps=steps, rng=rng)
        td.invert(denoise, diffusion, data, steps)
        td.ode_log_likelihood(mine, diffusion, data, steps)
        td.testing.assert_sampler(denoise, diffusion, steps=steps)
        td.testing.assert_guided(lambda network, x, t, labels: network(x, t, labels), diffusion)
        td.testing.assert_hybrid_gradient(lambda x0, t, noise, output: output, diffusion)
        td.testing.assert_adam(lambda weights, gradients: gradients, lr=0.1, betas=(0.5, 0.9))
        td.testing.assert_ema(lambda weights: weights[1:], lambda k: 1 - 1 / k)
        td.testing.assert_training_draws(lambda network, x0: network(x0, 0), diffusion, num_classes=3)
    td.sample(drawn, diffusion, (3, 2), rng=rng, labels=np.zeros(3, int), guidance_scale=2)
    td.train(drawn, diffusion, data, steps=9, batch_size=4, labels=np.zeros(len(data), np.uint8))
    names = [state.t for state in td.iterate_samples(denoise, diffusion, (3, 2), rng=rng)]
    td.plotting.training_curve(np.array(names))
    with td.kernels.many_steps():
        td.Adam(mine.named_parameters()).step()
    td.backend.to_numpy(anything[0](data, times)[0])


def wrong(data: np.ndarray, rng: np.random.Generator) -> None:
    diffusion = td.GaussianDiffusion(td.cosine_schedule(), prediction="w")  # type: ignore[arg-type]
    model = td.MLP().to(np)
    td.tarin(model)  # type: ignore[attr-defined]
    td.testing.assert_q_samle(denoise)  # type: ignore[attr-defined]
    td.plotting.training_curves(data)  # type: ignore[attr-defined]
    model.save()  # type: ignore[attr-defined]
    print(td.train(model, diffusion, data, steps=9, batch_size=4).samples)  # type: ignore[attr-defined]
    td.train(diffusion, diffusion, data, steps=9, batch_size=4)  # type: ignore[type-var]
    td.train(model, diffusion, data, steps=9, batch_size=4, loss="simpel")  # type: ignore[arg-type]
    td.sample(model, diffusion, (3, 2))  # type: ignore[call-arg]
    td.sample(model, diffusion, (3, 2), rng=0)  # type: ignore[arg-type]
    td.sample(model, diffusion, (3, 2), steps=0.5, rng=rng)  # type: ignore[arg-type]
    td.save_model("model", diffusion)  # type: ignore[arg-type]
