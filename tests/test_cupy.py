"""What can be said of CuPy without a GPU: that it has what is asked of it, by these names and arguments.

Needs CuPy, which can be imported without a GPU; recorded under array-api-strict.
"""

import inspect

import array_api_strict
import numpy as np
import pytest
from namespaces import FUNCTIONS, space

import tinydiff as td
from tinydiff.bound import prior_term
from tinydiff.losses import cross_entropy

Array = type(array_api_strict.zeros(1))
STANDARD = {"device", "dtype", "ndim", "shape", "size", "T"}


def a_bit_of_everything(where):
    """Training with every loss, sampling with every sampler, the bound, the classifier's loss."""
    learned = td.GaussianDiffusion(td.cosine_schedule(20), "eps", "learned_range")
    plain = td.GaussianDiffusion(td.linear_schedule(20), "v")
    points, images = (where.array(np.full(s, -1, np.float32)) for s in ((4, 2), (2, 8, 8, 1)))
    unet = td.UNet(block_channels=(4, 8), attention=(False, True), norm_groups=2, head_dim=4, dropout=0.3)
    both = td.MLP(2, 4, hidden=8, blocks=1, time_features=5)
    mlp = td.MLP(2, hidden=8, blocks=1, time_features=4)
    once = dict(steps=2, batch_size=2, log_every=1, progress=False)
    for model, diffusion, data, loss in [
        (unet, plain, images, dict(loss="simple", min_snr_gamma=5.0)),
        (unet, plain, images, dict(loss="vlb", decoder="8bit")),
        (both, learned, points, dict(loss="hybrid")),
        (mlp, plain, points, dict(loss="vlb", importance_sampling=True)),
    ]:
        td.train(where.module(model, "float32"), diffusion, data, **once, **loss)
    for sampler in td.samplers.SAMPLERS:
        how = dict(eta=0.5 * (sampler == "ddim"), clip=True, rng=np.random.default_rng(0), progress=False)
        td.sample(mlp, plain, (4, 2), sampler, steps=3, **how)
    td.sample(both, learned, (4, 2), steps=3, rng=np.random.default_rng(0), progress=False)
    prior_term(plain, points)
    cross_entropy(points, np.zeros(4, np.int64))


def test_cupy_has_what_is_asked_of_the_library(monkeypatch):
    pytest.importorskip("cupy", reason="CuPy is not installed")
    import array_api_compat.cupy as namespace
    import cupy

    calls, attributes = set(), set()

    def noting(name, function):
        def call(*args, **kwargs):
            calls.add((name, len(args), tuple(sorted(kwargs))))
            return function(*args, **kwargs)

        return call

    def attribute(self, name, get=Array.__getattribute__):
        attributes.add(name)
        return get(self, name)

    for name, function in FUNCTIONS.items():
        monkeypatch.setattr(array_api_strict, name, noting(name, function))
    monkeypatch.setattr(Array, "__getattribute__", attribute)
    a_bit_of_everything(space("strict"))
    monkeypatch.undo()
    public = {name for name in attributes if not name.startswith("_")}
    assert public <= STANDARD and all(hasattr(cupy.ndarray, name) for name in public)
    assert len(calls) > 30
    for name, count, keywords in calls:
        function = getattr(namespace, name)
        if isinstance(function, cupy.ufunc):
            assert count == function.nin and not keywords, name
        else:
            inspect.signature(function).bind(*range(count), **dict.fromkeys(keywords))
