"""The methods compared, by name: `METHODS[name](model, images, class_idx, *, layer=None) -> saliency (B,1,H,W)`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opticam.features import Layer
from opticam.methods.ascent import SCHEDULES
from opticam.methods.cam import fake_cam, grad_cam
from opticam.methods.opti_cam import OBJECTIVES, OptiCAMResult, class_logit, opti_cam


def _opti_cam_map(model: nn.Module, images: Tensor, class_idx: Tensor, **options: Any) -> Tensor:
    return opti_cam(model, images, class_idx, **options).saliency


def _equal_weights(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    return opti_cam(model, images, class_idx, layer=layer, num_steps=0).saliency


METHODS: dict[str, Callable[..., Tensor]] = {
    "fake_cam": fake_cam,
    "equal_weights": _equal_weights,  # Opti-CAM before its first step: the mean of the feature maps
    "grad_cam": grad_cam,
    "opti_cam": _opti_cam_map,
}


def find_method(name: str) -> Callable[..., Tensor]:
    """The method of that name in `METHODS`.

    Raises:
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "OBJECTIVES",
    "SCHEDULES",
    "OptiCAMResult",
    "class_logit",
    "fake_cam",
    "find_method",
    "grad_cam",
    "opti_cam",
]
