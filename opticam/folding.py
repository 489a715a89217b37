"""Batch norms folded into the convolutions before them: the same logits by fewer operations."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from opticam.classifier import as_output, bare, turn
from opticam.state import class_of, hooked_by_others, turns
from opticam.tracing import Tracer

Pair = tuple[str, str]

OF_TORCH = {*vars(nn.Module())}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_pairs: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()


def folded(model: nn.Module, images: Tensor, logits: Tensor) -> nn.Module:
    """A network with the logits of a frozen one, its batch norms folded into convolutions where this can be done.

    In eval mode a batch norm scales and shifts each channel by fixed numbers, which the convolution before it can do by
    its own weights. The twin shares all else with the network, hooks included, and the network itself is not touched.
    Each call checks the twin on the first image. The network itself comes back where the logits differ by more than
    rounding, and where there is nothing to fold. The twin is for logits only: the maps of its convolutions differ.

    Args:
        model: any network in eval mode, its parameters out of the graph, as inside `state.frozen`.
        images: (B,3,H,W) float.
        logits: (B,C) of them, by the model.

    Returns:
        A network of the same signature; half-precision networks are returned as they are, since folding would round
        their weights anew, and so are networks with hooks of others.
    """
    if logits.dtype not in (torch.float32, torch.float64) or hooked_by_others(model):
        return model
    with torch.no_grad(), contextlib.suppress(Exception):  # a network may be anything; itself, it is always right
        if model not in _pairs:
            _pairs[model] = _find_pairs(model)
        if pairs := _pairs[model]:
            twin = _fold(twin_of(model, {}), pairs)
            if (lock := turns.get(bare(model))) is not None:
                turns[bare(twin)] = lock  # what both keep is the same
            wanted = logits[:1]  # by `forward`: hooks count the passes of a method, and this is none
            tolerance = 2**13 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
            with turn(twin):
                returned = twin.forward(images[:1].clone())  # the network may work in place
            found = as_output(twin, returned, 1).logits
            if (found - wanted).abs().max() <= tolerance:
                return twin
    return model


def _holds_norm(module: nn.Module) -> bool:
    return not isinstance(module, _BatchNorm) and any(isinstance(inner, _BatchNorm) for inner in module.modules())


def _find_pairs(model: nn.Module) -> list[Pair]:
    """Names of convolutions and of the batch norms that alone read them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not any(isinstance(module, _BatchNorm) for module in modules.values()):
        return []
    try:
        with turn(model):
            graph = Tracer(_holds_norm).trace(twin_of(model, {}))  # networks keep what they meet, proxies too
    except Exception:  # whatever a tracer may choke on; remembered, so that it is tried once
        return []
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        pair = str(before.target), str(node.target)
        convolution, norm = (modules[name] for name in pair)
        once = all(calls.count(name) == 1 for name in pair)
        if _is_plain_part(convolution, nn.Conv2d) and _is_plain_part(norm, _BatchNorm) and once:
            pairs.append(pair)
    return pairs


def _is_plain_part(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it does what its kind does: a subclass of one's own may do more."""
    of_library = class_of(module).__module__.startswith(("torch.nn.", "timm.layers."))
    plain = of_library or type(module).forward is kind.forward
    return isinstance(module, kind) and plain and "forward" not in vars(module)


def twin_of(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree of modules that shares parameters, buffers and hooks, but not what it keeps during a pass.

    Parts that talk through a list or a dict still do, since each is copied once. Modules in one are those of the copy,
    and so are those whose methods are hooks, and those that a function keeps, such as one that wraps a forward.
    """
    copied: dict[int, Any] = {}

    def again(thing: Any) -> Any:
        if isinstance(thing, nn.Module):
            if thing not in known:
                known[thing] = twin = object.__new__(type(thing))
                vars(twin).update(vars(thing))
                own = {name: value for name, value in vars(thing).items() if name not in OF_TORCH}
                own |= {name: table for name in _HOOKS if (table := vars(thing)[name])}
                vars(twin)["_modules"] = {name: again(child) for name, child in thing._modules.items()}
                vars(twin).update({name: again(value) for name, value in own.items()})
                if type(thing).__name__ == "OptimizedModule":
                    vars(twin)["forward"] = vars(twin)["_modules"]["_orig_mod"]  # as it was written
            return known[thing]
        if type(thing) in (list, dict, OrderedDict):
            if id(thing) not in copied:
                copied[id(thing)] = copy = thing.copy()
                for key, value in copy.items() if isinstance(copy, dict) else enumerate(copy):
                    copy[key] = again(value)
            return copied[id(thing)]
        if type(thing) is tuple:
            parts = tuple(map(again, thing))
            return parts if any(new is not old for new, old in zip(parts, thing, strict=True)) else thing
        if isinstance(thing, MethodType) and isinstance(thing.__self__, nn.Module):
            return MethodType(again(thing.__func__), again(thing.__self__))
        if isinstance(thing, FunctionType) and not hasattr(thing, "ours"):
            if id(thing) not in copied:
                copied[id(thing)] = _function_again(thing, copied, again)
            return copied[id(thing)]
        if isinstance(thing, partial):
            return partial(again(thing.func), *map(again, thing.args), **again(thing.keywords))
        return thing

    return again(module)


def _function_again(function: FunctionType, copied: dict[int, Any], again: Callable[[Any], Any]) -> FunctionType:
    """The function with the copies of the modules that it keeps; itself where it keeps none."""
    cells, defaults, by_name = function.__closure__ or (), function.__defaults__ or (), function.__kwdefaults__ or {}
    if CellType() in cells:  # still empty
        return function
    before = [*(cell.cell_contents for cell in cells), *defaults, *by_name.values()]
    places = tuple(CellType() for _ in cells)
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, None, places)
    copied[id(function)] = twin  # which may keep itself
    after = [kept if _is_plain(kept) else again(kept) for kept in before]  # what it writes down is for its owner
    if all(one is other for one, other in zip(before, after, strict=True)):
        return function
    rest = iter(after)
    for place in places:
        place.cell_contents = next(rest)
    twin.__defaults__ = tuple(next(rest) for _ in defaults) or None
    twin.__kwdefaults__ = {name: next(rest) for name in by_name} or None
    vars(twin).update(vars(function))
    return twin


def _is_plain(kept: Any) -> bool:
    """Whether it is a list or a table without modules."""
    values = kept.values() if isinstance(kept, dict) else kept
    return isinstance(kept, list | dict) and not any(isinstance(value, nn.Module) for value in values)


def _fold(twin: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    for pair in pairs:
        convolution, norm = (cast(Any, twin.get_submodule(name)) for name in pair)
        if any(getattr(part, hooks) for part in (convolution, norm) for hooks in _HOOKS):
            continue  # somebody reads or changes what would not be there
        after = [norm._modules.get(name) for name in ("drop", "act")]  # of timm's batch norms
        activation = nn.Sequential(*(module for module in after if module is not None))
        fused = fuse_conv_bn_eval(convolution, norm)
        if _pads_by_a_copy(fused):
            fused = _PaddedAlike(fused)
        for name, module in zip(pair, (fused, activation), strict=True):
            parent, _, own = name.rpartition(".")
            twin.get_submodule(parent)._modules[own] = module
    return twin


def _pads_by_a_copy(convolution: Any) -> bool:
    depthwise = convolution.groups == convolution.in_channels and convolution.dilation == (1, 1)
    return depthwise and type(convolution).__module__ == "timm.layers.conv2d_same"


class _PaddedAlike(nn.Module):
    """TensorFlow's convolution, which pads by as much as its stride leaves over, without a copy of its input.

    Where that is odd the last side gets one pixel more: as if both sides had it and the kernel began with a zero. The
    copy takes longer than a depthwise convolution itself.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        sides = zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)
        high, wide = (max((math.ceil(side / step) - 1) * step + width - side, 0) for side, width, step in sides)
        weight = F.pad(conv.weight, (wide % 2, 0, high % 2, 0))
        padding = math.ceil(high / 2), math.ceil(wide / 2)
        return F.conv2d(x, weight, conv.bias, conv.stride, padding, 1, conv.groups)
