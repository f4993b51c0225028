"""What is written to disk comes back as it was, or not at all, and never half of it."""

import errno
import json
import os
import pickle
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_array_equal
from runs import refused

import tinydiff as td
from tinydiff import checkpoint
from tinydiff.checkpoint import load_arrays, replace_file, save_arrays

DTYPES = st.sampled_from(["float32", "float64", ">f4", "int64", "uint8", "bool"])


def small_mlp(seed=1):
    return td.MLP(hidden=4, blocks=1, time_features=4, rng=np.random.default_rng(seed))


def small_unet():
    return td.UNet(block_channels=(4, 8), attention=(False, True), norm_groups=2, head_dim=4, dropout=0.1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Arrays and metadata


def test_the_same_content_is_the_same_file(tmp_path):
    """Safetensors by itself orders metadata at random: of 8 entries two files in 40,000 would be alike."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        save_arrays(file, {"b": np.arange(3), "a": np.zeros(2)}, {f"é{i}": i for i in range(8)})
    assert files[0].read_bytes() == files[1].read_bytes()
    for file in files:
        td.save_model(file, small_mlp(), diffusion=td.GaussianDiffusion(td.cosine_schedule(9)))
    assert files[0].read_bytes() == files[1].read_bytes()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        DTYPES.flatmap(
            lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["C", "F"]),
)
def test_arrays_come_back_as_they_were(tmp_path_factory, tensors, order):
    path = tmp_path_factory.mktemp("arrays") / "a.safetensors"
    save_arrays(path, {name: np.array(x, order=order) for name, x in tensors.items()}, {})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so a reader may map the file to memory
    back, metadata = load_arrays(path)
    assert metadata == {}
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype.newbyteorder("=")
        assert back[name].shape == x.shape
        assert_array_equal(back[name], x)


def test_metadata_comes_back_as_it_was(path):
    metadata = {"a": 1, "b": [0.1, None, True], "c": {"d": "é\n"}, "e": "text", "f": "17"}
    save_arrays(path, {"x": np.zeros(1)}, metadata)
    assert load_arrays(path)[1] == metadata


def test_metadata_that_is_not_json_is_refused_and_nothing_is_written(path):
    with pytest.raises(TypeError, match=r"metadata has .a., which JSON cannot hold"):
        save_arrays(path, {}, {"a": object()})
    assert list(path.parent.iterdir()) == []


def test_arrays_that_safetensors_cannot_hold_are_named_and_nothing_is_written(path):
    for odd in (np.array(["a"]), np.array([None]), np.ones(2, complex)):
        expected = rf"arrays has 'odd' of {odd.dtype}; expected real numbers"
        with pytest.raises(TypeError, match=expected):
            save_arrays(path, {"odd": odd, "good": np.ones(2)}, {})
    assert list(path.parent.iterdir()) == []


def test_nothing_is_kept_and_comes_back(path):
    save_arrays(path, {}, {})
    assert load_arrays(path) == ({}, {})


def test_an_array_named_as_metadata_is_refused_and_nothing_is_written(path):
    """The file could not be read back."""
    with pytest.raises(ValueError, match=r"arrays has the name '__metadata__'.*expected another"):
        save_arrays(path, {"x": np.zeros(1), "__metadata__": np.zeros(1)}, {})
    assert list(path.parent.iterdir()) == []


def test_metadata_of_other_programs_stays_text(path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, path, metadata={"format": "pt"})
    assert load_arrays(path)[1] == {"format": "pt"}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_metadata_beyond_what_python_decodes_stays_text(path, text):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, path, metadata={"a": text})
    assert load_arrays(path)[1] == {"a": text}


# Replacing


@pytest.mark.parametrize("fails_in", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, fails_in, error):
    replace_file(path, b"old")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, fails_in, fail)
        with pytest.raises(type(error)):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_somebody_reads_is_replaced_once_it_is_let_go(path, monkeypatch):
    """As on Windows, where an open file cannot be replaced: that ends no training, unless it stays open."""
    monkeypatch.setattr(checkpoint, "PATIENCE", 9.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused(os.replace, times=3))
        replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.1)
    monkeypatch.setattr(os, "replace", refused(os.replace, times=10**9))
    with pytest.raises(PermissionError, match="in use"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_file_is_read_once_it_has_been_replaced(path, monkeypatch):
    """As on Windows, where it cannot be opened meanwhile, nor be replaced while it is read."""
    save_arrays(path, {"x": np.arange(3)}, {})
    monkeypatch.setattr(checkpoint, "PATIENCE", 9.0)
    monkeypatch.setattr(Path, "open", refused(Path.open, times=3))
    assert_array_equal(load_arrays(path)[0]["x"], np.arange(3))


def test_a_file_that_a_full_disk_refuses_is_named(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as writing says it, without a name

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):
        replace_file(path, b"new")


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"{re.escape(repr(str(tmp_path)))}$"):
        td.save_model(tmp_path, small_mlp())
    with pytest.raises(IsADirectoryError, match=f"{re.escape(repr(str(tmp_path)))}$"):
        td.load_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_until_the_new_file_is_whole_the_old_one_stands(path, monkeypatch):
    replace_file(path, b"old")
    replace, seen = os.replace, []

    def look(source, destination):
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", look)
    replace_file(path, b"new")
    assert seen == [(b"old", b"new", path.parent)]  # the same directory: the same file system


def test_threads_that_write_the_same_file_do_not_meet(path, monkeypatch):
    both_are_writing = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(os, "fsync", lambda descriptor: both_are_writing.wait())
    contents = [b"one" * 1000, b"the other"]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda content: replace_file(path, content), contents))
    assert path.read_bytes() in contents
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(path):
    before = os.umask(0o027)
    try:
        replace_file(path, b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_missing_folders_are_made(tmp_path):
    replace_file(tmp_path / "a" / "b" / "c.bin", b"1")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"1"


# Files that are no good


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*model\.safetensors"):
        td.load_model(path)


def test_a_file_cut_anywhere_is_refused_and_kept(path):
    td.save_model(path, small_mlp())
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [0, 4, 8, 20, header - 1, header, header + 10, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            td.load_model(path)
        assert path.read_bytes() == whole[:length]


def test_other_files_are_refused_and_no_pickle_is_run(path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "exploded"),))

    np_file = path.with_suffix(".npy")
    np.save(np_file, np.array([Bomb()], dtype=object), allow_pickle=True)
    for content in [b"not a model", pickle.dumps(Bomb()), np_file.read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            td.load_model(path)
    assert not (path.parent / "exploded").exists()


@pytest.mark.parametrize("shape", [(0, 2**63), (1,) * 65])
def test_shapes_that_numpy_cannot_hold_are_refused(path, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 if all(shape) else 0]}
    header = json.dumps({"x": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(entry["data_offsets"][1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_arrays(path)


def test_a_file_that_may_not_be_read_is_not_called_missing(path, monkeypatch):
    """As safetensors calls it."""
    save_arrays(path, {"x": np.zeros(1)}, {})

    def refuse(self, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(checkpoint, "PATIENCE", 0.0)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*model\.safetensors'"):
        load_arrays(path)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({}, "does not say which tinydiff model"),
        ({"model": "VAE", "config": {}}, "'VAE'; expected one of MLP, UNet"),
        ({"model": ["MLP"]}, "does not say which"),
        ({"model": "MLP"}, "does not say which"),
        ({"step": 3, "settings": {}}, "does not say which"),
        ({"step": 3, "settings": {"model": "Mine", "config": None}}, "'Mine'; .*load_arrays.*ema"),
        ({"step": 3, "settings": {"model": "MLP", "config": {}}}, "does not hold a whole MLP"),
        ({"model": "MLP", "config": [1]}, "does not say which"),
        ({"model": "MLP", "config": {"depth": 3}}, "does not hold a whole MLP: .*depth"),
        ({"model": "MLP", "config": {"hidden": 0}}, "does not hold a whole MLP: hidden is 0"),
        ({"model": "MLP", "config": {}}, "does not hold a whole MLP: state does not fit.*missing"),
    ],
)
def test_what_is_not_a_model_is_refused(path, metadata, match):
    save_arrays(path, {"x": np.zeros(1)}, metadata)
    with pytest.raises(ValueError, match=match) as caught:
        td.load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [small_mlp, small_unet])
@pytest.mark.parametrize("older", [False, True])
def test_of_a_checkpoint_the_average_is_loaded(tmp_path, make, older):
    """So that a training is looked at before it ends. What it has been given is not what it saves."""
    shape = (6, 2) if make is small_mlp else (6, 8, 8, 1)
    data = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    how = dict(steps=3, batch_size=2, run_dir=tmp_path, progress=False)
    result = td.train(make(), td.GaussianDiffusion(td.linear_schedule(9), "x0", "fixed_large"), data, **how)
    file = tmp_path / "checkpoint.safetensors"
    if older:
        arrays, metadata = load_arrays(file)
        arrays = {re.sub(r"^ema\.model\.", "ema.", name): x for name, x in arrays.items()}
        save_arrays(file, {name: x for name, x in arrays.items() if not name.endswith("steps")}, metadata)
    model, diffusion, metadata = td.pretrained.load(file)
    assert_array_equal(diffusion.schedule.betas, td.linear_schedule(9).betas)
    assert (diffusion.prediction, diffusion.variance) == ("x0", "fixed_large")
    assert type(model) is type(result.model) and metadata["step"] == 3
    assert metadata["settings"]["batch_size"] == 2
    for name, weight in result.model.state_dict().items():
        assert_array_equal(model.state_dict()[name], weight)
    td.save_model(tmp_path / "model.safetensors", model, metadata)
    assert td.load_model(tmp_path / "model.safetensors")[1]["model"] == type(model).__name__


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (small_mlp, {"in_features": 10**9}),
        (small_mlp, {"blocks": 10**9}),
        (small_unet, {"block_channels": [4, 10**9]}),
    ],
)
def test_a_network_larger_than_its_file_is_refused_before_it_is_made(path, make, config, monkeypatch):
    model = make()
    name = type(model).__name__
    save_arrays(path, model.state_dict(), {"model": name, "config": {**model.config, **config}})
    monkeypatch.setitem(checkpoint.MODELS, name, None)
    (key,) = config
    said = f"{re.escape(str(path))} does not hold a whole {name}: {key} is .*1000000000"
    with pytest.raises(ValueError, match=said):
        td.load_model(path)


# Models


@pytest.mark.parametrize("make", [small_mlp, small_unet])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_comes_back_as_it_was(path, make, dtype):
    model = make()
    model.to(np, dtype)
    rng = np.random.default_rng(0)
    for p in model.named_parameters().values():
        p.value = rng.standard_normal(p.shape).astype(dtype)
    td.save_model(path, model, {"prediction": "v", "T": 100})
    back, metadata = td.load_model(path)
    assert type(back) is type(model)
    assert back.config == model.config
    assert metadata == {"prediction": "v", "T": 100, "model": type(model).__name__, "config": model.config}
    assert back.named_parameters().keys() == model.named_parameters().keys()
    for name, p in back.named_parameters().items():
        assert p.value.dtype == dtype
        assert_array_equal(p.value, model.named_parameters()[name].value)
    x = rng.standard_normal((2, 2) if make is small_mlp else (2, 8, 8, 1)).astype(dtype)
    assert_array_equal(back.predict(x, np.array([0, 5])), model.predict(x, np.array([0, 5])))


def test_of_two_precisions_the_finer_comes_back(path):
    model = small_mlp()
    bias = model.linear_out.bias
    bias.value = np.full(bias.shape, 1 / 3)
    td.save_model(path, model)
    back, _ = td.load_model(path)
    assert_array_equal(back.linear_out.bias.value, bias.value)


def test_what_a_model_is_outweighs_metadata_of_another(path):
    model = small_unet()
    td.save_model(path, model, {"model": "MLP", "config": {"hidden": 4}, "T": 100})
    back, metadata = td.load_model(path)
    assert metadata == {"model": "UNet", "config": back.config, "T": 100}
    assert back.config == model.config


def test_a_loaded_model_can_be_trained(path):
    td.save_model(path, small_mlp())
    model, _ = td.load_model(path)
    diffusion = td.GaussianDiffusion(td.linear_schedule(T=4))
    td.train(model, diffusion, np.zeros((4, 2), np.float32), steps=2, batch_size=2, progress=False)


@pytest.mark.parametrize("name", ["Other", "MLP"])
def test_only_tinydiff_s_models_are_saved(path, name):
    """Another class would come back as one of these, whatever else it computed."""
    other = type(name, (td.MLP,), {})
    with pytest.raises(TypeError, match=f"model is an? {name}; expected one of MLP, UNet"):
        td.save_model(path, other(hidden=4, blocks=1, time_features=4))
    assert not path.exists()


def test_a_layer_that_is_not_tinydiff_s_is_not_saved(path):
    """Its config would make another in its place, of the same weights even."""
    model = small_mlp()
    model.blocks[0].linear_2 = type("Doubled", (td.nn.Linear,), {})(4, 4, np.random.default_rng(0))
    with pytest.raises(
        TypeError, match=r"has Doubled of 20 parameters as blocks\.0\.linear_2; expected Linear"
    ):
        td.save_model(path, model)
    assert not path.exists()
    how = dict(steps=1, batch_size=2, run_dir=path.parent, progress=False)
    td.train(model, td.GaussianDiffusion(td.linear_schedule(4)), np.zeros((4, 2), np.float32), **how)
    with pytest.raises(ValueError, match="metadata 'model' is 'MLP with Doubled'; expected one of MLP, UNet"):
        td.load_model(path.with_name("checkpoint.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.down_blocks[1].resnets[0].norm2, "groups", 1),
        lambda net: setattr(net.conv_norm_out, "eps", 1e-6),
        lambda net: setattr(net.conv_in, "padding", (2, 0)),
        lambda net: setattr(net.conv_in, "weight", net.conv_out.weight),
        lambda net: setattr(net.mid_block, "attentions", []),
        lambda net: setattr(net, "conv_out", lambda h, layer=net.conv_out: layer(h)),
        lambda net: setattr(net, "extra", td.nn.Linear(2, 2, np.random.default_rng(0))),
        lambda net: net.down_blocks[0].attentions.append(td.nn.Module()),  # without weights
        lambda net: setattr(net.mid_block.resnets[0].conv2, "weight", net.mid_block.resnets[0].conv1.weight),
        lambda net: net.config.update(dropout=0.5),
    ],
    ids=["groups", "eps", "padding", "weight", "attention", "call", "extra", "layer", "shared", "config"],
)
def test_a_network_that_its_config_does_not_make_is_not_saved(path, change):
    """What is made of the config would compute something else, or lack weights."""
    net = td.UNet(block_channels=(4, 8), attention=(False, True), norm_groups=2, head_dim=4)
    td.save_model(path, net)
    before = path.read_bytes()
    change(net)
    with pytest.raises(TypeError, match=r"model has .*; expected .*, which its config makes again"):
        td.save_model(path, net)
    assert path.read_bytes() == before


def test_a_checkpoint_of_a_network_that_its_config_does_not_make_is_not_loaded(path):
    """It holds the run, which can go on; sampled from, what its config makes would draw something else."""
    net = td.UNet(block_channels=(4, 8), attention=(False, True), norm_groups=2, head_dim=4)
    net.conv_norm_out.eps = 0.1
    how = dict(batch_size=2, run_dir=path.parent, final_lr=1.0, warmup=0, progress=False)
    diffusion, images = td.GaussianDiffusion(td.linear_schedule(4)), np.zeros((4, 8, 8, 1), np.float32)
    td.train(net, diffusion, images, steps=1, **how)
    with pytest.raises(ValueError, match=r"metadata 'model' is 'UNet with conv_norm_out\.eps'; expected"):
        td.load_model(path.with_name("checkpoint.safetensors"))
    assert len(td.train(net, diffusion, images, steps=2, resume=True, **how).losses) == 2


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_settings_of_numpy_s_types_are_those_that_its_config_makes(path, kind):
    net = td.UNet(
        np.int64(1),
        block_channels=np.array([4, 8]),
        attention=(0, np.True_),
        norm_groups=2,
        norm_eps=kind(1e-6),
        dropout=kind(0.1),
        head_dim=np.int8(4),
        downsample_padding=np.uint8(0),
    )
    net.to(np, np.float64).note = "and what is said beside it"
    td.save_model(path, net)
    assert td.load_model(path)[0].config == net.config
