"""What tables, figures and pages have to know about a method, in one record."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(eq=False, repr=False)
class Method:
    """A method, called like its function: `METHODS["grad_cam"](model, images, class_idx, layer=None)`.

    Attributes:
        function: from `(model, images, class_idx, *, layer=None, ...)` to saliency (B,1,H,W) in [0,1].
        label: its name in tables and figures.
        color: of its bars and points, "#rrggbb".
        cost: "light" for about the passes of Opti-CAM at most, "heavy" for hundreds or thousands.
        needs: "" for any network with feature maps, "attention" for a vision transformer, "layers" for several layers
            chosen by the caller.
    """

    function: Callable[..., Tensor]
    label: str
    color: str
    cost: Literal["light", "heavy"] = "light"
    needs: Literal["", "attention", "layers"] = ""

    def __repr__(self) -> str:  # without an address, so that keys of rows are the same in every process
        function = self.function
        return f"{function.__module__}.{function.__qualname__}" if inspect.isfunction(function) else repr(function)

    def __post_init__(self) -> None:
        update_wrapper(self, self.function)  # its help, its signature, and what stands for it in keys of rows

    def __call__(self, model: nn.Module, images: Tensor, class_idx: Tensor, **options: Any) -> Tensor:
        return self.function(model, images, class_idx, **options)
