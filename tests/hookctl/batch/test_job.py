"""What a job file says is read, and what is wrong in it is told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hookctl.batch import read_job, read_pairs
from hookctl.batch.job.vary import fraction, read_varied
from hookctl.batch.settings import check_vary
from hookctl.cli.known import editors_by_name
from hookctl.cli.stacks import stack_file
from hookctl.errors import InputError
from hookctl.preset import preset_of
from tests.hookctl.batch.jobs import PAIRS, write_job, write_pairs


def test_a_job_with_a_stack_by_name(tmp_path: Path) -> None:
    job = read_job(write_job(tmp_path, seeds="[3, 5]", count=2), stack_file)
    assert job.stack.path.stem == "prompt_to_prompt" and job.model == "shapes"
    assert job.run == {"steps": 2, "guidance": 5.0}  # the job's steps, the stack's guidance
    assert (job.seeds, job.candidates, job.keep, job.tasks) == ((3, 5), 2, 1, 2)
    assert job.pairs == tmp_path / "pairs.jsonl" and job.columns == ["object"]


def test_a_job_with_editors_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'model = "shapes"\n[pairs]\nfile = "p.csv"\n[[editor]]\nrecipe = "FreeU"\nb1 = 1.1\n',
        "utf-8",
    )
    job = read_job(path)
    preset = preset_of(job.stack, editors_by_name())
    assert [spec.recipe for spec in preset.specs] == ["FreeU"] and job.words is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('stack = "prompt_to_prompt"', "", "which stack? Write stack = "),
        ("prompt_to_prompt", "prompt_to_prom", "there is no stack 'prompt_to_prom'; did you mean"),
        ("[pairs]", "[pears]", "'pears' is not a key of a job; did you mean 'pairs'?"),
        ('file = "pairs.jsonl"', "", "[pairs]: needs file (a text)"),
        ("seeds = 1", "seeds = 0", "[pairs] seeds = 0; give how many, a whole number >= 1"),
        ("seeds = 1", "seeds = [1, 1]", "a list of seeds, each once"),
        ('words = "object"', 'words = ["a"]', "or a list of two"),
        ("count = 1", "count = 0", "[candidates] count = 0; give a whole number from 1"),
        ("count = 1", "keep = 2", "[candidates] keep = 2; give a whole number from 1 to 1"),
        ("count = 1", 'best = "clip"', "best = 'clip' is no measure of a [[filter]]"),
        ("tasks = 2", "tasks = 0", "[shards] tasks = 0; give a whole number from 1"),
        ("tasks = 2", "near = true", "[shards] near = True; give a whole number from 0 to 64"),
        ("steps = 2", "seed = 2", "[run] seed has no place in a job; write seeds = in [pairs]"),
        ("steps = 2", 'prompt = "x"', "prompt has no place in a job; prompts come from [pairs]"),
        ("steps = 2", "steps = 0", "[run] steps = 0; give a whole number >= 1"),
        ("uniform", "unifrom", "'unifrom' is none of: uniform, integer, window"),
        ("[0.5, 0.9]", "[0.9, 0.5]", "uniform = [0.9, 0.5]; give [least, most], two numbers"),
        ("{ uniform = [0.5, 0.9] }", "0.5", "give a table of one of: uniform"),
        ("[vary.PromptToPrompt]\ncross_replace", "[vary.run]\nseed", "run seed has no place"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = write_job(tmp_path)
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(InputError) as error:
        read_job(path, stack_file)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("min = 1.0", "needs measure, one of: background, overlap"),
        ('measure = "backgroud"', "'backgroud' is not known; did you mean 'background'?"),
        ('measure = "background"\nmin = "x"', "[[filter]] 1 min = 'x'; give a number"),
        ('measure = "background"\nmin = 2.0\nmax = 1.0', "nothing would pass"),
        ('measure = "background"\nmodel = "x"', "'model' is not a key of background"),
        ('measure = "clip_text"', "clip_text needs model, a folder"),
    ],
)
def test_filters_are_checked(tmp_path: Path, table: str, says: str) -> None:
    path = write_job(tmp_path, more=f"[[filter]]\n{table}")
    with pytest.raises(InputError) as error:
        read_job(path, stack_file)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("PromptToPrompt]", "FreeU]", "[vary.FreeU]: is no editor of the stack; there are: run, P"),
        ("cross_replace", "cross_replce", "'cross_replce' is no setting of it; did you mean"),
        ("cross_replace", "prompts", "'prompts' is no setting of it"),
        ("cross_replace = { uniform = [0.5, 0.9] }", "paper = { choice = [1] }", "paper = 1; give"),
        (
            "PromptToPrompt]\ncross_replace = { uniform = [0.5, 0.9] }",
            "run]\nsteps = { integer = [0, 9] }",
            "steps = 0; give a whole number >= 1",
        ),
    ],
)
def test_what_is_varied_is_checked(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = write_job(tmp_path)
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    job = read_job(path, stack_file)
    with pytest.raises(InputError) as error:
        check_vary(job, preset_of(job.stack, editors_by_name()))
    assert says in str(error.value)


def test_varied_values() -> None:
    def made(table: dict[str, Any], text: str = "x") -> Any:
        return read_varied(table, "here").of(text, {"a": "cat", "b": 2})

    assert made({"column": "a"}) == "cat" and made({"columns": ["a", "b"]}) == ["cat", 2]
    several = {made({"choice": ["p", "q"]}, str(n)) for n in range(50)}
    assert several == {"p", "q"}
    assert {made({"integer": [1, 3]}, str(n)) for n in range(50)} == {1, 2, 3}
    numbers = [made({"uniform": [0.2, 0.8]}, str(n)) for n in range(300)]
    assert min(numbers) >= 0.2 and max(numbers) <= 0.8
    assert abs(sum(numbers) / 300 - 0.5) < 0.05  # of a deviation of 0.01
    start, stop = made({"window": [[0.0, 0.1], [0.6, 1.0]]})
    assert 0 <= start <= 0.1 and 0.6 <= stop <= 1.0
    assert fraction("x") == fraction("x") != fraction("y")


def test_pairs_of_both_texts_are_the_same(tmp_path: Path) -> None:
    jsonl = read_pairs(write_pairs(tmp_path))
    names = list(PAIRS[0])
    lines = [",".join(names), *(",".join(pair[name] for name in names) for pair in PAIRS)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines), "utf-8")
    assert read_pairs(path).rows == jsonl.rows and jsonl.repeated == 0
    assert jsonl.rows[0].columns == {"instruction": "make the circle green", "object": "circle"}


def test_prompts_that_were_there_are_dropped(tmp_path: Path) -> None:
    again = PAIRS[0] | {"source": PAIRS[0]["source"].upper().replace(" ", "  ")}
    pairs = read_pairs(write_pairs(tmp_path, [*PAIRS, again, PAIRS[1]]))
    assert len(pairs.rows) == len(PAIRS) and pairs.repeated == 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "", "holds no row"),
        ("a.jsonl", "{", "line 1: is not JSON"),
        ("a.jsonl", "[1]", "line 1: [1] is no row with columns"),
        ("a.jsonl", '{"source": "a"}', "line 1: has no 'edited'; there are: source"),
        ("a.jsonl", '{"source": "a", "edted": "b"}', "did you mean 'edted'?"),
        (
            "a.jsonl",
            '\n{"source": "a", "edited": " ", "object": "c"}',
            "line 2: edited = ' '; give a prompt",
        ),
        (
            "a.jsonl",
            '{"source": 3, "edited": "b", "object": "c"}',
            "line 1: source = 3; give a prompt",
        ),
        ("a.jsonl", '{"source": "a", "edited": "b"}', "line 1: has no 'object'"),
        ("a.csv", "source,edited,object\na,b\n", "row 2: has no 'object'"),
        ("a.csv", "source,edited,object\na,b,c,d\n", "row 2: has more values than the header"),
        ("a.csv", "source,edited\n", "holds no row"),
        ("a.txt", "a", "is no .jsonl, .csv, .parquet file"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(InputError) as error:
        read_pairs(path, needed=["object"])
    assert says in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text in UTF-8"):
        read_pairs(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"pip install 'hookctl\[parquet\]'"):
            read_pairs(path)
        return
    parquet.write_table(pa.Table.from_pylist(PAIRS), path)
    assert read_pairs(path).rows == read_pairs(write_pairs(tmp_path)).rows
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        read_pairs(path)
