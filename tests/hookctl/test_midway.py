"""Sessions of other threads that come and go while the model is running."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookctl
from hookctl.address import families
from hookctl.errors import HookctlWarning
from hookctl.recipes import SAG, FreeU
from tests import zoo
from tests.families.fingerprint import differences, fingerprint


class Inserts(hookctl.Editor):
    def insert(self, call: Any) -> None:
        call.hidden = call.hidden * 1.1


class Scales(hookctl.Editor):
    def linears(self, path: str) -> bool:
        return path.endswith(("to_q", "to_out.0"))

    def linear(self, call: Any) -> None:
        call.output = call.output * 1.1


class Blocks(hookctl.Editor):
    def block(self, call: Any) -> None:
        call.hidden = call.hidden * 1.1


EDITORS: dict[str, Callable[[], hookctl.Editor]] = {
    "attention": SAG,
    "features": FreeU,
    "insert": Inserts,
    "linear": Scales,
    "block": Blocks,
}


def draw(pipe: Any) -> Tensor:
    images: Tensor = pipe(
        "a red circle",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        height=32,
        width=32,
    ).images
    return images


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zoo.PIPELINES["sd15"].make()


@pytest.mark.parametrize("name", EDITORS)
def test_comes_and_goes_midway(pipe: Any, name: str) -> None:
    """In the middle of a module another thread enters a session, and leaves it in that of a later
    call: the run that goes on stays as it is, plain or edited."""
    before, plain = fingerprint(pipe), draw(pipe)
    with hookctl.control(pipe, Inserts()):
        edited = draw(pipe)
    block: nn.Module = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    with ThreadPoolExecutor(1) as other:

        def run() -> Tensor:
            session = hookctl.control(pipe, EDITORS[name](), strict=False)
            calls = []

            def midway(*_: Any) -> None:
                calls.append(session)
                if len(calls) == 1:
                    other.submit(session.__enter__).result()
                if len(calls) == 3:
                    other.submit(session.__exit__, None, None, None).result()

            handle = block.get_submodule("attn1.to_k").register_forward_pre_hook(midway)
            try:
                return draw(pipe)
            finally:
                handle.remove()
                assert len(calls) == 3

        with pytest.warns(HookctlWarning, match="another thread"):
            assert torch.equal(run(), plain)
        with hookctl.control(pipe, Inserts()):
            assert torch.equal(run(), edited)
    assert not differences(before, fingerprint(pipe))


def test_leaves_while_processors_are_looked_after(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call the processors of all sessions' sites are looked after."""
    looked, leaving = families.processor_of, threading.Event()
    with hookctl.control(pipe, hookctl.Maps()):
        edited = draw(pipe)
    with ThreadPoolExecutor(1) as other, hookctl.control(pipe, hookctl.Maps("circle")):
        session = hookctl.control(pipe, SAG())
        other.submit(session.__enter__).result()

        def processor_of(module: nn.Module) -> Any:
            if not leaving.is_set():
                leaving.set()
                gone = other.submit(session.__exit__, None, None, None)
                threading.Event().wait(0.05)  # it has to wait, too
                assert not gone.done()
            return looked(module)

        monkeypatch.setattr(families, "processor_of", processor_of)
        assert torch.equal(draw(pipe), edited)
    assert leaving.is_set()
