"""Attention calls by their name, `torch.nn.functional.scaled_dot_product_attention`.

A torch-function mode sees every torch call of a module, and each costs the host microseconds. Where
all attention calls of a module go by the name, as in the model libraries, a function in its place
sees them and no others. It stands there while a module runs; in other threads, in compiled code and
inside of what a watcher does, it is the function that it stands for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

SDPA = F.scaled_dot_product_attention


class Watcher(Protocol):
    """Of one forward of one module; port: whom it belongs to."""

    port: Any

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attention call of the module by its name."""


class _Entry(NamedTuple):
    watcher: Watcher | None  # None: nobody is to see what is called now
    placed: bool


class _Running(threading.local):
    def __init__(self) -> None:
        self.entries: list[_Entry] = []


_running = _Running()
_lock = threading.RLock()
_uses = 0  # entries of all threads that want the function in its place
_HIDDEN = _Entry(None, False)


def _named(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or not (entries := _running.entries):
        return SDPA(*args, **kwargs)
    watcher = entries[-1].watcher
    if watcher is None:
        return SDPA(*args, **kwargs)
    entries.append(_HIDDEN)
    try:
        return watcher.named(args, kwargs)
    finally:
        entries.pop()


_named.__name__ = _named.__qualname__ = SDPA.__name__
_named.__doc__ = SDPA.__doc__


def is_free() -> bool:
    """Whether no other has put a function of its own in that place; it would stay there."""
    return F.scaled_dot_product_attention in (SDPA, _named)


def enter(watcher: Watcher) -> None:
    """Let a watcher see the calls by name of the module that this thread runs from now on."""
    _running.entries.append(_Entry(watcher, _place()))


def leave() -> Watcher | None:
    """The module has run; who watched it, None if somebody hid its calls."""
    entry = _running.entries.pop()
    if entry.placed:
        _release()
    return entry.watcher


@contextmanager
def hidden() -> Iterator[None]:
    """Calls made inside are nobody's."""
    entries = _running.entries
    entries.append(_HIDDEN)
    try:
        yield
    finally:
        entries.pop()


def watcher() -> Any:
    """Who watches the module that this thread runs, None for nobody."""
    return _running.entries[-1].watcher if _running.entries else None


def depth() -> int:
    """How many modules this thread runs inside one another."""
    return len(_running.entries)


def _place() -> bool:
    global _uses
    with _lock:
        if _uses == 0 and F.scaled_dot_product_attention is SDPA:
            F.scaled_dot_product_attention = _named
        if F.scaled_dot_product_attention is not _named:
            return False
        _uses += 1
        return True


def _release() -> None:
    global _uses
    with _lock:
        _uses -= 1
        if _uses == 0 and F.scaled_dot_product_attention is _named:
            F.scaled_dot_product_attention = SDPA
