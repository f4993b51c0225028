"""Which t to train on: importance sampling for the variational bound.

The terms of L_vlb differ by orders of magnitude over t, so that t drawn uniformly makes a noisy estimate.
Drawn with probabilities p_t and weighted by their inverse, the terms still have the same expectation, and the
variance is least where p_t is in proportion to the root of the term's second moment (Nichol & Dhariwal 2021,
eq. 18 and section 3.3). L_t is the term at the code's t; in the papers' numbering it is L_{t-1} (docs: V.7):

    L_vlb = E_{t ~ p} [ L_t / p_t ],        p_t = sqrt( E[L_t^2] ) / sum_k sqrt( E[L_k^2] )

The second moments are not known in advance and change as the network learns. A history of the last few terms
at each t stands for them; t is uniform until every history is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinydiff._checks import check_counts, check_number, check_rng
from tinydiff.backend import Array, to_float64, to_numpy

__all__ = ["LossSecondMomentSampler"]


class LossSecondMomentSampler:
    """Draws t with probabilities in proportion to the root of the second moment of L_t.

    Parameters
    ----------
    T : int
        Number of steps.
    history : int
        How many terms to remember for each t (10 in the paper).
    uniform : float
        Share of t drawn uniformly all the same, in (0, 1]: a t whose terms happened to be 0 is not lost for
        ever, and no weight exceeds 1 / uniform. (rho in docs: V.8.)

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, T: int, history: int = 10, uniform: float = 1e-3) -> None:
        check_counts(T=T, history=history)
        check_number("uniform", uniform, lambda share: 0 < share <= 1, "a number in (0, 1]")
        self.uniform = float(uniform)
        self._history = np.zeros((T, history))
        self._counts = np.zeros(T, dtype=np.int64)  # terms seen in all; the next goes to counts % history

    @property
    def T(self) -> int:
        """Number of steps."""
        return self._history.shape[0]

    def probabilities(self) -> np.ndarray:
        """p_t, of shape (T,): uniform until the history is full at every t.  (docs: V.7, V.8)"""
        even = np.full(self.T, 1 / self.T)
        if np.any(self._counts < self._history.shape[1]):
            return even
        largest = np.max(np.abs(self._history))
        if largest == 0:
            return even
        root = np.sqrt(np.mean(np.square(self._history / largest), axis=1))  # of ratios: nothing overflows
        return (1 - self.uniform) * root / np.sum(root) + self.uniform * even

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw n times.  (docs: V.6)

        Parameters
        ----------
        n : int
            How many, at least 1.
        rng : numpy.random.Generator
            Where the randomness comes from.

        Returns
        -------
        t : ndarray of int64, shape (n,)
            0 … T-1.
        weights : ndarray of float64, shape (n,)
            1 / (T p_t): the mean of weight * L_t is an unbiased estimate of the mean of L_t over all t.

        Raises
        ------
        ValueError
            If `n` is not a count.
        TypeError
            If `rng` is not a generator.
        """
        check_counts(n=n)
        check_rng(rng)
        p = self.probabilities()
        t = rng.choice(self.T, size=n, p=p)
        return t, 1 / (self.T * p[t])

    def update(self, t: Array, losses: Array) -> None:
        """Remember terms.

        Parameters
        ----------
        t : integer array of shape (n,)
            Times.
        losses : array of shape (n,)
            L_t of each, without weight.

        Raises
        ------
        ValueError
            If the shapes differ, a t is out of range, or a loss is not finite; nothing is remembered then.
        """
        t, losses = to_numpy(t), to_float64(losses)
        if t.ndim != 1 or losses.shape != t.shape:
            raise ValueError(
                f"losses has shape {losses.shape}, t {t.shape}; expected (n,), one loss for each t."
            )
        if t.dtype.kind not in "iu" or np.any((t < 0) | (t >= self.T)):
            raise ValueError(f"t is {t}; expected integers in 0 ... {self.T - 1}.")
        if not np.all(np.isfinite(losses)):
            raise ValueError("losses holds a value that is not finite.")
        for step, loss in zip(t, losses, strict=True):
            self._history[step, self._counts[step] % self._history.shape[1]] = loss
            self._counts[step] += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return what is remembered: ``history`` (T, history) and ``counts`` (T,), copies."""
        return {"history": self._history.copy(), "counts": self._counts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises
        ------
        ValueError
            If a name is missing or a shape differs; nothing is changed then.
        """
        for name, own in self.state_dict().items():
            shape = None if name not in state else tuple(state[name].shape)
            if shape != own.shape:
                raise ValueError(f"state[{name!r}] has shape {shape}; expected {own.shape}.")
        self._history = np.array(to_numpy(state["history"]), dtype=np.float64)
        self._counts = np.array(to_numpy(state["counts"]), dtype=np.int64)
