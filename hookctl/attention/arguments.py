"""Arguments of verbs, prepared once and used at every site and step.

A verb is called thousands of times in a run with the same few tensors. What it needs to know of
their values is found here once, on the CPU where they were made, so that no call waits for a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from hookctl.attention.key_regions import KeyRegions
from hookctl.errors import InputError

T = TypeVar("T")

_KEPT = 512
_memory: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Any]] = OrderedDict()


def remembered(make: Callable[[], T], what: Hashable, *values: Tensor) -> T:
    """`make()`, or what it gave for the same tensors when they were last seen unchanged."""
    if any(v.requires_grad or v.is_inference() for v in values):
        return make()
    key = (what, *((id(v), v._version) for v in values))
    found = _memory.get(key)
    if found is None:
        # The tensors are kept with the result: an id stays theirs as long as it is a key.
        with torch.inference_mode(False):  # a later call may be learned through
            found = _memory[key] = (values, make())
        if len(_memory) > _KEPT:
            _memory.popitem(last=False)
    made: T = found[1]
    return made


def cast(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and on the device of `like`."""
    if value.dtype == like.dtype and value.device == like.device:
        return value
    return remembered(lambda: value.to(like), ("cast", like.dtype, like.device), value)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # kept for later calls, which may be learned through
def positions(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of tokens on a device. A list, as an index, would be copied there at every use, and
    the copy waited for."""
    return torch.tensor(tokens, device=device)


def is_all(value: Tensor, number: float) -> bool:
    """Whether every element is known to be `number` and will stay so.

    Not known of a tensor on another device (looking would wait for it) or of one being learned.
    """
    if value.device.type != "cpu" or value.requires_grad:
        return False
    return remembered(lambda: bool((value == number).all()), ("is", number), value)


def is_same(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor is known to hold what `own` does, and not to be learned.

    Never known of tensors on a device, where looking would wait for them.
    """
    if value.requires_grad or value.device.type != "cpu":
        return False
    return torch.equal(value, own)


def is_finite(value: Tensor) -> bool:
    """False if an element is known not to be finite."""
    if value.device.type != "cpu":
        return True
    return remembered(lambda: bool(value.isfinite().all()), "finite", value)


def regions_of(queries: Tensor, keys: Tensor, device: torch.device) -> KeyRegions:
    return remembered(lambda: KeyRegions(queries, keys, device), ("regions", device), queries, keys)


def stacked(value: Tensor, own: Tensor, name: str) -> Tensor:
    """Tensors [heads, tokens, channels], or of every member of the sub-batch, as a stack of one
    row like `own`."""
    stack = value if value.dim() == 4 else value.unsqueeze(0)
    _, sub, heads, _, channels = own.shape
    if stack.dim() != 4 or stack.shape[1] != heads or stack.shape[-1] != channels:
        raise InputError(
            f"{name} is {tuple(value.shape)}; give [heads={heads}, tokens, channels={channels}]"
        )
    if stack.shape[0] not in (1, sub):
        raise InputError(f"{name} has a sub-batch of {stack.shape[0]}; give 1 or {sub}")
    stack = stack.to(own)
    return (stack if stack.shape[0] == sub else stack.expand(sub, -1, -1, -1)).unsqueeze(0)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as it is added to scores; True lets a query see."""
    if mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))


def version_of(x: Tensor | None) -> int:
    """How often a tensor was changed in place; those of inference mode do not count it."""
    return 0 if x is None or x.is_inference() else x._version
