"""The cards of the page: one for each editor, with a form that its signature made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
Changed = Callable[[Person], Any]


def show(
    person: Person,
    forms: dict[str, Form],
    words: Sequence[str],
    state: gr.State,
    tick: gr.State,
    after: Callable[..., Any],
    inputs: Sequence[Any],
) -> None:
    """Build the cards of a person.

    words: of the prompts; tick: the number that is raised when cards are to be drawn anew; after:
    looks the stack over, of (person, *inputs).
    """
    if not person.cards:
        gr.HTML(_EMPTY)
    for place, card in enumerate(person.cards):
        _card(person, place, card, forms[card.kind], words, state, tick, after, inputs)


def _card(
    person: Person,
    place: int,
    card: Card,
    form: Form,
    words: Sequence[str],
    state: gr.State,
    tick: gr.State,
    after: Callable[..., Any],
    inputs: Sequence[Any],
) -> None:
    def changing(change: Callable[[Person], None]) -> Callable[..., int]:
        """A handler that changes the stack and has it drawn anew."""

        def handler(person: Person, number: int, *values: Any) -> int:
            if any(one is card for one in person.cards):
                change(person)
            after(person, *values)
            return number + 1

        return handler

    def switched(_: Person) -> None:
        card.on = not card.on

    with gr.Column(elem_classes=["card"] + ["off"] * (not card.on), elem_id=f"card-{place + 1}"):
        with gr.Row(elem_classes="head"):
            gr.HTML(
                f"<div class='name'>{escape(form.name)}<small>{escape(form.summary)}</small></div>"
            )
            with gr.Row(elem_classes="tools"):
                buttons = [
                    ("On" if card.on else "Off", "switch", switched),
                    ("↑", "up", lambda person: person.move(card, -1)),
                    ("↓", "down", lambda person: person.move(card, 1)),
                    ("✕", "remove", lambda person: person.remove(card)),
                ]
                for label, name, change in buttons:
                    button = gr.Button(
                        label, size="sm", elem_id=f"card-{place + 1}-{name}", min_width=30
                    )
                    button.click(
                        changing(change), [state, tick, *inputs], tick, show_progress="hidden"
                    )
        if place in person.notes:
            gr.HTML(f"<div class='note' role='alert'>{escape(person.notes[place])}</div>")
        early = [field for field in form.fields if field.early]
        late = [field for field in form.fields if not field.early]
        if form.has_areas:
            gr.HTML("<small>Uses the boxes under “Places”, and the text of each.</small>")
        window = sorted((f for f in early if f.name in ("start", "stop")), key=lambda f: f.name)
        for field in early:
            if field not in window and field.kind not in ("areas", "labels"):
                _widget(place, card, field, words)
        if window:
            with gr.Row():
                for field in window:
                    _widget(place, card, field, words)
        late += [field for field in early if field.kind in ("areas", "labels")]
        if late:
            with gr.Accordion("More", open=False):
                for field in late:
                    _widget(place, card, field, words)


def _widget(place: int, card: Card, field: Field, words: Sequence[str]) -> None:
    """The widget of a field; what is typed goes to the card at once."""
    value = card.values.get(field.name, field.default)
    common: dict[str, Any] = {
        "label": field.title.capitalize(),
        "info": _short(field.help),
        "interactive": True,
    }
    common["elem_id"] = f"card-{place + 1}-{field.name}"
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
    elif field.kind == "words":
        known = list(dict.fromkeys([*words, *value]))
        made = gr.CheckboxGroup(known, value=value, **common)
    else:
        empty = "the boxes’" if field.kind in ("areas", "labels") else "the method’s own"
        made = gr.Textbox(value, placeholder=empty, max_lines=4, **common)
    # Not `change`, which widgets tell that are on their way out.
    made.input(partial(_keep, card, field.name), made, None, queue=False, show_progress="hidden")


def _keep(card: Card, name: str, value: Any) -> None:
    card.values[name] = value


def _short(help: str) -> str | None:
    """The first clause of a help, which is what fits under a widget."""
    if not help:
        return None
    first = help if help[0] in "{\"'" else re.split(r"[:;.(](?=\s|[^)]{40})", help)[0].strip()
    first = first if len(first) <= 140 else first[:140].rsplit(" ", 1)[0] + " …"
    return (first[:1].upper() + first[1:]).rstrip(".,")
