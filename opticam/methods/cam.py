"""Class activation maps by fixed rules: one forward pass, at most one backward pass."""

import torch
from torch import Tensor, nn

from opticam.features import Layer, check_inputs, features_and_gradients
from opticam.saliency import combine, saliency_map


def grad_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Grad-CAM maps: `relu(sum_k w_k A_k)` with `w_k = mean_ij d y_c / d A_k`, upsampled, then `min_max`.

    Args:
        model: takes `images` and returns logits (B,C). Left as found.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64, the class to explain.
        layer: a module or its dotted name; by default the model's own target layer.

    Returns:
        (B,1,H,W) in [0,1]; zeros where no location has a positive sum.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: wrong shape, device or range; unknown layer.

    Reference:
        Selvaraju et al., Grad-CAM: Visual explanations from deep networks via gradient-based localization, ICCV 2017,
        arXiv 1610.02391, eq. 1 and 2.
    """
    check_inputs(model, images, class_idx)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map(combine(features, gradients.mean((2, 3))), images.shape[-2:])


def fake_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """The map that explains nothing: 1 everywhere but for a 0 in the top-left pixel.

    It scores near-perfectly by Average Drop and wins about every second image by Average Increase.

    Args:
        model: only checked against the images; this map does not depend on it.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64; this map does not depend on it.
        layer: not used.

    Returns:
        (B,1,H,W), zeros and ones.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: wrong shape, device or range.

    Reference:
        Poppi et al., Revisiting the evaluation of class activation mapping for explainability, CVPR workshops 2021,
        arXiv 2104.10252.
    """
    check_inputs(model, images, class_idx)
    saliency = torch.ones_like(images[:, :1], dtype=torch.promote_types(images.dtype, torch.float32))
    saliency[:, :, 0, 0] = 0
    return saliency.detach()
