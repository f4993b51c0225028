"""Noise schedules: the betas of the forward chain, and every table that follows from them.

The forward process adds Gaussian noise in T steps (Ho et al. 2020, eq. 2). Step t keeps the fraction
alpha_t of the variance that was there and fills the rest with noise of variance beta_t:

    alpha_t = 1 - beta_t
    abar_t  = alpha_0 alpha_1 ... alpha_t           what is left of the data's variance: ``alphas_cumprod``
    snr_t   = abar_t / (1 - abar_t)                 the signal-to-noise ratio, which only ever falls
    beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)        the variance of q(x_{t-1} | x_t, x_0), eq. 7

Code index t = 0 ... T-1 is the paper's step t + 1; before the first step nothing is lost, abar_{-1} = 1.
All tables are float64 NumPy arrays on the host. They come from one sum of logarithms, log abar_t =
sum log(1 - beta), so that 1 - abar_t keeps its digits when betas are tiny and abar_t is almost 1.

References
----------
Ho, Jain & Abbeel 2020, *Denoising diffusion probabilistic models*.
Nichol & Dhariwal 2021, *Improved denoising diffusion probabilistic models*.
Liu, Gong & Liu 2023, *Flow straight and fast: learning to generate and transfer data with rectified flow*.
Esser et al. 2024, *Scaling rectified flow transformers for high-resolution image synthesis*.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinydiff._checks import check_unmasked, class_or_kind
from tinydiff.backend import Array, to_numpy

__all__ = [
    "NoiseSchedule",
    "check_schedule",
    "checked_timesteps",
    "cosine_schedule",
    "evenly_spaced_timesteps",
    "flow_schedule",
    "linear_schedule",
]


class NoiseSchedule:
    """The betas of a forward chain and the tables that follow from them (docs: S.1, F.4).

    Parameters
    ----------
    betas : array_like, shape (T,)
        Variance of the noise that each step adds, each in (0, 1]. A beta of exactly 1 erases the signal;
        from there on ``alphas_cumprod`` and ``snr`` are exactly 0.

    Attributes
    ----------
    T : int
        Number of steps.
    betas, alphas : ndarray, shape (T,)
        beta_t, and alpha_t = 1 - beta_t.
    alphas_cumprod, alphas_cumprod_prev : ndarray, shape (T,)
        abar_t, and abar_{t-1} with abar_{-1} = 1.
    one_minus_alphas_cumprod, one_minus_alphas_cumprod_prev : ndarray, shape (T,)
        1 - abar_t and 1 - abar_{t-1}, to full relative accuracy also where abar is almost 1.
    snr : ndarray, shape (T,)
        abar_t / (1 - abar_t).
    posterior_variance : ndarray, shape (T,)
        beta~_t (Ho et al. 2020, eq. 7; docs: P.1); exactly 0 at t = 0, where x_0 is known.

    Raises
    ------
    ValueError
        If `betas` is not a non-empty one-dimensional sequence of finite real numbers in (0, 1], or is
        masked.

    Notes
    -----
    All tables are float64 and read-only. diffusers keeps its betas in float32 and multiplies them up in
    float32: its ``alphas_cumprod`` agrees with this one to 1e-6, but the 1 - abar of its first steps has only
    three or four digits.
    """

    def __init__(self, betas: Any) -> None:
        betas = _checked_betas(betas)
        alphas = 1.0 - betas
        with np.errstate(divide="ignore"):  # beta = 1: log alpha = -inf, and abar = 0 as it should
            log_abar = np.cumsum(np.log1p(-betas))
        abar = np.exp(log_abar)
        one_minus_abar = -np.expm1(log_abar)
        one_minus_abar[0] = betas[0]  # to the last bit, so that the posterior at t = 0 is x_0 to the last bit
        one_minus_abar_prev = np.concat([[0.0], one_minus_abar[:-1]])

        self.T: int = betas.size
        self.betas = _read_only(betas)
        self.alphas = _read_only(alphas)
        self.alphas_cumprod = _read_only(abar)
        self.alphas_cumprod_prev = _read_only(np.concat([[1.0], abar[:-1]]))
        self.one_minus_alphas_cumprod = _read_only(one_minus_abar)
        self.one_minus_alphas_cumprod_prev = _read_only(one_minus_abar_prev)
        with np.errstate(over="ignore"):  # a subnormal beta: the ratio is beyond float64, inf
            self.snr = _read_only(abar / one_minus_abar)
        self.posterior_variance = _read_only(betas * (one_minus_abar_prev / one_minus_abar))

    def __setstate__(self, state: dict[str, Any]) -> None:  # NumPy's copies and pickles can be written to
        for name, value in state.items():
            setattr(self, name, _read_only(value) if isinstance(value, np.ndarray) else value)

    def __repr__(self) -> str:
        return (
            f"NoiseSchedule(T={self.T}, betas={self.betas[0]:.4g} ... {self.betas[-1]:.4g}, "
            f"alphas_cumprod[-1]={self.alphas_cumprod[-1]:.4g})"
        )

    def respace(self, timesteps: Sequence[int] | Array) -> NoiseSchedule:
        """Return the shorter chain that visits only `timesteps`, with the same marginals (docs: S.6, S.8).

        One step of the new chain makes all the steps of the old one between two visited timesteps at once:

            beta'_i = 1 - abar_{tau_i} / abar_{tau_{i-1}}

        (Nichol & Dhariwal 2021, eq. 19). Everything else, the posterior variance above all, must be taken
        from the new betas; the result is a schedule like any other, so it is. Step i of the new chain is
        step ``timesteps[i]`` of the old one, and that is the t to show a network trained on the old chain.

        Parameters
        ----------
        timesteps : sequence of int, or integer array, shape (S,)
            tau, strictly increasing, each in 0 ... T-1.

        Returns
        -------
        NoiseSchedule
            With T = S, and ``alphas_cumprod`` that of this schedule at `timesteps`.

        Raises
        ------
        ValueError
            If `timesteps` is empty, not one-dimensional, not integer, masked, out of range or not increasing.

        Notes
        -----
        Where one long jump leaves almost nothing (1 - beta' below 1e-16), float64 rounds beta' to 1 and abar
        to 0: the new ``alphas_cumprod`` is the old one to about 1e-16 absolute, not relative.
        """
        tau = checked_timesteps("timesteps", timesteps, self.T)
        starts = np.concat([[0], tau[:-1] + 1])  # the first of the old steps that each new step makes
        with np.errstate(divide="ignore"):
            log_alphas = np.log1p(-self.betas[: tau[-1] + 1])
        # Summing log alpha over each jump, not dividing two abar, keeps small betas exact and avoids 0/0.
        # (An index of reduceat is as wide as an address: on a 32-bit system it does not take int64.)
        return NoiseSchedule(-np.expm1(np.add.reduceat(log_alphas, starts.astype(np.intp))))


def linear_schedule(
    T: int = 1000, beta_start: float | None = None, beta_end: float | None = None
) -> NoiseSchedule:
    """Return the schedule whose betas rise linearly (Ho et al. 2020, section 4; docs: S.2).

    The paper's 1e-4 to 0.02 are meant for T = 1000. A shorter chain with the same betas stops half-way: at
    T = 100 it still holds 36% of the data's variance, yet sampling starts from pure noise. So the defaults
    are scaled by 1000 / T, the end capped at 0.999, and the chain ends in noise for every T:
    ``alphas_cumprod[-1]`` is at most 1e-3.

    Parameters
    ----------
    T : int
        Number of steps, at least 1.
    beta_start, beta_end : float, optional
        First and last beta, in (0, 1]. A value given is used as it is, neither scaled nor capped. Default:
        1e-4 * 1000 / T, and 0.02 * 1000 / T but at most 0.999.

    Returns
    -------
    NoiseSchedule
        With ``betas[0] == beta_start`` and ``betas[-1] == beta_end``. With T = 1 the only step is the last
        one, `beta_end`.

    Raises
    ------
    ValueError
        If an argument is not as said above.

    Notes
    -----
    diffusers' ``DDPMScheduler(beta_schedule="linear")`` takes 1e-4 and 0.02 whatever T is; for that pass
    ``beta_start=1e-4, beta_end=0.02``. Its single step for T = 1 is `beta_start`.
    """
    T = _checked_count("T", T)
    start = 1e-4 * (1000 / T) if beta_start is None else _checked_beta("beta_start", beta_start)
    end = min(0.02 * (1000 / T), 0.999) if beta_end is None else _checked_beta("beta_end", beta_end)
    # linspace over a single point returns its start: the one step would add almost no noise.
    return NoiseSchedule(np.linspace(start, end, T) if T > 1 else [end])


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Return the cosine schedule (Nichol & Dhariwal 2021, eq. 17; docs: S.3, S.4).

    What is left of the signal's variance falls as a squared cosine,

        abar_t = f(t + 1) / f(0),     f(n) = cos^2( (n/T + s) / (1 + s) * pi/2 ),

    so beta_t = 1 - f(t + 1) / f(t), and no beta exceeds `max_beta` (the last one would be 1). Here n is the
    paper's time, the number of steps made, which is t + 1 after step t.

    Parameters
    ----------
    T : int
        Number of steps, at least 1.
    s : float
        Offset, at least 0. It keeps the first betas from vanishing.
    max_beta : float
        Cap, in (0, 1]. With 1 the chain ends in noise exactly: ``alphas_cumprod[-1] == 0``.

    Returns
    -------
    NoiseSchedule
        With ``alphas_cumprod`` equal to f(t + 1) / f(0) up to the first capped beta.

    Raises
    ------
    ValueError
        If an argument is not as said above.

    Notes
    -----
    This is diffusers' ``beta_schedule="squaredcos_cap_v2"``, with s and max_beta as arguments.
    """
    T = _checked_count("T", T)
    s = _checked_real("s", s, lambda offset: offset >= 0, "a real number of at least 0")
    max_beta = _checked_beta("max_beta", max_beta)
    k = T - np.arange(T)  # steps left, this one among them
    delta = np.pi / 2 / (T * (1 + s))
    sines = np.sin(k * delta)
    # 1 - f(t + 1) / f(t) as a product, which keeps the digits of a small beta (docs: S.4). The sine of
    # (2 k - 1) delta is that of the rest of half a turn, too: the smaller of the two angles has more digits.
    both = np.sin(np.minimum(2 * k - 1, 2 * (T - k + T * s) + 1) * delta)
    return NoiseSchedule(np.minimum(both / sines * (sines[-1] / sines), max_beta))


def flow_schedule(T: int = 1000, shift: float = 1.0) -> NoiseSchedule:
    """Return the schedule of flow matching (Liu, Gong & Liu 2023, eq. 1; docs: S.17).

    Data becomes noise on a straight line, (1 - r) x_0 + r eps, here scaled to unit variance. So the ratio of
    noise and signal is s / a = r / (1 - r), with

        r = shift u / (1 + (shift - 1) u),       u = (t + 1) / T,

    that is, r = u without a shift. The chain ends in noise exactly, ``alphas_cumprod[-1] == 0``, so the
    network must not predict eps (see `GaussianDiffusion.predict_x0`); usually it predicts the flow.

    Parameters
    ----------
    T : int
        Number of steps, at least 1.
    shift : float
        Multiplies the ratio of noise and signal at every t; more than 1 for large images, whose pixels show
        through more noise together (Esser et al. 2024, eq. 23). From 1e-6 to 1e6: beyond, betas near 1 could
        not hold what is left of the signal.

    Returns
    -------
    NoiseSchedule

    Raises
    ------
    ValueError
        If an argument is not as said above.

    Notes
    -----
    These are the times of diffusers' ``FlowMatchEulerDiscreteScheduler(T, shift)`` when it is made. Its
    `set_timesteps` spaces the times of a walk down to the smallest of these and shifts them again, so the
    last is larger.
    """
    T = _checked_count("T", T)
    shift = _checked_real("shift", shift, lambda h: 1e-6 <= h <= 1e6, "a real number from 1e-6 to 1e6")
    n = np.arange(1, T + 1, dtype=np.float64)  # steps made, this one among them
    left = T - n
    # 1 - abar_t / abar_{t-1}, written without a difference of numbers that are almost equal (docs: S.17).
    ratio = T * (n * (left + 1) + (n - 1) * left) / (left + 1) ** 2
    return NoiseSchedule(ratio / ((left / shift) ** 2 + n**2))


def evenly_spaced_timesteps(T: int, steps: int) -> np.ndarray:
    """Return `steps` of the timesteps 0 ... T-1, evenly spaced, to respace a chain with (docs: S.7).

    Evenly spaced reals from 0 to T-1, both included, rounded (Nichol & Dhariwal 2021, section 4). With one
    step it is T-1: the chain must start where the data has become noise.

    Parameters
    ----------
    T : int
        Number of steps of the chain, at least 1.
    steps : int
        How many to keep, 1 ... T.

    Returns
    -------
    ndarray of int64, shape (steps,)
        Strictly increasing; the last is T-1, and the first is 0 unless ``steps == 1``.

    Raises
    ------
    ValueError
        If an argument is not as said above.

    Notes
    -----
    diffusers calls this ``timestep_spacing="linspace"``, but takes 0 for a single step. Its default for DDPM
    and DDIM is ``"leading"``, 0, r, 2r, ... with r = T // steps, which leaves out T-1: sampling then starts
    from pure noise at a timestep where the network expects some signal.
    """
    T = _checked_count("T", T)
    steps = _checked_count("steps", steps)
    if steps > T:
        raise ValueError(f"steps is {steps}; expected at most T = {T}.")
    if steps == 1:
        return np.array([T - 1], dtype=np.int64)
    return np.round(np.linspace(0, T - 1, steps)).astype(np.int64)


def check_schedule(schedule: Any) -> None:
    """TypeError unless it is a `NoiseSchedule`: an array of betas is refused, and a `GaussianDiffusion`."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is {class_or_kind(schedule)}; expected a NoiseSchedule.")


def _read_only(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table


def _vector(name: str, values: Any, kinds: str, expected: str) -> np.ndarray:
    """`values` on the host, checked to be one-dimensional, not empty and of a dtype in `kinds`."""
    try:
        vector = to_numpy(values)
    except ValueError as error:  # a ragged list
        raise ValueError(f"{name} is {class_or_kind(values)} ({error}); expected {expected}.") from None
    check_unmasked(name, vector)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; expected {expected}.")
    if vector.dtype.kind not in kinds:
        raise ValueError(f"{name} has dtype {vector.dtype}; expected {expected}.")
    return vector


def _checked_betas(betas: Any) -> np.ndarray:
    """`betas` as a fresh float64 array of shape (T,), or ValueError."""
    expected = "a non-empty one-dimensional sequence of real numbers in (0, 1]"
    values = np.array(_vector("betas", betas, "fiu", expected), dtype=np.float64)
    wrong = np.flatnonzero(~((values > 0) & (values <= 1)))  # NaN compares false: it is among them
    if wrong.size:
        t = wrong[0]
        raise ValueError(
            f"betas[{t}] is {values[t]} ({wrong.size} of {values.size} wrong); expected {expected}."
        )
    return values


def checked_timesteps(name: str, timesteps: Any, T: int) -> np.ndarray:
    """`timesteps` as an int64 array of shape (S,), or ValueError that calls them `name`."""
    expected = f"a non-empty, strictly increasing sequence of integers in 0 ... {T - 1}"
    tau = _vector(name, timesteps, "iu", expected)
    outside = np.flatnonzero((tau < 0) | (tau >= T))
    if outside.size:
        raise ValueError(f"{name}[{outside[0]}] is {tau[outside[0]]}; expected {expected}.")
    tau = tau.astype(np.int64)
    stuck = np.flatnonzero(np.diff(tau) <= 0)
    if stuck.size:
        i = stuck[0] + 1
        raise ValueError(f"{name}[{i}] is {tau[i]}, after {tau[i - 1]}; expected {expected}.")
    return tau


def _checked_count(name: str, value: Any) -> int:
    """`value` as an int of at least 1, or ValueError."""
    try:
        count = 0 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")
    return count


def _checked_real(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
    """`value` as a finite float for which ``fits(value)`` is true, or ValueError."""
    try:
        real = math.nan if isinstance(value, str | bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        real = math.nan
    if not (math.isfinite(real) and fits(real)):
        raise ValueError(f"{name} is {value!r}; expected {expected}.")
    return real


def _checked_beta(name: str, value: Any) -> float:
    """`value` as a float in (0, 1], or ValueError."""
    return _checked_real(name, value, lambda beta: 0 < beta <= 1, "a real number in (0, 1]")
