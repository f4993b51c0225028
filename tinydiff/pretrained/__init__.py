"""A saved network together with the process it was trained for: what is needed to sample, and no more.

``mnist()`` is one of the two that travel with the package; the other is told which digit to draw. The pages
beside them, ``mnist_unet.md`` and ``mnist_unet_classes.md``, say how they were made, and what they draw.
``load`` reads any ``model.safetensors`` that the demos leave; its metadata names the schedule,
its length T, the prediction and the variance, which determine the `GaussianDiffusion`. In a file of
`tinydiff.save_model` the betas take the place of a schedule's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinydiff.checkpoint import load_model
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.models import UNet
from tinydiff.schedules import NoiseSchedule, cosine_schedule, flow_schedule, linear_schedule

__all__ = ["MNIST", "MNIST_CLASSES", "diffusion_from", "load", "mnist"]

MNIST = Path(__file__).parent / "mnist_unet.safetensors"
MNIST_CLASSES = Path(__file__).parent / "mnist_unet_classes.safetensors"
SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {  # by their names in metadata
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "flow": flow_schedule,
}


def diffusion_from(metadata: dict[str, Any]) -> GaussianDiffusion:
    """Return the process that a model's metadata names.

    Parameters
    ----------
    metadata : dict
        ``prediction`` and, unless it is "fixed_small", ``variance``; and ``betas``, a list, or ``schedule``
        ("linear", "cosine" or "flow", with the defaults of `linear_schedule` and its like) and its length
        ``T``.

    Returns
    -------
    GaussianDiffusion

    Raises
    ------
    ValueError
        If an entry is missing or has another value; the message names it.
    """
    for key in ("prediction",) if "betas" in metadata else ("schedule", "T", "prediction"):
        if key not in metadata:
            raise ValueError(
                f"metadata does not say the {key}, without which its diffusion is not known: load_model "
                "reads the model alone, and save_model(path, model, diffusion=...) writes both."
            )
    if "betas" in metadata:
        schedule = NoiseSchedule(metadata["betas"])
    elif metadata["schedule"] in list(SCHEDULES):  # a list, to look up what has no hash
        schedule = SCHEDULES[metadata["schedule"]](metadata["T"])
    else:
        raise ValueError(
            f"metadata has schedule {metadata['schedule']!r}; expected one of {', '.join(SCHEDULES)}."
        )
    return GaussianDiffusion(schedule, metadata["prediction"], metadata.get("variance", "fixed_small"))


def load(
    path: str | os.PathLike[str], backend: str | None = None
) -> tuple[Any, GaussianDiffusion, dict[str, Any]]:
    """Read a model and the process it was trained for.

    Parameters
    ----------
    path : path
        A ``model.safetensors`` whose metadata has what `diffusion_from` needs, as the demos write it; or the
        ``checkpoint.safetensors`` of a training, for the average so far.
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.

    Returns
    -------
    model : UNet or MLP
    diffusion : GaussianDiffusion
    metadata : dict

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    IsADirectoryError
        If `path` is a directory.
    ValueError
        If the file is damaged, not a model of tinydiff's, or does not say what it was trained for.
    """
    model, metadata = load_model(path, backend)
    try:
        return model, diffusion_from(metadata), metadata
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be sampled from: {error}") from None


def mnist(
    backend: str | None = None, *, classes: bool = False
) -> tuple[UNet, GaussianDiffusion, dict[str, Any]]:
    """Return a U-Net that travels with the package: it draws MNIST's digits, 28x28x1 in [-1, 1].

    Parameters
    ----------
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.
    classes : bool
        True: the one that is told which digits, 0 … 9, to draw (``td.sample(..., labels=)``).

    Returns
    -------
    model : UNet
    diffusion : GaussianDiffusion
    metadata : dict
        How it was trained.

    Raises
    ------
    FileNotFoundError
        If this copy of the package came without the weights; the message says how to make them.

    Examples
    --------
    ``model, diffusion, _ = td.pretrained.mnist()``, then
    ``td.sample(model, diffusion, (64, 28, 28, 1), steps=100, clip=True, rng=rng)``.
    """
    path, flag = (MNIST_CLASSES, " --classes") if classes else (MNIST, "")
    if not path.is_file():
        raise FileNotFoundError(
            f"this copy of tinydiff came without {path.name}: train a model with `python "
            f"demos/train_mnist.py{flag}`, and load its model.safetensors by tinydiff.pretrained.load."
        )
    return load(path, backend)
