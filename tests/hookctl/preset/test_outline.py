"""What the sources tell of recipes is what the recipes are."""

from __future__ import annotations

from pathlib import Path

import pytest

import hookctl
from hookctl import recipes
from hookctl.cli.known import editors_by_name, inversions_by_name, programs_by_name
from hookctl.errors import InputError
from hookctl.preset import check_early, outline, parameters


def test_it_knows_what_the_recipes_are() -> None:
    found = outline()
    kinds = {
        "editor": editors_by_name(),
        "inversion": inversions_by_name(),
        "program": programs_by_name(),
    }
    assert {kind: {*names} for kind, names in found.kinds.items()} == {
        kind: {*names} for kind, names in kinds.items()
    }
    for names in kinds.values():
        for name, cls in names.items():
            assert found.arguments[name] == list(parameters(cls)), name
    assert len(found.arguments) == len(recipes.__all__) + len((hookctl.Maps, hookctl.References))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"editor": [{"recipe": "FreeV"}]}, "recipe='FreeV' is not known; did you mean 'FreeU'?"),
        (
            {"editor": [{"recipe": "FreeU", "b3": 1}]},
            "(FreeU): 'b3' is not a key of FreeU; there are: b1",
        ),
        ({"editor": [{}]}, "[[editor]] 1: recipe is missing"),
        ({"editor": [{"recipe": "DirectInversion"}]}, "recipe='DirectInversion' is not known"),
        ({"inversion": {"recipe": "PAG"}}, "[inversion]: recipe='PAG' is not known"),
        ({"program": {"recipe": "Imagic", "prompt": "a"}}, "prompt belongs to the run"),
    ],
)
def test_what_is_misspelt(data: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as error:
        check_early(data, Path("stack.toml"))
    assert says in str(error.value)


def test_other_forms_are_left_to_the_reader() -> None:
    for data in ({}, {"editor": 3}, {"editor": [3]}, {"editor": [{"recipe": "a.b:C", "x": 1}]}):
        known = check_early(data, Path("stack.toml"))  # type: ignore[arg-type]
        assert not known.takes(data, "prompts")
