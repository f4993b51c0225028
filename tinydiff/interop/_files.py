"""Directories as diffusers writes them: a model's, and a pipeline's, which has its scheduler, too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff._checks import class_or_kind
from tinydiff.checkpoint import load_arrays, replace_file
from tinydiff.diffusion import GaussianDiffusion
from tinydiff.interop._process import diffusion_from_diffusers, diffusion_to_diffusers
from tinydiff.interop._unet import check_sample_size, unet_from_diffusers, unet_to_diffusers
from tinydiff.models.unet import UNet

__all__ = ["load_diffusers", "load_pipeline", "save_diffusers", "save_pipeline"]

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER, PIPELINE = "scheduler_config.json", "model_index.json"


def load_diffusers(directory: str | os.PathLike[str], backend: str | None = None) -> UNet:
    """Read a ``UNet2DModel`` as diffusers writes it, without torch.

    Parameters
    ----------
    directory : path
        Holds ``config.json`` and ``diffusion_pytorch_model.safetensors``.
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.

    Returns
    -------
    UNet

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is damaged, or the model is not one that tinydiff computes exactly.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no {name} in {directory}{_hint(directory)}.")
    config = _read(directory / CONFIG)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{directory / CONFIG} does not describe a UNet2DModel.")
    state, _ = load_arrays(directory / WEIGHTS)
    try:
        return unet_from_diffusers(config, state, backend)
    except ValueError as error:
        raise ValueError(f"{directory} does not hold a UNet2DModel that can be loaded: {error}") from None


def save_diffusers(
    directory: str | os.PathLike[str], model: UNet, sample_size: int | tuple[int, int] | None = None
) -> None:
    """Write a model as diffusers writes it: ``UNet2DModel.from_pretrained(directory)`` reads it.

    Parameters
    ----------
    directory : path
        Gets ``config.json`` and ``diffusion_pytorch_model.safetensors``; each replaces what was there only
        once it is complete.
    model : UNet
        The model.
    sample_size : int or pair of int, optional
        Height and width of its images, which diffusers' pipelines read from the config.

    Raises
    ------
    TypeError
        If `model` is not a `UNet` as its config makes it; a subclass may compute something else.
    ValueError
        If `sample_size` is given and is not of positive integers.
    """
    _write_unet(Path(directory), *unet_to_diffusers(model, sample_size))


def load_pipeline(
    directory: str | os.PathLike[str], backend: str | None = None
) -> tuple[UNet, GaussianDiffusion]:
    """Read a diffusers pipeline of a ``UNet2DModel`` and a scheduler, without torch.

    Parameters
    ----------
    directory : path
        As ``DDPMPipeline.save_pretrained`` writes it, with the folders ``unet`` and ``scheduler``, or with
        the files of both side by side, as the published DDPM checkpoints are.
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.

    Returns
    -------
    model : UNet
    diffusion : GaussianDiffusion
        See `diffusion_from_diffusers`. How the pipeline samples is not in it: most pipelines for images clip
        (``tinydiff.sample(..., clip=True)``).

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, or model or scheduler is not one that tinydiff computes exactly.
    """
    file = _part(directory, "scheduler") / SCHEDULER
    if not file.is_file():
        raise FileNotFoundError(f"no {SCHEDULER} in {file.parent}; expected a diffusers pipeline.")
    try:
        diffusion = diffusion_from_diffusers(_read(file))
    except ValueError as error:
        raise ValueError(f"{file} does not hold a scheduler that can be loaded: {error}") from None
    return load_diffusers(_part(directory, "unet"), backend), diffusion


def save_pipeline(
    directory: str | os.PathLike[str],
    model: UNet,
    diffusion: GaussianDiffusion,
    sample_size: int | tuple[int, int],
    clip: bool = False,
    label: int | None = None,
) -> None:
    """Write a model and its process: ``DDPMPipeline.from_pretrained(directory)`` of diffusers reads them.

    Parameters
    ----------
    directory : path
        Gets ``model_index.json`` and the folders ``unet`` and ``scheduler``; each file replaces what was
        there only once it is complete.
    model : UNet
        The model.
    diffusion : GaussianDiffusion
        The process it was trained for.
    sample_size : int or pair of int
        Height and width of its images.
    clip : bool
        Whether the pipeline clips x0 to [-1, 1], as the argument of `tinydiff.sample`.
    label : int, optional
        For a model with classes: which one the pipeline draws, 0 … num_classes (the last: none), since a
        DDPMPipeline tells a network no class. Its row of the embedding is added to the bias of the time's
        embedding (docs: B.27).

    Raises
    ------
    TypeError
        If `model` is not a `UNet` as its config makes it (a subclass may compute something else), or
        `diffusion` is not a `GaussianDiffusion`.
    ValueError
        If `sample_size` is not of positive integers, or the model's channels are not those that the variance
        needs, or `label` is not one of its classes.
    """
    check_sample_size(sample_size)
    scheduler = diffusion_to_diffusers(diffusion, clip)
    config, state = unet_to_diffusers(model, sample_size)
    _of_one_class(config, state, label)
    taken, given = config["in_channels"], config["out_channels"]
    each = 2 if diffusion.variance == "learned_range" else 1
    if given != each * taken:
        raise ValueError(
            f"model has in_channels={taken} and out_channels={given}; expected {each} for each, of the "
            f"variance {diffusion.variance!r}."
        )
    _write_unet(Path(directory, "unet"), config, state)
    _write(Path(directory, "scheduler", SCHEDULER), scheduler)
    index = {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DModel"]}
    _write(Path(directory, PIPELINE), {"_class_name": "DDPMPipeline", **index})


def _of_one_class(config: dict[str, Any], state: dict[str, Any], label: int | None) -> None:
    """Make a network that is told `label` one without classes; ValueError unless it is one of its classes."""
    rows = state.pop("class_embedding.weight", None)
    if rows is None:
        if label is not None:
            raise ValueError(f"label is {label!r}, and model has no classes; expected None.")
        return
    integer = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    if label is None or not (integer and 0 <= label < len(rows)):
        raise ValueError(
            f"label is {label!r}, and model has num_classes={len(rows) - 1}; expected 0 ... {len(rows) - 1}: "
            "a DDPMPipeline tells a network no class, so it is written for one."
        )
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + rows[label]
    config["num_class_embeds"] = None


def _part(directory: str | os.PathLike[str], name: str) -> Path:
    """The folder of one part of a pipeline, or that of all parts."""
    folder = Path(directory, name)
    return folder if folder.is_dir() else Path(directory)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {class_or_kind(config)}; expected a JSON object.")
    return config


def _write_unet(directory: Path, config: Mapping[str, Any], state: dict[str, Any]) -> None:
    from safetensors.numpy import save

    replace_file(directory / WEIGHTS, save(state, {"format": "pt"}))
    _write(directory / CONFIG, config)


def _write(file: Path, config: Mapping[str, Any]) -> None:
    replace_file(file, (json.dumps(config, indent=2) + "\n").encode())


def _hint(directory: Path) -> str:
    if (directory / "unet" / CONFIG).is_file():
        model = directory / "unet"
        return f"; this looks like a whole pipeline, which load_pipeline reads, and whose model is in {model}"
    if list(directory.glob("diffusion_pytorch_model*-of-*.safetensors")):
        return (
            "; its weights are in several files: save the model again with diffusers' "
            'save_pretrained(..., max_shard_size="1TB")'
        )
    for variant in sorted(directory.glob("diffusion_pytorch_model.*.safetensors")):
        return f"; it holds a variant, {variant.name}: rename that to load it"
    if list(directory.glob("*.bin")):
        return (
            "; it holds pickled weights, which tinydiff does not load: save the model again with "
            "diffusers' save_pretrained(..., safe_serialization=True)"
        )
    return ""
