"""What a function is asked, and what comes back from it, whatever its framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from tinydiff._checks import check_number, class_or_kind
from tinydiff.backend import to_numpy
from tinydiff.diffusion import GaussianDiffusion

__all__ = [
    "SHAPE",
    "Function",
    "answer_of",
    "answering",
    "asked_shape",
    "asked_up_to",
    "batch_shown",
    "called",
    "check_shape",
    "check_tolerance",
    "classes_told",
    "in_bfloat16",
    "laid_out",
    "on_host",
    "other_sign",
    "output_shape",
    "steps_shown",
    "times",
    "whole",
]

Function: TypeAlias = Callable[..., Any]

# As many samples as a row has pixels: numbers (N,) that were not made a column then spread along the row
# without an error, and the result shows it.
SHAPE = (8, 3, 4, 8)


def asked_up_to(diffusion: GaussianDiffusion) -> int:
    """T, or less if the network predicts eps, which says nothing of x_0 where x_t is all noise.

    ValueError if there is no such time.
    """
    if diffusion.prediction != "eps":
        return diffusion.T
    T = int(np.count_nonzero(diffusion.schedule.alphas_cumprod))
    if T == 0:
        raise ValueError(
            "diffusion has prediction 'eps', which says nothing of x0 where alphas_cumprod is 0, as it is at "
            "every t; expected 'x0', 'v' or 'flow'."
        )
    return T


def times(T: int, N: int, rng: np.random.Generator) -> np.ndarray:
    """All of 0 … T-1 as batches (., N), and some of them again to fill the last one.

    In random order, so that code which takes one t, or another's, for a whole batch is far off.
    """
    return rng.permutation(np.resize(np.arange(T), -(-T // N) * N)).reshape(-1, N)


def in_bfloat16(t: Any) -> np.ndarray:
    """Times rounded to bfloat16, which has every second of 256 … 512, and every fourth above."""
    mantissa, exponent = np.frexp(t)
    return np.ldexp(np.round(256 * mantissa), exponent - 8).astype(np.int64)


def whole(t: Any) -> np.ndarray:
    """Times that are whole but for rounding, as t / T * T is in float32, made whole; others as they are."""
    nearest = np.round(t)
    return np.where(np.abs(t - nearest) < 1e-3, nearest, t)


def called(function: Function, signature: str, *given: Any) -> Any:
    """What `function` returns; an error of its own gets a note of how it was called."""
    try:
        return function(*given)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"tinydiff.testing called it as {signature}.")
        raise


def answer_of(
    function: Function,
    signature: str,
    given: Mapping[str, np.ndarray],
    asarray: Function,
    shape: tuple[int, ...],
    expected: str = "",
    *,
    when: str = "",
    to_keep: bool = True,
) -> np.ndarray:
    """What a function returns for these arrays; AssertionError unless it has `shape`.

    Parameters
    ----------
    signature, expected, when : str
        How it is called, which shape it should have, if not just `shape`, and on which occasion it is called.
    given : mapping of arrays
        Its arguments, by name.
    to_keep : bool
        Whether it is also an error to write into them.
    """
    name, shown = signature.split("(")[0], {of: asarray(x.copy()) for of, x in given.items()}
    came = on_host(name, called(function, signature + when, *shown.values()))
    one_number = shape == () and came.size == 1
    if came.shape != shape and not one_number:
        raise AssertionError(f"{name} has shape {came.shape}; expected {expected or shape}.")
    for of, x in shown.items() if to_keep else ():
        if not np.array_equal(on_host(of, x), on_host(of, asarray(given[of].copy()))):
            raise AssertionError(f"{name} writes into the {of} that it is given; expected to leave them.")
    return came.reshape(shape)


def answering(answer: Function, with_labels: bool = False) -> Function:
    """A network that returns ``answer(x, t)``, and may be called as diffusers' are; the rest is ignored.

    But `with_labels`, it returns ``answer(x, t, labels)``, with None for labels that are not given.
    """

    def network(
        x: Any = None,
        t: Any = None,
        labels: Any = None,
        *_: Any,
        class_labels: Any = None,
        y: Any = None,
        return_dict: Any = True,
        **others: Any,
    ) -> Any:
        told = next((given for given in (labels, class_labels, y) if given is not None), None)
        x = next((others[name] for name in ("sample", "hidden_states") if name in others), x)
        t = next((others[name] for name in ("timestep", "timesteps", "time") if name in others), t)
        output = answer(x, t, *[told] * with_labels)
        return (output,) if return_dict is False else output

    return network


def asked_shape(given: tuple[Any, ...], how: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape that these, as arguments of `randn_like` or `randn`, ask for; None if they do not say."""
    for sizes in (*given, how.get("size"), how.get("shape")):
        if isinstance(sizes, (tuple, list)):
            return tuple(sizes)
    if given and all(isinstance(n, int) for n in given):
        return given
    like: Any = given[0] if len(given) == 1 else None  # and not a key of JAX's, which holds integers
    return tuple(like.shape) if "float" in str(getattr(like, "dtype", "")) else None


def on_host(name: str, result: Any) -> np.ndarray:
    """A copy of `result` as a NumPy array, without its gradients' graph; AssertionError if it is no array."""
    array = result
    bfloat16 = "bfloat16" in str(getattr(array, "dtype", ""))  # which NumPy does not have
    try:
        if hasattr(array, "detach"):  # PyTorch's
            array = array.detach().cpu()
            array = array.float() if bfloat16 else array
        elif bfloat16:
            array = np.asarray(array, np.float32)
        array = np.array(to_numpy(array))
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kind, reason = class_or_kind(result), str(error).split("\n", 1)[0]
        remedy = " Under jax.disable_jit() it is one." if "Tracer" in kind else ""
        raise AssertionError(f"{name} is {kind} ({reason}); expected an array.{remedy}") from None
    if array.dtype.kind == "O":
        raise AssertionError(f"{name} is {class_or_kind(result)}; expected an array.")
    if array.dtype.kind not in "fiu":
        raise AssertionError(f"{name} has dtype {array.dtype}; expected real numbers.")
    return array


def batch_shown(x: Any, t: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a network is shown, as NumPy arrays; AssertionError unless a batch with its time or times."""
    x, t = on_host("the x that the network is shown", x), on_host("the t that the network is shown", t)
    if x.ndim == 0 or t.shape not in ((), (len(x),)):
        raise AssertionError(
            f"the network is shown x of shape {x.shape} and t of shape {t.shape}; expected (N, ...), and "
            "() or (N,)."
        )
    return x, t


def steps_shown(t: np.ndarray, T: int) -> np.ndarray:
    """The times that a network is shown; AssertionError unless they are whole numbers, 0 … T-1."""
    t = whole(t)
    if np.any((t % 1 != 0) | (t < 0) | (t >= T)):
        why = "E.13; or E.14, in bfloat16" if np.max(t) == in_bfloat16(T - 1) else "E.13"
        if np.all((t >= 0) & (t <= 1)) and np.any(t % 1):
            why = f"of a network that is told t / T, hand over lambda x, u: network(x, {T} * u)"
        raise AssertionError(f"the network is shown t = {t}; expected whole numbers, 0 … {T - 1} ({why}).")
    return t.astype(np.int64)


def classes_told(x: np.ndarray, labels: Any, num_classes: int) -> np.ndarray:
    """The class (N,) that a network is told of each x; -1 is that of None, and of what is no class."""
    told = np.full(len(x), -1) if labels is None else on_host("what the network is told", labels)
    if told.shape != (len(x),):
        raise AssertionError(
            f"the network is shown x of shape {x.shape} and labels of shape {told.shape}; expected "
            "(N, ...) and (N,), one class for each sample."
        )
    return np.where(np.isin(told, np.arange(num_classes)), told, -1).astype(np.int64)


def output_shape(diffusion: GaussianDiffusion, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a network's output for data of `shape`; a learned variance doubles the last axis."""
    halves = 2 if diffusion.variance == "learned_range" else 1
    return (*shape[:-1], halves * shape[-1])


def laid_out(diffusion: GaussianDiffusion, axis: int, output: np.ndarray) -> np.ndarray:
    """A network's output, with the two halves of a learned variance on `axis`, not on the last one."""
    learned = diffusion.variance == "learned_range"
    return np.concat(np.split(output, 2, axis=-1), axis=axis) if learned else output


def other_sign(x: np.ndarray, output: np.ndarray) -> np.ndarray:
    """A network's output for x, with the prediction's sign changed, and not that of a learned variance."""
    C = x.shape[-1]
    return np.concat([-output[..., :C], output[..., C:]], axis=-1)


def check_tolerance(tolerance: Any) -> None:
    """ValueError unless `tolerance` is a positive number."""
    check_number("tolerance", tolerance, lambda value: 0 < value < np.inf, "a positive number")


def check_shape(shape: Any, axis: int = -1) -> None:
    """ValueError unless `shape` is that of a batch of data, and has this axis."""
    sizes = shape if isinstance(shape, tuple) else ()
    if len(sizes) < 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in sizes):
        raise ValueError(f"shape is {shape!r}; expected (N, ...), two or more integers of at least 1.")
    if axis not in (*range(1, len(shape)), -1):
        raise ValueError(f"axis is {axis!r}; expected one of the data, 1 … {len(shape) - 1} or -1.")
