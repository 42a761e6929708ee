"""Pairs of prompts, from a JSONL, CSV or Parquet file: a row each, further columns come along."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.errors import InputError
from hookctl.preset.check import near, shown

FORMATS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Pair:
    """The prompt of an image and of its edit; columns: what else its row says."""

    source: str
    edited: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[str, str]:
        return self.source, self.edited


@dataclass(frozen=True)
class Pairs:
    """What a file holds, each pair once.

    rows: in the order of the file; repeated: how many rows were left out, since their prompts were
    there already (case and spaces don't count); sha256: of the file.
    """

    rows: tuple[Pair, ...]
    repeated: int
    sha256: str


def read_pairs(
    path: Path, source: str = "source", edited: str = "edited", needed: Iterable[str] = ()
) -> Pairs:
    """Read a file.

    source, edited: the columns of the prompts; needed: further columns that every row must have.
    Raises FileNotFoundError, and InputError, with the row, for what is no pair of prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"pairs {path}: there is no such file; give JSONL, CSV or Parquet")
    if path.suffix not in FORMATS:
        raise InputError(f"pairs {path}: is no {', '.join(FORMATS)} file; give one of these")
    wanted = list(dict.fromkeys((source, edited, *needed)))
    rows: list[Pair] = []
    seen: set[bytes] = set()
    repeated = 0
    for where, row in _rows(path):
        _check(row, wanted, (source, edited), where)
        others = {k: v for k, v in row.items() if k not in (source, edited)}
        pair = Pair(row[source].strip(), row[edited].strip(), others)
        key = _key(pair)
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        rows.append(pair)
    if not rows:
        raise InputError(f"pairs {path}: holds no row; give at least one pair of prompts")
    return Pairs(tuple(rows), repeated, hashlib.sha256(path.read_bytes()).hexdigest())


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each row."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                    yield f"pairs {path} row {number}", row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"pairs {path} line {number}", _json(line, f"pairs {path} line {number}")
    except UnicodeDecodeError:
        raise InputError(f"pairs {path}: is not text in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"pairs {path}: can't be read as CSV ({error})") from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if find_spec("pyarrow") is None:
        raise InputError(
            f"pairs {path}: Parquet needs the package pyarrow; pip install 'hookctl[parquet]', or "
            "give JSONL or CSV"
        )
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for some in file.iter_batches():
                for row in some.to_pylist():
                    number += 1
                    yield f"pairs {path} row {number}", row
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"pairs {path}: can't be read as Parquet ({reason})") from None


def _check(row: Any, wanted: list[str], prompts: tuple[str, str], where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {shown(row)} is no row with columns")
    if None in row:  # where DictReader keeps what goes beyond the header
        raise InputError(f"{where}: has more values than the header has columns")
    for name in wanted:
        if row.get(name) is None:
            held = [key for key, value in row.items() if value is not None]
            raise InputError(
                f"{where}: has no {name!r}{near(name, held)}; there are: {', '.join(held)}"
            )
    for name in prompts:
        text = row[name]
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise InputError(f"{where}: {name} = {shown(text)}; give a prompt with words")


def _key(pair: Pair) -> bytes:
    """What makes two pairs the same."""
    texts = [" ".join(text.casefold().split()) for text in pair.prompts]
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()[:12]
