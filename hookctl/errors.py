"""What can go wrong, each with the cause and the cure in the message.

An error raised on a user's input is also a `ValueError`, so that callers who do not know this
library can catch it; an error about a model that does not do what the hooks need is a
`RuntimeError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PART = 1000  # letters of a message before and behind what is left out


class HookctlError(Exception):
    """Base of every error raised by this library."""


class HookctlWarning(UserWarning):
    """Something that was asked for had no effect, or not the one that it seems to have."""


class InputError(HookctlError, ValueError):
    """An argument is wrong: the message names it, what was given and what would do.

    What was given may be of any length; the middle of a message that gets too long is left out.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > 2 * _PART:
            message = f"{message[:_PART]} ... {message[-_PART:]}"
        super().__init__(message)


class WordError(InputError):
    """A word or phrase is not in the prompt."""


class AlignmentError(InputError):
    """Two prompts can't be aligned in the way that was asked."""


class SelectorError(InputError):
    """A site selector matches no site of this model."""


class ConflictError(InputError):
    """Two editors claim the same thing at the same place and time."""


class LayoutError(HookctlError, RuntimeError):
    """The batch of a denoiser call fits no known layout of rows."""


class HoleError(HookctlError, RuntimeError):
    """A site ran without being caught, or was expected and never ran."""


class NotFiniteError(HookctlError, ArithmeticError):
    """A run came upon NaN or infinity; the message says where they began."""


class UnsupportedError(HookctlError, RuntimeError):
    """The method makes no sense on, or cannot be evaluated for, this model."""


@contextmanager
def naming(editor: str, hook: str, where: str = "") -> Iterator[None]:
    """Let the traceback of an error inside name the editor and its hook, the innermost one.

    where: the site or the like, "" for none.
    """
    try:
        yield
    except Exception as error:
        if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_NOTE} {editor}.{hook}{where and f', at {where}'}")
        raise


_NOTE = "hookctl: raised in"


def check_returned(editor: str, hook: str, value: object, instead: str) -> None:
    """Raise InputError if a hook whose value nobody reads returned one.

    editor: its name; instead: what to do in place of returning.
    """
    if value is not None:
        raise InputError(
            f"{editor}.{hook} returned a {type(value).__name__}, which is not read; "
            f"{instead or 'return nothing'}"
        )
