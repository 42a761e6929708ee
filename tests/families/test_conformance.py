"""Every promise for every family; `python -m tests.families.table` prints them as a table."""

from __future__ import annotations

import pytest

from tests.families import compiling
from tests.families.promises import NotApplicable
from tests.families.subjects import SUBJECTS, Subject
from tests.families.table import COMPILED_HERE, PROMISES

SAME_UNET = ("controlnet", "sd15_pag", "instruct_pix2pix")  # pipelines round the UNet of sd15
OF_PIPELINES = ("idle exact, edit right", "rows", "exceptions", "nesting")
SAME_BACKENDS = ("z_image", "qwen_image", "flux2_klein")  # reached as those of flux


def here(subject: Subject, name: str) -> bool:
    """What the suite runs; the table runs the rest too, which is dear and the same for many."""
    if name.startswith("compiled"):
        return subject.name in COMPILED_HERE
    if name.endswith("backend") and subject.name in SAME_BACKENDS:
        return False
    return subject.name not in SAME_UNET or name in OF_PIPELINES


PAIRS = [(subject, name) for subject in SUBJECTS for name in PROMISES if here(subject, name)]


@pytest.mark.parametrize(("subject", "name"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_promise(subject: Subject, name: str) -> None:
    try:
        PROMISES[name](subject)
    except NotApplicable as reason:
        assert str(reason)


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_model_compiled_in_place(inside: bool) -> None:
    compiling.compiled_in_place(next(s for s in SUBJECTS if s.name == "plain_sdpa"), inside)
