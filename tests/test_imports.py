"""What `import tinydiff` brings in: nothing that is not core, and nothing before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ["matplotlib", "torch", "jax", "numba", "cupy", "pooch", "diffusers"]
LATE = ["array_api_compat.numpy", "numpy.f2py", "scipy.special", "scipy.stats", "safetensors", "tqdm"]
ABSENT = [*OPTIONAL, *LATE, "pytest"]


def run(program, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=300
    )


def test_import_brings_in_none_of_the_extras():
    done = run("import sys, tinydiff; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "tinydiff.samplers" in loaded
    assert not loaded & set(ABSENT)


TRAINS_SAMPLES_AND_SAVES = """
import tempfile, numpy as np, tinydiff as td
rng = np.random.default_rng(0)
diffusion = td.GaussianDiffusion(td.linear_schedule(T=4))
data = td.datasets.toy2d.sample("moons", 16, rng=rng)
with tempfile.TemporaryDirectory() as directory:
    model = td.MLP(hidden=4, blocks=1, time_features=4, rng=rng)
    model = td.train(model, diffusion, data, steps=2, batch_size=4, run_dir=directory, progress=False).model
    td.save_model(directory + "/model.safetensors", model)
    model, _ = td.load_model(directory + "/model.safetensors")
assert td.sample(model, diffusion, (3, 2), rng=rng, progress=False).shape == (3, 2)
"""


def refusing(names, error):
    return f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise {error}(name + " was asked for")

sys.meta_path.insert(0, Refuse())
"""


def test_the_core_trains_samples_and_saves_without_the_extras():
    done = run(refusing(OPTIONAL, "AssertionError") + TRAINS_SAMPLES_AND_SAVES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_and_where_there_are_no_processes():
    """In a browser and on a phone Python has none of these, and no fork."""
    missing = refusing(["_multiprocessing", "_posixshmem", "fcntl"], "ImportError")
    asked_for = """
try:
    td.sample(model, diffusion, (3, 2), rng=rng, progress=False, workers=2)
except RuntimeError as error:
    print(error)
"""
    done = run(missing + "import os; vars(os).pop('fork', None)" + TRAINS_SAMPLES_AND_SAVES + asked_for)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "processes share the work on Linux only; expected workers=1 on this system.\n"


def test_import_warns_of_nothing_and_prints_nothing():
    done = run("import tinydiff", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_few_need_is_imported_when_it_is_asked_for():
    asked = "print(len(tinydiff.plotting.__all__) * len(tinydiff.testing.__all__) > 0)"
    few = "{'plotting', 'testing'}"
    listed = f"import sys, tinydiff; print({few} <= set(dir(tinydiff)), {few} & vars(tinydiff).keys());"
    done = run(listed + asked)
    assert (done.returncode, done.stdout) == (0, "True set()\nTrue\n")
    done = run("import tinydiff; tinydiff.ploting")
    assert "AttributeError: module 'tinydiff' has no attribute 'ploting'" in done.stderr


def test_every_public_name_is_there():
    import tinydiff

    for name in tinydiff.__all__:
        assert getattr(tinydiff, name) is not None
    assert tinydiff.__version__.count(".") == 2


def test_what_one_file_imports_another_offers():
    """A name that is taken from a module of tinydiff, unless private, is in that module's ``__all__``."""
    root = Path(__file__).parents[1]
    trees = {
        path: ast.parse(path.read_bytes())
        for top in ("tinydiff", "demos", "tools")
        for path in (root / top).rglob("*.py")
    }
    offered = {}
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                offered[path] = ast.literal_eval(node.value)
    missing = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinydiff":
                module = root.joinpath(*node.module.split("."))
                path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
                for name in (alias.name for alias in node.names):
                    submodule = (module / name).is_dir() or (module / f"{name}.py").is_file()
                    if not (name.startswith("_") or submodule or name in offered[path]):
                        missing.add(f"{node.module}.{name}")
    assert not missing


@pytest.mark.parametrize("value", ["cupy", "nonsense"])
def test_import_does_not_depend_on_the_backend(value, monkeypatch):
    # The backend is asked for when an array is made, not before: `--help` works without a GPU.
    monkeypatch.setenv("TINYDIFF_BACKEND", value)
    done = run("import tinydiff")
    assert (done.returncode, done.stderr) == (0, "")
