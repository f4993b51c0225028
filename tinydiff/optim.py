"""Adam, learning-rate schedule, gradient clipping, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Generic

import numpy as np

from tinydiff._checks import check_betas, check_number, class_or_kind
from tinydiff._together import Together, cut, end_to_end, groups
from tinydiff.backend import Array, array_namespace, asarray_like, to_numpy
from tinydiff.kernels import kernels_for
from tinydiff.models._checks import check_model
from tinydiff.nn.module import M, Parameter, check_state

__all__ = ["EMA", "Adam", "clip_grad_norm", "warmup_cosine"]


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1); with `weight_decay`, AdamW (Loshchilov & Hutter 2019).

    From its second step on it changes the weights in place: call a backward before the step, not after it,
    and copy what ``state_dict()`` returned if it is to stay as it is.

    Parameters
    ----------
    parameters : mapping of name to Parameter, or iterable of Parameter
        What to train; one given twice is stepped once. A backward adds to the gradients of all of a model's
        parameters: if some are not given, because they are frozen, use the model's own ``zero_grad()``.
    lr : float
        Learning rate; may be changed between steps by assigning ``.lr``.
    betas : tuple of (float, float)
        Decay of the first and second moment, each in [0, 1).
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        Decoupled decay: each step first multiplies the weights by ``1 - lr * weight_decay``. In float32 that
        is 1, and nothing decays, while the product is below 3e-8.

    Raises
    ------
    TypeError
        If `parameters` is neither a mapping nor an iterable: a model, say; or holds what is no `Parameter`.
    ValueError
        If a setting is out of range (the message names it), or there is no parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in [("lr", lr), ("weight_decay", weight_decay)]:
            check_number(name, value, lambda rate: 0 <= rate < math.inf, "a finite number, not negative")
        check_number("eps", eps, lambda eps: 0 < eps < math.inf, "a positive number")
        check_betas(betas)
        self.parameters = _distinct(parameters)
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0
        self.m = [array_namespace(p.value).zeros_like(p.value) for p in self.parameters]
        self.v = [array_namespace(p.value).zeros_like(p.value) for p in self.parameters]
        self._together = Together()

    def step(self) -> None:
        """Move every parameter against its gradient.  (docs: B.21)"""
        self.steps += 1
        beta1, beta2 = self.betas
        # m / (1 - beta1^k) and sqrt(v / (1 - beta2^k)) are the unbiased moments; the corrections are scalars.
        step_size = self.lr / (1.0 - beta1**self.steps)
        root = math.sqrt(1.0 - beta2**self.steps)
        how = (step_size, beta1, beta2, root, self.eps, 1.0 - self.lr * self.weight_decay)
        values = [p.value for p in self.parameters]
        for which, together in self._together.hold(values, self.m, self.v):
            grads = end_to_end([self.parameters[i].grad for i in which])
            value, m, v = (each.flat for each in together)
            stepped = kernels_for(value).adam_step(value, grads, m, v, *how)
            for each, flat in zip(together, stepped, strict=True):
                each.write(flat)
        for p, value in zip(self.parameters, values, strict=True):
            p.value = value

    def zero_grad(self) -> None:
        """Make every gradient zero."""
        for p in self.parameters:
            p.zero_grad()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return ``steps`` and the moments, ``m.0``, …, ``v.0``, …, as NumPy arrays on the host.

        The settings are not in it. Moments that are on the host already are views.
        """
        moments = {name: to_numpy(moment) for name, moment in self._moments().items()}
        return {"steps": np.asarray(self.steps), **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy in what `state_dict` returned; the dtype and device stay those of the parameters.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, or a shape differs; nothing is changed then.
        """
        shapes = {name: moment.shape for name, moment in self._moments().items()}
        check_state(state, {"steps": (), **shapes}, "the optimizer")
        for name, moments in [("m", self.m), ("v", self.v)]:
            for i, moment in enumerate(moments):
                moments[i] = asarray_like(to_numpy(state[f"{name}.{i}"]).copy(), moment)
        self.steps = int(state["steps"])

    def _moments(self) -> dict[str, Array]:
        """The moments by their names in a state."""
        both = [("m", self.m), ("v", self.v)]
        return {f"{name}.{i}": moment for name, moments in both for i, moment in enumerate(moments)}


def _distinct(parameters: Mapping[str, Parameter] | Iterable[Parameter]) -> list[Parameter]:
    """The parameters, each once; TypeError if it is no collection of them, ValueError if there is none."""
    if not isinstance(parameters, Iterable):
        expected = "model.named_parameters(), or an iterable of Parameter"
        raise TypeError(f"parameters is {class_or_kind(parameters)}; expected {expected}.")
    given = parameters.values() if isinstance(parameters, Mapping) else parameters
    distinct = list({id(p): p for p in given}.values())
    for p in distinct:
        if not isinstance(p, Parameter):
            expected = "Parameter, as in model.named_parameters()"
            raise TypeError(f"parameters holds {class_or_kind(p)}; expected {expected}.")
    if not distinct:
        raise ValueError("parameters is empty; expected at least one parameter.")
    return distinct


def clip_grad_norm(parameters: Mapping[str, Parameter] | Iterable[Parameter], max_norm: float) -> Array:
    """Scale all gradients together so that their joint Euclidean norm is at most `max_norm`.  (docs: B.22)

    Parameters
    ----------
    parameters : mapping of name to Parameter, or iterable of Parameter
        Those whose gradients are scaled; one given twice counts once.
    max_norm : float
        The bound, > 0; ``math.inf`` only measures.

    Returns
    -------
    array, 0-d
        The norm before scaling.

    Raises
    ------
    TypeError
        If `parameters` is neither a mapping nor an iterable: a model, say; or holds what is no `Parameter`.
    ValueError
        If `max_norm` is not positive, or there is no parameter.
    """
    distinct = _distinct(parameters)
    check_number("max_norm", max_norm, lambda norm: norm > 0, "a positive number")
    xp = array_namespace(distinct[0].value)
    grads = [p.grad for p in distinct]
    together = groups(grads)
    flats = [end_to_end([grads[i] for i in which]) for which in together]
    dtype = xp.result_type(*grads)
    squares = xp.stack([xp.astype(xp.sum(g * g), dtype, copy=False) for g in flats])
    norm = xp.sqrt(xp.sum(squares))
    if math.isfinite(max_norm):
        one = xp.ones_like(norm)
        scale = xp.minimum(one, max_norm / (norm + 1e-12))  # no host value: a GPU need not wait
        for which, flat in zip(together, flats, strict=True):
            scaled = flat * xp.astype(scale, flat.dtype, copy=False)
            for i, grad in zip(which, cut(scaled, [grads[i].shape for i in which]), strict=True):
                distinct[i].grad = grad
    return norm


def warmup_cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Factor on the learning rate: a linear rise to 1 over `warmup` steps, then half a cosine to `final`.

    Parameters
    ----------
    step : int
        0 … steps-1; later steps keep the factor `final`.
    steps : int
        Length of the training.
    warmup : int
        Steps of linear rise, 0 … steps: 1 / warmup at step 0, 1 at step `warmup` - 1.
    final : float
        In [0, 1]: where the cosine ends, at step `steps`, one after the last.

    Returns
    -------
    float in [0, 1]

    Raises
    ------
    ValueError
        If an argument is out of range; the message names it.
    """
    for name, value, fits, expected in [
        ("step", step, step >= 0, "at least 0"),
        ("steps", steps, steps >= 1, "at least 1"),
        ("warmup", warmup, 0 <= warmup <= steps, f"0 ... steps = {steps}"),
        ("final", final, 0.0 <= final <= 1.0, "a number in [0, 1]"),
    ]:
        if not fits:
            raise ValueError(f"{name} is {value}; expected {expected}.")
    if step >= steps:
        return final
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class EMA(Generic[M]):
    """A copy of a model whose weights are the exponential moving average of the model's.

    Samples are drawn from the average: it forgets the noise of the last steps (Ho et al. 2020, appendix B).

    Parameters
    ----------
    model : Module
        The model in training.
    decay : float
        In [0, 1). Update k = 1, 2, ... uses ``min(decay, (1 + k) / (10 + k))``, so that a short training
        is not dominated by its first weights. In float32 the average stops moving within 6e-8 / (1 - decay)
        of a weight near 1: 6e-4 with 0.9999 and 0.06 with 0.999999 (docs: E.18).

    Attributes
    ----------
    model : Module
        The copy with averaged weights.

    Raises
    ------
    TypeError
        If `model` is not a `Module`: its parameters, say.
    ValueError
        If `decay` is outside [0, 1).
    """

    def __init__(self, model: M, decay: float = 0.999) -> None:
        check_model(model)
        check_number("decay", decay, lambda decay: 0 <= decay < 1, "a number in [0, 1)")
        self.decay = decay
        self.steps = 0
        self.model: M = copy.deepcopy(model)
        self.model.zero_grad()
        self._averages = list(self.model.named_parameters().values())
        self._weights = list(model.named_parameters().values())
        self._together = Together()

    def update(self) -> None:
        """Take one step of the average: w_ema += (1 - decay) (w - w_ema).  (docs: B.23)"""
        self.steps += 1
        rate = 1.0 - min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        averages = [average.value for average in self._averages]
        current = [weight.value for weight in self._weights]
        for which, (together,) in self._together.hold(averages):
            value = end_to_end([current[i] for i in which])
            together.write(kernels_for(value).ema_step(together.flat, value, rate))
        for average, value in zip(self._averages, averages, strict=True):
            average.value = value

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return ``steps``, and the average's weights as ``model.<name>``, as NumPy arrays on the host."""
        weights = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        return {"steps": np.asarray(self.steps), **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy in what `state_dict` returned; the dtype and device stay those of the model.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, or a shape differs; nothing is changed then.
        """
        parameters = self.model.named_parameters()
        shapes = {f"model.{name}": p.shape for name, p in parameters.items()}
        check_state(state, {"steps": (), **shapes}, "the average")
        self.model.load_state_dict({name: state[f"model.{name}"] for name in parameters})
        self.steps = int(state["steps"])
