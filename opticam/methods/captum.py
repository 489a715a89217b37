"""Attributions of the library captum as saliency maps, by name: `captum:IntegratedGradients`."""

import importlib
import inspect
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from opticam.checks import check_class_range, check_inputs, examine
from opticam.classifier import read, usable
from opticam.features import Layer, as_grid, layer_outputs, prepared, resolve_layer
from opticam.saliency import saliency_map
from opticam.state import frozen

DEFAULTS: dict[str, dict[str, Any]] = {
    "IntegratedGradients": {"n_steps": 32, "internal_batch_size": 32},
    "Occlusion": {"sliding_window_shapes": (3, 16, 16), "strides": (3, 8, 8)},
}


def captum_attribution(
    model: nn.Module, images: Tensor, class_idx: Tensor, *, name: str, layer: Layer = None, **options: Any
) -> Tensor:
    """The attribution of that name in `captum.attr` as a map: signed sum over channels, ReLU, upsampled, `min_max`.

    Args:
        model: takes `images` and returns logits (B,C). Left as found.
        images: (B,3,H,W) float in [0,1].
        class_idx: (B,) int64, the class to explain.
        name: of a class in `captum.attr`, such as IntegratedGradients, Occlusion, or LayerGradCam.
        layer: for captum's attributions of a layer, as in `grad_cam`; else not used.
        options: handed to `attribute`. Without them, captum's own defaults, but 32 steps for IntegratedGradients, and
            windows of 16 pixels, 8 apart, for Occlusion.

    Returns:
        (B,1,H,W) in [0,1].

    Raises:
        ImportError: captum is not installed.
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: no such attribution, or captum refuses it for this model; wrong shape, device or range.

    Reference:
        Kokhlikyan et al., Captum: A unified and generic model interpretability library for PyTorch, 2020,
        arXiv 2009.07896.
    """
    attribution = find_attribution(name)
    check_inputs(model, images, class_idx)
    with frozen(model):
        x = prepared(model, images).clone().requires_grad_()
        with torch.no_grad():
            check_class_range(class_idx, examine(model, x[:1]).logits.shape[1])
        wants_layer = "layer" in inspect.signature(attribution).parameters
        target = resolve_layer(model, layer) if wants_layer else None
        try:
            network, target = _apart(model, target)
            method = attribution(_Logits(network), target) if wants_layer else attribution(_Logits(network))
            values = method.attribute(x, target=usable(class_idx), **DEFAULTS.get(name, {}) | options)
            values = values[0] if isinstance(values, tuple) else values
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AssertionError, AttributeError, RuntimeError) as error:
            raise ValueError(f"method: captum cannot compute {name} here ({error})") from error
    grid = values.detach()
    if wants_layer:
        (output,), _ = layer_outputs(model, images[:1], [layer])
        if grid.shape[1:] == output.shape[1:]:
            grid = as_grid(grid, model, images, layer)
        elif as_grid(output, model, images, layer).shape != output.shape or grid.shape[1] != 1:
            raise ValueError(f"layer: captum's {name} sums over the wrong axis there; wanted one with maps (B,K,h,w)")
    return saliency_map(grid.sum(1, keepdim=True), images.shape[-2:])


class _Logits(nn.Module):
    """A network that returns logits (B,C), whatever the one inside returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return read(self.network, images).logits


def _apart(model: nn.Module, layer: nn.Module | None) -> tuple[nn.Module, nn.Module | None]:
    """Copies of the network and its layer with the same weights: captum sets hooks and leaves activations behind."""
    weights: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    network = deepcopy(model, weights)
    return network, None if layer is None else weights[id(layer)]


def find_attribution(name: str) -> Any:
    """The class of that name in `captum.attr`; ImportError or ValueError where there is none."""
    try:
        known = importlib.import_module("captum.attr")
    except ImportError as error:
        raise ImportError("method: captum is not installed; it is an extra, pip install -e '.[captum]'") from error
    found = getattr(known, name, None)
    if not (inspect.isclass(found) and issubclass(found, known.Attribution) and hasattr(found, "attribute")):
        names = [key for key, value in vars(known).items() if inspect.isclass(value) and hasattr(value, "attribute")]
        raise ValueError(f"method: no {name!r} in captum.attr; wanted one of {', '.join(sorted(names))}")
    return found
