"""Hooks of torch's that come or go while a module is being called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookctl.hooks.forward import hook_before, hook_behind


def test_given_arguments_by_name() -> None:
    module, seen = nn.Linear(2, 2), []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append((len(args), list(kwargs)))
        return args, {name: one * 2 for name, one in kwargs.items()}

    def behind(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        seen.append((len(args), list(kwargs)))
        return output + 1

    x = torch.ones(1, 2)
    expected = module(x * 2) + 1
    handles = [hook_before(module, before), hook_behind(module, behind)]
    assert torch.equal(module(input=x), expected)
    assert seen == [(0, ["input"])] * 2
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x * 2) + 1, expected)


def test_removed_while_they_are_called() -> None:
    """As another thread may do it: torch calls a hook that it has listed, without the options."""
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = module(x)
    mine: list[Any] = []
    module.register_forward_pre_hook(lambda *_: mine[0].remove())
    module.register_forward_hook(lambda *_: mine[1].remove())
    mine += [hook_before(module, lambda *_: 1 / 0), hook_behind(module, lambda *_: 1 / 0)]
    assert torch.equal(module(x), plain)
