"""`hookctl inspect FILE`: what files of weights are said to be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hookctl.cli import main
from hookctl.learned.loading import BUILDERS
from tests.hookctl.learned import ldm

Said = tuple[int, str, str]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs the command: (status, standard output, standard error)."""
    for name in BUILDERS:
        monkeypatch.setitem(BUILDERS, name, "tests.hookctl.learned.builders:build")

    def run(*arguments: str | Path) -> Said:
        status = main(["inspect", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def zeros(shapes: ldm.Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.zeros((), dtype=torch.float16).expand(s) for key, s in shapes.items()}


def test_an_official_file(inspect: Any, tmp_path: Path) -> None:
    shapes = ldm.ip_adapter(ldm.SD15, ldm.resampler(768, 1280, 768))
    path = tmp_path / "ip-adapter-plus_sd15.bin"
    torch.save(zeros(shapes), path)
    status, out, err = inspect(path)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        str(path),
        "",
        "kind: ip-adapter plus",
        "base model: SD1.x",
        "layers: 16",
        "image tokens: 16 by a resampler of width 768, from inputs of 1280",
        "needs: a reference image, and a CLIP image encoder (its hidden states)",
        f"tensors: {len(shapes)}, 49.09 M parameters in float16, 98.2 MB",
        "options: strength, boxes, weights",
        f"attach it: hookctl run STACK --hook {path}[:STRENGTH]",
    ]
    status, out, _ = inspect(path, "--json")
    said = json.loads(out)
    assert status == 0 and said["kind"] == "ip-adapter plus" and said["base"] == "SD1.x"
    assert said["dtypes"] == {"float16": said["parameters"]} and said["tensors"] == len(shapes)
    assert said["parameters"] == pytest.approx(29.9e6 + 19.17e6, rel=2e-3)  # facts of the papers


def test_a_training_file(inspect: Any, tmp_path: Path) -> None:
    path = tmp_path / "gligen.pth"
    model = zeros(ldm.gligen())
    torch.save({"model": model, "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, path)
    status, out, _ = inspect(path)
    assert status == 0 and "kind: gligen box+text\nbase model: SD1.x\n" in out
    assert "\nleft out: opt (1)\n" in out
    assert "\nleft out: 686 tensors of the frozen base model\n" in out
    assert "209.10 M parameters" in out  # 208.02 of the fusers and 1.08 of the tokenizer


def test_what_is_not_known(inspect: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.ones(2, 3)}, path)
    status, out, _ = inspect(path)
    assert status == 0 and "kind: not known. None of the known kinds of weights: 1 tensors" in out
    assert "\n  a.weight (2, 3)\ntensors: 1, 6 parameters in float32" in out
    assert "attach" not in out
    assert json.loads(inspect(path, "--json")[1])["kind"] is None
    status, out, _ = inspect(tmp_path)  # a folder that holds it
    assert status == 0 and "kind: not known" in out
    save_file({"x.lora_A.weight": torch.ones(2, 3)}, path)
    assert "kind: LoRA\nneeds: hookctl run --lora FILE" in inspect(path)[1]


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("echo ran > $TRAP",)


def test_what_is_wrong(inspect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "ran"))
    torch.save({"image_proj": {"x": torch.ones(2)}, "more": Bomb()}, tmp_path / "hostile.bin")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    for given, says in {
        tmp_path / "hostile.bin": "would call 'posix.system' when it is read",
        tmp_path / "page.pth": "is a web page",
        tmp_path / "gone.bin": "there is no such file",
    }.items():
        status, out, err = inspect(given)
        assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    status, _, err = inspect(tmp_path / "page.pth", "--run")
    assert status == 2 and "--run and --prove take a pipeline" in err
    assert not (tmp_path / "ran").exists()
