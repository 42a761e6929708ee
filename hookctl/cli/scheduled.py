"""Prompts of a run that change on the way, on the command line as in [run] of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hookctl.address.schedules import ScheduledPrompt, is_scheduled
from hookctl.errors import InputError

if TYPE_CHECKING:
    from hookctl.cli.draw import Drawing
    from hookctl.recipes import PromptSchedule


def begun(prompts: Sequence[str]) -> list[str]:
    """What a run of these prompts begins with."""
    return [ScheduledPrompt.read(one).first for one in prompts]


def schedule_of(prompts: Sequence[str], negative: str | None) -> PromptSchedule | None:
    """The editor that lets the prompts change, None where none does."""
    both = [*prompts, *([] if negative is None else [negative])]
    if not any(is_scheduled(one) for one in both):
        return None
    from hookctl.recipes import PromptSchedule

    changes = negative is not None and is_scheduled(negative)
    return PromptSchedule(list(prompts), negative=negative if changes else None)


def begun_drawing(drawing: Drawing) -> Drawing:
    """How a run is drawn that begins with the first of its negative prompts."""
    if drawing.negative is None:
        return drawing
    return replace(drawing, negative=begun([drawing.negative])[0])


def is_said(options: Any) -> bool:
    """Whether the command line gives a prompt that changes on the way."""
    both = [options.prompt, options.negative, *(options.edit or [])]
    return any(one is not None and is_scheduled(one) for one in both)


def check_none(prompts: Sequence[str], command: str) -> None:
    """InputError for a prompt that changes on the way, where none may."""
    for one in prompts:
        if is_scheduled(one):
            raise InputError(
                f"prompt {one!r} changes on the way, and {command} is of one prompt; give "
                f"{ScheduledPrompt.read(one).first!r}, or \\[ for a bracket that is text"
            )
