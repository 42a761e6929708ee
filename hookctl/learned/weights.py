"""Weights of a trained module, where and how precise the model that they act in is."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from hookctl.hooks.offloading import check_held, is_offloaded
from hookctl.run_state import RunState

M = TypeVar("M", bound=nn.Module)


class Weights(Generic[M]):
    """A module that follows a model from device to device and in its precision.

    The module itself stays as it was loaded. Copies belong to the session and are freed with it.
    precise: names of parameters that stay in float32, such as gates, whose tanh would lose small
    values.
    """

    _copies: RunState[dict[tuple[torch.device, torch.dtype], nn.Module]] = RunState(factory=dict)

    def __init__(self, module: M, *, precise: Collection[str] = ()) -> None:
        self.module = module.eval().requires_grad_(False)
        self.precise = frozenset(precise)

    def like(self, x: Tensor) -> M:
        """The module for a tensor's device and precision; itself if hooks bring its weights there.

        Raises InputError if it is on the meta device.
        """
        if is_offloaded(self.module):
            return self.module
        own = next((p for n, p in self.module.named_parameters() if not self._keeps(n)), None)
        if own is None or (own.device == x.device and own.dtype == x.dtype):
            return self.module
        key = x.device, x.dtype
        found = self._copies.get(key)
        if found is None:
            found = self._copies[key] = self._copied(x)
        return found  # type: ignore[return-value]

    def _copied(self, x: Tensor) -> M:
        check_held(self.module, type(self.module).__name__)
        made = copy.deepcopy(self.module)
        nn.Module.to(made, x.device, x.dtype)  # diffusers' own `to` warns without need
        given = dict(self.module.named_parameters())
        for name, parameter in made.named_parameters():
            if self._keeps(name):
                parameter.data = given[name].data.to(x.device, copy=True)
        return made

    def _keeps(self, name: str) -> bool:
        return name.rpartition(".")[2] in self.precise
