"""Class activation maps by fixed rules: a weighted sum of the feature maps of one layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from opticam.checks import check_class_range, check_inputs, check_numbers, check_whole
from opticam.classifier import class_logit, for_autograd, read
from opticam.features import Layer, as_grid, as_layers, feature_maps, features_and_gradients, prepared
from opticam.folding import folded
from opticam.head import split_head
from opticam.methods.opti_cam import opti_cam
from opticam.methods.record import Method
from opticam.saliency import apply_mask, check_saliency, combine, min_max, saliency_map, upsample
from opticam.state import frozen, in_a_line


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
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape, device or range; unknown layer.

    Reference:
        Selvaraju et al., Grad-CAM: Visual explanations from deep networks via gradient-based localization, ICCV 2017,
        arXiv 1610.02391, eq. 1 and 2.
    """
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map(combine(features, gradients.mean((2, 3))), images.shape[-2:])


def grad_cam_plus_plus(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Grad-CAM++ maps: `w_k = sum_ij a_kij relu(g_kij)`, `a = g^2 / (2 g^2 + (sum_ij A_kij) g^3)`.

    Arguments, result and errors as `grad_cam`. Where the denominator is 0, a is 0.

    Reference:
        Chattopadhyay et al., Grad-CAM++: Improved visual explanations for deep convolutional networks, WACV 2018,
        arXiv 1710.11063, eq. 19.
    """
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
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map((gradients * features).sum(1, keepdim=True), images.shape[-2:])


def layer_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Layer-CAM maps: `relu(sum_k relu(g_k) * A_k)`, location by location.

    Arguments, result and errors as `grad_cam`.

    Reference:
        Jiang et al., LayerCAM: Exploring hierarchical class activation maps for localization, IEEE TIP 2021,
        eq. 5 to 7.
    """
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer)
    return saliency_map((gradients.relu() * features).sum(1, keepdim=True), images.shape[-2:])


def ablation_cam(
    model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None, batch_size: int = 64
) -> Tensor:
    """Ablation-CAM maps: `w_k = (y_c - y_c[A_k = 0]) / y_c`, the share of the class logit lost with feature map k.

    Of K feature maps, K passes, only of the part of the network after the layer where it can be split off.
    Arguments, result and errors as `grad_cam`; where y_c = 0 the weights are 0.

    Args:
        batch_size: outputs of the layer in flight.

    Reference:
        Desai, Ramaswamy, Ablation-CAM: Visual explanations for deep convolutional network via gradient-free
        localization, WACV 2020, eq. 1 and 2.
    """
    check_inputs(model, images, class_idx)
    x, c = prepared(model, images), for_autograd(class_idx)
    head, output, logits = split_head(model, x, layer)
    check_class_range(class_idx, logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)  # sums in half precision overflow
    y = class_logit(logits.to(dtype), c)
    features = as_grid(output, model, x, layer).to(dtype) if len(output) == len(x) else None
    if features is None or not features[:1].allclose(as_grid(output[:1], model, x, layer).to(dtype), equal_nan=True):
        raise ValueError("layer: ablation_cam wants one whose output has a row for each image")
    lost = torch.empty_like(features[:, :, 0, 0])
    for rows, channels in _pairs(torch.ones_like(lost), batch_size):
        ablated = output[rows]
        maps = as_grid(ablated, model, x, layer)
        if maps.untyped_storage().data_ptr() != ablated.untyped_storage().data_ptr():
            raise ValueError("layer: ablation_cam wants one whose maps are a view of its output, not a copy")
        maps[torch.arange(len(rows)), channels] = 0
        lost[rows, channels] = y[rows] - class_logit(head(ablated, rows), c[rows])
    weights = torch.where(y[:, None] != 0, lost / y[:, None], 0)
    return saliency_map(combine(features, weights), images.shape[-2:])


def score_cam(
    model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None, batch_size: int = 16
) -> Tensor:
    """Score-CAM maps: `w = softmax_k(f(x * n(up(A_k)))_c - f(0)_c)`, each feature map judged as a mask.

    K + 2 passes for K feature maps; a constant one masks everything and needs none but that of the black image.
    Arguments, result and errors as `grad_cam`. f(0)_c is the same for all k and leaves the softmax as it is.

    Args:
        batch_size: masked images in flight.

    Reference:
        Wang et al., Score-CAM: Score-weighted visual explanations for convolutional neural networks, CVPR workshops
        2020, arXiv 1910.01279, eq. 6 to 9.
    """
    check_inputs(model, images, class_idx)
    x, c = prepared(model, images), for_autograd(class_idx)
    (features,), logits = feature_maps(model, x, [_single(layer)])
    check_class_range(class_idx, logits.shape[1])
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with frozen(model), torch.no_grad():
        network = folded(model, x, logits)
        black = read(network, torch.zeros_like(x[:1])).logits[0, c].to(features.dtype)
        scores = black[:, None].repeat(1, features.shape[1])
        for rows, channels in _pairs(features.amax((2, 3)) > features.amin((2, 3)), batch_size):
            masks = min_max(upsample(features[rows, channels][:, None], x.shape[-2:]))
            masked_logits = read(network, apply_mask(x[rows], masks)).logits
            scores[rows, channels] = class_logit(masked_logits, c[rows]).to(scores.dtype)
    return saliency_map(combine(features, scores.softmax(1)), images.shape[-2:])


def eigen_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Eigen-CAM maps: the features of all places, (hw,K) and centred, projected on their first principal direction.

    Arguments, result and errors as `grad_cam`; does not depend on the class. The sign, which the formula leaves open,
    is **ours**: the map is turned round where its minimum is larger in size than its maximum, as in Seg-Eigen-CAM
    (Chung, Ying, Applied Sciences 2025, eq. 13). Feature maps that do not vary by more than rounding give zeros.

    Reference:
        Muhammad, Yeasin, Eigen-CAM: Class activation map using principal components, IJCNN 2020, arXiv 2008.00299.
    """
    check_inputs(model, images, class_idx)
    (features,), logits = feature_maps(model, images, [_single(layer)])
    check_class_range(class_idx, logits.shape[1])
    places = features.flatten(2).mT.double()  # (B,hw,K)
    finite = places.isfinite().all(2).all(1)
    places = places.where(finite[:, None, None], 0)  # the decomposition of others would fail too
    noise = 8 * torch.finfo(features.dtype).eps * torch.linalg.matrix_norm(places)
    left, values, _ = torch.linalg.svd(places - places.mean(1, keepdim=True), full_matrices=False)
    first = torch.where(values[:, :1] > noise[:, None], values[:, :1] * left[:, :, 0], 0)
    low, high = first.aminmax(dim=1, keepdim=True)
    first = torch.where(low.abs() > high.abs(), -first, first).where(finite[:, None], torch.nan)
    first = first.unflatten(1, features.shape[2:])
    return saliency_map(first[:, None].to(torch.promote_types(features.dtype, torch.float32)), images.shape[-2:])


def finer_cam(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer = None,
    alpha: float = 1.0,
    num_classes: int = 3,
    hold_weights: bool = False,
) -> Tensor:
    """Finer-CAM maps: Grad-CAM of what sets the class apart, `sum_j w_j (y_c - alpha y_j) / sum_j w_j`.

    j are the classes whose logits are nearest to y_c, `w_j = softmax(y)_j`. Arguments, result and errors as `grad_cam`.
    Under a sigmoid the only rival of a class is its absence, with logit 0, and the map is that of Grad-CAM.

    Args:
        alpha: how much of the rivals is subtracted; 0 gives Grad-CAM.
        num_classes: how many rivals; of a network with fewer, all.
        hold_weights: whether the weights w_j count as constants in the gradient. The library grad-cam does not hold
            them.

    Reference:
        Zhang et al., Finer-CAM: Spotting the difference reveals finer details for visual explanation, CVPR 2025,
        arXiv 2501.11309.
    """
    check_whole(1, num_classes=num_classes)
    check_numbers(alpha=alpha)
    if not isinstance(hold_weights, int):
        raise TypeError(f"hold_weights: wanted True or False, got {type(hold_weights).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: wanted a finite number, got {alpha}")
    score = partial(finer_score, alpha=alpha, num_classes=num_classes, hold_weights=hold_weights)
    features, gradients, _ = features_and_gradients(model, images, class_idx, layer, score)
    return saliency_map(combine(features, gradients.mean((2, 3))), images.shape[-2:])


def finer_score(
    logits: Tensor, class_idx: Tensor, alpha: float = 1.0, num_classes: int = 3, hold_weights: bool = False
) -> Tensor:
    """What `finer_cam` differentiates, (B,), from logits (B,C) and classes (B,); options as there."""
    y = logits.gather(1, class_idx[:, None])
    distance = (logits - y).detach().abs().scatter(1, class_idx[:, None], torch.nan)  # sorted behind inf
    rivals = distance.sort(dim=1, stable=True).indices[:, : min(num_classes, logits.shape[1] - 1)]
    rival_logits = logits.gather(1, rivals)
    weights = rival_logits.softmax(1)  # the softmax over all classes, divided by its sum over these
    weights = weights.detach() if hold_weights else weights
    rival_logits = rival_logits.masked_fill(rival_logits == -torch.inf, 0)  # of classes left out, whose weight is 0
    return (weights * (y - alpha * rival_logits)).sum(1)


def refine_cam(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer | Sequence[Layer] = None,
    base: Callable[..., Tensor] = grad_cam_plus_plus,
) -> Tensor:
    """RefineCAM maps: the product of the maps of several layers, each in [0,1] and of the size of the image.

    Arguments, result and errors as `grad_cam`. A deep layer says where, the layers before it sharpen its edges.

    Args:
        layer: several; of one, or by default of the model's own target layer, the result is the map of `base`.
        base: the method of each layer.

    Reference:
        Domeniconi et al., RefineCAM, 2026, arXiv 2605.14641.
    """
    if not callable(base):
        raise TypeError(f"base: wanted a function, such as grad_cam, got {in_a_line(base)}")
    maps = [base(model, images, class_idx, layer=one) for one in as_layers(layer)]
    for S in maps:
        check_saliency(images, S, "base")
    return min_max(torch.stack(maps).prod(0))


def equal_weights(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """The mean of the feature maps, `relu(A_k)`: Opti-CAM before its first step. Does not depend on the class.

    Arguments, result and errors as `grad_cam`.
    """
    return opti_cam(model, images, class_idx, layer=layer, num_steps=0).saliency


def fake_cam(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """The map that explains nothing: 1 everywhere but for a 0 in the top-left pixel.

    It scores near-perfectly by Average Drop and wins about every second image by Average Increase. It depends on
    neither model nor class, which are checked all the same; `layer` is not used. Arguments and errors as `grad_cam`.

    Returns:
        (B,1,H,W), zeros and ones.

    Reference:
        Poppi et al., Revisiting the evaluation of class activation mapping for explainability, CVPR workshops 2021,
        arXiv 2104.10252.
    """
    check_inputs(model, images, class_idx)
    saliency = torch.ones_like(images[:, :1], dtype=torch.promote_types(images.dtype, torch.float32))
    saliency[:, :, 0, 0] = 0
    return saliency.detach()


def _single(layer: Layer) -> Layer:
    """Refuse several layers."""
    if isinstance(layer, list | tuple):
        raise ValueError(f"layer: wanted a module or a dotted name, got {in_a_line(layer)}")
    return layer


def _pairs(wanted: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns (n,) of the wanted places of a (B,K) table, at most `batch_size` at a time."""
    check_whole(1, batch_size=batch_size)
    rows, columns = wanted.nonzero(as_tuple=True)
    yield from zip(rows.split(int(batch_size)), columns.split(int(batch_size)), strict=True)


RECORDS = {
    "fake_cam": Method(fake_cam, "Fake-CAM", "#029e73"),
    "equal_weights": Method(equal_weights, "Equal weights", "#4d4d4d"),
    "grad_cam": Method(grad_cam, "Grad-CAM", "#0173b2"),
    "grad_cam_plus_plus": Method(grad_cam_plus_plus, "Grad-CAM++", "#56b4e9"),
    "x_grad_cam": Method(x_grad_cam, "XGrad-CAM", "#6699cc"),
    "hires_cam": Method(hires_cam, "HiRes-CAM", "#3b9c9c"),
    "layer_cam": Method(layer_cam, "Layer-CAM", "#cc78bc"),
    "eigen_cam": Method(eigen_cam, "Eigen-CAM", "#999933"),
    "finer_cam": Method(finer_cam, "Finer-CAM", "#882255"),
    "refine_cam": Method(refine_cam, "RefineCAM", "#332288", needs="layers"),
    "ablation_cam": Method(ablation_cam, "Ablation-CAM", "#de8f05"),
    "score_cam": Method(score_cam, "Score-CAM", "#ca9161", cost="heavy"),
}
