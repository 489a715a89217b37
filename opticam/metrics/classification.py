"""Metrics of faithfulness: what masking does to the probability of the class.

One value per image; means are the caller's. Average Drop, Increase and Gain take the probability p of the class for the
image and o for the masked image, both by the head of the network; ADCC takes maps. Insertion, deletion and ROAD make
passes of their own.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from opticam.checks import (
    as_seed,
    check_alike,
    check_class_idx,
    check_class_range,
    check_inputs,
    check_numbers,
    check_tensors,
    check_whole,
    examine,
)
from opticam.classifier import (
    Head,
    as_classifier,
    as_softmax,
    check_head,
    for_autograd,
    log_odds,
    probs_of_class,
    read,
    with_absence,
)
from opticam.features import prepared
from opticam.folding import folded
from opticam.saliency import check_saliency
from opticam.state import frozen, in_a_line

Curve = tuple[Tensor, Tensor]
Series = tuple[int, Callable[[Tensor, Tensor], Tensor]]  # n, and the images in these rows and columns of (B,n)


def class_probability(logits: Tensor, class_idx: Tensor, head: Head = "softmax") -> Tensor:
    """Probability of each image's class, in float64, so that `1 - p` keeps its digits.

    Args:
        logits: (B,C) of a network in eval mode; or (B,1) or (B,) of one logit, which is a sigmoid whatever the head.
        class_idx: (B,) int64; of one logit, 0 is the class that it stands for and 1 its absence.
        head: of the network: "softmax", one class per image, or "sigmoid", each class for itself.

    Returns:
        (B,) float64 in [0,1].

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape or device, a class that is out of range, or an unknown head.
    """
    _check_logits(class_idx, head, logits=logits)
    return probs_of_class(logits, class_idx, head)


def average_drop(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Drop of each image, `max(0, p - o)/p`.

    Kept: the pixels the map calls salient; removed: the rest. Lower is better: an ideal map loses nothing.

    Args:
        probs: (B,) p in [0,1].
        masked_probs: (B,) o in [0,1].

    Returns:
        (B,) float64, a fraction in [0,1]; 0 where p is 0 (nothing to lose); NaN where a probability is NaN.

    Raises:
        ValueError: shapes differ or a value is outside [0,1].

    Reference:
        Chattopadhyay et al., Grad-CAM++, WACV 2018, arXiv 1710.11063, section 4.1, where it is given in percent.
    """
    p, o = _checked(probs, masked_probs)
    return (p - o).clamp(min=0) / p.where(p > 0, 1)


def average_increase(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Increase of each image, `1[o > p]`, strict.

    Kept: the pixels the map calls salient; removed: the rest. Higher is better. It counts wins and ignores their size.
    Arguments, errors and reference as `average_drop`.

    Returns:
        (B,) float64, 0 or 1; NaN where a probability is NaN.
    """
    p, o = _checked(probs, masked_probs)
    return torch.where(p.isnan() | o.isnan(), torch.nan, (o > p).double())


def average_gain(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Gain of each image, `max(0, o - p)/(1 - p)`: the mirror image of Average Drop.

    Kept: the pixels the map calls salient; removed: the rest. Higher is better: the share of the possible gain made.
    Arguments and errors as `average_drop`.

    Returns:
        (B,) float64, a fraction in [0,1]; 0 where p is 1 (no gain possible), and counted; NaN where a probability is.

    Reference:
        Zhang et al., Opti-CAM, CVIU 2024, arXiv 2301.07002, where it is given in percent.
    """
    p, o = _checked(probs, masked_probs)
    return (o - p).clamp(min=0) / (1 - p).clamp(min=torch.finfo(p.dtype).tiny)


def gain_minus_drop(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Gain minus Average Drop of each image: gains count for the map and losses against it.

    Kept: the pixels the map calls salient; removed: the rest. Higher is better: 0 where nothing changes. Arguments and
    errors as `average_drop`.

    Returns:
        (B,) float64 in [-1,1]; NaN where a probability is NaN.
    """
    return average_gain(probs, masked_probs) - average_drop(probs, masked_probs)


def log_odds_change(logits: Tensor, masked_logits: Tensor, class_idx: Tensor, head: Head = "softmax") -> Tensor:
    """Signed change of the log-odds of each image's class, `logit(o) - logit(p)` with `logit(q) = log(q/(1 - q))`.

    Higher is better: 0 where nothing changes, and a loss counts as much as the gain that would undo it. **Ours.** Taken
    from the logits, by `classifier.log_odds`, so that no q has to be clipped near 0 or 1. Kept and removed as
    `average_drop`.

    Errors as `class_probability`.

    Args:
        logits: of the image, as `class_probability` takes them, like `class_idx` and `head`.
        masked_logits: of the masked image, of the same shape, else a ValueError.
        class_idx: (B,) int64.
        head: of the network.

    Returns:
        (B,) float64, unbounded; NaN where logits are.
    """
    check_alike(logits=logits, masked_logits=masked_logits)
    _check_logits(class_idx, head, logits=logits, masked_logits=masked_logits)
    before, after = logits.double(), masked_logits.double()
    if logits.ndim == 1 or logits.shape[1] == 1:
        before, after, head = with_absence(before), with_absence(after), "sigmoid"
    return log_odds(*as_softmax(after, class_idx, head)) - log_odds(*as_softmax(before, class_idx, head))


def insertion(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    *,
    pixels_per_step: int | None = None,
    batch_size: int = 64,
    mean: Tensor | None = None,
) -> Curve:
    """Insertion: the area under the class probability as pixels, the most salient first, appear in a blurred image.

    Kept: the first `t * pixels_per_step` pixels at step t = 0..T, all channels at once, equally salient ones row by
    row; removed: the rest, which show the image blurred by an 11x11 Gaussian of sigma 5 with the mean colour beyond its
    border (zero padding after mean/std). Higher is better. T+1 passes an image.

    The area is the trapezoid rule at T+1 equally spaced points of [0,1], as in the authors' code. Deviations from it:
    its kernel is a reflected Gaussian, flatter than this one; its order of equally salient pixels is unspecified; the
    class is given and not the predicted one.

    Args:
        model: takes `images`, see `classifier.read`. Left as found.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64.
        saliency: (B,1,H,W) in [0,1].
        pixels_per_step: at least 1; None for 8 rows, 8 W, which makes T = H/8: the authors' 28 steps at 224x224.
        batch_size: masked images in flight.
        mean: colour that mean/std makes zero, one value per channel; None for that of the `Classifier`.

    Returns:
        The area (B,) float64, a fraction in [0,1], and the curve (B,T+1) float64 of probabilities, which ends at p.
        NaN for a map with a NaN, and where a probability is.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape, device or range; no `mean`, and the model has none.

    Reference:
        Petsiuk, Das, Saenko, RISE: Randomized input sampling for explanation of black-box models, BMVC 2018,
        arXiv 1806.07421, and the authors' code.
    """
    return _with_area(*_curves(model, images, class_idx, saliency, [_inserting], pixels_per_step, batch_size, mean))


def deletion(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    *,
    pixels_per_step: int | None = None,
    batch_size: int = 64,
    mean: Tensor | None = None,
) -> Curve:
    """Deletion: the area under the class probability as pixels, the most salient first, turn to the mean colour.

    Removed: the first `t * pixels_per_step` pixels at step t = 0..T, all channels at once; kept: the rest. Lower is
    better. The curve starts at p. All else as `insertion`.
    """
    return _with_area(*_curves(model, images, class_idx, saliency, [_revealed], pixels_per_step, batch_size, mean))


def insertion_deletion(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    *,
    pixels_per_step: int | None = None,
    batch_size: int = 64,
    mean: Tensor | None = None,
) -> tuple[Curve, Curve]:
    """What `insertion` and what `deletion` return, by one pass less: one ends and one starts with the unmasked image.

    Arguments and errors as `insertion`.
    """
    series = [_inserting, lambda x, color, rank, counts: _revealed(x, color, rank, counts[1:])]
    given = pixels_per_step, batch_size, mean
    inserted, deleted = _curves(model, images, class_idx, saliency, series, *given)
    return _with_area(inserted), _with_area(torch.cat([inserted[:, -1:], deleted], 1))


def road(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    *,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """ROADCombined: `mean over fractions of (LeRF - MoRF)/2`, class probabilities without the least or most salient.

    Removed: that fraction of the pixels, rounded to a whole number, equally salient ones row by row; they are imputed
    (see `impute`) with noise of standard deviation 0.01; kept: the rest. Higher is better: the class survives without
    the least salient pixels (LeRF) and not without the most salient (MoRF). Two passes an image and fraction.

    The paper writes N(0, 0.01); 0.01 is the standard deviation in the authors' code and here. Deviations from that
    code: one field of noise for all images, fractions and both orders, so that an image's value does not depend on its
    batch and that of a constant map is 0; the noise is added to images in [0,1], before mean/std, and not clipped.

    Arguments and errors as `insertion`, and:

    Args:
        fractions: of the pixels, each in (0,1).
        seed: of the noise, the same on every device.

    Returns:
        (B,) float64 in [-1/2, 1/2]; NaN for a map with a NaN, and where a probability is.

    Reference:
        Rong et al., A consistent and efficient evaluation strategy for attribution methods, ICML 2022,
        arXiv 2202.00449; the combination of both orders as in the library grad-cam.
    """
    _check(model, images, class_idx, saliency, batch_size)
    seed = as_seed(seed)
    if not isinstance(fractions, Iterable) or getattr(fractions, "ndim", 1) == 0:
        raise TypeError(f"fractions: wanted several numbers between 0 and 1, got {in_a_line(fractions)}")
    fractions = list(fractions)
    for fraction in fractions:
        check_numbers(fractions=fraction)
    counts = [round(float(fraction) * images[0, 0].numel()) if 0 < fraction < 1 else 0 for fraction in fractions]
    if len(counts) == 0 or not all(0 < count < images[0, 0].numel() for count in counts):
        raise ValueError(
            f"fractions: wanted at least one, each between 0 and 1 and of a pixel or more, got {fractions}"
        )
    x = prepared(model, images)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = 0.01 * torch.randn(x.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(x)
    orders = [_rank(saliency, descending) for descending in (False, True)]
    removed = torch.stack([rank < count for count in counts for rank in orders], 1)
    steps = removed.shape[1], lambda rows, columns: impute(x[rows], removed[rows, columns], noise)
    (probs,) = _probabilities(model, class_idx, saliency, batch_size, steps)
    least_first, most_first = probs.unflatten(1, (len(counts), 2)).unbind(2)
    return ((least_first - most_first) / 2).mean(1)


def impute(images: Tensor, removed: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """The images with every removed pixel the weighted mean of its 8 neighbours, removed ones among them.

    Weights are 1/6 for direct and 1/12 for diagonal neighbours, renormalised at borders: `x_i = sum_n w_n x_n / sum_n
    w_n` for all removed i at once, one sparse symmetric linear system an image, solved in float64 on the CPU.

    Args:
        images: (B,C,H,W) float; values of removed pixels do not matter.
        removed: (B,1,H,W) bool, on the device of the images; at least one pixel of each image is kept.
        noise: added to the removed pixels, of a shape that broadcasts to the images.

    Returns:
        (B,C,H,W) of the device and dtype of the images; without noise, within the range of the kept pixels.

    Raises:
        TypeError: an argument is not a tensor; `removed` is not bool.
        ValueError: wrong shapes, or nothing is kept of an image.

    Reference:
        Rong et al., ICML 2022, arXiv 2202.00449, and the authors' code.
    """
    check_tensors(images=images, removed=removed)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images: wanted floating-point (B,C,H,W), got {images.dtype} {tuple(images.shape)}")
    if removed.dtype != torch.bool:
        raise TypeError(f"removed: wanted dtype torch.bool, got {removed.dtype}")
    wanted = (len(images), 1, *images.shape[-2:])
    if removed.shape != wanted:
        raise ValueError(f"removed: wanted shape {wanted}, got {tuple(removed.shape)}")
    if isinstance(noise, Tensor):
        check_tensors(noise=noise)
        shape = noise.shape
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape[::-1], images.shape[::-1], strict=False)):
            raise ValueError(f"noise: wanted a shape that broadcasts to {tuple(images.shape)}, got {tuple(shape)}")
    else:
        check_numbers(noise=noise)
    if removed.flatten(1).all(1).any():
        raise ValueError("removed: wanted at least one pixel kept of every image")
    from scipy.sparse.linalg import splu

    weights, laplacian = _neighbors(*images.shape[-2:])
    pixels = images.detach().to("cpu", torch.float64, copy=True).contiguous()
    for x, gone in zip(pixels.flatten(2).numpy(), removed.flatten(1).cpu().numpy(), strict=True):
        if gone.any():
            # as for a symmetric positive definite matrix: no pivoting, and an ordering made for it
            factors = splu(
                laplacian[gone][:, gone].tocsc(),
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0.0,
                options={"SymmetricMode": True},
            )
            x[:, gone] = factors.solve(weights[gone][:, ~gone] @ x[:, ~gone].T).T
    return torch.where(removed, (pixels.to(images) + noise).to(images), images)


def coherency(saliency: Tensor, saliency_of_masked: Tensor) -> Tensor:
    """Coherency of each map, `(pearson(S, S') + 1)/2`: does the method find the same again in what its map kept?

    Higher is better.

    Args:
        saliency: (B,1,H,W) S in [0,1] of the image x.
        saliency_of_masked: (B,1,H,W) S', the same method's map of x * S.

    Returns:
        (B,) float64 in [0,1]; NaN where it is undefined, a map being constant, or where a map has a NaN.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shape or range.

    Reference:
        Poppi et al., Revisiting the evaluation of class activation mapping for explainability, CVPR workshops 2021,
        arXiv 2104.10252.
    """
    check_saliency(None, saliency)
    check_saliency(None, saliency_of_masked, "saliency_of_masked")
    check_alike(saliency=saliency, saliency_of_masked=saliency_of_masked)
    a, b = (maps.double().flatten(1) for maps in (saliency, saliency_of_masked))
    undefined = _constant(a) | _constant(b)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    pearson = (F.normalize(a, dim=1, eps=0) * F.normalize(b, dim=1, eps=0)).sum(1).clamp(-1, 1)
    return ((pearson + 1) / 2).masked_fill(undefined, torch.nan)


def complexity(saliency: Tensor) -> Tensor:
    """Complexity of each map, `mean(S)`: the share of the image that it keeps. Lower is better.

    Maps, errors and reference as for `coherency`.

    Returns:
        (B,) float64 in [0,1]; NaN where the map has a NaN.
    """
    check_saliency(None, saliency)
    return saliency.double().flatten(1).mean(1)


def adcc(saliency: Tensor, saliency_of_masked: Tensor, drop: Tensor) -> Tensor:
    """ADCC of each image, `3/(1/coh + 1/(1 - com) + 1/(1 - AD))`: one number from `coherency`, `complexity` and drop.

    Higher is better: the harmonic mean is small where one of the three is. Maps and reference as for `coherency`, and:

    Args:
        drop: (B,) from `average_drop`.

    Returns:
        (B,) float64 in [0,1]; 0 where a term is 0, or undefined since a map is constant; NaN where an argument is.

    Raises:
        ValueError: wrong shapes, or a drop outside [0,1].
    """
    _check_one_per_map(saliency, drop=drop)
    if ((drop < 0) | (drop > 1)).any():
        raise ValueError("drop: wanted fractions in [0,1], not percent")
    return _harmonic_mean(saliency, saliency_of_masked, 1 - drop.double())


def arcc(saliency: Tensor, saliency_of_masked: Tensor, road_combined: Tensor) -> Tensor:
    """ARCC of each image, `3/(1/coh + 1/(1 - com) + 1/r)` with `r = clip(2 ROADCombined, 0, 1)`: the successor of ADCC.

    ROAD takes the place of drop, since masking by a map shows the network images that it has never seen. Higher is
    better. Maps and result as for `adcc`, and:

    Args:
        road_combined: (B,) from `road`, in [-1/2, 1/2].

    Raises:
        ValueError: wrong shapes, or a ROAD outside [-1/2, 1/2].

    Reference:
        Domeniconi et al., RefineCAM, 2026, arXiv 2605.14641.
    """
    _check_one_per_map(saliency, road_combined=road_combined)
    if (road_combined.abs() > 0.5).any():
        raise ValueError("road_combined: wanted values in [-1/2, 1/2], as road gives them")
    return _harmonic_mean(saliency, saliency_of_masked, (2 * road_combined.double()).clamp(0, 1))


def _harmonic_mean(saliency: Tensor, saliency_of_masked: Tensor, third: Tensor) -> Tensor:
    """Of coherency, 1 - complexity and a third term; 0 where coherency is undefined since a map is constant."""
    coherent = coherency(saliency, saliency_of_masked)
    known = ~(saliency + saliency_of_masked).isnan().flatten(1).any(1)
    coherent = coherent.masked_fill(coherent.isnan() & known, 0)
    terms = torch.stack([coherent, 1 - complexity(saliency), third])
    return 3 / (1 / terms).sum(0)


def _check(model: nn.Module, images: Tensor, class_idx: Tensor, saliency: Tensor, batch_size: int) -> None:
    check_inputs(model, images, class_idx)
    check_saliency(images, saliency)
    check_whole(1, batch_size=batch_size)


def _curves(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    saliency: Tensor,
    series: Sequence[Callable[..., Series]],
    pixels_per_step: int | None,
    batch_size: int,
    mean: Tensor | None,
) -> list[Tensor]:
    """The curve (B,T+1) of each series, which is a function of images, mean colour, `_rank` and numbers of pixels."""
    _check(model, images, class_idx, saliency, batch_size)
    *_, channels, height, width = images.shape
    step = 8 * width if pixels_per_step is None else pixels_per_step
    check_whole(1, pixels_per_step=step)
    classifier = as_classifier(model)
    mean = classifier.mean if mean is None and classifier is not None else mean
    if not isinstance(mean, Tensor) or mean.numel() not in (1, channels):
        got = "None, and the model has none of its own" if mean is None else in_a_line(mean)
        got = f"shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else got
        raise ValueError(f"mean: wanted a tensor of {channels} values, the colour that mean/std makes zero, got {got}")
    check_tensors(mean=mean)
    low, high = images.aminmax()
    if not mean.isfinite().all() or (low >= 0 and high <= 1 and not 0 <= mean.min() <= mean.max() <= 1):
        raise ValueError(f"mean: wanted a colour of the images, which are in [0,1], got {in_a_line(mean.tolist())}")
    x = prepared(model, images)
    step = min(step, height * width)
    counts = step * torch.arange(math.ceil(height * width / step) + 1, device=x.device)
    given = x, mean.detach().to(x).reshape(1, -1, 1, 1).expand_as(x), _rank(saliency), counts
    return _probabilities(model, class_idx, saliency, batch_size, *(one(*given) for one in series))


def _rank(saliency: Tensor, descending: bool = True) -> Tensor:
    """(B,1,H,W) int64: the place of each pixel in the order of saliency, equals in reading order."""
    order = saliency.detach().flatten(1).argsort(dim=1, descending=descending, stable=True)
    return order.argsort(1).view(saliency.shape)


def _inserting(x: Tensor, color: Tensor, rank: Tensor, counts: Tensor) -> Series:
    return _revealed(_blurred(x, color), x, rank, counts)


def _blurred(x: Tensor, color: Tensor) -> Tensor:
    """Insertion's start: mean/std is affine in each channel, so zeros after it are the mean colour before it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    centered = F.pad((x - color).to(dtype), [5] * 4)
    blurred = TF.gaussian_blur(centered, [11, 11], [5.0, 5.0])[..., 5:-5, 5:-5]
    return torch.empty_like(x).copy_(blurred + color.to(dtype))  # in the memory format of x


def _revealed(before: Tensor, after: Tensor, rank: Tensor, counts: Tensor) -> Series:
    """Images that show `after` at the first n pixels and `before` at the rest, for each n of `counts`."""

    def show(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.where(rank[rows] < counts[columns, None, None, None], after[rows], before[rows])

    return len(counts), show


def _probabilities(
    model: nn.Module, class_idx: Tensor, saliency: Tensor, batch_size: int, *series: Series
) -> list[Tensor]:
    """(B,n) class probabilities of the images of each series; NaN for a NaN map."""
    network, head, class_idx = model, None, for_autograd(class_idx)
    unknown = saliency.flatten(1).isnan().any(1, keepdim=True)
    found = []
    with frozen(model), torch.no_grad():
        for number, show in series:
            first, rest = torch.arange(len(class_idx) * number, device=saliency.device).tensor_split([1])
            probs: list[Tensor] = []
            for flat in filter(len, (first, *rest.split(int(batch_size)))):
                rows = flat // number
                masked = prepared(model, show(rows, flat % number))
                if head is None:  # of one image alone, before the network is folded
                    logits, head = examine(model, masked, class_idx)
                    network = folded(model, masked, logits)
                else:
                    logits = read(network, masked).logits
                probs.append(probs_of_class(logits, class_idx[rows], head))
            found.append(torch.cat(probs).view(len(class_idx), -1).masked_fill(unknown, torch.nan))
    return found


def _with_area(curve: Tensor) -> Curve:
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1)), curve


@lru_cache(maxsize=4)
def _neighbors(height: int, width: int) -> tuple[Any, Any]:
    """Sparse (HW,HW) matrices: weights between neighbouring pixels, and their sums on the diagonal minus them."""
    from scipy import sparse

    beside, below = (sparse.diags_array([1.0, 1.0], offsets=[-1, 1], shape=(n, n)) for n in (width, height))
    same_row, same_column = sparse.kron(sparse.eye_array(height), beside), sparse.kron(below, sparse.eye_array(width))
    weights = ((same_row + same_column) / 6 + sparse.kron(below, beside) / 12).tocsr()
    return weights, (sparse.diags_array(weights.sum(1)) - weights).tocsr()


def _check_logits(class_idx: Tensor, head: str, **logits: Tensor) -> None:
    check_head(head)
    for name, y in logits.items():
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise TypeError(f"{name}: wanted a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}")
        check_tensors(**{name: y})
        if y.ndim not in (1, 2) or 0 in y.shape:
            raise ValueError(f"{name}: wanted shape (B,C), got {tuple(y.shape)}")
        check_class_idx(class_idx, y)
        check_class_range(class_idx, max(2, y[0].numel()))


def _constant(maps: Tensor) -> Tensor:
    return maps.amax(1) == maps.amin(1)


def _checked(probs: Tensor, masked_probs: Tensor) -> tuple[Tensor, Tensor]:
    check_alike(probs=probs, masked_probs=masked_probs)
    p, o = probs.double(), masked_probs.double()
    for name, values in (("probs", p), ("masked_probs", o)):
        if not ((values >= 0) & (values <= 1) | values.isnan()).all():
            raise ValueError(f"{name}: wanted probabilities in [0,1] (fractions, not percent)")
    return p, o


def _check_one_per_map(saliency: Tensor, **values: Tensor) -> None:
    check_tensors(**values)
    check_saliency(None, saliency)
    for name, numbers in values.items():
        if numbers.shape != saliency.shape[:1]:
            raise ValueError(f"{name}: wanted shape ({len(saliency)},), got {tuple(numbers.shape)}")
