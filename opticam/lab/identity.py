"""What tells one method or network from another, in every process: keys of the rows that they made."""

import dis
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opticam.features import layer_name


def describe(value: Any, model: nn.Module, around: tuple = ()) -> Any:
    """A method, or an option of one, as JSON: the same in every process, and another where the method is another.

    Functions of installed packages go by their name and code; those of a notebook, a script or a module of your own
    also by what they read from around them. Layers go by their name in the model, tensors and other networks by their
    content.

    Args:
        value: a function, a `functools.partial` of one, or what is among its arguments.
        model: that the method is to explain.
        around: what this is a part of.

    Raises:
        ValueError: something that only this process can tell from others of its kind.
    """
    inner = partial(describe, model=model, around=(*around, value))
    if isinstance(value, int | float | str | bool | None):
        return value
    if isinstance(value, torch.dtype | torch.device | PurePath | Enum):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return inner(value.tolist())
    if isinstance(value, Tensor | np.ndarray):
        return digest_of(value)
    if isinstance(value, nn.Module):
        return layer_name(model, value) or network_digest(value)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if any(value is other for other in around):  # functions may call each other
        return name
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, map(inner, value)))  # their order differs from process to process
    if isinstance(value, partial):
        return [inner(part) for part in (value.func, value.args, value.keywords)]
    if inspect.isfunction(value):
        if name.startswith("opticam.") and "<" not in name:  # see code_digest
            return name
        read = dict(inspect.getclosurevars(value).nonlocals)
        if not _installed(value):
            names = sorted(_globals(value.__code__) & value.__globals__.keys())
            read |= {word: value.__globals__[word] for word in names}
        depends = [_code(value.__code__), *map(inner, (value.__defaults__, value.__kwdefaults__, read))]
        return [name, digest_of(json.dumps(depends))]  # of what it read, a data set say, too much to keep
    if inspect.ismethod(value):
        return [inner(value.__func__), inner(value.__self__)]
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value):
        own = {} if _installed(value) else {key: getattr(item, "__func__", item) for key, item in vars(value).items()}
        return [name, inner({key: item for key, item in own.items() if inspect.isfunction(item)})]
    if hasattr(value, "__wrapped__"):
        return [name, inner(value.__wrapped__)]
    if inspect.isbuiltin(value) or inspect.ismethoddescriptor(value):
        return name
    if hasattr(value, "__dict__"):
        return [inner(type(value)), inner(vars(value))]
    raise ValueError(
        "methods: wanted functions whose options are numbers, text, tensors, layers or functions, so that rows are "
        f"recognised when the run goes on; got {value!r} of {type(value).__name__}"
    )


def _installed(value: Any) -> bool:
    """Whether a function or class belongs to a package, which is not edited between two runs."""
    module = sys.modules.get(value.__module__ or "__main__")
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a notebook's
        return value.__module__ not in (None, "__main__")
    return any(Path(file).is_relative_to(sysconfig.get_path(place)) for place in ("purelib", "platlib", "stdlib"))


def _globals(code: CodeType) -> set[str]:
    """Names that code, and code inside it, reads from its module."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*(_globals(item) for item in code.co_consts if isinstance(item, CodeType)))


def _code(code: CodeType) -> list[Any]:
    constants = [_code(item) if isinstance(item, CodeType) else _constant(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _constant(item: object) -> Any:
    return sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)


def network_digest(network: nn.Module) -> str:
    """Tells networks apart: by their modules, what these are set to, and their weights."""
    settings = [
        (name, key, item)
        for name, module in network.named_modules()
        for key, item in vars(module).items()
        if key != "training" and not key.startswith("_") and isinstance(item, int | float | str | None)
    ]
    return digest_of(type(network).__qualname__, str(network), *settings, *network.state_dict().items())


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
