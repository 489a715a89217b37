"""The metrics by name: pure functions from saved tensors to one value per image."""

from collections.abc import Callable

from torch import Tensor

from opticam.metrics.classification import average_drop, average_gain, average_increase, class_probability

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average_drop": average_drop,
    "average_gain": average_gain,
    "average_increase": average_increase,
}

__all__ = ["METRICS", "average_drop", "average_gain", "average_increase", "class_probability"]
