"""What is put together on the page, as a stack, and back."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hookctl.app.copying import as_command, as_python, as_texts, as_toml
from hookctl.app.person import Person, examples
from hookctl.app.places import Box
from hookctl.app.stack import Card, Kinds, Wanted, preset_of, wanted_of
from hookctl.cli.known import editors_by_name, inversions_by_name
from hookctl.cli.stacks import PRESETS
from hookctl.errors import ConflictError, InputError
from hookctl.preset import HookSpec, Preset, load_preset, parameters
from tests.hookctl.app.test_forms import Tint

PROMPT, EDIT = "a red circle above a blue square", "a green circle above a blue square"


@pytest.fixture(scope="module")
def kinds() -> Kinds:
    options = {key: p for key, p in parameters(Tint).items() if key != "words"}
    return Kinds(
        editors_by_name(),
        inversions_by_name(),
        {"tint.bin": HookSpec("folder/tint.bin", 0.5)},
        {"tint.bin": (options, {}, "Learned weights.")},
    )


def preset(kinds: Kinds, *cards: Card, **given: Any) -> Preset:
    return preset_of(Wanted(PROMPT, EDIT, cards=cards, **given), kinds, "shapes")


def test_cards_that_are_on_are_the_stack(kinds: Kinds) -> None:
    found = preset(kinds, Card("PAG", {"scale": 2.0}), Card("SAG", on=False), Card("FreeU"))
    assert [(s.recipe, s.arguments) for s in found.specs] == [
        ("PAG", {"scale": 2.0}),
        ("FreeU", {}),
    ]
    assert [s.where for s in found.specs] == ["card 1 (PAG)", "card 3 (FreeU)"]
    assert found.run == {"prompt": PROMPT, "edit": EDIT, "seed": 0, "steps": 25}


def test_without_cards_a_stack_only_reads_maps(kinds: Kinds) -> None:
    assert [spec.recipe for spec in preset(kinds).specs] == ["Maps"]


def test_learned_weights_are_named_by_who_started_the_page(kinds: Kinds) -> None:
    found = preset(kinds, Card("tint.bin", {"rounds": 5}))
    assert not found.specs
    said = {"rounds": 5, "scale": 0.5}
    assert found.hooks == (HookSpec("folder/tint.bin", None, said, "card 1 (tint.bin)"),)
    with pytest.raises(InputError, match="is not known"):
        preset(kinds, Card("folder/other.bin"))


def test_a_picture_is_inverted_unless_a_card_takes_it(kinds: Kinds) -> None:
    image = Image.new("RGB", (8, 8))
    found = preset(kinds, Card("PromptToPrompt"), image=image, guidance=3.0)
    assert found.inversion is not None
    assert (found.inversion.recipe, found.inversion.arguments) == (
        "DirectInversion",
        {"unit_noise": True, "guidance": 3.0},
    )
    assert preset(kinds, Card("ReferenceOnly"), image=image).inversion is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("  "), "The prompt is empty"),
        (Wanted(PROMPT, cards=(Card("PromptToPrompt"),)), "card 1 (PromptToPrompt): compares"),
        (
            Wanted(PROMPT, EDIT, cards=(Card("ReferenceOnly"),)),
            "(ReferenceOnly): takes a pic",
        ),
        (Wanted(PROMPT, cards=(Card("PAG", {"scale": "x"}),)), "card 1 (PAG) scale = 'x'; give a"),
        (Wanted(PROMPT, cards=(Card("RegionalPrompts"),)), "draw one on the picture"),
    ],
)
def test_what_is_missing_is_said(kinds: Kinds, wanted: Wanted, message: str) -> None:
    with pytest.raises(InputError) as caught:
        preset_of(wanted, kinds, "shapes")
    assert message in str(caught.value)


def _with_defaults(spec: Any) -> dict[str, Any]:
    """An editor's arguments with its defaults, each in one form."""
    empty = inspect.Parameter.empty
    every = {k: p.default for k, p in parameters(spec.cls).items() if p.default is not empty}
    found = {**every, **spec.arguments}
    if isinstance(found.get("blend"), list):
        found["blend"] = [[one] if isinstance(one, str) else one for one in found["blend"]]
    if isinstance(found.get("regions"), dict):
        found["regions"] = {
            k: v if isinstance(v, str) else "box:" + ",".join(f"{x:g}" for x in v)
            for k, v in found["regions"].items()
        }
    return found


def test_examples_are_the_stacks_that_come_along(kinds: Kinds) -> None:
    """Taken to the page and back, a stack says the same."""
    found = examples(PRESETS, kinds)
    assert len(found) >= 15
    for path in sorted(PRESETS.glob("*.toml")):
        title = path.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip(".")
        if title not in found:
            continue
        given = load_preset(path, kinds.recipes, kinds.inversions)
        again = preset_of(wanted_of(given, kinds), kinds, "shapes")
        assert [_with_defaults(s) for s in again.specs] == [_with_defaults(s) for s in given.specs]
        assert {**again.run, "seed": 0} == {**given.run, "seed": 0, "steps": again.run["steps"]}


# -- copies ----------------------------------------------------------------------------------------


def test_the_file_is_read_back_as_the_stack(kinds: Kinds, tmp_path: Path) -> None:
    made = preset(
        kinds,
        Card("RegionalPrompts", {"base": 0.4}),
        Card("PromptToPrompt", {"blend": ["circle"]}),
        places=(Box(0, 0, 0.5, 1, "a cat"), Box(0.5, 0, 1, 1, 'a "dog"\n')),
        guidance=3.0,
    )
    path = tmp_path / "stack.toml"
    path.write_text(as_toml(made), "utf-8")
    again = load_preset(path, kinds.recipes, kinds.inversions)
    assert [s.arguments for s in again.specs] == [s.arguments for s in made.specs]
    assert (again.run, again.model) == (made.run, "shapes")


def test_the_command_writes_the_file_and_runs_it(kinds: Kinds) -> None:
    text = as_command(preset(kinds, Card("PAG")))
    file, _, command = text.partition("\nEND\n")
    assert tomllib.loads(file.partition("\n")[2])["editor"] == [{"recipe": "PAG"}]
    assert command.startswith("hookctl run stack.toml --device cpu")
    own = as_command(preset(kinds, Card("PromptToPrompt"), image=Image.new("RGB", (8, 8))))
    assert "--image picture.png" in own


def test_the_program_is_a_program(kinds: Kinds) -> None:
    made = preset(kinds, Card("PAG", {"sites": "self"}), Card("tint.bin"), guidance=3.0)
    text = as_python(made, "cuda", "float16")
    compile(text, "copied.py", "exec")
    assert "PAG(sites='self')" in text and 'device="cuda", dtype=torch.float16' in text
    assert "hookctl.learned.load('folder/tint.bin', pipe, scale=0.5)" in text
    assert "guidance_scale=3.0" in text
    own = as_python(preset(kinds, image=Image.new("RGB", (8, 8))))
    compile(own, "copied.py", "exec")
    assert "DirectInversion(pipe, image, prompts[0], steps=25, unit_noise=True)" in own
    assert set(as_texts(made, "cpu", "float32")) == {"TOML", "Python", "Command line"}


# -- a person --------------------------------------------------------------------------------------


def test_boxes_of_the_canvas() -> None:
    person = Person()
    person.set_places(
        [
            {"x0": -0.2, "y0": 0, "x1": 0.5, "y1": 2, "text": "a cat"},
            {"x0": 0.5, "y0": 0.5, "x1": 0.5, "y1": 0.9, "text": "thin"},
            {"x0": "a"},
            None,
        ]
    )
    assert person.places == [Box(0, 0, 0.5, 1, "a cat")]
    person.set_places("no list")
    assert person.places == []


def test_numbers_of_the_page_are_checked() -> None:
    person = Person()
    assert person.wanted("a", "", 3.0, 10, 5, None) == Wanted("a", "", 3, 10, 5.0)
    for seed, steps, message in (
        (-1, 5, "seed"),
        (0, 0, "steps"),
        (0.5, 5, "seed"),
        (0, None, "s"),
    ):
        with pytest.raises(InputError, match=message):
            person.wanted("a", "", seed, steps, 5, None)


def test_cards_move_within_the_stack() -> None:
    first, second = Card("PAG"), Card("SAG")
    person = Person([first, second])
    person.move(first, 1)
    assert person.cards == [second, first]
    person.move(first, 1)
    assert person.cards == [second, first]
    person.remove(second)
    assert person.cards == [first]


def test_errors_stand_on_the_cards_that_they_are_about() -> None:
    person = Person(
        [Card("PAG"), Card("MasaCtrl"), Card("PromptToPrompt"), Card("MasaCtrl", on=False)]
    )
    person.note(InputError("card 1 (PAG) scale = 'x'; give a number"))
    assert person.notes == {0: "Scale = 'x'; give a number"}
    person.note(ConflictError("PromptToPrompt and MasaCtrl both claim the substitution of 6 sites"))
    assert list(person.notes) == [1, 2]
    person.note(InputError("The prompt is empty"))
    assert person.notes == {}
