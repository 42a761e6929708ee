"""Where weights are: paths, and repositories in the hub's cache, without any network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from hookctl.errors import InputError
from hookctl.learned.reading.located import located


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one repository; no socket can be opened."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    folder = repo / "snapshots" / ("0" * 40)
    (folder / "models").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40, "utf-8")
    (folder / "models/a.bin").touch()
    (folder / "README.md").touch()
    return folder


def test_a_file_of_a_repository(cache: Path) -> None:
    assert located("owner/name/models/a.bin") == cache / "models/a.bin"
    assert located("owner/name") == cache / "models/a.bin"
    (cache / "b.safetensors").touch()
    with pytest.raises(InputError, match=r"holds b.safetensors, models/a.bin; give owner/name/FI"):
        located("owner/name")
    with pytest.raises(InputError) as raised:
        located("owner/name/c.bin")
    assert str(raised.value) == (
        "owner/name: the hub's cache holds it without c.bin (b.safetensors, models/a.bin). Nothing "
        "is downloaded by itself: hf download owner/name c.bin"
    )


def test_a_repository_that_is_not_there(cache: Path) -> None:
    with pytest.raises(InputError) as raised:
        located("someone/else/sub/a.bin")
    assert str(raised.value) == (
        "someone/else: there is no such file, and no copy of such a repository in the hub's cache. "
        "Nothing is downloaded by itself: hf download someone/else sub/a.bin"
    )
    (cache / "models/a.bin").unlink()
    with pytest.raises(InputError, match="the hub's cache holds no weights of it.*hf download"):
        located("owner/name")


def test_paths(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    assert located("models/a.bin") == Path("models/a.bin")
    for gone in ("a.bin", "./owner/name", "/owner/name", "owner/name/../../x", "../owner/name"):
        with pytest.raises(FileNotFoundError, match="there is no such file; give weights"):
            located(gone)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        located(Path("owner/name"))


@pytest.mark.parametrize("given", [None, 3, ""])
def test_what_is_no_path_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=f"path_or_repo_id={given!r}; give the path of a file"):
        located(given)
