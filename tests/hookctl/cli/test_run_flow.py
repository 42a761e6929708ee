"""`hookctl run` with programs of flow-matching models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from hookctl.cli import main
from hookctl.cli.inverting import drawn_prompts, program_for
from hookctl.cli.known import programs_by_name
from hookctl.errors import InputError
from hookctl.preset import Drawing, load_preset
from tests import zoo
from tests.recipes.images import image

PROGRAMS = ("FireFlow", "FlowEdit", "KVEdit", "RFInversion", "RFSolver", "UniEditFlow")
EXTRA = {
    "KVEdit": "mask = [0.0, 0.0, 0.5, 1.0]\nskip = 1\n",
    "FlowEdit": "n_max = 2\n",
    "RFInversion": "stop = 0.7\n",
}
STACK = """
[run]
prompt = "a red cat"
edit = "a blue dog"
steps = 3
guidance = 2.0
[program]
recipe = "{}"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    zoo.PIPELINES["sd3"].make().save_pretrained(folder / "sd3")
    image().save(folder / "image.png")
    return folder


def stack(folder: Path, name: str, text: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(STACK.format(name) + EXTRA.get(name, "") + text, "utf-8")
    return path


def test_they_are_known() -> None:
    assert {*PROGRAMS} <= {*programs_by_name()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_image_is_edited(model: Path, tmp_path: Path, name: str) -> None:
    path, out = stack(tmp_path, name), tmp_path / "out"
    given = [path, "--image", model / "image.png", "--model", model / "sd3", "--out", out]
    assert main(["run", *map(str, given)]) == 0
    edited = sorted(one.name for one in out.glob("edited-*.png"))
    assert edited == ["edited-0.png", "edited-1.png"][: 2 if name == "FlowEdit" else 1]
    drawn, plain = (Image.open(out / f"{which}-0.png") for which in ("edited", "plain"))
    assert drawn.size == plain.size and ImageChops.difference(drawn, plain).getbbox()
    said = json.loads((out / "run.json").read_text("utf-8"))
    assert said["program"]["recipe"] == name and said["prompts"] == ["a red cat", "a blue dog"]


def test_what_the_run_gives_them(tmp_path: Path) -> None:
    pipe = zoo.PIPELINES["sd3"].make()
    prompts = ["a red cat", "a blue dog"]
    for name in PROGRAMS:
        preset = load_preset(stack(tmp_path, name), {}, None, programs_by_name())
        drawing = Drawing(steps=3, guidance=2.0)
        program = program_for(pipe, preset, image(), drawing, prompts)
        assert program.steps == 3
        shown = drawn_prompts(preset, prompts)
        if name == "FlowEdit":
            assert program.prompts == prompts == shown and program.scales == [2.0, 2.0]
            continue
        assert program.prompts == ["a blue dog"] == shown
        sources = [program.source_prompt] if name == "RFInversion" else program.sources
        assert sources == ["a red cat"]
        with pytest.raises(InputError, match=f"edit = 'c'; {name} takes one edit"):
            program_for(pipe, preset, image(), drawing, [*prompts, "c"])
        alone: Any = program_for(pipe, preset, image(), drawing, prompts[:1])
        assert alone.prompts == prompts[:1]
    odd = Drawing(steps=3, seed=4)
    preset = load_preset(stack(tmp_path, "RFSolver"), {}, None, programs_by_name())
    with pytest.raises(InputError, match="seed = 4; RFSolver takes none, so leave it out"):
        program_for(pipe, preset, image(), odd, prompts)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("RFSolver", "inject = -1\n", "[program] (RFSolver): inject=-1; give"),
        ("RFSolver", 'source_prompt = "a"\n', "source_prompt belongs to the run; write prompt ="),
        ("RFSolver", "injects = 1\n", "'injects' is not a key of RFSolver; did you mean 'inject'?"),
        ("FlowEdit", "n_min = 3\n", "n_min=3; give a whole number from 0 to 2"),
    ],
)
def test_what_is_wrong_is_said(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    says: str,
) -> None:
    given = [stack(tmp_path, name, text), "--image", model / "image.png", "--model", model / "sd3"]
    assert main(["run", *map(str, given), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_a_program_that_compares_needs_an_edit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [stack(tmp_path, "FlowEdit"), "--image", model / "image.png", "--model", model / "sd3"]
    assert main(["run", *map(str, given), "--prompt", "a cat", "--out", str(tmp_path / "o")]) == 2
    assert "edits a prompt into another; give --edit TEXT" in capsys.readouterr().err
