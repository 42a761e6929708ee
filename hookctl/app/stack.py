"""What a person has put together on the page, as the stack that a file would hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hookctl.app.forms import Context, Form, arguments_of, form, form_of, held
from hookctl.errors import InputError
from hookctl.preset import EditorSpec, HookSpec, ImageSpec, Preset
from hookctl.preset.check import check_arguments

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.editor import Editor


@dataclass(frozen=True)
class Box:
    """A box on the picture, in fractions of its sides, and what belongs there."""

    x0: float
    y0: float
    x1: float
    y1: float
    text: str = ""

    @property
    def area(self) -> str:
        """As `hookctl.Region` reads it, to a thousandth."""
        return "box:" + ",".join(f"{round(x, 3):g}" for x in (self.x0, self.y0, self.x1, self.y1))


@dataclass
class Card:
    """One editor on the page. kind: the name of a recipe, or of learned weights that the page was
    started with; values: what its widgets hold, where it is not the default."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    on: bool = True


@dataclass(frozen=True)
class Kinds:
    """What cards there are.

    recipes: editors by name; inversions: likewise; hooks: learned weights by name, of the person
    who started the page (nobody else may name a file); options: the parameters, hints and
    docstring of each of them.
    """

    recipes: Mapping[str, type[Editor]]
    inversions: Mapping[str, type[Any]]
    hooks: Mapping[str, HookSpec] = field(default_factory=dict)
    options: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = field(
        default_factory=dict
    )

    @cached_property
    def forms(self) -> dict[str, Form]:
        """By name, recipes first."""
        found = {name: form_of(cls) for name, cls in self.recipes.items() if name != "Maps"}
        for name in self.hooks:
            found[name] = form(name, *self.options[name])
        return found


@dataclass(frozen=True)
class Wanted:
    """All that decides a run, as it was when somebody pressed the button."""

    prompt: str
    edit: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    cards: tuple[Card, ...] = ()
    boxes: tuple[Box, ...] = ()
    image: Image | None = None

    @property
    def prompts(self) -> list[str]:
        """The source prompt, and its edit if there is one."""
        return [self.prompt, self.edit] if self.edit.strip() else [self.prompt]

    def context(self, has: Callable[[str, str], bool] | None = None) -> Context:
        areas, labels = [box.area for box in self.boxes], [box.text.strip() for box in self.boxes]
        return Context(areas, labels, self.prompts, *([] if has is None else [has]))

    def run(self) -> dict[str, Any]:
        """The settings of a file."""
        edit = {"edit": self.edit} if self.edit.strip() else {}
        found = {"prompt": self.prompt, **edit, "seed": self.seed, "steps": self.steps}
        return found if self.guidance is None else found | {"guidance": self.guidance}


def preset_of(
    wanted: Wanted, kinds: Kinds, model: str, has: Callable[[str, str], bool] | None = None
) -> Preset:
    """The stack of the cards that are on; InputError, led by "card 2 (PAG)", for what is wrong.

    has: whether a prompt has a word. A stack needs an editor: where there is none, one that only
    reads maps stands in it.
    """
    if not wanted.prompt.strip():
        raise InputError("The prompt is empty. Write what the picture shows")
    context = wanted.context(has)
    specs: list[EditorSpec] = []
    hooks: list[HookSpec] = []
    for number, card in enumerate(wanted.cards, 1):
        if not card.on:
            continue
        where = f"card {number} ({card.kind})"
        if card.kind not in kinds.forms:
            raise InputError(f"{where}: is not known; take a card from the list")
        table = arguments_of(kinds.forms[card.kind], card.values, context, where)
        if card.kind in kinds.hooks:
            given = kinds.hooks[card.kind]
            if given.strength is not None:  # IP-Adapters call it their scale
                scaled = any(one.name == "scale" for one in kinds.forms[card.kind].fields)
                table.setdefault("scale" if scaled else "strength", given.strength)
            hooks.append(HookSpec(given.path, None, table, where))
            continue
        cls = kinds.recipes[card.kind]
        checked = check_arguments(table, cls, where, "editor")
        specs.append(EditorSpec(card.kind, cls, checked, where))
    if not (specs or hooks):
        specs.append(EditorSpec("Maps", kinds.recipes["Maps"], {}))
    _check_prompts(wanted, specs)
    return Preset(
        tuple(specs), wanted.run(), model, hooks=tuple(hooks), inversion=_inversion(wanted, kinds)
    )


def _check_prompts(wanted: Wanted, specs: Sequence[EditorSpec]) -> None:
    for spec in specs:
        if spec.takes_prompts and len(wanted.prompts) < 2:
            raise InputError(
                f"{spec.where}: compares two prompts; write the edited one beside the first"
            )
        if spec.takes_image and wanted.image is None:
            raise InputError(f"{spec.where}: takes a picture; give one under “Your own picture”")


def _inversion(wanted: Wanted, kinds: Kinds) -> ImageSpec | None:
    """How a picture that was given is inverted; None where a card takes the picture itself."""
    on = [kinds.recipes[c.kind] for c in wanted.cards if c.on and c.kind in kinds.recipes]
    if wanted.image is None or any(EditorSpec("", cls, {}).takes_image for cls in on):
        return None
    guidance = {} if wanted.guidance is None else {"guidance": float(wanted.guidance)}
    return ImageSpec("DirectInversion", kinds.inversions["DirectInversion"], guidance)


def wanted_of(preset: Preset, kinds: Kinds) -> Wanted:
    """The page's form of a stack that comes along: its cards, boxes and settings.

    Boxes are those of the first editor that has some; another's own stay with its card.
    """
    boxes: list[Box] = []
    cards = []
    for spec in preset.specs:
        fields = {one.name: one for one in kinds.forms[spec.recipe].fields}
        table = dict(spec.arguments)
        found = _boxes(table)
        if found and not boxes:
            boxes = found
        if found and found == boxes:
            for name in ("regions", "texts", "words"):
                if fields.get(name) is not None and fields[name].kind in ("areas", "labels"):
                    table.pop(name, None)
        elif found and [b.area for b in found] == [b.area for b in boxes]:
            table.pop("regions")
        values = {name: held(fields[name], value) for name, value in table.items()}
        cards.append(Card(spec.recipe, values))
    run = preset.run
    edit = run.get("edit", "")
    return Wanted(
        run["prompt"],
        edit if isinstance(edit, str) else edit[0],
        run.get("seed", 0),
        run.get("steps", 25),
        run.get("guidance"),
        tuple(cards),
        tuple(boxes),
    )


def _boxes(table: Mapping[str, Any]) -> list[Box]:
    """The boxes of an editor's table, with their texts; none if they are of another form."""
    regions = table.get("regions")
    if isinstance(regions, Mapping):
        labels, regions = list(regions), list(regions.values())
    else:
        labels = table.get("texts") or table.get("words") or [""] * len(regions or ())
    found = []
    for region, label in zip(regions or (), labels, strict=False):
        numbers = region
        if isinstance(region, str):
            numbers = region.removeprefix("box:").split(",")
        try:
            x0, y0, x1, y1 = (float(x) for x in numbers)
        except (TypeError, ValueError):
            return []
        found.append(Box(x0, y0, x1, y1, label if isinstance(label, str) else ""))
    return found
