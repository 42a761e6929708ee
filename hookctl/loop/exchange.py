"""Processors and backends that bypass SDPA, exchanged at edited sites for the session."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookctl.address import families
from hookctl.attention.intercept import SitePort


class Exchange:
    """Keeps the edited modules on processors whose attention can be caught.

    Only edited sites are touched. What the user sets meanwhile is respected and exchanged in its
    turn; what was found is put back.
    """

    def __init__(self) -> None:
        self._ports: dict[str, SitePort] = {}
        self._checked: dict[str, Any] = {}
        self._found: dict[str, tuple[Any, Any]] = {}
        self._backends: dict[str, dict[int, tuple[Any, Any]]] = {}

    def watch(self, path: str, port: SitePort) -> None:
        self._ports[path] = port
        self._check(path, port)

    def refresh(self) -> None:
        """Look again: slicing, adapters and backends may have been set since."""
        for path, port in self._ports.items():
            processor = families.processor_of(port.module)
            if processor is not self._checked[path] or families.bypasses_sdpa(port.module):
                self._check(path, port)

    def _check(self, path: str, port: SitePort) -> None:
        module = port.module
        twin = families.sdpa_twin(module)
        if twin is not None:
            self._found[path] = (families.processor_of(module), twin)
            _put(module, twin)
        processor = families.processor_of(module)
        if families.bypasses_sdpa(module):
            kept = self._backends.setdefault(path, {})
            kept[id(processor)] = (processor, processor._attention_backend)
            processor._attention_backend = families.native_backend()
        self._checked[path] = processor
        port.spelled_out = families.spells_out(module)

    def restore(self, path: str) -> None:
        port = self._ports.pop(path)
        del self._checked[path]
        for processor, backend in self._backends.pop(path, {}).values():
            processor._attention_backend = backend
        if path in self._found:
            found, twin = self._found.pop(path)
            if families.processor_of(port.module) is twin:
                _put(port.module, found)


def _put(module: Any, processor: Any) -> None:
    """Set the processor in its place, without the library's housekeeping: it discards weights."""
    home, other = module.__dict__, module._modules
    if isinstance(processor, nn.Module):
        home, other = other, home
    other.pop("processor", None)
    home["processor"] = processor
