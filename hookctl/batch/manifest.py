"""The end of a job: duplicates out of all shards, and what there is, in a list that others load.

manifest.parquet    a row for each record, for `datasets.load_dataset` (with pyarrow installed)
manifest.jsonl      the same
errors.jsonl        what failed, if anything did
manifest.json       what was made of what, and all counts; written last: the job is whole
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.batch.files import commit_json, committed
from hookctl.batch.filters.perceptual import duplicates
from hookctl.batch.plan import Plan
from hookctl.batch.shard import Line, line_of, without

MANIFEST = "manifest.json"
_OWN = ("id", "shard", "task", "candidate", "seed", "source", "edited")


def finish(plan: Plan, out: Path) -> dict[str, Any]:
    """Take duplicates out of the shards, and write the manifest; what it says.

    Doing it again writes the same bytes.
    """
    dropped = _drop(plan, out)
    rejects: Counter[str] = Counter()
    shards, tasks, failed = [], 0, 0
    errors: list[Mapping[str, str]] = []
    for line in _lines(plan, out):
        rejects.update(line["rejects"])
        errors += line["errors"]
        tasks += line["tasks"]
        failed += line["failed"]
        kept = len(line["records"]) - len(line["duplicates"])
        shards.append({key: line[key] for key in ("file", "bytes", "sha256")} | {"records": kept})
    _write_rows(plan, out)
    _write_errors(out / "errors.jsonl", errors)
    manifest = {
        "plan": plan.id,
        "core": dict(plan.core),
        "pairs": len(plan.pairs.rows),
        "tasks": tasks,
        "records": sum(shard["records"] for shard in shards),
        "rejects": dict(sorted(rejects.items())),
        "duplicates": {"prompts": plan.pairs.repeated, "images": dropped},
        "errors": len(errors),
        "failed": failed,
        "shards": shards,
    }
    commit_json(out / MANIFEST, manifest)
    return manifest


def _lines(plan: Plan, out: Path) -> Iterator[Line]:
    """The side-files of all shards, in the order of the plan."""
    for rank in range(plan.shards):
        name = plan.shard(rank).name
        line = line_of(out, name)
        if line is None:
            raise FileNotFoundError(f"{out / name}.json: is gone; run the job again")
        yield line


def _drop(plan: Plan, out: Path) -> int:
    """Rewrite the shards that hold duplicates; how many these are."""
    if plan.job.near is None:
        return 0
    ids, hashes = list[str](), list[str]()
    for line in _lines(plan, out):
        ids += [record["id"] for record in line["records"]]
        hashes += [record["hash"] for record in line["records"]]
    found = {ids[n]: ids[first] for n, first in duplicates(hashes, plan.job.near).items()}
    for line in _lines(plan, out):
        mine = {r["id"]: found[r["id"]] for r in line["records"] if r["id"] in found}
        if mine != line["duplicates"]:
            without(out, line, mine)
    return len(found)


def rows(plan: Plan, out: Path) -> Iterator[dict[str, Any]]:
    """What the manifest says of each record, flat: scores by measure, columns by name, settings as
    JSON."""
    named = _columns(plan)
    measures = [spec.measure for spec in plan.job.filters]
    for line in _lines(plan, out):
        for record in line["records"]:
            if record["id"] in line["duplicates"]:
                continue
            data = record["data"]
            yield {
                **{key: data[key] for key in _OWN if key != "shard"},
                "shard": line["file"],
                "run": _text(data["run"]),
                "settings": _text(data["settings"]),
                "words": _text(data["words"]),
                **{f"score_{name}": data["scores"].get(name) for name in measures},
                **{to: _text(data["columns"].get(name)) for name, to in named.items()},
            }


def _columns(plan: Plan) -> dict[str, str]:
    """The further columns of the pairs, and what they are called in the manifest."""
    names = dict.fromkeys(name for pair in plan.pairs.rows[:1000] for name in pair.columns)
    taken = (*_OWN, "run", "settings", "words")
    return {name: f"pair_{name}" if name in taken else name for name in names}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _write_rows(plan: Plan, out: Path) -> None:
    with committed(out / "manifest.jsonl") as file:
        for row in rows(plan, out):
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    if find_spec("pyarrow") is not None:
        _write_parquet(plan, out)


def _write_parquet(plan: Plan, out: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    whole, number = ("candidate", "seed"), tuple(f"score_{s.measure}" for s in plan.job.filters)
    names = [*_OWN, "run", "settings", "words", *number, *_columns(plan).values()]
    kinds = {**dict.fromkeys(whole, pa.int64()), **dict.fromkeys(number, pa.float64())}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    with committed(out / "manifest.parquet") as file, parquet.ParquetWriter(file, schema) as writer:
        some: list[dict[str, Any]] = []
        for row in rows(plan, out):
            some.append(row)
            if len(some) == 10_000:
                writer.write_table(pa.Table.from_pylist(some, schema))
                some = []
        writer.write_table(pa.Table.from_pylist(some, schema))


def _write_errors(path: Path, errors: list[Mapping[str, str]]) -> None:
    if not errors:
        path.unlink(missing_ok=True)
        return
    with committed(path) as file:
        for error in errors:
            file.write((json.dumps(error, ensure_ascii=False) + "\n").encode())
