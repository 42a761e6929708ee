"""The traceback of an error inside a hook names the editor and the hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl import Editor, control
from tests import zoo

SD15 = zoo.PIPELINES["sd15"]


def raising(hook: str) -> Editor:
    def broken(self: Editor, *given: Any) -> Any:
        raise KeyError("mine")

    return type("Mine", (Editor,), {hook: broken})()


@pytest.mark.parametrize(
    "hook",
    ["attach", "begin", "before", "branches", "context", "denoise", "attention", "features",
     "combine", "after"],
)  # fmt: skip
def test_every_hook(hook: str) -> None:
    editor = raising(hook)
    if hook == "attach":
        type(editor).begin = lambda self, state: None  # type: ignore[method-assign]
    pipe = SD15.make()
    with pytest.raises(KeyError, match="mine") as caught, control(pipe, editor):
        SD15.run(pipe, ["a red cat"])
    [note] = caught.value.__notes__
    assert note.startswith(f"hookctl: raised in Mine.{hook}"), note


def test_the_innermost_is_named() -> None:
    class Outer(Editor):
        def denoise(self, state: Any, proceed: Any) -> Any:
            return proceed()

    pipe = SD15.make()
    with pytest.raises(KeyError) as caught, control(pipe, Outer(), raising("attention")):
        SD15.run(pipe, ["a red cat"])
    [note] = caught.value.__notes__
    assert "Mine.attention, at " in note and "attn" in note


def test_values_that_do_not_fit() -> None:
    """Found when the sum is evaluated, long after the hook returned."""

    class Wide(Editor):
        sites = "cross"

        def attention(self, call: Any) -> None:
            call.bias(list(call.rows), key_factors=torch.zeros(3))

    pipe = SD15.make()
    with pytest.raises(Exception) as caught, control(pipe, Wide()):
        SD15.run(pipe, ["a red cat"])
    assert "Wide.attention" in "".join(caught.value.__notes__)
