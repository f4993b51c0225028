"""tinydiff: a diffusion model that can be read to the last derivative.

Noise schedule, DDPM loss, U-Net and samplers written by hand in NumPy, without autograd; every gradient is
derived, proved in a test, and runs unchanged on a GPU through CuPy.

>>> import numpy as np, tinydiff as td
>>> rng = np.random.default_rng(0)
>>> diffusion = td.GaussianDiffusion(td.linear_schedule(T=100))
>>> model = td.MLP(in_features=2, rng=rng)
>>> x = td.datasets.toy2d.sample("moons", 1000, rng=rng)
"""

from tinydiff import datasets, interop, metrics, nn
from tinydiff._version import __version__
from tinydiff.backend import BackendError, get_backend
from tinydiff.checkpoint import load_model, save_model
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.losses import simple_loss
from tinydiff.models import MLP, UNet
from tinydiff.nn import Parameter
from tinydiff.optim import EMA, Adam, clip_grad_norm, warmup_cosine
from tinydiff.samplers import iterate_samples, sample
from tinydiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule
from tinydiff.training import train, training_loss

__all__ = [
    "EMA",
    "MLP",
    "Adam",
    "BackendError",
    "GaussianDiffusion",
    "NoiseSchedule",
    "Parameter",
    "UNet",
    "__version__",
    "clip_grad_norm",
    "cosine_schedule",
    "datasets",
    "get_backend",
    "interop",
    "iterate_samples",
    "linear_schedule",
    "load_model",
    "metrics",
    "nn",
    "sample",
    "save_model",
    "simple_loss",
    "train",
    "training_loss",
    "warmup_cosine",
]
