"""Cards as HTML, and what a browser says of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hookctl.app.cards import hear, html, pressed
from hookctl.app.forms import form_of
from hookctl.app.person import Person
from hookctl.app.stack import Card
from tests.hookctl.app.test_forms import Place, Tint

FORMS = {"Tint": form_of(Tint), "Place": form_of(Place)}


def said(card: Card, **values: Any) -> dict[str, Any]:
    return {"typed": {str(card.key): values, "-1": {"scale": "9"}}, "press": f"{card.key} switch"}


def test_what_is_typed_goes_to_its_card() -> None:
    one, other = Card("Tint"), Card("Tint")
    person = Person([one, other])
    typed = {"words": ["cat"], "scale": "2.5", "paper": True, "mode": "hard", "gains": "{a = 1}"}
    hear(person, FORMS, said(other, **typed, rounds="", unknown="x"))
    assert other.values == {**typed, "scale": 2.5, "rounds": None} and one.values == {}
    shown = html(person, FORMS)
    assert shown.count("value='2.5'") == 2  # the number and its slider
    assert shown.count("value='cat' checked") == 1 and "value='hard' checked" in shown
    assert "{a = 1}</textarea>" in shown


@pytest.mark.parametrize(
    ("field", "value", "held"),
    [
        ("scale", "a lot", "a lot"),  # the library says what would do
        ("words", "cat", []),
        ("mode", "harder", "soft"),
        ("paper", "yes", False),
        ("gains", 3, "3"),
    ],
)
def test_what_is_of_another_form(field: str, value: Any, held: Any) -> None:
    card = Card("Tint")
    hear(Person([card]), FORMS, said(card, **{field: value}))
    assert card.values == {field: held}


@pytest.mark.parametrize("given", [None, [], {"typed": []}, {"typed": {"1": 2}}, {"press": 3}])
def test_what_says_nothing(given: Any) -> None:
    card = Card("Tint")
    person = Person([card])
    hear(person, FORMS, given)
    pressed(person, given)
    assert person.cards == [card] and card.values == {} and card.on


def test_buttons() -> None:
    one, other = Card("Tint"), Card("Place")
    person = Person([one, other])
    pressed(person, said(one))
    pressed(person, {"press": f"{other.key} up"})
    assert not one.on and person.cards == [other, one]
    assert re.findall(r"class='(card[ \w]*)'", html(person, FORMS)) == ["card", "card off"]
    for card in (one, other, one):
        pressed(person, {"press": f"{card.key} remove"})
    assert person.cards == [] and "No editor yet" in html(person, FORMS)


def test_nothing_that_is_typed_becomes_a_part_of_the_page() -> None:
    bad = "'><script>alert(1)</script>"
    card = Card("Tint", {"words": [bad], "gains": bad, "scale": bad})
    person = Person([card], notes={0: bad}, words=[bad])
    shown = html(person, FORMS)
    assert "<script" not in shown and "alert(1)" in shown
