"""What a call changes in a network while it lasts: hooks and flags.

The network is left as it was found, and state belongs to the call: hooks hear only passes of the thread that set them,
and what several calls have changed is restored by the last.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# locks of networks that keep in attributes what they read later in the pass: threads pass them one after the other
turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_lock = threading.Lock()
_held: dict[tuple[int, str], list[Any]] = {}  # (id of an object, attribute) -> [how many calls hold it, value before]
_thread = threading.local()  # .aside: whether passes of this thread are heard by no hook


@contextmanager
def frozen(model: nn.Module, *, compiled: bool = True) -> Iterator[None]:
    """The model in eval mode, its parameters out of the graph and gradients recorded; on exit all as before.

    Gradients are recorded inside even if the caller is under `no_grad` or `inference_mode`. Weights that were made
    under `inference_mode` are copies inside, since they cannot enter a graph. Flags are restored module by module and
    parameter by parameter, after an exception too, by the last of all calls in all threads that froze them.

    Args:
        model: any network.
        compiled: whether compiled parts run compiled; else as they were written, so that hooks set inside are heard.

    Raises:
        ValueError: a module in training mode whose `train` or `eval` does more than set flags, such as fold weights or
            empty a cache. That cannot be undone module by module, so the mode is for the caller to change. Parameters
            that are computed from other tensors.
    """
    with torch.inference_mode(False), torch.enable_grad(), changed(_freezing(model, compiled)):
        yield


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of a network once, in no order: `nn.Module.modules` takes four times as long."""
    found: dict[nn.Module, None] = {}
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if module not in found:
            found[module] = None
            ahead += [part for part in module._modules.values() if part is not None]
    return list(found)


def class_of(module: nn.Module) -> type:
    """The class of a module; of a parametrized one, whose class torch makes for it, the class that was parametrized."""
    kind = type(module)
    return kind.__mro__[1] if kind.__module__ == "torch.nn.utils.parametrize" else kind


def parameters_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]


def buffers_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in module._buffers.values() if tensor is not None]


def _freezing(model: nn.Module, compiled: bool) -> Iterator[tuple[Any, str, Any]]:
    for module in all_modules(model):
        if module.training and not all(_sets_flags_alone(function) for function in (module.train, module.eval)):
            told = f"model: {type(module).__name__} has a train() or eval() of its own and is in training mode"
            raise ValueError(f"{told}; wanted it in eval mode")
        yield module, "training", False
        if not compiled and (inner := module._modules.get("_orig_mod")) is not None:
            yield module, "forward", inner.__call__
        if not compiled and module._compiled_call_impl is not None:  # compiled in place
            yield module, "_compiled_call_impl", None
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.is_inference():
                copy = tensor.clone()
                yield module, name, nn.Parameter(copy, False) if name in module._parameters else copy
            elif name in module._parameters and not tensor.is_leaf:
                told = f"model: {name} of {type(module).__name__} is computed from other tensors"
                raise ValueError(f"{told}; wanted leaf parameters, as by detach()")
            elif (id(module), name) in _held:  # by another call, which made that copy
                yield module, name, tensor
            elif name in module._parameters and (tensor.requires_grad or (id(tensor), "requires_grad") in _held):
                yield tensor, "requires_grad", False


def _sets_flags_alone(function: Callable) -> bool:
    return getattr(function, "__module__", "").startswith(("torch.nn.", "transformers.modeling_utils"))


@contextmanager
def changed(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes set to other values while it is open, as (object, name, value)."""
    mine = []
    try:
        with _lock:
            for thing, name, value in changes:
                key = id(thing), name
                if key not in _held:
                    before = getattr(thing, name)
                    if before is value:
                        continue
                    _held[key] = [0, before]
                _held[key][0] += 1
                mine.append((thing, name))
                if _held[key][0] == 1:
                    setattr(thing, name, value)
        yield
    finally:
        with _lock:
            for thing, name in mine:
                entry = _held[id(thing), name]
                entry[0] -= 1
                if not entry[0]:
                    del _held[id(thing), name]
                    if getattr(thing, name) is not entry[1]:
                        setattr(thing, name, entry[1])


@contextmanager
def hooked(module: nn.Module, hook: Callable, *, first: bool = False) -> Iterator[None]:
    """A forward hook that hears the passes of this thread; `first`: before all others, which get what it hands on."""
    thread = threading.get_ident()

    def heard(module: nn.Module, args: tuple, *more: Any) -> Any:
        if threading.get_ident() != thread or getattr(_thread, "aside", False):
            return None  # another thread may call before torch has noted that this hook wants what is given by name
        by_name, output = more
        return hook(module, (*args, *by_name.values()), output)

    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        heard = dynamo.disable(heard)  # a compiled network asks in vain in which thread it runs
    heard.ours = True  # type: ignore[attr-defined]
    with _lock:  # torch numbers hooks one after the other, and two of the same number would be one
        handle = module.register_forward_hook(heard, prepend=first, with_kwargs=True)
    try:
        yield
    finally:
        with _lock:
            handle.remove()


def hooked_by_others(model: nn.Module) -> bool:
    """Whether there are hooks `of_others`."""
    tables = (table for m in all_modules(model) for table in (m._forward_hooks, m._forward_pre_hooks) if table)
    return any(of_others(hook) for table in tables for hook in table.values())


def of_others(hook: Any) -> bool:
    """Whether a hook is not ours and may keep something that a later part of the pass reads: a copy would not find it.

    A module's own methods find it, since `folding.twin_of` binds them to the copy. Torch's weight norms keep nothing.
    """
    of_torch = type(hook).__module__.startswith("torch.nn.")
    return not (hasattr(hook, "ours") or isinstance(hook, MethodType | partial) or of_torch)


def in_a_line(value: Any) -> str:
    """How a message shows what was given: as it is, or by its kind where that would take more than a line."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else type(value).__name__


@contextmanager
def aside() -> Iterator[None]:
    _thread.aside = True
    try:
        yield
    finally:
        _thread.aside = False
