"""The commands on real pipelines: tiny random ones in folders, and the embedded one."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl.cli import main
from hookctl.inspect import probe, survey
from tests import zoo

STACK = """
[run]
prompt = "a red cat above a blue square"
edit = "a red dog above a blue square"
steps = 2

[[editor]]
recipe = "PromptToPrompt"
self_replace = 0.5
blend = ["cat", "dog"]
"""

Said = tuple[int, str, str]
Say = Callable[..., Said]
Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a saved zoo pipeline."""
    root = tmp_path_factory.mktemp("zoo")

    def saved(name: str) -> Path:
        path = root / name
        if not path.exists():
            zoo.PIPELINES[name].make().save_pretrained(path)
        return path

    return saved


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*arguments: Any) -> Said:
        capsys.readouterr()  # what saving a pipeline prints is not the command's
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# -- inspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart", "instruct_pix2pix"])
def test_inspect_agrees_with_the_loaded_pipeline(say: Say, folder: Folder, name: str) -> None:
    """Without weights it finds what the pipeline with its weights shows; as JSON."""
    status, out, err = say("inspect", folder(name), "--json")
    assert status == 0 and not err
    data = json.loads(out)
    found = json.loads(json.dumps(survey(zoo.PIPELINES[name].make()).data()))
    assert {key: data[key] for key in found} == found
    assert data["summary"]["kinds"] == dict(zoo.PIPELINES[name].sites)
    assert data["summary"]["caught"] == data["summary"]["sites"] == len(data["sites"])
    assert data["text"] and data["run"] is None


def test_inspect_for_people(say: Say, folder: Folder) -> None:
    status, out, err = say("inspect", folder("sd3"))
    assert status == 0 and not err
    assert "StableDiffusion3Pipeline, SD3Transformer2DModel" in out
    assert "4 (3 joint, 1 self); 4 can be caught, 0 not" in out
    assert "image before text in one sequence" in out
    assert "CLIPTokenizer fills text positions 0..76" in out
    assert "T5Tokenizer fills text positions 77..332" in out
    _, out, _ = say("inspect", folder("flux"))
    assert "a call each, in this order: cond, uncond" in out


def test_inspect_a_bare_denoiser(say: Say, folder: Folder) -> None:
    """Only its configuration is read."""
    unet = folder("sd15") / "unet"
    status, out, _ = say("inspect", unet, "--json")
    data = json.loads(out)
    assert status == 0 and data["pipeline"] is None and data["text"] is None
    assert data["denoiser"] == "UNet2DConditionModel" and data["latent"] == [16, 16]
    first = data["sites"][0]
    assert first["path"] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert (first["label"], first["resolution"]) == ("down0.self0@1", "1")
    assert (first["grid"], first["heads"]) == ([16, 16], 2)
    status, _, err = say("inspect", unet, "--run")
    assert status == 2 and f"did you mean {folder('sd15')}?" in err


@pytest.mark.parametrize("name", ["sd15", "sd3", "instruct_pix2pix"])
def test_inspect_by_running(say: Say, folder: Folder, name: str) -> None:
    status, out, err = say("inspect", folder(name), "--run", "--json", "--device", "cpu")
    assert status == 0, err
    data = json.loads(out)
    assert len(data["run"]["caught"]) == data["summary"]["sites"]
    assert not data["run"]["not_caught"] and not data["run"]["never_ran"]
    for site in data["sites"]:
        seen = data["run"]["caught"][site["path"]]
        assert seen["calls"] >= 2
        if site["grid"] and site["kind"] in ("self", "cross"):
            assert seen["queries"] == site["grid"][0] * site["grid"][1]


def test_what_can_not_be_caught_is_said() -> None:
    """Eager processors and other backends have a stand-in; some making has none."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe = zoo.PIPELINES["sd15"].make()
    first, second, *_ = zoo.attention_modules(pipe.unet).items()
    first[1].set_processor(AttnProcessor())

    class FancyXFormersProcessor:
        def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    second[1].set_processor(FancyXFormersProcessor())
    found = survey(pipe)
    facts = {fact.site.path: fact for fact in found.sites}
    assert facts[first[0]].caught and "AttnProcessor2_0 stands in" in facts[first[0]].how
    assert not facts[second[0]].caught and "has no SDPA form" in facts[second[0]].how
    text = "\n".join(found.lines())
    assert "19 can be caught, 1 not" in text and "NOT CAUGHT: FancyXFormersProcessor" in text


def test_a_hole_is_found_by_running() -> None:
    """A processor that looks harmless but calls no attention that can be seen."""

    class Secret:
        def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    pipe = zoo.PIPELINES["sd15"].make()
    paths = list(zoo.attention_modules(pipe.unet))
    holes = [path for path in paths if path.startswith("up_blocks.1") and path.endswith("attn1")]
    for path in holes:
        pipe.unet.get_submodule(path).set_processor(Secret())
    probed = probe(pipe, prompt=["a"], num_inference_steps=1, output_type="latent")
    assert sorted(probed.holes) == sorted(holes) and not probed.silent
    assert set(probed.seen) == set(paths) - set(holes)
    assert "scaled_dot_product_attention" in probed.holes[holes[0]]


# -- maps ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_maps(say: Say, folder: Folder, tmp_path: Path) -> None:
    prompt = "a red cat above a blue square"
    arguments = ("maps", folder("sd15"), "--prompt", prompt, "--steps", 2, "--device", "cpu")
    status, out, err = say(*arguments, "--words", "cat,blue square", "--out", tmp_path)
    assert status == 0, err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"image.png", "maps.png", "maps.npz", "maps.json"} | {
        f"{kind}-{word}.png"
        for kind in ("overlay", "grids", "time")
        for word in ("cat", "blue_square")
    }
    assert Image.open(tmp_path / "image.png").size == (128, 128)
    arrays = np.load(tmp_path / "maps.npz")
    assert set(arrays) == {
        f"{word}@{n}x{n}" for word in ("cat", "blue square") for n in (2, 4, 8, 16)
    }
    assert arrays["cat@8x8"].shape == (2, 8, 8) and arrays["cat@8x8"].dtype == np.float32
    data = json.loads((tmp_path / "maps.json").read_text("utf-8"))
    assert list(data["words"]) == ["cat", "blue square"] and data["steps"] == 2
    figures = data["words"]["cat"]
    assert 0 < figures["share"] < 1 and all(0 <= x <= 1 for x in figures["centre"])
    assert "cat" in out and "maps.png" in out and not err


def test_maps_of_a_word_that_is_not_there(say: Say, folder: Folder, tmp_path: Path) -> None:
    status, _, err = say(
        "maps", folder("sd15"), "--prompt", "a red cat", "--words", "cot", "--out", tmp_path
    )
    assert status == 2 and "'cot' is not in the prompt" in err and "did you mean 'cat'?" in err


@pytest.mark.slow
def test_what_a_place_looks_at(say: Say, folder: Folder, tmp_path: Path) -> None:
    arguments = ("maps", folder("sd15"), "--prompt", "a red cat", "--steps", 1, "--device", "cpu")
    status, out, err = say(*arguments, "--patch", "0.25,0.75", "--out", tmp_path)
    assert status == 0 and not err and "patch (0.25, 0.75)" in out
    data = json.loads((tmp_path / "maps.json").read_text("utf-8"))
    assert list(data["words"]) == ["patch (0.25, 0.75)"]
    arrays = np.load(tmp_path / "maps.npz")
    assert all(a.sum((1, 2)).max() <= 1.001 for a in arrays.values())  # shares of what it looks at
    status, out, err = say(*arguments, "--words", "cat", "--patch", "0,1", "--out", tmp_path)
    assert status == 0 and "cat" in out and "patch (0, 1)" in out, err
    for wrong in ("0.5", "1.5,0", "nan,0", "a,b", "1,2,3"):
        status, _, err = say(*arguments, "--patch", wrong)
        assert status == 2 and "Y,X expected, each from 0 to 1" in err


# -- run -------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.toml"
    path.write_text(STACK, "utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_run(say: Say, folder: Folder, stack: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "deep" / "out"
    model = folder(name)
    status, said, err = say(
        "run", stack, "--model", model, "--out", out, "--images", 2, "--seed", 3, "--device", "cpu"
    )
    assert status == 0, err
    images = {f"{k}-{p}-{i}.png" for k in ("plain", "edited") for p in (0, 1) for i in (0, 1)}
    assert {p.name for p in out.iterdir()} == images | {"grid.png", "report.txt", "run.json"}
    data = json.loads((out / "run.json").read_text("utf-8"))
    assert data["prompts"] == ["a red cat above a blue square", "a red dog above a blue square"]
    assert (data["seed"], data["steps"], data["images"]) == (3, 2, 2)
    assert len(data["stack_sha256"]) == 64 and data["versions"]["torch"] == torch.__version__
    assert data["editors"][0]["blend"] == ["cat", "dog"] and data["dtype"] == "float32"
    assert "PromptToPrompt" in (out / "report.txt").read_text("utf-8")
    assert "PromptToPrompt" in said and "grid.png" in said and not err
    source, plain, edited = (
        np.asarray(Image.open(out / f"{name}.png"), dtype=int)
        for name in ("plain-0-0", "plain-1-0", "edited-1-0")
    )
    kept = np.asarray(Image.open(out / "edited-0-0.png"), dtype=int)
    assert abs(kept - source).max() <= 2  # of 255: the source is left alone, but for rounding
    assert abs(edited - plain).max() > 2


@pytest.mark.slow
def test_run_twice_is_the_same(say: Say, folder: Folder, stack: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        given = ("--model", folder("sd15"), "--out", tmp_path / name, "--steps", 1)
        say("run", stack, *given, "--device", "cpu")
        made.append((tmp_path / name / "grid.png").read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_run_from_the_command_line(say: Say, folder: Folder, stack: Path, tmp_path: Path) -> None:
    """Several edits; what is said there goes before the file."""
    stack.write_text(STACK.replace('blend = ["cat", "dog"]', ""), "utf-8")
    status, _, err = say(
        "run", stack, "--model", folder("sd15"), "--out", tmp_path, "--steps", 1, "--device", "cpu",
        "--prompt", "a cat", "--edit", "a dog", "--edit", "a big cat", "--negative", "blurry",
    )  # fmt: skip
    assert status == 0, err
    data = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert data["prompts"] == ["a cat", "a dog", "a big cat"]
    assert (data["steps"], data["negative"]) == (1, "blurry")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('["cat", "dog"]', '["cat", "cat"]', "'cat' is not in the prompt"),
        ("self_replace = 0.5", "self_replace = 1.5", "[[editor]] 1 (PromptToPrompt): self_replace"),
        ("steps = 2", "steps = 2\nwidth = 100", "width = 100; this model wants a multiple of 8"),
    ],
)
def test_run_refuses(
    say: Say, folder: Folder, stack: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    stack.write_text(STACK.replace(old, new), "utf-8")
    status, _, err = say("run", stack, "--model", folder("sd15"), "--out", tmp_path)
    assert status == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "grid.png").exists()


def test_run_without_an_edit(say: Say, folder: Folder, stack: Path, tmp_path: Path) -> None:
    """A stack that compares no prompts runs on one: plain and edited side by side."""
    stack.write_text('[[editor]]\nrecipe = "Maps"\nwords = ["cat"]\n', "utf-8")
    status, _, err = say(
        "run", stack, "--model", folder("sd15"), "--prompt", "a red cat", "--out", tmp_path,
        "--steps", 1, "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    assert (tmp_path / "plain-0.png").read_bytes() == (tmp_path / "edited-0.png").read_bytes()


# -- the embedded pipeline -------------------------------------------------------------------------


def test_shapes(say: Say, tmp_path: Path) -> None:
    status, out, err = say("inspect", "shapes")
    assert status == 0 and "StableDiffusionPipeline" in out and not err
    status, _, err = say("run", "recolour", "--out", tmp_path, "--steps", 1, "--device", "cpu")
    assert status == 0, err
    assert (tmp_path / "grid.png").exists()
    status, out, err = say(
        "maps", "shapes", "--prompt", "a red circle", "--out", tmp_path, "--steps", 1
    )
    assert status == 0 and "circle" in out, err
