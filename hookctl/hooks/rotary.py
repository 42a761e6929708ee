"""A model's table of rotary positions: what it is, after editors saw what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hookctl.hooks.forward import hook_before, hook_behind
from hookctl.hooks.patch import Patch

# Given the module's arguments and its output: what is to come out, None for the same.
EditTable = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
# Given a block's table: the one that its attention is to have, None for the same.
Exchange = Callable[[Any], Any]


class RotaryPort:
    """The hook on what makes a model's table, from `install` until `remove`.

    That may be no module (Z-Image): then another callable stands in its place meanwhile.
    """

    traced = False  # compiled code breaks at the edit, and is traced anew without it

    def __init__(self, model: nn.Module, path: str, edit: EditTable) -> None:
        self.module, self.edit = getattr(model, path), torch.compiler.disable(edit)
        self._patch = Patch(model, path, _Standing(self.module, self._after))
        self._handle: Any = None

    def install(self) -> None:
        if isinstance(self.module, nn.Module):
            self._handle = hook_behind(self.module, self._hooked)
        else:
            self._patch.install()

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        else:
            self._patch.remove()

    def _hooked(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self._after(args, kwargs, output)

    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        found = self.edit(args, kwargs, output)
        return output if found is None else found


class _Standing:
    """What stands in the place of a callable, and is it in all else."""

    def __init__(self, inner: Any, after: Callable[..., Any]) -> None:
        self._inner, self._after = inner, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._after(args, kwargs, self._inner(*args, **kwargs))


class SiteTablePort:
    """The hook on one attention module, which may be given another table than its neighbours."""

    traced = False

    def __init__(self, module: nn.Module, exchange: Exchange) -> None:
        self.module, self.exchange = module, torch.compiler.disable(exchange)
        self._handle: Any = None

    def install(self) -> None:
        self._handle = hook_before(self.module, self._before)

    def remove(self) -> None:
        self._handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        new_args = tuple(self._exchanged(one) for one in args)
        new_kwargs = {name: self._exchanged(one) for name, one in kwargs.items()}
        return new_args, new_kwargs

    def _exchanged(self, one: Any) -> Any:
        found = self.exchange(one) if isinstance(one, tuple | torch.Tensor) else None
        return one if found is None else found
