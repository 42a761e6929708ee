"""A job as its file says it: which pairs of prompts, under which stack, what is kept of it.

    stack = "prompt_to_prompt"      # a stack's name or file; or [[editor]] tables here

    [pairs]
    file = "pairs.jsonl"            # or .csv, .parquet; beside this file
    source = "source"               # its columns
    edited = "edited"
    words = "object"                # a column: whose places may change (default: words that differ)
    seeds = 2                       # how many noises a pair; or a list, the same for all pairs

    [candidates]
    count = 4                       # draws of each noise, with settings sampled anew
    keep = 1                        # at most so many of those that pass
    best = "background"             # the measure that says which; default: the first that pass

    [shards]
    tasks = 100                     # pairs x seeds of a shard
    maps = true                     # write word maps and masks too
    near = 4                        # bits of 384 within which images are duplicates; false: keep
    threads = 1                     # of torch on a CPU: other numbers, other bits

    [run]                           # before what the stack's own [run] says
    steps = 25

    [vary.PromptToPrompt]           # see `hookctl.batch.job.vary`
    self_replace = { uniform = [0.1, 0.9] }

    [[filter]]                      # in this order; see `hookctl.batch.filters.measures`
    measure = "background"
    min = 25.0

No torch is needed to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hookctl import bounds
from hookctl.batch.filters.specs import FilterSpec, read_filters
from hookctl.batch.job.vary import Varied, read_varied
from hookctl.errors import InputError
from hookctl.preset import RawStack, existing, parsed, stack_of
from hookctl.preset.check import check_keys, shown, typed

_OF_STACK = ("model", "lora", "hook", "run", "inversion", "program", "editor")
_OF_JOB = ("stack", "pairs", "candidates", "shards", "vary", "filter")
_PAIRS: Mapping[str, Any] = {
    "file": str,
    "source": str,
    "edited": str,
    "words": str | list[str],
    "seeds": int | list[int],
}
_CANDIDATES: Mapping[str, Any] = {"count": int, "keep": int, "best": str}
_SHARDS: Mapping[str, Any] = {"tasks": int, "maps": bool, "near": bool | int, "threads": int}
_RUN_OF_PAIRS = {
    "prompt": "prompts come from [pairs] file",
    "edit": "prompts come from [pairs] file",
    "seed": "write seeds = in [pairs]",
    "images": "write count = in [candidates]",
}


@dataclass(frozen=True)
class Job:
    """What a file says; see this module's head."""

    path: Path
    stack: RawStack
    model: str | None
    pairs: Path
    source: str = "source"
    edited: str = "edited"
    words: tuple[str, str] | None = None
    seeds: int | tuple[int, ...] = 1
    candidates: int = 1
    keep: int = 1
    best: str | None = None
    tasks: int = 100
    maps: bool = True
    near: int | None = 4
    threads: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Mapping[str, Varied]] = field(default_factory=dict)
    filters: tuple[FilterSpec, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that words and settings are read from."""
        every = [varied for table in self.vary.values() for varied in table.values()]
        named = [name for varied in every for name in varied.columns()]
        return [*dict.fromkeys([*(self.words or ()), *named])]


def read_job(
    path: Path | str,
    find_stack: Callable[[str], Path] = Path,
    measures: Iterable[str] = (),
) -> Job:
    """Read a job.

    find_stack: from a stack's name to its file; measures: names that filters may use besides those
    of `hookctl.batch.filters.specs`. Raises FileNotFoundError if a file is not there,
    and InputError, with the file, the key and what would do, for anything in it that is wrong.
    """
    raw = parsed(existing(Path(path), "a job"), "a job")
    with raw.naming():
        check_keys(raw.data, (*_OF_JOB, *_OF_STACK), str(raw.path), "a job")
        own = stack_of(replace(raw, data={k: v for k, v in raw.data.items() if k in _OF_STACK}))
        stack = _stack(raw, own, find_stack)
        job = Job(raw.path, stack, own.model or stack.model, Path(), run=_run(own, stack))
        job = _pairs(job, raw.data.get("pairs"))
        job = _candidates(job, raw.data.get("candidates", {}))
        job = _shards(job, raw.data.get("shards", {}))
        filters = read_filters(raw.data.get("filter", []), str(raw.path), measures)
        job = replace(job, vary=_vary(job, raw.data.get("vary", {})), filters=filters)
    if job.best is not None and job.best not in [one.measure for one in filters]:
        raise InputError(
            f"{job.path}: [candidates] best = {job.best!r} is no measure of a [[filter]]; there "
            f"are: {', '.join(one.measure for one in filters) or 'none'}"
        )
    return job


def _stack(raw: RawStack, own: RawStack, find_stack: Callable[[str], Path]) -> RawStack:
    """The stack: the file's own tables, or those of the file that it names."""
    named = raw.data.get("stack")
    if named is None:
        if "editor" not in raw.data and not own.hooks:
            raise InputError(
                f'{raw.path}: which stack? Write stack = "recolour", a file, or [[editor]] tables'
            )
        return own
    name = typed(named, str, f"{raw.path}: stack")
    for key in ("editor", "lora", "hook"):
        if key in raw.data:
            raise InputError(f"{raw.path}: both stack = {name!r} and [[{key}]] are given; keep one")
    beside = raw.path.parent / name
    found = beside if Path(name).suffix and beside.exists() else find_stack(name)
    return stack_of(parsed(existing(found)))


def _run(own: RawStack, stack: RawStack) -> dict[str, Any]:
    """The settings of every draw, the job's before the stack's."""
    for key, instead in _RUN_OF_PAIRS.items():
        if key in own.run:
            raise InputError(f"{own.path}: [run] {key} has no place in a job; {instead}")
    both = {**stack.run, **own.run}
    return {key: value for key, value in both.items() if key not in _RUN_OF_PAIRS}


def _pairs(job: Job, table: Any) -> Job:
    where = f"{job.path}: [pairs]"
    if table is None:
        raise InputError(f'{where} is missing; write [pairs] file = "pairs.jsonl"')
    said = _typed(table, _PAIRS, where)
    if "file" not in said:
        raise InputError(f"{where}: needs file (a text), such as pairs.jsonl")
    seeds = said.get("seeds", 1)
    each = [seeds] if isinstance(seeds, int) else seeds
    least, most = (1, bounds.COUNT) if isinstance(seeds, int) else (0, bounds.SEED)
    if not each or not all(least <= seed <= most for seed in each) or len(set(each)) < len(each):
        raise InputError(
            f"{where} seeds = {shown(seeds)}; give how many, a whole number >= 1, or a list of "
            "seeds, each once"
        )
    words = said.get("words")
    if isinstance(words, str):
        words = [words, words]
    if words is not None and len(words) != 2:
        raise InputError(
            f"{where} words = {shown(words)}; give the column of the words whose places may "
            "change, or a list of two: of the source's and of the edited prompt's"
        )
    return replace(
        job,
        words=None if words is None else (words[0], words[1]),
        pairs=job.path.parent / said["file"],
        source=said.get("source", job.source),
        edited=said.get("edited", job.edited),
        seeds=seeds if isinstance(seeds, int) else tuple(seeds),
    )


def _candidates(job: Job, table: Any) -> Job:
    where = f"{job.path}: [candidates]"
    said = _typed(table, _CANDIDATES, where)
    count, keep = said.get("count", 1), said.get("keep", 1)
    _check_whole(count, f"{where} count", 1, bounds.IMAGES)
    _check_whole(keep, f"{where} keep", 1, count)
    return replace(job, candidates=count, keep=keep, best=said.get("best"))


def _shards(job: Job, table: Any) -> Job:
    where = f"{job.path}: [shards]"
    said = _typed(table, _SHARDS, where)
    near = said.pop("near", job.near)
    if near is not False:
        _check_whole(near, f"{where} near", 0, 64)
    _check_whole(said.get("tasks", 1), f"{where} tasks", 1, bounds.COUNT)
    _check_whole(said.get("threads", 1), f"{where} threads", 1, 1024)
    return replace(job, near=None if near is False else near, **said)


def _vary(job: Job, tables: Any) -> dict[str, dict[str, Varied]]:
    where = f"{job.path}: [vary]"
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise InputError(f"{where}: {shown(tables)}; write a table for each editor: [vary.FreeU]")
    for key in tables.get("run", {}):
        if key in _RUN_OF_PAIRS:
            raise InputError(f"{where} run {key} has no place in a job; {_RUN_OF_PAIRS[key]}")
    return {
        owner: {key: read_varied(value, f"{where} {owner}.{key}") for key, value in table.items()}
        for owner, table in tables.items()
    }


def _typed(table: Any, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise InputError(f"{where}: {shown(table)} given; a table expected")
    check_keys(table, hints, where, where.rpartition(" ")[2])
    return {key: typed(value, hints[key], f"{where} {key}") for key, value in table.items()}


def _check_whole(value: Any, where: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{where} = {shown(value)}; give a whole number from {least} to {most}")
