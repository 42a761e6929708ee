"""Where weights are: a file, a folder, or what the hub's cache holds of a repository."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from hookctl.errors import InputError

ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_REPOSITORY = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<file>(/[\w.+ -]+)*)")


def located(given: Path | str) -> Path:
    """The file or folder that is meant: a path, "owner/name" or "owner/name/folder/file".

    Nothing is downloaded: of a repository, what is in the cache of huggingface_hub is used. Raises
    InputError that says how to get it if it is not there, FileNotFoundError for a path.
    """
    if not isinstance(given, str | Path) or not str(given).strip():
        raise InputError(f"path_or_repo_id={given!r}; give the path of a file, or owner/name/FILE")
    path = Path(given).expanduser()
    if path.exists():
        return path
    matched = _REPOSITORY.fullmatch(str(given))
    if isinstance(given, Path) or not matched or ".." in PurePosixPath(str(given)).parts:
        raise FileNotFoundError(
            f"{given}: there is no such file; give weights (a safetensors file or one of "
            "torch.save), or a repository as owner/name/FILE"
        )
    return _in_cache(matched["repo"], matched["file"].lstrip("/"))


def _in_cache(repo: str, file: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    get = f"hf download {repo} {file or 'FILE'}"
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputError(
            f"{repo}: there is no such file, and no copy of such a repository in the hub's cache. "
            f"Nothing is downloaded by itself: {get}"
        ) from None
    if file:
        if not (folder / file).exists():
            raise InputError(
                f"{repo}: the hub's cache holds it without {file} ({_held(folder)}). Nothing is "
                f"downloaded by itself: {get}"
            )
        return folder / file
    found = _weights(folder)
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"{repo}: the hub's cache holds no weights of it. Nothing is downloaded by itself: "
            f"{get}"
        )
    raise InputError(f"{repo}: which file? The hub's cache holds {_held(folder)}; give {repo}/FILE")


def _weights(folder: Path) -> list[Path]:
    return sorted(one for one in folder.rglob("*") if one.suffix in ENDINGS)


def _held(folder: Path) -> str:
    found = [one.relative_to(folder).as_posix() for one in _weights(folder)]
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") or "no weights"
