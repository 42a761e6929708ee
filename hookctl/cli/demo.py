"""`hookctl demo`: the demos that come with the package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hookctl.cli.common import (
    add_command,
    add_out,
    add_progress,
    make_folder,
    wants_progress,
    whole,
)
from hookctl.demos import DEMOS
from hookctl.errors import InputError
from hookctl.tables import table

_DEFAULT = "prompt_to_prompt"
_EXAMPLES = """
hookctl demo --out out                       # the default demo; look at out/grid.png
hookctl demo --list                          # which demos there are
hookctl demo prompt_to_prompt --seeds 16     # more cases, steadier figures
hookctl demo all --out out                   # every demo, each in a folder of its own
"""


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "demo",
        main,
        "run a demo on the embedded pipeline",
        "Run a demo on the embedded pipeline: pictures and figures, offline, on a CPU.",
        _EXAMPLES,
    )
    command.add_argument(
        "name", nargs="?", default=_DEFAULT, help=f"of the demo, or 'all' (default: {_DEFAULT})"
    )
    command.add_argument("--list", action="store_true", help="list the demos and stop")
    add_out(command)
    command.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: 0")
    command.add_argument(
        "--seeds", type=whole(1), default=4, metavar="N", help="cases of each kind (default: 4)"
    )
    add_progress(command)


def main(options: Any) -> None:
    if options.list:
        print(table(list(DEMOS.items()), ("demo", "what it shows")))
        return
    names = list(DEMOS) if options.name == "all" else [_known(options.name)]
    for name in names:
        out = make_folder(options.out / name if options.name == "all" else options.out)
        demo = importlib.import_module(f"hookctl.demos.{name}")
        with _bar(name, wants_progress(options)) as progress:
            report = demo.run(out=out, seed=options.seed, seeds=options.seeds, progress=progress)
        print(f"{name}: {DEMOS[name]}\n")
        print("\n".join(figures(report)))
        print(f"\nwritten to {out}: {', '.join(_files(out))}\n")


def _known(name: str) -> str:
    if name in DEMOS:
        return name
    near = get_close_matches(name, DEMOS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"there is no demo {name!r}{hint} There are: {', '.join(DEMOS)}, all")


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Any]:
    """A function of (done, total) that draws a bar."""
    with tqdm(desc=name, disable=not shown, leave=False, unit="case") as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield progress


def figures(report: Mapping[str, Any]) -> Iterator[str]:
    """A report as lines: single figures, then a table of what was measured for each kind."""
    for key, value in report.items():
        if isinstance(value, Mapping):
            columns = {str(kind): dict(_flat(one)) for kind, one in value.items()}
            names = dict.fromkeys(name for column in columns.values() for name in column)
            rows = [(name, *(column.get(name) for column in columns.values())) for name in names]
            yield f"\n{table(rows, (_title(key), *columns))}\n"
        else:
            yield f"{_title(key)}: {value}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}: {_title(key)}" if name else _title(key))


def _title(key: object) -> str:
    return str(key).replace("_", " ")


def _files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_file())
