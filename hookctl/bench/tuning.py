"""The launch tables, measured: candidate tiles of every entry, interleaved; the fastest is kept.

A candidate is a form of a case as the benchmark's other forms are, checked against the kernel's
reference and timed by the same `measure`. What does not launch (too much shared memory) or is
wrong is no candidate. All are compiled beforehand, by as many processes as there are cores. Tiles
that spill registers are found by compilation ahead of time afterwards (tests/kernels/aot.py
--update refuses them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookctl.bench.measure import OURS, Case, DisagreementError, Form, Measured, check
from hookctl.bench.workloads import WORKLOADS, Workload
from hookctl.errors import UnsupportedError
from hookctl.kernels.common import launch_tables
from hookctl.kernels.common.launch import Launch, available, interpreting
from hookctl.kernels.common.launch_tables import SINGLE, Key

_TOGETHER = 4  # candidates that one process compiles after each other


def _failures() -> tuple[type[Exception], ...]:
    """What a tile raises that can't be compiled or launched (by Triton, for too much shared memory
    say, or by the compiler's passes), or that is wrong."""
    found: tuple[type[Exception], ...] = (DisagreementError, RuntimeError)
    if find_spec("triton") is not None:
        from triton.errors import TritonError

        found = (TritonError, *found)
    return found


_FAILURES = _failures()


@dataclass(frozen=True, eq=False)
class Contest:
    """One entry of a table and the case whose forms are its candidates; `hookctl` is the tile that
    ships."""

    table: str
    arch: str
    key: Key
    tiles: dict[str, Launch]
    case: Case


def refuse(device: torch.device, option: str) -> None:
    """UnsupportedError where a measurement would say nothing of a kernel's speed."""
    why = available(device)
    if why is None and interpreting():
        why = "TRITON_INTERPRET=1 is set, and the interpreter's times mean nothing"
    if why:
        raise UnsupportedError(f"{option}: {why}; run it on the GPU that the tables are for")


def candidates(shipped: Launch, work: Workload) -> list[Launch]:
    """Tiles around the one that ships, itself first: blocks of half and twice its sides with 4 and
    8 warps, and its own blocks with other stages, as far as the workload lets them vary."""
    m, n, _, stages = shipped
    rows, columns = (
        [x for x in (side // 2, side, 2 * side) if bounds[0] <= x <= bounds[1]]
        if bounds
        else [side]
        for side, bounds in ((m, work.first), (n, work.second))
    )
    found = [Launch(x, y, warps, stages) for x in rows for y in columns for warps in (4, 8)]
    if work.staged:
        found += [Launch(m, n, warps, s) for warps in (4, 8) for s in (1, 2, 3)]
    return list(dict.fromkeys([shipped, *found]))


def contests(
    device: torch.device, arch: str, only: str = "", small: bool = False
) -> Iterator[Contest]:
    """One for each entry of the tables of an architecture. small: sizes for a test."""
    for work, entry, tile in entries(arch, only):
        yield contest(work, device, *entry, tile, small)


def prepare(pool: Executor, device: torch.device, arch: str, only: str = "") -> None:
    """Run every candidate once, in the processes of a pool: what they compile stays in Triton's
    cache on the disk, where the process that measures finds it."""
    waiting = []
    for work, entry, shipped in entries(arch, only):
        tiles = candidates(shipped, work)
        for i in range(0, len(tiles), _TOGETHER):
            waiting.append(pool.submit(prepared, device, *entry, tiles[i : i + _TOGETHER]))
    for done in as_completed(waiting):
        try:
            done.result()
        except _FAILURES:  # met again where it is measured
            continue


def prepared(
    device: torch.device,
    table: str,
    arch: str,
    key: Key,
    tiles: list[Launch],
    small: bool = False,
) -> int:
    """How many of the tiles of an entry run."""
    torch.set_num_threads(1)
    work, count = WORKLOADS[table.removesuffix(SINGLE)], 0
    with torch.no_grad():
        given = work.given(device, _dtype(table), key, launch_tables.shipped()[table][arch], small)
        for tile in tiles:
            try:
                _form(table, tile, work.form(given))()
            except _FAILURES:
                continue
            count += 1
    return count


def entries(arch: str, only: str) -> Iterator[tuple[Workload, tuple[str, str, Key], Launch]]:
    """(workload, (table, architecture, key), tile that ships), of all that can run."""
    tables = launch_tables.shipped()
    for name, work in WORKLOADS.items():
        for table, element in ((name, "fp16"), (name + SINGLE, "fp32")):
            of_arch = tables.get(table, {}).get(arch, {})
            for key, tile in of_arch.items() if only in table else ():
                others = (launch_tables.entry(x, arch, key, element) for x in work.needs)
                if tile is not None and None not in others:
                    yield work, (table, arch, key), tile


def _dtype(table: str) -> torch.dtype:
    return torch.float32 if table.endswith(SINGLE) else torch.bfloat16


def contest(
    work: Workload,
    device: torch.device,
    table: str,
    arch: str,
    key: Key,
    tile: Launch,
    small: bool = False,
) -> Contest:
    """The candidates of one entry as forms of one case; those that can't run are left out."""
    dtype = _dtype(table)
    listed = launch_tables.shipped()[table][arch]
    given = work.given(device, dtype, key, listed, small)
    tiles = {OURS if one == tile else _name(one): one for one in candidates(tile, work)}
    truth = work.truth(given)
    forms = {name: _form(table, one, work.form(given)) for name, one in tiles.items()}
    case = Case(
        "tune", table, dict(zip(work.axes, given[0].shape[-2:], strict=True)), forms,
        lambda: truth, tolerance=_tolerance(dtype),
    )  # fmt: skip
    for name in [name for name in forms if name != OURS and not _runs(case, name)]:
        del forms[name]
    return Contest(table, arch, key, {name: tiles[name] for name in forms}, case)


def alone(
    work: Workload,
    device: torch.device,
    table: str,
    arch: str,
    key: Key,
    tile: Launch,
    small: bool = False,
) -> Case:
    """One tile of an entry against its reference."""
    dtype, listed = _dtype(table), launch_tables.shipped()[table][arch]
    given = work.given(device, dtype, key, listed, small)
    return Case(
        "kernel", table, dict(zip(work.axes, given[0].shape[-2:], strict=True)),
        {OURS: _form(table, tile, work.form(given))}, lambda: work.truth(given),
        tolerance=_tolerance(dtype),
    )  # fmt: skip


def _tolerance(dtype: torch.dtype) -> float:
    return 5e-5 if dtype == torch.float32 else 4e-2


def _name(tile: Launch) -> str:
    return f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"


def _form(table: str, tile: Launch, make: Callable[[], Form]) -> Form:
    """A form under a tile; what the kernel prepares for a tile is prepared under it, once."""
    prepared: list[Form] = []

    def run() -> Tensor:
        with launch_tables.using(table, tile):
            if not prepared:
                prepared.append(make())
            return prepared[0]()

    return run


def _runs(case: Case, name: str) -> bool:
    alone = Case(case.group, case.name, case.shape, {name: case.forms[name]}, case.truth,
                 tolerance=case.tolerance)  # fmt: skip
    try:
        check(alone)
    except _FAILURES:
        return False
    return True


def winner(one: Contest, measured: Measured) -> Launch:
    """The tile of the smallest ratio to the one that ships; that one unless another is faster in
    more than half of the rounds by 2 %."""
    ratios = {name: f.per_ours for name, f in measured.figures.items() if f.per_ours is not None}
    best = min(ratios, key=lambda name: ratios[name], default=OURS)
    return one.tiles[best if ratios.get(best, 1.0) < 0.98 else OURS]


def written(
    won: list[tuple[Contest, Launch]], device_name: str, path: Path = launch_tables.FILE
) -> list[str]:
    """Replace the entries in the tables' file; the changes as text."""
    tables, said = launch_tables.read(path)
    changes = []
    for one, tile in won:
        before = tables[one.table][one.arch][one.key]
        tables[one.table][one.arch][one.key] = tile
        if before != tile and before is not None:
            at = ", ".join([one.table, one.arch, *map(str, one.key)])
            changes.append(f"{at}: {_name(before)} -> {_name(tile)}")
    of_device: dict[str, Any] = said.setdefault("measured", {})
    of_device.update({f"{one.table}, {one.arch}": device_name for one, _ in won})
    launch_tables.write(tables, said, path)
    return changes
