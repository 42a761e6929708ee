"""Folders, LoRAs and presets that want code to be run: none of it is, and one line says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookctl
from hookctl.cli import main

WEIGHTS = Path(hookctl.__file__).parents[1] / "demos/shapes/weights"
LORA = Path(hookctl.__file__).parents[1] / "demos/presets/striped.safetensors"
CODE = "import os, pathlib\npathlib.Path(os.environ['TRAP']).write_text('ran')\n"

Spoil = Callable[[Path], None]


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("echo ran > $TRAP",)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that code of a folder would write; the folder's code could be imported, too."""
    monkeypatch.setenv("TRAP", str(tmp_path / "ran"))
    lib = tmp_path / "lib"
    lib.mkdir()
    code = CODE + "from diffusers import DDIMScheduler, UNet2DConditionModel\n"
    (lib / "evil_module.py").write_text(code + "class Evil(UNet2DConditionModel): pass\n")
    monkeypatch.syspath_prepend(str(lib))
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole pipeline."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "model", copy_function=os.link))


def change(path: Path, **values: Any) -> None:
    """A JSON file with other values."""
    said = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if path.exists():
        path.unlink()  # it is a link to the true one
    path.write_text(json.dumps(said | values), "utf-8")


def index(**values: Any) -> Spoil:
    return lambda folder: change(folder / "model_index.json", **values)


def config(name: str, **values: Any) -> Spoil:
    return lambda folder: change(folder / name, **values)


def code(*names: str) -> Spoil:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).write_text(CODE + "class Evil: pass\n", "utf-8")

    return write


def text(name: str, content: str | bytes) -> Spoil:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def both(*spoils: Spoil) -> Spoil:
    def write(folder: Path) -> None:
        for spoil in spoils:
            spoil(folder)

    return write


UNET, TEXT = "unet/config.json", "text_encoder/config.json"
HOSTILE: dict[str, Spoil] = {
    "a pipeline in a file": both(index(_class_name=["evil", "Evil"]), code("evil.py")),
    "a pipeline elsewhere": index(_class_name=["someone/evil", "Evil"]),
    "a pipeline called None": code("None.py"),
    "a pipeline beside its class": code("StableDiffusionPipeline.py"),
    "a pipeline that is none": index(_class_name="UNet2DConditionModel"),
    "a pipeline that chooses": index(_class_name="AutoPipelineForText2Image"),
    "a pipeline of parts": index(_class_name="ModularPipeline"),
    "a module of the pipeline": index(_module="evil_module"),
    "a custom pipeline": index(custom_pipeline="evil_module"),
    "a component in a file": both(index(unet=["evil", "Evil"]), code("unet/evil.py")),
    "a file called as a library": code("unet/diffusers.py"),
    "an installed module": index(unet=["evil_module", "Evil"]),
    "a part of an installed module": index(unet=["evil_module.sub", "Evil"]),
    "a module of Python": index(unet=["subprocess", "Popen"]),
    "a path as a library": index(unet=["../lib/evil_module", "Evil"]),
    "a path as a component": index(**{"../lib": ["diffusers", "UNet2DConditionModel"]}),
    "a function": index(tokenizer=["transformers", "pipeline"]),
    "a class that loads what it is told": index(text_encoder=["transformers", "AutoModel"]),
    "a class that trains": index(text_encoder=["transformers", "Trainer"]),
    "a model that chooses": index(unet=["diffusers", "AutoModel"]),
    "too many words for a class": index(unet=["diffusers", "UNet2DConditionModel", "evil"]),
    "a class in a configuration": config(UNET, _class_name=["evil_module", "Evil"]),
    "auto_map": both(
        config(TEXT, auto_map={"AutoModel": "evil.Evil"}), code("text_encoder/evil.py")
    ),
    "auto_map to elsewhere": config(TEXT, auto_map={"AutoModel": "someone/evil--evil.Evil"}),
    "auto_map further in": config(TEXT, text_config={"auto_map": {"AutoModel": "a/b--c.D"}}),
    "auto_map of a tokenizer": config(
        "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--c.D", None]}
    ),
    "a kernel": config(TEXT, attn_implementation="someone/evil"),
    "an adapter": config(
        "text_encoder/adapter_config.json",
        peft_type="LORA", base_model_name_or_path=".", r=1, target_modules=["q_proj"],
        megatron_config={}, megatron_core="evil_module",
    ),
    "an index that is a list": text("model_index.json", "[1]"),
    "an index that is no JSON": text("model_index.json", "{"),
    "an index that is no text": text("model_index.json", b"\xff\xfe"),
    "an index without end": text("model_index.json", "[" * 100_000),
    "a number without end": text("model_index.json", '{"_class_name": ' + "9" * 5000 + "}"),
    "no class": text("model_index.json", "{}"),
    "a configuration without end": text(UNET, '{"a":' * 100_000),
    "a configuration of nonsense": config(UNET, in_channels="many"),
    "a number in a configuration": text(UNET, '{"in_channels": ' + "9" * 5000 + "}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["inspect", "maps"])
def test_a_folder(
    name: str, command: str, folder: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HOSTILE[name](folder)
    out = folder.parent / "out"
    more = [] if command == "inspect" else ["--prompt", "a", "--steps", "1", "--out", str(out)]
    status = main([command, str(folder), *more])
    said = capsys.readouterr()
    assert not trap.exists(), "code of the folder ran"
    assert status == 2 and not said.out, said
    assert said.err.startswith("hookctl: error: ") and said.err.count("\n") == 1
    assert len(said.err) < 900 and not out.exists()
