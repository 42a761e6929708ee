"""One person at the page: the cards and boxes put together, and what the last run left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from hookctl.app import drawing
from hookctl.app.stack import Box, Card, Kinds, Wanted, wanted_of
from hookctl.errors import HookctlError, InputError
from hookctl.preset import SETTINGS, Preset, load_preset

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

LEAST = 0.01  # of the canvas: a box with a shorter side is a slip of the hand
MOST_BOXES = 16


@dataclass
class Desk:
    """What all people at the page share: the pipeline, which one run at a time has, and the cards
    that there are. stops: of the runs in progress, by page."""

    pipe: Any
    model: str
    kinds: Kinds
    lock: Lock = field(default_factory=Lock)
    stops: dict[str, Event] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return str(self.pipe.device)

    @property
    def dtype(self) -> str:
        return str(self.pipe.dtype).removeprefix("torch.")


@dataclass
class Person:
    """cards, boxes: as they stand on the page; notes: what is said on cards, by their place; kept,
    made: of the last runs; place: of the picture that was clicked, (x, y) from 0 to 1; words: that
    the cards offer."""

    cards: list[Card] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict)
    kept: drawing.Kept = field(default_factory=drawing.Kept)
    made: drawing.Made | None = None
    place: tuple[float, float] | None = None
    words: list[str] = field(default_factory=list)

    def take(self, wanted: Wanted) -> None:
        """An example: its cards and boxes in place of one's own."""
        self.cards = [Card(card.kind, dict(card.values), card.on) for card in wanted.cards]
        self.boxes, self.notes = list(wanted.boxes), {}

    def move(self, card: Card, by: int) -> None:
        """Up (-1) or down (1) in the stack, as far as that goes."""
        at = self.cards.index(card)
        to = min(max(at + by, 0), len(self.cards) - 1)
        self.cards.insert(to, self.cards.pop(at))
        self.notes = {}

    def remove(self, card: Card) -> None:
        self.cards.remove(card)
        self.notes = {}

    def set_boxes(self, drawn: Any) -> None:
        """What the canvas says: [{x0, y0, x1, y1, text}]; what is no box is left out."""
        found = []
        for one in drawn if isinstance(drawn, list) else ():
            try:
                x0, y0, x1, y1 = (
                    min(max(float(one[k]), 0.0), 1.0) for k in ("x0", "y0", "x1", "y1")
                )
                text = str(one.get("text") or "")[:200]
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
            if x1 - x0 >= LEAST and y1 - y0 >= LEAST:
                found.append(Box(x0, y0, x1, y1, text))
        self.boxes = found[:MOST_BOXES]

    def wanted(
        self, prompt: str, edit: str, seed: Any, steps: Any, guidance: Any, image: Image | None
    ) -> Wanted:
        """What stands on the page now; InputError for a number that will not do."""
        numbers = {"seed": _whole(seed), "steps": _whole(steps)}
        for name, value in numbers.items():
            if value is None or (wanted := SETTINGS[name].lacks(value)):
                raise InputError(
                    f"{name}: is {value}; give {wanted if value is not None else 'a whole number'}"
                )
        cards = tuple(Card(card.kind, dict(card.values), card.on) for card in self.cards)
        scale = None if guidance is None else float(guidance)
        return Wanted(
            prompt or "", edit or "", numbers["seed"] or 0, numbers["steps"] or 1, scale, cards,
            tuple(self.boxes), image,
        )  # fmt: skip

    def note(self, error: HookctlError) -> None:
        """Put what the library says on the cards that it is about."""
        message = str(error)
        self.notes = {
            n: said(message)
            for n, card in enumerate(self.cards)
            if card.on
            and (
                message.startswith(f"card {n + 1} (")
                or (not message.startswith("card ") and card.kind in message)
            )
        }


def said(message: str) -> str:
    """A message as a sentence, without the place that the card itself is."""
    if message.startswith("card ") and "): " in message:
        message = message.partition("): ")[2]
    elif message.startswith("card ") and ") " in message:
        message = message.partition(") ")[2]
    return message[:1].upper() + message[1:]


def looked_over(desk: Desk, person: Person, wanted: Wanted) -> None:
    """Put on the cards what is wrong with them, if the pipeline is free to be asked."""
    person.notes = {}
    if not desk.lock.acquire(blocking=False):
        return
    try:
        drawing.check(desk.pipe, wanted, desk.kinds, desk.model)
    except HookctlError as error:
        person.note(error)
    finally:
        desk.lock.release()


def _whole(value: Any) -> int | None:
    try:
        return int(value) if float(value) == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


# -- examples --------------------------------------------------------------------------------------


def examples(folder: Path, kinds: Kinds) -> dict[str, Wanted]:
    """The stacks that come along and that the page can show, by what they do."""
    found = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            preset = load_preset(path, kinds.recipes, kinds.inversions)
        except HookctlError:  # a program, which has a loop of its own
            continue
        if _showable(preset, kinds):
            title = path.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip(".")
            found[title] = wanted_of(preset, kinds)
    return found


def _showable(preset: Preset, kinds: Kinds) -> bool:
    run: Mapping[str, Any] = preset.run
    edits: Sequence[str] = (
        [run["edit"]] if isinstance(run.get("edit"), str) else run.get("edit", ())
    )
    plain = not (preset.takes_image or preset.loras or preset.hooks or preset.program)
    known = all(spec.recipe in kinds.forms for spec in preset.specs)
    return plain and known and len(edits) < 2 and not {"width", "height", "negative"} & {*run}
