"""What a person has put together on the page, as the stack that a file would hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.app.forms import Form, form, form_of
from hookctl.app.places import Place, read_place
from hookctl.app.tables import Context, arguments_of, held
from hookctl.errors import InputError
from hookctl.preset import EditorSpec, HookSpec, ImageSpec, Preset, parameters
from hookctl.preset.check import check_arguments

_GIVEN = ("strength", "scale", "control_scale")  # of a hook's options that a card shows

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.editor import Editor


@dataclass
class Card:
    """One editor or program on the page. kind: the name of a recipe, or of learned weights that
    the page was started with; values: what its widgets hold, where it is not the default; key: by
    which a page knows it, no other card's."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    on: bool = True
    key: int = field(default_factory=count().__next__, compare=False, repr=False)


@dataclass(frozen=True)
class Kinds:
    """What cards there are.

    recipes: editors by name; inversions: likewise; hooks: learned weights by name, of the person
    who started the page (nobody else may name a file); options: the parameters, hints and
    docstring of each of them; programs: those that draw after an image, by name.
    """

    recipes: Mapping[str, type[Editor]]
    inversions: Mapping[str, type[Any]]
    hooks: Mapping[str, HookSpec] = field(default_factory=dict)
    options: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = field(
        default_factory=dict
    )
    programs: Mapping[str, type[Any]] = field(default_factory=dict)

    def hook_at(self, path: str) -> str | None:
        """The name of the card of the weights in a file; None if the page has none."""
        same = (
            name
            for name, hook in self.hooks.items()
            if Path(hook.path).resolve() == Path(path).resolve()
        )
        return next(same, None)

    @cached_property
    def forms(self) -> dict[str, Form]:
        """By name, recipes first."""
        found = {name: form_of(cls) for name, cls in self.recipes.items() if name != "Maps"}
        found |= {name: form_of(cls, use="program") for name, cls in self.programs.items()}
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
    places: tuple[Place, ...] = ()
    image: Image | None = None

    @property
    def prompts(self) -> list[str]:
        """The source prompt, and its edit if there is one."""
        return [self.prompt, self.edit] if self.edit.strip() else [self.prompt]

    def context(self, has: Callable[[str, str], bool] | None = None) -> Context:
        areas = [place.area for place in self.places]
        labels = [place.text.strip() for place in self.places]
        return Context(areas, labels, self.prompts, *([] if has is None else [has]))

    def run(self, program: ImageSpec | None = None) -> dict[str, Any]:
        """The settings of a file; of a program, those that it takes."""
        edit = {"edit": self.edit} if self.edit.strip() else {}
        found: dict[str, Any] = {"seed": self.seed, "steps": self.steps}
        found |= {} if self.guidance is None else {"guidance": self.guidance}
        if program is not None:
            taken = parameters(program.cls)
            found = {name: value for name, value in found.items() if name in taken}
        return {"prompt": self.prompt, **edit, **found}


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
    program: ImageSpec | None = None
    for number, card in enumerate(wanted.cards, 1):
        if not card.on:
            continue
        where = f"card {number} ({card.kind})"
        if card.kind not in kinds.forms:
            raise InputError(f"{where}: is not known; take a card from the list")
        table = arguments_of(kinds.forms[card.kind], card.values, context, where)
        if card.kind in kinds.hooks:
            hooks.append(_hook(kinds, card.kind, table, where))
            continue
        if card.kind in kinds.programs:
            if program is not None:
                raise InputError(f"{where}: {program.where} draws already; switch one of them off")
            cls = kinds.programs[card.kind]
            checked = check_arguments(table, cls, where, "program")
            program = ImageSpec(card.kind, cls, checked, where)
            continue
        cls = kinds.recipes[card.kind]
        checked = check_arguments(table, cls, where, "editor")
        specs.append(EditorSpec(card.kind, cls, checked, where))
    if not (specs or hooks or program):
        specs.append(EditorSpec("Maps", kinds.recipes["Maps"], {}))
    _check_prompts(wanted, [*specs, *([] if program is None else [program])])
    inversion = None if program is not None else _inversion(wanted, kinds)
    settings = wanted.run(program)
    return Preset(
        tuple(specs), settings, model, hooks=tuple(hooks), inversion=inversion, program=program
    )


def _hook(kinds: Kinds, kind: str, table: dict[str, Any], where: str) -> HookSpec:
    """Learned weights with what their card says and what they were given at the start."""
    given = kinds.hooks[kind]
    if given.strength is not None:  # IP-Adapters call it their scale
        scaled = any(one.name == "scale" for one in kinds.forms[kind].fields)
        table.setdefault("scale" if scaled else "strength", given.strength)
    if "people" in table:  # who they are, the page does not say; where they are, it does
        whose = given.arguments.get("people") or [{}]
        who = {k: v for k, v in whose[0].items() if k not in ("keypoints", "region")}
        table["people"] = [{**who, **where_} for where_ in table["people"]]
    return HookSpec(given.path, None, {**given.arguments, **table}, where)


def _check_prompts(wanted: Wanted, specs: Sequence[EditorSpec | ImageSpec]) -> None:
    for spec in specs:
        if spec.takes_prompts and len(wanted.prompts) < 2:
            raise InputError(
                f"{spec.where}: compares two prompts; write the edited one beside the first"
            )
        one = not (spec.takes_prompts or "source_prompt" in parameters(spec.cls))
        if isinstance(spec, ImageSpec) and one and len(wanted.prompts) > 1:
            raise InputError(
                f"{spec.where}: takes one prompt, of the picture that it shall draw; write it as "
                "the prompt, and leave the edited one empty"
            )
        if (isinstance(spec, ImageSpec) or spec.takes_image) and wanted.image is None:
            raise InputError(f"{spec.where}: takes a picture; give one under “Your own picture”")


def _inversion(wanted: Wanted, kinds: Kinds) -> ImageSpec | None:
    """How a picture that was given is inverted; None where a card takes the picture itself."""
    on = [kinds.recipes[c.kind] for c in wanted.cards if c.on and c.kind in kinds.recipes]
    if wanted.image is None or any(EditorSpec("", cls, {}).takes_image for cls in on):
        return None
    # Edits start from the noise of an inverted picture, which is none that the model knows: under
    # guidance blotches come of it (a white background is enough); see DirectInversion.
    given: dict[str, Any] = {"unit_noise": True}
    given |= {} if wanted.guidance is None else {"guidance": float(wanted.guidance)}
    return ImageSpec("DirectInversion", kinds.inversions["DirectInversion"], given)


def wanted_of(preset: Preset, kinds: Kinds) -> Wanted:
    """The page's form of a stack that comes along: its cards, places and settings.

    Places are those of the first editor that has some; another's own stay with its card.
    """
    places: list[Place] = []
    cards = []
    for hook in preset.hooks:
        kind = kinds.hook_at(hook.path)
        assert kind is not None
        places = places or _places_of_hook(hook.arguments)
        cards.append(_card(kinds, kind, {k: v for k, v in hook.arguments.items() if k in _GIVEN}))
    for spec in preset.specs:
        fields = {one.name: one for one in kinds.forms[spec.recipe].fields}
        table = dict(spec.arguments)
        found = _places(table)
        if found and not places:
            places = found
        if found and found == places:
            for name in ("regions", "texts", "words"):
                if fields.get(name) is not None and fields[name].kind in ("areas", "labels"):
                    table.pop(name, None)
        elif found and [p.area for p in found] == [p.area for p in places]:
            table.pop("regions")
        cards.append(_card(kinds, spec.recipe, table))
    run = preset.run
    edit = run.get("edit", "")
    return Wanted(
        run["prompt"],
        edit if isinstance(edit, str) else edit[0],
        run.get("seed", 0),
        run.get("steps", 25),
        run.get("guidance"),
        tuple(cards),
        tuple(places),
    )


def _card(kinds: Kinds, kind: str, table: Mapping[str, Any]) -> Card:
    fields = {one.name: one for one in kinds.forms[kind].fields}
    return Card(kind, {name: held(fields[name], value) for name, value in table.items()})


def _places_of_hook(table: Mapping[str, Any]) -> list[Place]:
    """Those of tables of learned weights: a thing's box, or the corners of somebody's."""
    boxes: list[tuple[Any, str]] = []
    for one in table.get("instances", ()):
        boxes.append((one.get("box"), one.get("caption", "")))
    for one in table.get("people", ()):
        x, y = zip(*one.get("keypoints") or [(0, 0)], strict=True)
        boxes.append(((min(x), min(y), max(x), max(y)), ""))
    found = [read_place(*pair) for pair in boxes]
    return [place for place in found if place is not None]


def _places(table: Mapping[str, Any]) -> list[Place]:
    """The places of an editor's table, with their texts; none if they are of another form."""
    regions = table.get("regions")
    if isinstance(regions, Mapping):
        labels, regions = list(regions), list(regions.values())
    else:
        labels = table.get("texts") or table.get("words") or [""] * len(regions or ())
    found = [read_place(*pair) for pair in zip(regions or (), labels, strict=False)]
    return [] if None in found else [place for place in found if place is not None]
