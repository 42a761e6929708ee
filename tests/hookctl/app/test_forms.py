"""Forms: what a signature, its hints and its docstring become, and what a form gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from hookctl.address.regions import Region, parse_region
from hookctl.app.forms import OWN, form_of, helps_of, summary
from hookctl.app.places import GRID, Painted
from hookctl.app.tables import Context, argument, arguments_of, held
from hookctl.cli.known import editors_by_name
from hookctl.errors import InputError
from hookctl.preset.check import check_arguments


class Tint:
    """Colour what a word is about. Costs nothing.

    words: whose places are coloured; scale: how strongly,
        from 0 on. mode: "soft" or "hard".
    start, stop: fractions of the schedule.
    """

    def __init__(
        self,
        words: Sequence[str],
        scale: float = 2.0,
        *,
        mode: str = "soft",
        form: Literal["a", "b"] | None = None,
        paper: bool = False,
        rounds: int = 3,
        gains: Mapping[str, float] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None: ...


class Place:
    """Say what is where."""

    def __init__(self, texts: Sequence[str], regions: Sequence[Region], *, base: float = 0.2):
        pass


class Flow:
    """Between places by name."""

    def __init__(self, regions: Mapping[str, Region]) -> None: ...


TWO = Context(["box:0,0,0.5,1", "box:0.5,0,1,1"], ["a cat", "a dog"], ["a cat", "a dog"])


def field(cls: type, name: str) -> Any:
    return next(one for one in form_of(cls).fields if one.name == name)


def test_each_argument_has_its_widget() -> None:
    kinds = {one.name: one.kind for one in form_of(Tint).fields}
    assert kinds == {
        "words": "words", "scale": "slider", "mode": "choice", "form": "choice", "paper": "switch",
        "rounds": "number", "gains": "value", "start": "slider", "stop": "slider",
    }  # fmt: skip
    assert field(Tint, "words").needed and field(Tint, "rounds").whole
    assert (field(Tint, "scale").low, field(Tint, "scale").high) == (0.0, 10.0)
    assert field(Tint, "mode").choices == ("soft", "hard")
    assert field(Tint, "form").choices == (OWN, "a", "b")


def test_strength_and_window_are_seen_first() -> None:
    early = [one.name for one in form_of(Tint).fields if one.early]
    assert early == ["words", "scale", "start", "stop"]


def test_the_docstring_says_what_is_what() -> None:
    form = form_of(Tint)
    assert form.summary == "Colour what a word is about."
    assert field(Tint, "words").help == "whose places are coloured"
    assert field(Tint, "scale").help == "how strongly, from 0 on."
    assert field(Tint, "start").help == field(Tint, "stop").help == "fractions of the schedule."
    assert helps_of("no list: of anything", ["scale"]) == {} == helps_of("", [])
    broken = "scale, shift,\n    gain:\n        of the mask; mode: how"  # over lines
    assert helps_of(broken, ["scale", "shift", "gain", "mode"]) == {
        **dict.fromkeys(("scale", "shift", "gain"), "of the mask"), "mode": "how",
    }  # fmt: skip
    assert summary("One thing: and more. Second.") == "One thing"


class Mask:
    """Change a part of an image."""

    def __init__(self, mask: Region | str, *, keep: Region | None = None) -> None: ...


def test_one_area_is_all_that_is_drawn_or_the_places_of_some_numbers() -> None:
    assert [(one.kind, one.needed) for one in form_of(Mask).fields] == [
        ("area", True), ("area", False),
    ]  # fmt: skip
    left, right = TWO.areas
    both = arguments_of(form_of(Mask), {}, TWO, "it")["mask"]
    assert bool((parse_region(both).coverage(GRID, GRID) == 1).all())  # the two halves
    given = arguments_of(form_of(Mask), {"mask": "2", "keep": " 1 "}, TWO, "it")
    assert given == {"mask": right, "keep": left}
    given = arguments_of(form_of(Mask), {"mask": '"full"', "keep": "2,1"}, TWO, "it")
    assert given == {"mask": "full", "keep": both}


def test_what_is_as_by_default_is_left_out() -> None:
    given = arguments_of(form_of(Tint), {"words": ["cat"], "scale": 2.0, "rounds": 4.0}, TWO, "it")
    assert given == {"words": ["cat"], "rounds": 4}
    assert isinstance(given["rounds"], int)


def test_boxes_and_their_texts_become_regions() -> None:
    given = arguments_of(form_of(Place), {}, TWO, "it")
    assert given == {"texts": ["a cat", "a dog"], "regions": ["box:0,0,0.5,1", "box:0.5,0,1,1"]}
    assert arguments_of(form_of(Flow), {}, TWO, "it") == {
        "regions": {"a cat": "box:0,0,0.5,1", "a dog": "box:0.5,0,1,1"}
    }
    own = arguments_of(form_of(Place), {"regions": '["full"]', "texts": '["x"]'}, TWO, "it")
    assert own == {"regions": ["full"], "texts": ["x"]}


class Things:
    """Draw things, and people, at their places."""

    def __init__(self, instances: Sequence[Any], people: Any = None) -> None: ...


def test_places_become_tables_of_learned_weights() -> None:
    mask = Painted((GRID * GRID // 2, GRID * GRID // 2)).area
    given = arguments_of(form_of(Things), {}, Context([TWO.areas[0], mask], TWO.labels), "it")
    assert given["instances"] == [
        {"caption": "a cat", "box": [0, 0, 0.5, 1]}, {"caption": "a dog", "mask": mask},
    ]  # fmt: skip
    assert [one["region"] for one in given["people"]] == [TWO.areas[0], mask]
    assert given["people"][0]["keypoints"] == [[0, 0], [0.5, 0], [0.25, 0.5], [0, 1], [0.5, 1]]
    alone = arguments_of(form_of(Things), {"people": '[{embedding = "/x.npy"}]'}, TWO, "it")
    assert "/x.npy" not in repr(alone)  # whose tables may name files


def test_words_of_a_blend_are_those_of_each_prompt() -> None:
    cls = editors_by_name()["PromptToPrompt"]
    context = Context(prompts=["a red cat", "a green cat"])
    found = argument(field(cls, "blend"), ["cat", "green"], context, "it")
    assert found == [["cat"], ["cat", "green"]]


@pytest.mark.parametrize(
    ("cls", "values", "context", "message"),
    [
        (Place, {}, Context(), "it texts: there is no box yet; draw one on the picture"),
        (Place, {}, Context(["full"], [""]), "it texts: box 1 has no text"),
        (Tint, {"gains": "{a = "}, TWO, "it gains: '{a = ' can't be read; write a number"),
        (Tint, {"gains": '{a = "mask:/x.png"}'}, TWO, "files are not read for a page"),
        (Tint, {"gains": '"a=mask: x.png"'}, TWO, "files are not read for a page"),
        (Tint, {"gains": '"mask: data:x"'}, TWO, "files are not read for a page"),
        (Mask, {}, Context(), "it mask: there is no box yet; draw one on the picture"),
        (Mask, {"keep": "0"}, TWO, "it keep: there is no place 0; give numbers from 1 to 2"),
        (Mask, {"keep": '"mask:/x.png"'}, TWO, "files are not read for a page"),
        (Tint, {"rounds": None}, TWO, "it rounds: is empty; give a number, such as 3"),
        (Tint, {"scal": 1}, TWO, "it: has no 'scal'; did you mean 'scale'?"),
    ],
)
def test_what_can_not_be_is_said(cls: type, values: Any, context: Context, message: str) -> None:
    with pytest.raises(InputError) as caught:
        arguments_of(form_of(cls), values, context, "it")
    assert message in str(caught.value)


NEEDED = {
    "ConceptAttention": {"concepts": '["a cat"]'},
    "ConsiStory": {"subject": '"a"'},
    "DifferentialDiffusion": {"change": '"box:0,0,0.5,1"'},
    "LEDITSPlusPlus": {"edits": '["a dog"]'},
    "OneWayFlow": {"flows": '[["a cat", "a dog", 1.0]]'},
    "NAG": {"negative": '"a dog"'},
    "PromptRelay": {"parts": '["a cat", "a dog"]'},
    "PromptSchedule": {"schedule": '"a [cat:dog:0.5]"'},
}


@pytest.mark.parametrize("name", [n for n in editors_by_name() if n != "Maps"])
def test_every_recipe_has_a_form_that_gives_its_defaults(name: str) -> None:
    """With boxes drawn and words chosen, and what else it needs, a form's table is accepted."""
    cls = editors_by_name()[name]
    form = form_of(cls)
    assert form.summary and all(one.title for one in form.fields)
    values: dict[str, Any] = {one.name: ["a"] for one in form.fields if one.kind == "words"}
    values |= NEEDED.get(name, {})
    table = arguments_of(form, values, TWO, "it")
    checked = check_arguments(table, cls, "it", "editor")
    fields = {one.name: one for one in form.fields}
    again = {key: held(fields[key], value) for key, value in checked.items()}
    assert arguments_of(form, again, TWO, "it") == table
