"""The algebra of saliency maps: combine feature maps, upsample, normalise, mask an image.

Normalisations and their ablation: Zhang et al., Opti-CAM: Optimizing saliency maps for interpretability, CVIU 2024,
arXiv 2301.07002.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from opticam.checks import check_strided, check_tensors
from opticam.classifier import for_autograd
from opticam.state import in_a_line


def combine(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of feature maps, `sum_k w_k A_k`: (B,1,h,w), unbounded, of features (B,K,h,w) and weights (B,K)."""
    dtype = torch.promote_types(features.dtype, weights.dtype)
    with torch.autocast(features.device.type, enabled=False):  # the caller's would make the sum coarse
        return torch.einsum("bkhw,bk->bhw", features.to(dtype), weights.to(dtype))[:, None]


def upsample(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear interpolation of maps (B,C,h,w) to the size (H,W) of the image, `align_corners=False`: (B,C,H,W)."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def min_max(maps: Tensor) -> Tensor:
    """`n(s) = (s - min s)/(max s - min s)` per image; `n(constant) = 0`. The paper's default.

    A map counts as constant when its range is no more than rounding leaves of a constant after interpolation,
    8 eps max|s|: without that, the rounding noise itself would be stretched to [0,1]. (The paper does not mention it.)

    Args:
        maps: (B,1,H,W).

    Returns:
        (B,1,H,W) in [0,1], independent of the scale and offset of the map.
    """
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    span = high - low
    constant = span <= 8 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0, (maps - low) / torch.where(constant, 1, span))


def max_only(maps: Tensor) -> Tensor:
    """`n(s) = s / max s` per image; an option of the ablation. A map without a positive value gives zeros.

    Args:
        maps: (B,1,H,W), non-negative as sums of ReLUs are; negative values count as 0.

    Returns:
        (B,1,H,W) in [0,1], independent of the scale of the map; a positive constant gives ones.
    """
    maps = maps.relu()
    high = maps.amax((1, 2, 3), keepdim=True)
    return maps / torch.where(high > 0, high, 1)


def sigmoid(maps: Tensor) -> Tensor:
    """`n(s) = 1/(1 + exp(-s))`, elementwise, in (0,1), from 1/2 on for non-negative maps; an option of the ablation."""
    return maps.sigmoid()


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {"min_max": min_max, "max": max_only, "sigmoid": sigmoid}


def saliency_map(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """The one post-processing rule of all methods here: ReLU, upsample, then `min_max`.

    Args:
        maps: (B,1,h,w), unbounded.
        size: (H,W).

    Returns:
        (B,1,H,W) in [0,1], no grad; float32, or float64 where the map is.
    """
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    return min_max(upsample(maps.relu(), size))


def apply_mask(images: Tensor, saliency: Tensor, baseline: Tensor | None = None) -> Tensor:
    """The masked image `x * S`, black where the map is 0, or `x * S + b * (1 - S)` with a baseline `b`.

    Args:
        images: (B,3,H,W) in [0,1], before mean/std.
        saliency: (B,1,H,W) in [0,1].
        baseline: what shows where the map is 0, of a shape that broadcasts to the images; None for black.

    Returns:
        (B,3,H,W) of the dtype of the images.

    Raises:
        TypeError: images of whole numbers.
        ValueError: a map of another shape.
    """
    if not images.is_floating_point():  # the map would become zeros and ones
        raise TypeError(f"images: wanted a floating-point dtype, got {images.dtype}")
    if saliency.ndim != images.ndim or saliency.shape[-3] != 1:  # else its images would be taken for channels
        raise ValueError(f"saliency: wanted one map per image, (B,1,H,W), got {tuple(saliency.shape)}")
    saliency = saliency.to(images.dtype)
    if baseline is None:
        return images * saliency
    return torch.lerp(baseline.to(images.dtype).expand_as(images), images, saliency)


def check_saliency(images: Tensor | None, saliency: Tensor, name: str = "saliency") -> None:
    """Refuse, in one sentence, what is not a map of the images. NaN passes: results of such a map are NaN.

    Args:
        images: (B,3,H,W); None where a metric takes maps alone.
        saliency: (B,1,H,W) in [0,1], on the device of the images.
        name: of the argument that they came as.

    Raises:
        TypeError: the map is not a tensor, or not floating-point.
        ValueError: wrong shape, device or range.
    """
    if not isinstance(saliency, Tensor):
        raise TypeError(f"{name}: wanted a tensor (B,1,H,W), got {type(saliency).__name__}")
    check_strided(**{name: saliency})
    wanted = None if images is None else (len(images), 1, *images.shape[-2:])
    if wanted is None and (saliency.ndim != 4 or saliency.shape[1] != 1 or 0 in saliency.shape):
        raise ValueError(f"{name}: wanted shape (B,1,H,W) without empty dimensions, got {tuple(saliency.shape)}")
    if wanted is not None and saliency.shape != wanted:
        raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(saliency.shape)}")
    if images is not None and saliency.device != images.device:
        raise ValueError(f"{name}: wanted on the device of the images, {images.device}, got {saliency.device}")
    if saliency.is_meta:
        check_tensors(**{name: saliency})
    if not saliency.is_complex() and ((saliency < 0) | (saliency > 1)).any():
        raise ValueError(f"{name}: wanted values in [0,1], got [{saliency.min():.3g}, {saliency.max():.3g}]")
    if not saliency.is_floating_point():
        raise TypeError(f"{name}: wanted a floating-point dtype, got {saliency.dtype}")


def baseline_of(images: Tensor, baseline: Tensor | Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """What shows where a map is 0, as `apply_mask` takes it.

    Args:
        images: (B,3,H,W).
        baseline: a tensor that broadcasts to the images, a function from images to one, or None for black.

    Returns:
        (B,3,H,W) of the device and dtype of the images; None for None.

    Raises:
        TypeError: neither of these.
        ValueError: wrong shape; values of 0 to 255 beside images in [0,1].
    """
    if baseline is None:
        return None
    found = baseline(images) if callable(baseline) else baseline
    if not isinstance(found, Tensor):
        raise TypeError(f"baseline: wanted a tensor or a function, such as BASELINES['blur'], got {in_a_line(found)}")
    try:
        colors = for_autograd(found).to(images).expand(images.shape)
    except RuntimeError as error:
        raise ValueError(
            f"baseline: wanted a shape that broadcasts to {tuple(images.shape)}, got {tuple(found.shape)}"
        ) from error
    if images.detach().amax() <= 1 and (highest := colors.detach().abs().amax()) > 10:
        raise ValueError(f"baseline: wanted values like those of the images, up to 1, got {highest:.4g}")
    return colors


def mean_color(images: Tensor) -> Tensor:
    """Baseline: the mean colour of each image, (B,3,1,1). (For the mean colour of ImageNet give `model.mean`.)"""
    return images.mean((2, 3), keepdim=True)


def blur(images: Tensor, side: int = 11, sigma: float = 5.0) -> Tensor:
    """Baseline: each image blurred by an 11x11 Gaussian of sigma 5, (B,3,H,W); the start of RISE's insertion.

    Unlike there, borders are reflected, since 0 is black here and not the mean colour. Sides of 6 pixels or more.

    Args:
        images: (B,3,H,W), each side longer than half of the Gaussian's.
        side: of the Gaussian in pixels, odd.
        sigma: of the Gaussian in pixels.

    Raises:
        ValueError: the images are smaller.
    """
    if min(images.shape[-2:]) <= side // 2:
        raise ValueError(f"baseline: blur wants sides of {side // 2 + 1} pixels or more, got {tuple(images.shape)}")
    return TF.gaussian_blur(images, [side, side], [sigma, sigma])


def gray(images: Tensor) -> Tensor:
    """Baseline: one half in every channel, (1,1,1,1)."""
    return images.new_full((1, 1, 1, 1), 0.5)


BASELINES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "black": None,
    "mean": mean_color,
    "blur": blur,
    "gray": gray,
}
