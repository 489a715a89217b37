"""Stable keys for methods and networks: what may compute other rows has another key, in every process."""

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opticam.features import layer_name
from opticam.folding import OF_TORCH

_KNOWN = {"opticam", "torch", "torchvision", "timm", "transformers", "numpy", "builtins", "collections", "functools"}


def key_of(value: Any, model: nn.Module, name: str = "model", key: str = "") -> Any:
    """A method, a network or a part of one as JSON: what has a name is recognised, anything else is refused.

    Numbers, text, tensors and containers of these count by their content. Functions, classes and constants of this
    package, and of the libraries that networks come from, count by the name under which their module holds them; for
    their code see `files.code_digest` and `files.library_versions`. A layer of the model counts by its dotted name,
    and a `functools.partial` by its parts. A network counts by its parameters, its buffers, and the classes, settings
    and hooks of all its modules.

    A key of the caller stands for what has no name, such as a function in a notebook or the code of one's own network.
    What can be seen still counts. Settings of torch for the whole process are not seen.

    Args:
        value: what to describe.
        model: that the method is to explain.
        name: what asks for a key.
        key: of the caller; to be changed whenever the code that it stands for does.

    Raises:
        ValueError: something has no name, and there is no key.
    """
    inner = partial(key_of, model=model, name=name, key=key)
    if isinstance(value, nn.Module):
        layer = None if value is model else layer_name(model, value)
        return {"network": _network(value, name, key)} if layer is None else {"layer": layer}
    if isinstance(value, MethodType):  # its repr would not tell the weights
        return {"method": [inner(value.__func__), "model" if value.__self__ is model else inner(value.__self__)]}
    if type(value).__module__.startswith("opticam.") and hasattr(value, "function"):  # a record: what computes, counts
        return inner(value.function)
    homes = [home for home in (getattr(value, "__module__", None), type(value).__module__) if home]
    if all(home.partition(".")[0] in _KNOWN for home in homes):
        if isinstance(value, int | float | str | None):
            return value
        if isinstance(value, Tensor | np.ndarray) and not getattr(value.dtype, "hasobject", False):
            return {"content": digest_of(value)}
        if isinstance(value, partial):
            return {"partial": [inner(part) for part in (value.func, value.args, value.keywords)]}
        if isinstance(value, Mapping):
            return {"table": [[inner(word), inner(item)] for word, item in value.items()]}
        if found := _name(value, homes[0]):
            return {"name": found}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [inner(item) for item in value]}
        if isinstance(value, set | frozenset):
            return {"set": sorted(json.dumps(inner(item)) for item in value)}
        if not isinstance(value, np.ndarray) and " at 0x" not in (text := repr(value)):  # a dtype, a device, a record
            told = getattr(value, "__dict__", None)  # the text may hide what counts, as Lambda() does
            return {homes[-1]: [text, inner(told)] if told else text}
    what = getattr(value, "__qualname__", type(value).__qualname__)
    if key:
        return {"key": key, "of": what}
    wanted = f"keys={{{name!r}: ...}}, a word of your own that changes whenever its code does"
    raise ValueError(f"keys: {what} of {name} cannot be recognised when the run resumes; wanted {wanted}")


def _name(value: Any, home: str) -> str:
    module = sys.modules.get(home)
    if word := next((word for word, held in vars(module).items() if held is value), "") if module else "":
        return f"{home}.{word}"
    try:
        return f"{home}.{value.__qualname__}" if attrgetter(value.__qualname__)(module) is value else ""
    except AttributeError:
        return ""


def _network(network: nn.Module, name: str, key: str) -> str:
    inner = partial(key_of, model=network, name=name, key=key)
    parts: list[Any] = [*network.named_parameters(), *network.named_buffers()]
    for place, module in network.named_modules():
        settings = {word: item for word, item in vars(module).items() if word not in OF_TORCH}
        kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        hooks = [hook for hooks_of_kind in kinds for hook in hooks_of_kind.values()]
        parts.append((place, *map(inner, (type(module), type(module).forward, settings, hooks))))
    return digest_of(*parts, key)


def digest_of(*values: Any) -> str:
    """SHA-256 of values: tensors and arrays, alone or in tuples, by their content, others by their `repr`."""
    digest = hashlib.sha256()
    for value in values:
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Tensor):
                digest.update(repr((part.dtype, tuple(part.shape))).encode())
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            elif isinstance(part, np.ndarray):
                digest.update(repr((part.dtype, part.shape)).encode() + part.tobytes())
            else:
                digest.update(repr(part).encode())
            digest.update(b";")
    return digest.hexdigest()
