"""The conformance table: every promise run on every family.

    python -m tests.families.table [out/conformance.md] [subject ...]

With `wild` as the first subject the cheap promises are run on every pipeline that can be built
offline, or on those that are named after it, whose rows are put into the table that is there; the
list of those that can't, with the reasons, follows.

A cell is a tick where the promise was run and kept, a dash where it does not apply, a cross where
it is broken; the notes below the table say why a dash is a dash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from hookctl.inspect import markdown_table
from tests.families import compiling, configurations, promises, training, wild
from tests.families.promises import NotApplicable
from tests.families.subjects import SUBJECTS, Subject

PROMISES: dict[str, Callable[[Subject], None]] = {
    "sites found": promises.sites_found,
    "q, k, v caught": promises.calls_caught,
    "idle exact, edit right": promises.idle_and_edited,
    "rows": promises.rows_resolved,
    "LoRA": configurations.with_lora,
    "IP-Adapter": configurations.with_ip_adapter,
    "fused QKV": configurations.with_fused_projections,
    "sliced": configurations.with_sliced_attention,
    "eager": configurations.with_eager_processors,
    "unknown processor": configurations.with_unknown_processors,
    "flex backend": configurations.with_flex_backend,
    "math backend": configurations.with_math_backend,
    "model offload": configurations.with_model_offload,
    "sequential offload": configurations.with_sequential_offload,
    "checkpointed blocks": training.gradients_checkpointed,
    "checkpointed calls": training.calls_checkpointed,
    "exceptions": promises.exceptions_leave_nothing,
    "nesting": promises.contexts_nest,
    "threads": promises.threads_do_not_meet,
    "compiled before": compiling.compiled_before,
    "compiled after": compiling.compiled_after,
}


def result(subject: Subject, name: str) -> tuple[str, str]:
    """The mark of a cell and the reason for it."""
    try:
        PROMISES[name](subject)
    except NotApplicable as reason:
        return "–", str(reason)
    except Exception as error:  # a broken promise is a cell of the table
        return "✗", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "✓", ""


def of_wild(path: str, *names: str) -> int:
    """The table of the cheap promises: a line for each pipeline, those of `names` made anew."""
    there = Path(path).read_text("utf-8") if names else ""
    lines, broken = [_cells(line) for line in there.splitlines() if _is_row(line)], 0
    for case in wild.CASES:
        if names and case.name not in names:
            continue
        marks = []
        for name, promise in wild.PROMISES.items():
            try:
                promise(case)
                mark = "✓"
            except wild.Refused as reason:
                mark = f"refused: {reason}"[:120]
            except Exception as error:  # a broken promise is a cell of the table
                mark, broken = f"✗ {type(error).__name__}: {error}".splitlines()[0], 1
            print(case.name, name, mark, flush=True)
            marks.append(mark)
        lines = [line for line in lines if line[0] != case.name] + [[case.name, *marks]]
        case.__dict__.pop("_mould", None)  # its weights
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(_page(sorted(lines)), "utf-8")
    return broken


def _page(lines: list[list[str]]) -> str:
    whole = sum(line[1:] == ["✓"] * len(wild.PROMISES) for line in lines)
    refused = sum(any(cell.startswith("refused") for cell in line) for line in lines)
    count = sum("not run yet" in line for line in lines)
    later = f"; of {count} some promises were not run yet" if count else ""
    out = [(name, why) for name, why in wild.LEFT_OUT.items()]
    return "\n".join(
        [
            "# Conformance: the cheap promises on every pipeline that can be built offline\n",
            "Written by `python -m tests.families.table docs/conformance.md wild` (diffusers "
            f"{diffusers.__version__}, tiny random\nweights; the names of pipelines behind it run "
            "those alone). Refusals name the reason; the promises are functions\nof "
            "`tests/families/wild.py`. "
            f"Of {len(lines)} pipelines {whole} keep every promise and {refused}\nare refused"
            f"{later}.\n",
            markdown_table(lines, ["pipeline", *wild.PROMISES]),
            "\nNot built offline:\n",
            markdown_table(out, ["pipeline", "why"]),
            "",
        ]
    )


def _is_row(line: str) -> bool:
    """Whether a line of the page is one of a pipeline that was run."""
    return len(_cells(line)) == 1 + len(wild.PROMISES) and _cells(line)[0] in wild.WILD


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def main(path: str = "out/conformance.md", *names: str) -> int:
    torch.set_num_threads(1)
    if names[:1] == ("wild",):
        return of_wild(path, *names[1:])
    subjects = [s for s in SUBJECTS if not names or s.name in names]
    cells: dict[str, list[str]] = {name: [] for name in PROMISES}
    notes: dict[str, list[str]] = {}
    for subject in subjects:
        for name in PROMISES:
            mark, reason = result(subject, name)
            cells[name].append(mark)
            print(subject.name, name, mark, reason, flush=True)
            if reason:
                notes.setdefault(f"{mark} {name}: {reason}", []).append(subject.name)
    rows = [[name, *marks] for name, marks in cells.items()]
    text = markdown_table(rows, ["promise", *(s.name for s in subjects)])
    listed = "\n".join(f"- {note} ({', '.join(where)})" for note, where in notes.items())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f"{text}\n\n{listed}\n", "utf-8")
    print(text)
    return int(any("✗" in marks for marks in cells.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
