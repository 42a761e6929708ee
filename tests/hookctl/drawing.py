"""Two prompts drawn under control, with everything left as it was found."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import hookctl
from hookctl import Editor
from tests import zoo
from tests.families.fingerprint import unchanged

SD15 = zoo.PIPELINES["sd15"]
TWO = ["a red cat", "a blue dog"]


def editor(**methods: Any) -> Editor:
    """An editor with these functions as its hooks."""
    return type("Probe", (Editor,), {n: staticmethod(f) for n, f in methods.items()})()


def draw(case: zoo.Case, pipe: Any, *editors: Editor, **kwargs: Any) -> Tensor:
    """The latents of TWO; further keywords go to the pipeline."""
    case.run(pipe)  # models and pipelines add attributes of their own in their first run
    with unchanged(pipe), hookctl.control(pipe, *editors):
        return case.run(pipe, TWO, **kwargs)


def assign_same(state: Any) -> None:
    """An edit that changes no latent."""
    state.latents = state.latents.clone()
