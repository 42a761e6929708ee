"""Replace an attribute of one object for a while, and put back exactly what was there."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Patch:
    """`name` of `target` is `value` until `remove`.

    Works on the instance's own dictionary, so that neither the class nor the setters of pipelines
    and modules take part. If somebody else replaced the attribute meanwhile, theirs stays.
    """

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.target, self.name, self.value = target, name, value
        self.before = target.__dict__.get(name, _ABSENT)
        target.__dict__[name] = value

    def remove(self) -> None:
        if self.target.__dict__.get(self.name) is not self.value:
            return
        if self.before is _ABSENT:
            del self.target.__dict__[self.name]
        else:
            self.target.__dict__[self.name] = self.before
