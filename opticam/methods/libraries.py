"""Methods of other libraries by name: `captum:IntegratedGradients`, `grad-cam:FinerCAM`, `torchcam:ISCAM`.

A library works on a twin of the network, whose modules, hooks, flags and gradients are its own; only the values of the
weights are shared. So the network is left as found, whatever the library does.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opticam.checks import as_seed, check_class_range, check_inputs, silent_twin
from opticam.classifier import bare, for_autograd, read
from opticam.features import Layer, as_grid, as_layers, layer_outputs, prepared, resolve_layer
from opticam.folding import OF_TORCH, twin_of
from opticam.saliency import saliency_map
from opticam.state import all_modules, frozen, hooked, hooked_by_others

REFUSALS = (TypeError, AssertionError, AttributeError, RuntimeError, ValueError, LookupError)
CAPTUM_DEFAULTS: dict[str, dict[str, Any]] = {
    "IntegratedGradients": {"n_steps": 32, "internal_batch_size": 32},
    "Occlusion": {"sliding_window_shapes": (3, 16, 16), "strides": (3, 8, 8)},
}


def library_map(
    model: nn.Module,
    images: Tensor,
    class_idx: Tensor,
    *,
    library: str,
    name: str,
    layer: Layer | Sequence[Layer] = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """The map of another library's method by the one rule: what it gives before its own scaling, then `saliency_map`.

    Of an attribution of captum, what it gives is the signed sum over channels. Arguments, result and errors as
    `grad_cam`, and:

    Args:
        library: a key of `LIBRARIES`.
        name: of the library's class, such as IntegratedGradients, Occlusion or LayerGradCam of captum.
        layer: also several where the library takes them, of which it makes one map in its own way. Not used by a class
            that takes no layer.
        seed: of what the library draws.
        options: handed to the library's class, or to captum's `attribute`. Without them, the library's own defaults,
            but 32 steps for IntegratedGradients, and for Occlusion windows of 16 pixels, clipped to the image, 8 apart.

    Raises:
        ImportError: the library is not installed.
        ValueError: no such method, or the library refuses it for this model.

    Reference:
        Kokhlikyan et al., Captum: A unified and generic model interpretability library for PyTorch, 2020,
        arXiv 2009.07896.
    """
    kind, run = class_of(library, name), LIBRARIES[library][1]
    check_inputs(model, images, class_idx)
    seed = as_seed(seed)
    with frozen(model), _seeded(seed, images.device):
        layers = as_layers(layer) if any("layer" in word for word in inspect.signature(kind).parameters) else []
        outputs, logits = layer_outputs(model, images[:1], layers)
        check_class_range(class_idx, logits.shape[1])
        shapes = [output.shape[1:] for output in outputs]
        twins = _private(model)
        _check_twin(model, twins[model], prepared(model, images[:1]))
        places = [twins[resolve_layer(model, one)] for one in layers]

        def grid(output: Tensor) -> Tensor:
            which = shapes.index(output.shape[1:]) if len(shapes) > 1 else 0
            return as_grid(output, model, images, layers[which])

        x = prepared(model, images).clone().requires_grad_()
        try:
            maps = run(kind, _Logits(twins[model]).eval(), x, for_autograd(class_idx), places, grid, options)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            raise ValueError(f"method: {library} cannot compute {name} here ({error})") from error
    if maps.shape[:1] != images.shape[:1] or maps.ndim != 3:
        raise ValueError(f"method: {name} gives {tuple(maps.shape)}; wanted maps ({len(images)},h,w)")
    sizes = [images.shape[2:], *(grid(output).shape[2:] for output in outputs)]
    if library == "captum" and layers and maps.shape[1:] not in sizes:  # it sums over the second axis
        raise ValueError(f"layer: captum's {name} gives no map of its cells; wanted one with maps (B,K,h,w)")
    return saliency_map(maps[:, None].to(images.device), images.shape[-2:])


class _Logits(nn.Module):
    """The twin as a library wants it: logits (B,C) whatever the network returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return read(self.network, images).logits


def _check_twin(model: nn.Module, twin: nn.Module, image: Tensor) -> None:
    """Refuse a network of which a copy is another, or of which no copy can be made."""
    own: list[nn.Module] = []
    silent, _ = silent_twin(model)  # no pass that others count
    with torch.no_grad(), suppress(Exception), ExitStack() as hooks:
        for module in all_modules(model):
            hooks.enter_context(hooked(module, lambda module, args, output: own.append(module)))
        read(silent, image)
    if own:
        raise ValueError(
            f"model: {type(bare(model)).__name__} reaches {type(own[0]).__name__} by a way that the copy, on which a "
            "library works, does not follow; wanted its parts as attributes"
        )
    if hooked_by_others(model):
        x = image.flip(3) / 2  # not the last that the network has seen
        with torch.no_grad(), suppress(Exception):  # what the copy does not find ends its pass
            found, wanted = (read(network, x).logits for network in (twin, model))
            if (found - wanted).abs().max() <= 2**13 * torch.finfo(wanted.dtype).eps * wanted.abs().max():
                return
        raise ValueError(
            f"model: hooks in {type(bare(model)).__name__} keep what a later part of the pass reads, and a library "
            "works on a copy that they do not know; wanted forward methods that hand it on"
        )


def _private(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Module -> its twin, which shares the values of the weights and nothing else that a library may change."""
    twins: dict[nn.Module, nn.Module] = {}
    twin_of(model, twins)
    for twin in twins.values():
        own = {key: vars(twin)[key].copy() for key in OF_TORCH if isinstance(vars(twin)[key], dict)}  # hooks among them
        own["_parameters"] = {
            name: p if p is None else nn.Parameter(p.detach(), p.is_floating_point())
            for name, p in own["_parameters"].items()
        }
        vars(twin).update(own)
    return twins


def _by_captum(
    kind: Any, network: _Logits, x: Tensor, class_idx: Tensor, layers: list[nn.Module], grid: Callable, options: dict
) -> Tensor:
    """Maps (B,h,w), or (B,H,W) of attributions of the image."""
    if len(layers) > 1:
        raise ValueError("layer: wanted one")
    defaults = CAPTUM_DEFAULTS.get(kind.__name__, {})
    clipped = {k: tuple(map(min, v, x.shape[1:])) if isinstance(v, tuple) else v for k, v in defaults.items()}
    options = clipped | options
    values = kind(network, *layers).attribute(x, target=class_idx, **options)
    values = values[0] if isinstance(values, tuple) else values
    of_image = not layers or values.shape == x.shape  # the latter of GuidedGradCam
    return (values if of_image else grid(values)).detach().sum(1)


def _by_grad_cam(
    kind: Any, network: _Logits, x: Tensor, class_idx: Tensor, layers: list[nn.Module], grid: Callable, options: dict
) -> Tensor:
    """Maps (B,h,w), or (B,H,W) of methods that have no single map of a layer."""
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    read_by_it = [] if kind.__name__ == "FullGrad" else layers  # FullGrad reads all biases, and warns of a layer
    method = kind(network, read_by_it, reshape_transform=grid, **options)
    raw: list[np.ndarray] = []
    inner = getattr(method, "base_cam", method)
    if hasattr(inner, "get_cam_image") and len(layers) == 1:
        inner.get_cam_image = partial(_kept, raw, inner.get_cam_image)
    if kind.__name__ == "FinerCAM":  # its own targets, for the classes asked for; it knows one class for all images
        found = [method(x[i : i + 1], None, target_idx=c) for i, c in enumerate(class_idx.tolist())]
        return torch.from_numpy(np.concatenate(raw or found))
    result = method(x, [target(c) for c in class_idx.tolist()])
    return torch.from_numpy(np.asarray(raw[0] if len(raw) == 1 else result))


def _kept(raw: list[np.ndarray], function: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    raw.append(function(*args))
    return raw[-1]


def _by_torchcam(
    kind: Any, network: _Logits, x: Tensor, class_idx: Tensor, layers: list[nn.Module], grid: Callable, options: dict
) -> Tensor:
    """Maps (B,h,w), before torchcam's own scaling."""
    takes = set(inspect.signature(kind).parameters)
    if any(one.kind is one.VAR_KEYWORD for one in inspect.signature(kind).parameters.values()):  # handed on to its base
        takes |= {key for base in kind.__mro__ for key in inspect.signature(base.__init__).parameters}
    given = {"input_shape": tuple(x.shape[1:]), "reshape_transform": grid}
    given = {key: value for key, value in given.items() if key in takes} | options
    owner = bare(network.network) if "score_projection" in takes else network  # LeGrad looks for the parts of a ViT
    method = kind(owner, layers if len(layers) > 1 else layers[0], **given)
    maps = method(class_idx.tolist(), network(x), normalized=False)
    if len(maps) != 1:
        raise ValueError(f"layer: wanted one, got {len(layers)}")
    return maps[0]


LIBRARIES: dict[str, tuple[str, Callable[..., Tensor]]] = {  # library -> the module that holds its classes, their use
    "captum": ("captum.attr", _by_captum),
    "grad-cam": ("pytorch_grad_cam", _by_grad_cam),
    "torchcam": ("torchcam.methods", _by_torchcam),
}


def class_of(library: str, name: str) -> Any:
    """The class of that name in a library; ImportError or ValueError where there is none."""
    try:
        module = importlib.import_module(LIBRARIES[library][0])
    except ImportError as error:
        raise ImportError(
            f"method: {library} is not installed: pip install '.[{library}]' in a clone of opticam"
        ) from error
    known = {key: value for key, value in vars(module).items() if inspect.isclass(value) and _explains(value)}
    if name not in known:
        raise ValueError(f"method: no {name!r} in {library}; wanted one of {', '.join(sorted(known))}")
    return known[name]


def _explains(kind: Any) -> bool:
    """Whether a class maps images to saliency: captum's take a target, grad-cam's targets, torchcam's a class index."""
    if hasattr(kind, "attribute"):
        return {"inputs", "target"} <= inspect.signature(kind.attribute).parameters.keys()
    call = inspect.signature(getattr(kind, "forward", kind.__call__)).parameters
    return "targets" in call or "class_idx" in call


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, torch's and numpy's; on exit their states are as before."""
    before = np.random.get_state()  # noqa: NPY002  (grad-cam draws from it)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
