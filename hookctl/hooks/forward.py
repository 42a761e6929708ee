"""torch's forward hooks, on modules that threads share.

torch looks up what a hook is to be given after it has made up its mind to call it: one that another
thread puts in or takes out at that moment is called without the module's keyword arguments. Then
nobody who runs the module wants the hook, and it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# Given the module, its arguments and, behind it, its output; None to change nothing.
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
Behind = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


def hook_before(module: nn.Module, hook: Before) -> Any:
    """Call `hook` before each forward; what takes it out."""

    def called(module: nn.Module, args: tuple[Any, ...], *kwargs: Any) -> Any:
        return hook(module, args, *kwargs) if kwargs else None

    return module.register_forward_pre_hook(called, with_kwargs=True)


def hook_behind(module: nn.Module, hook: Behind) -> Any:
    """Call `hook` behind each forward; what takes it out."""

    def called(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        return hook(module, args, *rest) if len(rest) == 2 else None

    return module.register_forward_hook(called, with_kwargs=True)
