"""The file of a stack that was meant, and the prompts that it is run with."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hookctl.errors import InputError
from hookctl.preset import RawStack, existing

PRESETS = Path(__file__).resolve().parents[1] / "demos" / "presets"


def stack_file(given: str | None) -> Path:
    """The file that was meant: a path, or the name of a stack that comes with hookctl."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    along = f"a TOML file, or one of {', '.join(known)}"
    if given is None:
        raise InputError(f"which stack? Give {along}")
    if Path(given).suffix or Path(given).exists():
        return existing(Path(given))
    if given in known:
        return known[given]
    near = get_close_matches(given, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise InputError(f"there is no stack {given!r}{hint} Give {along}")


def first_comment(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ")


def prompts_of(options: Any, raw: RawStack, compared: bool) -> list[str]:
    """The source prompt and its edits; the command line goes before the file.

    compared: whether an editor takes both.
    """
    prompt = options.prompt if options.prompt is not None else raw.run.get("prompt")
    if prompt is None:
        raise InputError(f"which prompt? Give --prompt, or prompt = in [run] of {raw.path}")
    # The file's edits belong to the file's prompt.
    edits = options.edit
    if edits is None and options.prompt is None:
        edits = raw.run.get("edit")
    edits = [edits] if isinstance(edits, str) else list(edits or [])
    if compared and not edits:
        raise InputError(f"{raw.path} edits a prompt into another; give --edit TEXT")
    return [prompt, *edits]
