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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from hookctl.hooks.patch import let_go

SDPA = F.scaled_dot_product_attention


class Watcher(Protocol):
    """Of one forward of one module; port: whom it belongs to."""

    port: Any

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attention call of the module by its name."""


@dataclass(eq=False)
class _Entry:
    watcher: Watcher | None  # None: nobody is to see what is called now


class _Running(threading.local):
    def __init__(self) -> None:
        self.entries: list[_Entry] = []


_running = _Running()
_lock = threading.RLock()
_placed: set[_Entry] = set()  # those of all threads that want the function in its place
_HIDDEN = _Entry(None)


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
    entry = _Entry(watcher)
    _running.entries.append(entry)
    _place(entry)


def leave() -> None:
    """The module has run. Whatever an interrupt leaves undone, the next time does."""
    _release(_running.entries[-1])
    _running.entries.pop()


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


def abandon() -> None:
    """This thread runs no module, whatever an interrupt left."""
    let_go(_lock)
    while _running.entries:
        leave()


def depth() -> int:
    """How many modules this thread runs inside one another."""
    return len(_running.entries)


def _place(entry: _Entry) -> None:
    with _lock:
        if not _placed and F.scaled_dot_product_attention is SDPA:
            F.scaled_dot_product_attention = _named
        if F.scaled_dot_product_attention is _named:
            _placed.add(entry)


def _release(entry: _Entry) -> None:
    with _lock:
        _placed.discard(entry)
        if not _placed and F.scaled_dot_product_attention is _named:
            F.scaled_dot_product_attention = SDPA
