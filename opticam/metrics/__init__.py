"""The metrics by name: records of functions, most of them from saved tensors to one value per image.

SciPy, scikit-image and OpenCV are imported by the functions that need them: AD, AI and AG do not wait for them.
"""

from collections import ChainMap
from collections.abc import Collection

from opticam.classifier import class_logit
from opticam.metrics.classification import (
    adcc,
    arcc,
    average_drop,
    average_gain,
    average_increase,
    class_probability,
    coherency,
    complexity,
    deletion,
    gain_minus_drop,
    impute,
    insertion,
    insertion_deletion,
    log_odds_change,
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
from opticam.metrics.randomization import cascading, independent, randomized, rank_correlation, structural_similarity
from opticam.metrics.record import Metric

_UNIT, _SIGNED = (0.0, 1.0), (-1.0, 1.0)

METRICS: dict[str, Metric] = {
    "average_drop": Metric(average_drop, "AD", higher=False, span=_UNIT),
    "average_gain": Metric(average_gain, "AG", higher=True, span=_UNIT),
    "average_increase": Metric(average_increase, "AI", higher=True, proportion=True, span=_UNIT),
}
"""Those of the probabilities p of the image and o of the masked image that lie in [0,1]."""

_MAP, _BOXES = ("saliency",), ("saliency", "boxes")
_PASSES = ("model", "images", "class_idx", "saliency")
_PAIR = ("saliency", "other")
_LOGITS = ("logits", "masked_logits", "class_idx", "head")

COLUMNS: ChainMap[str, Metric] = ChainMap(
    {
        "gain_minus_drop": Metric(gain_minus_drop, "AG - AD", True, span=_SIGNED),
        "log_odds": Metric(log_odds_change, "log-odds", True, factor=1, needs=_LOGITS),
        "masked_logit": Metric(class_logit, "masked logit", True, factor=1, needs=("masked_logits", "class_idx")),
        "insertion": Metric(insertion, "insertion", True, span=_UNIT, needs=_PASSES),
        "deletion": Metric(deletion, "deletion", False, span=_UNIT, needs=_PASSES),
        "road": Metric(road, "ROAD", True, span=(-1 / 2, 1 / 2), needs=_PASSES),
        "coherency": Metric(coherency, "coherency", True, span=_UNIT, needs=_PAIR),
        "complexity": Metric(complexity, "complexity", False, span=_UNIT, needs=_MAP),
        "adcc": Metric(adcc, "ADCC", True, span=_UNIT, needs=(*_PAIR, "drop")),
        "arcc": Metric(arcc, "ARCC", True, span=_UNIT, needs=(*_PAIR, "road")),
        "localization_error": Metric(localization_error, "LE", False, proportion=True, span=_UNIT, needs=_BOXES),
        "official_metric": Metric(
            official_metric, "OM", False, proportion=True, span=_UNIT, needs=(*_BOXES, "correct")
        ),
        "soft_f1": Metric(soft_f1, "F1", True, span=_UNIT, needs=_BOXES),
        "pointing_game": Metric(pointing_game, "SP", True, proportion=True, span=_UNIT, needs=_BOXES),
        "energy_pointing_game": Metric(energy_pointing_game, "EP", True, span=_UNIT, needs=_BOXES),
        "saliency_metric": Metric(saliency_metric, "SM", False, factor=1, needs=_PASSES),
        "rank_correlation": Metric(rank_correlation, "rank correlation", False, factor=1, span=_SIGNED, needs=_PAIR),
        "ssim": Metric(structural_similarity, "SSIM", False, factor=1, span=_SIGNED, needs=_PAIR),
    },
    METRICS,
)
"""All that tables have columns of. What is added here is a score of `evaluate`, where that knows what it needs."""


def probability_metrics() -> dict[str, Metric]:
    """Those of `COLUMNS` that need nothing but p and o: every scored map has them."""
    return {name: metric for name, metric in COLUMNS.items() if metric.needs == Metric.needs}


def factors(columns: Collection[str]) -> dict[str, float]:
    """What each column is multiplied with for people; 1 for a column without a record."""
    return {column: COLUMNS[column].factor if column in COLUMNS else 1 for column in columns}


def headings(columns: Collection[str], unit: bool = True) -> dict[str, str]:
    """Column -> its heading in a table, `AD % ↓`, or in a figure, `AD ↓`; a column without a record by its own name."""
    found = {column: column for column in columns}
    for column in COLUMNS.keys() & found:
        metric = COLUMNS[column]
        percent = " %" if unit and metric.factor == 100 else ""
        found[column] = f"{metric.heading}{percent} {'↑' if metric.higher else '↓'}"
    return found
