"""What was typed as a model: a folder, a model id or an embedded pipeline, or what would do.

Only looks at files, so that a mistyped folder is known before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hookctl.cli.trust import INDEX, check_folder, read_json
from hookctl.errors import InputError

SHAPES, SHAPES_FLOW = "shapes", "shapes-flow"
# The folders of the embedded pipelines, in the package.
EMBEDDED = {SHAPES: "demos/shapes/weights", SHAPES_FLOW: "demos/shapes/flow/weights"}
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WHAT_WOULD_DO = (
    "a folder in the diffusers layout, 'shapes-flow', a model id (owner/name), or 'shapes'"
)


def find_model(model: str, *, whole: bool = True) -> Path | None:
    """The folder that was meant, None for a model id or an embedded pipeline.

    whole: a single denoiser will not do. Raises InputError with what would, and for a folder
    that names or holds code.
    """
    if model in EMBEDDED:
        return None
    folder = _folder(model)
    alone = not whole and folder is not None and (folder / "config.json").is_file()
    if folder is not None and not (folder / INDEX).is_file() and not alone:
        raise InputError(_not_a_pipeline(folder))
    if folder is not None:
        check_folder(folder)
    return folder


def class_name(folder: Path) -> str | None:
    try:
        found = read_json(folder / "config.json").get("_class_name")
    except InputError:
        return None
    return found if isinstance(found, str) else None


def _folder(model: str) -> Path | None:
    """The folder that was meant, None for a model id; InputError if it is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(
            f"{model}: is a single file; give a folder in the diffusers layout. From a checkpoint: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if _MODEL_ID.fullmatch(model) and not model.startswith("."):
        return None
    raise InputError(f"{model}: there is no such folder; give {_WHAT_WOULD_DO}")


def _not_a_pipeline(folder: Path) -> str:
    """Why a folder is no pipeline, and where there may be one."""
    near = next(_pipelines_near(folder), None)
    hint = f"; did you mean {near}?" if near else f"; give {_WHAT_WOULD_DO}"
    name = class_name(folder)
    if name:
        return f"{folder}: holds one model ({name}), and a whole pipeline is needed{hint}"
    held = sorted(item.name for item in folder.iterdir())
    some = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "")
    return f"{folder}: is no pipeline ({INDEX} is missing; it holds: {some or 'nothing'}){hint}"


def _pipelines_near(folder: Path) -> Iterator[Path]:
    for candidate in (folder.parent, *sorted(folder.iterdir())):
        if (candidate / INDEX).is_file():
            yield candidate
