"""Time tinydiff beside PyTorch and diffusers: the same networks, the same weights, in one process, in turn.

With the extra `oracle` (pip install ".[oracle]") each configuration is first checked: output and gradients by
every parameter must agree in float64, and tinydiff's float32 error against PyTorch's float64 may be at most
4 times PyTorch's own float32 error. Only then is it timed. Without torch, or with --profile, tinydiff's own
step is laid out layer by layer, beside the rate at which this machine multiplies matrices.

  training   forward, mean squared error, backward, Adam, gradients to zero
  inference  forward, nothing kept for a backward
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EPILOG = """how it is made fair:
  - Both sides run in this process, in turn, A B A B; a turn is as many steps as fill 0.2 s (at least one).
    Printed are medians over the turns, and tinydiff's median over the other's, with the quartiles of the same
    ratio taken round by round: whatever else the machine does in a round slows both.
  - Both have the same number of threads (--threads; default: all cores this process may use), set by
    torch.set_num_threads, and in OpenBLAS, whose number of threads tinydiff's kernels use as well.
    PyTorch's threads and OpenBLAS's are different ones; each side's rest while the other has its turn.
  - Both take 3 steps before any counts (torch.compile compiles then). Python's garbage collector runs
    between turns only. Where a turn has several steps, one that does not count is taken first: it brings
    back to the caches what the other's turn drove out.
  - tinydiff runs as in td.train: within tinydiff.kernels.many_steps. That also tells the C library's
    allocator to keep freed memory, for the whole process, so PyTorch gains by it too.
  - PyTorch runs as it comes: NCHW, torch.optim.Adam (--fused-adam for its fused form), zero_grad to None,
    inference_mode; beside it the same in channels_last memory format, and torch.compile of the model.
  - The networks are diffusers' UNet2DModel with its own defaults (8 channels a head; 32 groups for cifar),
    and for `toy` the MLP written out in PyTorch. No weight is zero.
  - On a GPU (--backend cupy) times are the device's own, between two events queued around a turn's steps,
    and so is the time of a whole walk of 50 DDIM steps. tinydiff runs there with its defaults: its CUDA
    kernels, its steps recorded as CUDA graphs. torch.compile records them, too, with mode="reduce-overhead",
    PyTorch's own way to CUDA graphs; eager and channels_last launch kernel by kernel. cuDNN chooses its
    algorithms in the warm-up. TF32 is on for both sides or for neither; tinydiff's attention with narrow
    heads, a kernel without products of cuBLAS, computes in float32 even then. Beside the host's memory stands
    what each allocator took from the driver.
  - Peak memory is that of a process of its own, which imports one side only and takes 4 training steps:
    the high-water mark of its resident set (VmHWM). If it has children, the largest sum of their
    proportional set sizes (PSS), so that shared pages count once.

examples:
  python demos/benchmark.py
  python demos/benchmark.py --configs mnist toy --threads 1 --rounds 20 --json times.json
  python demos/benchmark.py --profile --growth --no-compile
  python demos/benchmark.py --backend cupy --tf32
  python demos/benchmark.py --backend cupy --configs sampling --work ddim --no-compile --no-memory"""

QUICK = "networks of a quarter of the channels, batches of 2, two rounds: to see that all of it runs"
WORK = ["training", "inference", "ddim"]
LEAST_SHARE = 0.005  # of the step: layers below it are summed in one line (--json has them all)
NEEDS_TORCH = 'PyTorch and diffusers are needed to compare with: pip install ".[oracle]"'


def count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        metavar="NAME",
        help="mnist, cifar, sampling, toy; with --backend cupy also cifar128 (default: all)",
    )
    parser.add_argument(
        "--work",
        nargs="+",
        choices=WORK,
        default=WORK,
        metavar="WORK",
        help="what to time: training, inference, on a GPU ddim (50 steps from noise to data); default: all",
    )
    parser.add_argument("--rounds", type=count, metavar="N", help="turns of each side (default: 9)")
    parser.add_argument("--threads", type=count, metavar="N", help="of both sides (default: all cores)")
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes that share each of tinydiff's batches (default: as in training and sampling, one for "
        "each thread)",
    )
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (a minute each)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--fused-adam", action="store_true", help="PyTorch's Adam with fused=True")
    parser.add_argument(
        "--profile", action="store_true", help="where tinydiff's training step spends its time, by layer"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="the exponent of time in batch (8 to 128) and in pixels (16x16 to 64x64)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument(
        "--backend", choices=["numpy", "cupy"], default="numpy", help="cupy: both on one GPU (default: numpy)"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="on a GPU: TF32 products on both sides, not float32"
    )
    parser.add_argument(
        "--definitions",
        action="store_true",
        help="on a GPU: time tinydiff also unrecorded, and with the definitions for its CUDA kernels",
    )
    args = parser.parse_args(argv)
    known = ["mnist", "cifar", "sampling", "toy"] + (["cifar128"] if args.backend == "cupy" else [])
    for name in args.configs or []:
        if name not in known:
            parser.error(f"argument --configs: {name!r} is not one of {', '.join(known)}")
    for what, given, backend in [
        ("--work: ddim", args.work == ["ddim"], "cupy"),
        ("--tf32:", args.tf32, "cupy"),
        ("--definitions:", args.definitions, "cupy"),
        ("--workers:", args.workers, "numpy"),
        ("--profile:", args.profile, "numpy"),
        ("--growth:", args.growth, "numpy"),
    ]:
        if given and args.backend != backend:
            parser.error(f"argument {what} only with --backend {backend}")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"argument --json: {args.json} is a folder, or in one that is not there")
    args.rounds = args.rounds or (2 if args.quick else 9)
    return args


def set_threads(threads: int) -> None:
    """Set the number of threads in this process, and in those it starts."""
    # The last is Accelerate's, NumPy's BLAS on macOS.
    for library in ("OPENBLAS_NUM", "OMP_NUM", "MKL_NUM", "VECLIB_MAXIMUM"):
        os.environ[f"{library}_THREADS"] = str(threads)
    from tinydiff.kernels import _threads

    if _threads._blas is not None:  # NumPy may have been imported with other values of the variables
        _threads._blas[1](threads)
    else:
        print("NumPy's BLAS is not OpenBLAS: it may use more threads than --threads says.", file=sys.stderr)
    if has_torch():
        import torch

        torch.set_num_threads(threads)


def has_torch() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers"))


class Benchmark:
    """What one run measures, printed as it comes and kept in `found`."""

    def __init__(self, args: argparse.Namespace, device: Any = None) -> None:
        from _bench import networks

        self.args = args
        self.device = device
        self.compare = has_torch()
        default = networks.ON_THE_CPU if device is None else networks.ON_A_GPU
        self.configs = [networks.CONFIGS[name] for name in args.configs or default]
        self.configs = [config.quick() if args.quick else config for config in self.configs]
        self.ddim_steps = 2 if args.quick else 50
        self.variants = ["eager", "channels_last", "compile"]
        if args.no_compile:
            self.variants.remove("compile")
        self.failures: list[str] = []
        self.agreed: list[Any] = []
        self.found: dict[str, Any] = {
            "environment": environment(args, self.compare) | (device.about() if device else {}),
            "agreement": {},
            "times": [],
            "memory": {},
        }

    def run(self) -> int:
        print("  ".join(f"{key}: {value}" for key, value in self.found["environment"].items()))
        if not self.compare:
            print(f"{NEEDS_TORCH}. Without them, tinydiff alone:")
        for config in self.configs:
            print(f"\n{config.name}: {config.about}")
            if self.compare and not self.agree(config):
                continue
            for work in self.args.work:
                for n in getattr(config, work):
                    if work != "ddim" or self.device is not None:
                        self.time(config, work, n)
            if not self.args.no_memory:
                self.memory(config)
        if self.args.growth:
            self.growth()
        if self.args.profile or not self.compare:
            self.profile()
        for failure in self.failures:
            print(f"FAILED: {failure}", file=sys.stderr)
        if self.args.json:
            from tinydiff.checkpoint import replace_file

            self.found["failures"] = self.failures
            replace_file(self.args.json, (json.dumps(self.found, indent=1) + "\n").encode())
        return 1 if self.failures else 0

    # The two sides

    def ours(self, config: Any, dtype: str = "float32", **how: Any) -> Any:
        from _bench.ours import Tinydiff

        backend, clock = ("numpy", None) if self.device is None else self.device.ours()
        return Tinydiff(config, backend, dtype, clock, self.args.workers, **how)

    def theirs(self, config: Any, variant: str, dtype: str = "float32", exact_time: bool = False) -> Any:
        from _bench import ours, theirs

        model = config.model()
        network = their_config(model, config.shape)
        twin = theirs.build(config.network.__name__, network, ours.in_torch_layout(model))
        where, clock = ("cpu", None) if self.device is None else self.device.theirs()
        return theirs.PyTorch(twin, variant, where, dtype, exact_time, self.args.fused_adam, clock)

    def variants_of(self, config: Any) -> list[str]:
        """PyTorch's variants; points have no channels_last."""
        return [v for v in self.variants if v != "channels_last" or len(config.shape) == 3]

    def sides(self, config: Any) -> dict[str, Any]:
        """By name, every side that there is."""
        sides = [self.ours(config)]
        if self.args.definitions:
            sides += [
                self.ours(config, kernels="cupy", recorded=False, name="tinydiff, unrecorded"),
                self.ours(config, kernels="portable", recorded=False, name="tinydiff, definitions"),
            ]
        if self.compare:
            sides += [self.theirs(config, variant) for variant in self.variants_of(config)]
        return {side.name: side for side in sides}

    # What is measured

    def agree(self, config: Any) -> bool:
        """Output and gradients of both sides, in both precisions; what is wrong goes to `failures`."""
        from _bench import agreement

        batch = config.batch(max(config.training + config.inference))
        twin = next(
            (c for c in self.agreed if (c.arguments, c.shape) == (config.arguments, config.shape)), None
        )
        if twin is not None:
            print(f"  agreement: the network of {twin.name}")
            return True
        results = []
        for dtype in ("float32", "float64"):
            for make in (self.ours, lambda *a: self.theirs(a[0], "eager", a[1], exact_time=True)):
                side = make(config, dtype)
                results.append(side.output_and_gradients(batch.astype(dtype)))
                side.close()
        found = agreement.compare(
            ours=results[0], theirs=results[1], ours_64=results[2], theirs_64=results[3]
        )
        self.found["agreement"][config.name] = found
        errors, ratio = found["float32_error"], found["error_ratio"]
        lines = {
            "difference in float64": found["float64_difference"],
            "difference in float32": found["float32_difference"],
            "error of tinydiff's float32": errors["tinydiff"],
            "error of PyTorch's float32": errors["PyTorch"],
        }
        print(f"  {'relative to PyTorch in float64':34}{'output':>8}{'gradients':>12}{'worst parameter':>18}")
        for about, e in lines.items():
            numbers = f"{e['output']:8.1e}{e['gradients']:12.1e}{e['worst_gradient']:18.1e}"
            print(f"    {about:32}{numbers}  {e['worst_parameter']}")
        numbers = f"{ratio['output']:8.2f}{ratio['gradients']:12.2f}{ratio['worst_gradient']:18.2f}"
        print(f"    {f'ratio of errors (at most {agreement.MOST:g})':32}{numbers}  (the worst is not judged)")
        if not found["accurate"]:
            self.failures.append(f"{config.name}: float32 error more than {agreement.MOST:g} times PyTorch's")
        if not found["same"]:
            self.failures.append(f"{config.name}: the two sides do not agree in float64; not timed")
        if found["same"]:
            self.agreed.append(config)
        return found["same"]

    def time(self, config: Any, work: str, n: int) -> None:
        """One line a side: median, and tinydiff's ratio to it."""
        from _bench import machine, rounds

        given = machine.share_given(self.args.threads)
        batch = config.batch(n)
        sides = self.sides(config)
        steps = {name: self.step(side, work, batch) for name, side in sides.items()}
        try:
            if "torch.compile" in steps and not self.compiles(steps["torch.compile"]):
                sides.pop("torch.compile").close()
                del steps["torch.compile"]
            clocks = {name: side.clock for name, side in sides.items()}
            times = rounds.in_turn(steps, clocks, self.args.rounds, 0.0 if self.args.quick else 0.2)
        finally:
            for side in sides.values():
                side.close()
        given = min(given, machine.share_given(self.args.threads))
        found = rounds.compared(times)
        self.found["times"].append(
            {"config": config.name, "work": work, "batch": n, "processor_share": given, **found}
        )
        what = work if work != "ddim" else f"{self.ddim_steps} DDIM steps"
        print(f"  {what}, batch {n}: median of {self.args.rounds} rounds")
        for name, seconds in found["seconds"].items():
            line = f"    {name:23}{1e3 * seconds:12.3f} ms"
            if name in found["ratio"]:
                r = found["ratio"][name]
                line += (
                    f"    tinydiff / it {r['ratio']:6.2f}"
                    f"   (quartiles {r['lower_quartile']:.2f} to {r['upper_quartile']:.2f})"
                )
            print(line, flush=True)
        self.say_if_busy(given)

    def say_if_busy(self, given: float) -> None:
        from _bench.machine import ENOUGH, available_cores

        if given < ENOUGH:
            threads = self.args.threads
            cores = min(threads, available_cores())
            print(f"    BUSY: other programs left this one {given:.0%} of the time of {cores} core(s)")
            if threads > 1:
                print("    threads that wait for each other may take many times too long: try --threads 1")

    def step(self, side: Any, work: str, batch: Any) -> Any:
        if work != "ddim":
            return getattr(side, work)(batch)
        if side.name.startswith("tinydiff"):
            return side.ddim(batch, self.ddim_steps)
        from _bench.networks import T

        import tinydiff as td
        from tinydiff.schedules import evenly_spaced_timesteps

        timesteps = evenly_spaced_timesteps(T, self.ddim_steps)
        return side.ddim(batch, timesteps, td.cosine_schedule(T).alphas_cumprod[timesteps])

    def compiles(self, step: Any) -> bool:
        """Whether torch.compile works here (on a CPU it needs a C++ compiler); said once if not."""
        try:
            step()
        except Exception as error:  # the compiler's own, of many kinds
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"  torch.compile is left out: {words}")
            self.variants.remove("compile")
            return False
        return True

    def memory(self, config: Any) -> None:
        from _bench import memory

        work = "training" if config.training else "inference"
        n = max(getattr(config, work))
        sides = {"tinydiff": "tinydiff"}
        if self.compare:
            from _bench import theirs

            sides |= {theirs.VARIANTS[variant]: variant for variant in self.variants_of(config)}
        network = their_config(config.model(), config.shape) if self.compare else {}
        print(f"  peak memory, {memory.STEPS} steps of {work}, batch {n} (of it, imports)")
        found = self.found["memory"][config.name] = {"work": work, "batch": n, "sides": {}}
        for name, side in sides.items():
            job = {
                "side": side,
                "config": config.name,
                "quick": self.args.quick,
                "workers": self.args.workers,
                "kind": config.network.__name__,
                "network": network,
                "shape": config.shape,
                "work": work,
                "batch": n,
                "threads": self.args.threads,
                "backend": "numpy" if self.device is None else self.device.ours()[0],
                "device": "cpu" if self.device is None else self.device.theirs()[0],
            }
            told = memory.measured(job)
            found["sides"][name] = told
            print(f"    {name:23}{memory.described(told)}", flush=True)

    def growth(self) -> None:
        from _bench import growth

        def sides_of(config: Any) -> dict[str, Any]:
            sides = [self.ours(config)] + ([self.theirs(config, "eager")] if self.compare else [])
            return {side.name: side for side in sides}

        print("\ngrowth of a training step of mnist: time ~ size ^ exponent", flush=True)
        self.found["growth"] = growth.growth(sides_of, min(self.args.rounds, 3), self.args.quick)
        for along, found in self.found["growth"].items():
            print(f"  in {along}: {', '.join(map(str, found['sizes']))}")
            for name, of in found["sides"].items():
                milliseconds = "  ".join(f"{1e3 * s:.2f}" for s in of["seconds"])
                print(f"    {name:23} exponent {of['exponent']:.2f}    ({milliseconds} ms)")

    def profile(self) -> None:
        from _bench import layers, machine

        self.found["profile"] = []
        for config in self.configs:
            for n in config.training:
                measured = layers.profile(config, n, 1 if self.args.quick else 5)
                measured["processor_share"] = given = machine.share_given(self.args.threads)
                self.found["profile"].append(measured)
                print(
                    f"\n{config.name}, training, batch {n}, by layer (ms): a step takes "
                    f"{1e3 * measured['step_seconds']:.2f} ms, {1e3 * measured['step_seconds_watched']:.2f} "
                    f"watched; products run at {measured['product_gflops']:.0f} GFLOP/s"
                )
                self.say_if_busy(given)
                print("\n".join(layers.table(measured, "kinds")))
                print("\n".join(layers.table(measured, "layers", LEAST_SHARE)))


def their_config(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The network's configuration for PyTorch's side: a U-Net's as diffusers writes it."""
    from tinydiff.interop import unet_to_diffusers
    from tinydiff.models import UNet

    return unet_to_diffusers(model, shape[0])[0] if isinstance(model, UNet) else model.config


def environment(args: argparse.Namespace, compare: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    import numpy as np
    from _bench.machine import processor

    import tinydiff as td

    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    about = {
        "processor": processor(),
        "threads": args.threads,
        "python": platform.python_version(),
        "tinydiff": td.__version__,
        "numpy": np.__version__,
        "blas": f"{blas.get('name', '?')} {blas.get('version', '')}".strip(),
    }
    if compare:
        import diffusers
        import torch

        about |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    if hasattr(os, "getloadavg"):
        about["load before"] = round(os.getloadavg()[0], 2)
    return about


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from _bench.machine import available_cores

    import tinydiff as td

    args.threads = args.threads or available_cores()
    device = None
    try:
        if args.backend == "cupy":
            from _bench.gpu import Gpu

            device = Gpu(args.tf32)
        set_threads(args.threads)
        code = Benchmark(args, device).run()
    except td.BackendError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
