"""Processors and backends that bypass SDPA, exchanged at edited sites for the session."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookctl.address import families


class Exchange:
    """Keeps the watched modules on processors whose attention can be caught.

    Only edited sites are touched. What the user sets meanwhile is respected and exchanged in its
    turn; what was found is put back.
    """

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._checked: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self._backends: dict[str, Any] = {}

    def watch(self, path: str, module: nn.Module) -> None:
        self._modules[path] = module
        self._check(path, module)

    def refresh(self) -> None:
        """Look again: slicing, adapters and backends may have been set since."""
        for path, module in self._modules.items():
            processor = getattr(module, "processor", None)
            if processor is not self._checked.get(path) or families.bypasses_sdpa(module):
                self._check(path, module)

    def _check(self, path: str, module: nn.Module) -> None:
        twin = families.sdpa_twin(module)
        if twin is not None:
            self._found[path] = (module.processor, twin)
            _put(module, twin)
        if families.bypasses_sdpa(module):
            processor = module.processor
            self._backends.setdefault(path, (processor, processor._attention_backend))  # type: ignore[union-attr]
            processor._attention_backend = families.native_backend()  # type: ignore[union-attr]
        self._checked[path] = getattr(module, "processor", None)

    def restore(self, path: str) -> None:
        module = self._modules.pop(path)
        self._checked.pop(path, None)
        if path in self._backends:
            processor, backend = self._backends.pop(path)
            processor._attention_backend = backend
        if path in self._found:
            found, twin = self._found.pop(path)
            if module.processor is twin:
                _put(module, found)


def _put(module: nn.Module, processor: Any) -> None:
    """Set the processor without the library's housekeeping, which discards weights."""
    module._modules.pop("processor", None)
    module.__dict__.pop("processor", None)
    if isinstance(processor, nn.Module):
        module._modules["processor"] = processor
    else:
        module.__dict__["processor"] = processor
