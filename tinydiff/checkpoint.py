"""What is written to disk, and how it survives.

Everything is safetensors: named arrays and a few strings, readable by other programs, and no code runs on
loading. A file is written beside its destination and then moved over it, so that a crash leaves either the
old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinydiff._checks import class_or_kind
from tinydiff.backend import get_backend
from tinydiff.diffusion import GaussianDiffusion, check_diffusion
from tinydiff.models import MLP, UNet
from tinydiff.models._checks import changes, check_own_layers, exchanged_layers
from tinydiff.nn.module import Module

__all__ = [
    "check_sizes",
    "load_arrays",
    "load_model",
    "model_name",
    "naming",
    "patiently",
    "process_metadata",
    "remove_unfinished",
    "replace_file",
    "save_arrays",
    "save_model",
]

MODELS: dict[str, Any] = {"MLP": MLP, "UNet": UNet}

T = TypeVar("T")

PATIENCE = 3.0 if os.name == "nt" else 0.0  # seconds that somebody else may hold a file


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` so that the path never holds anything but a whole file."""
    path = _no_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        patiently(os.replace, temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def patiently(act: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `act`; on Windows, if that is refused, again and again for a while.

    Windows refuses to replace or delete a file that somebody has open, if only to read it: a virus scanner,
    or who samples from the checkpoint of a running training. It refuses to open one that is being replaced.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return act(*args, **kwargs)
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.02)


def _no_directory(path: str | os.PathLike[str]) -> Path:
    """The path of a file, or IsADirectoryError as opening it would raise."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path


def remove_unfinished(path: Path) -> None:
    """Remove what processes killed in `replace_file` left beside `path`; nobody else may be writing to it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        patiently(temporary.unlink, missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError name `path`: that of a full disk, say, names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def save_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Write named host arrays and JSON-serialisable `metadata` to a safetensors file.

    The same arrays and metadata make the same file, byte for byte.

    Parameters
    ----------
    path : path
        Destination; an existing file is replaced only once the new one is complete.
    arrays : mapping of str to ndarray
        What to keep.
    metadata : mapping of str to JSON-serialisable
        What to remember about it.

    Raises
    ------
    TypeError
        If a value of `metadata` cannot be written as JSON, or an array not in safetensors' dtypes.
    ValueError
        If an array has the name that safetensors gives to metadata: the file could not be read again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    if "__metadata__" in arrays:
        raise ValueError("arrays has the name '__metadata__', which is safetensors' own; expected another.")
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    texts = {}
    for key, value in metadata.items():
        try:
            texts[key] = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata has {key!r}, which JSON cannot hold: {error}.") from None
    try:
        content = save(tensors, texts or None)  # for two empty mappings it would write no JSON
    except SafetensorError as error:
        odd = (x for x in tensors.items() if x[1].dtype.kind not in "biuf" or x[1].dtype.itemsize > 8)
        came = ", ".join(f"{name!r} of {array.dtype}" for name, array in odd)
        raise TypeError(f"arrays has {came}; expected real numbers ({error}).") from None
    replace_file(path, _sorted_header(content))


def _sorted_header(content: bytes) -> bytes:
    """The same file, its header sorted by name: safetensors writes metadata in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of eight bytes
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(content)[end:]))


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_arrays` wrote, or any safetensors file NumPy has dtypes for.

    Returns
    -------
    arrays : dict of str to ndarray
    metadata : dict
        Values that are JSON are decoded; others stay strings.

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    IsADirectoryError
        If `path` is a directory.
    ValueError
        If the file is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = _no_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    # Opened here for its PermissionError, where safetensors would say that there is no file; and kept open,
    # so that Windows does not replace it before safetensors opens it.
    try:
        with patiently(path.open, "rb"), safe_open(path, framework="np") as file:
            metadata = {key: _decode(text) for key, text in (file.metadata() or {}).items()}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        remedy = " After import ml_dtypes it can." if "bfloat16" in str(error) else ""
        raise ValueError(
            f"{path} is not a whole safetensors file that NumPy can read: {error}.{remedy}"
        ) from None
    return arrays, metadata


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return text


def save_model(
    path: str | os.PathLike[str],
    model: Module,
    metadata: Mapping[str, Any] | None = None,
    diffusion: GaussianDiffusion | None = None,
) -> None:
    """Write a `UNet` or `MLP`, with what is needed to build it again.

    Parameters
    ----------
    path : path
        Destination, customarily ``model.safetensors``.
    model : UNet or MLP
        The model.
    metadata : mapping, optional
        More to remember, JSON-serialisable: what it was trained on, say. What `load_model` handed out can go
        in again: ``"model"`` and ``"config"`` are this model's in any case.
    diffusion : GaussianDiffusion, optional
        The process that it was trained for, which `tinydiff.pretrained.load` then gives back with the model.
        Its betas, prediction and variance are kept.

    Raises
    ------
    TypeError
        If `model` is neither a `UNet` nor an `MLP`, or has other layers or settings than its config makes,
        or one weight in two places; if `diffusion` is not a `GaussianDiffusion`, or `metadata` cannot be
        written as JSON.
    IsADirectoryError
        If `path` is a directory.
    """
    if type(model) not in MODELS.values():
        expected = f"one of {', '.join(MODELS)}, of tinydiff's own"
        raise TypeError(
            f"model is {class_or_kind(model)}; expected {expected} (what another network's state_dict() "
            "returns is kept by checkpoint.save_arrays)."
        )
    check_own_layers(model)
    if metadata is not None and not isinstance(metadata, Mapping):
        where = ", which goes to diffusion" if isinstance(metadata, GaussianDiffusion) else ""
        raise TypeError(f"metadata is {class_or_kind(metadata)}{where}; expected a mapping.")
    about = {"model": type(model).__name__, "config": model.config}  # type: ignore[attr-defined]
    if diffusion is not None:
        about |= process_metadata(diffusion)
    save_arrays(path, model.state_dict(), {**(metadata or {}), **about})


def model_name(model: Module) -> str:
    """The name of the model's class, which `load_model` makes again, and what its config does not say.

    The latter is the classes of somebody else's layers, or else the first name where a network was changed.
    """
    changed = sorted({type(layer).__name__ for layer in exchanged_layers(model).values()})
    if not changed and type(model) in MODELS.values():
        changed = [name for name, _, _ in islice(changes(model), 1)]
    return " with ".join([type(model).__name__, *changed])


def process_metadata(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """What `tinydiff.pretrained.diffusion_from` makes the process from; TypeError if it is no process."""
    check_diffusion(diffusion)
    betas = diffusion.schedule.betas.tolist()
    return {"betas": betas, "prediction": diffusion.prediction, "variance": diffusion.variance}


def load_model(path: str | os.PathLike[str], backend: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Read what `save_model` wrote; of a training's checkpoint, the average of the weights so far.

    Parameters
    ----------
    path : path
        A ``model.safetensors`` of tinydiff (diffusers' are read by ``interop.load_diffusers``), or the
        ``checkpoint.safetensors`` in the `run_dir` of a training, which may go on.
    backend : {"numpy", "cupy"}, optional
        Where the weights go. Default: ``TINYDIFF_BACKEND``.

    Returns
    -------
    model : UNet or MLP
        With weights of the dtype in which they were saved, but float32 if that was float16.
    metadata : dict
        That of a checkpoint has its ``"step"``, the run's ``"settings"``, and its process.

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    IsADirectoryError
        If `path` is a directory.
    ValueError
        If the file is damaged, or not a model of tinydiff's.
    """
    arrays, metadata = load_arrays(path)
    if "model" not in metadata and isinstance(metadata.get("settings"), dict):
        arrays, metadata = _average(arrays, metadata)
    if metadata.get("model") not in list(MODELS) or not isinstance(metadata.get("config"), dict):
        raise ValueError(
            f"{path} does not say which tinydiff model it holds (metadata 'model' is "
            f"{metadata.get('model')!r}; expected one of {', '.join(MODELS)}). Another network's weights are "
            "read by checkpoint.load_arrays; in a training's checkpoint their average is ema.model.*."
        )
    try:
        check_sizes(metadata["config"], arrays)
        model = MODELS[metadata["model"]](**metadata["config"], backend=backend)
        if any(array.dtype == np.float64 for array in arrays.values()):
            xp = get_backend(backend)
            model.to(xp, xp.float64)
        model.load_state_dict(arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a whole {metadata['model']}: {error}") from None
    return model, metadata


def _average(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The average in a training's checkpoint, with the arrays and metadata of a saved model."""
    prefix = "ema.model." if "adam.steps" in arrays else "ema."  # ema.: before parts had states of their own
    about = {name: metadata["settings"].get(name) for name in ("model", "config")}
    average = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    return average, {**metadata, **about}


def check_sizes(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError naming a size larger than the number of weights: a layer has at least one for each.

    To be called before the network is made, which could take all the memory there is.
    """
    weights = sum(array.size for array in arrays.values())
    for name, value in config.items():
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > weights:
                raise ValueError(f"{name} is {value!r}, and there are {weights} weights in all.")
