"""Every promise for every family; `python -m tests.families.table` prints them as a table."""

from __future__ import annotations

import pytest

from tests.families import compiling
from tests.families.promises import NotApplicable
from tests.families.subjects import SUBJECTS, Subject
from tests.families.table import COMPILED_HERE, PROMISES

# Compiling a whole model is dear, and the same for all: the table does it for every subject.
PAIRS = [
    (subject, name)
    for subject in SUBJECTS
    for name in PROMISES
    if not name.startswith("compiled") or subject.name in COMPILED_HERE
]


@pytest.mark.parametrize(("subject", "name"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_promise(subject: Subject, name: str) -> None:
    try:
        PROMISES[name](subject)
    except NotApplicable as reason:
        assert str(reason)


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_model_compiled_in_place(inside: bool) -> None:
    compiling.compiled_in_place(next(s for s in SUBJECTS if s.name == "plain_sdpa"), inside)
