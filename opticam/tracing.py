"""Tracing by torch.fx that other threads do not notice."""

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_one_at_a_time = threading.Lock()  # while it traces, torch.fx changes how modules are called, in all threads


class Tracer(fx.Tracer):
    """A tracer that looks only into some modules. Modules that other threads call meanwhile run as ever."""

    def __init__(self, looks_into: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.looks_into = looks_into

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with _one_at_a_time:
            self.owner = threading.get_ident()
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.looks_into(m)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.owner:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self.owner:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
