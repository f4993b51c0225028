"""IDX files, the shipped subset, and where the full sets come from; no test reaches beyond this machine."""

import contextlib
import gzip
import hashlib
import os
import subprocess
import sys
import threading
import tracemalloc
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from runs import refused

from tinydiff import checkpoint
from tinydiff.datasets import mnist
from tinydiff.datasets.idx import read_idx, write_idx

ROOT = Path(__file__).parents[1]
REAL_RETRIEVE = mnist._retrieve

uint8_arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6))


def idx_bytes(array, kind=0x08):
    """IDX as the format's description has it, written without tinydiff."""
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, kind, array.ndim]) + lengths + array.tobytes()


# --- IDX -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@settings(deadline=None, max_examples=50)
@given(array=uint8_arrays)
def test_idx_round_trip(tmp_path_factory, suffix, array):
    path = tmp_path_factory.getbasetemp() / f"array{suffix}"
    write_idx(path, array)
    content = path.read_bytes()
    assert (gzip.decompress(content) if suffix else content) == idx_bytes(array)
    back = read_idx(path, ndim=array.ndim)
    assert back.dtype == np.uint8 and back.flags.writeable
    np.testing.assert_array_equal(back, array, strict=True)
    np.testing.assert_array_equal(read_idx(content), array, strict=True)


def test_compressed_idx_holds_neither_time_nor_name(tmp_path, monkeypatch):
    array = np.arange(100, dtype=np.uint8)
    write_idx(tmp_path / "a.gz", array)
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    write_idx(tmp_path / "b.gz", array[::-1][::-1])
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert (tmp_path / "a.gz").read_bytes()[3:8] == b"\0\0\0\0\0"  # no flags, so no name; time 0


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
HUGE = bytes([0, 0, 8, 4]) + bytes(4) + 3 * b"\xff\xff\xff\xff"  # an empty array of shape (0, 2^32-1, ...)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; an IDX file has at least 4"),
        (GOOD[:3], "3 bytes; an IDX file has at least 4"),
        (b"<!DOCTYPE html>", "not an IDX file: starts with 0x3c21444f"),
        (b"\0\0\x0d\x01" + bytes(8), r"element type 0x0d; expected 0x08 \(uint8\)"),
        (idx_bytes(np.zeros(24, np.uint8)), "1 dimensions; expected 3"),
        (GOOD[:10], "truncated: 10 bytes; the header alone has 16"),
        (GOOD[:-1], r"truncated: 23 bytes of data; shape \(2, 3, 4\) takes 24"),
        (GOOD + b"\0", r"trailing bytes: 25 bytes of data; shape \(2, 3, 4\) takes 24"),
    ],
    ids=["empty", "no header", "web page", "float", "vector", "half a header", "truncated", "trailing"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_idx_is_a_value_error_that_names_the_file(tmp_path, content, message, suffix):
    path = tmp_path / f"digits{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\0", "0 dimensions; expected 1 to 64"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "255 dimensions; expected 1 to 64"),
        (HUGE, "too large"),
    ],
    ids=["scalar", "many dimensions", "huge"],
)
def test_idx_that_numpy_cannot_hold(content, message):
    with pytest.raises(ValueError, match=f"^<bytes>: .*{message}"):
        read_idx(content)


def damaged(content):
    """Gzip streams that a broken transfer leaves."""
    stream = gzip.compress(content, mtime=0)
    yield "half", stream[: len(stream) // 2]
    yield "header only", stream[:5]
    yield "no trailer", stream[:-8]
    yield "wrong checksum", stream[:-8] + bytes(4) + stream[-4:]
    yield "bad block", stream[:12] + b"\xff\xff\xff" + stream[15:]
    yield "garbage behind", stream + b"garbage"


@pytest.mark.parametrize("stream", [pytest.param(stream, id=name) for name, stream in damaged(GOOD)])
def test_damaged_gzip(tmp_path, stream):
    path = tmp_path / "digits.gz"
    path.write_bytes(stream)
    with pytest.raises(ValueError, match="damaged or truncated gzip stream") as caught:
        read_idx(path)
    assert str(caught.value).startswith(f"{path}: ")


@settings(deadline=None, max_examples=300)
@given(data=st.data(), compress=st.booleans())
def test_any_damage_is_an_array_or_a_value_error(data, compress):
    content = bytearray(gzip.compress(GOOD, mtime=0) if compress else GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    with contextlib.suppress(ValueError):
        assert read_idx(bytes(content)).dtype == np.uint8


@pytest.mark.parametrize("array", [np.zeros(3), [1, 2], np.zeros(3, np.int8)])
def test_write_refuses_other_types(tmp_path, array):
    with pytest.raises(TypeError, match="expected an ndarray of uint8"):
        write_idx(tmp_path / "a", array)


def test_what_a_full_disk_refuses_is_named_and_the_old_file_stays(tmp_path, full_disk):
    path = tmp_path / "digits"
    write_idx(path, np.arange(9, dtype=np.uint8))
    with full_disk(), pytest.raises(OSError, match="digits"):
        write_idx(path, np.zeros(999, np.uint8))
    assert read_idx(path).tolist() == list(range(9))
    assert list(tmp_path.iterdir()) == [path]


def test_write_refuses_a_scalar(tmp_path):
    with pytest.raises(ValueError, match="array has no dimension"):
        write_idx(tmp_path / "a", np.array(3, np.uint8))


# --- the subset ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subset():
    return mnist.load()


def test_subset_is_balanced_shuffled_and_whole(subset):
    images, labels = subset
    assert images.shape == (10_000, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (10_000,) and labels.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), [1000] * 10)
    # Shuffled: the first 1,000 hold 100 +- 9.5 of each class; sorted by class they would hold 1,000 of one.
    assert np.abs(np.bincount(labels[:1000], minlength=10) - 100).max() < 60
    assert images.min() == 0 and images.max() == 255
    assert len({image.tobytes() for image in images}) == 10_000, "a digit occurs twice"


def test_shipped_files_have_the_listed_sums():
    # Stated here again: a changed table and changed files would agree with each other.
    for name, expected in (
        ("subset-images-idx3-ubyte", "596bc3a0cfa5bb4478251488cd305d259d3fb53a45f69b44d100295350e48db9"),
        ("subset-labels-idx1-ubyte", "a656719d5aaed6ffb38f3163096d2c2123d3b4dfe2c44f340b056e0bceaa43c5"),
    ):
        content = gzip.decompress((mnist.SUBSET_FOLDER / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == expected == mnist.FILES[name][1]


def test_licence_travels_with_the_subset():
    licence = (mnist.SUBSET_FOLDER / "LICENSE.txt").read_text()
    for fact in ("Yann LeCun and Corinna Cortes", "creativecommons.org/licenses/by-sa/3.0", "Changes:"):
        assert fact in licence


@pytest.fixture(scope="module")
def original_folder():
    for folder in (os.environ.get("TINYDIFF_DATA"), ROOT.parent / "shared/data/mnist"):
        if folder and (Path(folder) / "train-images-idx3-ubyte.gz").is_file():
            return Path(folder)
    pytest.skip("the full MNIST is not here: set TINYDIFF_DATA to a folder with its .gz files")


def test_subset_is_of_the_training_digits_and_the_tool_makes_it_again(
    original_folder, subset, tmp_path, monkeypatch
):
    command = [
        sys.executable,
        ROOT / "tools/make_mnist_subset.py",
        "--source",
        original_folder,
        "--out",
        tmp_path,
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for made, shipped in zip(("images-idx3", "labels-idx1"), subset, strict=True):
        np.testing.assert_array_equal(read_idx(tmp_path / f"subset-{made}-ubyte.gz"), shipped)
    monkeypatch.setenv("TINYDIFF_DATA", str(original_folder))
    images, labels = mnist.load("train")
    assert images.shape == (60_000, 28, 28)
    full = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(full.get(image.tobytes()) == label for image, label in zip(*subset, strict=True))


def test_original_test_digits(original_folder, monkeypatch):
    monkeypatch.setenv("TINYDIFF_DATA", str(original_folder))
    images, labels = mnist.load("test")
    assert images.shape == (10_000, 28, 28) and labels.shape == (10_000,)
    np.testing.assert_array_equal(labels[:5], [7, 2, 1, 0, 4])


# --- ranges and balance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_to_model_range_maps_every_grey_value(xp):
    images = xp.reshape(xp.arange(256, dtype=xp.uint8), (4, 8, 8))
    x = mnist.to_model_range(images)
    assert x.shape == (4, 8, 8, 1) and x.dtype == xp.float32
    expected = np.arange(256).reshape(4, 8, 8, 1) / 127.5 - 1
    np.testing.assert_allclose(np.asarray(x), expected, atol=1.2e-7)
    assert float(xp.min(x)) == -1.0 and float(xp.max(x)) == 1.0


def test_to_model_range_refuses_what_is_not_grey_values():
    with pytest.raises(TypeError, match="images has dtype float32; expected uint8"):
        mnist.to_model_range(np.zeros((2, 28, 28), np.float32))
    with pytest.raises(ValueError, match=r"images has shape \(28, 28\); expected \(N, H, W\)"):
        mnist.to_model_range(np.zeros((28, 28), np.uint8))
    with pytest.raises(TypeError, match="images is a list; expected an array"):
        mnist.to_model_range([[[0]]])


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_balanced_subset_draws_each_class_without_replacement(counts, seed, data):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
    items = np.arange(len(labels))
    per_class = data.draw(st.integers(1, min(counts)))
    chosen, chosen_labels = mnist.balanced_subset(items, labels, per_class, rng)
    np.testing.assert_array_equal(chosen_labels, labels[chosen])
    np.testing.assert_array_equal(np.bincount(chosen_labels), [per_class] * len(counts))
    assert len(set(chosen)) == len(chosen)


def test_balanced_subset_is_shuffled():
    labels = np.repeat([0, 1], 50)
    chosen, chosen_labels = mnist.balanced_subset(np.arange(100), labels, 50, np.random.default_rng(0))
    assert 30 < np.count_nonzero(np.diff(chosen_labels)) < 70  # of 99 neighbours; sorted by class: 1
    assert np.any(np.diff(chosen[chosen_labels == 0]) < 0)


def test_balanced_subset_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="per_class is 3; expected 1 to 2"):
        mnist.balanced_subset(np.zeros(5), np.array([0, 0, 0, 1, 1]), 3, np.random.default_rng(0))


@pytest.mark.parametrize("per_class", [0, -1, 2.0, True, None, "1"])
def test_balanced_subset_refuses_what_is_no_number_of_items(per_class):
    with pytest.raises(ValueError, match=f"per_class is {per_class!r}; expected an integer of at least 1"):
        mnist.balanced_subset(np.zeros(5), np.array([0, 0, 0, 1, 1]), per_class, np.random.default_rng(0))


def test_balanced_subset_names_what_does_not_fit():
    items, labels, rng = np.zeros(4), np.array([0, 1, 0, 1]), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"labels has shape \(4, 2\); expected \(N,\)"):
        mnist.balanced_subset(items, np.eye(2)[labels], 1, rng)
    with pytest.raises(TypeError, match="images is a list; expected an array"):
        mnist.balanced_subset(list(items), labels, 1, rng)
    with pytest.raises(TypeError, match="labels is a list; expected an array"):
        mnist.balanced_subset(items, list(labels), 1, rng)
    with pytest.raises(TypeError, match="rng is an int"):
        mnist.balanced_subset(items, labels, 1, 0)
    with pytest.raises(ValueError, match="images has 4 items and labels 5"):
        mnist.balanced_subset(np.zeros(4), np.zeros(5, int), 1, np.random.default_rng(0))


# --- where the full sets come from -----------------------------------------------------------------------


class World:
    """A small stand-in for MNIST with its own sums, and mirrors that send what a test tells them to."""

    def __init__(self, monkeypatch, folder):
        rng = np.random.default_rng(0)
        self.cache = folder / "cache"
        self.originals, self.arrays, self.sent, self.asked = {}, {}, {}, []
        for stem, n in (("train", 6), ("t10k", 4)):
            for name, shape in (
                (f"{stem}-images-idx3-ubyte", (n, 28, 28)),
                (f"{stem}-labels-idx1-ubyte", (n,)),
            ):
                array = rng.integers(10, size=shape, dtype=np.uint8)
                self.arrays[name], self.originals[name] = array, idx_bytes(array)
                sums = hashlib.sha256(self.originals[name]).hexdigest()
                monkeypatch.setitem(mnist.FILES, name, (shape, sums))
                self.sent[name] = gzip.compress(self.originals[name])
        monkeypatch.setattr(mnist, "MIRRORS", ("https://one/", "https://two/"))
        monkeypatch.setattr(mnist, "_retrieve", self.retrieve)
        monkeypatch.delenv("TINYDIFF_DATA", raising=False)

    def retrieve(self, url, path):
        self.asked.append(url)
        assert self.cache in path.parents, "moved from another file system it might arrive by halves"
        mirror, name = url.removesuffix(".gz").removeprefix("https://").split("/")
        content = self.sent.get((mirror, name), self.sent[name])
        if isinstance(content, Exception):
            path.write_bytes(b"the beginning of a transfer that then broke")
            raise content
        path.write_bytes(content)

    def send(self, content, mirror=None):
        """Let a mirror, or both, send `content` for every file."""
        for name in self.originals:
            self.sent[(mirror, name) if mirror else name] = content

    def load(self, split="train", **options):
        return mnist.load(split, cache_dir=self.cache, **options)

    def cached(self):
        return sorted(path.name for path in self.cache.rglob("*")) if self.cache.exists() else []

    def assert_original(self, loaded, stem="train"):
        np.testing.assert_array_equal(loaded[0], self.arrays[f"{stem}-images-idx3-ubyte"], strict=True)
        np.testing.assert_array_equal(loaded[1], self.arrays[f"{stem}-labels-idx1-ubyte"], strict=True)


@pytest.fixture
def world(monkeypatch, tmp_path):
    return World(monkeypatch, tmp_path)


TRAIN_GZ = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_download_is_cached_and_used_the_second_time(world, split, stem):
    world.assert_original(world.load(split), stem)
    assert world.asked == [
        f"https://one/{stem}-images-idx3-ubyte.gz",
        f"https://one/{stem}-labels-idx1-ubyte.gz",
    ]
    assert world.cached() == [f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz"]
    world.send(OSError("no network"))
    world.assert_original(world.load(split), stem)
    world.assert_original(world.load(split, download=False), stem)
    assert len(world.asked) == 2


def test_a_cached_file_that_somebody_reads_is_replaced_once_it_is_let_go(world, monkeypatch):
    """As on Windows, where an open file cannot be replaced."""
    world.load()
    for path in world.cache.iterdir():
        path.write_bytes(b"damaged since")
    monkeypatch.setattr(checkpoint, "PATIENCE", 9.0)
    monkeypatch.setattr(os, "replace", refused(os.replace, times=3))
    world.assert_original(world.load())
    world.assert_original(world.load(download=False))


def test_the_default_cache_is_the_systems(world, monkeypatch, tmp_path):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "system" / project)
    world.cache = tmp_path / "system" / "tinydiff"
    world.assert_original(mnist.load("train"))
    assert sorted(path.name for path in (tmp_path / "system/tinydiff").iterdir()) == TRAIN_GZ


def test_another_compression_of_the_same_content_is_accepted(world):
    for name, content in world.originals.items():
        world.sent[name] = gzip.compress(content, compresslevel=1, mtime=1)
    world.assert_original(world.load())


def test_the_second_mirror_is_asked_when_the_first_fails(world):
    world.send(ConnectionError("unplugged"), mirror="one")
    world.assert_original(world.load())
    world.send(b"<html>Log in to this network</html>", mirror="one")
    world.assert_original(world.load("test"), "t10k")
    assert len(world.cached()) == 4


def bad_downloads():
    images = np.zeros((6, 28, 28), np.uint8)
    yield (
        "another content",
        gzip.compress(idx_bytes(images)),
        "SHA-256 of the decompressed content is .*; expected",
    )
    yield (
        "wrong shape",
        gzip.compress(idx_bytes(images[:, :14])),
        r"shape \(6, 14, 28\); expected \(6, 28, 28\)",
    )
    yield "too few", gzip.compress(idx_bytes(images[:5])), r"shape \(5, 28, 28\); expected \(6, 28, 28\)"
    yield "wrong dimensions", gzip.compress(idx_bytes(images[0])), "2 dimensions; expected 3"
    yield "truncated inside", gzip.compress(idx_bytes(images)[:-9]), "truncated: 4695 bytes of data"
    yield "truncated outside", gzip.compress(idx_bytes(images))[:-9], "damaged or truncated gzip stream"
    yield "a web page", b"<html>Log in</html>", "not an IDX file"
    yield "nothing", b"", "0 bytes"


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(*case, id=name) for name, *case in bad_downloads()]
)
def test_a_bad_download_is_a_clear_error_and_never_cached(world, content, message):
    world.send(content)
    with pytest.raises(ValueError, match=message) as caught:
        world.load()
    text = str(caught.value)
    assert text.startswith("no mirror sent the original, nothing was cached: https://one/")
    assert "https://two/" in text and "\n" not in text
    assert world.cached() == []


def test_of_a_download_no_more_is_decompressed_than_the_original_has(world):
    world.send(gzip.compress(bytes([0, 0, 8, 3]) + bytes(50_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"nothing was cached: .*trailing bytes"):
            world.load()
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_bad_download_is_an_error_though_the_other_mirror_is_out_of_reach(world):
    world.send(b"<html>", mirror="one")
    world.send(ConnectionError("unplugged"), mirror="two")
    with pytest.raises(ValueError, match=r"https://one/.*not an IDX file.*https://two/.*unplugged"):
        world.load()
    assert world.cached() == []


@pytest.mark.parametrize("fails", ["images-idx3", "labels-idx1"])
def test_offline_train_falls_back_to_the_subset_with_one_line(world, subset, fails):
    world.sent[f"train-{fails}-ubyte"] = ConnectionError("unplugged\nand more\nlines " + "x" * 500)
    with pytest.warns(
        UserWarning, match=r"^using the 10,000-digit subset .*: train-.* no mirror could be reached"
    ) as caught:
        images, labels = world.load()
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and len(str(caught[0].message)) < 600
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(images, subset[0])
    np.testing.assert_array_equal(labels, subset[1])
    assert world.cached() == ([] if fails == "images-idx3" else TRAIN_GZ[:1])


def test_offline_test_has_no_stand_in(world):
    world.send(ConnectionError("unplugged"))
    with pytest.raises(mnist.MNISTUnavailableError, match=r"t10k-images.* is not in .*unplugged"):
        world.load("test")


def test_download_off_asks_no_mirror(world, subset):
    with pytest.warns(UserWarning, match=r"^using the 10,000-digit subset .* download is off"):
        assert len(world.load(download=False)[0]) == 10_000
    with pytest.raises(mnist.MNISTUnavailableError, match="download is off"):
        world.load("test", download=False)
    assert world.asked == [] and not world.cache.exists()


@pytest.mark.parametrize("why", ["a file is there", "its name is too long", "it is read-only"])
def test_where_nothing_can_be_kept_the_subset_takes_its_place(world, subset, monkeypatch, why):
    if why == "a file is there":
        world.cache.write_bytes(b"")
    elif why == "its name is too long":  # it cannot even be looked at, as one in another's home
        world.cache = world.cache.with_name("x" * 300)
    else:

        def refuse(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(mnist.tempfile, "TemporaryDirectory", refuse)
    with pytest.warns(
        UserWarning, match=r"^using the 10,000-digit subset .*nothing can be kept \("
    ) as caught:
        np.testing.assert_array_equal(world.load()[0], subset[0])
    assert len(caught) == 1
    with pytest.raises(mnist.MNISTUnavailableError, match="nothing can be kept"):
        world.load("test")
    assert world.asked == []


def test_without_a_home_the_subset_takes_its_place(world, subset, monkeypatch):
    """In a container whose user has neither a name nor a HOME."""

    def homeless(project):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("pooch.os_cache", homeless)
    with pytest.warns(UserWarning, match=r"^using the .*could not determine the home .*TINYDIFF_DATA"):
        np.testing.assert_array_equal(mnist.load("train")[0], subset[0])
    with pytest.raises(mnist.MNISTUnavailableError, match="cache_dir"):
        mnist.load("test")
    assert world.asked == []


@pytest.mark.parametrize("cache_dir", [None, "here"])
def test_without_pooch(world, monkeypatch, tmp_path, cache_dir):
    monkeypatch.setitem(sys.modules, "pooch", None)  # makes `import pooch` fail
    where = None if cache_dir is None else tmp_path / cache_dir
    with pytest.warns(
        UserWarning, match=r'^using the .* needs pooch \(pip install "tinydiff\[demos\]"\)'
    ) as caught:
        assert len(mnist.load("train", where)[0]) == 10_000
    assert len(caught) == 1
    with pytest.raises(mnist.MNISTUnavailableError, match=r'needs pooch \(pip install "tinydiff\[demos\]"\)'):
        mnist.load("test", where)
    assert world.asked == []


def test_a_file_damaged_in_the_cache_is_replaced(world):
    world.load()
    path = world.cache / TRAIN_GZ[0]
    path.write_bytes(path.read_bytes()[:-20])
    world.assert_original(world.load())
    assert len(world.asked) == 3
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((6, 28, 28), np.uint8))))  # whole, but another
    world.assert_original(world.load())
    assert len(world.asked) == 4
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^using the .*train-images.*0 bytes"):
        world.load(download=False)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_local_folder_comes_before_cache_and_mirrors(world, monkeypatch, tmp_path, suffix):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in world.originals.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    monkeypatch.setenv("TINYDIFF_DATA", str(folder))
    world.assert_original(world.load())
    world.assert_original(world.load("test"), "t10k")
    for name in ("HOME", "USERPROFILE"):  # the second on Windows
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("TINYDIFF_DATA", "~/data")
    world.assert_original(world.load())
    assert world.asked == [] and world.cached() == []
    assert len(mnist.load("subset")[0]) == 10_000


def test_a_local_folder_that_is_set_is_never_passed_over(world, monkeypatch, tmp_path):
    world.load()  # fill the cache: still not used
    monkeypatch.setenv("TINYDIFF_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is in TINYDIFF_DATA, .*data"):
        world.load()
    (tmp_path / "data").mkdir()
    images = idx_bytes(np.zeros((6, 28, 28), np.uint8))
    (tmp_path / "data/train-images-idx3-ubyte").write_bytes(images)
    with pytest.raises(
        ValueError, match=r"data.train-images-idx3-ubyte: SHA-256 of the decompressed content is"
    ):
        world.load()
    (tmp_path / "data/train-images-idx3-ubyte").write_bytes(images[:-1])
    with pytest.raises(ValueError, match=r"data.train-images-idx3-ubyte: truncated"):
        world.load()
    assert len(world.asked) == 2


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_pooch_itself_downloads_without_a_word(world, monkeypatch, tmp_path, capfd):
    """The one test of the real downloader: from a server of this process, then from the port it has left."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name in world.originals:
        (mirror / f"{name}.gz").write_bytes(world.sent[name])
    monkeypatch.setattr(mnist, "_retrieve", REAL_RETRIEVE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=mirror))
    monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{server.server_port}/",))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            world.assert_original(world.load())
        (mirror / "t10k-images-idx3-ubyte.gz").unlink()
        with pytest.raises(mnist.MNISTUnavailableError, match="404"):
            world.load("test")
    finally:
        server.shutdown()
        server.server_close()
    assert world.cached() == TRAIN_GZ
    assert capfd.readouterr() == ("", "")
    with pytest.raises(mnist.MNISTUnavailableError, match="ConnectionError"):
        world.load("test")


@pytest.mark.parametrize("split", ["Train", "", None, "validation"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match=r"split is .*; expected one of 'subset', 'train', 'test'"):
        mnist.load(split)


def test_import_is_light():
    code = "import sys, tinydiff.datasets; print({'pooch', 'requests', 'matplotlib'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert done.stdout.strip() == b"set()"
