"""Promises for families; `python -m tests.families.table` prints them all as a table."""

from __future__ import annotations

import pytest

from tests.families import compiling
from tests.families.promises import NotApplicable
from tests.families.subjects import SUBJECTS, Subject
from tests.families.table import PROMISES

# One UNet, SDXL, SD3, Flux, one video model, one of two calls a step, two bare modules.
EVERY_PROMISE = ("sd15", "sdxl", "sd3", "flux", "wan", "qwen_image", "compvis", "plain_sdpa")
EVERY_FAMILY = ("sites found", "q, k, v caught", "idle exact, edit right", "rows")
COMPILED = ("plain_sdpa",)  # a pipeline is compiled for a minute, a module for seconds


def everyday(subject: Subject, name: str) -> bool:
    """Whether a promise is kept by what differs between families, or this family is an example."""
    if name.startswith("compiled"):
        return subject.name in COMPILED
    return name in EVERY_FAMILY or subject.name in EVERY_PROMISE


PAIRS = [
    pytest.param(
        subject,
        name,
        id=f"{subject.name}-{name}",
        marks=() if everyday(subject, name) else pytest.mark.conformance,
    )
    for subject in SUBJECTS
    for name in PROMISES
]


@pytest.mark.parametrize(("subject", "name"), PAIRS)
def test_promise(subject: Subject, name: str) -> None:
    """All of them are a matter of many minutes, and what one family keeps most others do too."""
    try:
        PROMISES[name](subject)
    except NotApplicable as reason:
        assert str(reason)


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_model_compiled_in_place(inside: bool) -> None:
    compiling.compiled_in_place(next(s for s in SUBJECTS if s.name == "plain_sdpa"), inside)
