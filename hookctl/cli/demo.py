"""`hookctl demo`: the demos that come with the package."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.common import (
    add_command,
    add_out,
    add_progress,
    bar,
    out_folder,
    versions,
    wants_progress,
    whole,
    write_json,
)
from hookctl.cli.models import EMBEDDED, SHAPES
from hookctl.cli.quiet import quiet
from hookctl.demos import DEMOS, OF_FLOW, ON_BOTH
from hookctl.demos.reports import groups, singles
from hookctl.errors import HookctlError, InputError
from hookctl.inspect import table

if TYPE_CHECKING:
    from hookctl.demos.gallery import Shown

_DEFAULT = "prompt_to_prompt"
_SEED = "of the first case; those after it have N + 1 and so on (default: 0)"
_TEXT = """
Run a demo on the embedded pipeline: images and figures, offline, on a CPU. A demo draws every case
with and without its edit, lets a detector read off what the images show, and prints the figures.
The default takes half a minute to a few minutes; --list says what there is.

writes to --out (default: out/demo-NAME):
  grid.png       the cases, plain and edited side by side (some demos write further images)
  report.json    what was measured, with versions
"""
_EXAMPLES = """
hookctl demo                                 # the default; look at out/demo-*/grid.png
hookctl demo --list                          # which demos there are
hookctl demo prompt_to_prompt --seeds 16     # more cases, steadier figures
hookctl demo all                             # every demo, each in a folder of its own
"""


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "demo",
        main,
        "run a demo on the embedded pipeline",
        _TEXT,
        _EXAMPLES,
    )
    command.add_argument(
        "name", nargs="?", default=_DEFAULT, help=f"one of --list, or 'all' (default: {_DEFAULT})"
    )
    command.add_argument("--list", action="store_true", help="list the demos and stop")
    add_out(command, "out/demo-NAME")
    command.add_argument("--seed", type=whole(0), default=0, metavar="N", help=_SEED)
    command.add_argument(
        "--seeds",
        type=whole(1),
        default=4,
        metavar="N",
        help="cases of each kind that is measured (default: 4)",
    )
    command.add_argument(
        "--model",
        choices=tuple(EMBEDDED),
        default=SHAPES,
        help="the embedded pipeline that draws (default: shapes)",
    )
    add_progress(command)


def main(options: Any) -> None:
    if options.list:
        print(table(list(DEMOS.items()), ("demo", "what it shows")))
    elif options.model != SHAPES and options.name not in (*_of(options.model), "all"):
        raise InputError(
            f"--model {options.model}: demos of both pipelines are {', '.join(ON_BOTH)}, those of "
            f"this one {', '.join(OF_FLOW)}; the others are of {SHAPES!r}"
        )
    elif options.name == "all":
        with out_folder(options.out, "demo", "all") as out:
            _all(out, options)
    else:
        name = _known(options.name)
        with out_folder(options.out, "demo", name) as out:
            _run(name, out, options)


def _of(model: str) -> Sequence[str]:
    """The demos that `demo all` runs with a model."""
    return tuple(DEMOS) if model == SHAPES else (*ON_BOTH, *OF_FLOW)


def _all(out: Path, options: Any) -> None:
    """Every demo in a folder of its own, and a page of all; one that fails stops no other."""
    from hookctl.demos.gallery import Shown, write_page

    shown, started = [], time.perf_counter()
    for name in _of(options.model):
        try:
            with out_folder(out / name, "demo") as folder:
                shown.append(Shown.of(name, _run(name, folder, options), folder))
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            shown.append(Shown(name, error=message))
            print(f"hookctl: {name} failed: {message}", file=sys.stderr)
            if os.environ.get("HOOKCTL_TRACE"):
                traceback.print_exception(error)
        # After each: hours may lie between the first and the last.
        page = write_page(out, shown)
        seconds = round(time.perf_counter() - started, 1)
        write_json(out / "report.json", _report(shown, seconds, options))
    print(f"all of them: {page}")
    failed = [one.name for one in shown if one.error is not None]
    if failed:
        raise HookctlError(
            f"{len(failed)} of {len(shown)} demos failed: {', '.join(failed)} (HOOKCTL_TRACE=1 "
            "shows where)"
        )


def _report(shown: Sequence[Shown], seconds: float, options: Any) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "seeds": options.seeds,
        "wall_seconds": seconds,
        "versions": versions(),
        "demos": {one.name: one.report for one in shown if one.error is None},
        "failed": {one.name: one.error for one in shown if one.error is not None},
    }


@quiet()
def _run(name: str, out: Path, options: Any) -> Mapping[str, Any]:
    demo = importlib.import_module(f"hookctl.demos.{name}")
    model = {"model": options.model} if options.model != SHAPES and name in ON_BOTH else {}
    with bar(name, wants_progress(options), "case") as progress:
        report: Mapping[str, Any] = demo.run(
            out=out, seed=options.seed, seeds=options.seeds, progress=progress, **model
        )
    print(f"{name}: {DEMOS[name]}\n")
    print("\n".join(figures(report)))
    print(f"\nwritten to {out}: {', '.join(_files(out))}\n")
    return report


def _known(name: str) -> str:
    if name in DEMOS:
        return name
    near = get_close_matches(name, DEMOS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise InputError(f"there is no demo {name!r}{hint} there are: {', '.join(DEMOS)}, all")


def figures(report: Mapping[str, Any]) -> Iterator[str]:
    """A report as lines: single figures, then a table of what was measured for each kind."""
    for name, value in singles(report).items():
        yield f"{name}: {value}"
    for group in groups(report):
        yield f"\n{table(group.rows, group.headers)}\n"


def _files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_file())
