"""What the page says of a run: how far it is, how it ended, what went wrong."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch

from hookctl.app.person import said
from hookctl.errors import HookctlError
from hookctl.report import HEADERS

if TYPE_CHECKING:
    from hookctl.app.drawing import Made
    from hookctl.app.worker import Step

NOTHING_DONE = (
    "<div class='empty-state'>Draw a picture; then see which editor touched which layer, and "
    "how.</div>"
)
_FULL = (
    "There is not enough memory for this. Fewer places or cards need less; so does a smaller "
    "model, or another program that is closed. The page goes on."
)


def bar(title: str, done: int, total: int) -> str:
    """How far a run is."""
    share = 100 * done / max(total, 1)
    count = f"step {done} of {total}" if total > 1 else ""
    words = ", ".join(filter(None, (title[:1].upper() + title[1:], count)))
    return (
        f"<div class='bar' role='progressbar' aria-valuenow='{share:.0f}'>"
        f"<div style='width:{share:.1f}%'></div></div><p>{escape(words)}</p>"
    )


def waiting() -> str:
    return "<p>Somebody else’s picture is being drawn; yours is next.</p>"


def stopped(last: Step | None) -> str:
    where = f" at step {last.done} of {last.total}" if last is not None else ""
    return f"<p>Stopped{where}. The pictures are those from before.</p>"


def failed(error: BaseException) -> str:
    """An error as a message; what is not ours goes to the terminal in full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = _FULL
    elif isinstance(error, HookctlError):
        message = _placed(str(error))
    else:
        traceback.print_exception(error, file=sys.stderr)
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"<div class='error' role='alert'><p>{escape(message)}</p></div>"


def _placed(message: str) -> str:
    """A message with the card that it is about before it."""
    card = message.partition(")")[0] + ")" if message.startswith("card ") else ""
    return f"{card[:1].upper()}{card[1:]}: {said(message)}" if card else said(message)


def summed(made: Made) -> str:
    """How a run ended well."""
    silent = len(made.notes)
    if not silent:
        return "<p>Done.</p>"
    return f"<p>Done. {silent} card{'s' * (silent > 1)} changed nothing; see there why.</p>"


def report(rows: Sequence[tuple[str, ...]]) -> str:
    """What every card did, as a table."""
    if not rows:
        return "<div class='empty-state'>No card touched anything.</div>"
    head = "".join(f"<th>{escape(name.capitalize())}</th>" for name in HEADERS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='report'><table>{table}</table></div>"
