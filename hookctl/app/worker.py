"""Work in a thread of its own, for a page that wants to be told of it and may stop it.

A page's callback is a generator: what stands between two of its yields runs in a context of its
own, so that nothing of a session may be held there. The work is held here, from its first step to
its last, in one thread, which alone has the pipeline meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any, Generic, TypeVar

from hookctl.app.drawing import Made, Stopped, draw
from hookctl.app.person import Desk, Person

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What is being done, and how far it is."""

    title: str
    done: int
    total: int


@dataclass(frozen=True)
class Waiting:
    """Somebody else's run has the pipeline."""


@dataclass(frozen=True)
class Shown(Generic[T]):
    """Something to be shown before the work is done."""

    value: T


@dataclass(frozen=True)
class Done(Generic[T]):
    """The work is done: what it returned, or the error that ended it."""

    value: T | None = None
    error: BaseException | None = None


Report = Step | Waiting | Shown | Done
Say = Callable[[Report], None]


def worked(work: Callable[[Say], T], lock: Lock, stop: Event) -> Iterator[Report]:
    """Do some work in a thread that holds the lock; what it says, and at last a `Done`.

    The work itself looks at `stop`. If the iterator is closed, as that of a page whose tab is, it
    is set, and the thread is waited for.
    """
    said: Queue[Report] = Queue()

    def run() -> None:
        if not lock.acquire(blocking=False):
            said.put(Waiting())
            while not lock.acquire(timeout=0.1):
                if stop.is_set():
                    return said.put(Done(error=Stopped()))
        try:
            said.put(Done(work(said.put)))
        except BaseException as error:  # whatever it is, the page is told, and lives on
            said.put(Done(error=error))
        finally:
            lock.release()

    thread = Thread(target=run, name="hookctl app", daemon=True)
    thread.start()
    try:
        while True:
            for report in _waiting(said):
                yield report
                if isinstance(report, Done):
                    return
    finally:
        stop.set()
        thread.join()


def _waiting(said: Queue[Report]) -> list[Report]:
    """What has been said, at least one thing; of several steps in a row the last, since a page is
    slower than a small model."""
    found = [said.get()]
    while not said.empty():
        further = said.get()
        if isinstance(found[-1], Step) and isinstance(further, Step):
            found.pop()
        found.append(further)
    return found


def drawn(desk: Desk, person: Person, values: Sequence[Any], page: str) -> Iterator[Report]:
    """A run of what stands on a person's page; `person` has what it made before the `Done` comes.

    page: by which the run's stop event is found.
    """
    stop = Event()

    def work(say: Say) -> Made:
        wanted = person.wanted(*values)
        person.notes = {}
        made = draw(
            desk.pipe,
            wanted,
            desk.kinds,
            desk.model,
            tell=lambda title, done, total: say(Step(title, done, total)),
            stop=stop,
            kept=person.kept,
            shown=lambda image: say(Shown(image)),
        )
        person.made, person.notes = made, dict(made.notes)
        return made

    desk.stops[page] = stop
    try:
        yield from worked(work, desk.lock, stop)
    finally:
        if desk.stops.get(page) is stop:
            del desk.stops[page]
