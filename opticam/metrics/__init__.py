"""The metrics by name: pure functions from saved tensors to one value per image.

SciPy, scikit-image and OpenCV are imported by the functions that need them: AD, AI and AG do not wait for them.
"""

from collections.abc import Callable

from torch import Tensor

from opticam.metrics.classification import (
    adcc,
    average_drop,
    average_gain,
    average_increase,
    class_probability,
    coherency,
    complexity,
    deletion,
    impute,
    insertion,
    insertion_deletion,
    road,
)
from opticam.metrics.localization import (
    box_experiment_masks,
    box_hits,
    box_mask,
    energy_pointing_game,
    localization_error,
    max_box_accuracy,
    official_metric,
    pointing_game,
    predicted_box,
    saliency_metric,
    soft_f1,
)
from opticam.metrics.randomization import (
    cascading,
    independent,
    randomized,
    rank_correlation,
    structural_similarity,
)

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average_drop": average_drop,
    "average_gain": average_gain,
    "average_increase": average_increase,
}

# columns whose mean over images counts hits; the pointing game may also give a part of one, where maxima are tied
PROPORTIONS = frozenset({"average_increase", "localization_error", "official_metric", "pointing_game"})

__all__ = [
    "METRICS",
    "PROPORTIONS",
    "adcc",
    "average_drop",
    "average_gain",
    "average_increase",
    "box_experiment_masks",
    "box_hits",
    "box_mask",
    "cascading",
    "class_probability",
    "coherency",
    "complexity",
    "deletion",
    "energy_pointing_game",
    "impute",
    "independent",
    "insertion",
    "insertion_deletion",
    "localization_error",
    "max_box_accuracy",
    "official_metric",
    "pointing_game",
    "predicted_box",
    "randomized",
    "rank_correlation",
    "road",
    "saliency_metric",
    "soft_f1",
    "structural_similarity",
]
