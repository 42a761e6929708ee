"""Programs and LoRAs as cards: what they need, and that their copies draw the same, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

import hookctl
from hookctl.app import drawing
from hookctl.app.copying import as_command, as_python, as_toml
from hookctl.app.forms import form_of
from hookctl.app.person import Desk, desk_of
from hookctl.app.places import Box
from hookctl.app.stack import Card, Wanted, preset_of
from hookctl.app.tables import arguments_of
from hookctl.cli import loading, main
from hookctl.cli.known import programs_by_name
from hookctl.errors import InputError, UnsupportedError
from hookctl.preset import FILLED, HookSpec
from hookctl.preset.check import check_arguments
from tests.hookctl.app.test_drawing import draw, same
from tests.hookctl.app.test_forms import TWO
from tests.hookctl.learned.test_lora import factors_of, of_attention, peft
from tests.recipes.images import PROMPT, TARGET, image, pipeline

PLACES = (Box(0, 0, 0.5, 1, "a cat"), Box(0.5, 0, 1, 1, "a dog"))
MODELS = ("sd15", "sd3")


@pytest.fixture(scope="module")
def desks() -> dict[str, Desk]:
    """A desk of each model."""
    return {name: desk_of(pipeline(name), "shapes") for name in MODELS}


def wanted(desk: Desk, *cards: Card, **given: Any) -> Wanted:
    own = image(size=drawing.size_of(desk.pipe))
    usual: dict[str, Any] = {
        "prompt": PROMPT,
        "steps": 3,
        "guidance": 2.0,
        "image": own,
        "places": PLACES,
    }
    return Wanted(**usual | given, cards=cards)


@pytest.mark.parametrize("name", programs_by_name())
def test_every_program_has_a_form_that_gives_its_defaults(name: str) -> None:
    """Without what the run fills, and what is the pipeline's or the server's."""
    cls = programs_by_name()[name]
    form = form_of(cls, use="program")
    fields = {field.name for field in form.fields}
    hidden = {*FILLED["program"], "arguments", "checkpoint", "embeddings", "memory", "on_cpu"}
    assert form.use == "program" and form.summary and not fields & hidden
    table = arguments_of(form, {}, TWO, "it")
    assert {*check_arguments(table, cls, "it", "program")} <= {"mask"}


def test_programs_of_flow_matching_are_for_its_models(desks: dict[str, Desk]) -> None:
    here, there = (desks[name].kinds.programs for name in MODELS)
    assert {*here} == {"CyclicOneWay", "Imagic", "SelectiveOneWay"} < {*there}
    assert {"FlowEdit", "RFInversion", "KVEdit"} < {*there}


def test_a_program_gets_the_settings_that_it_takes(desks: dict[str, Desk]) -> None:
    desk = desks["sd3"]
    asked = wanted(desk, Card("RFSolver"), Card("PAG"), edit=TARGET, seed=4)
    made = preset_of(asked, desk.kinds, "shapes")
    assert made.program is not None and made.program.where == "card 1 (RFSolver)"
    assert made.inversion is None and [spec.recipe for spec in made.specs] == ["PAG"]
    assert made.run == {"prompt": PROMPT, "edit": TARGET, "steps": 3, "guidance": 2.0}
    other = preset_of(wanted(desk, Card("FlowEdit"), edit=TARGET, seed=4), desk.kinds, "shapes")
    assert other.run["seed"] == 4 and other.specs == ()
    # All that is drawn where an area is needed; where not, the places whose numbers are given.
    masks = []
    for values in ({}, {"mask": "2"}, {"mask": "1, 2"}, {"mask": '"full"'}):
        one = preset_of(wanted(desk, Card("KVEdit", values), edit=TARGET), desk.kinds, "shapes")
        assert one.program is not None
        masks.append(one.program.arguments["mask"])
    assert masks[1:4:2] == ["box:0.5,0,1,1", "full"]
    assert masks[0] == masks[2] and masks[0].startswith("mask:data:image/png;base64,")
    none = preset_of(wanted(desk, Card("FlowEdit"), edit=TARGET), desk.kinds, "shapes")
    assert none.program is not None and "mask" not in none.program.arguments


@pytest.mark.parametrize(
    ("cards", "given", "says"),
    [
        (["FlowEdit"], {}, "card 1 (FlowEdit): compares two prompts"),
        (["FlowEdit"], {"edit": TARGET, "image": None}, "card 1 (FlowEdit): takes a picture"),
        (["Imagic"], {"edit": TARGET}, "card 1 (Imagic): takes one prompt, of the picture that it"),
        (["RFSolver", "KVEdit"], {"edit": TARGET}, "card 2 (KVEdit): card 1 (RFSolver) draws al"),
        (["KVEdit"], {"edit": TARGET, "places": ()}, "card 1 (KVEdit) mask: there is no box yet"),
    ],
)
def test_what_is_missing_is_said(
    desks: dict[str, Desk], cards: list[str], given: dict[str, Any], says: str
) -> None:
    desk = desks["sd3"]
    with pytest.raises(InputError) as caught:
        preset_of(wanted(desk, *map(Card, cards), **given), desk.kinds, "shapes")
    assert says in str(caught.value)


def test_a_place_that_is_not_there(desks: dict[str, Desk]) -> None:
    asked = wanted(desks["sd3"], Card("FlowEdit", {"mask": "3"}), edit=TARGET)
    with pytest.raises(InputError, match="mask: there is no place 3; give numbers from 1 to 2"):
        preset_of(asked, desks["sd3"].kinds, "shapes")


def test_editors_that_can_not_act_inside_are_refused(desks: dict[str, Desk]) -> None:
    desk, said = desks["sd3"], list[Any]()
    asked = wanted(desk, Card("FlowEdit"), Card("APG"), edit=TARGET)
    with pytest.raises(UnsupportedError, match="steps of a scheduler, which APG works on"):
        draw(desk.pipe, desk.kinds, asked, tell=lambda *step: said.append(step))
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("sd3", "RFInversion"), ("sd15", "Imagic")])
def test_a_program_is_told_of_and_stopped(desks: dict[str, Desk], model: str, name: str) -> None:
    desk, stop, said = desks[model], Event(), list[Any]()
    values: dict[str, Any] = {"stop": 0.7} if name == "RFInversion" else SHORT
    edit = TARGET if name == "RFInversion" else ""
    asked = wanted(desk, Card(name, values), edit=edit)

    def tell(title: str, done: int, total: int) -> None:
        said.append((title, done))
        if done == 2:
            stop.set()

    with pytest.raises(drawing.Stopped):
        draw(desk.pipe, desk.kinds, asked, tell=tell, stop=stop)
    first = {"sd3": drawing.BACK, "sd15": "the text is fitted to your picture"}[model]
    assert list(dict.fromkeys(said)) == [(first, 1), (first, 2)]
    made = draw(desk.pipe, desk.kinds, asked)  # the pipeline is as it was
    assert asked.image is not None and same(made.source, asked.image)
    assert not same(made.source, made.edited)
    assert made.maps["cat"].shape[0] == 3 and made.looks is not None


# -- copies ----------------------------------------------------------------------------------------

ONE_WAY = {"cycles": 1, "image_size": "[64, 64]", "at": "[0, 8]", "region": "1"}
SHORT = {"text_steps": 2, "model_steps": 2, "alphas": "[0.5, 1.0]"}
STACKS: dict[str, tuple[str, list[Card], dict[str, Any]]] = {
    "Imagic": ("sd15", [Card("Imagic", SHORT)], {}),
    "one way": ("sd15", [Card("CyclicOneWay", ONE_WAY)], {}),
    "FlowEdit": ("sd3", [Card("FlowEdit", {"mask": "1"}), Card("FreeU", on=False)], {"seed": 3}),
    "KVEdit": ("sd3", [Card("KVEdit", {"skip": 1.0})], {}),
    "inside": ("sd3", [Card("RFSolver"), Card("RegionalPrompts", {"base": 0.3})], {"seed": 3}),
    "both texts": ("sd3", [Card("UniEditFlow")], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_copies_draw_the_same(
    name: str, desks: dict[str, Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cards, given = STACKS[name]
    edit = "" if model == "sd15" else TARGET
    check_copies(desks[model], wanted(desks[model], *cards, edit=edit, **given), tmp_path,
                 monkeypatch, model)  # fmt: skip


@pytest.mark.slow
def test_a_lora_is_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a place by its number, or at words; the source is drawn without it."""
    pipe, file = pipeline(), tmp_path / "style.safetensors"
    save_file(peft("unet", factors_of(pipe.unet, of_attention)), file)
    desk = desk_of(pipe, "folder", [HookSpec(str(file), 0.7)])
    form = desk.kinds.forms["style.safetensors"]
    early = [field.name for field in form.fields if field.early]
    assert early == ["region", "words", "strength", "start", "stop"]
    assert form.summary == "Learned weights of the kind LoRA."
    found = []
    for values in ({"region": "2"}, {"words": ["cat"]}):
        asked = wanted(desk, Card("style.safetensors", values), image=None)
        found.append(check_copies(desk, asked, tmp_path, monkeypatch, "sd15"))
    first, second = found
    assert same(first.source, second.source) and not same(first.edited, second.edited)
    assert not same(first.source, first.edited) and first.notes == {} == second.notes


def check_copies(
    desk: Desk, asked: Wanted, folder: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> drawing.Made:
    """The file, the program, and the command, which a shell takes apart."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline(model))
    monkeypatch.setattr(hookctl, "load_shapes", lambda **_: pipeline(model))
    made = drawing.draw(desk.pipe, asked, desk.kinds, "shapes", tell=lambda *_: None, stop=Event())
    if asked.image is not None:
        asked.image.save("picture.png")
    given = ["--image", "picture.png"] if asked.image is not None else []
    Path("stack.toml").write_text(as_toml(made.preset), "utf-8")
    assert main(["run", "stack.toml", *given, "--out", "file"]) == 0
    assert same(Image.open(sorted(Path("file").glob("edited-*.png"))[-1]), made.edited)

    exec(compile(as_python(made.preset), "copied.py", "exec"), {})
    assert same(Image.open("edited.png"), made.edited)

    shell = as_command(made.preset).replace("hookctl run", 'printf "%s\\n" run')
    words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert main(words.split()) == 0
    assert same(Image.open(sorted(Path("out/page").glob("edited-*.png"))[-1]), made.edited)
    return made
