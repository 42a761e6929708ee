"""The cheap promises on every pipeline that can be built offline."""

from __future__ import annotations

import pytest

from tests.families.wild import CASES, PROMISES, Refused
from tests.zoo.wild import Wild

CHEAP, PROVED = 0.8, ("FluxKontextPipeline", "Kandinsky3Pipeline", "Lumina2Pipeline")  # seconds

PAIRS = [
    pytest.param(
        case,
        name,
        id=f"{case.name}-{name}",
        marks=()
        if name == "declared"
        or (case.seconds <= CHEAP and name != "facts proved")
        or case.name in PROVED
        else pytest.mark.conformance,
    )
    for case in CASES
    for name in PROMISES
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_wild(case: Wild, name: str) -> None:
    try:
        PROMISES[name](case)
    except Refused as reason:
        assert str(reason)
