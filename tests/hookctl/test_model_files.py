"""A folder whose weights are not all those of its model is refused, whoever reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import hookctl
from hookctl.cli import main
from hookctl.cli.loading import check_classes, load_pipeline
from hookctl.demos.shapes.load import WEIGHTS
from hookctl.errors import InputError
from hookctl.model_files import read_whole
from tests import zoo

FIRST = "encoder.layers.0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd15"
    zoo.PIPELINES["sd15"].make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def rename(file: Path, old: str, new: str | None) -> None:
    """Rename weights in a file, or take them out."""
    held = load_file(file)
    kept = {k.replace(old, new or ""): v for k, v in held.items() if new or old not in k}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_guider_is_no_code(tmp_path: Path) -> None:
    """HunyuanVideo 1.5 names one among its parts."""
    pytest.importorskip("diffusers.guiders")
    said = {
        "_class_name": "HunyuanVideo15Pipeline",
        "guider": ["diffusers", "ClassifierFreeGuidance"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(said), "utf-8")
    check_classes(tmp_path)


@pytest.mark.slow
def test_renamed_weights_of_a_text_encoder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(folder / "text_encoder" / "model.safetensors", FIRST, "encoder.block.0")
    stack = tmp_path / "stack.toml"
    stack.write_text('[[editor]]\nrecipe = "Maps"\nwords = ["cat"]\n', "utf-8")
    common = ["--prompt", "a red cat", "--steps", "1", "--device", "cpu"]
    for command in (
        ["maps", str(folder), *common, "--out", str(tmp_path / "maps")],
        ["run", str(stack), "--model", str(folder), *common, "--out", str(tmp_path / "run")],
        ["inspect", str(folder), "--run", "--device", "cpu"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{folder / 'text_encoder'}: 16 of 36 weights of this CLIPTextModel are" in said
        assert f"such as '{FIRST}.layer_norm1.bias'" in said
        assert "the file has 'encoder.block.0.layer_norm1.bias' instead" in said
        assert "another version of transformers" in said
    assert main(["inspect", str(folder)]) == 0  # which reads no weights


@pytest.mark.parametrize(
    ("part", "file", "key"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ("text_encoder", "model.safetensors", "final_layer_norm.bias"),
    ],
)
def test_weights_that_are_missing(folder: Path, part: str, file: str, key: str) -> None:
    rename(folder / part / file, key, None)
    with pytest.raises(
        InputError, match=rf"1 of \d+ weights .* such as '.*{key}'.* save the model"
    ):
        load_pipeline(str(folder), "cpu")


def test_whole_folders_are_read(folder: Path) -> None:
    pipe, plain = load_pipeline(str(folder), "cpu"), zoo.PIPELINES["sd15"].make()
    for name in ("unet", "vae", "text_encoder"):
        held, expected = getattr(pipe, name).state_dict(), getattr(plain, name).state_dict()
        assert held.keys() == expected.keys()
        assert all((held[key] == expected[key]).all() for key in held)


@pytest.mark.slow
def test_weights_of_ones_own_for_shapes(tmp_path: Path) -> None:
    """The embedded ones bear the prefix of transformers 4, which 5 reads as well."""
    shutil.copytree(WEIGHTS, tmp_path / "own")
    assert hookctl.load_shapes(device="cpu", weights=tmp_path / "own").text_encoder is not None
    rename(tmp_path / "own" / "text_encoder" / "model.safetensors", FIRST, "layers.0")
    with pytest.raises(InputError, match="weights of this CLIPTextModel are missing"):
        hookctl.load_shapes(device="cpu", weights=tmp_path / "own")
    whole = read_whole(CLIPTextModel, WEIGHTS / "text_encoder")
    assert whole.dtype == hookctl.load_shapes(device="cpu").text_encoder.dtype
