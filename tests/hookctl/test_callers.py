"""A session belongs to its pipeline and to the thread or task in which it was entered."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import pickle
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hookctl
from hookctl.errors import HoleError, HookctlWarning, UnsupportedError
from hookctl.recipes import PAG, SAG, FreeU, MasaCtrl, PromptToPrompt
from tests import zoo
from tests.families.fingerprint import differences, fingerprint

SD15 = zoo.PIPELINES["sd15"]
PROMPTS = ["a red circle", "a blue circle"]


def draw(pipe: Any, seed: int = 0, prompt: Any = "a red circle") -> Tensor:
    count = 1 if isinstance(prompt, str) else len(prompt)
    images: Tensor = pipe(
        prompt,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for _ in range(count)],
        output_type="pt",
        height=32,
        width=32,
    ).images
    return images


def in_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def over_the_same(pipe: Any) -> Any:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture(scope="module")
def pipe() -> Any:
    return SD15.make()


@pytest.fixture
def one_tokenizes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast tokenizer keeps how it pads between two calls of a pipeline's: threads that share one
    would get another text, with or without us."""
    kind, lock = type(pipe), threading.Lock()
    encode = kind.encode_prompt

    @functools.wraps(encode)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return encode(self, *args, **kwargs)

    monkeypatch.setattr(kind, "encode_prompt", alone)


EDITORS: dict[str, Callable[[], hookctl.Editor]] = {
    "freeu": FreeU,
    "pag": PAG,
    "sag": lambda: SAG(0.75),
    "maps": hookctl.Maps,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_others_are_plain(pipe: Any, name: str) -> None:
    plain, other = draw(pipe), over_the_same(pipe)
    with hookctl.control(pipe, EDITORS[name]()) as session:
        edited = draw(pipe)
        words = session.maps.words
        assert torch.equal(in_thread(lambda: draw(pipe)), plain)
        assert torch.equal(draw(other, prompt="a red circle"), plain)
        draw(other, prompt="something else")
        assert session.maps.words == words
        assert torch.equal(draw(pipe), edited)
    assert name == "maps" or not torch.equal(edited, plain)


@pytest.mark.slow
@pytest.mark.usefixtures("one_tokenizes")
def test_every_thread_its_own_edits(pipe: Any) -> None:
    alone = {}
    for name, made in EDITORS.items():
        with hookctl.control(pipe, made()):
            alone[name] = draw(pipe)
    alone["plain"] = draw(pipe)
    pipes = [pipe, over_the_same(pipe)]
    shared = {name: made() for name, made in EDITORS.items()}
    both = threading.Barrier(8)

    def work(number: int) -> list[str]:
        wrong, random_of = [], random.Random(number)
        both.wait()
        for _ in range(25):
            name = random_of.choice(list(alone))
            mine = random_of.choice(pipes)
            if name == "plain":
                found = draw(mine)
            else:
                with hookctl.control(mine, shared[name]):
                    found = draw(mine)
            if not torch.equal(found, alone[name]):
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert [wrong for wrong in pool.map(work, range(8)) if wrong] == []


def test_tasks(pipe: Any) -> None:
    plain = draw(pipe)
    with hookctl.control(pipe, FreeU()):
        edited = draw(pipe)

    async def controlled() -> Tensor:
        with hookctl.control(pipe, FreeU()):
            await asyncio.sleep(0)
            first = await asyncio.to_thread(draw, pipe)
            await asyncio.sleep(0)
            assert torch.equal(first, draw(pipe))
            return first

    async def uncontrolled() -> list[Tensor]:
        found = []
        for _ in range(4):
            await asyncio.sleep(0)
            found.append(draw(pipe))
        return found

    async def both() -> tuple[Tensor, list[Tensor]]:
        return await asyncio.gather(controlled(), uncontrolled())

    mine, theirs = asyncio.run(both())
    assert torch.equal(mine, edited)
    assert all(torch.equal(one, plain) for one in theirs)


@pytest.mark.parametrize("strict", [True, False])
def test_called_elsewhere_only(pipe: Any, strict: bool) -> None:
    session = hookctl.control(pipe, FreeU(), strict=strict)
    told: Any = (
        pytest.raises(HoleError, match="another thread.*copy_context")
        if strict
        else pytest.warns(HookctlWarning, match="another thread")
    )
    with told, session:
        in_thread(lambda: draw(pipe))
    with hookctl.control(pipe, FreeU()):
        edited = draw(pipe)
    with hookctl.control(pipe, FreeU()):
        here = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: here.run(draw, pipe)), edited)


@pytest.mark.slow
def test_one_editor_in_two_pipelines() -> None:
    first, second = SD15.make(), zoo.PIPELINES["sdxl"].make()
    edit = PromptToPrompt(PROMPTS, cross_replace=0.8)
    masa = MasaCtrl(PROMPTS, start=0.0)
    for editor in (edit, masa, FreeU()):
        with hookctl.control(first, editor):
            alone = draw(first, prompt=PROMPTS)
            with hookctl.control(second, editor):
                pass
            assert torch.equal(draw(first, prompt=PROMPTS), alone)
            with pytest.raises(hookctl.errors.SelectorError):
                hookctl.control(second, editor, PAG(sites="nowhere")).__enter__()
            assert torch.equal(draw(first, prompt=PROMPTS), alone)


def test_models_are_freed() -> None:
    pipe = SD15.make()
    model = weakref.ref(pipe.unet)
    editor = PAG()
    with hookctl.control(pipe, editor, hookctl.Maps()):
        draw(pipe)
    del pipe
    gc.collect()
    assert model() is None


def test_dropped_session_ends() -> None:
    pipe = SD15.make()
    before = fingerprint(pipe)
    session = hookctl.control(pipe, FreeU())
    session.__enter__()
    with pytest.warns(ResourceWarning, match="without leaving"):
        del session
    assert not differences(before, fingerprint(pipe))


def test_ending_is_idempotent() -> None:
    pipe = SD15.make()
    before, plain = fingerprint(pipe), draw(pipe)
    session = hookctl.control(pipe, FreeU())
    session.__exit__(None, None, None)
    with session:
        edited = draw(pipe)
        in_thread(lambda: None)
    session.__exit__(None, None, None)
    assert not differences(before, fingerprint(pipe))
    with session:
        assert torch.equal(draw(pipe), edited)
        in_thread(lambda: session.__exit__(None, None, None))
        assert torch.equal(draw(pipe), plain)
    assert not differences(before, fingerprint(pipe))


class Ends(hookctl.Editor):
    """Ends a session in the middle of the model."""

    def attention(self, call: hookctl.AttentionCall) -> None:
        self.end()

    def end(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ended_inside_the_model(elsewhere: bool) -> None:
    pipe = SD15.make()
    before, plain = fingerprint(pipe), draw(pipe)
    editor = Ends()
    session = hookctl.control(pipe, editor)

    def end() -> None:
        session.__exit__(None, None, None)

    editor.end = (lambda: in_thread(end)) if elsewhere else end  # type: ignore[method-assign]
    with session:
        draw(pipe)
        assert torch.equal(draw(pipe), plain)
    assert F.scaled_dot_product_attention.__module__ != "hookctl.hooks.by_name"
    assert torch.equal(draw(pipe), plain)
    assert not differences(before, fingerprint(pipe))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_by_name(copied: Callable[[Any], Any]) -> None:
    pipe = SD15.make()
    with hookctl.control(pipe, FreeU()):
        with pytest.raises(UnsupportedError, match="control"):
            copied(pipe.unet)
    copied(pipe.unet)


def test_replaced_denoiser() -> None:
    pipe, other = SD15.make(), SD15.make()
    with hookctl.control(pipe, FreeU()):
        pipe.unet = other.unet
        with pytest.raises(UnsupportedError, match="replaced"):
            draw(pipe)


class Interrupt:
    """Raises KeyboardInterrupt at one line of the library that is run, counted from 0."""

    def __init__(self, at: int) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if "/hookctl/" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.slow
def test_interrupts_leave_nothing() -> None:
    pipe = SD15.make()
    plain, before = draw(pipe), fingerprint(pipe)

    def run(interrupt: Interrupt) -> None:
        editor = PAG()
        sys.settrace(interrupt)
        try:
            with hookctl.control(pipe, editor, FreeU(), hookctl.Maps("circle")):
                draw(pipe)
        finally:
            sys.settrace(None)

    for _ in range(2):  # the first fills caches
        whole = Interrupt(-1)
        run(whole)
    chosen = random.Random(0).sample(range(1, whole.lines + 1), 300)
    left = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for at in sorted(chosen):
            interrupt = Interrupt(at)
            with pytest.raises(KeyboardInterrupt):
                run(interrupt)
                print(at, whole.lines, interrupt.lines, interrupt.where)
            found = differences(before, fingerprint(pipe))
            if found or F.scaled_dot_product_attention.__module__ == "hookctl.hooks.by_name":
                left[interrupt.where] = found
    assert not left
    assert torch.equal(draw(pipe), plain)

    def edited() -> Tensor:
        with hookctl.control(pipe, PAG()):
            return draw(pipe)

    with ThreadPoolExecutor(1) as pool:  # no lock is left behind either
        assert torch.equal(pool.submit(edited).result(timeout=60), edited())
