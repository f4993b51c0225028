"""Across the border to diffusers: what loads, without torch, and what is refused, by name."""

import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from gradients import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from namespaces import OnDevice, assert_there, space
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

import tinydiff as td
from tinydiff.interop import load_diffusers, save_diffusers, unet_from_diffusers, unet_to_diffusers
from tinydiff.interop._unet import DEFAULTS, FIXED, IRRELEVANT

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"

# What google/ddpm-cifar10-32's config.json holds, made small: every key of it, and no other.
CONFIG = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [4, 8],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 2,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}

UNET = dict(
    in_channels=3,
    out_channels=3,
    block_channels=[4, 8],
    layers_per_block=1,
    attention=[False, True],
    mid_attention=True,
    norm_groups=2,
    norm_eps=1e-6,
    head_dim=None,
    dropout=0.0,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)

# Attention as published checkpoints name it.
FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def random_state(dtype=np.float32, seed=0):
    """Weights for CONFIG in PyTorch's layout, by a transposition written out here."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, p in td.UNet(**UNET).named_parameters().items():
        if len(p.shape) == 2:
            shape = p.shape[::-1]
        elif len(p.shape) == 4:
            k, _, c, d = p.shape
            shape = (d, c, k, k)
        else:
            shape = p.shape
        state[name] = rng.standard_normal(shape).astype(dtype)
    return state


@pytest.fixture
def directory(tmp_path):
    """A directory as diffusers writes it, made without diffusers."""
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG))
    save_file(random_state(), tmp_path / WEIGHTS_FILE)
    return tmp_path


# What loads


def test_directory_loads(directory):
    model = load_diffusers(directory)
    assert model.config == UNET
    state = random_state()
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, theirs in state.items():
        assert own[name].dtype == np.float32
        if theirs.ndim == 4:  # y[d] += w[d, c, i, j] x[c] there, x @ w[i, j] here
            d, c, i, j = (size - 1 for size in theirs.shape)
            assert own[name][i, j, c, d] == theirs[d, c, i, j]
            assert_array_equal(own[name], np.moveaxis(theirs, (2, 3, 1, 0), (0, 1, 2, 3)))
        else:
            assert_array_equal(own[name], theirs.T)
    y = model.predict(np.zeros((1, 8, 8, 3), np.float32), np.array([5]))
    assert y.shape == (1, 8, 8, 3) and np.isfinite(y).all()
    assert np.any(
        load_diffusers(str(directory)).predict(np.ones((1, 8, 8, 3), np.float32), np.array([5])) != y
    )


def test_to_diffusers_is_the_inverse(directory):
    model = load_diffusers(directory)
    config, state = unet_to_diffusers(model, sample_size=8)
    assert {key: config[key] for key in CONFIG if key in config} == {
        key: value for key, value in CONFIG.items() if key != "_diffusers_version"
    }
    for name, value in random_state().items():
        assert_array_equal(state[name], value)
        assert state[name].flags.c_contiguous
    again = unet_from_diffusers(json.loads(json.dumps(config)), state)
    x, t = normal(np.random.default_rng(1), (2, 8, 8, 3), np.float32), np.array([0, 999])
    assert_array_equal(again.predict(x, t), model.predict(x, t))


@settings(max_examples=8)
@given(
    attention=st.lists(st.booleans(), min_size=1, max_size=2),
    head_dim=st.sampled_from([None, 2, 4]),
    dropout=st.sampled_from([0.0, 0.25]),
    num_classes=st.sampled_from([{}, {"num_classes": 1}, {"num_classes": 10}]),
    data=st.data(),
)
def test_every_setting_crosses_the_border_and_comes_back(attention, head_dim, dropout, num_classes, data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    config = dict(
        in_channels=draw(1, 3),
        out_channels=draw(1, 2),
        block_channels=[draw(4, 8) for _ in attention],
        layers_per_block=draw(1, 2),
        attention=attention,
        mid_attention=draw(True, False),
        norm_groups=draw(1, 4),
        norm_eps=draw(1e-5, 1e-6),
        head_dim=head_dim,
        dropout=dropout,
        downsample_padding=draw(0, 1),
        flip_sin_to_cos=draw(True, False),
        freq_shift=draw(0, 1),
        **num_classes,
    )
    model = td.UNet(**config)
    there, state = unet_to_diffusers(model)
    back = unet_from_diffusers(json.loads(json.dumps(there)), state)
    assert back.config == model.config == config
    for name, value in model.state_dict().items():
        assert_array_equal(back.state_dict()[name], value)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        dict(mid_attention=1, flip_sin_to_cos=0, freq_shift=True, dropout=False, downsample_padding=True),
    ],
)
def test_what_is_exported_is_plain(choices):
    """A number of NumPy's is no JSON; True for 1, or 0 for False, is not what diffusers' config holds."""
    model = td.UNet(**{**UNET, **choices})
    config, state = unet_to_diffusers(model, sample_size=np.int64(8))
    assert config["sample_size"] == 8
    back = unet_from_diffusers(json.loads(json.dumps(config)), state)
    assert back.config == model.config
    for name, value in back.config.items():
        assert value is None or type(value) is type({**UNET, "head_dim": 1}[name]), name


def test_weights_go_where_the_backend_is_and_come_back_to_the_host(directory, monkeypatch):
    where = space("strict")  # in CuPy's place
    monkeypatch.setattr(td.backend, "_cupy_namespace", lambda number=None: OnDevice(where.device))
    model = load_diffusers(directory, backend="cupy")
    for name, p in model.named_parameters().items():
        assert_there(p.value, where, "float32", name)
    for name, value in unet_to_diffusers(model)[1].items():
        assert type(value) is np.ndarray
        assert_array_equal(value, random_state()[name])


def test_both_directions_copy():
    """Whoever trains on, on either side, changes nothing on the other; 1 x 1 weights and vectors included."""
    state = random_state()
    model = unet_from_diffusers(CONFIG, state)
    _, there = unet_to_diffusers(model)
    for name, p in model.named_parameters().items():
        assert not np.shares_memory(p.value, state[name]), name
        assert not np.shares_memory(p.value, there[name]), name
        p.value += 1  # as an optimiser steps
    for name, value in random_state().items():
        assert_array_equal(there[name], value, err_msg=name)


def test_only_a_unet_goes_to_diffusers():
    with pytest.raises(TypeError, match="model is an MLP; expected a UNet"):
        unet_to_diffusers(td.MLP(hidden=4, blocks=1, time_features=4))
    for name in ("Other", "UNet"):  # whatever else it computes, diffusers would compute a UNet's
        with pytest.raises(TypeError, match=f"model is an? {name}; expected a UNet, of tinydiff's own"):
            unet_to_diffusers(type(name, (td.UNet,), {})(**UNET))
    adapted = td.UNet(**UNET)
    adapted.conv_out = type("Adapted", (td.nn.Module,), {})()
    with pytest.raises(TypeError, match="model has Adapted of 0 parameters as conv_out; expected Conv2d of"):
        unet_to_diffusers(adapted)


def test_a_config_that_names_no_class_loads(directory):
    config = {key: value for key, value in CONFIG.items() if key != "_class_name"}
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    assert load_diffusers(directory).config == UNET


def test_former_names_of_attention(directory):
    """The published checkpoints were written before diffusers renamed them."""
    state = random_state()
    former = {}
    for name, value in state.items():
        for new, old in FORMER.items():
            name = name.replace(f".{new}.", f".{old}.")
        former[name] = value
    # Of four attentions four layers, each with weight and bias.
    assert sum(name not in state for name in former) == 4 * 4 * 2
    model = unet_from_diffusers(CONFIG, former)
    for name, value in load_diffusers(directory).state_dict().items():
        assert_array_equal(model.state_dict()[name], value)


def test_a_weight_under_two_names_is_refused():
    """Whichever comes last would win."""
    new = "down_blocks.1.attentions.0.to_q.weight"
    old = new.replace("to_q", "query")
    weight = random_state()[new]
    with pytest.raises(ValueError, match=f"state has both '{new}' and '{old}'.*expected one"):
        unet_from_diffusers(CONFIG, {**random_state(), old: weight})
    with pytest.raises(ValueError, match=f"state has both '{old}' and '{new}'.*expected one"):
        unet_from_diffusers(CONFIG, {old: weight, **random_state()})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype(tmp_path, dtype):
    """Half precision becomes float32, value for value; float64 stays."""
    state = random_state(dtype)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG))
    save_file(state, tmp_path / WEIGHTS_FILE)
    model = load_diffusers(tmp_path)
    for name, value in model.state_dict().items():
        assert value.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert_array_equal(np.sort(value, axis=None), np.sort(state[name], axis=None))


def test_of_two_precisions_the_finer_stays():
    state = random_state(np.float32)
    name = "conv_out.bias"
    state[name] = np.full(state[name].shape, 1 / 3)
    assert_array_equal(unet_from_diffusers(CONFIG, state).state_dict()[name], state[name])


def test_what_config_leaves_out_has_diffusers_defaults():
    minimal = {key: CONFIG[key] for key in ("block_out_channels", "down_block_types", "up_block_types")}
    model = unet_from_diffusers(
        {**minimal, "block_out_channels": [32, 64]},
        unet_to_diffusers(td.UNet(3, 3, (32, 64), 2, (False, True), norm_groups=32, head_dim=8))[1],
    )
    assert model.config == dict(
        in_channels=3,
        out_channels=3,
        block_channels=[32, 64],
        layers_per_block=2,
        attention=[False, True],
        mid_attention=True,
        norm_groups=32,
        norm_eps=1e-5,
        head_dim=8,
        dropout=0.0,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


@pytest.mark.parametrize(
    "extra",
    [
        {"act_fn": "swish"},
        {"dropout": 0.1},
        {"mid_block_type": "UNetMidBlock2D"},
        {"time_embedding_dim": 16},
        {"time_embedding_dim": None},
        {"attn_norm_num_groups": 2},
        {"attn_norm_num_groups": None},
        {"num_train_timesteps": 1000},
        {"class_embed_type": None, "num_class_embeds": None},
        {"downsample_type": "conv", "upsample_type": "conv"},
        {"_name_or_path": "anywhere"},
        {"block_out_channels": (4, 8)},
        {"decay": 0.99, "min_decay": 0.0, "optimization_step": 5, "update_after_step": 0},
        {"use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3},
    ],
    ids=str,
)
def test_entries_that_change_nothing(extra):
    model = unet_from_diffusers({**CONFIG, **extra}, random_state())
    x, t = normal(np.random.default_rng(1), (1, 8, 8, 3), np.float32), np.array([500])
    assert_array_equal(model.predict(x, t), unet_from_diffusers(CONFIG, random_state()).predict(x, t))


def test_nothing_of_torch_is_imported(directory, tmp_path):
    code = (
        "import sys, tinydiff as td\n"
        f"model = td.interop.load_diffusers({str(directory)!r})\n"
        "diffusion = td.GaussianDiffusion(td.linear_schedule(9))\n"
        f"td.interop.save_pipeline({str(tmp_path)!r}, model, diffusion, 8)\n"
        f"model, _ = td.interop.load_pipeline({str(tmp_path)!r})\n"
        "assert not {'torch', 'diffusers', 'cupy'} & set(sys.modules)\n"
        "print(model.num_parameters())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == load_diffusers(directory).num_parameters()


# What is refused


@pytest.mark.parametrize(
    "key, value",
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"),
        ("time_embedding_dim", 12),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 1.4142135),
        ("mid_block_scale_factor", None),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1),
        ("num_class_embeds", 10.0),
        ("num_class_embeds", "10"),
        ("attn_norm_num_groups", 4),
        ("norm_num_groups", None),
        ("norm_num_groups", 3),
        ("norm_num_groups", 2.0),
        ("norm_eps", 0.0),
        ("norm_eps", "1e-5"),
        ("norm_eps", True),
        ("attention_head_dim", 3),
        ("attention_head_dim", [4, 8]),
        ("attention_head_dim", True),
        ("downsample_padding", 2),
        ("downsample_padding", None),
        ("dropout", 1.0),
        ("dropout", None),
        ("dropout", False),
        ("freq_shift", 2),
        ("freq_shift", None),
        ("flip_sin_to_cos", "yes"),
        ("add_attention", None),
        ("in_channels", 0),
        ("in_channels", None),
        ("out_channels", "3"),
        ("layers_per_block", 0),
        ("layers_per_block", [1, 1]),
        ("layers_per_block", True),
        ("block_out_channels", [4, 8, 16]),
        ("block_out_channels", []),
        ("block_out_channels", 4),
        ("block_out_channels", [4, "8"]),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
        ("down_block_types", "DownBlock2D"),
        ("down_block_types", [["DownBlock2D"], ["AttnDownBlock2D"]]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("up_block_types", ["AttnSkipUpBlock2D", "UpBlock2D"]),
        ("up_block_types", ["AttnUpBlock2D"]),
        ("cross_attention_dim", 64),
    ],
)
def test_unsupported_entry_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"^config\['{key}'\] = "):
        unet_from_diffusers({**CONFIG, key: value}, random_state())


def test_keys_that_are_no_names_are_named():
    with pytest.raises(ValueError, match=r"^config\[3\] = 'x' is not known"):
        unet_from_diffusers({**CONFIG, 3: "x"}, random_state())
    with pytest.raises(ValueError, match="missing none; unexpected 3"):
        unet_from_diffusers(CONFIG, {**random_state(), 3: np.zeros(1)})


def test_heads_must_fit_wherever_there_is_attention_in_the_middle_too():
    plain = {**CONFIG, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with pytest.raises(ValueError, match=r"^config\['attention_head_dim'\] = 3"):
        unet_from_diffusers({**plain, "attention_head_dim": 3}, {})
    with pytest.raises(ValueError, match="there are 0 weights"):  # without attention any will do
        unet_from_diffusers({**plain, "attention_head_dim": 3, "add_attention": False}, {})


@pytest.mark.oracle
def test_every_entry_of_diffusers_config_is_known():
    """Accepted, refused by value, or without effect: none is passed over in silence."""
    unet_2d = pytest.importorskip("diffusers").UNet2DModel
    parameters = inspect.signature(unet_2d.__init__).parameters
    entries = {name: p.default for name, p in parameters.items() if name != "self"}
    handled = DEFAULTS.keys() | FIXED.keys() | IRRELEVANT | {"time_embedding_dim", "attn_norm_num_groups"}
    assert entries.keys() == handled
    for name, value in DEFAULTS.items():
        assert entries[name] == (tuple(value) if isinstance(value, list) else value), name
    for name, accepted in FIXED.items():
        assert entries[name] in accepted, name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("conv_in.bias"), r"missing conv_in\.bias; unexpected none"),
        (lambda s: s.update(extra=np.zeros(1)), r"missing none; unexpected extra"),
        (lambda s: s.update({"conv_in.bias": np.zeros(5)}), r"conv_in\.bias.* shape \(5,\); expected \(4,\)"),
        (
            lambda s: s.update({"conv_in.weight": np.zeros((3, 3, 3, 4))}),
            r"conv_in\.weight.* shape \(3, 3, 3, 4\); expected \(4, 3, 3, 3\)",
        ),
        (
            lambda s: s.update({"time_embedding.linear_1.weight": np.zeros((4, 16))}),
            r"time_embedding\.linear_1\.weight.* shape \(4, 16\); expected \(16, 4\)",
        ),
        (lambda s: s.update({"conv_in.weight": np.zeros((4, 3, 3))}), r"conv_in\.weight.* shape \(4, 3, 3\)"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    """The shapes in the message are PyTorch's: the reader looks at the file."""
    state = random_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        unet_from_diffusers(CONFIG, state)


REMEDY = r"; expected an array of real numbers on the host, as in model\.float.*state_dict"


@pytest.mark.parametrize(
    "weight, came",
    [
        (np.zeros(4, np.complex64), r"ndarray of complex64"),
        (np.zeros(4, bool), r"ndarray of bool"),
        (np.zeros(4, "M8[s]"), r"ndarray of datetime64\[s\]"),
        (np.full(4, "0.5"), r"ndarray of [<>]U3"),
        (np.full(4, None), r"ndarray of object"),
        ([0.0] * 4, r"list of no dtype"),
        ([0.0, [1.0]], r"list of no dtype \(.*inhomogeneous"),
        (None, r"NoneType of no dtype"),
    ],
)
def test_weights_that_are_no_real_numbers(weight, came):
    with pytest.raises(ValueError, match=rf"^state\['conv_in\.bias'\] is an? {came}.*{REMEDY}"):
        unet_from_diffusers(CONFIG, {**random_state(), "conv_in.bias": weight})


@pytest.mark.oracle
def test_what_torch_does_not_hand_over_is_named_with_a_remedy():
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value) for name, value in random_state().items()}
    bias = state["conv_in.bias"]
    for weight, came in [
        (bias.bfloat16(), r"Tensor of torch\.bfloat16 \("),
        (torch.nn.Parameter(bias), r"Parameter of torch\.float32 \(.*require gradient"),
        (bias.to("meta"), r"Tensor of torch\.float32 \(.*meta"),
        (bias.to_sparse(), r"Tensor of torch\.float32 \("),
        (bias.to(torch.complex64), r"Tensor of torch\.complex64"),
    ]:
        with pytest.raises(ValueError, match=rf"^state\['conv_in\.bias'\] is an? {came}.*{REMEDY}"):
            unet_from_diffusers(CONFIG, {**state, "conv_in.bias": weight})
    for weight in (bias, bias.half(), bias.double()):
        unet_from_diffusers(CONFIG, {**state, "conv_in.bias": weight})


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(directory, missing):
    (directory / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {missing} in"):
        load_diffusers(directory)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_diffusers(tmp_path / "nowhere")


def test_pickled_weights_are_not_loaded(directory):
    (directory / WEIGHTS_FILE).rename(directory / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled weights.*safe_serialization=True"):
        load_diffusers(directory)


@pytest.mark.parametrize(
    "names, hint",
    [
        (["-00001-of-00012", "-00002-of-00012"], r"several files.*max_shard_size=\"1TB\""),
        (["-00001-of-00002.fp16"], r"several files.*max_shard_size"),
        ([".fp16-00001-of-00002"], r"several files.*max_shard_size"),
        ([".fp16"], r"a variant, diffusion_pytorch_model\.fp16\.safetensors: rename that"),
    ],
)
def test_weights_in_several_files_and_variants_are_pointed_at(directory, names, hint):
    weights = (directory / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).unlink()
    for name in names:
        (directory / f"diffusion_pytorch_model{name}.safetensors").write_bytes(weights)
    with pytest.raises(FileNotFoundError, match=rf"no {WEIGHTS_FILE} in .*; .*{hint}"):
        load_diffusers(directory)


def test_a_whole_pipeline_points_to_its_model(tmp_path, directory):
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / CONFIG_FILE).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model is in .*unet"):
        load_diffusers(tmp_path / "pipeline")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"is not JSON"),
        ("", r"is not JSON"),
        ("[" * 100_000, r"is not JSON"),  # to Python: it nests too deeply
        ("[]", r"holds a list; expected a JSON object"),
        ('{"_class_name": "UNet2DConditionModel"}', r"does not describe a UNet2DModel"),
    ],
)
def test_damaged_config(directory, text, message):
    (directory / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE} {message}"):
        load_diffusers(directory)


@pytest.mark.parametrize("entry", [{"in_channels": 10**9}, {"layers_per_block": 10**9}])
def test_a_network_larger_than_its_file_is_refused_before_it_is_made(directory, entry, monkeypatch):
    (directory / CONFIG_FILE).write_text(json.dumps({**CONFIG, **entry}))
    monkeypatch.setattr("tinydiff.interop._unet.UNet", None)
    (key,) = entry
    with pytest.raises(ValueError, match=f"does not hold .*: {key} is 1000000000, and there"):
        load_diffusers(directory)


def test_what_is_no_mapping_is_named():
    with pytest.raises(TypeError, match="config is a str; expected a mapping"):
        unet_from_diffusers("config.json", {})
    with pytest.raises(TypeError, match="state is a list; expected a mapping"):
        unet_from_diffusers({}, [])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights(directory, keep):
    content = (directory / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} is not a whole safetensors file"):
        load_diffusers(directory)


def test_bfloat16_is_refused_in_a_sentence(directory):
    """NumPy has none, unless another library (JAX, say) has brought it: not into a process of its own."""
    header = json.dumps({"conv_in.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (directory / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    code = f"import tinydiff as td; td.interop.load_diffusers({str(directory)!r})"
    came = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(f"ValueError: .*{WEIGHTS_FILE} .*NumPy can read: .* After import ml_dtypes", came.stderr)


def test_unknown_backend(directory):
    with pytest.raises(td.BackendError, match="backend is 'tpu'"):
        load_diffusers(directory, backend="tpu")


# diffusers itself


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_diffusers_saves_loads_without_torch(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})
    theirs.to(getattr(torch, dtype))
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    theirs.save_pretrained(tmp_path / "model", safe_serialization=True)
    x, t = np.random.default_rng(0).standard_normal((2, 8, 8, 3), dtype=np.float32), np.array([1, 998])
    np.savez(tmp_path / "in.npz", x=x, t=t)
    code = (
        "import sys, numpy as np, tinydiff as td\n"
        f"{'import ml_dtypes' if dtype == 'bfloat16' else ''}\n"
        f"model = td.interop.load_diffusers({str(tmp_path / 'model')!r})\n"
        f"given = np.load({str(tmp_path / 'in.npz')!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, model.predict(given['x'], given['t']))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        y = theirs.float()(torch.as_tensor(x.transpose(0, 3, 1, 2)), torch.as_tensor(t)).sample
    y = y.permute(0, 2, 3, 1).numpy()
    ours = np.load(tmp_path / "y.npy")
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - y) <= 1e-4 * np.linalg.norm(y)


@pytest.mark.oracle
def test_an_average_that_diffusers_saves_loads(tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    theirs = diffusers.UNet2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})
    average = EMAModel(theirs.parameters(), model_cls=type(theirs), model_config=theirs.config)
    average.save_pretrained(tmp_path)
    model = load_diffusers(tmp_path)
    for name, value in unet_to_diffusers(model)[1].items():
        assert_array_equal(value, theirs.state_dict()[name].numpy(), err_msg=name)


@pytest.mark.oracle
def test_what_we_save_diffusers_loads(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    ours = unet_from_diffusers(CONFIG, random_state())
    save_diffusers(tmp_path, ours, sample_size=8)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    x, t = np.random.default_rng(0).standard_normal((2, 8, 8, 3), dtype=np.float32), np.array([1, 998])
    with torch.no_grad():
        y = theirs(torch.as_tensor(x.transpose(0, 3, 1, 2)), torch.as_tensor(t)).sample
    y = y.permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(ours.predict(x, t) - y) <= 1e-4 * np.linalg.norm(y)
