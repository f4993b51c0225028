"""The most memory a side holds while it takes training (or inference) steps, in a process of its own.

That process imports what the side needs, builds the network, takes a few steps, and ends. Without
children, its peak is what the kernel counted: the high-water mark of its resident set (VmHWM; elsewhere than
on Linux, ru_maxrss). With children, shared pages must not count twice: then the peak is the largest sum, over
it and all below it, of proportional set sizes (PSS: a page shared by k processes counts 1/k for each), which
its parent reads every 20 ms. If its own peak is larger, that is taken: PSS counts the libraries shared with
the parent only in part. Beside it is told what the process held when all was imported, before the network was
built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEMOS = Path(__file__).resolve().parents[1]
STEPS = 4
EVERY = 0.02  # seconds


def measured(job: dict[str, Any]) -> dict[str, float | None]:
    """MiB at the peak and after the imports, of a side doing `job` (see `child`)."""
    path = os.pathsep.join([str(DEMOS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", "from _bench.memory import child; child()"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    process.stdin = None
    family, had_children = 0.0, False
    while process.poll() is None:
        below = descendants(process.pid)
        if below:
            had_children = True
            family = max(family, sum(pss_mib(pid) for pid in [process.pid, *below]))
        time.sleep(EVERY)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"measuring memory failed: {(err.strip().splitlines() or ['no reason given'])[-1]}"
        )
    told = json.loads(out.splitlines()[-1])
    if had_children and not told.get("ignore_children"):
        told = {**told, "peak_mib": max(family, told["peak_mib"]), "children": True}
    return told


def child() -> None:
    """Read a job from the standard input, do it, and print what was held."""
    job = json.load(sys.stdin)
    module: Any
    if job["side"] == "tinydiff":
        from _bench import ours as module
        from _bench.networks import CONFIGS
    else:
        from _bench import theirs as module

        module.torch.set_num_threads(job["threads"])
        if job["kind"] == "UNet":
            import diffusers

            diffusers.UNet2DModel  # noqa: B018 (imported when first asked for)
    imported = resident_mib()
    import numpy as np

    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, job["batch"], *job["shape"]), dtype=np.float32)
    batch = (x, rng.integers(1000, size=job["batch"]), target)
    if job["side"] == "tinydiff":
        from _bench.networks import Batch

        config = CONFIGS[job["config"]]
        config = config.quick() if job["quick"] else config
        side: Any = module.Tinydiff(config, job["backend"], workers=job["workers"])
        batch = Batch(*batch)
    else:
        side = module.PyTorch(module.build(job["kind"], job["network"]), job["side"], job["device"])
    step = getattr(side, job["work"])(batch)
    for _ in range(STEPS):
        step()
    told = {"peak_mib": peak_mib(), "imported_mib": imported, "children": False}
    if job["device"] == "cuda":
        told["device_mib"] = device_mib(job["side"])
    # The compiler's processes are not the training's.
    told["ignore_children"] = job["side"] == "compile"
    print(json.dumps(told))
    sys.stdout.flush()
    side.close()


def device_mib(side: str) -> float:
    """What the allocator of the side took from the GPU's driver; it never gives back by itself."""
    if side == "tinydiff":
        import cupy

        return cupy.get_default_memory_pool().total_bytes() / 2**20
    import torch

    return torch.cuda.max_memory_reserved() / 2**20


def _status(key: str) -> float | None:
    """A line of Linux's account of this process, in MiB."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def resident_mib() -> float | None:
    return _status("VmRSS")


def peak_mib() -> float | None:
    """The high-water mark; None where the system does not say.

    VmHWM comes first, because a process's ru_maxrss begins at what its parent held.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def descendants(pid: int) -> list[int]:
    """The processes below this one, as far as the system tells."""
    below = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for word in (task / "children").read_text().split():
                below += [int(word), *descendants(int(word))]
    except OSError:  # ended meanwhile, or no such account
        pass
    return below


def pss_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def described(told: dict[str, Any]) -> str:
    """One line's worth of what `measured` returns."""
    if told["peak_mib"] is None:
        return "not told by this system"
    line = f"{told['peak_mib']:10.0f} MiB"
    if told["imported_mib"] is not None:
        line += f"  ({told['imported_mib']:.0f})"
    if told["children"]:
        line += "  sum of PSS over the process and its children"
    if "device_mib" in told:
        line += f"  on the GPU {told['device_mib']:.0f} MiB"
    return line
