"""What does not need torch does not wait for it."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import hookctl

HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy")
COMMANDS = (
    ["--help"],
    ["demo", "--list"],
    ["demo", "paint"],
    ["run", "--list"],
    ["run", "none.toml"],
    ["inspect", "no/such/folder"],
    ["maps", "shapes"],
    ["maps", "shapes", "--prompt", "a red cat", "--words", "dog"],
    ["run", "recolour", "--model", "no/such/folder"],
    ["run", "recolour", "--lora", "none.safetensors"],
    ["run", "recolour", "--hook", "none.bin:0.5"],
    ["inspect", "none.bin"],
    ["run", "inverted_edit", "--image", "none.png"],
    ["run", "recolour", "--words", "dog"],
    ["batch", "none.toml"],
    ["batch", "replay"],
    ["bench", "flight"],
    ["app", "no/such/folder"],
    ["app", "shapes", "--hook", "none.bin:0.5"],
)


def test_help_and_mistyped_options_need_no_torch(tmp_path: Path) -> None:
    misspelt = ("FreeU", "b_1 = 1.0"), ("FreeV", ""), ("FreeU", "prompts = 1")
    commands = [*COMMANDS]
    for number, (recipe, line) in enumerate(misspelt):
        path = tmp_path / f"{number}.toml"
        path.write_text(f'[[editor]]\nrecipe = "{recipe}"\n{line}\n', "utf-8")
        commands.append(["run", str(path), "--model", "shapes", "--prompt", "a"])
    hostile = tmp_path / "model"
    hostile.mkdir()
    index = '{"_class_name": "StableDiffusionPipeline", "unet": ["evil", "Evil"]}'
    (hostile / "model_index.json").write_text(index, "utf-8")
    commands.append(["inspect", str(hostile)])
    code = f"""
import sys
import hookctl
from hookctl.cli import main
statuses = [main(arguments) for arguments in {commands!r}]
assert statuses == [0, 0, 2, 0] + [2] * {len(commands) - 4}, statuses
loaded = {{*{HEAVY!r}}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_packages_are_reached_as_attributes() -> None:
    for name in ("learned", "recipes"):
        assert hookctl.__getattr__(name) is sys.modules[f"hookctl.{name}"]


def test_every_name_is_there() -> None:
    for name in hookctl.__all__:
        assert getattr(hookctl, name) is not None
        assert name in str(hookctl.__doc__)
    assert {*hookctl._HOMES} == {*hookctl.__all__} - {"errors", "load_shapes"}
    assert set(hookctl.__all__) <= set(dir(hookctl))
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        _ = hookctl.paint  # type: ignore[attr-defined]


def test_help_is_short() -> None:
    """Two screens; each class has a help of its own."""
    text = pydoc.render_doc(hookctl, renderer=pydoc.plaintext)
    assert len(text.splitlines()) <= 80 and "class AttentionCall" not in text
    assert "class Editor" in pydoc.render_doc(hookctl.Editor, renderer=pydoc.plaintext)
