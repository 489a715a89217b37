"""The methods compared, by name: `METHODS[name](model, images, class_idx, *, layer=None) -> saliency (B,1,H,W)`."""

from collections.abc import Callable, Mapping
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


def one_per_map(
    model: nn.Module, images: Tensor, class_idx: Tensor, methods: Mapping[str, Callable[..., Tensor]]
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """The methods without those that are Grad-CAM under another name on this network.

    Where global average pooling and one linear layer follow, XGrad-CAM and HiRes-CAM are Grad-CAM by algebra. Whether
    they are is seen from their maps.

    Args:
        model: takes `images` and returns logits (B,C). Left as found.
        images: (B,3,H,W) float in [0,1]; two or three are enough.
        class_idx: (B,) int64.
        methods: name -> `method(model, images, class_idx)`.

    Returns:
        The methods to use; and name -> "grad_cam" for each that was left out.
    """
    asked = [name for name in ("grad_cam", "x_grad_cam", "hires_cam") if name in methods]
    maps = {name: methods[name](model, images, class_idx) for name in asked if "grad_cam" in asked}
    same = {
        name: "grad_cam" for name, S in maps.items() if name != "grad_cam" and (S - maps["grad_cam"]).abs().max() < 1e-4
    }
    return {name: method for name, method in methods.items() if name not in same}, same


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
    "one_per_map",
    "opti_cam",
]
