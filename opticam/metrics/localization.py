"""Metrics of localization: how a saliency map agrees with the boxes of the image's class.

One value per image; means are the caller's, except for MaxBoxAcc, which picks one threshold for a whole data set. All
take `saliency` (B,1,H,W) in [0,1] and `boxes`, a sequence of B tensors (n,4) of (xmin, ymin, xmax, ymax) in pixels of
the input: x counts columns, y rows. Boxes are not clipped: what lies outside the frame counts as area that no map
finds. An image without box gives NaN, and so does a map with a NaN.

Borders are rounded to whole pixels: a pixel belongs to a box if its centre does, so that a box with borders in whole
numbers holds the pixels xmin .. xmax - 1. Published codes truncate instead, which moves a box by half a pixel towards
the origin on average; with borders in whole numbers all agree.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

from opticam.checks import check_corners, check_inputs, check_numbers, check_tensors, check_whole, examine
from opticam.classifier import as_softmax, class_logit, for_autograd
from opticam.features import prepared
from opticam.saliency import check_saliency
from opticam.state import frozen, in_a_line

BOTH_ENDS = torch.tensor([0, 0, 1, 1], device="cpu")  # turns a box whose last pixel counts into a half-open one
TINY = torch.finfo(torch.float64).tiny
FARTHEST = 2**29  # borders beyond are taken to lie here, far outside any image, so that no area exceeds an integer


def predicted_box(saliency: Tensor) -> Tensor:
    """Tight box of the largest 4-connected component of the pixels above a threshold that keeps `mean(S) * H * W`.

    With N = H W, the threshold is the value of rank `1 + floor((N - 1)(1 - mean S) + 1/2)` from below, at most 1 - 1e-6
    as in the published code, and the pixels strictly above it are kept. So pixels of value 1 are always kept and those
    of value 0 never; values tied with the threshold are dropped. Of components of equal size the first in reading order
    is taken.

    Args:
        saliency: (B,1,H,W) in [0,1].

    Returns:
        (B,4) int64, (xmin, ymin, xmax, ymax), end *inclusive*. (0, 0, -1, -1), a box without pixels, where nothing is
        kept: a constant map, but for one of ones, whose box is the frame; a map with a NaN.

    Raises:
        TypeError: `saliency` is not a tensor.
        ValueError: wrong shape or range.

    Reference:
        Zolna, Geras, Cho, Classifier-agnostic saliency map extraction, AAAI 2019, arXiv 1805.08249.
    """
    check_saliency(None, saliency)
    flat = saliency.double().flatten(1)
    rank = ((flat.shape[1] - 1) * (1 - flat.mean(1)) + 0.5).nan_to_num().long()  # of a NaN nothing is kept anyway
    threshold = flat.sort(1).values.gather(1, rank[:, None]).clamp(max=1 - 1e-6)
    kept = (flat > threshold).view(len(saliency), *saliency.shape[-2:]) & ~_has_nan(saliency)[:, None, None]
    found = [_largest_component(mask) for mask in kept.cpu().numpy()]
    return torch.tensor(found, device=saliency.device).reshape(-1, 4)


def localization_error(saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """LE of each image, `1 - max_box 1[IoU(predicted box, box) > 0.5]`, strict. Lower is better.

    Areas are counted in pixels; the predicted box includes its end, as `predicted_box` says, where the reference is.

    Args:
        saliency: (B,1,H,W) in [0,1].
        boxes: B tensors (n,4), see above.

    Returns:
        (B,) float64, 0 or 1; 1 where no box is predicted.

    Raises:
        TypeError: an argument is not a tensor, or not a sequence of tensors.
        ValueError: wrong shape or range; a box with an end before its start.
    """
    _check(saliency, boxes)
    predicted = predicted_box(saliency).cpu() + BOTH_ENDS
    pairs = zip(predicted.double(), boxes, strict=True)
    found = [(box_iou(box[None], _pixels(truth).double()) > 0.5).any() for box, truth in pairs]
    return _where_defined(1 - torch.tensor(found, device="cpu").double(), saliency, boxes)


def official_metric(saliency: Tensor, boxes: Sequence[Tensor], correct: Tensor) -> Tensor:
    """OM of each image, `1 - max_box 1[IoU > 0.5] * 1[classified correctly]`. Lower is better.

    The localization error of the ImageNet challenge: box and class have to be right.

    Arguments, errors and reference as `localization_error`, and:

    Args:
        correct: (B,) bool, whether the network's first guess is the image's class.

    Returns:
        (B,) float64, 0 or 1, never below `localization_error`; NaN for an image without box and a map with a NaN.
    """
    check_saliency(None, saliency)
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        raise TypeError(f"correct: wanted a bool tensor, got {getattr(correct, 'dtype', type(correct).__name__)}")
    if correct.shape != (len(saliency),):
        raise ValueError(f"correct: wanted shape ({len(saliency)},), got {tuple(correct.shape)}")
    check_tensors(correct=correct)
    error = localization_error(saliency, boxes)
    return torch.where(correct.to(error.device) | error.isnan(), error, 1)


def soft_f1(saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """F1 of each image, the best over its boxes B of the harmonic mean of soft precision and recall. Higher is better.

    Precision `sum(S*B)/sum(S)`, recall `sum(S*B)/|B|`, hence `F1 = 2 sum(S*B)/(sum(S) + |B|)`; `|B|` counts what lies
    outside the frame too. (The published code adds 1e-6 to the denominators; here a perfect map has exactly 1.)

    Arguments and errors as `localization_error`.

    Returns:
        (B,) float64 in [0,1]; 0 for a map of zeros; NaN for an image without box and for a map with a NaN.

    Reference:
        Zolna, Geras, Cho, Classifier-agnostic saliency map extraction, AAAI 2019, arXiv 1805.08249.
    """
    _check(saliency, boxes)
    size = saliency.shape[-2:]
    best = torch.zeros(len(saliency), dtype=torch.float64, device=saliency.device)
    for i, (values, truth) in enumerate(zip(saliency[:, 0].double(), boxes, strict=True)):
        total = values.sum()
        for area, (x0, y0, x1, y1) in zip(
            box_area(_pixels(truth)).tolist(), _clipped(truth, size).tolist(), strict=True
        ):
            f1 = 2 * values[y0:y1, x0:x1].sum() / (total + area).clamp(min=TINY)
            best[i] = torch.maximum(best[i], f1)
    return _where_defined(best, saliency, boxes)


def saliency_metric(model: nn.Module, images: Tensor, class_idx: Tensor, saliency: Tensor) -> Tensor:
    """SM of each image, `log max(a, 0.05) - log p(c | crop)`. Lower is better: a small box that shows the class.

    The crop is the predicted box, resized to the input (bilinear, align_corners=False); a is its share of the frame,
    p is by the head of the network. One batched forward pass. Where no box is predicted (see `predicted_box`) the whole
    image is taken, a = 1: **ours**. Arguments and errors as `metrics.insertion`.

    Returns:
        (B,) float64, at least log 0.05 = -3.0, unbounded above; NaN for a map with a NaN.

    Reference:
        Dabkowski, Gal, Real time image saliency for black box classifiers, NeurIPS 2017, arXiv 1705.07857.
    """
    check_inputs(model, images, class_idx)
    check_saliency(images, saliency)
    height, width = images.shape[-2:]
    ends = predicted_box(saliency).cpu() + BOTH_ENDS
    crops = torch.where(box_area(ends)[:, None] > 0, ends, torch.tensor([0, 0, width, height], device="cpu"))
    resized = [
        F.interpolate(image[None, :, y0:y1, x0:x1], (height, width), mode="bilinear", align_corners=False)
        for image, (x0, y0, x1, y1) in zip(for_autograd(images).detach(), crops.tolist(), strict=True)
    ]
    with frozen(model), torch.no_grad():
        logits, head = examine(model, prepared(model, torch.cat(resized)), class_idx)
    two, c = as_softmax(logits.double(), for_autograd(class_idx), head)
    log_prob = class_logit(two.log_softmax(1), c)
    area = box_area(crops).to(log_prob) / (height * width)
    return (area.clamp(min=0.05).log() - log_prob).masked_fill(_has_nan(saliency), torch.nan)


def energy_pointing_game(saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """EP of each image, `sum(S*B)/sum(S)` with B the union of the boxes as 0/1. Higher is better.

    Arguments and errors as `localization_error`.

    Returns:
        (B,) float64 in [0,1]; 0 for a map of zeros; NaN for an image without box and for a map with a NaN.

    Reference:
        Wang et al., Score-CAM: Score-weighted visual explanations for convolutional neural networks, CVPR workshops
        2020, arXiv 1910.01279.
    """
    _check(saliency, boxes)
    energy = saliency.double()
    inside = (energy * box_mask(boxes, saliency.shape[-2:]).to(energy)).sum((1, 2, 3))
    return _where_defined(inside / energy.sum((1, 2, 3)).clamp(min=TINY), saliency, boxes)


def pointing_game(saliency: Tensor, boxes: Sequence[Tensor], tolerance: float = 15) -> Tensor:
    """SP of each image: the share of the map's tied maxima that hit. Higher is better.

    A maximum hits if a disc around it, of radius `tolerance` and with its border, meets a pixel of a box, as in the
    published pointing game; distances go from centre to centre of pixels inside the frame. With ties the published
    code takes the first maximum, and looks at no other; the share is **ours**: a constant map gets no more than the
    share of the frame that hits.

    Arguments and errors as `localization_error`, and:

    Args:
        tolerance: in pixels, not negative.

    Returns:
        (B,) float64 in [0,1]; 0 where all boxes lie wholly outside the frame; NaN for an image without box and for a
        map with a NaN.

    Reference:
        Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018, arXiv 1608.00507.
    """
    _check(saliency, boxes)
    check_numbers(tolerance=tolerance)
    if not tolerance >= 0:
        raise ValueError(f"tolerance: wanted a distance in pixels from 0 on, got {tolerance}")
    tolerance = float(tolerance)
    height, width = saliency.shape[-2:]
    rows, columns = torch.arange(height, device="cpu"), torch.arange(width, device="cpu")
    near = torch.zeros(len(saliency), 1, height, width, dtype=torch.bool, device="cpu")
    for i, truth in enumerate(boxes):
        inside = _clipped(truth, (height, width))
        x0, y0, x1, y1 = inside[box_area(inside) > 0, :, None].unbind(1)
        dx = torch.maximum(x0 - columns, columns - (x1 - 1)).clamp(min=0)
        dy = torch.maximum(y0 - rows, rows - (y1 - 1)).clamp(min=0)
        near[i] = (dx[:, None, :] ** 2 + dy[:, :, None] ** 2 <= tolerance**2).any(0)
    maxima = saliency == saliency.amax((1, 2, 3), keepdim=True)
    hits = (maxima & near.to(maxima.device)).sum((1, 2, 3)).double() / maxima.sum((1, 2, 3))
    return _where_defined(hits, saliency, boxes)


def box_hits(saliency: Tensor, boxes: Sequence[Tensor], num_thresholds: int = 1000) -> Tensor:
    """Whether the box of each threshold is right: what MaxBoxAcc and MaxBoxAccV2 count over a data set.

    The map becomes `floor(255 S)`, in 8 bits; at threshold t the pixels strictly above `floor(t max)` are kept, for
    t = 0, 1/num_thresholds, ...; a box spans a contour of theirs, its end moved one pixel on, `min(x + w, W - 1)`, and
    IoU counts both ends of a box in, as in the published code. Sum over the images that have a box, add the sums of
    shards, then `max_box_accuracy`.

    Arguments and errors as `localization_error`, and:

    Args:
        num_thresholds: T, at least 1.

    Returns:
        (B,4,T) bool. Row 0: the box of the contour of largest area has an IoU of 0.5 or more with some box. Rows 1 to
        3: the best of all contours' boxes has one of at least 0.3, 0.5, 0.7. All False for an image without box, a map
        of zeros (of values under 1/255) and a map with a NaN.

    Reference:
        Choe et al., Evaluating weakly supervised object localization methods right, CVPR 2020, arXiv 2001.07437; V2:
        Choe et al., Evaluation for weakly supervised object localization: protocol, metrics, and datasets, TPAMI 2022,
        arXiv 2007.04178.
    """
    _check(saliency, boxes)
    check_whole(1, num_thresholds=num_thresholds)
    hits = torch.zeros(len(saliency), 4, num_thresholds, dtype=torch.bool, device="cpu")
    whole = torch.promote_types(saliency.dtype, torch.float32)  # half precision would round up what is truncated here
    gray = (saliency[:, 0].to(whole) * 255).nan_to_num().to(torch.uint8).cpu().numpy()
    for i in (~_undefined(saliency, boxes)).nonzero()[:, 0].tolist():
        truth = _pixels(boxes[i])
        levels = (np.arange(num_thresholds) * (1 / num_thresholds) * gray[i].max()).astype(int)
        distinct, place = np.unique(levels, return_inverse=True)  # at most 256 differ
        table = torch.stack([_contour_hits(gray[i] > level, truth) for level in distinct])
        hits[i] = table[torch.from_numpy(place)].T
    return hits.to(saliency.device)


def max_box_accuracy(hits_sum: Tensor, num_images: int) -> tuple[float, float]:
    """MaxBoxAcc and MaxBoxAccV2, see `box_hits`: the share of images right at the best threshold. Higher is better.

    Args:
        hits_sum: (4,T), the sum of `box_hits` over images, shards added up.
        num_images: how many images were summed, counting only those with a box.

    Returns:
        MaxBoxAcc and MaxBoxAccV2, fractions; for V2 each of the IoUs 0.3, 0.5, 0.7 has its own best threshold, and the
        three shares are averaged.

    Raises:
        ValueError: wrong shape; hits below 0; a number of images that is not whole, or fewer than hits.
    """
    check_tensors(hits_sum=hits_sum)
    check_numbers(num_images=num_images)
    if hits_sum.ndim != 2 or hits_sum.shape[0] != 4 or hits_sum.shape[1] < 1:
        raise ValueError(f"hits_sum: wanted shape (4,T), got {tuple(hits_sum.shape)}")
    hits = hits_sum.double()
    if not (hits.isfinite() & (hits >= 0)).all():
        raise ValueError(
            f"hits_sum: wanted finite numbers from 0 on, got {hits.amin().item():g} to {hits.amax().item():g}"
        )
    if num_images % 1 != 0:  # also of what is not finite
        raise ValueError(f"num_images: wanted a whole number, got {num_images}")
    best = hits.amax(1)
    if num_images < max(1, best.max().item()):
        raise ValueError(f"num_images: wanted at least 1 and no fewer than hits ({int(best.max())}), got {num_images}")
    shares = best / num_images
    return shares[0].item(), shares[1:].mean().item()


def box_mask(boxes: Sequence[Tensor], size: tuple[int, int] | torch.Size) -> Tensor:
    """Union of each image's boxes as 0/1: 1 where the centre of the pixel lies in a box, `xmin <= x + 1/2 < xmax`.

    Args:
        boxes: B tensors (n,4), see above; what lies outside the frame is cut off.
        size: (H,W).

    Returns:
        (B,1,H,W) float32, zeros and ones, on the device of the boxes; zeros for an image without box.

    Raises:
        TypeError: no sequence of tensors.
        ValueError: wrong shape; a box with an end before its start.
    """
    _check_boxes(boxes)
    try:
        height, width = size
    except (TypeError, ValueError) as error:
        raise ValueError(f"size: wanted two numbers (H,W), got {in_a_line(size)}") from error
    check_whole(1, size=height)
    check_whole(1, size=width)
    mask = torch.zeros(len(boxes), 1, *size, device=boxes[0].device if len(boxes) else None)
    for i, truth in enumerate(boxes):
        for x0, y0, x1, y1 in _clipped(truth, size).tolist():
            mask[i, 0, y0:y1, x0:x1] = 1
    return mask


def box_experiment_masks(saliency: Tensor, boxes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Masks that ask whether the network uses what lies outside the box, for `evaluation.score`.

    Arguments and errors as `localization_error`. Leave images without box out, for which B = 0 says nothing.

    Returns:
        "B" (union of boxes as 0/1, `box_mask`), "1-B", "S" (the map), "S*(1-B)", "S*B": each (B,1,H,W) in [0,1], of
        the dtype and on the device of the map.

    Reference:
        Zhang et al., Opti-CAM, CVIU 2024, arXiv 2301.07002.
    """
    _check(saliency, boxes)
    inside = box_mask(boxes, saliency.shape[-2:]).to(saliency)
    outside = 1 - inside
    return {"B": inside, "1-B": outside, "S": saliency, "S*(1-B)": saliency * outside, "S*B": saliency * inside}


def _largest_component(kept: np.ndarray) -> tuple[int, int, int, int]:
    from scipy import ndimage

    labels, _ = ndimage.label(kept)
    sizes = np.bincount(labels.ravel())[1:]
    if not len(sizes):
        return 0, 0, -1, -1
    rows, columns = ndimage.find_objects(labels)[sizes.argmax()]
    return columns.start, rows.start, columns.stop - 1, rows.stop - 1


def _contour_hits(kept: np.ndarray, truth: Tensor) -> Tensor:
    import cv2

    contours, _ = cv2.findContours(kept.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return torch.zeros(4, dtype=torch.bool, device="cpu")
    height, width = kept.shape
    x, y, w, h = torch.tensor([cv2.boundingRect(contour) for contour in contours], device="cpu").T
    predicted = torch.stack([x, y, (x + w).clamp(max=width - 1), (y + h).clamp(max=height - 1)], 1)
    best = box_iou((predicted + BOTH_ENDS).double(), (truth + BOTH_ENDS).double()).amax(1)  # of integers: single
    largest = best[int(np.argmax([cv2.contourArea(contour) for contour in contours]))]
    return torch.stack([largest >= 0.5, *(best.max() >= iou for iou in (0.3, 0.5, 0.7))])


def _pixels(boxes: Tensor) -> Tensor:
    """Borders (n,4) int64 between pixels, half-open: pixel j is inside if its centre j + 1/2 is."""
    return (boxes.cpu().double() - 0.5).ceil().clamp(-FARTHEST, FARTHEST).long()


def _clipped(boxes: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    height, width = size
    return clip_boxes_to_image(_pixels(boxes), (height, width))


def _has_nan(saliency: Tensor) -> Tensor:
    return saliency.isnan().flatten(1).any(1)


def _undefined(saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    return _has_nan(saliency) | torch.tensor([len(truth) == 0 for truth in boxes], device=saliency.device)


def _where_defined(values: Tensor, saliency: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    return values.to(saliency.device).masked_fill(_undefined(saliency, boxes), torch.nan)


def _check(saliency: Tensor, boxes: Sequence[Tensor]) -> None:
    check_saliency(None, saliency)
    _check_boxes(boxes)
    if len(boxes) != len(saliency):
        raise ValueError(f"boxes: wanted one tensor (n,4) an image, {len(saliency)}, got {len(boxes)}")


def _check_boxes(boxes: Sequence[Tensor]) -> None:
    if isinstance(boxes, Tensor) and boxes.ndim != 3:
        raise ValueError(f"boxes: wanted one tensor (n,4) an image, got one tensor of shape {tuple(boxes.shape)}")
    if not isinstance(boxes, Sequence | Tensor):
        raise TypeError(f"boxes: wanted a sequence of tensors (n,4), got a {type(boxes).__name__}")
    for truth in boxes:
        if not isinstance(truth, Tensor):
            raise TypeError(f"boxes: wanted a sequence of tensors (n,4), got a {type(truth).__name__} in it")
        check_tensors(boxes=truth)
        check_corners(truth)
        if truth.ndim != 2 or truth.shape[1] != 4:
            raise ValueError(f"boxes: wanted tensors (n,4), one an image, got shape {tuple(truth.shape)}")
        if not (truth.isfinite().all() and (truth[:, :2] <= truth[:, 2:]).all()):
            raise ValueError(f"boxes: wanted finite xmin <= xmax and ymin <= ymax, got {truth.tolist()}")
        if truth.numel() and (truth >= 0).all() and (truth <= 1).all() and (truth % 1 != 0).any():
            raise ValueError(f"boxes: wanted pixels, got fractions {truth.tolist()}")
