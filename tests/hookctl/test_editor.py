"""Editors that can't mean what they say are refused before anything is drawn, with the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import hookctl
from hookctl import Editor, recipes
from hookctl.editor import HOOKS, check_editor
from hookctl.errors import InputError
from tests import zoo

PIXART = zoo.PIPELINES["pixart"]  # the quickest
SD15 = zoo.PIPELINES["sd15"]


def editor(**methods: Any) -> Editor:
    """An instance of a subclass `Mine` with these methods."""
    cls: type[Editor] = type("Mine", (Editor,), methods)
    return cls()


def nothing(self: Editor, given: Any) -> None:
    pass


def refused(given: Any, *says: str) -> None:
    with pytest.raises(InputError) as caught:
        hookctl.control(PIXART.make(), given)
    message = str(caught.value)
    assert all(part in message for part in says), message


def test_no_instance_of_an_editor() -> None:
    refused(hookctl.Maps, "editors[0] is the class Maps; give an instance of it: Maps(...)")
    refused("masactrl", "editors[0] is 'masactrl'; give instances of hookctl.Editor")
    refused([hookctl.Maps("cat")], "give each by itself: control(pipe, *editors)")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("atention", "attention"),
        ("befor", "before"),
        ("combin", "combine"),
        ("feature", "features"),
        ("branch", "branches"),
        ("contexts", "context"),
        ("denoised", "denoise"),
        ("claim", "claims"),
    ],
)
def test_a_misspelt_hook(name: str, meant: str) -> None:
    refused(
        editor(**{name: nothing, "begin": nothing}),
        f"Mine.{name} is no hook of hookctl.Editor",
        f"did you mean {meant!r}?",
    )


def test_a_hook_and_a_method_of_like_name() -> None:
    """Beside the hook itself, its like is a method like any other."""
    check_editor(editor(denoise=lambda self, state, proceed: 0, denoised=nothing), "editor")
    check_editor(editor(begin=nothing, _atention=nothing), "editor")


def test_an_editor_without_hooks() -> None:
    refused(editor(), "Mine overrides no hook of hookctl.Editor", ", ".join(HOOKS))
    refused(editor(claims=lambda self: ()), "overrides no hook")
    refused(Editor(), "Editor overrides no hook")


def test_a_hook_of_an_instance() -> None:
    mine = editor(begin=nothing)
    mine.attention = lambda call: None  # type: ignore[method-assign]
    refused(mine, "attention is set on an instance of Mine", "define it in a class")


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("attention", lambda self: None, "attention(self, call)"),
        ("attention", lambda self, call, state: None, "attention(self, call)"),
        ("denoise", lambda self, state: None, "denoise(self, state, proceed)"),
        ("begin", lambda self: None, "begin(self, state)"),
        ("combine", lambda self, state, predictions: None, "combine(self, predictions)"),
        ("after", lambda: None, "after(self, state)"),
        ("active", lambda self: True, "active(self, clock)"),
    ],
)
def test_a_hook_that_takes_other_arguments(name: str, method: Any, says: str) -> None:
    methods = {"begin": nothing, name: method}
    refused(editor(**methods), f"Mine.{name}(", "can't be called with", f"define it as {says}")


def test_hooks_of_any_form_are_taken() -> None:
    check_editor(editor(attention=staticmethod(lambda call: None)), "editor")
    check_editor(editor(attention=lambda self, *given, **more: None), "editor")
    check_editor(editor(denoise=lambda self, state, go, times=2: go()), "editor")


def test_every_recipe_is_an_editor() -> None:
    known = [getattr(recipes, name) for name in recipes.__all__]
    editors = [cls for cls in known if isinstance(cls, type) and issubclass(cls, Editor)]
    assert len(editors) > 10
    for cls in (*editors, hookctl.Maps):
        check_editor(cls.__new__(cls), cls.__name__)


@pytest.mark.parametrize(
    ("hook", "method", "says"),
    [
        ("attention", lambda self, call: call.v * 0, "Tensor, which is not read; rewrite the call"),
        (
            "before",
            lambda self, state: state.latents,
            "Tensor, which is not read; assign state.lat",
        ),
        ("after", lambda self, state: state.latents, "Tensor, which is not read; assign state.lat"),
        ("begin", lambda self, state: 3, "returned a int, which is not read; return nothing"),
        ("features", lambda self, call: call.skip, "not read; assign call.backbone or call.skip"),
        ("denoise", lambda self, state, proceed: None, "returned None; return what proceed()"),
        ("combine", lambda self, predictions: None, "returned a NoneType; return the prediction"),
        ("combine", lambda self, predictions: predictions.guided[:, :1], "returned (1, 1, 16, 16)"),
        ("branches", lambda self, state: ["x"], "returned a list; return a mapping from names to"),
        ("context", lambda self, state: 3, "returned a int; return a mapping from names to embed"),
    ],
)
def test_what_a_hook_returns(hook: str, method: Callable[..., Any], says: str) -> None:
    pipe = SD15.make()
    with pytest.raises(InputError) as caught:
        with hookctl.control(pipe, editor(**{hook: method})):
            SD15.run(pipe, steps=1)
    assert f"Mine.{hook} returned" in str(caught.value) and says in str(caught.value)
