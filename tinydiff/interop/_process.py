"""A process across the border to diffusers' schedulers, in both directions.

A scheduler's config says two things: under what a network was trained (the betas, what is predicted, the
variance), which is a `GaussianDiffusion`; and how to walk back from noise (times, clipping, the order of a
solver), which is left to the arguments of `tinydiff.sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinydiff.diffusion import GaussianDiffusion, Prediction, Variance, check_diffusion
from tinydiff.interop._config import check_mapping, is_count, is_number, require, require_fixed
from tinydiff.schedules import NoiseSchedule, cosine_schedule

__all__ = ["SCHEDULERS", "diffusion_from_diffusers", "diffusion_to_diffusers"]

# Those of diffusers 0.42 whose networks see sqrt(abar) x_0 + sqrt(1 - abar) eps and the index t.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)

# What a config means where it is silent.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "variance_type": None,
}
OTHER_DEFAULTS = {name: {"beta_start": 0.00085, "beta_end": 0.012} for name in SCHEDULERS[-3:]}

# Entries that some of them have; with other values a network would see or predict something else.
FIXED: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False,),
    "timestep_type": ("discrete",),
    "predict_epsilon": (True,),  # until diffusers 0.8
    "snr_shift_scale": (1,),
}

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

# Schedulers that draw no noise have no variance type. "_log" is only how diffusers computes the same numbers.
VARIANCES: dict[str | None, Variance] = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}

BETAS = {
    "linear": lambda start, end, T: np.linspace(start, end, T),
    "scaled_linear": lambda start, end, T: np.linspace(start**0.5, end**0.5, T) ** 2,
    "squaredcos_cap_v2": lambda start, end, T: cosine_schedule(T).betas,
    "sigmoid": lambda start, end, T: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))),
}


def diffusion_from_diffusers(config: Mapping[str, Any]) -> GaussianDiffusion:
    """Return the process that the network of a diffusers scheduler was trained under.

    Parameters
    ----------
    config : mapping
        The scheduler's configuration, as in diffusers' ``scheduler_config.json``, or ``scheduler.config``;
        what is left out has diffusers' default. Entries that say how to sample
        (``clip_sample``, ``timestep_spacing``, ``use_karras_sigmas``, ...) are not read: say it to
        `tinydiff.sample`.

    Returns
    -------
    GaussianDiffusion
        With betas in float64, where diffusers rounds them to float32.

    Raises
    ------
    ValueError
        If the scheduler is of another class than `SCHEDULERS`, or an entry is not supported; the message
        names it.
    TypeError
        If `config` is not a mapping.
    """
    check_mapping("config", config)
    if "_use_default_values" in config and not {"_class_name", "beta_schedule"} & set(config):
        raise ValueError(  # a newly made scheduler's config has all entries, but not the class
            "config is of a scheduler of diffusers that has no 'beta_schedule'; expected one of "
            f"{', '.join(SCHEDULERS)}."
        )
    c = {"_class_name": SCHEDULERS[0], **DEFAULTS, **config}
    require(c, "_class_name", c["_class_name"] in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")
    c |= {**OTHER_DEFAULTS.get(c["_class_name"], {}), **config}
    require_fixed(c, FIXED)
    for key, known in (("prediction_type", PREDICTIONS), ("variance_type", VARIANCES)):
        require(c, key, c[key] in list(known), f"one of {', '.join(map(repr, known))}")
    return GaussianDiffusion(_schedule(c), PREDICTIONS[c["prediction_type"]], VARIANCES[c["variance_type"]])


def _schedule(c: Mapping[str, Any]) -> NoiseSchedule:
    T, betas = c["num_train_timesteps"], c["trained_betas"]
    require(c, "num_train_timesteps", is_count(T), "a positive integer")
    if betas is None:
        for key in ("beta_start", "beta_end"):
            require(c, key, is_number(c[key]) and 0 < c[key] <= 1, "a number in (0, 1]")
        kind = c["beta_schedule"]
        require(c, "beta_schedule", kind in list(BETAS), f"one of {', '.join(BETAS)}, or trained_betas")
        betas = BETAS[kind](c["beta_start"], c["beta_end"], T)
    schedule = NoiseSchedule(betas)
    require(c, "num_train_timesteps", schedule.T == T, f"{schedule.T}, as many as trained_betas")
    rescale = c["rescale_betas_zero_snr"]
    require(c, "rescale_betas_zero_snr", isinstance(rescale, bool), "True or False")
    return _ending_in_noise(schedule) if rescale and T > 1 else schedule


def _ending_in_noise(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule with sqrt(abar) shifted to end at 0, and scaled to begin as before.

    (Lin et al. 2023, *Common diffusion noise schedules and sample steps are flawed*, algorithm 1. All betas
    but the first are ratios, from which a scale cancels.)
    """
    root = np.sqrt(schedule.alphas_cumprod)
    abar = (root - root[-1]) ** 2
    return NoiseSchedule(np.concat([schedule.betas[:1], 1 - abar[1:] / abar[:-1]]))


def diffusion_to_diffusers(diffusion: GaussianDiffusion, clip: bool = False) -> dict[str, Any]:
    """Return the config of a diffusers ``DDPMScheduler`` with this process.

    Parameters
    ----------
    diffusion : GaussianDiffusion
        The process.
    clip : bool
        Whether the scheduler clips x0 to [-1, 1], as the argument of `tinydiff.sample`.

    Returns
    -------
    dict
        As in diffusers' ``scheduler_config.json``: ``DDPMScheduler.from_config(config)``, or another of
        `SCHEDULERS`. Fewer steps are spaced as here (docs: S.7).

    Raises
    ------
    TypeError
        If `diffusion` is not a `GaussianDiffusion`.
    ValueError
        If its prediction is "flow".
    """
    check_diffusion(diffusion)
    prediction = {ours: theirs for theirs, ours in PREDICTIONS.items()}.get(diffusion.prediction)
    if prediction is None:
        raise ValueError(
            f"diffusion has prediction {diffusion.prediction!r}, which is not known to the schedulers of "
            f"diffusers whose networks see x_t as ours do; expected one of {', '.join(PREDICTIONS.values())}."
        )
    return {
        "_class_name": SCHEDULERS[0],
        "num_train_timesteps": diffusion.T,
        "trained_betas": diffusion.schedule.betas.tolist(),
        "prediction_type": prediction,
        "variance_type": diffusion.variance,
        "clip_sample": bool(clip),
        "timestep_spacing": "linspace",
    }
