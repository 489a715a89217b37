"""The metrics by name: pure functions from saved tensors to one value per image."""

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

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average_drop": average_drop,
    "average_gain": average_gain,
    "average_increase": average_increase,
}

__all__ = [
    "METRICS",
    "adcc",
    "average_drop",
    "average_gain",
    "average_increase",
    "class_probability",
    "coherency",
    "complexity",
    "deletion",
    "impute",
    "insertion",
    "insertion_deletion",
    "road",
]
