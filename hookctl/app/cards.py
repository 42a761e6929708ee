"""The cards of the page: one for each editor or program, with a form that its signature made.

They are plain HTML, which `static/cards.js` listens to: where gradio's own widgets are drawn anew,
it forgets those that were there before, and with them what is being typed or on its way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from hookctl.app.forms import Field, Form
from hookctl.app.person import Person
from hookctl.app.stack import Card

_EMPTY = (
    "<div class='empty-state'>No editor yet: both pictures are the same.<br>"
    "Choose one above, or start from an example.</div>"
)


def html(person: Person, forms: Mapping[str, Form]) -> str:
    """The cards of a person."""
    found = [_card(person, n, card, forms[card.kind]) for n, card in enumerate(person.cards)]
    return "".join(found) or _EMPTY


def _card(person: Person, number: int, card: Card, form: Form) -> str:
    at, parts = f"card-{number + 1}", [f"<div class='summary'>{escape(form.summary)}</div>"]
    if number in person.notes:
        parts.append(f"<div class='note' role='alert'>{escape(person.notes[number])}</div>")
    if form.use == "program":
        parts.append("<small>Draws after your own picture; other cards act inside of it.</small>")
    if form.has_areas:
        parts.append("<small>Uses what is drawn under “Places”, and the text of each.</small>")
    drawn = [field for field in form.fields if _is_drawn(field)]
    early = [field for field in form.fields if field.early and field not in drawn]
    window = sorted((f for f in early if f.name in ("start", "stop")), key=lambda f: f.name)
    late = [field for field in form.fields if not field.early and field not in drawn]
    late += [field for field in drawn if field.name != "people"]

    def shown(fields: Sequence[Field]) -> str:
        return "".join(_field(at, card, field, person.words) for field in fields)

    parts.append(shown([field for field in early if field not in window]))
    parts.append(f"<div class='window'>{shown(window)}</div>" if window else "")
    if late:
        more = f"<summary>More</summary>{shown(late)}"
        parts.append(f"<details data-card='{card.key}'>{more}</details>")
    head = f"<div class='name'>{escape(form.name)}</div><div class='tools'>{_tools(at, card)}</div>"
    kind = "card" if card.on else "card off"
    return f"<div class='{kind}' id='{at}'><div class='head'>{head}</div>{''.join(parts)}</div>"


def _is_drawn(field: Field) -> bool:
    """Whether a field holds what is drawn, unless something else is written in it."""
    return field.kind in ("areas", "labels") or (field.kind == "area" and field.needed)


def _tools(at: str, card: Card) -> str:
    """The buttons that switch a card, move it and take it away."""
    said = {
        "switch": ("On" if card.on else "Off", "Switch off" if card.on else "Switch on"),
        "up": ("↑", "Move up"),
        "down": ("↓", "Move down"),
        "remove": ("✕", "Remove"),
    }
    return "".join(
        f"<button type='button' id='{at}-{verb}' data-press='{card.key} {verb}' title='{title}' "
        f"aria-label='{title}'>{label}</button>"
        for verb, (label, title) in said.items()
    )


# -- fields ----------------------------------------------------------------------------------------


def _field(at: str, card: Card, field: Field, words: Sequence[str]) -> str:
    """A field: its inputs, and by what `cards.js` knows it."""
    value, name = card.values.get(field.name, field.default), f"{at}-{field.name}"
    title, help = escape(field.title.capitalize()), _short(field.help)
    said = f"<small>{escape(help)}</small>" if help else ""
    inputs = "".join(_inputs(name, field, value, words))
    if field.kind == "switch":
        inner = f"<label>{inputs} {title}</label>{said}"
    elif field.kind in ("choice", "words"):
        inner = f"<div class='label'>{title}</div>{said}<div class='choices'>{inputs}</div>"
    else:
        inner = f"<label class='label' for='{name}-input'>{title}</label>{said}{inputs}"
    known = f"data-card='{card.key}' data-field='{field.name}' data-kind='{field.kind}'"
    more = f" title='{escape(field.help)}'" if field.help else ""
    return f"<div class='field' id='{name}' {known}{more}>{inner}</div>"


def _inputs(name: str, field: Field, value: Any, words: Sequence[str]) -> Iterator[str]:
    if field.kind == "switch":
        yield f"<input type='checkbox'{_checked(value)}>"
    elif field.kind in ("choice", "words"):
        kind, chosen = ("radio", [value]) if field.kind == "choice" else ("checkbox", list(value))
        offered = field.choices if field.kind == "choice" else dict.fromkeys([*words, *chosen])
        for one in offered:
            mark = f"type='{kind}' name='{name}' value='{escape(one)}'{_checked(one in chosen)}"
            yield f"<label><input {mark}>{escape(one)}</label>"
    elif field.kind in ("slider", "number"):
        text = _number(value)
        yield f"<input id='{name}-input' type='text' inputmode='decimal' value='{escape(text)}'>"
        if field.kind == "slider":
            high = max(field.high, value) if isinstance(value, int | float) else field.high
            ends = f"min='{field.low:g}' max='{high:g}' step='{0.01 if high <= 1 else 0.1}'"
            yield f"<input type='range' aria-label='{name}' {ends} value='{escape(text)}'>"
    else:
        empty = "as drawn" if _is_drawn(field) else "the method’s own"
        empty = "numbers of places: 1, 2" if field.kind == "area" and not field.needed else empty
        mark = f"id='{name}-input' rows='1' placeholder='{empty}' spellcheck='false'"
        yield f"<textarea {mark}>{escape(str(value))}</textarea>"


def _checked(chosen: Any) -> str:
    return " checked" if chosen else ""


def _number(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, int | float) else str(value or "")


def _short(help: str) -> str | None:
    """The first clause of a help, which is what fits under a widget."""
    if not help:
        return None
    first = help if help[0] in "{\"'" else re.split(r"[:;.(](?=\s|[^)]{40})", help)[0].strip()
    if len(first) < 3 or first.startswith("as for "):  # the paper's letter, another's docstring
        return None
    first = first if len(first) <= 140 else first[:140].rsplit(" ", 1)[0] + " …"
    return (first[:1].upper() + first[1:]).rstrip(".,")


# -- what a person does ----------------------------------------------------------------------------


def hear(person: Person, forms: Mapping[str, Form], said: Any) -> None:
    """Take over what was typed into cards, as `cards.js` says it; what is of another form, or
    about cards that are gone, is nothing."""
    said = said if isinstance(said, Mapping) else {}
    typed = said.get("typed")
    for card in person.cards:
        values = typed.get(str(card.key)) if isinstance(typed, Mapping) else None
        for field in forms[card.kind].fields:
            if isinstance(values, Mapping) and field.name in values:
                card.values[field.name] = _typed(field, values[field.name])


def pressed(person: Person, said: Any) -> None:
    """Do what a button of a card says; nothing if the card is gone."""
    press = said.get("press") if isinstance(said, Mapping) else None
    key, _, verb = str(press).partition(" ")
    for card in [one for one in person.cards if str(one.key) == key]:
        if verb == "switch":
            card.on = not card.on
        elif verb == "remove":
            person.remove(card)
        elif verb in ("up", "down"):
            person.move(card, -1 if verb == "up" else 1)


def _typed(field: Field, value: Any) -> Any:
    """What a field holds for what its inputs say; a number that is none stays a text."""
    if field.kind == "switch":
        return value is True
    if field.kind == "words":
        return [str(one) for one in value] if isinstance(value, list) else field.default
    if field.kind == "choice":
        return value if value in field.choices else field.default
    text = str(value)
    if field.kind not in ("slider", "number"):
        return text
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text
