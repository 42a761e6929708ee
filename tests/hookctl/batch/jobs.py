"""Jobs for tests: a few pairs of the embedded world, drawn in two steps; and a run that draws
nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hookctl.batch import Outcome, Plan, Record, Task, Work, description, read_job, read_pairs
from hookctl.batch.filters.perceptual import pair_hash
from hookctl.cli.known import editors_by_name, measures_by_name
from hookctl.cli.stacks import stack_file
from hookctl.preset import preset_of

PAIRS = [
    {
        "source": f"a {colour} circle above a {other} square",
        "edited": f"a {new} circle above a {other} square",
        "instruction": f"make the circle {new}",
        "object": "circle",
    }
    for colour, new, other in (
        ("red", "green", "blue"),
        ("blue", "yellow", "red"),
        ("green", "blue", "yellow"),
        ("yellow", "red", "green"),
        ("red", "blue", "green"),
        ("blue", "green", "yellow"),
    )
]
JOB = """
stack = "prompt_to_prompt"
[pairs]
file = "pairs.jsonl"
words = "object"
seeds = {seeds}
[candidates]
count = {count}
[shards]
tasks = {tasks}
{shards}
[run]
steps = 2
[vary.PromptToPrompt]
cross_replace = {{ uniform = [0.5, 0.9] }}
{more}
"""


def write_pairs(folder: Path, pairs: list[dict[str, Any]] = PAIRS) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), "utf-8")
    return path


def write_job(
    folder: Path,
    pairs: list[dict[str, Any]] = PAIRS,
    *,
    seeds: Any = 1,
    count: int = 1,
    tasks: int = 2,
    shards: str = "",
    more: str = "",
) -> Path:
    """A job over these pairs; shards, more: further lines of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder, pairs)
    path = folder / "job.toml"
    text = JOB.format(seeds=seeds, count=count, tasks=tasks, shards=shards, more=more)
    path.write_text(text, "utf-8")
    return path


def planned(path: Path) -> tuple[Plan, Work]:
    """The plan of a job, and what its tasks have in common."""
    job = read_job(path, stack_file, measures_by_name())
    preset = preset_of(job.stack, editors_by_name())
    core = description(job, preset, "shapes", device="cpu", dtype="float32")
    plan = Plan(job, read_pairs(job.pairs, job.source, job.edited, job.columns), core)
    return plan, Work(job, preset, plan.core_id, measures_by_name())


def unlike_any(task: Task, pipe: Any, work: Work) -> Outcome:
    """In place of `run`: a record of noise that hangs on the task's id alone."""
    noise = hashlib.shake_256(task.id.encode()).digest(16 * 16 * 3)
    image = Image.frombytes("RGB", (16, 16), noise)
    data = {
        "id": f"{task.id}-0",
        "task": task.id,
        "source": task.pair.source,
        "edited": task.pair.edited,
        "columns": dict(task.pair.columns),
        "candidate": 0,
        "seed": task.draws[0].seed,
        "settings": {},
        "run": {"steps": 2},
        "words": [[], []],
        "scores": {},
    }
    files = {"source.png": noise[:100], "edited.png": noise[100:200]}
    return Outcome((Record(f"{task.id}-0", files, data, pair_hash(image, image)),))


def tars(folder: Path) -> dict[str, str]:
    """By name the SHA-256 of the shards and of the manifests in a folder."""
    files = [*folder.glob("*.tar"), folder / "manifest.jsonl", folder / "manifest.json"]
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(files)}
