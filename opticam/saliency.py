"""The algebra of saliency maps: combine feature maps, upsample, normalise, mask an image."""

import torch
from torch import Tensor
from torch.nn import functional as F


def combine(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of feature maps, `sum_k w_k A_k`.

    Args:
        features: (B,K,h,w).
        weights: (B,K).

    Returns:
        (B,1,h,w), unbounded.
    """
    return torch.einsum("bkhw,bk->bhw", features, weights)[:, None]


def upsample(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear interpolation to the size of the image, `align_corners=False`.

    Args:
        maps: (B,1,h,w).
        size: (H,W).

    Returns:
        (B,1,H,W).
    """
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def min_max(maps: Tensor) -> Tensor:
    """`n(s) = (s - min s)/(max s - min s)` per image; `n(constant) = 0`. The paper's default.

    A map counts as constant when its range is no more than rounding leaves of a constant after interpolation,
    8 eps max|s|: without that, the rounding noise itself would be stretched to [0,1]. (The paper says nothing of it.)

    Args:
        maps: (B,1,H,W).

    Returns:
        (B,1,H,W) in [0,1], independent of the scale and offset of the map.

    Reference:
        Zhang et al., Opti-CAM: Optimizing saliency maps for interpretability, CVIU 2024, arXiv 2301.07002.
    """
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    span = high - low
    constant = span <= 8 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0, (maps - low) / torch.where(constant, 1, span))


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


def apply_mask(images: Tensor, saliency: Tensor) -> Tensor:
    """The masked image `x * S`, black where the map is 0.

    Args:
        images: (B,3,H,W) in [0,1], before mean/std.
        saliency: (B,1,H,W) in [0,1].

    Returns:
        (B,3,H,W) of the dtype of the images.
    """
    return images * saliency.to(images.dtype)
