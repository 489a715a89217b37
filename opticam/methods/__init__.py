"""The methods compared, by name: `METHODS[name](model, images, class_idx, *, layer=None) -> saliency (B,1,H,W)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from opticam.features import Layer
from opticam.methods.ascent import SCHEDULES
from opticam.methods.attention import attention_rollout, gradient_rollout, raw_attention
from opticam.methods.cam import (
    ablation_cam,
    fake_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    score_cam,
    x_grad_cam,
)
from opticam.methods.captum import captum_attribution, find_attribution
from opticam.methods.opti_cam import OBJECTIVES, OptiCAMResult, class_logit, opti_cam
from opticam.methods.perturbation import extremal_perturbation, rise


def _opti_cam_map(model: nn.Module, images: Tensor, class_idx: Tensor, **options: Any) -> Tensor:
    return opti_cam(model, images, class_idx, **options).saliency


def _equal_weights(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    return opti_cam(model, images, class_idx, layer=layer, num_steps=0).saliency


METHODS: dict[str, Callable[..., Tensor]] = {
    "fake_cam": fake_cam,
    "equal_weights": _equal_weights,  # Opti-CAM before its first step: the mean of the feature maps
    "grad_cam": grad_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "x_grad_cam": x_grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "ablation_cam": ablation_cam,
    "score_cam": score_cam,
    "rise": rise,
    "extremal_perturbation": extremal_perturbation,
    "raw_attention": raw_attention,
    "attention_rollout": attention_rollout,
    "gradient_rollout": gradient_rollout,
    "opti_cam": _opti_cam_map,
}


# what a comparison over many images takes by default: no more passes of the whole network than Opti-CAM, no attention
FAST = (
    "fake_cam",
    "equal_weights",
    "grad_cam",
    "grad_cam_plus_plus",
    "x_grad_cam",
    "hires_cam",
    "layer_cam",
    "ablation_cam",
    "opti_cam",
)


def find_method(name: str) -> Callable[..., Tensor]:
    """The method of that name in `METHODS`, or `captum:NAME` for an attribution of captum.

    Raises:
        ValueError: no such method.
        ImportError: captum is not installed.
    """
    library, separator, attribution = name.partition(":")
    if separator and library == "captum":
        find_attribution(attribution)
        return partial(captum_attribution, name=attribution)
    if name not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)} or captum:NAME, got {name!r}")
    return METHODS[name]


__all__ = [
    "FAST",
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
