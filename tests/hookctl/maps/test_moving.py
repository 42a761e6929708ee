"""Maps as GIFs, over steps and over frames, in Python and on the command line."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from hookctl import Maps, control
from hookctl.cli import loading, main
from hookctl.errors import InputError
from tests import zoo
from tests.zoo.edits import EDITS, PICTURES

CAT = "a red cat"


def pictures(path: Path) -> list[Image.Image]:
    with Image.open(path) as gif:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]


def test_over_steps(tmp_path: Path) -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with control(pipe, Maps("cat")) as session:
        case.run(pipe, [CAT], steps=3)
    maps = session.maps["cat"]
    path = maps.gif(tmp_path / "cat.gif", Image.new("RGB", (64, 64), "white"), milliseconds=120)
    found = pictures(path)
    assert len(found) == 3 and found[0].size == (256, 256)
    with Image.open(path) as gif:
        assert gif.info["duration"] == 120 and gif.info["loop"] == 0
    assert len({np.asarray(one).tobytes() for one in found}) == 3
    with pytest.raises(InputError, match="20 to 60000"):
        maps.gif(tmp_path / "cat.gif", milliseconds=1)
    with pytest.raises(InputError, match="over='time'"):
        maps.gif(tmp_path / "cat.gif", over="time")
    with pytest.raises(InputError, match="3 maps, 3 labels, 2 images"):
        maps.gif(tmp_path / "cat.gif", [Image.new("RGB", (64, 64))] * 2)


def test_a_running_mean_has_no_steps(tmp_path: Path) -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with control(pipe, Maps("cat", mean=True)) as session:
        case.run(pipe, [CAT])
    with pytest.raises(InputError, match="running mean"):
        session.maps["cat"].gif(tmp_path / "cat.gif")
    assert not list(tmp_path.iterdir())


def test_over_the_frames_of_a_video(tmp_path: Path) -> None:
    case = zoo.PIPELINES["wan"]
    pipe = case.make()
    with control(pipe, Maps("cat", patches=[(0.5, 0.5)])) as session:
        case.run(pipe, [CAT])
    for maps in session.maps.every():
        assert maps.frames == case.frames
        assert len(pictures(maps.gif(tmp_path / "cat.gif", over="frames"))) == case.frames


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a tiny pipeline in the place of what would be loaded."""

    def put(pipe: Any, **fixed: Any) -> None:
        call = type(pipe).__call__

        class Fixed(type(pipe)):  # type: ignore[misc]
            @wraps(call)
            def __call__(self, **given: Any) -> Any:
                return call(self, **{**given, **fixed})

        Fixed.__name__ = type(pipe).__name__
        pipe.__class__ = Fixed
        monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipe)

    return put


def test_the_command_writes_gifs(tmp_path: Path, draws: Any) -> None:
    draws(zoo.PIPELINES["sd15"].make(), height=64, width=64)
    command = ["maps", "shapes", "--prompt", CAT, "--words", "cat", "--steps", "2"]
    assert main([*command, "--gif", "--out", str(tmp_path)]) == 0
    assert len(pictures(tmp_path / "moves-cat.gif")) == 2


def test_the_command_on_an_edit_model(tmp_path: Path, draws: Any) -> None:
    fixed = {
        "height": 64, "width": 64, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3),
    }  # fmt: skip
    draws(EDITS["klein"].make(), **fixed)
    PICTURES[0].save(tmp_path / "cat.png")
    command = ["maps", "shapes", "--prompt", CAT, "--steps", "2"]
    command += ["--reference", str(tmp_path / "cat.png")]
    out = tmp_path / "one"
    assert main([*command, "--words", "cat,references[0]", "--out", str(out)]) == 0
    found = json.loads((out / "maps.json").read_text("utf-8"))
    relations = {word: entry["relation"] for word, entry in found["words"].items()}
    assert relations == {"cat": "image to text", "references[0]": "target to reference"}
    out = tmp_path / "two"
    into = ["--to", "references[0]", "--patch", "0.5,0.5", "--words", "cat"]
    assert main([*command, *into, "--gif", "--out", str(out)]) == 0
    found = json.loads((out / "maps.json").read_text("utf-8"))
    assert {e["relation"] for e in found["words"].values()} == {
        "text to reference", "target to reference",
    }  # fmt: skip
    assert len(list(out.glob("moves-*.gif"))) == 2
    assert main([*command, "--to", "references[3]", "--out", str(tmp_path / "three")]) == 2


def test_references_are_refused_elsewhere(
    tmp_path: Path, draws: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    draws(zoo.PIPELINES["sd15"].make(), height=64, width=64)
    command = ["maps", "shapes", "--prompt", CAT, "--out", str(tmp_path / "out"), "--reference"]
    assert main([*command, str(tmp_path / "none.png")]) == 2
    assert "there is no such file" in capsys.readouterr().err
