"""Programs of the page: recipes that draw after a picture by a loop of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

import hookctl
from hookctl.address.families import sites_of
from hookctl.attention.call import AttentionCall
from hookctl.cli.inverting import takes_inside
from hookctl.editor import Editor

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.session import Session

BACK = "your picture, step by step back to noise"
Tell = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


class Stopped(Exception):
    """The person asked for the end of a run."""


class Calls(Editor):
    """Tells of a program's calls of the denoiser, and ends the run where that is wanted.

    By one layer's attention, which it leaves as it is: some programs take no steps of a scheduler,
    which other editors would be told of.
    """

    def __init__(self, pipe: Any, tell: Tell, stop: Event, title: str) -> None:
        self.pipe, self.sites = pipe, sites_of(pipe)[0].path
        self._tell, self._stop, self._title = tell, stop, title
        self._last, self._back = -1, False  # step, and whether it goes back to noise

    def attention(self, call: AttentionCall) -> None:
        step, steps = call.clock.step, call.clock.steps
        if torch.is_grad_enabled():  # something is fitted, at any step, and told of by itself
            self.told("", 0, 0)
            return
        if step != self._last:
            self._back = step < self._last or (self._last < 0 and step == steps - 1 > 0)
            self._last = step
        if self._back:
            self.told(BACK, steps - step, steps)
        else:
            self.told(self._title, step + 1, steps)

    def fitted(self, stage: str, done: int, total: int) -> None:
        """The progress of a program that fits something to the picture first."""
        self.told(f"the {stage} is fitted to your picture", done, total)

    def told(self, title: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped
        if total:
            self._tell(title, done, total)


def run_program(
    program: Any, editors: Sequence[Editor], calls: Calls
) -> tuple[list[Image], Session]:
    """The images of a program under editors, and the session that tells of these."""
    with hookctl.control(calls.pipe, calls, strict=False):
        if takes_inside(program):
            return list(program.run(*editors)), program.session
        fits = "progress" in inspect.signature(program.run).parameters
        with hookctl.control(calls.pipe, *editors, strict=False) as session:
            return list(program.run(**{"progress": calls.fitted} if fits else {})), session
