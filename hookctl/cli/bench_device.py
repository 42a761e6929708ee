"""`hookctl bench device`: all that waits for a GPU, in one command without arguments.

    kernels    every form of every kernel against its reference, and the proofs of the plan's forms
    steps      plain, edited and eager steps of SD1.5 at 512 and SDXL at 1024 pixels, random weights
    compiled   plain and edited steps under torch.compile, with CUDA graphs
    tiles      the fastest tile of each entry of the launch tables
    wins       from which size on each kernel beats SDPA

Each item is kept as soon as it is measured, so that a run that ends early goes on where it was. On
a CPU everything is tried at tiny sizes, which says that it works and nothing of its speed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookctl.cli.common import versions, write_json, write_text
from hookctl.cli.device_page import page

LIMIT = 660.0  # seconds for all items
FILE, PAGE = "device.json", "device.md"
Data = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One thing to find out; run gives what is kept of it."""

    stage: str
    name: str
    run: Callable[[], Data]

    @property
    def key(self) -> str:
        return f"{self.stage}: {self.name}"


def main(out: Path, device: Any, limit: float = LIMIT) -> Data:
    """Run what is missing in the folder's file; what is there then, as the file has it."""
    import torch

    from hookctl.kernels.common import proof

    place = proof.place_of(device)
    found = _before(out / FILE, place)
    found |= {"place": place, "tiny": device.type == "cpu", "versions": versions()}
    until = time.monotonic() + limit
    with torch.inference_mode(False), torch.no_grad():
        waiting = [item for item in items(device) if item.key not in found["items"]]
        for i, item in enumerate(waiting):
            if time.monotonic() > until:
                break
            print(f"\r{i + 1} of {len(waiting)}: {item.key}"[:110], end="", file=sys.stderr)
            started = time.monotonic()
            try:
                found["items"][item.key] = item.run() | {"took": time.monotonic() - started}
                found["failed"].pop(item.key, None)
            except Exception as error:  # of a compiler, a launch or the device: said, tried again
                said = " ".join(str(error).split())[:500]
                found["failed"][item.key] = f"{type(error).__name__}: {said}"
            _write(out, found)
    found["left"] = [item.key for item in waiting if item.key not in found["items"]]
    found["left"] = [key for key in found["left"] if key not in found["failed"]]
    _write(out, found)
    print(file=sys.stderr)
    return found


def _write(out: Path, found: Data) -> None:
    write_json(out / FILE, found)
    write_text(out / PAGE, page(found))


def _before(path: Path, place: str) -> Data:
    """What an earlier run on the same device, with the same versions, found."""
    try:
        said = json.loads(path.read_text())
        if said["place"] == place and isinstance(said["items"], dict):
            return {"items": said["items"], "failed": dict(said["failed"])}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return {"items": {}, "failed": {}}


def items(device: Any) -> Iterator[Item]:
    """What is most wanted first; cheap to list, since everything is made when it runs."""
    import torch

    from hookctl.bench.calls import Bench, most_bytes
    from hookctl.kernels.common.launch import arch_of, available

    tiny = device.type == "cpu"
    dtype = torch.float32 if tiny else torch.bfloat16
    bench = Bench(device, dtype, most_bytes(device), flex=False)
    runs = available(device) is None
    arch = "sm_80" if tiny else arch_of(device)
    if runs:
        yield from _kernels(device, arch, tiny)
    yield from _steps(bench, tiny)
    if runs:
        yield from _tables(bench, arch, tiny)


# -- kernels ---------------------------------------------------------------------------------------


def _kernels(device: Any, arch: str, tiny: bool) -> Iterator[Item]:
    from hookctl.bench import tuning

    for work, (table, _, key), tile in tuning.entries(arch, ""):

        def run(work: Any = work, table: str = table, key: Any = key, tile: Any = tile) -> Data:
            """How far the tile that ships is from the reference in float64."""
            single = tuning.alone(work, device, table, arch, key, tile, tiny)
            return {"error": tuning.check(single), "allowed": single.tolerance}

        yield Item("kernels", f"{table}, {' '.join(map(str, key)) or 'all'}", run)


# -- steps -----------------------------------------------------------------------------------------


def _steps(bench: Any, tiny: bool) -> Iterator[Item]:
    from hookctl.cli.bench_steps import Model

    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            made.clear()  # one at a time: SDXL has 2.6 billion weights
            made[name] = Model(name, bench, 8 if tiny else 64)
        return made[name]

    edits = ("P2P", "regions", "adapter", "maps", "energy")
    for name in ("tiny",) if tiny else ("SD1.5", "SDXL"):
        for edit in edits:

            def run(name: str = name, edit: str = edit) -> Data:
                from hookctl.bench.measure import measure

                case = model(name).named(edit)
                return measure(case, 0.0, bench.device, 0.0 if tiny else 4.0).data()

            yield Item("steps", f"{name} {edit}", run)
        for edit in edits[:2]:

            def compiled(name: str = name, edit: str = edit) -> Data:
                return _compiled(model(name), edit, bench.device, tiny)

            yield Item("compiled", f"{name} {edit}", compiled)


def _compiled(model: Any, edit: str, device: Any, tiny: bool) -> Data:
    """Milliseconds of plain and edited steps, eager and compiled, and how far compiling moves the
    edited one. On a CPU graphs are traced and not built."""
    import torch

    from hookctl.bench.measure import OURS, PLAIN, seconds_of

    case = model.named(edit)
    eager = {}
    with case.within(OURS):
        before = model.step()
    for name in (PLAIN, OURS):
        with case.within(name):
            eager[name] = _median(model.step, device, tiny, seconds_of)
    plain = model.unet
    options: Data = {"backend": "eager"} if tiny else {"mode": "reduce-overhead"}
    fast, off = {}, 0.0
    try:
        for name in (PLAIN, OURS):
            torch._dynamo.reset()
            model.unet = torch.compile(plain, **options)
            with case.within(name):
                for _ in range(3):  # graphs are recorded in the second run
                    out = model.step().clone()
                fast[name] = _median(model.step, device, tiny, seconds_of)
                if name == OURS:
                    off = float((out.double() - before.double()).norm() / before.double().norm())
    finally:
        model.unet = plain
        torch._dynamo.reset()
    if not off <= case.tolerance:
        raise ArithmeticError(f"compiled, the edited step is {off:.1e} from the eager one")
    return {"eager": eager, "compiled": fast, "error": off}


def _median(form: Any, device: Any, tiny: bool, seconds_of: Any) -> float:
    times = [seconds_of(form, device) for _ in range(2 if tiny else 15)]
    return 1e3 * statistics.median(times)


# -- tables ----------------------------------------------------------------------------------------


def _tables(bench: Any, arch: str, tiny: bool) -> Iterator[Item]:
    from hookctl.bench import tuning, wins
    from hookctl.bench.measure import OURS, measure

    device, seconds = bench.device, 0.0 if tiny else 0.5
    entries = list(tuning.entries(arch, ""))
    if tiny:  # one of each table
        entries = list({table: entry for entry in entries for table in [entry[1][0]]}.values())

    for work, (table, _, key), tile in entries:

        def tune(work: Any = work, table: str = table, key: Any = key, tile: Any = tile) -> Data:
            one = tuning.contest(work, device, table, arch, key, tile, tiny)
            measured = measure(one.case, 0.0, device, seconds)
            best = tuning.winner(one, measured)
            mine = measured.figures[OURS].seconds
            return {"tile": list(best), "shipped": list(tile), "ms": 1e3 * mine}

        yield Item("tiles", f"{table}, {' '.join(map(str, key)) or 'all'}", tune)

    for size in (16,) if tiny else wins.SIZES:

        def ladder(size: int = size) -> Data:
            heads = ((2, 16),) if tiny else wins.HEADS
            asked = [
                (q, measure(q.case, 0.0, device, seconds))
                for q in wins.questions(bench, sizes=(size,), heads=heads)
            ]
            won = []
            for q, found in asked:
                beats = wins.kernel_wins(found)
                won.append({"kernel": q.kernel, "count": q.count, "wins": beats})
            return {"tokens": size, "won": won}

        yield Item("wins", f"{size} tokens", ladder)
