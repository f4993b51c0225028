"""tinydiff: a diffusion model that can be read to the last derivative.

Noise schedule, DDPM loss, U-Net and samplers written by hand in NumPy, without autograd; every gradient is
derived, proved in a test, and runs unchanged on a GPU through CuPy.

>>> import numpy as np, tinydiff as td
>>> rng = np.random.default_rng(0)
>>> diffusion = td.GaussianDiffusion(td.linear_schedule(T=100))
>>> model = td.MLP(in_features=2, rng=rng)
>>> x = td.datasets.toy2d.sample("moons", 1000, rng=rng)
"""

import importlib
from typing import TYPE_CHECKING, Any

from tinydiff import backend, datasets, interop, kernels, metrics, nn, pretrained
from tinydiff._version import __version__
from tinydiff.backend import BackendError, get_backend
from tinydiff.bound import bits_per_dim, variational_bound
from tinydiff.checkpoint import load_model, save_model
from tinydiff.continuous_bound import continuous_bound, learned_schedule_loss
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.guidance import guided
from tinydiff.importance import LossSecondMomentSampler
from tinydiff.learned_schedule import LearnedSchedule
from tinydiff.likelihood import ode_log_likelihood
from tinydiff.losses import hybrid_loss, min_snr_weight, simple_loss, vlb_loss
from tinydiff.mixture import GaussianMixture
from tinydiff.models import MLP, UNet
from tinydiff.nn import Parameter
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.parallel import DataParallel
from tinydiff.samplers import invert, iterate_samples, sample
from tinydiff.schedule_training import train_learned_schedule
from tinydiff.schedules import NoiseSchedule, cosine_schedule, flow_schedule, linear_schedule
from tinydiff.training import find_batch_size, train, training_loss

__all__ = [
    "EMA",
    "MLP",
    "Adam",
    "BackendError",
    "DataParallel",
    "GaussianDiffusion",
    "GaussianMixture",
    "LearnedSchedule",
    "LossSecondMomentSampler",
    "NoiseSchedule",
    "Parameter",
    "UNet",
    "__version__",
    "backend",
    "bits_per_dim",
    "clip_grad_norm",
    "continuous_bound",
    "cosine_schedule",
    "datasets",
    "find_batch_size",
    "flow_schedule",
    "get_backend",
    "guided",
    "hybrid_loss",
    "interop",
    "invert",
    "iterate_samples",
    "kernels",
    "learned_schedule_loss",
    "linear_schedule",
    "load_model",
    "metrics",
    "min_snr_weight",
    "nn",
    "ode_log_likelihood",
    "pretrained",
    "sample",
    "save_model",
    "simple_loss",
    "train",
    "train_learned_schedule",
    "training_loss",
    "variational_bound",
    "vlb_loss",
    "warmup_cosine",
]

WHEN_ASKED_FOR = ("plotting", "testing")  # modules that only some programs need

if TYPE_CHECKING:  # where __getattr__ is hidden: a type checker that saw it would accept any misspelt name
    from tinydiff import plotting as plotting
    from tinydiff import testing as testing
else:

    def __getattr__(name: str) -> Any:
        if name in WHEN_ASKED_FOR:
            return importlib.import_module(f"tinydiff.{name}")
        raise AttributeError(f"module 'tinydiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *WHEN_ASKED_FOR})
