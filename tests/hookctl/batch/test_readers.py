"""What is written is read by those for whom it is written."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hookctl.batch import Outcome, Task, Work, run_job
from tests.hookctl.batch.jobs import planned, unlike_any, write_job


def test_others_read_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`webdataset` and `datasets` where they are installed; the tar module anywhere."""
    path, out = write_job(tmp_path, tasks=4), tmp_path / "out"
    monkeypatch.setattr("hookctl.batch.shard.run", _with_images)
    plan, work = planned(path)
    manifest = run_job(plan, work, out, lambda: None)
    files = [str(out / shard["file"]) for shard in manifest["shards"]]
    with tarfile.open(files[0]) as tar:
        names = tar.getnames()
    assert len(names) == 12 and all(name.partition(".")[0].endswith("-0") for name in names)
    try:
        import datasets
        import webdataset
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    found = [*webdataset.WebDataset(files, shardshuffle=False).decode("pil")]
    assert len(found) == 6 and found[0]["source.png"].size == (16, 16)
    rows = datasets.load_dataset(
        "parquet", data_files=str(out / "manifest.parquet"), split="train", cache_dir=tmp_path
    )
    assert rows.num_rows == 6 and rows[0]["id"] == found[0]["__key__"]
    tables = datasets.load_dataset(
        "webdataset", data_files=files, split="train", cache_dir=tmp_path
    )
    assert tables[0]["edited.png"].size == (16, 16) and tables[0]["json"]["id"] == rows[0]["id"]


def _with_images(task: Task, pipe: Any, work: Work) -> Outcome:
    outcome = unlike_any(task, pipe, work)
    held = io.BytesIO()
    Image.new("RGB", (16, 16), (task.number, 0, 0)).save(held, "PNG")
    files = {"source.png": held.getvalue(), "edited.png": held.getvalue()}
    return replace(outcome, records=(replace(outcome.records[0], files=files),))
