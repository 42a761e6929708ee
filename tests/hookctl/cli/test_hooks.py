"""`hookctl run --hook` and `[[hook]]`: what is typed, what is refused, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from hookctl.cli import loading, main
from hookctl.cli.hooks import _image_option, _read
from hookctl.editor import Editor
from hookctl.learned.files import Checkpoint
from hookctl.learned.loading import BUILDERS
from hookctl.loop.state import Predictions
from hookctl.preset import HookSpec
from tests.recipes.images import pipeline

STACK = """
model = "shapes"
[run]
prompt = "a red cat"
steps = 1
"""
EDITOR = '[[editor]]\nrecipe = "FreeU"\n'


class Pushed(Editor):
    """Adds a number of its file to every prediction, times its strength."""

    def __init__(self, push: float, strength: float, given: dict[str, Any]) -> None:
        self.push, self.strength, self.given = push, strength, given

    def combine(self, predictions: Predictions) -> torch.Tensor:
        if not self.strength:
            return predictions.guided
        return predictions.guided + self.push * self.strength


def build(
    checkpoint: Checkpoint,
    pipe: Any,
    *,
    strength: float = 1.0,
    boxes: list[list[float]] | None = None,
) -> Editor:
    push = float(checkpoint.tensors["image_proj.proj.bias"][0])
    return Pushed(push, strength, {"boxes": boxes})


def with_image(checkpoint: Checkpoint, pipe: Any, *, image: Any, prompts: list[str]) -> Editor:
    return Pushed(0.0, 1.0, {"image": image, "prompts": prompts})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stack, and weights for the model and for no model."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline())
    monkeypatch.setitem(BUILDERS, "ip-adapter", f"{__name__}:build")
    (tmp_path / "stack.toml").write_text(STACK + EDITOR, "utf-8")
    text = pipeline().unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.zeros(4 * text, 16),
        "image_proj.proj.bias": torch.ones(4 * text),
        "image_proj.norm.weight": torch.ones(text),
        "image_proj.norm.bias": torch.zeros(text),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(8, text),
        "ip_adapter.1.to_v_ip.weight": torch.zeros(8, text),
    }
    torch.save(weights, tmp_path / "fits.bin")
    wide = {key: t.repeat_interleave(2, 0) if "image" in key else t for key, t in weights.items()}
    torch.save(wide, tmp_path / "halves.bin")
    torch.save({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.bin")
    torch.save({"weight": torch.ones(2)}, tmp_path / "none.bin")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return tmp_path


def run(files: Path, out: str, *options: str) -> int:
    return main(["run", *options, "--out", str(files / out)])


def drawn(files: Path, out: str) -> list[Image.Image]:
    """The plain and the edited image."""
    return [Image.open(files / out / f"{name}-0.png") for name in ("plain", "edited")]


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_what_is_typed() -> None:
    assert _read("a.bin") == HookSpec("a.bin")
    assert _read("a.bin:0.5") == HookSpec("a.bin", 0.5)
    assert _read("owner/name/a.bin:0") == HookSpec("owner/name/a.bin", 0.0)
    assert _read("c:/a.bin") == HookSpec("c:/a.bin")
    assert _read("a.bin:nan") == HookSpec("a.bin:nan")


def test_what_the_image_of_a_run_is_for() -> None:
    gligen = ("boxes", "images", "maps", "inpaint")
    assert _image_option("gligen spatial", gligen) == "maps"
    assert _image_option("gligen box+text", gligen) == "inpaint"
    assert _image_option("gligen box+text+image", gligen) is None
    assert _image_option("ip-adapter plus", ("images", "scale")) == "images"
    assert _image_option("collaborative", ("mask", "text")) == "mask"
    assert _image_option("instance-diffusion", ("instances",)) is None


@pytest.mark.slow
def test_a_hook_acts_by_its_strength(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack, path = str(files / "stack.toml"), str(files / "fits.bin")
    assert run(files, "a", stack) == 0
    for out, strength in (("b", ":0"), ("c", ":0.5"), ("d", "")):
        assert run(files, out, stack, "--hook", path + strength) == 0
    (plain, without), off, half, full = (drawn(files, out) for out in "abcd")
    assert same(without, off[1]) and same(plain, full[0])
    assert not same(without, half[1]) and not same(half[1], full[1])
    said = json.loads((files / "c/run.json").read_text("utf-8"))["hooks"]
    assert said == [
        {
            "kind": "ip-adapter",
            "base": said[0]["base"],
            "path": path,
            "strength": 0.5,
            "notes": [],
        }
    ]
    assert f"{path}: ip-adapter for other (text of width" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_says_the_same(files: Path) -> None:
    assert run(files, "a", str(files / "stack.toml"), "--hook", f"{files / 'fits.bin'}:0.5") == 0
    hook = '[[hook]]\npath = "fits.bin"\nstrength = 0.5\nboxes = [[0, 1]]\n'
    (files / "both.toml").write_text(STACK + hook + EDITOR, "utf-8")
    assert run(files, "b", str(files / "both.toml")) == 0
    assert all(same(*pair) for pair in zip(drawn(files, "a"), drawn(files, "b"), strict=True))
    (files / "alone.toml").write_text(STACK + hook, "utf-8")
    assert run(files, "c", str(files / "alone.toml")) == 0
    options = ("--model", "shapes", "--prompt", "a red cat", "--steps", "1")
    assert run(files, "d", "--hook", f"{files / 'fits.bin'}:0.5", *options) == 0
    assert all(same(*pair) for pair in zip(drawn(files, "c"), drawn(files, "d"), strict=True))
    assert json.loads((files / "d/run.json").read_text("utf-8"))["stack"] is None


@pytest.mark.slow
def test_the_image_and_the_prompts_of_a_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(BUILDERS, "ip-adapter", f"{__name__}:with_image")
    monkeypatch.setattr(Pushed, "before", lambda self, state: made.append(self.given))
    given = (str(files / "stack.toml"), "--hook", str(files / "fits.bin"))
    assert run(files, "a", *given, "--image", str(files / "red.png")) == 0
    assert made[0]["prompts"] == ["a red cat"] and made[0]["image"].size == (32, 32)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["gone.bin"], "gone.bin: there is no such file; give weights"),
        (["none.bin"], "none.bin: none of the known kinds of weights: 1 tensors"),
        (["lora.bin"], "lora.bin: is no safetensors file; other files may hold code"),
        (["halves.bin"], "looks like an IP-Adapter but its image tokens are"),
        (["stack.toml"], "stack.toml: is no file of weights"),
        (["fits.bin", "--image", "red.png"], "red.png: "),
    ],
)
def test_what_is_wrong_is_said(
    files: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    named = [str(files / one) if one[0] != "-" else one for one in given]
    assert run(files, "a", str(files / "stack.toml"), "--hook", *named) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("bxes = 1", "'bxes' is no option of ip-adapter (did you mean 'boxes'?)"),
        ("boxes = 1", "[[hook]] 1 boxes = 1; give a list of"),
        ('weights = "ema"', "weights='ema', and the file holds one set"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(
    files: Path, capsys: pytest.CaptureFixture[str], table: str, says: str
) -> None:
    path = files / "own.toml"
    path.write_text(f'{STACK}[[hook]]\npath = "fits.bin"\n{table}\n', "utf-8")
    assert run(files, "a", str(path)) == 2
    said = capsys.readouterr().err
    assert says in said and f"{path}: [[hook]] 1" in said and said.count("\n") == 1


def test_repositories_are_not_downloaded(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(files))
    assert run(files, "a", str(files / "stack.toml"), "--hook", "someone/else/a.bin:0.5") == 2
    assert "Nothing is downloaded by itself: hf download someone/else a.bin" in (
        capsys.readouterr().err
    )
