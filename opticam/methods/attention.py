"""Attention methods: what the class token of a vision transformer attends to."""

import torch
from torch import Tensor, nn

from opticam.features import Layer, attention_maps, block_attention_gradients
from opticam.layouts import class_token_grid
from opticam.methods.record import Method
from opticam.saliency import saliency_map


def raw_attention(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Attention of the class token in the last block, averaged over heads; does not depend on the class.

    Arguments, result and errors as `grad_cam`, but `layer` is not used, and the model has to be a ViT or DeiT of timm
    or torchvision with a class token.

    Reference:
        Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, arXiv 2010.11929.
    """
    attention, _, _ = attention_maps(model, images, class_idx, with_gradients=False)
    return _of_class_token(attention[-1].mean(1), model, images)


def attention_rollout(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Attention rollout: the product over blocks of `mean_h A + I`, rows divided by their sum.

    Arguments, result and errors as `raw_attention`; does not depend on the class.

    Reference:
        Abnar, Zuidema, Quantifying attention flow in transformers, ACL 2020, arXiv 2005.00928, eq. 1.
    """
    attention, _, _ = attention_maps(model, images, class_idx, with_gradients=False)
    identity = rollout = _identity(attention[0])
    with torch.autocast(images.device.type, enabled=False):  # the caller's would make the products coarse
        for maps in attention:
            flow = maps.to(rollout.dtype).mean(1) + identity
            rollout = flow / flow.sum(2, keepdim=True) @ rollout
    return _of_class_token(rollout, model, images)


def gradient_rollout(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """Gradient attention rollout: `R <- R + mean_h relu(dA * A) R` over the blocks, from `R = I`.

    Arguments, result and errors as `raw_attention`.

    Reference:
        Chefer, Gur, Wolf, Generic attention-model explainability for interpreting bi-modal and encoder-decoder
        transformers, ICCV 2021, arXiv 2103.15679, eq. 5 and 6.
    """
    attention, gradients, _ = attention_maps(model, images, class_idx)
    relevance = _identity(attention[0])
    with torch.autocast(images.device.type, enabled=False):
        for maps, slopes in zip(attention, gradients, strict=True):
            relevance = relevance + (slopes * maps).to(relevance.dtype).relu().mean(1) @ relevance
    return _of_class_token(relevance, model, images)


def legrad(model: nn.Module, images: Tensor, class_idx: Tensor, *, layer: Layer = None) -> Tensor:
    """LeGrad: `mean_l mean_hi relu(d s^l_c / d A^l_hij)`, the sensitivity of each block's class score to its attention.

    `s^l` is what the final norm and the head make of the output of block l. The mean runs over blocks l, heads h and
    queries i; the keys j that are patches make the map. Arguments, result and errors as `raw_attention`, but the ViT
    may also pool, without a class token.

    Reference:
        Bousselham et al., LeGrad: An explainability method for vision transformers via feature formation sensitivity,
        2024, arXiv 2404.03214.
    """
    gradients, grid = block_attention_gradients(model, images, class_idx)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    sensitivity = torch.stack([slopes.relu().to(dtype).mean((1, 2)) for slopes in gradients]).mean(0)
    return saliency_map(grid(sensitivity[:, :, None]), images.shape[-2:])


def _identity(maps: Tensor) -> Tensor:
    return torch.eye(maps.shape[-1], device=maps.device, dtype=torch.promote_types(maps.dtype, torch.float32))


def _of_class_token(rollout: Tensor, model: nn.Module, images: Tensor) -> Tensor:
    """The map of the first row of (B,N,N), without the tokens that stand for no part of the image."""
    grid = class_token_grid(model, images.shape[-2:])
    assert grid is not None  # noqa: S101  (or there was no attention)
    return saliency_map(grid(rollout[:, 0, :, None]), images.shape[-2:])


RECORDS = {
    "raw_attention": Method(raw_attention, "Raw attention", "#5f9e2f", needs="attention"),
    "attention_rollout": Method(attention_rollout, "Attention rollout", "#cc6677", needs="attention"),
    "gradient_rollout": Method(gradient_rollout, "Gradient rollout", "#aa4499", needs="attention"),
    "legrad": Method(legrad, "LeGrad", "#117733", needs="attention"),
}
