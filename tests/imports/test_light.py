"""What does not need torch does not wait for it."""

from __future__ import annotations

import pydoc
import subprocess
import sys

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
)


def test_help_and_mistyped_options_need_no_torch() -> None:
    code = f"""
import sys
import hookctl
from hookctl.cli import main
statuses = [main(arguments) for arguments in {COMMANDS!r}]
assert statuses == [0, 0, 2, 0, 2, 2, 2], statuses
loaded = {{*{HEAVY!r}}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
