"""The cards of the page: one for each editor, with a form that its signature made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from hookctl.app.forms import Field, Form
from hookctl.app.person import Person
from hookctl.app.stack import Card

_EMPTY = (
    "<div class='empty-state'>No editor yet: both pictures are the same.<br>"
    "Choose one above, or start from an example.</div>"
)


@dataclass(frozen=True)
class Deck:
    """What the cards of a person are built from; words: of the prompts."""

    person: Person
    forms: Mapping[str, Form]
    words: Sequence[str]


def show(deck: Deck) -> None:
    """Build the cards of a person."""
    if not deck.person.cards:
        gr.HTML(_EMPTY)
    for number, card in enumerate(deck.person.cards):
        _card(deck, number, card)


def _card(deck: Deck, number: int, card: Card) -> None:
    form, at = deck.forms[card.kind], f"card-{number + 1}"
    with gr.Column(elem_classes=["card"] + ["off"] * (not card.on), elem_id=at):
        with gr.Row(elem_classes="head"):
            gr.HTML(f"<div class='name'>{escape(form.name)}</div>")
            gr.HTML(_tools(at, card), elem_classes="tools")
        gr.HTML(f"<div class='summary'>{escape(form.summary)}</div>")
        if number in deck.person.notes:
            note = escape(deck.person.notes[number])
            gr.HTML(f"<div class='note' role='alert'>{note}</div>")
        if form.use == "program":
            gr.HTML("<small>Draws after your own picture; other cards act inside of it.</small>")
        if form.has_areas:
            gr.HTML("<small>Uses what is drawn under “Places”, and the text of each.</small>")
        drawn = [field for field in form.fields if _is_drawn(field)]
        early = [field for field in form.fields if field.early and field not in drawn]
        window = sorted((f for f in early if f.name in ("start", "stop")), key=lambda f: f.name)
        for field in early:
            if field not in window:
                _widget(deck, at, card, field)
        if window:
            with gr.Row():
                for field in window:
                    _widget(deck, at, card, field)
        late = [field for field in form.fields if not field.early and field not in drawn]
        late += [field for field in drawn if field.name != "people"]
        if late:
            with gr.Accordion("More", open=False):
                for field in late:
                    _widget(deck, at, card, field)


def _is_drawn(field: Field) -> bool:
    """Whether a field holds what is drawn, unless something else is written in it."""
    return field.kind in ("areas", "labels") or (field.kind == "area" and field.needed)


def _tools(at: str, card: Card) -> str:
    """The buttons that switch a card, move it and take it away.

    The page hears them itself (`press.js`), not gradio: where cards are drawn anew, it forgets
    those that were there before, and with them a click that is on its way.
    """
    labels = {"switch": "On" if card.on else "Off", "up": "↑", "down": "↓", "remove": "✕"}
    return "".join(
        f"<button type='button' id='{at}-{verb}' data-press='{id(card)} {verb}'>{label}</button>"
        for verb, label in labels.items()
    )


def pressed(person: Person, said: str) -> None:
    """Do what a button of a card says; nothing if the card is gone."""
    key, _, verb = said.partition(" ")
    for card in [one for one in person.cards if str(id(one)) == key]:
        if verb == "switch":
            card.on = not card.on
        elif verb == "remove":
            person.remove(card)
        elif verb in ("up", "down"):
            person.move(card, -1 if verb == "up" else 1)


def _widget(deck: Deck, at: str, card: Card, field: Field) -> None:
    """The widget of a field; what is typed goes to the card at once."""
    value = card.values.get(field.name, field.default)
    if field.kind == "words":
        return _words(deck, at, card, field)
    common: dict[str, Any] = {
        "label": field.title.capitalize(),
        "info": _short(field.help),
        "interactive": True,
        "elem_id": f"{at}-{field.name}",
    }
    made: Any
    if field.kind == "switch":
        made = gr.Checkbox(value, **common)
    elif field.kind == "slider":
        high = max(field.high, value)
        made = gr.Slider(
            min(field.low, value), high, value, step=0.01 if high <= 1 else 0.1, **common
        )
    elif field.kind == "number":
        made = gr.Number(value, precision=0 if field.whole else None, **common)
    elif field.kind == "choice":
        made = gr.Radio(list(field.choices), value=value, **common)
    else:
        empty = "as drawn" if _is_drawn(field) else "the method’s own"
        empty = "numbers of places: 1, 2" if field.kind == "area" and not field.needed else empty
        made = gr.Textbox(value, placeholder=empty, max_lines=4, **common)
    # Not `change`, which widgets tell that are on their way out.
    made.input(partial(_keep, card, field.name), made, None, queue=False, show_progress="hidden")


def _words(deck: Deck, at: str, card: Card, field: Field) -> None:
    """A box to check for each word.

    Not one group of them: where cards change, gradio 6 hands the values of the new widgets to those
    that had their positions before, and a group fails at what is no list.
    """
    chosen = list(card.values.get(field.name, field.default))
    help = _short(field.help)
    with gr.Column(elem_classes="words", elem_id=f"{at}-{field.name}"):
        said = f"<small>{escape(help)}</small>" if help else ""
        gr.HTML(f"<div>{escape(field.title.capitalize())}{said}</div>")
        with gr.Row():
            for word in dict.fromkeys([*deck.words, *chosen]):
                box = gr.Checkbox(
                    word in chosen, label=word, container=False, min_width=10, interactive=True
                )
                tick = partial(_choose, card, field, word)
                box.input(tick, box, None, queue=False, show_progress="hidden")


def _choose(card: Card, field: Field, word: str, chosen: bool) -> None:
    others = [one for one in card.values.get(field.name, field.default) if one != word]
    card.values[field.name] = [*others, word] if chosen else others


def _keep(card: Card, name: str, value: Any) -> None:
    card.values[name] = value


def _short(help: str) -> str | None:
    """The first clause of a help, which is what fits under a widget."""
    if not help:
        return None
    first = help if help[0] in "{\"'" else re.split(r"[:;.(](?=\s|[^)]{40})", help)[0].strip()
    if len(first) < 3 or first.startswith("as for "):  # the paper's letter, another's docstring
        return None
    first = first if len(first) <= 140 else first[:140].rsplit(" ", 1)[0] + " …"
    return (first[:1].upper() + first[1:]).rstrip(".,")
