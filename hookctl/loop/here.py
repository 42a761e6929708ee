"""Which session a denoiser call belongs to: its pipeline's, in the thread or task it is made in.

Hooks stand on modules and schedulers, which threads, tasks and pipelines share. So a hook asks here
whose call it is. What a thread or task has entered is a context variable: a copy of the context
(`asyncio.to_thread`, a task made inside) takes the sessions along, with a run of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

from hookctl import run_state
from hookctl.address.families import uncompiled
from hookctl.hooks import by_name, patch
from hookctl.hooks.attention import unwind
from hookctl.loop import driven
from hookctl.loop.calls import calls
from hookctl.loop.denoising import Denoising

_entered: ContextVar[tuple[Denoising, ...]] = ContextVar("entered", default=())


def whereabouts() -> tuple[int, int | None]:
    """This thread and, in an event loop, this task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        task = None
    return threading.get_ident(), None if task is None else id(task)


def denoisings() -> list[Denoising]:
    """What is under control here, outermost session first."""
    kept = _entered.get()
    if not kept:
        return []
    home = whereabouts()
    if all(one.entries and one.home == home for one in kept):
        return list(kept)
    found = [one if one.home == home else one.fork(home) for one in kept if one.entries]
    _entered.set(tuple(found))
    return found


def denoising_of_target(target: Any, pipe: Any) -> Denoising:
    """What controls a pipeline, or a bare denoiser, here; new if nothing does so far."""
    for one in reversed(denoisings()):
        if one.target is target or (pipe is None and uncompiled(target) in one.models):
            return one
    return Denoising(target, pipe, whereabouts())


def enter(place: Denoising) -> None:
    """Calls made here belong to this from now on."""
    if place not in _entered.get():
        _entered.set((*_entered.get(), place))


def forget_ended() -> None:
    """Drop what has no session left from this context."""
    _entered.set(tuple(one for one in _entered.get() if one.entries))


def denoising_of_call(model: nn.Module) -> Denoising | None:
    """What a call of this denoiser, made now and here, belongs to; None for a plain one."""
    found = [one for one in denoisings() if model in one.models]
    if not found:
        return None
    caller = calling_pipeline(model, [one.pipe for one in found])
    if caller is None:
        return found[-1]  # a loop of the user's own, or a program
    for one in reversed(found):
        if one.pipe is None or one.pipe is caller or _holds(one.pipe, caller):
            return one
    return None


def denoising_of_step(pipe: Any) -> Denoising | None:
    """What a step of a pipeline's scheduler, made now and here, belongs to if it is this one's."""
    mine = denoising_of_pipeline(pipe)
    if mine is None:
        return None
    caller = calling_pipeline(pipe.scheduler, [pipe])
    return mine if caller in (None, pipe) or _holds(pipe, caller) else None


def denoising_of_pipeline(pipe: Any) -> Denoising | None:
    """What controls this pipeline here."""
    return next((one for one in reversed(denoisings()) if one.pipe is pipe), None)


def calling_pipeline(part: Any, known: Iterable[Any]) -> Any:
    """The pipeline that is calling a denoiser or scheduler of its own, None if no pipeline is.

    It is the nearest object on the call stack that has the part as an attribute and is a pipeline:
    of the kinds of those known, or of the library's.
    """
    kinds = tuple({type(pipe) for pipe in known if pipe is not None})
    base = getattr(sys.modules.get("diffusers.pipelines.pipeline_utils"), "DiffusionPipeline", None)
    kinds = (*kinds, base) if base is not None else kinds
    for owner in _owners(sys._getframe(1)):
        if isinstance(owner, kinds) and _holds(owner, part):
            return owner
    return None


def abandon() -> None:
    """Undo what an interrupt left of a denoiser call in this thread, unless one is in progress."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _IN_PROGRESS:
            return
        frame = frame.f_back
    calls.abandon()
    driven.abandon()
    run_state.abandon()
    patch.abandon()
    unwind((0, 0))
    by_name.abandon()


_IN_PROGRESS = (Denoising.around_denoiser.__code__, Denoising.around_step.__code__)


def _owners(frame: FrameType | None) -> Iterator[Any]:
    """The objects whose methods are on the stack, nearest first."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _holds(owner: Any, part: Any) -> bool:
    """Whether something is an attribute of an object, as it is or compiled."""
    return any(
        value is part or (isinstance(value, nn.Module) and uncompiled(value) is part)
        for value in vars(owner).values()
    )
