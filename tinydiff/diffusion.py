"""The Gaussian process: q (forward), its posterior, p (reverse), and the changes of variable between them.

Forward, the data x_0 loses its variance and gains noise, one link at a time or in one leap
(Ho et al. 2020, eq. 2 and 4), with alpha, beta and abar from the schedule:

    q(x_t | x_{t-1}) = N( sqrt(alpha_t) x_{t-1},  beta_t I )
    q(x_t | x_0)     = N( a x_0,  s^2 I ),        a = sqrt(abar_t),  s = sqrt(1 - abar_t)

Both keep unit variance. Backward, given where the chain began, Bayes' rule is Gaussian too (eq. 6 and 7):

    q(x_{t-1} | x_t, x_0) = N( mu~_t(x_t, x_0),  beta~_t I )

    mu~_t   = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0  +  sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
    beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)

The reverse process p(x_{t-1} | x_t) (eq. 1) puts a network's estimate in the place of the unknown x_0.

The network may predict x_0, the noise eps, or v (Salimans & Ho 2022). Because a^2 + s^2 = 1, the pair
(x_t, v) is the pair (x_0, eps) turned by one angle, and each of them follows from x_t and any other
(docs: F.6):

    x_t = a x_0 + s eps             x_0 = a x_t - s v
    v   = a eps - s x_0             eps = s x_t + a v

Or it predicts the flow of flow matching, eps - x_0, which is the same at every t (docs: F.11):

    x_t  = a x_0 + s eps            x_0 = (x_t - s flow) / (a + s)
    flow = eps - x_0                eps = (x_t + a flow) / (a + s)

The variance of the reverse steps lies between two extremes, beta~_t and beta_t (right for point data and for
standard normal data; docs: P.7). One formula, which interpolates between their logarithms, covers the fixed
and the learned variances (Nichol & Dhariwal 2021, eq. 15):

    log sigma_t^2 = f log beta_t + (1 - f) log beta~_t,       f = 0, 1, or (nu + 1) / 2 with a learned nu

Code index t = 0 ... T-1 is the paper's step t + 1, so x_{t-1} at t = 0 is the data itself.

References
----------
Ho, Jain & Abbeel 2020, *Denoising diffusion probabilistic models*.
Nichol & Dhariwal 2021, *Improved denoising diffusion probabilistic models*.
Salimans & Ho 2022, *Progressive distillation for fast sampling of diffusion models*, appendix D.
Liu, Gong & Liu 2023, *Flow straight and fast: learning to generate and transfer data with rectified flow*.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tinydiff._checks import check_choice, check_unmasked, class_or_kind
from tinydiff.backend import (
    Array,
    Namespace,
    array_namespace,
    clip_to_unit,
    column_like,
    library_of,
    to_numpy,
)
from tinydiff.schedules import NoiseSchedule, check_schedule

__all__ = ["GaussianDiffusion", "Prediction", "Variance", "check_diffusion", "matching"]

Prediction: TypeAlias = Literal["eps", "x0", "v", "flow"]
Variance: TypeAlias = Literal["fixed_small", "fixed_large", "learned_range"]


class GaussianDiffusion:
    """The forward process of a noise schedule and the reverse process of a network's predictions.

    Parameters
    ----------
    schedule : NoiseSchedule
        The betas. For fewer steps, take ``GaussianDiffusion(schedule.respace(timesteps), ...)``: all that
        depends on the betas follows from the new ones.
    prediction : {"eps", "x0", "v", "flow"}
        What the network's output is an estimate of: the noise, the data, v = a eps - s x0, or eps - x0.
    variance : {"fixed_small", "fixed_large", "learned_range"}
        The variance of the reverse steps (Ho et al. 2020, section 3.2): the posterior's beta~_t, right if the
        data is a single point, or beta_t, right if the data is standard normal. Or learned (Nichol & Dhariwal
        2021, eq. 15): the network's output has twice the data's size on the last axis. The first half is the
        prediction; the second is nu, which takes each element's variance from beta~_t, at nu = -1, to beta_t,
        at nu = 1, evenly in its logarithm. It is not clipped: beyond these, the variance lies outside.

    Attributes
    ----------
    log_variance_range : (ndarray, ndarray), each of shape (T,)
        log beta~_t and log beta_t, float64 on the host. beta~_0 is 0; as in Nichol & Dhariwal's code, beta~_1
        stands for it (in a chain of a single step beta_0, the only variance there is).
    model_variance : ndarray, shape (T,), or None
        The variance of each reverse step, float64 on the host; None if it is learned.

    Raises
    ------
    TypeError
        If `schedule` is not a `NoiseSchedule`.
    ValueError
        If `prediction` or `variance` is not one of the choices.

    Notes
    -----
    In all methods:

    - Arrays are floating, of one library (NumPy, CuPy, any that follows the array API standard) and one
      shape, batch axis first. The result has the library, device and dtype of the first array argument;
      the others are cast to its dtype.
    - ``t`` is an integer array of shape (N,) with values 0 ... T-1, on the host or beside the data, or one
      integer for the whole batch. It is read on the host, where the tables are: pass it as a NumPy array
      to keep a GPU from waiting.
    - A variance has shape (N, 1, ..., 1), which broadcasts against the data; a learned one has the data's.
    - ``output`` is all that the network returned: with `variance` ``"learned_range"``, both halves.
    - A wrong ``t``, dtype or shape, or a masked array, is a ValueError that names the argument; something
      that is not an array, or is of another library than the first, is a TypeError.

    Two differences from diffusers' ``DDPMScheduler``: the variance fixed_small at t = 0 is exactly 0 here,
    where diffusers clamps it to 1e-20 (and then adds no noise there); and x0 is clipped only if asked, where
    diffusers' default is ``clip_sample=True``.
    """

    def __init__(
        self, schedule: NoiseSchedule, prediction: Prediction = "eps", variance: Variance = "fixed_small"
    ) -> None:
        check_schedule(schedule)
        self.schedule = schedule
        self.prediction: Prediction = check_choice("prediction", prediction, get_args(Prediction))
        self.variance: Variance = check_choice("variance", variance, get_args(Variance))
        fixed = {"fixed_small": schedule.posterior_variance, "fixed_large": schedule.betas}
        self.model_variance = fixed.get(self.variance)
        # log beta~ as a sum of logarithms: beta~ itself underflows where betas are tiny.
        log_betas = np.log(schedule.betas)
        log_noise = np.log(schedule.one_minus_alphas_cumprod)
        log_small = np.concat([log_betas[:1], log_betas[1:] + log_noise[:-1] - log_noise[1:]])
        log_small[0] = log_small[min(1, schedule.T - 1)]
        self.log_variance_range = (log_small, log_betas)

    @property
    def T(self) -> int:
        """Number of steps."""
        return self.schedule.T

    def __repr__(self) -> str:
        choices = f"prediction={self.prediction!r}, variance={self.variance!r}"
        return f"GaussianDiffusion({self.schedule!r}, {choices})"

    # q: from data to noise

    def q_step(self, x_prev: Array, t: Array | int, noise: Array) -> Array:
        """Make one link of the chain, x_{t-1} -> x_t (Ho et al. 2020, eq. 2; docs: F.1).

        Parameters
        ----------
        x_prev : array, shape (N, ...)
            x_{t-1}; at t = 0 the data.
        t : integer array, shape (N,), or int
            The step to make.
        noise : array, shape of `x_prev`
            Standard normal.

        Returns
        -------
        array, shape of `x_prev`
            sqrt(alpha_t) x_{t-1} + sqrt(beta_t) noise.
        """
        x_prev, noise = matching(x_prev=x_prev, noise=noise)
        t = self._on_host(t, x_prev)
        alpha, beta = self.schedule.alphas[t], self.schedule.betas[t]
        return column_like(np.sqrt(alpha), x_prev) * x_prev + column_like(np.sqrt(beta), x_prev) * noise

    def q_sample(self, x0: Array, t: Array | int, noise: Array) -> Array:
        """Draw x_t from the marginal q(x_t | x_0) in one leap (Ho et al. 2020, eq. 4; docs: F.2).

        Parameters
        ----------
        x0 : array, shape (N, ...)
            The data.
        t : integer array, shape (N,), or int
            The step to leap to.
        noise : array, shape of `x0`
            eps, standard normal.

        Returns
        -------
        array, shape of `x0`
            sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
        """
        x0, noise = matching(x0=x0, noise=noise)
        a, s = self._rates(x0, t)
        return a * x0 + s * noise

    def q_mean_variance(self, x0: Array, t: Array | int) -> tuple[Array, Array]:
        """Return mean and variance of the marginal q(x_t | x_0) (Ho et al. 2020, eq. 4; docs: F.2).

        Parameters
        ----------
        x0 : array, shape (N, ...)
            The data.
        t : integer array, shape (N,), or int
            The step.

        Returns
        -------
        mean : array, shape of `x0`
            sqrt(abar_t) x_0.
        variance : array, shape (N, 1, ..., 1)
            1 - abar_t.
        """
        (x0,) = matching(x0=x0)
        t = self._on_host(t, x0)
        abar, one_minus_abar = self.schedule.alphas_cumprod[t], self.schedule.one_minus_alphas_cumprod[t]
        return column_like(np.sqrt(abar), x0) * x0, column_like(one_minus_abar, x0)

    def q_posterior_mean_variance(self, x0: Array, x_t: Array, t: Array | int) -> tuple[Array, Array]:
        """Return mean and variance of the posterior q(x_{t-1} | x_t, x_0) (docs: P.1).

        Source: Ho et al. 2020, eq. 6 and 7. It holds at both ends, t = 0 and beta_t = 1, too (docs: P.3).

        Parameters
        ----------
        x0 : array, shape (N, ...)
            The data.
        x_t : array, shape of `x0`
            The noisy data.
        t : integer array, shape (N,), or int
            The step of `x_t`.

        Returns
        -------
        mean : array, shape of `x0`
            mu~_t; at t = 0 it is `x0` itself.
        variance : array, shape (N, 1, ..., 1)
            beta~_t; at t = 0 it is 0.
        """
        x0, x_t = matching(x0=x0, x_t=x_t)
        t = self._on_host(t, x0)
        alpha, beta = self.schedule.alphas[t], self.schedule.betas[t]
        abar_prev = self.schedule.alphas_cumprod_prev[t]
        one_minus_abar = self.schedule.one_minus_alphas_cumprod[t]
        one_minus_abar_prev = self.schedule.one_minus_alphas_cumprod_prev[t]
        weight_x0 = np.sqrt(abar_prev) * (beta / one_minus_abar)
        weight_x_t = np.sqrt(alpha) * (one_minus_abar_prev / one_minus_abar)
        mean = column_like(weight_x0, x0) * x0 + column_like(weight_x_t, x0) * x_t
        return mean, column_like(self.schedule.posterior_variance[t], x0)

    # Changes of variable: from x_t and any one of eps, x0, v and flow to the others

    def training_target(self, x0: Array, t: Array | int, noise: Array) -> Array:
        """Return what a perfect network would output for ``q_sample(x0, t, noise)`` (docs: F.10).

        Parameters
        ----------
        x0 : array, shape (N, ...)
            The data.
        t : integer array, shape (N,), or int
            The step.
        noise : array, shape of `x0`
            The eps that went into x_t.

        Returns
        -------
        array, shape of `x0`
            By ``self.prediction``: `noise` (the target in Ho et al. 2020, eq. 12 and 14), `x0`,
            v = a eps - s x0 (Salimans & Ho 2022), or eps - x0 (Liu, Gong & Liu 2023, eq. 1, where it has the
            other sign).
        """
        x0, noise = matching(x0=x0, noise=noise)
        if self.prediction == "v":
            a, s = self._rates(x0, t)
            return a * noise - s * x0
        self._on_host(t, x0)  # refuses a wrong t
        if self.prediction == "flow":
            return noise - x0
        return noise if self.prediction == "eps" else x0

    def predict_x0(self, x_t: Array, t: Array | int, output: Array, given: Prediction | None = None) -> Array:
        """Return the estimate of the data x_0 that `output` implies (docs: F.7).

        Parameters
        ----------
        x_t : array, shape (N, ...)
            What the network was shown.
        t : integer array, shape (N,), or int
            The step of `x_t`.
        output : array, shape of `x_t` (learned variance: twice that on the last axis)
            What it answered.
        given : {"eps", "x0", "v", "flow"}, optional
            What `output` is an estimate of; it then has `x_t`'s shape. Default: `output` is the network's
            answer, with an estimate of ``self.prediction``.

        Returns
        -------
        array, shape of `x_t`
            From eps: (x_t - s eps) / a (Ho et al. 2020, eq. 15); from v: a x_t - s v (Salimans & Ho 2022);
            from flow: (x_t - s flow) / (a + s).

        Raises
        ------
        ValueError
            Besides the usual, if `output` is eps where a is 0, or too small for the dtype to divide by:
            nothing of x_0 is in x_t then.
        """
        x_t, output, given = self._prediction_of(x_t, output, given)
        a, s = self._rates(x_t, t)
        if given == "x0":
            return output
        if given == "v":
            return a * x_t - s * output
        if given == "flow":
            return (x_t - s * output) / (a + s)
        self._require_signal(t, x_t)
        return (x_t - s * output) / a

    def predict_eps(
        self, x_t: Array, t: Array | int, output: Array, given: Prediction | None = None
    ) -> Array:
        """Return the estimate of the noise eps that `output` implies (docs: F.8).

        Parameters
        ----------
        x_t, t, output, given
            As in `predict_x0`.

        Returns
        -------
        array, shape of `x_t`
            From x0: (x_t - a x_0) / s (Ho et al. 2020, eq. 4); from v: s x_t + a v (Salimans & Ho 2022); from
            flow: (x_t + a flow) / (a + s).
        """
        x_t, output, given = self._prediction_of(x_t, output, given)
        a, s = self._rates(x_t, t)
        if given == "eps":
            return output
        if given == "v":
            return s * x_t + a * output
        if given == "flow":
            return (x_t + a * output) / (a + s)
        return (x_t - a * output) / s

    def predict_v(self, x_t: Array, t: Array | int, output: Array, given: Prediction | None = None) -> Array:
        """Return the estimate of v = a eps - s x_0 that `output` implies (Salimans & Ho 2022; docs: F.9).

        Parameters
        ----------
        x_t, t, output, given
            As in `predict_x0`.

        Returns
        -------
        array, shape of `x_t`
            From eps: (eps - s x_t) / a; from x0: (a x_t - x_0) / s; from flow:
            (flow + (a - s) x_t) / (a + s).

        Raises
        ------
        ValueError
            As in `predict_x0`: where a is 0, v is -x_0.
        """
        x_t, output, given = self._prediction_of(x_t, output, given)
        a, s = self._rates(x_t, t)
        if given == "v":
            return output
        if given == "x0":
            return (a * x_t - output) / s
        if given == "flow":
            return (output + (a - s) * x_t) / (a + s)
        self._require_signal(t, x_t)
        return (output - s * x_t) / a

    def predict_flow(
        self, x_t: Array, t: Array | int, output: Array, given: Prediction | None = None
    ) -> Array:
        """Return the estimate of eps - x_0 that `output` implies (docs: F.11).

        Parameters
        ----------
        x_t, t, output, given
            As in `predict_x0`.

        Returns
        -------
        array, shape of `x_t`
            From eps: ((a + s) eps - x_t) / a; from x0: (x_t - (a + s) x_0) / s; from v:
            (a + s) v - (a - s) x_t.

        Raises
        ------
        ValueError
            As in `predict_x0`.
        """
        x_t, output, given = self._prediction_of(x_t, output, given)
        a, s = self._rates(x_t, t)
        if given == "flow":
            return output
        if given == "v":
            return (a + s) * output - (a - s) * x_t
        if given == "x0":
            return (x_t - (a + s) * output) / s
        self._require_signal(t, x_t)
        return ((a + s) * output - x_t) / a

    # p: from noise to data

    def p_mean_variance(
        self, x_t: Array, t: Array | int, output: Array, clip: bool = False
    ) -> tuple[Array, Array]:
        """Return mean and variance of the reverse step p(x_{t-1} | x_t) (Ho et al. 2020, eq. 1; docs: P.5).

        The mean is the posterior's, with the network's estimate in the place of x_0. Without clipping, and
        written in eps, that is eq. 11 (docs: P.4): (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t).

        Parameters
        ----------
        x_t, t, output
            As in `predict_x0`; with a learned variance, `output` is the prediction and nu.
        clip : bool
            Clip the estimate of x_0 to [-1, 1] first; right for images, wrong for data that leaves [-1, 1].

        Returns
        -------
        mean : array, shape of `x_t`
            At t = 0 the estimate of x_0 itself.
        variance : array, shape (N, 1, ..., 1), or of `x_t` if learned
            beta~_t or beta_t, by ``self.variance``, or what nu makes of the two, element by element
            (`model_log_variance`). At t = 0 the former two are 0 and beta_0, but a sampler adds no noise
            after the last step.

        Raises
        ------
        ValueError
            Besides the usual, if `output` is eps where that says nothing of x_0 (see `predict_x0`).
        """
        x0 = self.predict_x0(x_t, t, output)
        if clip:
            x0 = clip_to_unit(x0)
        mean, _ = self.q_posterior_mean_variance(x0, x_t, t)
        if self.model_variance is None:
            return mean, array_namespace(x0).exp(self.model_log_variance(x_t, t, output))
        return mean, column_like(self.model_variance[self._on_host(t, x_t)], x_t)

    def model_log_variance(self, x_t: Array, t: Array | int, output: Array) -> Array:
        """Return the logarithm of the reverse step's variance.  (docs: V.1)

        (Nichol & Dhariwal 2021, eq. 15.) It is finite at t = 0, too, where ``"fixed_small"`` is the beta~_1
        of ``log_variance_range``: the likelihood of the data needs a density there, where a sampler only
        takes the mean.

        Parameters
        ----------
        x_t, t, output
            As in `predict_x0`.

        Returns
        -------
        array, shape (N, 1, ..., 1), or of `x_t` if learned
        """
        _, nu = self.split_output(x_t, output)
        log_small, log_large = self.log_variance_range
        t = self._on_host(t, x_t)
        if nu is None:
            return column_like((log_small if self.variance == "fixed_small" else log_large)[t], x_t)
        x_t, nu = matching(x_t=x_t, nu=nu)
        middle, half = (log_large + log_small) / 2, (log_large - log_small) / 2
        return column_like(middle[t], x_t) + nu * column_like(half[t], x_t)

    def split_output(self, x_t: Array, output: Array) -> tuple[Array, Array | None]:
        """Return the two halves of `output`, each of `x_t`'s shape: prediction and nu.  (docs: V.1)

        Unless the variance is learned the prediction is all there is, and nu is None.

        Parameters
        ----------
        x_t, output
            As in `predict_x0`.
        """
        if self.variance != "learned_range":
            matching(x_t=x_t, output=output)
            return output, None
        (x_t,), _ = matching(x_t=x_t), matching(output=output)
        C = x_t.shape[-1]
        if x_t.ndim < 2 or output.shape != (*x_t.shape[:-1], 2 * C):
            raise ValueError(
                f"output has shape {output.shape}, x_t {x_t.shape}; expected twice x_t's last axis (of at "
                "least two): with variance 'learned_range' a network returns its prediction and nu."
            )
        prediction, nu = output[..., :C], output[..., C:]
        matching(x_t=x_t, output=prediction)
        return prediction, nu

    # Gathering: float64 tables on the host, cast at the moment of use

    def _rates(self, x: Array, t: Array | int) -> tuple[Array, Array]:
        """The rates of signal and noise, a = sqrt(abar_t) and s = sqrt(1 - abar_t), (N, 1, ..., 1)."""
        t = self._on_host(t, x)
        abar, one_minus_abar = self.schedule.alphas_cumprod[t], self.schedule.one_minus_alphas_cumprod[t]
        return column_like(np.sqrt(abar), x), column_like(np.sqrt(one_minus_abar), x)

    def _on_host(self, t: Any, x: Array) -> np.ndarray:
        """`t` as a NumPy array of shape (N,) for the batch `x`, or ValueError."""
        N = x.shape[0]
        steps = to_numpy(t)
        check_unmasked("t", steps)
        if steps.dtype.kind not in "iu":
            raise ValueError(f"t has dtype {steps.dtype}; expected integers.")
        if steps.shape not in ((), (N,)):
            raise ValueError(f"t has shape {steps.shape}; expected ({N},), one step for each of the batch.")
        outside = steps[(steps < 0) | (steps >= self.T)]
        if outside.size:
            raise ValueError(f"t contains {outside[0]}; expected 0 ... {self.T - 1}.")
        return steps if steps.shape == (N,) else np.broadcast_to(steps, (N,))

    def _require_signal(self, t: Any, x_t: Array) -> None:
        """ValueError where `x_t` holds nothing of x_0, so that an estimate of eps says nothing of it."""
        steps = self._on_host(t, x_t)
        abar = self.schedule.alphas_cumprod[steps]
        lost = np.sqrt(abar) < array_namespace(x_t).finfo(x_t.dtype).smallest_normal  # 1/a would be infinite
        if lost.any():
            first = int(np.argmax(lost))
            raise ValueError(
                f"t contains {steps[first]}, where alphas_cumprod is {abar[first]:.3g}: in {x_t.dtype} x_t "
                "is all noise there and eps says nothing of x0; use prediction 'x0', 'v' or 'flow'."
            )

    def _prediction_of(
        self, x_t: Array, output: Array, given: Prediction | None
    ) -> tuple[Array, Array, Prediction]:
        """`x_t` and the estimate in `output`, checked, and what it is an estimate of."""
        if given is None:
            output, _ = self.split_output(x_t, output)
            given = self.prediction
        x_t, output = matching(x_t=x_t, output=output)
        return x_t, output, check_choice("given", given, get_args(Prediction))


def check_diffusion(diffusion: Any) -> None:
    """TypeError unless it is a `GaussianDiffusion`: a schedule is refused, and a model in the wrong place."""
    if not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion is {class_or_kind(diffusion)}; expected a GaussianDiffusion.")


def matching(**arrays: Array) -> tuple[Array, ...]:
    """The named arrays, checked to be floating, of the first one's library and shape; cast to its dtype."""
    first, x = next(iter(arrays.items()))
    checked = []
    for name, array in arrays.items():
        try:
            xp = array_namespace(array)
        except TypeError:
            raise TypeError(f"{name} is {class_or_kind(array)}; expected an array.") from None
        check_unmasked(name, array)
        if not _is_floating(xp, array.dtype):
            raise ValueError(f"{name} has dtype {array.dtype}; expected a real floating one.")
        if array.ndim == 0:
            raise ValueError(f"{name} has shape (); expected a batch axis.")
        if xp is not array_namespace(x):
            came, expected = library_of(array), library_of(x)
            raise TypeError(f"{name} is an array of {came}; expected {expected}, like {first}.")
        if array.shape != x.shape:
            raise ValueError(f"{name} has shape {array.shape}; expected {x.shape}, like {first}.")
        checked.append(array if array.dtype == x.dtype else xp.astype(array, x.dtype))
    return tuple(checked)


@functools.cache
def _is_floating(xp: Namespace, dtype: Any) -> bool:
    """Whether numbers of a library's dtype are real and floating; asked several times a step."""
    return xp.isdtype(dtype, "real floating")
