"""What an editor learns of a pipeline or a run: kept by the session, not by the editor.

One editor may be under control in several pipelines, threads and tasks at once. What belongs to one
of them is an attribute like any other, declared as `RunState`, and each finds its own value there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
_ABSENT: Any = object()


class Memory:
    """The values of all such attributes in one place: by owner, which is kept alive, and name."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[object, dict[str, Any]]] = {}

    def of(self, owner: object) -> dict[str, Any]:
        """The values of one owner, by name."""
        kept = self._values.get(id(owner))
        if kept is None:
            kept = self._values[id(owner)] = (owner, {})
        return kept[1]

    def copy(self) -> Memory:
        """Another place that starts with what is known here."""
        made = Memory()
        known = list(self._values.items())  # at once: another thread may be adding to it
        made._values = {key: (owner, dict(own)) for key, (owner, own) in known}
        return made

    def clear(self) -> None:
        self._values = {}


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(memory: Memory) -> Iterator[None]:
    """Let attributes have the values of this place meanwhile."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def memory_here() -> Memory | None:
    """The place that this context is in, None outside of a session."""
    return _memory.get()


def abandon() -> None:
    """Leave the place that this context is in, whatever an interrupt left."""
    _memory.set(None)


class RunState(Generic[T]):
    """An attribute of an editor, or of a part of one, that each session holds for itself.

        class Mean(Editor):
            total: RunState[Tensor | None] = RunState(None)

            def begin(self, state):
                self.total = None

    default: its value at first; factory: makes it, for what is changed in place. kept: outside of a
    session it has the value that the last run to set it left there; so have names without
    underscore.
    """

    def __init__(
        self,
        default: T = _ABSENT,
        *,
        factory: Callable[[], T] | None = None,
        kept: bool = False,
    ) -> None:
        self.default, self.factory, self.kept = default, factory, kept
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.kept |= not name.startswith("_")

    @overload
    def __get__(self, editor: None, owner: type) -> RunState[T]: ...

    @overload
    def __get__(self, editor: object, owner: type | None = None) -> T: ...

    def __get__(self, editor: Any, owner: type | None = None) -> Any:
        if editor is None:
            return self
        memory = _memory.get()
        own = editor.__dict__
        values = own if memory is None else memory.of(editor)
        found = values.get(self.name, _ABSENT)
        if found is _ABSENT:
            found = own.get(self.name, _ABSENT)  # as the editor was made
        if found is not _ABSENT:
            return found
        if self.factory is not None:
            self.__set__(editor, self.factory())
            return self.__get__(editor)
        if self.default is _ABSENT:
            raise AttributeError(
                f"{type(editor).__name__}.{self.name} is known only under hookctl.control(...)"
            )
        return self.default

    def __set__(self, editor: Any, value: T) -> None:
        memory = _memory.get()
        if memory is not None:
            memory.of(editor)[self.name] = value
        if memory is None or self.kept:
            editor.__dict__[self.name] = value
