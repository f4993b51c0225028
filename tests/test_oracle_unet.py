"""The whole U-Net against diffusers' UNet2DModel with the same random weights: the test that matters most.

Skips in the wrong order or concatenated the wrong way round, eps, the side of the padding, the order in which
heads are split, sine before cosine: each changes the output by far more than 1e-9.
"""

import numpy as np
import pytest

import tinydiff as td
from tinydiff import interop
from tinydiff.interop._unet import unet_arguments

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle


def types(*attention):
    """down_block_types and up_block_types with attention at these levels."""
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return dict(down_block_types=down, up_block_types=up)


# The settings of the published checkpoints (google/ddpm-cifar10-32, ddpm-celebahq-256, ddpm-church-256, ...).
PUBLISHED = dict(
    attention_head_dim=None,
    center_input_sample=False,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-6,
    time_embedding_type="positional",
    act_fn="silu",
)

# name: (config, (height, width)). What is not named is diffusers' default. No group is of one
# channel, and no attention over one pixel: some gradients would be exactly zero, and only rounding compared.
CONFIGS = {
    "no attention": (
        dict(block_out_channels=(8, 16), add_attention=False, norm_num_groups=4, **types(0, 0)),
        (8, 8),
    ),
    "attention in the middle only, one layer": (
        dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **types(0, 0)),
        (8, 8),
    ),
    "several heads, not square, classes": (
        dict(
            block_out_channels=(8, 16, 24),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            in_channels=1,
            out_channels=2,
            num_class_embeds=5,
            **types(0, 1, 1),
        ),
        (8, 12),
    ),
    "attention at the top only, channels that shrink": (
        dict(
            block_out_channels=(16, 8),
            layers_per_block=2,
            attention_head_dim=8,
            norm_num_groups=4,
            add_attention=False,
            **types(1, 0),
        ),
        (4, 6),
    ),
    "one level, three layers": (
        dict(block_out_channels=(8,), layers_per_block=3, norm_num_groups=2, **types(1)),
        (3, 5),
    ),
    "diffusers' default layout": (
        dict(block_out_channels=(8, 16, 24, 32), norm_num_groups=4),
        (16, 8),
    ),
    "tinydiff's default": (
        dict(
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            in_channels=1,
            out_channels=1,
            **types(0, 0, 1),
        ),
        (8, 8),
    ),
    "CIFAR-10's": (
        dict(block_out_channels=(8, 16, 16, 16), norm_num_groups=4, **types(0, 1, 0, 0), **PUBLISHED),
        (16, 16),
    ),
    "CelebA-HQ's and LSUN's": (
        dict(
            block_out_channels=(4, 4, 8, 8, 16, 16), norm_num_groups=1, **types(0, 0, 0, 0, 1, 0), **PUBLISHED
        ),
        (64, 64),
    ),
}


def random_unet2d(config, seed, dtype=None):
    """diffusers' model with every parameter random, gains around 1; in float64 unless told otherwise."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**config).to(torch.float64 if dtype is None else dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 9
            p.copy_(torch.randn(p.shape) / fan_in**0.5 + (p.ndim == 1 and name.endswith("weight")))
    return model


def numpy_state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


class Sinusoids64(torch.nn.Module):
    """In the place of diffusers' time_proj, which rounds to float32; from the formula, not from tinydiff."""

    def __init__(self, config):
        super().__init__()
        self.half = config.block_out_channels[0] // 2
        self.shift, self.flip = config.freq_shift, config.flip_sin_to_cos

    def forward(self, t):
        k = torch.arange(self.half, dtype=torch.float64)
        angles = t[:, None] * 10_000.0 ** (-k / (self.half - self.shift))
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([cos, sin] if self.flip else [sin, cos], 1)


def channels_first(x):
    return torch.as_tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def both(name, dtype=np.float64):
    """Output, dx, and gradient by name of every parameter, in diffusers' layout: (ours, theirs)."""
    config, (h, w) = CONFIGS[name]
    theirs = random_unet2d(config, seed=0, dtype=getattr(torch, np.dtype(dtype).name))
    ours = interop.unet_from_diffusers(dict(theirs.config), numpy_state(theirs))
    if dtype == np.float64:
        theirs.time_proj = Sinusoids64(theirs.config)
    rng = np.random.default_rng(1)
    c, d = theirs.config.in_channels, theirs.config.out_channels
    x = rng.standard_normal((3, h, w, c)).astype(dtype)
    dy = rng.standard_normal((3, h, w, d)).astype(dtype)
    t = np.array([0, 421, 999])
    labels = None if theirs.config.num_class_embeds is None else np.array([4, 0, 4])

    x_theirs = channels_first(x).requires_grad_()
    y_theirs = theirs(
        x_theirs, torch.as_tensor(t), labels if labels is None else torch.as_tensor(labels)
    ).sample
    y_theirs.backward(channels_first(dy))
    y, backward = ours(x, t, labels=labels)
    dx = backward(dy)
    for p in ours.named_parameters().values():
        p.value = p.grad  # so that they go to diffusers' layout as weights do
    _, gradients = interop.unet_to_diffusers(ours)
    expected = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    return (
        {"output": y, "dx": dx, **gradients},
        {"output": channels_last(y_theirs), "dx": channels_last(x_theirs.grad), **expected},
    )


def assert_agree(ours, theirs, tolerance):
    """Each array norm-wise, relative to its own norm."""
    assert ours.keys() == theirs.keys()
    norms = {name: np.linalg.norm(value) for name, value in theirs.items()}
    largest = max(size for name, size in norms.items() if name not in ("output", "dx"))
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        if name.endswith("to_k.bias"):
            # Adding the same to every score changes no softmax: exactly 0, but for rounding.
            assert max(np.linalg.norm(ours[name]), norms[name]) <= tolerance * largest, name
        else:
            error = np.linalg.norm(ours[name] - value)
            assert error <= tolerance * norms[name], f"{name} is off by {error / norms[name]:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_in_float64(name):
    assert_agree(*both(name), 1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_in_float32(name):
    """diffusers as it is, with its float32 time embedding."""
    assert_agree(*both(name, np.float32), 1e-4)


def test_the_judge_sees_a_small_mistake():
    """eps of the normalisations wrong by a factor of ten, where it is smallest: a thousandfold of the bar."""
    config, (h, w) = CONFIGS["CIFAR-10's"]
    theirs = random_unet2d(config, seed=0)
    theirs.time_proj = Sinusoids64(theirs.config)
    ours = interop.unet_from_diffusers({**theirs.config, "norm_eps": 1e-5}, numpy_state(theirs))
    x, t = np.random.default_rng(0).standard_normal((2, h, w, 3)), np.array([0, 999])
    y = channels_last(theirs(channels_first(x), torch.as_tensor(t)).sample)
    assert np.linalg.norm(ours.predict(x, t) - y) > 1e-6 * np.linalg.norm(y)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    """diffusers -> tinydiff -> diffusers: names, weights, configuration and output come back."""
    config, (h, w) = CONFIGS[name]
    first = random_unet2d(config, seed=2, dtype=torch.float32).eval()
    config, state = interop.unet_to_diffusers(interop.unet_from_diffusers(first.config, numpy_state(first)))
    second = diffusers.UNet2DModel.from_config(config)
    assert state.keys() == second.state_dict().keys()
    second.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    second.eval()
    x = torch.randn(2, first.config.in_channels, h, w)
    given = x, torch.tensor([3, 999]), torch.tensor([4, 1]) if first.config.num_class_embeds else None
    with torch.no_grad():
        assert torch.equal(first(*given).sample, second(*given).sample)
    differing = {
        key
        for key, value in first.config.items()
        if not key.startswith("_") and _plain(value) != _plain(second.config[key])
    }
    assert not differing - {"sample_size", "num_train_timesteps"}


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("head_dim", [None, 4])
def test_a_model_of_tinydiff_computes_the_same_in_diffusers(head_dim):
    rng = np.random.default_rng(0)
    ours = td.UNet(in_channels=2, out_channels=4, head_dim=head_dim, rng=rng)
    for p in ours.named_parameters().values():
        p.value = p.value + 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    config, state = interop.unet_to_diffusers(ours, sample_size=8)
    theirs = diffusers.UNet2DModel.from_config(config)
    assert theirs.config.sample_size == 8
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x, t = rng.standard_normal((2, 8, 8, 2), dtype=np.float32), np.array([0, 999])
    y = channels_last(theirs(channels_first(x), torch.as_tensor(t)).sample)
    assert np.linalg.norm(ours.predict(x, t) - y) <= 1e-4 * np.linalg.norm(y)


# The published networks at their full size


CIFAR10 = dict(block_out_channels=(128, 256, 256, 256), **types(0, 1, 0, 0), **PUBLISHED)
PIXELS_256 = dict(block_out_channels=(128, 128, 256, 256, 512, 512), **types(0, 0, 0, 0, 1, 0), **PUBLISHED)


@pytest.mark.parametrize(
    "config",
    [pytest.param(CIFAR10, id="CIFAR-10"), pytest.param(PIXELS_256, id="256 pixels", marks=pytest.mark.slow)],
)
def test_names_and_shapes_of_the_published_networks(config):
    """Every parameter of diffusers' network (built without memory), and no other, is asked for and fits."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config).state_dict()
    ours = td.UNet(**unet_arguments(config)).named_parameters()
    assert {n: _torch_shape(p.shape) for n, p in ours.items()} == {
        n: tuple(v.shape) for n, v in theirs.items()
    }


def _torch_shape(shape):
    return {1: shape, 2: shape[::-1], 4: (*shape[:1:-1], *shape[:2])}[len(shape)]


@pytest.mark.slow
def test_the_published_cifar10_network_at_full_size():
    theirs = random_unet2d(CIFAR10, seed=0, dtype=torch.float32)
    ours = interop.unet_from_diffusers(theirs.config, numpy_state(theirs))
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), dtype=np.float32)
    t = np.array([10, 999])
    with torch.no_grad():
        y = channels_last(theirs(channels_first(x), torch.as_tensor(t)).sample)
    assert np.linalg.norm(ours.predict(x, t) - y) <= 1e-4 * np.linalg.norm(y)
