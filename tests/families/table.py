"""The conformance table: every promise run on every family.

    python -m tests.families.table [out/conformance.md] [subject ...]

With `wild` as the only subject the cheap promises are run on every pipeline that can be built
offline; the list of those that can't, with the reasons, follows.

A cell is a tick where the promise was run and kept, a dash where it does not apply, a cross where
it is broken; the notes below the table say why a dash is a dash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

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


def of_wild(path: str) -> int:
    """The table of the cheap promises: a line for each pipeline."""
    lines, broken = [], 0
    for case in wild.CASES:
        marks = []
        for name, promise in wild.PROMISES.items():
            try:
                promise(case)
                mark = "✓"
            except wild.Refused as reason:
                mark = f"refused: {reason}"
            except Exception as error:  # a broken promise is a cell of the table
                mark, broken = f"✗ {type(error).__name__}: {error}".splitlines()[0], 1
            print(case.name, name, mark, flush=True)
            marks.append(mark)
        lines.append([case.name, *marks])
        case.__dict__.pop("_mould", None)  # its weights
    out = [(name, why) for name, why in wild.LEFT_OUT.items()]
    text = markdown_table(lines, ["pipeline", *wild.PROMISES])
    text += "\n\nNot built offline:\n\n" + markdown_table(out, ["pipeline", "why"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", "utf-8")
    return broken


def main(path: str = "out/conformance.md", *names: str) -> int:
    torch.set_num_threads(1)
    if names == ("wild",):
        return of_wild(path)
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
