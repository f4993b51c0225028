"""How far samples are from data: points in `sliced` and `discrepancy`, digits in `frechet` and `digits`.

Between two finite sets of the same density each distance is not 0 but at its sampling floor. A number is
judged beside that floor, the same distance between data and other data.
"""

from tinydiff.metrics.digits import (
    class_shares,
    digit_classifier,
    digit_features,
    digit_frechet_distance,
    digit_probabilities,
    digit_report,
    nearest_distances,
)
from tinydiff.metrics.discrepancy import (
    PermutationResult,
    energy_distance,
    mmd_squared,
    permutation_test,
)
from tinydiff.metrics.frechet import frechet_distance
from tinydiff.metrics.sliced import sliced_wasserstein

__all__ = [
    "PermutationResult",
    "class_shares",
    "digit_classifier",
    "digit_features",
    "digit_frechet_distance",
    "digit_probabilities",
    "digit_report",
    "energy_distance",
    "frechet_distance",
    "mmd_squared",
    "nearest_distances",
    "permutation_test",
    "sliced_wasserstein",
]
