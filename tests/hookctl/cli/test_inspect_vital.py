"""`hookctl inspect --vital`: the blocks without which a model draws another image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hookctl.cli import inspect, main
from tests import zoo

BLOCKS = [f"transformer_blocks.{i}.attn" for i in range(3)]


@pytest.mark.slow
def test_the_blocks_by_likeness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "_VITAL_STEPS", 2)
    zoo.PIPELINES["sd3"].make().save_pretrained(tmp_path / "sd3")
    capsys.readouterr()
    given = ["inspect", str(tmp_path / "sd3"), "--vital", "a red cat", "--vital", "a dog"]
    assert main([*given, "--json"]) == 0
    alike = json.loads(capsys.readouterr().out)["vital"]
    assert list(alike) == BLOCKS and all(-1 <= value < 1 for value in alike.values())
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "Without a block the image is so like the whole model's" in said
    order = sorted(BLOCKS, key=lambda path: alike[path])
    places = [said.rindex(path) for path in order]
    assert places == sorted(places)


def test_weights_have_no_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ip-adapter.safetensors"
    file.write_bytes(b"")
    assert main(["inspect", str(file), "--vital", "a cat"]) == 2
    assert "are weights; --vital, --run and --prove take a pipeline" in capsys.readouterr().err
