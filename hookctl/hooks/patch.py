"""Replace an attribute of one object for a while, and put back exactly what was there."""

from __future__ import annotations

import inspect
import threading
from typing import Any

_ABSENT = object()
lock = threading.RLock()  # of whatever is put in or taken out


def let_go(held: Any) -> None:
    """Release what this thread holds of a lock: an interrupt at the end of a `with` keeps it."""
    try:
        while True:
            held.release()
    except RuntimeError:  # not held
        pass


def abandon() -> None:
    let_go(lock)


# The patches on each attribute, oldest first; they keep their targets alive, so ids are safe.
_stacks: dict[tuple[int, str], list[Patch]] = {}


class Patch:
    """`name` of `target` is `value` from `install` until `remove`.

    Works on the instance's own dictionary, so that neither the class nor the setters of pipelines
    and modules take part. Patches of one attribute may be removed in any order. If somebody else
    replaced the attribute meanwhile, theirs stays.
    """

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.target, self.name, self.value = target, name, value
        self.before: Any = _ABSENT

    def install(self) -> None:
        with lock:
            self.before = self.target.__dict__.get(self.name, _ABSENT)
            _stacks.setdefault((id(self.target), self.name), []).append(self)
            self.target.__dict__[self.name] = self.value

    @property
    def below(self) -> Any:
        """What the attribute would be without this patch, as others come and go."""
        if (before := self.before) is not _ABSENT:
            return before
        kind = type(self.target)
        return inspect.getattr_static(kind, self.name).__get__(self.target, kind)

    def remove(self) -> None:
        with lock:
            stack = _stacks.get((id(self.target), self.name), [])
            if self not in stack:
                return
            place = stack.index(self)
            if place + 1 < len(stack):
                stack[place + 1].before = self.before
            elif self.target.__dict__.get(self.name) is self.value:
                self._put_back()
            stack.remove(self)
            if not stack:
                del _stacks[id(self.target), self.name]

    def _put_back(self) -> None:
        if self.before is _ABSENT:
            del self.target.__dict__[self.name]
        else:
            self.target.__dict__[self.name] = self.before
