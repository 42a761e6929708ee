"""What determines the images of a job, as data and as a hash: the same hash, the same bits.

On one kind of device, that is: other devices round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hookctl

if TYPE_CHECKING:
    from hookctl.batch.job.spec import Job
    from hookctl.preset import Preset

_DECIDING = ("torch", "diffusers", "transformers", "numpy", "pillow", "scipy", "peft")
_LETTERS = frozenset("0123456789abcdef")


def digest(data: Any) -> str:
    """SHA-256 of data in their one JSON form, 64 hex digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str]:
    """The versions that decide about an image, from what is installed: nothing is imported."""
    found = {"hookctl": hookctl.__version__, "python": platform.python_version()}
    for name in _DECIDING:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(path: Path) -> str:
    """A hash of the files of a model's folder, or of a file of weights; their place is none of it.

    A file that the hub's cache holds under its SHA-256 is not read again.
    """
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(path).as_posix() if file != path else "" for file in files]
    said = {name: _sha256(file) for name, file in zip(names, files, strict=True)}
    shown = {k: v for k, v in said.items() if not k.startswith(".") and not k.endswith(".md")}
    return digest(shown)


def _sha256(file: Path) -> str:
    name = file.resolve().name
    if file.is_symlink() and len(name) == 64 and _LETTERS >= set(name):
        return name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def description(job: Job, preset: Preset, model: str, *, device: str, dtype: str) -> dict[str, Any]:
    """All that determines what a task of a job makes, beside its pair and its seed.

    model: the fingerprint; device: its kind, such as "cuda"; dtype: of the weights. What is
    returned is as JSON would give it back.
    """
    said = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "threads": job.threads if device == "cpu" else None,
        "editors": [{"recipe": one.recipe, **one.arguments} for one in preset.specs],
        "loras": [[fingerprint(one.path), one.weight] for one in preset.loras],
        "hooks": [[_file(one.path), one.strength, _files(one.arguments)] for one in preset.hooks],
        "words": job.words,
        "run": dict(job.run),
        "seeds": "of the pair" if isinstance(job.seeds, int) else "given",
        "vary": {
            owner: {key: {one.kind: one.value} for key, one in table.items()}
            for owner, table in job.vary.items()
        },
        "candidates": [job.candidates, job.keep, job.best],
        "filters": [_files(one.data()) for one in job.filters],
        "maps": job.maps,
        "versions": versions(),
    }
    found: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return found


def _files(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _file(value) for key, value in values.items()}


def _file(value: Any) -> Any:
    """A file or folder as what it holds, anything else as it stands."""
    if isinstance(value, str) and len(value) < 1000 and "\0" not in value and Path(value).exists():
        return fingerprint(Path(value))
    return value
