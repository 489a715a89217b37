"""Metrics of faithfulness: what masking does to the probability of the class.

One value per image; means are the caller's. All take `p = softmax(f(x))_c` of the image and
`o = softmax(f(x * S))_c` of the masked image.
"""

import torch
from torch import Tensor


def class_probability(logits: Tensor, class_idx: Tensor) -> Tensor:
    """Softmax probability of each image's class, in float64, so that `1 - p` keeps its digits.

    Args:
        logits: (B,C).
        class_idx: (B,) int64.

    Returns:
        (B,) float64 in [0,1].
    """
    return logits.double().softmax(1).gather(1, class_idx[:, None])[:, 0]


def average_drop(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Drop of each image, `max(0, p - o)/p`.

    Kept: the pixels the map calls salient; removed: the rest. Lower is better: an ideal map loses nothing.

    Args:
        probs: (B,) p in (0,1].
        masked_probs: (B,) o in [0,1].

    Returns:
        (B,) float64, a fraction in [0,1]; 0 where p is 0 (nothing to lose); NaN where a probability is NaN.

    Raises:
        ValueError: shapes differ or a value is outside [0,1].

    Reference:
        Chattopadhay et al., Grad-CAM++, WACV 2018, arXiv 1710.11063, section 4.1, where it is given in percent.
    """
    p, o = _checked(probs, masked_probs)
    return (p - o).clamp(min=0) / p.clamp(min=torch.finfo(p.dtype).tiny)


def average_increase(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Increase of each image, `1[o > p]`, strict.

    Kept: the pixels the map calls salient; removed: the rest. Higher is better. It counts wins and ignores their size.

    Args:
        probs: (B,) p in [0,1].
        masked_probs: (B,) o in [0,1].

    Returns:
        (B,) float64, 0 or 1; NaN where a probability is NaN.

    Raises:
        ValueError: shapes differ or a value is outside [0,1].

    Reference:
        Chattopadhay et al., Grad-CAM++, WACV 2018, arXiv 1710.11063, section 4.1, where it is given in percent.
    """
    p, o = _checked(probs, masked_probs)
    return torch.where(p.isnan() | o.isnan(), torch.nan, (o > p).double())


def average_gain(probs: Tensor, masked_probs: Tensor) -> Tensor:
    """Average Gain of each image, `max(0, o - p)/(1 - p)`: the mirror image of Average Drop.

    Kept: the pixels the map calls salient; removed: the rest. Higher is better: the share of the possible gain made.

    Args:
        probs: (B,) p in [0,1].
        masked_probs: (B,) o in [0,1].

    Returns:
        (B,) float64, a fraction in [0,1]; 0 where p is 1 (no gain possible), and counted; NaN where a probability is.

    Raises:
        ValueError: shapes differ or a value is outside [0,1].

    Reference:
        Zhang et al., Opti-CAM, CVIU 2024, arXiv 2301.07002, where it is given in percent.
    """
    p, o = _checked(probs, masked_probs)
    return (o - p).clamp(min=0) / (1 - p).clamp(min=torch.finfo(p.dtype).tiny)


def _checked(probs: Tensor, masked_probs: Tensor) -> tuple[Tensor, Tensor]:
    if probs.shape != masked_probs.shape:
        raise ValueError(
            f"masked_probs: wanted the shape of probs, {tuple(probs.shape)}, got {tuple(masked_probs.shape)}"
        )
    p, o = probs.double(), masked_probs.double()
    for name, values in (("probs", p), ("masked_probs", o)):
        if not ((values >= 0) & (values <= 1) | values.isnan()).all():
            raise ValueError(f"{name}: wanted probabilities in [0,1] (fractions, not percent)")
    return p, o
