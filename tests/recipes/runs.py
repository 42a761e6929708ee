"""Runs of tiny pipelines under recipes, shared by the tests of recipes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hookctl import Editor, control
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from tests import zoo

SD15 = zoo.PIPELINES["sd15"]
TWO = ["a red cat", "a blue dog"]


@cache
def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline made once: every run leaves it as it was."""
    return zoo.PIPELINES[name].make().to(dtype)


def draw(
    name: str, edit: SourceAndEdits, *editors: Editor, dtype: Any = torch.float32, **call: Any
) -> Tensor:
    """The source and its edits under an editor of both, from its own noises."""
    with control(made(name, dtype), edit, *editors):
        return plain(name, edit, dtype=dtype, **call)


def plain(name: str, edit: SourceAndEdits, *, dtype: Any = torch.float32, **call: Any) -> Tensor:
    """The same prompts from the same noises, without the editor."""
    call = {"generator": edit.generators(), **call}
    return zoo.PIPELINES[name].run(made(name, dtype), edit.prompts, **call)


def draw_two(case: Any, pipe: Any, *editors: Editor, **call: Any) -> Tensor:
    """Two prompts under editors."""
    with control(pipe, *editors):
        return case.run(pipe, TWO, **call)


def with_scheduler(scheduler: Any, **config: Any) -> Any:
    """A pipeline with another scheduler."""
    pipe = SD15.make()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    return pipe


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference relative to the norm of b."""
    return float((a - b).norm() / b.norm())
