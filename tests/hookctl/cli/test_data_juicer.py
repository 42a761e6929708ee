"""The data-juicer operator, on a stand-in of the two names that it takes from there."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import hookctl
from hookctl.batch import run, tasks_of
from hookctl.batch.plan import Plan
from hookctl.cli import loading
from hookctl.errors import InputError
from tests.hookctl.batch.jobs import PAIRS, planned, write_job


class Registry:
    """As data-juicer's: classes by name."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def register_module(self, name: str) -> Any:
        return lambda found: self.classes.setdefault(name, found)


class Mapper:
    """What data-juicer's gives an operator: the key of a sample's images."""

    def __init__(self, image_key: str = "images", **_: Any) -> None:
        self.image_key = image_key


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    registry = Registry()
    base: Any = ModuleType("data_juicer.ops.base_op")
    base.OPERATORS, base.Mapper = registry, Mapper
    for name in ("data_juicer", "data_juicer.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    importlib.import_module("hookctl.cli.data_juicer")
    yield registry
    del sys.modules["hookctl.cli.data_juicer"]


def test_a_sample_is_drawn_as_a_job_draws_it(
    operators: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records and bytes are those of the task of the same pair."""
    pipe = hookctl.load_shapes(device="cpu")
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipe)
    job = write_job(tmp_path, PAIRS[:1], seeds=2)
    mapper = operators.classes["hookctl_pair_mapper"](
        str(job), str(tmp_path / "pairs"), model="shapes", device="cpu"
    )
    sample = mapper.process_single(dict(PAIRS[0], images=[]))
    assert {key: sample[key] for key in PAIRS[0]} == PAIRS[0]
    assert len(sample["images"]) == 4 and len(sample["pairs"]) == 2
    work, core = mapper.opened[0], mapper.opened[0].core_id
    plan = Plan(work.job, planned(job)[0].pairs, {})
    tasks = tasks_of(work.job, core, plan.shard(0))
    for task, said, i in zip(tasks, sample["pairs"], (0, 2), strict=True):
        (record,) = run(task, pipe, work).records
        told = json.loads(said)
        assert told == {"records": [record.data], "rejects": {}, "errors": []}
        names = ("source.png", "edited.png")
        files = [Path(path) for path in sample["images"][i : i + 2]]
        assert [file.name for file in files] == [f"{record.id}.{name}" for name in names]
        assert [file.read_bytes() for file in files] == [record.files[name] for name in names]
        assert Image.open(files[0]).size == (128, 128)


def test_a_job_that_is_wrong_is_told_at_once(operators: Registry, tmp_path: Path) -> None:
    mapper = operators.classes["hookctl_pair_mapper"]
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        mapper(str(write_job(tmp_path)), str(tmp_path), model="nowhere")
    with pytest.raises(InputError, match="edited"):
        made = mapper(str(write_job(tmp_path)), str(tmp_path), model="shapes")
        made.process_single({"source": "a red circle"})
