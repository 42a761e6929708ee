"""What the command says and with which exit status, without drawing anything."""

import errno
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import hookctl
from hookctl import demos, recipes
from hookctl.cli import common, main
from hookctl.cli.draw import Drawing
from hookctl.cli.quiet import quiet
from hookctl.cli.run import _telling
from hookctl.demos.shapes import load
from hookctl.preset import SETTINGS, EditorSpec, Preset

COMMANDS = ("demo", "run", "inspect", "maps", "batch")
EDITOR = '[[editor]]\nrecipe = "PromptToPrompt"\n'


class Said(SimpleNamespace):
    status: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command; what it printed and its exit status."""

    def run(*arguments: Any) -> Said:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Said(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.toml"
    path.write_text(EDITOR, "utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(say: Say, command: str) -> None:
    said = say(command, "--help")
    assert said.status == 0 and not said.err
    examples = said.out.partition("examples:\n")[2].strip().splitlines()
    assert 3 <= len(examples) <= 5
    assert all(line.strip().startswith(f"hookctl {command} ") for line in examples)
    assert max(map(len, said.out.splitlines())) <= 100


def test_help_lists_the_commands(say: Say) -> None:
    said = say("--help")
    assert all(f"\n    {command}" in said.out for command in COMMANDS)
    assert "examples:" in said.out and "shapes" in said.out
    assert say("--version").out == f"hookctl {hookctl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND (see hookctl --help)"),
        (["paint"], "invalid choice: 'paint'"),
        (["maps", "shapes"], "required: --prompt (see hookctl maps --help)"),
        (["maps", "shapes", "--prompt", "x", "--steps", "0"], "--steps: '0' given; a whole number"),
        (["maps", "shapes", "--prompt", "x", "--seed", "-1"], "a whole number >= 0 expected"),
        (["maps", "shapes", "--prompt", "x", "--seed", "1.5"], "a whole number >= 0 expected"),
        (["maps", "shapes", "--prompt", "x", "--guidance", "nan"], "a number expected"),
        (["maps", "shapes", "--prompt", "x", "--words", " ,"], "words expected, split by commas"),
        (["run", "recolour", "--dtype", "int8"], "'float32'"),
        (["run", "recolour", "--step", "3"], "did you mean --steps"),
        (["run"], "which stack? Give a TOML file, or one of "),
        (["run", "recolor"], "there is no stack 'recolor'; did you mean 'recolour'?"),
        (["run", "none.toml"], "none.toml: there is no such file"),
        (["demo", "prompt2prompt"], "did you mean 'prompt_to_prompt'?"),
        (["inspect", "no/such/folder"], "no/such/folder: there is no such folder; give a folder"),
        (["inspect", "nowhere"], "a model id (owner/name), or 'shapes'"),
        (["maps", "shapes", "--prompt", "x", "--device", "warp9"], "--device warp9"),
        (["maps", "shapes", "--prompt", " "], "--prompt ' ' has no words; give a text"),
        (
            ["run", "freeu", "--model", "shapes", "--prompt", "x", "--steps", "1001"],
            "trained on 1000, give no more",
        ),
        (["demo", "xyz"], "there is no demo 'xyz'; there are: "),
        (["bench", "flight"], "group 'flight' given; give some of calls"),
        (["bench", "--seconds", "0"], "--seconds: '0' given; a number above 0 expected"),
        (["bench", "--seconds", "nan"], "--seconds: 'nan' given; a number expected"),
        (["bench", "--device", "warp9"], "--device warp9: can't be used here"),
        (["bench", "--device", "meta"], "--device meta: can't be used here"),
        (["bench", "--out", __file__], "can't be made a folder"),
        (["--vers"], "required: COMMAND"),
        (["maps", "shapes", "--prompt", "a\udcff"], "a text in UTF-8 expected"),
        (["maps", "shapes", "--prompt", "x", "--seed", "9" * 5000], "a whole number >= 0"),
        (["maps", "x" * 5000, "--prompt", "x"], "File name too long"),
        (["maps", "a\0b", "--prompt", "x"], "there is no such folder"),
        (["maps", "shapes", "--prompt", "a red cat", "--words", "cot"], "did you mean 'cat'?"),
        (["run", "recolour", "--image", "none.png"], "draws from noise"),
        (["run", "inverted_edit", "--image", "none.png"], "none.png: there is no such file"),
        (["run", "recolour", "--lora", "none.safetensors"], "none.safetensors: there is no such"),
        (["run", "recolour", "--model", "no/such/one"], "no/such/one: there is no such folder"),
    ],
)
def test_bad_input(say: Say, arguments: list[str], says: str) -> None:
    """Status 2 and one line that says what would do."""
    said = say(*arguments)
    assert said.status == 2 and not said.out
    assert said.err.startswith("hookctl: error: ") and said.err.count("\n") == 1
    assert says in said.err


@pytest.mark.slow
def test_a_stack_without_prompts(say: Say, stack: Path) -> None:
    assert "which prompt? Give --prompt" in say("run", stack).err
    said = say("run", stack, "--prompt", "a cat")
    assert said.status == 2 and "edits a prompt into another; give --edit" in said.err
    said = say("run", stack, "--prompt", "a cat", "--edit", "a dog")
    assert said.status == 2 and "which model? Give --model" in said.err


def test_the_prompt_of_the_command_drops_the_edits_of_the_file(say: Say) -> None:
    """The file's edits were written for the file's prompt."""
    said = say("run", "recolour", "--prompt", "a cat")
    assert said.status == 2 and "give --edit" in said.err


def test_values_of_a_file_are_checked_like_options(say: Say, stack: Path) -> None:
    stack.write_text('model = "shapes"\n[run]\nsteps = 0\n' + EDITOR, "utf-8")
    said = say("run", stack, "--prompt", "a cat", "--edit", "a dog")
    assert said.status == 2 and "steps = 0; give a whole number >= 1" in said.err


def test_lists(say: Say) -> None:
    said = say("demo", "--list")
    assert said.status == 0 and all(name in said.out for name in demos.DEMOS)
    said = say("run", "--list")
    assert said.status == 0 and "recolour" in said.out and "#" not in said.out


@pytest.mark.parametrize(
    ("given", "shown"),
    (
        ({"texts": ["a red circle on white", "a blue square on white"]}, ["circle", "square"]),
        ({"words": ["square", "circle", "moon"]}, ["square", "circle"]),
        ({"words": "square"}, ["circle", "square", "background"]),
        ({}, ["circle", "square", "background"]),
    ),
)
def test_words_that_are_shown_of_one_prompt(given: dict[str, Any], shown: list[str]) -> None:
    """Those that an editor is about, else what says most; not the last three words."""
    words = "a red circle and a blue square on a white background".split()
    preset = Preset((EditorSpec("FreeU", recipes.FreeU, given),))
    assert _telling(words, preset) == shown


def test_little_words_are_not_shown() -> None:
    words = "a cat and an owl on the mat".split()
    assert _telling(words, Preset((EditorSpec("FreeU", recipes.FreeU, {}),))) == [
        "cat", "owl", "mat",
    ]  # fmt: skip


def test_folders_that_are_no_pipeline(say: Say, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "is a single file; give a folder" in say("inspect", tmp_path / "notes.txt").err
    said = say("inspect", tmp_path)
    assert said.status == 2 and "model_index.json is missing; it holds: notes.txt" in said.err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "Painter9"}')
    said = say("inspect", tmp_path / "model")
    assert said.status == 2 and "'Painter9', which is no model of diffusers" in said.err
    (tmp_path / "model_index.json").write_text("{}")
    said = say("maps", tmp_path / "model", "--prompt", "x", "--out", tmp_path / "out")
    assert (
        said.status == 2
        and f"(Painter9), and a whole pipeline is needed; did you mean {tmp_path}?" in said.err
    )


def test_out_must_be_a_folder(say: Say, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    said = say("maps", "shapes", "--prompt", "x", "--out", tmp_path / "file")
    assert said.status == 2 and "can't be made a folder" in said.err


def test_out_with_a_null_byte(say: Say) -> None:
    said = say("bench", "--out", "a\0b")
    assert said.status == 2 and r"--out 'a\x00b': can't be made a folder (embedded null" in said.err


def test_every_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, wanted in (
        ((None, "run", "recolour"), "out/run-recolour"),
        ((None, "bench"), "out/bench"),
        ((Path("mine"), "run", "recolour"), "mine"),
    ):
        with common.out_folder(*given) as out:
            assert out == Path(wanted) and out.is_dir()
            if out.name == "bench":
                (out / "bench.json").write_text("{}", "utf-8")
    # Folders that nothing came into are gone.
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "out", "out/bench", "out/bench/bench.json",
    }  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path) -> None:
    """The error names the file, of which no part is left."""
    for write in (
        lambda path: common.write_json(path, {}),
        lambda path: common.save_image(Image.new("RGB", (8, 8)), path),
    ):
        path = tmp_path / "made.png"
        path.symlink_to("/dev/full")
        with pytest.raises(hookctl.errors.HookctlError, match="made.png: can't be written .*space"):
            write(path)
        assert not path.is_symlink()


@pytest.mark.parametrize("before", [b"", b"as it was"])
def test_a_disk_that_fills_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    """A file is whole or not there, and what stood there before is not lost."""
    path = tmp_path / "made.png"
    if before:
        path.write_bytes(before)

    def half(self: Any, part: Path, **_: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        with pytest.raises(hookctl.errors.InputError, match="made.png: can't be written"):
            common.save_image(Image.new("RGB", (8, 8)), path)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [before] * bool(before)

        def interrupted(self: Any, part: Path, **_: Any) -> None:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            common.save_image(Image.new("RGB", (8, 8)), path)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [before] * bool(before)
    common.save_image(Image.new("RGB", (8, 8)), path)
    assert Image.open(path).size == (8, 8) and [*tmp_path.iterdir()] == [path]


def test_a_link_still_leads_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "true.json").write_text("old", "utf-8")
    (tmp_path / "link.json").symlink_to("true.json")
    common.write_json(tmp_path / "link.json", {})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "true.json").read_text("utf-8") == "{}\n"


@pytest.mark.slow
def test_a_refused_command_leaves_no_folder(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hookctl.demos.prompt_to_prompt.run", lambda **_: 1 / 0)
    for arguments in (
        ("maps", "shapes", "--prompt", "a cat", "--device", "warp9"),
        ("maps", "shapes", "--prompt", "a cat", "--words", "dog"),
        ("run", "freeu", "--model", "shapes", "--prompt", "x", "--steps", "1001"),
        ("run", "masactrl", "--lora", "none.safetensors"),
        ("demo",),
    ):
        assert say(*arguments).status, arguments
        assert not [*tmp_path.iterdir()], arguments


def test_a_full_disk_under_a_demo(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hookctl.demos.prompt_to_prompt.run", fail)
    said = say("demo", "--out", tmp_path)
    assert said.status == 2 and said.err.startswith(f"hookctl: error: --out {tmp_path}: No space")


def test_the_settings_of_a_run_are_listed_once(say: Say) -> None:
    """In the table of presets; options and what is drawn follow."""
    assert {f.name for f in fields(Drawing)} == {s.name for s in SETTINGS.values() if s.draws}
    text = say("run", "--help").out
    assert all(f"--{s.name} {s.metavar}" in text and s.help in text for s in SETTINGS.values())


def test_without_the_embedded_weights(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "WEIGHTS", tmp_path / "weights")
    said = say("inspect", "shapes")
    assert said.status == 2 and "holds no pipeline" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "hookctl: interrupted\n"),
        (hookctl.errors.HoleError("a hole"), 1, "hookctl: error: a hole\n"),
        (RuntimeError("a\nb"), 1, "hookctl: error: RuntimeError: a b (HOOKCTL_TRACE=1"),
        (hookctl.errors.WordError("no word"), 2, "hookctl: error: no word\n"),
    ],
)
def test_exit_status(
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    status: int,
    says: str,
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("hookctl.demos.prompt_to_prompt.run", fail)
    said = say("demo", "--out", tmp_path)
    assert said.status == status and not said.out and said.err.startswith(says)
    monkeypatch.setenv("HOOKCTL_TRACE", "1")
    assert ("Traceback" in say("demo", "--out", tmp_path).err) == (status in (1, 2))


def test_demo(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo gets its arguments; its report is printed; progress stays off the output."""
    seen: dict[str, Any] = {}

    def run(out: Path, seed: int, seeds: int, progress: Callable[[int, int], None]) -> Any:
        seen.update(out=out, seed=seed, seeds=seeds)
        progress(1, 2)
        progress(2, 2)
        (out / "grid.png").write_bytes(b"")
        return {"steps": 5, "kinds": {"colour": {"edit": {"success": 0.5}}, "shape": {"n": 3}}}

    monkeypatch.setattr("hookctl.demos.prompt_to_prompt.run", run)
    said = say("demo", "--out", tmp_path / "o", "--seed", 3, "--seeds", 2, "--progress")
    assert said.status == 0 and "2/2" in said.err
    assert seen == {"out": tmp_path / "o", "seed": 3, "seeds": 2}
    assert "steps: 5" in said.out and "edit: success" in said.out and "grid.png" in said.out


def test_quiet_leaves_things_as_they_were() -> None:
    import logging
    import warnings

    level = logging.getLogger("diffusers").level
    filters = list(warnings.filters)
    with quiet():
        assert logging.getLogger("diffusers").level == logging.ERROR
    assert logging.getLogger("diffusers").level == level and list(warnings.filters) == filters


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m hookctl`, in this process: a new one spends its time importing."""
    monkeypatch.setattr(sys, "argv", ["hookctl", "inspect", "nowhere"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("hookctl", run_name="__main__")
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("hookctl: error: nowhere")


def test_json_of_nothing_is_not_printed(say: Say, tmp_path: Path) -> None:
    """A failure leaves standard output empty, so that a program reads no half answer."""
    said = say("inspect", tmp_path, "--json")
    assert said.status == 2 and said.out == ""
    with pytest.raises(json.JSONDecodeError):
        json.loads(said.out)
