"""What can be said of CuPy without a GPU: that it has what is asked of it, by these names and arguments.

Needs CuPy, which can be imported without a GPU; recorded under array-api-strict, or read in the source. And
that the GPU that is not there (``tests/emulated``) has nothing which CuPy has not.
"""

import ast
import importlib.util
import inspect
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

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


def dotted(node):
    """What the nodes of a name say, as cupy.cuda.Stream; of others nothing."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return before and f"{before}.{node.attr}"


def test_cupy_has_what_is_named_in_the_source():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    names, imported = set(), set()
    for file in Path(td.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if dotted(node).startswith("cupy."):
                names.add(dotted(node).removeprefix("cupy."))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cupy"):
                imported |= {(node.module, alias.name) for alias in node.names}
    assert "cuda.runtime.streamPerThread" in names and len(names) > 20
    for name in names:
        operator.attrgetter(name)(cupy)
    assert ("cupy._core", "get_compute_type") in imported
    for module, name in imported:
        if importlib.util.find_spec(f"{module}.{name}") is None:  # a module may need a library of CUDA's
            assert hasattr(importlib.import_module(module), name), (module, name)


# What has a class of its own in the emulated CuPy, and what there is for that one's own use.
CLASSES = ["ndarray", "RawKernel", "ElementwiseKernel", "random.Generator", "cuda.Device", "cuda.Graph"]
CLASSES += ["cuda.MemoryPointer", "cuda.MemoryPool", "cuda.Stream", "cuda.runtime"]
ITS_OWN = {"ndarray": {"mem", "view"}, "cuda.Stream": {"ask", "do", "refuse"}}

NO_MATTER = ["__dict__", "__module__", "__weakref__", "__aenter__", "__aexit__", "__class_getitem__"]

SHOWN = """
import json, operator, sys, cupy
def shown(of):
    special = {name for name in {*dir(of)} - {*dir(object)} | {"__hash__"} if name.startswith("__")}
    return [*{name for name in dir(of) if name[0] != "_"}, *{name for name in special if getattr(of, name)}]
print(json.dumps({name: shown(operator.attrgetter(name)(cupy)) for name in sys.argv[1:]}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulated GPU needs Linux")
def test_the_emulated_cupy_has_nothing_that_cupy_has_not():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "emulated")}
    found = subprocess.run(
        [sys.executable, "-c", SHOWN, *CLASSES], env=where, capture_output=True, text=True, check=True
    )
    for name, shown in json.loads(found.stdout).items():
        theirs = operator.attrgetter(name)(cupy)
        asked = {*shown} - ITS_OWN.get(name, set()) - {*NO_MATTER}
        assert [each for each in asked if getattr(theirs, each, None) is None] == [], name
