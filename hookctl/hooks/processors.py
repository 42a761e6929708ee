"""Processors and backends that bypass SDPA, exchanged at edited sites for the session."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hookctl.address import families
from hookctl.hooks.attention import SitePort, Untouched


class Exchange:
    """Keeps the edited modules on processors whose attention can be caught.

    Only edited sites are touched. A stand-in asks the editors first; where none of them rewrites
    the call, the processor that was found does it, bit for bit as without us. What the user sets
    meanwhile is respected and exchanged in its turn; what was found is put back.
    """

    def __init__(self) -> None:
        self._ports: dict[str, SitePort] = {}
        self._checked: dict[str, Any] = {}
        self._found: dict[str, tuple[Any, Any]] = {}
        self._first: list[tuple[nn.Module, Any]] = []

    def remember(self, modules: Iterable[nn.Module]) -> None:
        """Note the processors that a first session finds."""
        self._first = [(module, families.processor_of(module)) for module in modules]

    def tidy(self) -> None:
        """After an error: a pipeline that changes processors for its run may have left them."""
        for module, processor in self._first:
            if not families.keeps_perturbed(module) and processor is not None:
                _put(module, processor)

    def watch(self, path: str, port: SitePort) -> None:
        self._ports[path] = port
        self._check(path, port)

    def refresh(self) -> None:
        """Look again: slicing, adapters and backends may have been set since."""
        for path, port in list(self._ports.items()):
            processor = families.processor_of(port.module)
            if processor is not self._checked[path] or families.bypasses_sdpa(port.module):
                self._check(path, port)

    def _check(self, path: str, port: SitePort) -> None:
        module = port.module
        found, stand_in = self._found.get(path, (None, None))
        processor = families.processor_of(module)
        if stand_in is not None and processor is stand_in:
            # A backend was set on the stand-in; the one it stands for is meant.
            found._attention_backend = stand_in._attention_backend
            self._put_back(path, port)
        form = families.sdpa_form(module)
        port.exchanged = form is not None
        if form is not None:
            found = families.processor_of(module)
            stand_in = _stand_in(port, found, *form)
            self._found[path] = (found, stand_in)
            _put(module, stand_in)
        self._checked[path] = families.processor_of(module)
        port.spelled_out = form is None and families.spells_out(module)

    def restore(self, path: str) -> None:
        port = self._ports[path]
        self._put_back(path, port)
        port.exchanged = port.spelled_out = False
        self._checked.pop(path, None)
        del self._ports[path]

    def _put_back(self, path: str, port: SitePort) -> None:
        found, stand_in = self._found.get(path, (None, None))
        if stand_in is not None and families.processor_of(port.module) is stand_in:
            _put(port.module, found)
        self._found.pop(path, None)


def _stand_in(port: SitePort, found: Any, form: type, state: dict[str, Any]) -> Any:
    """A processor of class `form` over the state of `found`, which does the untouched calls."""
    call: Any = form.__call__

    @functools.wraps(call)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(self, *args, **kwargs)
        if not port.watched:
            return found(*args, **kwargs)
        try:
            return call(self, *args, **kwargs)
        except Untouched:
            return found(*args, **kwargs)

    kind: Any = type(form.__name__, (form,), {"__call__": either, "__module__": form.__module__})
    stand_in = kind.__new__(kind)
    stand_in.__dict__ = state
    return stand_in


def _put(module: Any, processor: Any) -> None:
    """Set the processor in its place, without the library's housekeeping: it discards weights."""
    home, other = module.__dict__, module._modules
    if isinstance(processor, nn.Module):
        home, other = other, home
    home["processor"] = processor  # first: between the two lines it has one
    other.pop("processor", None)
