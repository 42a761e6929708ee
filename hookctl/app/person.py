"""One person at the page: the cards and boxes put together, and what the last run left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from hookctl.app import drawing
from hookctl.app.hooks import options_by_name, shipped, title_of
from hookctl.app.places import MOST, Place, place_of
from hookctl.app.stack import Card, Kinds, Wanted, wanted_of
from hookctl.cli.known import editors_by_name, inversions_by_name, programs_by_name
from hookctl.cli.models import SHAPES
from hookctl.errors import HookctlError, InputError
from hookctl.loop.noise import matches_flow
from hookctl.preset import SETTINGS, HookSpec, Preset, load_preset
from hookctl.recipes.common.real_images.flow import FlowProgram

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image


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


def desk_of(pipe: Any, model: str, hooks: Sequence[HookSpec] = ()) -> Desk:
    """With all recipes, the learned weights given, and those that the embedded model has.

    Of the programs those of flow matching are left out where the model is none of it.
    """
    named, options = options_by_name(pipe, hooks, shipped() if model == SHAPES else None)
    flow = matches_flow(getattr(pipe, "scheduler", None))
    programs = {
        name: cls
        for name, cls in programs_by_name().items()
        if flow or not issubclass(cls, FlowProgram)
    }
    recipes = editors_by_name()
    return Desk(pipe, model, Kinds(recipes, inversions_by_name(), named, options, programs))


@dataclass
class Person:
    """cards, places: as they stand on the page; notes: what is said on cards, by their number from
    0; kept, made: of the last runs; mapped: whose maps are shown; point: of the picture that was
    clicked, (x, y) from 0 to 1; words: that the cards offer."""

    cards: list[Card] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict)
    kept: drawing.Kept = field(default_factory=drawing.Kept)
    made: drawing.Made | None = None
    mapped: drawing.Made | None = None
    point: tuple[float, float] | None = None
    words: list[str] = field(default_factory=list)

    def take(self, wanted: Wanted) -> None:
        """An example: its cards and places instead of one's own."""
        self.cards = [Card(card.kind, dict(card.values), card.on) for card in wanted.cards]
        self.places, self.notes = list(wanted.places), {}

    def move(self, card: Card, by: int) -> None:
        """Up (-1) or down (1) in the stack, as far as that goes."""
        at = self.cards.index(card)
        to = min(max(at + by, 0), len(self.cards) - 1)
        self.cards.insert(to, self.cards.pop(at))
        self.notes = {}

    def remove(self, card: Card) -> None:
        self.cards.remove(card)
        self.notes = {}

    def set_places(self, drawn: Any) -> None:
        """What the canvas says, [{x0, y0, x1, y1, text}, {runs, text}]; what is no place is left
        out."""
        found = map(place_of, drawn if isinstance(drawn, list) else ())
        self.places = [place for place in found if place is not None][:MOST]

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
            tuple(self.places), image,
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
            found[title_of(path)] = wanted_of(preset, kinds)
    return found


def _showable(preset: Preset, kinds: Kinds) -> bool:
    run: Mapping[str, Any] = preset.run
    edits: Sequence[str] = (
        [run["edit"]] if isinstance(run.get("edit"), str) else run.get("edit", ())
    )
    plain = not (preset.takes_image or preset.loras or preset.program)
    known = all(spec.recipe in kinds.forms for spec in preset.specs)
    known = known and all(kinds.hook_at(hook.path) for hook in preset.hooks)
    return plain and known and len(edits) < 2 and not {"width", "height", "negative"} & {*run}
