"""Do both sides compute the same? Asked before anything is timed.

In float64 the two differ by rounding only, in the output and in the gradient by every parameter. In float32
each is compared with PyTorch's float64 on the same input, and tinydiff's error with PyTorch's error. Both
are given the time's sinusoids rounded once from float64, so that only the arithmetic is compared (diffusers
itself computes the angles in float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SAME = 1e-9  # relative difference in float64
MOST = 4.0  # times PyTorch's float32 error


def relative_error(value: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Errors of the output and of all gradients as one vector, each in relation to its norm."""
    output = np.linalg.norm(value["output"] - reference["output"]) / np.linalg.norm(reference["output"])
    names = sorted(reference.keys() - {"output"})
    if names != sorted(value.keys() - {"output"}):
        raise ValueError("the two networks do not have the same parameters.")
    errors = np.asarray([np.linalg.norm(value[k].astype(np.float64) - reference[k]) for k in names])
    norms = np.asarray([np.linalg.norm(reference[k].astype(np.float64)) for k in names])
    # Adding the same to every score changes no softmax: the gradient by k's bias is 0, but for rounding.
    real = np.asarray([not k.endswith("to_k.bias") for k in names])
    worst = int(np.argmax(np.where(real, errors / np.maximum(norms, 1e-300), 0.0)))
    return {
        "output": float(output),
        "gradients": float(np.linalg.norm(errors) / np.linalg.norm(norms)),
        "worst_gradient": float(errors[worst] / norms[worst]),
        "worst_parameter": names[worst],
    }


def compare(
    ours: Mapping[str, np.ndarray],
    ours_64: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    theirs_64: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """From the output and gradients of each side in each precision: errors, ratios, and the two verdicts."""
    of_ours, of_theirs = relative_error(ours, theirs_64), relative_error(theirs, theirs_64)
    double = relative_error(ours_64, theirs_64)
    between = relative_error(ours, theirs)
    keys = ("output", "gradients", "worst_gradient")
    ratio = {key: of_ours[key] / max(of_theirs[key], 1e-300) for key in keys}
    return {
        "float64_difference": double,
        "float32_difference": between,
        "float32_error": {"tinydiff": of_ours, "PyTorch": of_theirs},
        "error_ratio": ratio,
        "same": max(double[key] for key in keys) <= SAME,
        "accurate": max(ratio["output"], ratio["gradients"]) <= MOST,
    }
