"""Work in a thread of its own: what it says, how it ends, how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event, Lock, current_thread
from threading import enumerate as threads
from typing import Any

import pytest

from hookctl.app.drawing import Stopped
from hookctl.app.telling import bar, failed, report, stopped, summed, waiting
from hookctl.app.worker import Done, Say, Shown, Step, Waiting, worked
from hookctl.errors import InputError


def ours() -> list[Any]:
    return [thread for thread in threads() if thread.name == "hookctl app"]


def test_what_is_said_comes_in_order() -> None:
    places = []

    def work(say: Say) -> str:
        places.append(current_thread().name)
        say(Shown("first"))
        say(Step("edited", 1, 1))
        return "all"

    lock = Lock()
    assert list(worked(work, lock, Event())) == [
        Shown("first"), Step("edited", 1, 1), Done("all"),
    ]  # fmt: skip
    assert places == ["hookctl app"] and not ours() and not lock.locked()


def test_of_steps_that_wait_the_last_is_told() -> None:
    def work(say: Say) -> None:
        for n in range(50):
            say(Step("edited", n, 50))

    run = worked(work, Lock(), Event())
    time.sleep(0.05)
    said = list(run)
    assert said[-2:] == [Step("edited", 49, 50), Done()]


def test_an_error_ends_the_work_and_frees_the_pipeline() -> None:
    def work(say: Say) -> None:
        raise InputError("no such word")

    lock = Lock()
    [done] = worked(work, lock, Event())
    assert isinstance(done, Done) and isinstance(done.error, InputError)
    assert not lock.locked()


def _endless(stop: Event) -> Any:
    def work(say: Say) -> None:
        while True:
            say(Step("edited", 0, 1))
            if stop.wait(0.01):
                raise Stopped

    return work


def test_a_run_that_is_stopped_says_so() -> None:
    stop = Event()
    said = worked(_endless(stop), Lock(), stop)
    assert isinstance(next(said), Step)
    stop.set()
    last = list(said)[-1]
    assert isinstance(last, Done) and isinstance(last.error, Stopped)


def test_a_page_that_is_gone_stops_its_run() -> None:
    stop, lock = Event(), Lock()
    said: Iterator[Any] = worked(_endless(stop), lock, stop)
    next(said)
    said.close()  # type: ignore[attr-defined]
    assert stop.is_set() and not ours() and not lock.locked()


def test_two_people_wait_for_each_other() -> None:
    lock, stop = Lock(), Event()
    with lock:
        said = worked(lambda say: "mine", lock, stop)
        assert next(said) == Waiting()
    assert list(said) == [Done("mine")]


def test_one_who_waits_can_stop_too() -> None:
    lock, stop = Lock(), Event()
    with lock:
        said = worked(lambda say: "mine", lock, stop)
        assert next(said) == Waiting()
        stop.set()
        [done] = said
    assert isinstance(done, Done) and isinstance(done.error, Stopped)


def test_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert "step 3 of 4" in bar("edited picture", 3, 4) and "width:75.0%" in bar("x", 3, 4)
    assert "yours is next" in waiting()
    assert "at step 3 of 4" in stopped(Step("x", 3, 4)) and "Stopped." in stopped(None)
    assert failed(InputError("card 2 (PAG) scale: is <x>")) == (
        "<div class='error' role='alert'><p>Card 2 (PAG): Scale: is &lt;x&gt;</p></div>"
    )
    assert "not enough memory" in failed(MemoryError())
    assert capsys.readouterr().err == ""
    assert "ZeroDivisionError: by 0" in failed(ZeroDivisionError("by\n0"))
    assert "ZeroDivisionError" in capsys.readouterr().err  # whole, in the terminal
    made: Any = type("Made", (), {"notes": {1: "x"}})
    assert "1 card changed nothing" in summed(made)
    assert "<td>PAG</td><td>&lt;down&gt;</td>" in report([("PAG", "<down>", "", "0-1", "sdpa", "")])
    assert "No card touched" in report([])
