"""Files that are whole or not there, also after a power cut; and tars whose bytes say only what is
in them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import socket
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hookctl.errors import InputError

_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())[:40]
_PART = re.compile(r"\..+\.part-(?P<host>[\w-]+)-(?P<pid>\d+)")
_OLD = 24 * 3600.0  # seconds, from which on a part of another host is nobody's


@contextmanager
def committed(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place when all of it is on the disk."""
    part = path.with_name(f".{path.name}.part-{_HOST}-{os.getpid()}")
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def commit_json(path: Path, data: Any) -> None:
    with committed(path) as file:
        file.write((json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; InputError if it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: can't be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def _sync(folder: Path) -> None:
    with suppress(OSError):  # systems that have no handles of folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the parts that killed processes left."""
    for path in folder.glob(".*.part-*"):
        found = _PART.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            mine = found["host"] == _HOST
            gone = not _lives(int(found["pid"])) if mine else False
            if gone or time.time() - path.stat().st_mtime > _OLD:
                path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def sha256(file: IO[bytes]) -> str:
    file.seek(0)
    found = hashlib.sha256()
    while some := file.read(2**20):
        found.update(some)
    return found.hexdigest()


@contextmanager
def tar_into(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        yield tar


def add_sample(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    """Add the files of a sample: without times and owners, so that bytes depend on content only."""
    for ending, content in files.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, files by ending) of each sample of a tar, in its order."""
    key, files = "", dict[str, bytes]()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name, _, ending = member.name.partition(".")
            held = tar.extractfile(member)
            if name != key and files:
                yield key, files
                files = {}
            key = name
            files[ending] = held.read() if held is not None else b""
    if files:
        yield key, files
