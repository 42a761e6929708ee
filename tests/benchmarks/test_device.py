"""`hookctl bench device` on a CPU: every step of it, at tiny sizes, in the interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hookctl.cli import bench_device, main

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real one")


def few(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Of the items, those whose key begins so."""
    every = bench_device.items
    monkeypatch.setattr(
        bench_device, "items", lambda device: (x for x in every(device) if x.key.startswith(names))
    )


@pytest.mark.long  # every stage, each small
def test_every_stage_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(
        monkeypatch, "kernels: region attention, 128", "steps: tiny regions", "compiled: tiny P2P",
        "tiles: region attention, fp32",
    )  # fmt: skip
    monkeypatch.setattr("hookctl.cli.bench.usable_device", lambda given: CPU)
    assert main(["bench", "device", "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "device.json").read_text())
    page = (tmp_path / "device.md").read_text()
    assert not said["failed"] and not said["left"] and said["tiny"]
    for heading in ("## Kernels", "## Steps", "## Compiled", "## Tiles", "dry run"):
        assert heading in page
    assert "Not reached" not in page and "| tiny regions | eager |" in page


@pytest.mark.long  # all of it, minutes
def test_every_item(tmp_path: Path) -> None:
    found = bench_device.main(tmp_path, CPU, limit=3000)
    assert not found["failed"] and not found["left"]
    assert {key.partition(":")[0] for key in found["items"]} == {
        "kernels", "steps", "compiled", "tiles", "wins",
    }  # fmt: skip


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def item(name: str, fails: bool = False) -> bench_device.Item:
        def run() -> dict[str, Any]:
            ran.append(name)
            if fails and ran.count(name) == 1:
                raise RuntimeError("an illegal memory access")
            return {"error": 0.0, "allowed": 1.0}

        return bench_device.Item("kernels", name, run)

    every = [item("a"), item("b", fails=True), item("c")]
    monkeypatch.setattr(bench_device, "items", lambda device: every)
    found = bench_device.main(tmp_path, CPU, limit=-1)
    assert found["left"] == ["kernels: a", "kernels: b", "kernels: c"] and not ran
    assert "## Not reached" in (tmp_path / "device.md").read_text()
    found = bench_device.main(tmp_path, CPU)
    assert ran == ["a", "b", "c"] and "illegal" in found["failed"]["kernels: b"]
    assert "## Failed" in (tmp_path / "device.md").read_text()
    found = bench_device.main(tmp_path, CPU)
    assert ran == ["a", "b", "c", "b"] and not found["failed"] and not found["left"]
    # Of another device, or other versions, nothing is taken over.
    said = json.loads((tmp_path / "device.json").read_text())
    (tmp_path / "device.json").write_text(json.dumps(said | {"place": "another"}))
    bench_device.main(tmp_path, CPU)
    assert ran[4:] == ["a", "b", "c"]
