"""Checks of arguments: what would fail later or go wrong in silence is refused in one sentence that names it."""

import math
import operator
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from opticam.classifier import (
    Classifier,
    Head,
    Output,
    as_classifier,
    bare,
    find_logits,
    read,
    turn,
    unwrapped,
    weights_of,
)
from opticam.folding import twin_of
from opticam.state import (
    all_modules,
    aside,
    buffers_of,
    class_of,
    hooked_by_others,
    in_a_line,
    of_others,
    parameters_of,
    turns,
)


def check_network(model: nn.Module) -> None:
    """Refuse networks that cannot be explained.

    Raises:
        TypeError: not a module, TorchScript, exported, or quantised.
        ValueError: weights without values; batch norms by which an image's result depends on its batch; a `Classifier`
            inside whose head is not that of the model; transforms inside that move the pixels, such as a crop.
    """
    check_module(model)
    classifier = as_classifier(model)
    head = "softmax" if classifier is None else classifier.head
    modules = all_modules(model)
    for kind in dict.fromkeys(map(type, modules)):
        if issubclass(kind, torch.jit.ScriptModule):
            raise TypeError("model: TorchScript hides its layers; wanted the network that it was made from")
        if kind.__module__.startswith("torchvision.transforms") and _MOVING.search(kind.__name__):
            raise ValueError(f"model: {kind.__name__} inside moves the pixels; wanted it done to the images before")
        if kind.__module__.startswith("torch.") and "quantized" in kind.__module__:
            raise TypeError(f"model: {kind.__name__} is quantised and has no gradients; wanted floating-point weights")
    for module in modules:
        if "train" in vars(module) and getattr(module.train, "__module__", "").startswith("torch.export"):
            raise TypeError("model: torch.export hides its layers; wanted the network that it was made from")
        if isinstance(module, _BatchNorm) and module._buffers.get("running_mean") is None:
            raise ValueError(
                f"model: {type(module).__name__} without running statistics makes an image's result depend on its "
                "batch; wanted track_running_stats=True, or a norm of each image alone"
            )
        if isinstance(module, Classifier) and module.head != head:
            raise ValueError(
                f"model: {type(model).__name__} holds a Classifier with head={module.head!r} and does not hand that "
                f"on; wanted the Classifier itself, or opticam.wrap(..., head={module.head!r}) around the whole"
            )
        for weights in module._parameters.values():
            if weights is not None and weights.dtype in (torch.int8, torch.uint8):
                raise TypeError(f"model: {type(module).__name__} is quantised; wanted floating-point weights")
    for tensor in (*parameters_of(modules), *buffers_of(modules)):
        if is_lazy(tensor) or tensor.is_meta:
            what = "lazy weights" if is_lazy(tensor) else "weights on the meta device"
            raise ValueError(f"model: {what} have no values; wanted the weights loaded")


def check_module(model: nn.Module) -> None:
    """Refuse, by a TypeError, what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")


_MOVING = re.compile("Crop|Pad|Flip|Rotation|Affine|Perspective|Elastic")  # transforms; a map would lie elsewhere


def check_inputs(model: nn.Module, images: Tensor, class_idx: Tensor) -> None:
    """As `check_images` and `check_class_idx`."""
    check_images(model, images)
    check_class_idx(class_idx, images)


def check_class_idx(class_idx: Tensor, images: Tensor) -> None:
    """Refuse class indices that are not (B,) int64 on the device of the images or of their logits.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(class_idx, Tensor):
        raise TypeError(f"class_idx: wanted an int64 tensor of shape ({len(images)},), got {type(class_idx).__name__}")
    if class_idx.dtype != torch.int64:
        raise TypeError(f"class_idx: wanted dtype torch.int64, got {class_idx.dtype}")
    check_strided(class_idx=class_idx)
    if class_idx.shape != images.shape[:1]:
        raise ValueError(f"class_idx: wanted shape ({len(images)},), one class per image, got {tuple(class_idx.shape)}")
    if class_idx.device != images.device:
        raise ValueError(f"class_idx: wanted on the device of the images, {images.device}, got {class_idx.device}")


def check_images(model: nn.Module, images: Tensor) -> None:
    """Refuse, in one sentence, what would fail later or go wrong in silence.

    Args:
        model: any network, see `check_network`; of a `Classifier`, the images' range and number of channels are checked
            too.
        images: (B,C,H,W) float, of the device and dtype of the model.

    Raises:
        TypeError: an argument is not a tensor, or has the wrong dtype; a network of a wrong kind.
        ValueError: an argument has the wrong shape, device or range.
    """
    check_network(model)
    if not isinstance(images, Tensor):
        raise TypeError(f"images: wanted a tensor (B,3,H,W), got {type(images).__name__}")
    check_strided(images=images)
    if not images.is_floating_point():
        raise TypeError(f"images: wanted a floating-point dtype, got {images.dtype}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: wanted shape (B,3,H,W) without empty dimensions, got {tuple(images.shape)}")
    if images.shape[3] <= 4 < min(images.shape[1:3]) and images.shape[1] not in _channels(model):
        raise ValueError(f"images: wanted shape (B,C,H,W), channels before rows, got {tuple(images.shape)}")
    parameter = weights_of(model)
    if parameter is not None and parameter.device != images.device:
        raise ValueError(f"images: wanted on the device of the model, {parameter.device}, got {images.device}")
    if images.is_meta:
        raise ValueError("images: tensors on the meta device have no values; wanted pixels")
    if parameter is not None and parameter.dtype != images.dtype:
        raise TypeError(f"images: wanted the dtype of the model, {parameter.dtype}, got {images.dtype}")
    classifier = as_classifier(model)
    if classifier is not None:
        if classifier.mean.numel() not in (1, images.shape[1]):
            raise ValueError(f"images: wanted {classifier.mean.numel()} channels, got {images.shape[1]}")
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"images: wanted values in [0,1], before mean/std, got [{low:.3g}, {high:.3g}]")


def _channels(model: nn.Module) -> list[int]:
    """Of the network's first convolution."""
    return [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)][:1]


def check_class_range(class_idx: Tensor, num_classes: int) -> None:
    """Refuse, by a ValueError, class indices outside 0..num_classes - 1. A network with one logit has two classes."""
    low, high = (int(value) for value in class_idx.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"class_idx: wanted indices in 0..{num_classes - 1}, got {low if low < 0 else high}")


def check_tensors(**tensors: Tensor) -> None:
    """Refuse what is not a tensor of real numbers, such as an array of numpy, a sparse tensor or one without values."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: wanted a tensor, got {type(tensor).__name__}")
        check_strided(**{name: tensor})
        if tensor.is_complex():
            raise TypeError(f"{name}: wanted real numbers, got {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"{name}: tensors on the meta device have no values; wanted numbers")


def check_alike(**tensors: Tensor) -> None:
    """Refuse, by a TypeError or a ValueError, what are not two tensors of one shape."""
    check_tensors(**tensors)
    (name, one), (other, another) = tensors.items()
    if another.shape != one.shape:
        raise ValueError(f"{other}: wanted the shape of {name}, {tuple(one.shape)}, got {tuple(another.shape)}")


def check_strided(**tensors: Tensor) -> None:
    """Refuse, by a TypeError, sparse and nested tensors."""
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided:
            got = "a nested one" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name}: wanted a strided tensor, got {got}")


def check_corners(boxes: Tensor) -> None:
    """Refuse, by a ValueError, torchvision's `BoundingBoxes` whose numbers are not corners."""
    form = getattr(boxes, "format", None)
    if form is not None and form.name != "XYXY":
        raise ValueError(f"boxes: wanted format XYXY, got {form.name}")


def as_numbers(name: str, values: Any) -> tuple[float, ...]:
    """A number, or one per channel in a row of any shape, as a tuple; TypeError or ValueError for anything else."""
    try:
        row = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: wanted a number, or one per channel, got {in_a_line(values)}") from error
    if max(row.shape, default=1) != row.numel() or not row.isfinite().all():
        raise ValueError(f"{name}: wanted a finite number, or one per channel, got {row.tolist()}")
    return tuple(row.flatten().tolist())


def check_numbers(**numbers: float) -> None:
    """Refuse what is not a number, such as None or text, by a TypeError, and what no float holds by a ValueError."""
    for name, number in numbers.items():
        if not (isinstance(number, Real) or (isinstance(number, Tensor) and number.ndim == 0)):
            raise TypeError(f"{name}: wanted a number, got {in_a_line(number)}")
        if isinstance(number, int) and number.bit_length() > 1023:
            raise ValueError(
                f"{name}: wanted a number that a float holds, got an integer of {number.bit_length()} bits"
            )


def as_names(class_names: Iterable[Any]) -> list[str]:
    """Class names as a list of texts; a TypeError for what has no order or is one text."""
    unclear = str | bytes | Mapping | set | frozenset | Tensor
    if isinstance(class_names, unclear) or not isinstance(class_names, Iterable):
        raise TypeError(f"class_names: wanted a list with one name per class, got {in_a_line(class_names)}")
    return list(map(str, class_names))


def check_window(window: Sequence[float] | None) -> None:
    """Refuse what is not two numbers (low, high) with low < high; None passes."""
    if window is None:
        return
    known = isinstance(window, Sequence) and len(window) == 2
    known = known and all(isinstance(value, Real) and not isinstance(value, bool) for value in window)
    if not (known and -math.inf < window[0] < window[1] < math.inf):
        raise ValueError(f"window: wanted two numbers (low, high) with low < high, got {in_a_line(window)}")


def check_whole(least: int, **numbers: int) -> None:
    """Refuse, by a ValueError, numbers that are smaller or not whole."""
    for name, number in numbers.items():
        try:
            whole = operator.index(number)  # also of numpy's integers
        except TypeError as error:
            raise ValueError(f"{name}: wanted a whole number, got {in_a_line(number)}") from error
        if isinstance(number, bool):  # which counts as 0 or 1
            raise ValueError(f"{name}: wanted a whole number, got {in_a_line(number)}")
        if whole < least:
            raise ValueError(f"{name}: wanted at least {least}, got {whole}")


def check_at_least(least: int, **numbers: int | None) -> None:
    """As `check_whole`; None, where it stands for a default, passes."""
    check_whole(least, **{name: number for name, number in numbers.items() if number is not None})


def as_seed(seed: int) -> int:
    """The seed of a random generator; a ValueError for what torch does not take as one."""
    check_whole(-(2**63), seed=seed)
    if (whole := operator.index(seed)) >= 2**64:
        raise ValueError(f"seed: wanted a number of at most 64 bits, got {whole}")
    return whole


def examine(model: nn.Module, images: Tensor, class_idx: Tensor | None = None) -> Output:
    """As `read`, for the first pass of a call: refuses networks whose output would mean something else.

    There are further passes of a few images, which no hook of a method hears: four of two images, one with its
    gradient, when a network is first seen that is not wholly a library's; and some where something looks suspicious.
    The four are passes of a twin, and of the network itself only where hooks of others may be a part of it. A state
    outside of torch that changes only later passes is not seen.

    Args:
        model: any network, inside `frozen`.
        images: (B,C,H,W) float.
        class_idx: int64, to be checked by `check_class_range`.

    Raises:
        TypeError: see `read`.
        ValueError: see `read`; outputs that are probabilities; two passes that differ; logits that depend on other
            images of the batch; class names that are not one per class; a class index out of range.
    """
    if model not in _independent:
        with aside(), torch.enable_grad():
            _check_independence(model, images[:1].detach())
        if images[0].amax() > images[0].amin():  # an image of one value shows nothing
            _independent.add(model)
    modules = all_modules(model)
    before = _state(modules, images)
    output = read(model, images)
    classifier = as_classifier(model)
    num_names, num_classes = len(classifier.class_names) if classifier is not None else 0, output.logits.shape[1]
    if num_names not in (0, num_classes):
        raise ValueError(f"class_names: wanted {num_classes}, one per class of the network, got {num_names}")
    if _state(modules, images) != before:
        x = images[:1].detach().repeat(4, 1, 1, 1)  # what is drawn per image or per pass may be the same by chance
        with aside(), torch.no_grad():
            first, *others = (read(model, x).logits for _ in range(6))
        if not _same(first, torch.stack(others)):
            raise ValueError(_UNSTEADY.format(type(bare(model)).__name__))
    logits = output.logits.detach()
    if output.head == "sigmoid" and num_classes == 2:
        logits = logits[:, :1]  # of a network with one logit the second is the first with another sign
    low, high = logits.aminmax()
    percent = ((logits.sum(1) - 100).abs() < 0.1).all()
    if (low >= 0 and (high <= 1 or percent)) or high <= 0:
        with aside(), torch.enable_grad():
            _check_ending(model, images[:1].detach(), output.head)
    if class_idx is not None:
        check_class_range(class_idx, num_classes)
    return output


def _check_ending(model: nn.Module, image: Tensor, head: Head) -> None:
    ending = _ending(unwrapped(model), image, head)
    if ending is None:
        return
    seen, told = f"ends in a {ending}, so its outputs are probabilities", f"classifier.logits_of_{ending}"
    if ending == _UNNAMED:
        seen, told = "gives nothing outside of [0,1], as probabilities", "lambda y: 10 * y, if they are none"
    elif ending == "odds":
        seen, told = "ends in odds p/(1 - p)", ""
    elif ending.startswith("log"):
        seen, told = f"ends in a {ending}, so its outputs are logarithms of probabilities", ""
    told = f", or opticam.wrap(..., to_logits={told})" if told else ""
    raise ValueError(f"model: {type(bare(model)).__name__} {seen}; wanted logits: leave the last layer out{told}")


_independent: WeakSet[nn.Module] = WeakSet()  # networks seen to take each image for itself
_LIBRARIES = ("torch.nn.", "torchvision.", "timm.", "transformers.", "opticam.")  # whose modules do, in eval mode


def _check_independence(model: nn.Module, image: Tensor) -> None:
    """Refuse a network, if not wholly a library's, whose logits of an image depend on another in or before its batch.

    Threads take turns from now on with code of one's own: what it keeps during a pass may lie anywhere.
    """
    network = unwrapped(model)
    if not all(map(_is_of_library, network.modules())):
        turns.setdefault(bare(model), threading.RLock())
    elif not type(bare(model)).__module__.startswith("torch.nn."):  # what is built of parts of torch may be built wrong
        return
    silent, _ = silent_twin(network)
    fault, head, ending = None, None, None
    for tried in (silent, network) if hooked_by_others(network) else (silent,):
        fault = None  # where the network itself cannot be asked, the twin's fault may be that it has no hooks
        with suppress(Exception):  # it may not take two images, or not run without its hooks
            fault, head, ending = _look_at(tried, image)
            if fault is None:
                break
    if fault:
        raise ValueError(fault.format(type(bare(model)).__name__))
    if head and ending:
        _check_ending(model, image, head)


def _is_of_library(module: nn.Module) -> bool:
    """Whether a library has written what the module does; in `vars` is a forward that somebody has put there."""
    return class_of(module).__module__.startswith(_LIBRARIES) and "forward" not in vars(module)


def _look_at(network: nn.Module, image: Tensor) -> tuple[str | None, Head, str | None]:
    """What makes an image's logits depend on another, in words with a gap for the name; and the head, and `_told`.

    In its batch: by a gradient, which is exact, and beside another image, for what no gradient passes. Before it: a
    second pass of the same two images in the other order has to give the same logits in the other order.
    """
    pair, slope = torch.cat([image, image.flip(3)]).requires_grad_(), None
    first, head = read(network, pair)
    with suppress(RuntimeError):  # it may hide gradients
        (slope,) = torch.autograd.grad(first[0, 0], pair, allow_unused=True)
    with torch.no_grad():
        again = read(network, pair.flip(0)).logits.flip(0)
        others = image.flip(3) / 2, image
        beside = [read(network, torch.cat([image / 2, other])).logits[0] for other in others]
    fault = None
    if slope is not None and (slope[1].abs() > 0).any():
        fault = _MIXING
    elif not _same(first.detach(), again):
        fault = _UNSTEADY
    elif not _same(*beside):
        fault = _MIXING
    return fault, head, _told(first, head)


def silent_twin(network: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A `twin_of` the network, whose passes no hook counts, and the part of the twin for each of its own."""
    copies: dict[nn.Module, nn.Module] = {}
    twin = twin_of(network, copies)
    for copy in copies.values():
        hooks = copy._forward_hooks.items()
        kept = ((key, hook) for key, hook in hooks if not (of_others(hook) or hasattr(hook, "ours")))
        vars(copy)["_forward_hooks"] = OrderedDict(kept)
    return twin, copies


_MIXING = (
    "model: in {} the logits of an image depend on the other images of its batch, as by batch statistics; wanted a "
    "network that takes each image for itself"
)
_UNSTEADY = (
    "model: two passes of {} over one image differ in eval mode (dropout by function, random numbers or a state that "
    "it changes); wanted a network that gives the same each time"
)


def _same(first: Tensor, others: Tensor) -> bool:
    """But for rounding, or where it is not a number."""
    return not (others - first).abs().max() > min(1e3 * torch.finfo(first.dtype).eps, 0.05) * first.abs().max()


def _state(modules: Iterable[nn.Module], images: Tensor) -> tuple:
    """What a pass changes if it draws random numbers or writes into buffers."""
    generators = [torch.get_rng_state(), *([torch.cuda.get_rng_state(images.device)] if images.is_cuda else [])]
    drawn = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  (networks draw from it)
    versions = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in buffers_of(modules)]
    states = [bytes(state.numpy()) for state in generators]
    return states, drawn["key"].tobytes(), drawn["pos"], random.getstate(), versions


def _ending(model: nn.Module, image: Tensor, head: Head) -> str | None:
    """The last layer of a network that does not end in logits for this head; None where it does.

    Seen from its graph, and from how extreme images fare.
    """
    found = []
    for x in (image, image.flip(3), image / 2, 50 * image, -50 * image):  # one by one: it may take no other number
        with suppress(RuntimeError, ValueError, TypeError, AssertionError, LookupError), turn(model):  # nor such images
            found.append(find_logits(model(x.requires_grad_().clone()), 1))
    if not found:
        return None
    values = torch.cat([raw.detach().double().reshape(1, -1) for raw in found])
    if ((values.sum(1) - 100).abs() < 0.1).all():
        values = values / 100
    told = _told(found[0], head)
    if (told or "").startswith("log") or not ((values >= 0) & (values <= 1)).all():
        return told
    ones = ((values.sum(1) - 1).abs() <= max(1e-4, 4 * torch.finfo(found[0].dtype).eps)).all()
    if values.shape[1] > 1 and (told == "softmax" or ones):
        return "softmax"
    low, high = values.aminmax()
    return "sigmoid" if _bounded(found[0]) else _UNNAMED if high - low > 0.9 else None


def _told(tensor: Tensor, head: Head) -> str | None:
    """The last layer by its name in the graph, where the name is enough to know that it gives no logits."""
    last = _last_operation(tensor.grad_fn)
    known = _KNOWN.fullmatch(last) and not (last == "LogSoftmax" and head == "softmax")
    return last.lower().replace("hard", "") if known else None


_KNOWN = re.compile("(Log|Log2|Log10)?(Sigmoid|Softmax)|Hardsigmoid|Odds")
_UNNAMED = "unnamed"  # an ending that is seen from values alone


def _last_operation(node: Any, scaling: bool = True) -> str:
    """Name of the operation that a result comes from; what shaped, joined, averaged, added or scaled it is passed over.

    A sum of two is passed over if both come from the same operation and neither has a factor. With factors it may be a
    layer. `scaling` is whether factors are passed over.
    """
    if node is None:
        return ""
    name = node.name().partition("Backward")[0]
    before = [function for function, _ in node.next_functions if function is not None]
    if not before:
        return name
    if _SHAPING.match(name) or (len(before) == 1 and name in (_SCALING if scaling else ("Add",))):
        last = _last_operation(before[0], scaling)
        return "LogSigmoid" if name == "Neg" and last == "Softplus" else last  # log sigmoid(y) = -softplus(-y)
    if name == "Div" and len(before) == 2 and before[1].name().startswith("Rsub"):  # p / (1 - p)
        above, below = (_last_operation(function) for function in before)
        return "Odds" if above == below and _KNOWN.fullmatch(above) else name
    if name == "Add" and getattr(node, "_saved_alpha", 1) == 1:
        last = _last_operation(before[0], False)
        if _KNOWN.fullmatch(last) and last == _last_operation(before[1], False):
            return last
    return name + _last_operation(before[0], scaling) if name in _LOGARITHMS else name


_LOGARITHMS = ("Log", "Log2", "Log10")


def _bounded(tensor: Tensor) -> bool:
    """Whether a tensor was made of functions that end at 1, by less than another layer, such as a mean of sigmoids."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or (node.name().startswith(_LAYERS) and not _takes_shares(node)):
            continue
        highest = next((getattr(node, name) for name in _HIGHEST if hasattr(node, name)), None)
        if node.name().partition("Backward")[0] in _ENDING_AT_1 or (isinstance(highest, Real) and highest == 1):
            return True
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False


def _takes_shares(node: Any) -> bool:
    """Whether a product with a matrix only takes or merges what comes in, as from classes to groups of them."""
    matrix = getattr(node, "_saved_mat2", None)
    return matrix is not None and bool(((matrix >= 0) & (matrix <= 1)).all())


_ENDING_AT_1 = ("Sigmoid", "Softmax", "Hardsigmoid", "Tanh", "Atan", "Erf", "Exp")  # the last: of 1/(1 + exp(-x))
_HIGHEST = ("_saved_max", "_saved_max_val")  # of a clamp
_SCALING = ("Mul", "Div", "Add", "Sub", "Rsub", "Neg")  # where one side is a constant
_LAYERS = ("Addmm", "Mm", "Bmm", "Convolution", "MkldnnLinear", "Native", "Scaled")
_SHAPING = re.compile(
    "Cat|Stack|Mean|Sum|Amax|Clamp|View|Unsafe|Reshape|Squeeze|Unsqueeze|Select|Slice|Clone|ToCopy|Alias|Permute"
)
