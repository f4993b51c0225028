"""MNIST: 28 x 28 grey-scale handwritten digits (LeCun, Bottou, Bengio & Haffner 1998).

A class-balanced subset of 10,000 training digits travels with the package. The full sets come from a local
folder (``TINYDIFF_DATA``), from the cache, or from public mirrors, and wherever a file comes from, it is
accepted only if its decompressed content has the SHA-256 sum listed here. Nothing else is ever cached.

Yann LeCun and Corinna Cortes hold the copyright of MNIST, which is distributed under CC BY-SA 3.0.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np

from tinydiff._checks import check_array, check_choice, check_counts, check_rng
from tinydiff.backend import Array, array_namespace
from tinydiff.checkpoint import patiently
from tinydiff.datasets.idx import decompress, parse_idx

__all__ = ["SUBSET_FOLDER", "MNISTUnavailableError", "balanced_subset", "load", "to_model_range"]

# What each split's files are called, before "-images-idx3-ubyte" and "-labels-idx1-ubyte".
SPLITS = {"subset": "subset", "train": "train", "test": "t10k"}

# Shape, and SHA-256 sum of the decompressed bytes: between mirrors, only the compression differs.
FILES: dict[str, tuple[tuple[int, ...], str]] = {
    "subset-images-idx3-ubyte": (
        (10_000, 28, 28),
        "596bc3a0cfa5bb4478251488cd305d259d3fb53a45f69b44d100295350e48db9",
    ),
    "subset-labels-idx1-ubyte": (
        (10_000,),
        "a656719d5aaed6ffb38f3163096d2c2123d3b4dfe2c44f340b056e0bceaa43c5",
    ),
    "train-images-idx3-ubyte": (
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

SUBSET_FOLDER = Path(__file__).parent / "mnist_subset"


class MNISTUnavailableError(OSError):
    """A file is not on this machine and could not be fetched; the message says why."""


def load(
    split: str = "subset", cache_dir: str | os.PathLike[str] | None = None, download: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Load digits and their labels.

    The full sets are looked for in the folder that the environment variable ``TINYDIFF_DATA`` names (if it
    is set, only there), then in the cache, then on the mirrors. If ``"train"`` cannot be fetched, the
    subset is returned in its place with a one-line ``UserWarning``; ``"test"`` has no stand-in.

    Parameters
    ----------
    split : {"subset", "train", "test"}
        10,000 class-balanced training digits shipped with the package; all 60,000; the 10,000 test digits.
    cache_dir : path, optional
        Where downloads are kept. Default: the system's cache folder for tinydiff.
    download : bool
        Whether the network may be used.

    Returns
    -------
    images : ndarray of uint8, shape (N, 28, 28)
        Grey values; 0 is background.
    labels : ndarray of uint8, shape (N,)
        0 to 9.

    Raises
    ------
    ValueError
        If `split` is unknown; if a file in ``TINYDIFF_DATA`` is not the original; or if mirrors were
        reached and what they sent was not the original.
    FileNotFoundError
        If ``TINYDIFF_DATA`` is set and a file is missing there.
    MNISTUnavailableError
        If ``"test"`` is not on this machine and cannot be fetched.
    """
    check_choice("split", split, tuple(SPLITS))
    images, labels = f"{SPLITS[split]}-images-idx3-ubyte", f"{SPLITS[split]}-labels-idx1-ubyte"
    if split == "subset":
        source = "the installed package"
        return _from_folder(source, SUBSET_FOLDER, images), _from_folder(source, SUBSET_FOLDER, labels)
    if local := os.environ.get("TINYDIFF_DATA"):
        # Not Path.expanduser, which raises where there is no home folder.
        source, folder = "TINYDIFF_DATA", Path(os.path.expanduser(local))
        return _from_folder(source, folder, images), _from_folder(source, folder, labels)
    try:
        cache = _cache_folder(cache_dir)
        return _from_cache(cache, images, download), _from_cache(cache, labels, download)
    except MNISTUnavailableError as reason:
        if split != "train":
            raise
        warnings.warn(f"using the 10,000-digit subset in place of all 60,000: {reason}", stacklevel=2)
        return load("subset")


def to_model_range(images: Array) -> Array:
    """Turn grey values into what models see: x / 127.5 - 1, with a channel axis.

    Parameters
    ----------
    images : array of uint8, shape (N, H, W)
        Grey values 0 to 255.

    Returns
    -------
    array of float32, shape (N, H, W, 1)
        In [-1, 1]; both ends are exact.

    Raises
    ------
    TypeError
        If `images` is not an array of dtype uint8.
    ValueError
        If it does not have three dimensions, or is masked.
    """
    check_array("images", images)
    xp = array_namespace(images)
    if images.dtype != xp.uint8:
        raise TypeError(f"images has dtype {images.dtype}; expected uint8")
    if images.ndim != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (N, H, W)")
    return xp.expand_dims(xp.astype(images, xp.float32) / 127.5 - 1.0, axis=-1)


def balanced_subset(
    images: np.ndarray, labels: np.ndarray, per_class: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `per_class` items of every class without replacement, and shuffle them.

    Parameters
    ----------
    images : ndarray, shape (N, ...)
        Items.
    labels : ndarray of int, shape (N,)
        Their classes.
    per_class : int
        How many of each class that occurs in `labels`.
    rng : numpy.random.Generator
        Where the randomness comes from.

    Returns
    -------
    images, labels : ndarray
        With ``per_class * classes`` items.

    Raises
    ------
    ValueError
        If `images` and `labels` differ in length, `labels` is not (N,), `per_class` is not a positive integer
        or a class has fewer items.
    TypeError
        If `images` or `labels` is not an array, or `rng` not a generator.
    """
    check_array("images", images)
    check_array("labels", labels)
    check_counts(per_class=per_class)
    check_rng(rng)
    if labels.ndim != 1:
        raise ValueError(f"labels has shape {labels.shape}; expected (N,), a class for each item")
    if len(images) != len(labels):
        raise ValueError(f"images has {len(images)} items and labels {len(labels)}; expected the same number")
    classes, counts = np.unique(labels, return_counts=True)
    smallest = min(counts, default=0)
    if per_class > smallest:
        raise ValueError(
            f"per_class is {per_class}; expected 1 to {smallest}, the size of the smallest class"
        )
    of_class = [np.flatnonzero(labels == label) for label in classes]
    chosen = np.concatenate([rng.permutation(members)[:per_class] for members in of_class])
    chosen = rng.permutation(chosen)
    return images[chosen], labels[chosen]


def _verified(path: Path, name: str) -> np.ndarray:
    """Read a file and accept it only if it is the original `name`."""
    shape, expected = FILES[name]
    whole = 4 + 4 * len(shape) + math.prod(shape)
    content = decompress(path.read_bytes(), str(path), whole + 1)  # one byte more shows that it is longer
    array = parse_idx(content, str(path), ndim=len(shape))
    if array.shape != shape:
        raise ValueError(f"{path}: shape {array.shape}; expected {shape}")
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: SHA-256 of the decompressed content is {found}; expected {expected}")
    return array


def _from_folder(source: str, folder: Path, name: str) -> np.ndarray:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return _verified(path, name)
    raise FileNotFoundError(f"neither {name} nor {name}.gz is in {source}, {folder}")


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    pooch = _pooch()
    try:
        return Path(pooch.os_cache("tinydiff"))
    except RuntimeError as error:  # there is no home folder
        raise MNISTUnavailableError(f"no cache ({error}): set TINYDIFF_DATA, or pass cache_dir") from None


def _from_cache(cache: Path, name: str, download: bool) -> np.ndarray:
    """Return the cached file, or the first original that a mirror sends, which is then cached."""
    cached = cache / f"{name}.gz"
    absent = f"{name} is not in {cache}"
    try:
        return _verified(cached, name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # out of reach, or damaged since: a fresh copy replaces it
        absent = str(error)
    if not download:
        raise MNISTUnavailableError(f"{absent} and download is off")
    _pooch()

    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the accepted file is moved within one file system: whole, or not at all.
        temporary = tempfile.TemporaryDirectory(dir=cache)
    except OSError as error:
        raise MNISTUnavailableError(f"{absent}, where nothing can be kept ({error})") from None
    unreached: list[str] = []
    refused: list[str] = []
    with temporary as folder:
        for mirror in MIRRORS:
            url = f"{mirror}{name}.gz"
            path = Path(folder) / f"{name}.gz"
            try:
                _retrieve(url, path)
            except OSError as error:  # the exceptions of requests are OSErrors, too
                unreached.append(f"{url}: {type(error).__name__}: {error}")
                continue
            try:
                array = _verified(path, name)
            except ValueError as error:
                refused.append(str(error).replace(str(path), url))
                continue
            patiently(os.replace, path, cached)
            return array
    if refused:
        raise ValueError(f"no mirror sent the original, nothing was cached: {'; '.join(refused + unreached)}")
    reasons = "; ".join(textwrap.shorten(reason, 120) for reason in unreached)
    raise MNISTUnavailableError(f"{absent} and no mirror could be reached ({reasons})")


def _pooch() -> ModuleType:
    """pooch, which only those who download need."""
    try:
        import pooch
    except ImportError:
        raise MNISTUnavailableError('downloading MNIST needs pooch (pip install "tinydiff[demos]")') from None
    return pooch


def _retrieve(url: str, path: Path) -> None:
    """Download `url` to `path`; OSError if that fails."""
    # Not pooch.retrieve: that checks the sum of the compressed file, which differs between mirrors, and logs.
    _pooch().HTTPDownloader(timeout=30)(url, str(path), None)
