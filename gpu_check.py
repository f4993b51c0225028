"""On a GPU: every kernel of the CuPy twin against its definition, and how long each takes. (Branch only.)

    python gpu_check.py FILE.json

Float64 may be off by 1e-9, float32 by 1e-4, of the norm; with CUPY_TF32=1 nothing is judged in float32. Times
are the device's, in microseconds, of the second kind of shapes only if there is a GPU to speak of.
"""

import json
import sys
import time
from pathlib import Path

import cupy
import numpy as np

from tinydiff.kernels import cupy as twin
from tinydiff.kernels import portable

QUICK = "--quick" in sys.argv
SHAPES = {  # N, H, W, C, groups, head_dim
    "odd": (3, 5, 6, 6, 3, 3),
    "mnist 28": (64, 28, 28, 32, 8, 8),
    "mnist 7": (64, 7, 7, 64, 8, 8),
    "cifar 32": (128, 32, 32, 64, 32, 8),
    "cifar 32 joined": (128, 32, 32, 192, 32, 8),
    "cifar 16": (128, 16, 16, 128, 32, 8),
}


def cases(shape, dtype):
    """By name, a function of the module of kernels that returns arrays."""
    n, h, w, c, groups, d = shape
    rng = np.random.default_rng(0)

    def normal(*size):
        return cupy.asarray(rng.standard_normal(size, dtype=np.float32).astype(dtype))

    x, dy = normal(n, h, w, c), normal(n, h, w, c)
    w3, w1, b = normal(3, 3, c, c) * dtype(0.1), normal(1, 1, c, c), normal(c)
    rows, flat, half = normal(n, c), normal(4, 2_500_000 if n > 3 else 50), normal(n, 2 * h, 2 * w, c)
    heads = [normal(n, h * w, c // d, d).transpose(0, 2, 1, 3) for _ in range(4)]
    parts = [normal(*s) for s in [(3, 3, c, c), (c,), (c, c)] * 20]

    def with_backward(name, *args, dy=dy, weight=None):
        def forward(k):
            return getattr(k, name)(*args)

        def backward(k):
            saved = getattr(k, name)(*args)[1]
            given = (saved, dy) if weight is None else (saved, weight, dy)
            return lambda: getattr(k, name + "_backward")(*given)

        return {name: lambda k: lambda: forward(k)[0], name + "_backward": backward}

    def adam(k):
        value, m, v = flat[0].copy(), flat[1].copy(), flat[2] ** 2
        return lambda: k.adam_step(value, flat[3], m, v, 1e-3, 0.9, 0.999, 0.5, 1e-8, 0.99)

    def laid(k):
        f = getattr(k, "end_to_end", lambda a: cupy.concatenate([p.ravel() for p in a]))
        return lambda: f(parts)

    found = {
        "conv2d 3": lambda k: lambda: k.conv2d(x, w3, b, 1, (1, 1)),
        "conv2d 3 backward": lambda k: lambda: k.conv2d_backward(x, w3, dy, 1, (1, 1)),
        "conv2d 1 backward": lambda k: lambda: k.conv2d_backward(x, w1, dy, 1, (0, 0)),
        "conv2d strided": lambda k: lambda: k.conv2d(x, w3, b, 2, (1, 1)),
        "upsample_conv2d": lambda k: lambda: k.upsample_conv2d(x, w3, b),
        "upsample_conv2d_backward": lambda k: lambda: k.upsample_conv2d_backward(x, w3, half),
        **with_backward("group_norm", x, b, b, groups, 1e-5, weight=b),
        **with_backward("group_norm_silu", x, b, b, groups, 1e-5, weight=b),
        "linear": lambda k: lambda: k.linear(rows, w1[0, 0], b),
        "linear_backward": lambda k: lambda: k.linear_backward(rows, w1[0, 0], rows),
        "silu": lambda k: lambda: k.silu(x),
        "silu_backward": lambda k: lambda: k.silu_backward(x, x, dy),
        "sum_pixels": lambda k: lambda: k.sum_pixels(x),
        "adam_step (2.5e6)": adam,
        "ema_step (2.5e6)": lambda k: lambda: k.ema_step(flat[0].copy(), flat[1], 0.1),
        "60 arrays laid end to end": laid,
    }
    if h * w <= 256:
        found |= with_backward("attention", *heads[:3], d**-0.5, dy=heads[3])
    return found


def arrays(result):
    """Those of what a kernel returned."""
    return [a for a in (result if isinstance(result, tuple) else (result,)) if isinstance(a, cupy.ndarray)]


def microseconds(f):
    """Of a call: on the device, and on the host."""
    for _ in range(2):
        f()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    began, n = time.perf_counter(), 10
    start.record()
    for _ in range(n):
        f()
    stop.record()
    host = time.perf_counter() - began
    stop.synchronize()
    return round(1e3 * cupy.cuda.get_elapsed_time(start, stop) / n, 1), round(1e6 * host / n, 1)


def main():
    """Return whether one is wrong."""
    found, bad = [], 0
    for about, shape in SHAPES.items():
        if QUICK and shape[0] > 3:
            continue
        for dtype in (np.float64, np.float32):
            big = shape[0] * shape[1] * shape[2] * shape[3] > 2_000_000
            if dtype is np.float64 and big:
                continue
            tolerance = 1e-9 if dtype is np.float64 else 1e-4
            for name, make in cases(shape, dtype).items():
                line = {"shape": about, "dtype": np.dtype(dtype).name, "kernel": name}
                try:
                    fs = {k: make(module) for k, module in (("definition", portable), ("twin", twin))}
                    expected, actual = (
                        [a.copy() for a in arrays(f())] for f in (fs["definition"], fs["twin"])
                    )
                    line["error"] = (
                        max(
                            float(cupy.linalg.norm((a - e).ravel()) / (cupy.linalg.norm(e.ravel()) + 1e-30))
                            for a, e in zip(actual, expected, strict=True)
                        )
                        if all(a.shape == e.shape for a, e in zip(actual, expected, strict=True))
                        else float("inf")
                    )
                    line["ok"] = bool(line["error"] <= tolerance)
                    if dtype is np.float32 and not QUICK:
                        line["us"] = {k: microseconds(f) for k, f in fs.items()}
                except Exception as error:
                    line |= {"ok": False, "exception": f"{type(error).__name__}: {error}"[:300]}
                bad += not line["ok"]
                found.append(line)
                us = line.get("us", {})
                times = "  ".join(f"{k} {t[0]:9.1f} us (host {t[1]:7.1f})" for k, t in us.items())
                print(
                    f"{'ok ' if line['ok'] else 'BAD'} {about:16}{line['dtype']:8}{name:26}"
                    f"{line.get('error', line.get('exception'))!s:24.24} {times}",
                    flush=True,
                )
            if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
                Path(sys.argv[1]).write_text(json.dumps(found, indent=0))
    print(f"{bad} bad of {len(found)}; reductions by {cupy._core.get_reduction_accelerators()} (1: CUB)")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
