"""Operators of torch, and the way past them.

As an operator a kernel can be learned through, traced and faked. Calling one costs the host more
than the launch does, though, and so does choosing a launch. Calls that are made again and again on
tensors of one form, by code that needs none of this, go by `shortcut`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[..., Any]
Preparing = Callable[..., Run]

_runs: dict[Any, Run] = {}
_prepare: dict[Any, Preparing] = {}


def custom_op(name: str, schema: str | None = None) -> Callable[[Run], Any]:
    """`torch.library.custom_op` "hookctl::name" of a function that mutates nothing."""

    def made(run: Run) -> Any:
        found = torch.library.custom_op(f"hookctl::{name}", run, mutates_args=(), schema=schema)
        _runs[_overload(name)] = run
        return found

    return made


def prepared_op(name: str, schema: str) -> Callable[[Preparing], Any]:
    """`custom_op` of a function that makes its launch ready for arguments, and is given them then:
    prepare(*arguments)(*arguments)."""

    def made(prepare: Preparing) -> Any:
        found = custom_op(name, schema)(lambda *arguments: prepare(*arguments)(*arguments))
        _prepare[_overload(name)] = prepare
        return found

    return made


def shortcut(function: Any, arguments: Sequence[Any]) -> Any:
    """What does the same as `function`, where it is an operator of ours, for arguments that differ
    from these in the values of tensors alone; gradients don't flow through it."""
    prepare = _prepare.get(function)
    return _runs.get(function, function) if prepare is None else prepare(*arguments)


def _overload(name: str) -> Any:
    return getattr(torch.ops.hookctl, name).default
