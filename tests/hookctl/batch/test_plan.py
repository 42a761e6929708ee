"""A plan is a function of its job: the same tasks everywhere, others when anything differs."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from hookctl.batch import Plan, Task, tasks_of
from hookctl.batch.identity import fingerprint
from tests.hookctl.batch.jobs import PAIRS, planned, write_job


def tasks(plan: Plan) -> list[Task]:
    return [
        task
        for rank in range(plan.shards)
        for task in tasks_of(plan.job, plan.core_id, plan.shard(rank))
    ]


def test_the_same_job_makes_the_same_tasks(tmp_path: Path) -> None:
    one, _ = planned(write_job(tmp_path / "a", seeds=2, count=3, tasks=5))
    other, _ = planned(write_job(tmp_path / "b", seeds=2, count=3, tasks=5))
    assert tasks(one) == tasks(other) and one.id == other.id
    assert len(one) == 12 and one.shards == 3 and len(tasks(one)) == 12
    assert [task.number for task in tasks(one)] == list(range(12))
    assert len({task.id for task in tasks(one)}) == 12


def test_shards_can_be_sent(tmp_path: Path) -> None:
    """A shard and what its tasks have in common are all that a worker needs."""
    plan, work = planned(write_job(tmp_path, seeds=3, tasks=4))
    for rank in range(plan.shards):
        shard = pickle.loads(pickle.dumps(plan.shard(rank)))
        sent = pickle.loads(pickle.dumps(work))
        here = tasks_of(sent.job, sent.core_id, shard)
        assert here == [t for t in tasks(plan) if shard.first <= t.number < shard.last]
        assert len(shard.pairs) <= 3


def test_shards_are_no_part_of_a_task(tmp_path: Path) -> None:
    few, _ = planned(write_job(tmp_path / "a", tasks=2))
    many, _ = planned(write_job(tmp_path / "b", tasks=5))
    assert tasks(few) == tasks(many) and few.id != many.id
    assert few.shard(0).name != many.shard(0).name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps = 2", "steps = 3"),
        ("0.9] }", "0.8] }"),
        ("count = 1", "count = 2"),
        ("tasks = 2", "maps = false"),
        ("tasks = 2", "threads = 2"),
        ('stack = "prompt_to_prompt"', 'stack = "refine"'),
        ("seeds = 1", "seeds = [1]"),
        ("[run]", '[[filter]]\nmeasure = "change"\n[run]'),
    ],
)
def test_whatever_decides_the_bits_decides_the_id(tmp_path: Path, old: str, new: str) -> None:
    path = write_job(tmp_path)
    plan, _ = planned(path)
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    other, _ = planned(path)
    assert not {task.id for task in tasks(plan)} & {task.id for task in tasks(other)}
    assert plan.id != other.id


@pytest.mark.parametrize("key", ["model", "device", "dtype", "versions"])
def test_so_do_model_and_versions(tmp_path: Path, key: str) -> None:
    plan, _ = planned(write_job(tmp_path))
    other = replace(plan, core={**plan.core, key: "another"})
    assert not {task.id for task in tasks(plan)} & {task.id for task in tasks(other)}


def test_other_rows_of_a_file_do_not_matter(tmp_path: Path) -> None:
    plan, _ = planned(write_job(tmp_path / "a"))
    fewer, _ = planned(write_job(tmp_path / "b", PAIRS[::-1][:3]))
    assert {task.id for task in tasks(fewer)} < {task.id for task in tasks(plan)}


def test_noises_are_a_pairs_own_unless_they_are_given(tmp_path: Path) -> None:
    own, _ = planned(write_job(tmp_path / "a", seeds=2, count=2))
    seeds = [draw.seed for task in tasks(own) for draw in task.draws]
    assert len(set(seeds)) == len(seeds) == 24 and max(seeds) < 2**32
    given, _ = planned(write_job(tmp_path / "b", seeds="[7, 8]"))
    assert [task.draws[0].seed for task in tasks(given)] == [7, 8] * 6


def test_a_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("{}")
    (tmp_path / "b" / "README.md").write_text("a card")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "unet" / "config.json").write_text("{ }")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_a_file_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("5" * 64)
    blob.write_text("one")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    before = fingerprint(tmp_path / "snapshot")
    blob.write_text("not read")
    assert fingerprint(tmp_path / "snapshot") == before
