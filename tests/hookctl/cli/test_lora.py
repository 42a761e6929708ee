"""`hookctl run --lora`: what is typed, what is refused, and what a LoRA does to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from hookctl.cli import loading, main
from hookctl.cli.lora import check_loras
from hookctl.errors import InputError
from hookctl.preset import LoraSpec
from tests.recipes.images import pipeline

STACK = """
model = "shapes"
[run]
prompt = "a red cat"
steps = 1
[[editor]]
recipe = "FreeU"
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stack, and LoRAs of random numbers for the model and for no model."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline())
    (tmp_path / "stack.toml").write_text(STACK, "utf-8")
    torch.manual_seed(0)
    layers = {
        path: module
        for path, module in pipeline().unet.named_modules()
        if path.endswith(("attn2.to_k", "attn2.to_v"))
    }
    fits = {
        f"unet.{path}.lora_{side}.weight": torch.randn(shape)
        for path, module in layers.items()
        for side, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2)))
    }
    save_file(fits, tmp_path / "fits.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "none.safetensors")
    name = next(iter(fits))
    save_file(fits | {name: torch.randn(2, 5)}, tmp_path / "wide.safetensors")
    return tmp_path


def drawn(files: Path, out: str, *options: str) -> list[Image.Image]:
    """The plain and the edited image."""
    stack, to = str(files / "stack.toml"), str(files / out)
    assert main(["run", stack, "--out", to, *options]) == 0
    return [Image.open(files / out / f"{name}-0.png") for name in ("plain", "edited")]


@pytest.mark.slow
def test_a_lora_is_on_throughout(files: Path) -> None:
    path = str(files / "fits.safetensors")
    without, off, on = (
        drawn(files, out, *(["--lora", f"{path}:{weight}"] if weight else []))
        for out, weight in (("a", ""), ("b", "0"), ("c", "0.5"))
    )
    for plain, same, other in zip(without, off, on, strict=True):
        assert ImageChops.difference(plain, same).getbbox() is None
        assert ImageChops.difference(plain, other).getbbox() is not None
    run = json.loads((files / "c/run.json").read_text("utf-8"))
    assert run["loras"] == [{"path": path, "weight": 0.5}]


@pytest.mark.slow
def test_a_file_says_the_same(files: Path) -> None:
    typed = drawn(files, "a", "--lora", str(files / "fits.safetensors"))
    (files / "stack.toml").write_text(STACK + '[[lora]]\npath = "fits.safetensors"\n', "utf-8")
    said = drawn(files, "b")
    assert all(
        ImageChops.difference(*pair).getbbox() is None for pair in zip(typed, said, strict=True)
    )


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("gone.safetensors", "gone.safetensors: there is no such file"),
        ("stack.toml", "stack.toml: is no safetensors file; other files may hold code"),
        ("none.safetensors", "none.safetensors: does not fit StableDiffusionPipeline: Invalid"),
        ("wide.safetensors", "wide.safetensors: does not fit StableDiffusionPipeline"),
    ],
)
def test_what_is_wrong_is_said(
    files: Path, capsys: pytest.CaptureFixture[str], file: str, says: str
) -> None:
    given = ["run", str(files / "stack.toml"), "--lora", str(files / file)]
    assert main([*given, "--out", str(files / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_without_peft(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr("hookctl.cli.lora.find_spec", lambda name: None)
    check_loras([])
    with pytest.raises(InputError, match="needs the package peft; pip install peft"):
        check_loras([LoraSpec(files / "fits.safetensors")])
