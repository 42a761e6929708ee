"""`hookctl batch`: bad input, the job of the documentation, replay and plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hookctl
from hookctl.batch.cost import Cost
from hookctl.cli import loading, main
from hookctl.cli.batch_shown import amount, cost_lines, duration
from tests.hookctl.batch.jobs import PAIRS, write_job, write_pairs

PAGE = Path(__file__).parents[3] / "docs" / "batch.md"
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command: its exit status, and what it printed and told."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = main(["batch", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def pipe() -> Any:
    return hookctl.load_shapes(device="cpu")


@pytest.fixture
def loaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded pipeline is loaded once for all tests."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipe)


def refuse(*_: Any) -> None:
    raise AssertionError("the model was loaded")


def bad(say: Say, says: str, *arguments: Any) -> None:
    """Status 2 and one line, nothing drawn."""
    status, out, err = say(*arguments)
    assert status == 2 and not out
    assert err.startswith("hookctl: error: ") and err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.toml"], "none.toml: there is no such file; give a job in TOML"),
        (["replay"], "which record? Give hookctl batch replay ID"),
        (["replay", "x", "--out", "none"], "there is no record x in none"),
        (["job.toml", "x"], "'x' is one too many; give a job, or: replay ID"),
        (["job.toml", "--engine", "dask"], "invalid choice: 'dask'"),
        (["job.toml", "--workers", "2"], "--workers is for --engine ray"),
        (["job.toml", "--price", "2"], "--price is for --plan"),
        (["job.toml", "--model", "no/such/one"], "there is no such folder"),
        (["job.toml", "--out", "job.toml"], "can't be made a folder"),
        (["job.toml", "--out", "/proc/x"], "can't be made a folder"),
    ],
)
def test_what_is_typed_is_checked(
    say: Say, arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pipeline", refuse)
    bad(say, says, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.toml", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('stack = "prompt_to_prompt"', 'stack = "inverted_edit"', "takes an image, and a batch"),
        ('stack = "prompt_to_prompt"', '[[editor]]\nrecipe = "Promt"', "recipe='Promt' is not kno"),
        ('stack = "prompt_to_prompt"', '[[editor]]\nrecipe = "PAG"', "which model? Give --model"),
        ('words = "object"', 'words = "thing"', "line 1: has no 'thing'; there are: source"),
        ("pairs.jsonl", "none.jsonl", "none.jsonl: there is no such file"),
        ("0.9] }", "0.9] }\nmode = { choice = [3] }", "mode = 3; give"),
        ("0.9] }", '0.9] }\nmode = { choice = ["swap"] }', "mode='swap'"),
        ("steps = 2", 'steps = 2\n[[filter]]\nmeasure = "no.such:f"', "no installed package hold"),
    ],
)
def test_what_a_job_says_is_checked(
    say: Say,
    old: str,
    new: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_job(tmp_path)
    text = path.read_text("utf-8")
    if new.startswith("[[editor]]"):
        text = text.replace(old, "") + new  # tables come after keys
    path.write_text(text.replace(old, new), "utf-8")
    monkeypatch.setattr(loading, "load_pipeline", refuse)
    bad(say, says, path, "--out", tmp_path / "out", "--device", "cpu")
    assert not (tmp_path / "out").exists()


def test_empty_prompts(say: Say, tmp_path: Path) -> None:
    path = write_job(tmp_path)
    write_pairs(tmp_path, [*PAIRS[:1], PAIRS[1] | {"edited": ""}])
    bad(say, "line 2: edited = ''; give a prompt with words", path, "--out", tmp_path / "out")


def documented(folder: Path) -> Path:
    """The job of the page, and its pairs."""
    page = PAGE.read_text("utf-8")
    for language, name in (("json", "pairs.jsonl"), ("toml", "job.toml")):
        (text,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        (folder / name).write_text(text, "utf-8")
    return folder / "job.toml"


@pytest.mark.slow
def test_the_job_of_the_page_runs(
    say: Say, loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two steps, which show no object: the detector refuses, and is then left out."""
    monkeypatch.chdir(tmp_path)
    path = documented(tmp_path)
    text = path.read_text("utf-8").replace("steps = 20", "steps = 2")
    path.write_text(text.replace("min = 20.0", ""), "utf-8")
    assert say(path, "--device", "cpu")[0] == 0
    manifest = json.loads((tmp_path / "out" / "batch-job" / "manifest.json").read_text())
    assert manifest["tasks"] == 6 and manifest["rejects"].keys() <= {
        "shapes: no",
        "background: the words are everywhere",
    }
    path.write_text(re.sub(r'\[\[filter\]\]\nmeasure = "shapes".*', "", text), "utf-8")
    bad(say, "another job (they differ in: filters)", path, "--device", "cpu")
    assert manifest["errors"] == 0


@pytest.mark.slow
def test_a_run_and_a_replay(
    say: Say, loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_job(tmp_path, PAIRS[:2], tasks=1)
    status, out, err = say(path, "--device", "cpu")
    assert status == 0 and "2 records of 2 tasks in 2 shards" in out and "1 of 2 tasks" in err
    folder = tmp_path / "out" / "batch-job"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").open()]
    assert Image.open(folder / "preview.png").width > 300
    status, out, _ = say("replay", rows[1]["id"])
    assert status == 0 and "source.png, edited.png, mask.png, maps.npy are bit-equal" in out
    job = json.loads((folder / "job.json").read_text())
    job["stack"] = job["stack"].replace("self_replace = 0.4", "self_replace = 1.0")
    job["core"]["versions"]["torch"] = "0.1"
    (folder / "job.json").write_text(json.dumps(job))
    status, _, err = say("replay", rows[1]["id"], "--out", folder)
    assert (
        status == 1 and "edited.png" in err and "since it was made there changed: torch 0.1" in err
    )
    status, out, _ = say(path, "--device", "cpu", "--plan")
    assert status == 0 and "measured by the 2 tasks that are done" in out


@pytest.mark.slow
def test_a_plan_makes_nothing(say: Say, loaded: None, tmp_path: Path) -> None:
    path = write_job(tmp_path, seeds=1000, tasks=100, count=2)
    arguments = ("--device", "cpu", "--plan", "--price", "2", "--out", tmp_path / "out")
    status, out, _ = say(path, *arguments)
    assert status == 0 and not (tmp_path / "out").exists()
    assert out.startswith("6,000 tasks of up to 2 draws, 0 of them done\nmeasured by draws of 4")
    assert "worker-hours" in out and "at 2 each" in out and "shards: 60 of 100 tasks" in out


def test_a_plan_in_words() -> None:
    cost = Cost(1_000_000, 10_000, 100, 0, 4, 25.0, 0.04, 0.1, 4.4, 60_000.0, 1.0, "here")
    lines = "\n".join(cost_lines(cost, 0.5))
    assert "1,000,000 tasks of up to 4 draws" in lines and "50.9 days" in lines
    assert "worker-hours: 1,222.22, at 0.5 each: 611.11" in lines
    assert "shards: 10,000 of 100 tasks, 6 MB and 7.3 min each" in lines
    assert "storage: 60 GB" in lines and "[shards] would" not in lines
    assert [duration(s) for s in (0.05, 3, 300, 1e4, 1e6)] == [
        "0.05 s", "3.0 s", "5.0 min", "2.8 h", "11.6 days",
    ]  # fmt: skip
    assert amount(999) == "999 B" and amount(2.5e12) == "2.5 TB"
