"""One task on the embedded pipeline: pure, filtered, ranked, and drawn again bit by bit."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hookctl
from hookctl.batch import FilterSpec, Outcome, Task, Work, run, tasks_of
from hookctl.batch.cost import measured_cost
from hookctl.batch.replay import Found, differing, replay
from hookctl.batch.run import calm, draw
from hookctl.recipes import PromptToPrompt
from tests.hookctl.batch.jobs import PAIRS, planned, write_job


@pytest.fixture(scope="module")
def pipe() -> Any:
    return hookctl.load_shapes(device="cpu")


def first(path: Path) -> tuple[Task, Work]:
    plan, work = planned(path)
    return tasks_of(plan.job, plan.core_id, plan.shard(0))[0], work


def noted(work: Work, *measures: str, **fields: Any) -> Work:
    """The work, with filters that only note, and other fields of the job."""
    filters = tuple(FilterSpec(measure) for measure in measures)
    return replace(work, job=replace(work.job, filters=filters, **fields))


@pytest.mark.slow
def test_a_task_is_a_function(tmp_path: Path, pipe: Any) -> None:
    """The same bytes, whatever was drawn before and whatever state torch is in."""
    task, work = first(write_job(tmp_path))
    with calm(pipe, 1):
        one = run(task, pipe, work)
        torch.manual_seed(5)
        pipe("a red circle", num_inference_steps=1)
        again = run(task, pipe, work)
    assert not one.errors and one == again
    (record,) = one.records
    assert list(record.files) == ["source.png", "edited.png", "mask.png", "maps.npy"]
    assert record.data["source"] == PAIRS[0]["source"] and record.data["words"] == [["circle"]] * 2
    assert json.loads(json.dumps(record.data)) == record.data
    maps = np.load(io.BytesIO(record.files["maps.npy"]))
    assert maps.shape == (2, 16, 16) and maps.dtype == np.float16 and 0 < maps.max() <= 1
    assert Image.open(io.BytesIO(record.files["mask.png"])).size == (128, 128)


@pytest.mark.slow
def test_it_draws_what_its_stack_draws(tmp_path: Path, pipe: Any) -> None:
    """Bit-equal to the recipe called by hand with the settings that the record names."""
    task, work = first(write_job(tmp_path))
    with calm(pipe, 1):
        (record,) = run(task, pipe, work).records
        settings = record.data["settings"]["PromptToPrompt"]
        assert 0.5 <= settings["cross_replace"] <= 0.9
        edit = PromptToPrompt(list(task.pair.prompts), self_replace=0.4, **settings)
        with hookctl.control(pipe, edit):
            images = pipe(
                edit.prompts,
                num_inference_steps=2,
                guidance_scale=5.0,
                generator=edit.generators(seed=record.data["seed"]),
            ).images
    for name, image in zip(("source.png", "edited.png"), images, strict=True):
        written = np.asarray(Image.open(io.BytesIO(record.files[name])))
        assert np.array_equal(written, np.asarray(image))


@pytest.mark.slow
def test_a_record_is_drawn_again(tmp_path: Path, pipe: Any) -> None:
    """Any candidate by itself, from what is written of it alone."""
    task, work = first(write_job(tmp_path, count=2))
    work = noted(work, "change", keep=2)
    with calm(pipe, 1):
        records = run(task, pipe, work).records
        assert [record.id for record in records] == [f"{task.id}-0", f"{task.id}-1"]
        assert records[0].files["source.png"] != records[1].files["source.png"]
        found = Found(tmp_path, json.loads(json.dumps(records[1].data)), records[1].files)
        assert replay(found, pipe, work) == records[1].files


@pytest.mark.slow
def test_the_best_are_kept(tmp_path: Path, pipe: Any) -> None:
    task, work = first(write_job(tmp_path, count=3))
    with calm(pipe, 1):
        every = run(task, pipe, noted(work, "change", keep=3)).records
        scores = sorted((record.data["scores"]["change"] for record in every), reverse=True)
        best = run(task, pipe, noted(work, "change", best="change"))
        assert [one.data["scores"]["change"] for one in best.records] == scores[:1]
        assert best.rejects == {"not the best": 2}
        bound = replace(noted(work, keep=3).job, filters=(FilterSpec("change", scores[1]),))
        some = run(task, pipe, replace(work, job=bound))
    assert len(some.records) == 2 and sum(some.rejects.values()) == 1


@pytest.mark.slow
def test_an_error_is_kept_and_harms_nobody(tmp_path: Path, pipe: Any) -> None:
    """A prompt that the stack can't edit, a measure that breaks: told, and the next is as ever."""
    bad = PAIRS[0] | {"object": "dog"}
    task, work = first(write_job(tmp_path / "bad", [bad, *PAIRS]))
    good, _ = first(write_job(tmp_path / "good"))
    with calm(pipe, 1):
        before = run(good, pipe, work)
        failed = run(task, pipe, work)
        assert run(good, pipe, work) == before
    assert not failed.records and not failed.rejects
    (error,) = failed.errors
    assert error["id"] == f"{task.id}-0" and "'dog'" in error["error"]

    def broken(drawn: object) -> float:
        raise ZeroDivisionError("by zero")

    odd = replace(noted(work, "mine"), further={"mine": broken})
    with calm(pipe, 1):
        outcome: Outcome = run(good, pipe, odd)
    assert outcome.errors[0]["error"] == "ZeroDivisionError: by zero"


@pytest.mark.slow
def test_words_that_differ_are_found(tmp_path: Path, pipe: Any) -> None:
    path = write_job(tmp_path)
    path.write_text(path.read_text("utf-8").replace('words = "object"', ""), "utf-8")
    task, work = first(path)
    with calm(pipe, 1):
        drawn, settings = draw(task, task.draws[0], pipe, work)
    assert [list(maps) for maps in drawn.maps] == [["red"], ["green"]]
    assert settings == {"steps": 2, "guidance": 5.0}


@pytest.mark.slow
def test_a_cost_is_measured(tmp_path: Path, pipe: Any) -> None:
    plan, work = planned(write_job(tmp_path, seeds=4, count=3))
    cost = measured_cost(plan, work, pipe)
    assert (cost.tasks, cost.shards, cost.shard_tasks, cost.draws) == (24, 12, 2, 3)
    assert cost.step_seconds is not None and cost.draw_seconds is not None
    assert cost.task_seconds == pytest.approx(3 * (cost.draw_seconds + 2 * cost.step_seconds))
    assert cost.seconds == pytest.approx(24 * cost.task_seconds)
    assert 1e4 < cost.record_bytes < 1e5


def test_what_changed_since_is_named() -> None:
    then = {"model": "a", "versions": {"torch": "1", "numpy": "2"}, "dtype": "float32"}
    now = {"model": "b", "versions": {"torch": "3", "numpy": "2"}, "dtype": "float32"}
    assert differing(then, now) == ["model", "torch 1 then, 3 now"]
