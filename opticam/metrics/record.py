"""What tables, figures and summaries have to know about a metric, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from math import inf
from typing import Any


@dataclass(eq=False)
class Metric:
    """A metric, called like its function: `METRICS["average_drop"](p, o)`.

    Attributes:
        function: of what it needs, to one value per image.
        heading: its name in tables and figures, short.
        higher: whether higher is better.
        factor: to multiply with for people, 100 for a percentage.
        proportion: whether the mean over images counts hits. The pointing game also gives parts of a hit.
        needs: the names of what the function takes: for `evaluate`, attributes of `BatchWithMaps`.
        span: the smallest and the largest value that there can be, where intervals of means end.
    """

    function: Callable[..., Any]
    heading: str
    higher: bool
    factor: float = 100
    proportion: bool = False
    needs: tuple[str, ...] = ("probs", "masked_probs")
    span: tuple[float, float] = (-inf, inf)

    def __post_init__(self) -> None:
        update_wrapper(self, self.function)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)
