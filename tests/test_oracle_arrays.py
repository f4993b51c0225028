"""Arrays of PyTorch and JAX where they are more than numbers: a gradient, a graph, a format of their own."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import tinydiff as td
from tinydiff.backend import to_numpy
from tinydiff.losses import vlb_loss

pytestmark = pytest.mark.oracle

PROCESS = td.GaussianDiffusion(td.linear_schedule(20), "v")
X, T = np.random.default_rng(0).standard_normal((3, 2)), np.array([1, 0, 19])


def terms(x, t):
    return vlb_loss(PROCESS, x, x / 2, t, x)[0]


def test_a_sample_is_differentiated_to_where_it_began():
    """Linear in x_T, so the gradient of its sum is the sum of what comes of unit vectors."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x_T = torch.tensor(X, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = td.sample(lambda x, t: x / 2, PROCESS, X.shape, "dpm++", 5, x_T=x_T, rng=rng, progress=False)
    made.sum().backward()
    assert torch.allclose(made.detach(), x_T.grad * x_T.detach(), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_times_are_read_while_pytorch_compiles():
    torch = pytest.importorskip("torch")
    x, t = torch.tensor(X), torch.tensor(T)
    assert_array_equal(torch.compile(PROCESS.q_sample, backend="eager")(x, t, x), PROCESS.q_sample(x, t, x))


def test_times_are_read_while_pytorch_differentiates():
    torch = pytest.importorskip("torch")
    x, t = torch.tensor(X, requires_grad=True), torch.tensor(T)
    terms(x, t).backward()
    assert_array_equal(torch.func.grad(lambda x: terms(x, t))(x.detach()), x.grad)


def test_bfloat16_of_jax_is_read():
    jnp = pytest.importorskip("jax").numpy
    assert_array_equal(to_numpy(jnp.asarray([0.5, -3.0], jnp.bfloat16)).astype(float), [0.5, -3.0])
