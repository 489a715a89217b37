"""Class activation maps by fixed rules: a weighted sum of the feature maps of one layer."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opticam.checks import check_at_least, check_class_range, check_inputs
from opticam.classifier import class_logit, read, usable
from opticam.features import Layer, as_grid, feature_maps, features_and_gradients, prepared
from opticam.folding import folded
from opticam.head import split_head
from opticam.saliency import apply_mask, combine, min_max, saliency_map, upsample
from opticam.state import frozen


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


def grad_cam_plus_plus(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Grad-CAM++ maps: `w_k = sum_ij a_kij relu(g_kij)`, `a = g^2 / (2 g^2 + (sum_ij A_kij) g^3)`.

    Arguments, result and errors as `grad_cam`. Where g = 0 a has no weight; where the denominator is 0, a is 0.

    Reference:
        Chattopadhyay et al., Grad-CAM++: Improved visual explanations for deep convolutional networks, WACV 2018,
        arXiv 1710.11063, eq. 19.
    """
    check_inputs(model, images, class_idx)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    denominator = 2 + features.sum((2, 3), keepdim=True) * gradients  # both sides divided by g^2
    a = torch.where(denominator != 0, 1 / denominator, 0)
    return saliency_map(combine(features, (a * gradients.relu()).sum((2, 3))), images.shape[-2:])


def x_grad_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """XGrad-CAM maps: `w_k = sum_ij g_kij A_kij / sum_ij A_kij`, 0 where the sum is 0.

    Arguments, result and errors as `grad_cam`.

    Reference:
        Fu et al., Axiom-based Grad-CAM: Towards accurate visualization and explanation of CNNs, BMVC 2020,
        arXiv 2008.02312, eq. 8.
    """
    check_inputs(model, images, class_idx)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    total = features.sum((2, 3))
    weights = torch.where(total != 0, (gradients * features).sum((2, 3)) / total, 0)
    return saliency_map(combine(features, weights), images.shape[-2:])


def hires_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """HiRes-CAM maps: `relu(sum_k g_k * A_k)`, location by location.

    Arguments, result and errors as `grad_cam`.

    Reference:
        Draelos, Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks,
        2020, arXiv 2011.08891.
    """
    check_inputs(model, images, class_idx)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map((gradients * features).sum(1, keepdim=True), images.shape[-2:])


def layer_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Layer-CAM maps: `relu(sum_k relu(g_k) * A_k)`, location by location.

    Arguments, result and errors as `grad_cam`.

    Reference:
        Jiang et al., LayerCAM: Exploring hierarchical class activation maps for localization, IEEE TIP 2021,
        eq. 5 to 7.
    """
    check_inputs(model, images, class_idx)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map((gradients.relu() * features).sum(1, keepdim=True), images.shape[-2:])


def ablation_cam(
    model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None, batch_size: int = 64
) -> Tensor:
    """Ablation-CAM maps: `w_k = (y_c - y_c[A_k = 0]) / y_c`, the share of the class logit lost with feature map k.

    Of K feature maps, K passes, only of the part of the network after the layer where it can be split off.
    Arguments, result and errors as `grad_cam`; where y_c = 0 the weights are 0.

    Args:
        model: see `grad_cam`.
        images: see `grad_cam`.
        class_idx: see `grad_cam`.
        layer: see `grad_cam`.
        batch_size: outputs of the layer in flight.

    Reference:
        Desai, Ramaswamy, Ablation-CAM: Visual explanations for deep convolutional network via gradient-free
        localization, WACV 2020, eq. 1 and 2.
    """
    check_inputs(model, images, class_idx)
    x, c = prepared(model, images), usable(class_idx)
    head, output, logits = split_head(model, x, layer)
    check_class_range(class_idx, logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)  # sums in half precision overflow
    y = class_logit(logits.to(dtype), c)
    features = as_grid(output, model, x).to(dtype)
    lost = torch.empty_like(features[:, :, 0, 0])
    for rows, channels in _pairs(lost, batch_size):
        ablated = output[rows]
        as_grid(ablated, model, x)[torch.arange(len(rows)), channels] = 0
        lost[rows, channels] = y[rows] - class_logit(head(ablated, rows), c[rows])
    weights = torch.where(y[:, None] != 0, lost / y[:, None], 0)
    return saliency_map(combine(features, weights), images.shape[-2:])


def score_cam(
    model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None, batch_size: int = 16
) -> Tensor:
    """Score-CAM maps: `w = softmax_k(f(x * n(up(A_k)))_c - f(0)_c)`, each feature map judged as a mask.

    Of K feature maps, K passes; a constant feature map masks everything and needs none but that of the black image.
    Arguments, result and errors as `grad_cam`. f(0)_c is the same for all k and leaves the softmax as it is.

    Args:
        model: see `grad_cam`.
        images: see `grad_cam`.
        class_idx: see `grad_cam`.
        layer: see `grad_cam`.
        batch_size: masked images in flight.

    Reference:
        Wang et al., Score-CAM: Score-weighted visual explanations for convolutional neural networks, CVPR workshops
        2020, arXiv 1910.01279, eq. 6 to 9.
    """
    check_inputs(model, images, class_idx)
    x, c = prepared(model, images), usable(class_idx)
    (features,), logits = feature_maps(model, x, layer)
    check_class_range(class_idx, logits.shape[1])
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with frozen(model), torch.no_grad():
        network = folded(model, x, logits)
        black = read(network, torch.zeros_like(x[:1])).logits[0, c].to(features.dtype)
        scores = black[:, None].repeat(1, features.shape[1])
        for rows, channels in _pairs(scores, batch_size, features.amax((2, 3)) > features.amin((2, 3))):
            masks = min_max(upsample(features[rows, channels][:, None], x.shape[-2:]))
            masked_logits = read(network, apply_mask(x[rows], masks)).logits
            scores[rows, channels] = class_logit(masked_logits, c[rows]).to(scores.dtype)
    return saliency_map(combine(features, scores.softmax(1)), images.shape[-2:])


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


def _pairs(table: Tensor, batch_size: int, wanted: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns (n,) of a (B,K) table, all or the wanted ones, at most `batch_size` at a time."""
    check_at_least(1, batch_size=batch_size)
    if wanted is None:
        wanted = torch.ones_like(table, dtype=torch.bool)
    rows, columns = wanted.nonzero(as_tuple=True)
    yield from zip(rows.split(batch_size), columns.split(batch_size), strict=True)
