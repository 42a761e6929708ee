"""Folders, LoRAs and presets that want code to be run: none of it is, and one line says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
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
    return Path(shutil.copytree(WEIGHTS, tmp_path / "model", copy_function=os.symlink))


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


def test_the_folder_itself_is_fine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What every folder may hold: values, parts left out, classes that went into a library."""
    index(target=[1, 2], names=[None, None], note="x")(folder)
    config(TEXT, auto_map={"AutoModel": "modeling_gone.Gone"})(folder)
    (folder / "train.py").write_text(CODE, "utf-8")
    assert (
        main(["inspect", str(folder)]) == 0 and "StableDiffusionPipeline" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "can't be read",
        ),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "can't be read"),
        (b"P6 90000 90000 255\n" + b"\0" * 99, "is too large"),
        (b"", "can't be read"),
    ],
)
def test_an_image(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No program is started for it, and none fills the memory."""
    (tmp_path / "image.png").write_bytes(content)
    given = ["run", "inverted_edit", "--image", str(tmp_path / "image.png")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_modules_where_the_command_stands(tmp_path: Path, trap: Path) -> None:
    """`python -m hookctl inspect .` in a folder that brings a module of a library's name."""
    here = tmp_path / "downloaded"
    here.mkdir()
    for name in ("torch", "diffusers", "PIL", "numpy"):
        (here / f"{name}.py").write_text(CODE, "utf-8")
    command = [sys.executable, "-m", "hookctl", "inspect", "."]
    paths = os.pathsep.join([str(WEIGHTS.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "model_index.json is missing" in done.stderr
    (here / "config.json").write_text('{"_class_name": "UNet2DModel"}', "utf-8")
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert not trap.exists(), done.stderr


WEIGHT_FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_pickled_weights(
    name: str, folder: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are read as numbers alone."""
    (folder / f"{name}.safetensors").unlink()
    pickled = (folder / name.replace("/model", "/pytorch_model")).with_suffix(".bin")
    torch.save({"weight": Bomb()}, pickled)
    status = main(["maps", str(folder), "--prompt", "a", "--out", str(folder.parent / "out")])
    said = capsys.readouterr().err
    assert not trap.exists(), "a pickle ran"
    assert status == 2 and said.count("\n") == 1 and not (folder.parent / "out").exists()
    pickled.write_bytes(pickle.dumps({"weight": Bomb()}))  # in the old form of torch
    assert main(["maps", str(folder), "--prompt", "a", "--out", str(folder.parent / "out")]) == 2
    assert not trap.exists(), "a pickle ran"


def lora(path: Path, **notes: str) -> Path:
    """A true LoRA with other notes in its header."""
    held = LORA.read_bytes()
    length = int.from_bytes(held[:8], "little")
    header = json.loads(held[8 : 8 + length])
    header["__metadata__"] = notes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + held[8 + length :])
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "can't be read as safetensors"),
        (b"\xff" * 100, "can't be read as safetensors"),
        (struct.pack("<Q", 5) + b"[[[[[", "can't be read as safetensors"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "can't be read as safetensors"),
        (struct.pack("<Q", 2) + b"[]", "can't be read as safetensors"),
        (pickle.dumps(Bomb()), "can't be read as safetensors"),
    ],
)
def test_a_lora_that_is_none(
    content: bytes, says: str, tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Bomb()))
    assert main(["run", "masactrl", "--lora", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not trap.exists()
    assert not (tmp_path / "out").exists()


def test_a_lora_that_names_a_module(
    tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {"unet.r": 4, "unet.megatron_config": {}, "megatron_core": "evil_module"}
    path = lora(tmp_path / "evil.safetensors", lora_adapter_metadata=json.dumps(notes))
    assert main(["run", "masactrl", "--lora", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "megatron_core = 'evil_module' would load code" in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[[editor]]\nrecipe = 'evil_module:Evil'", "no installed package holds 'evil_module'"),
        ("[[editor]]\nrecipe = 'subprocess:Popen'", "no installed package holds 'subprocess'"),
        ("[[editor]]\nrecipe = 'evil_module'", "recipe='evil_module' is not known"),
        ("model = '{folder}'\n[[editor]]\nrecipe = 'FreeU'", "only classes of diffusers"),
        ("[[lora]]\npath = 'evil.bin'\n[[editor]]\nrecipe = 'FreeU'", "is no safetensors file"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("[[editor]]\nrecipe = 'FreeU'\nb1 = " + "[" * 400 + "]" * 400, "FreeU"),
        ("[run]\nseed = " + "9" * 5000, "can't be read: Exceeds the limit"),
        ("[run]\nseed = 0x" + "f" * 5000, "seed = a number of thousands of digits"),
        ("[[editor]]\nrecipe = 'FreeU'\nb1 = 0x" + "f" * 5000, "a number of thousands of digits"),
        ("[[editor]]\nrecipe = 'FreeU'\nb1 = nan", "FreeU"),
        ("[[editor]]\nrecipe = 'FreeU'\nb_1 = 1.0", "'b_1' is not a key of FreeU"),
        ("model = 'a\\u0000b'\n[[editor]]\nrecipe = 'FreeU'", "there is no such folder"),
    ],
)
def test_a_preset(
    content: str,
    says: str,
    folder: Path,
    tmp_path: Path,
    trap: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index(unet=["evil_module", "Evil"])(folder)
    path = tmp_path / "stack.toml"
    path.write_text(content.replace("{folder}", str(folder)), "utf-8")
    said = ["--prompt", "a cat", *([] if "model" in content else ["--model", "shapes"])]
    assert main(["run", str(path), *said, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and len(error) < 1500
    assert not trap.exists() and not (tmp_path / "out").exists()
