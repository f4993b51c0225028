"""The scripts of demos/ and tools/, which are in no package: as modules, and run in this process."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"


def script(path):
    """What is in the file, as a module of its own at every call."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo(name):
    return script(DEMOS / f"{name}.py")


def run(module, *argv, capsys=None, expect=0):
    """Run a demo, which is to end with exit code `expect`; return what it wrote on stdout and stderr."""
    module = demo(module) if isinstance(module, str) else module
    if expect:
        with pytest.raises(SystemExit) as end:
            module.main([str(arg) for arg in argv])
        assert end.value.code == expect
    else:
        module.main([str(arg) for arg in argv])
    return capsys.readouterr() if capsys else None
