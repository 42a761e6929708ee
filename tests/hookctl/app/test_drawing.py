"""One run of the page: what comes of it, and that its copies draw the same, bit for bit."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import hookctl
from hookctl.app import drawing
from hookctl.app.copying import as_command, as_python, as_toml
from hookctl.app.hooks import options_by_name, shipped
from hookctl.app.person import Desk, Person, desk_of, examples, looked_over
from hookctl.app.pictures import (
    attended,
    bars,
    data_url,
    fitted,
    hues,
    looks_picture,
    map_picture,
    map_size,
    outlined,
)  # fmt: skip
from hookctl.app.places import GRID, Box, Painted
from hookctl.app.reading import PLACES
from hookctl.app.stack import Card, Kinds, Wanted, preset_of
from hookctl.app.worker import Done, Shown, Step, drawn
from hookctl.cli import loading, main
from hookctl.cli.known import editors_by_name, inversions_by_name
from hookctl.cli.stacks import PRESETS
from hookctl.errors import ConflictError, WordError
from hookctl.preset import HookSpec, load_preset
from tests.recipes.images import PROMPT, TARGET, image, pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture(scope="module")
def kinds() -> Kinds:
    return Kinds(editors_by_name(), inversions_by_name())


EDIT = (Card("PromptToPrompt", {"blend": ["cat"]}), Card("PAG", {"sites": "self"}))


def wanted(*cards: Card, **given: Any) -> Wanted:
    return Wanted(**{"prompt": PROMPT, "edit": TARGET, "steps": 2, "guidance": 3.0} | given,
                  cards=cards)  # fmt: skip


def draw(pipe: Any, kinds: Kinds, asked: Wanted, **given: Any) -> drawing.Made:
    options = {"tell": lambda *_: None, "stop": Event()} | given
    return drawing.draw(pipe, asked, kinds, "shapes", **options)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_a_run_tells_its_steps_and_shows_the_source_first(pipe: Any, kinds: Kinds) -> None:
    said: list[Any] = []
    made = draw(
        pipe,
        kinds,
        wanted(*EDIT),
        tell=lambda *step: said.append(step),
        shown=lambda image: said.append(image),
    )
    titles = [one[0] if isinstance(one, tuple) else one for one in said]
    at = titles.index(made.source)
    assert {*titles[:at]} == {"source"} and {*titles[at + 1 :]} == {"edited picture"}
    assert said[at - 1] == ("source", 2, 2) and said[-1] == ("edited picture", 2, 2)
    assert not same(made.source, made.edited)
    assert list(made.maps) == ["a", "blue", "cat", "above", "dog"]  # in the order of the prompt
    assert made.maps["blue"].shape[0] == 2 and made.notes == {}
    assert {row[0] for row in made.rows} == {"PromptToPrompt", "PAG"}
    assert drawing.telling(made) == "blue"
    # Of every place, the shares of its attention to all others; the tiny model's grids differ.
    assert made.looks is not None and made.looks.shape[0] == PLACES * PLACES
    assert made.looks.min() >= 0 and bool((made.looks.sum((1, 2)) > 0).all())


def test_what_did_not_change_is_not_drawn_again(pipe: Any, kinds: Kinds) -> None:
    kept, said = drawing.Kept(), []
    first = draw(pipe, kinds, wanted(*EDIT), kept=kept)
    again = draw(
        pipe, kinds, wanted(Card("FreeU")), kept=kept, tell=lambda title, *_: said.append(title)
    )
    assert again.source is first.source and "source" not in said
    other = draw(pipe, kinds, wanted(Card("FreeU"), seed=1), kept=kept)
    assert not same(other.source, first.source)


def test_cards_that_change_nothing_say_so(pipe: Any, kinds: Kinds) -> None:
    made = draw(pipe, kinds, wanted(Card("PAG", {"scale": 0.0}), Card("FreeU"), edit=""))
    assert list(made.notes) == [0]
    assert made.notes[0].startswith("Changed nothing: it was active at steps 0-1")


def test_a_run_is_stopped_at_its_next_step(pipe: Any, kinds: Kinds) -> None:
    stop, said = Event(), []

    def tell(title: str, done: int, total: int) -> None:
        said.append(done)
        if done == 1:
            stop.set()

    with pytest.raises(drawing.Stopped):
        draw(pipe, kinds, wanted(*EDIT, steps=5), tell=tell, stop=stop)
    assert max(said) == 1
    assert draw(pipe, kinds, wanted(*EDIT)).edited  # the pipeline is as it was


def test_what_can_not_be_is_refused_before_anything_is_drawn(pipe: Any, kinds: Kinds) -> None:
    said: list[Any] = []
    both = wanted(Card("PromptToPrompt"), Card("MasaCtrl", {"sites": "self"}))
    with pytest.raises(ConflictError):
        draw(pipe, kinds, both, tell=lambda *step: said.append(step))
    with pytest.raises(WordError, match="bird"):
        draw(pipe, kinds, wanted(Card("AttendAndExcite", {"words": ["bird"]}), edit=""))
    assert said == []


def test_conflicts_are_seen_before_a_run(pipe: Any, kinds: Kinds) -> None:
    desk = Desk(pipe, "shapes", kinds)
    person = Person([Card("PromptToPrompt"), Card("FreeU"), Card("MasaCtrl", {"sites": "self"})])
    looked_over(desk, person, person.wanted(PROMPT, TARGET, 0, 2, 3.0, None))
    assert list(person.notes) == [0, 2] and "both claim" in person.notes[0]
    with desk.lock:  # somebody draws: nothing is known, nothing said
        looked_over(desk, person, person.wanted(PROMPT, TARGET, 0, 2, 3.0, None))
    assert person.notes == {} and not desk.lock.locked()


def test_a_press_of_the_button(pipe: Any, kinds: Kinds) -> None:
    desk, person = Desk(pipe, "shapes", kinds), Person([*EDIT])
    run = drawn(desk, person, [PROMPT, TARGET, 0, 2, 3.0, None], "page")
    first = next(run)
    assert isinstance(first, Step) and list(desk.stops) == ["page"]
    said = list(run)
    assert any(isinstance(one, Shown) for one in said)
    assert isinstance(said[-1], Done) and said[-1].value is person.made
    assert not desk.stops and not desk.lock.locked()


# -- copies ----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run copies in; the embedded model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline())
    monkeypatch.setattr(hookctl, "load_shapes", lambda **_: pipeline())
    return tmp_path


HALF = (0, *[GRID // 2] * (2 * GRID))  # the left one
STACKS = {
    "edit": wanted(*EDIT),
    "places": wanted(
        Card("RegionalPrompts", {"base": 0.3}),
        Card("MaskedSelfAttention"),
        edit="",
        places=(Box(0, 0, 0.5, 1, "a cat"), Box(0.5, 0, 1, 1, "a dog")),
    ),
    "painted": wanted(
        Card("RegionalPrompts", {"base": 0.3}),
        edit="",
        places=(Painted(HALF, "a cat"), Box(0.5, 0, 1, 1, "a dog")),
    ),
    "nothing": wanted(seed=3),
    "own": wanted(*EDIT, image=image(size=(64, 64))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_copies_draw_the_same(name: str, here: Path, pipe: Any, kinds: Kinds) -> None:
    """The file, the program, and the command, which a shell takes apart."""
    asked = STACKS[name]
    if asked.image is not None:
        size = drawing.size_of(pipe)
        asked = wanted(*asked.cards, image=image(size=size))
        assert asked.image is not None
        asked.image.save("picture.png")
    made = draw(pipe, kinds, asked)
    last = len(asked.prompts) - 1

    given = ["--image", "picture.png"] if asked.image is not None else []
    Path("stack.toml").write_text(as_toml(made.preset), "utf-8")
    assert main(["run", "stack.toml", *given, "--out", "file"]) == 0
    assert same(Image.open(f"file/edited-{last}.png"), made.edited)

    exec(compile(as_python(made.preset), "copied.py", "exec"), {})
    assert same(Image.open("edited.png"), made.edited)

    shell = as_command(made.preset).replace("hookctl run", 'printf "%s\\n" run')
    words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert main(words.split()) == 0
    assert same(Image.open(f"out/page/edited-{last}.png"), made.edited)
    if asked.image is None:
        assert same(Image.open("file/plain-0.png"), made.source)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Grounding", "Identity"])
def test_copies_of_trained_modules_draw_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the model that they were trained for."""
    shapes = _shapes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: shapes)
    monkeypatch.setattr(hookctl, "load_shapes", lambda **_: shapes)
    kinds = desk_of(shapes, "shapes").kinds
    [asked] = [one for one in examples(PRESETS, kinds).values() if one.cards[0].kind == name]
    made = draw(shapes, kinds, replace(asked, steps=2))
    assert not same(made.source, made.edited) and made.notes == {}
    Path("stack.toml").write_text(as_toml(made.preset), "utf-8")
    assert main(["run", "stack.toml", "--out", "file"]) == 0
    assert same(Image.open("file/edited-0.png"), made.edited)
    exec(compile(as_python(made.preset), "copied.py", "exec"), {})
    assert same(Image.open("edited.png"), made.edited)


@cache
def _shapes() -> Any:
    return hookctl.load_shapes()


def test_an_own_picture_is_inverted_once(pipe: Any, kinds: Kinds) -> None:
    own, kept, said = image(size=drawing.size_of(pipe)), drawing.Kept(), []
    first = draw(pipe, kinds, wanted(*EDIT, image=own), kept=kept)
    assert same(first.source, own)
    again = draw(
        pipe,
        kinds,
        wanted(Card("FreeU"), image=own.copy()),
        kept=kept,
        tell=lambda title, *_: said.append(title),
    )
    assert {*said} == {"edited picture"} and not same(again.edited, first.edited)


# -- learned weights -------------------------------------------------------------------------------


def test_learned_weights_are_cards(tmp_path: Path, pipe: Any) -> None:
    """A form of the kind's options, without those that the run fills."""
    text = pipe.unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.zeros(4 * text, 16),
        "image_proj.proj.bias": torch.ones(4 * text),
        "image_proj.norm.weight": torch.ones(text),
        "image_proj.norm.bias": torch.zeros(text),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(8, text),
        "ip_adapter.1.to_v_ip.weight": torch.zeros(8, text),
    }
    torch.save(weights, tmp_path / "ip.bin")
    spec = HookSpec(str(tmp_path / "ip.bin"), 0.5)
    named, options = options_by_name(pipe, [spec])
    kinds = Kinds(editors_by_name(), inversions_by_name(), named, options)
    assert list(named) == ["ip.bin"] and "ip.bin" in kinds.forms
    fields = {field.name for field in kinds.forms["ip.bin"].fields}
    assert "scale" in fields and not fields & {"image", "prompts", "weights"}
    assert kinds.forms["ip.bin"].summary == "Learned weights of the kind ip-adapter."


def test_weights_that_come_along(tmp_path: Path, pipe: Any) -> None:
    """Their presets are examples: on the page and back, they are the same stacks."""
    named, options = options_by_name(pipe, [], shipped())
    kinds = Kinds(editors_by_name(), inversions_by_name(), named, options)
    assert list(named) == ["Grounding", "Identity"]
    fields = {field.name for name in named for field in kinds.forms[name].fields}
    assert {"instances", "people", "scale"} < fields and not fields & {"identity_net", "images"}
    found = {asked.cards[0].kind: asked for asked in examples(PRESETS, kinds).values()}
    for name, hook in named.items():
        made = preset_of(found[name], kinds, "shapes")
        (tmp_path / "stack.toml").write_text(as_toml(made), "utf-8")
        [again] = load_preset(tmp_path / "stack.toml", kinds.recipes, kinds.inversions).hooks
        [own] = load_preset(PRESETS / f"{name.lower()}.toml", {}).hooks
        assert again.path == hook.path and Path(own.path).samefile(hook.path)
        assert again.arguments.get("instances") == own.arguments.get("instances")
        for one, its in zip(
            again.arguments.get("people", ()), own.arguments.get("people", ()), strict=True
        ):
            assert Path(one["embedding"]).samefile(its["embedding"])
            for point, wanted_point in zip(one["keypoints"], its["keypoints"], strict=True):
                assert point == pytest.approx(wanted_point)


# -- pictures --------------------------------------------------------------------------------------


def test_maps_are_on_one_scale_and_boxes_in_their_colours() -> None:
    picture = Image.new("RGB", (128, 128), "gray")
    maps = {"cat": torch.zeros(2, 4, 4), "dog": torch.full((2, 4, 4), 0.5)}
    maps["cat"][0, 1, 2] = 1.0
    box = Box(0.25, 0.25, 0.75, 0.75)
    first = map_picture(picture, maps, "cat", 0, [box])
    assert first.size == map_size(picture) == (512, 512)
    assert first.getpixel((130, 256)) == (230, 159, 0)
    dog = map_picture(picture, maps, "dog", None)
    assert dog.getpixel((10, 10)) != first.getpixel((10, 10))
    assert attended(maps, 0.6, 0.3, 0) == [("cat", 1.0), ("dog", 0.5)]
    assert attended(maps, 1.0, 1.0, None) == [("dog", 0.5), ("cat", 0.0)]
    assert "<th>cat</th>" in bars([("cat", 1.0)], 0.6, 0.3) and "100.0%" in bars([("c", 1)], 0, 0)


def test_painted_places_are_outlined_too() -> None:
    picture = outlined(Image.new("RGB", (128, 128), "gray"), [Box(0, 0, 0.1, 0.1), Painted(HALF)])
    blue, black, gray = (86, 180, 233), (0, 0, 0), (128, 128, 128)
    assert [picture.getpixel((x, 64)) for x in (63, 60, 30, 90)] == [blue, black, gray, gray]


def test_what_a_place_looks_at() -> None:
    picture, looks = Image.new("RGB", (64, 64), "gray"), torch.zeros(PLACES * PLACES, 4, 4)
    looks[:, 3, 3] = 1.0  # all look at the last cell
    looks[PLACES * PLACES - 1, 0, 0] = 1.0  # and the last place at the first
    last, first = (looks_picture(picture, looks, at, at) for at in (1.0, 0.0))
    assert last.getpixel((60, 40)) == last.getpixel((460, 440)) == first.getpixel((460, 440))
    assert first.getpixel((60, 40)) != last.getpixel((60, 40))


def test_words_have_the_colours_of_their_places() -> None:
    places = Box(0, 0, 1, 1, "a red Circle"), Box(0, 0, 1, 1, "a red square")
    style = hues(["a", "circle", "square", "cat"], places)
    assert "nth-child(2)::after{background:linear-gradient(90deg,#E69F00 0% 100%)}" in style
    assert "nth-child(3)" in style and "nth-child(1)" not in style and "nth-child(4)" not in style


def test_pictures_for_the_canvas() -> None:
    assert data_url(None) == ""
    assert data_url(Image.new("RGB", (8, 8))).startswith("data:image/png;base64,")
    assert data_url(Image.new("RGB", (513, 8))).startswith("data:image/jpeg;base64,")
    wide = Image.new("RGBA", (300, 100), "red")
    assert fitted(wide, (64, 64)).size == (64, 64) and fitted(wide, (64, 64)).mode == "RGB"
    assert outlined(Image.new("RGB", (64, 64)), []).size == (64, 64)
