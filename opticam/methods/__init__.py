"""The methods compared, by name: `METHODS[name](model, images, class_idx, *, layer=None) -> saliency (B,1,H,W)`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opticam.methods.cam import fake_cam, grad_cam
from opticam.methods.opti_cam import OBJECTIVES, SCHEDULES, OptiCAMResult, class_logit, opti_cam


def _opti_cam_map(model: nn.Module, images: Tensor, class_idx: Tensor, **options: Any) -> Tensor:
    return opti_cam(model, images, class_idx, **options).saliency


METHODS: dict[str, Callable[..., Tensor]] = {
    "fake_cam": fake_cam,
    "grad_cam": grad_cam,
    "opti_cam": _opti_cam_map,
}

__all__ = ["METHODS", "OBJECTIVES", "SCHEDULES", "OptiCAMResult", "class_logit", "fake_cam", "grad_cam", "opti_cam"]
