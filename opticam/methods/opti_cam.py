"""Opti-CAM: the weights of the feature maps optimised for one image, so that the masked image has the largest logit.

Zhang, Torres, Sicre, Avrithis, Ayache, "Opti-CAM: Optimizing saliency maps for interpretability", CVIU 2024,
arXiv 2301.07002.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opticam.features import Layer, check_class_range, check_inputs, feature_maps, frozen, usable
from opticam.saliency import apply_mask, combine, min_max, upsample


class OptiCAMResult(NamedTuple):
    """What `opti_cam` returns.

    Attributes:
        saliency: (B,1,H,W) in [0,1], the best map seen.
        weights: (B,K), softmax(u) of that map; non-negative, sum 1.
        objective: (B,T+1), the objective before the first step and after each of the T steps.
        num_steps: (B,) int64, the steps after which the kept map was reached: the position of the maximum.
    """

    saliency: Tensor
    weights: Tensor
    objective: Tensor
    num_steps: Tensor


def class_logit(masked_logits: Tensor, logits: Tensor, class_idx: Tensor) -> Tensor:
    """The class logit of the masked image, `f(x * S)_c`: the objective of the paper, to be maximised.

    Args:
        masked_logits: (B,C), of the masked image.
        logits: (B,C), of the image; not used.
        class_idx: (B,) int64.

    Returns:
        (B,), unbounded; higher is better.
    """
    return masked_logits.gather(1, class_idx[:, None])[:, 0]


def opti_cam(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    layer: Layer = None,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor] = class_logit,
    normalize: Callable[[Tensor], Tensor] = min_max,
    num_steps: int = 100,
    lr: float = 0.1,
) -> OptiCAMResult:
    """Saliency maps `S(u*)` whose masked image has the largest class logit.

    `S(u) = n(up(sum_k softmax(u)_k relu(A_k)))` and `u* = argmax_u f(x * S(u))_c`, by Adam from constant `u`.

    Two deviations from the published code, both named in `definitions.md` as faults of it: the objective is summed over
    the batch, so an image's map does not depend on its neighbours; and the best map seen is kept, which for a rising
    objective is the last one. That takes T+1 forward and T backward passes, and one more forward for the features.

    Args:
        model: takes `images` and returns logits (B,C). Left as found: mode, flags, gradients, hooks.
        images: (B,3,H,W) float in [0,1]; mean/std are the model's own business.
        class_idx: (B,) int64, the class to explain.
        layer: a module or its dotted name; by default the model's own target layer.
        objective: from (masked_logits, logits, class_idx) to (B,), maximised for each image by itself.
        normalize: from upsampled maps (B,1,H,W) to saliency in [0,1].
        num_steps: T. The paper's experiments are reproduced with 100; the published demo runs 50.
        lr: learning rate of Adam.

    Returns:
        An `OptiCAMResult`; on the device of the images, without gradients; float32, or float64 for float64 images.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: wrong shape, device or range, unknown layer, negative `num_steps`, `lr` not above 0.
    """
    check_inputs(model, images, class_idx)
    if num_steps < 0:
        raise ValueError(f"num_steps: wanted at least 0, got {num_steps}")
    if not lr > 0:
        raise ValueError(f"lr: wanted a positive number, got {lr}")
    with frozen(model):
        images = usable(images).detach().contiguous(memory_format=torch.channels_last)
        class_idx = usable(class_idx)
        features, logits = feature_maps(model, images, layer)
        check_class_range(class_idx, logits.shape[1])
        dtype = torch.promote_types(features.dtype, torch.float32)  # half precision is too coarse for the weights
        features = features.to(dtype).relu()

        def saliency_of(u: Tensor) -> Tensor:
            return normalize(upsample(combine(features, u.softmax(1)), images.shape[-2:]))

        u = torch.zeros(features.shape[:2], dtype=dtype, device=images.device, requires_grad=True)
        optimizer = torch.optim.Adam([u], lr=lr, betas=(0.9, 0.999), eps=1e-8, maximize=True)
        history = torch.empty(len(images), num_steps + 1, dtype=dtype, device=images.device)
        best = torch.full_like(history[:, 0], -torch.inf)
        best_u = u.detach().clone()
        for step in range(num_steps + 1):
            value = objective(model(apply_mask(images, saliency_of(u))), logits, class_idx)
            history[:, step] = value.detach()
            better = history[:, step] > best
            best = torch.where(better, history[:, step], best)
            best_u = torch.where(better[:, None], u.detach(), best_u)
            if step < num_steps:
                (u.grad,) = torch.autograd.grad(value.sum(), u)
                optimizer.step()
        with torch.no_grad():
            return OptiCAMResult(saliency_of(best_u), best_u.softmax(1), history, history.argmax(1))
