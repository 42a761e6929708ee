"""A record drawn again from what is written of it, and compared bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookctl.batch.files import samples
from hookctl.batch.job.pairs import Pair
from hookctl.batch.plan import Draw, Task
from hookctl.batch.run import Work, draw, files_of
from hookctl.errors import InputError


@dataclass(frozen=True)
class Found:
    """A record in a folder: its data, its files by their ending."""

    folder: Path
    data: Mapping[str, Any]
    files: Mapping[str, bytes]


def find(id: str, folders: list[Path]) -> Found:
    """The record of an id; InputError if no folder's shards hold it."""
    for folder in folders:
        for side in sorted(folder.glob("*-of-*.json")):
            if f'"{id}"' not in side.read_text("utf-8"):
                continue
            line = json.loads(side.read_text("utf-8"))
            if id in line["duplicates"]:
                raise InputError(
                    f"{id} was a duplicate of {line['duplicates'][id]}, and is not in the set"
                )
            for key, files in samples(folder / line["file"]):
                if key == id:
                    return Found(folder, json.loads(files.pop("json")), files)
    where = ", ".join(map(str, folders)) or "out/batch-*"
    raise InputError(f"there is no record {id} in {where}; give an id of a manifest, and --out DIR")


def replay(found: Found, pipe: Any, work: Work) -> dict[str, bytes]:
    """The files of a record, drawn again; work: of its job."""
    data = found.data
    pair = Pair(data["source"], data["edited"], data["columns"])
    one = Draw(data["candidate"], data["seed"], data["settings"])
    drawn, _ = draw(Task(data["task"], 0, pair, (one,)), one, pipe, work)
    return files_of(drawn, work.job)


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Of two descriptions of a job what differs, in words: versions one by one."""
    found = []
    for key in then:
        if key == "versions":
            names = {**then[key], **now.get(key, {})}
            found += [
                f"{name} {then[key].get(name, 'none')} then, {now[key].get(name, 'none')} now"
                for name in names
                if then[key].get(name) != now[key].get(name)
            ]
        elif then[key] != now.get(key):
            found.append(key)
    return found
