"""`hookctl bench --tune` and `--wins`: what is measured on a GPU becomes the tables of the plan.

Both measure everything before they replace a file, so that an interrupted run changes nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from hookctl.cli.common import out_folder, write_json


def tune(device: Any, options: Any) -> None:
    """The fastest of the candidate tiles of every entry of this device's launch tables."""
    import os
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import torch

    from hookctl.bench import tuning
    from hookctl.bench.measure import measure
    from hookctl.errors import InputError
    from hookctl.kernels.common.launch import arch_of
    from hookctl.kernels.common.launch_tables import FILE

    tuning.refuse(device, "--tune")
    arch = arch_of(device)
    print("compiling the candidates", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        tuning.prepare(pool, device, arch, options.only)
    won, measured = [], []
    with torch.no_grad():
        for one in tuning.contests(device, arch, options.only):
            print(f"\r{one.table} {one.key}: {len(one.tiles)} tiles", end="", file=sys.stderr)
            measured.append(measure(one.case, 0.0, device, options.seconds or 2.0))
            won.append((one, tuning.winner(one, measured[-1])))
    if not won:
        raise InputError(f"--only {options.only!r}: no launch table has that in its name")
    _shown(measured, options, "tuning.json")
    changes = tuning.written(won, torch.cuda.get_device_name(device))
    print("\n".join(changes) or "every tile that ships is the fastest that was tried")
    print(
        f"\nwritten to {FILE}; now run python -m tests.kernels.aot --update, which refuses spills"
    )


def place(device: Any, options: Any) -> None:
    """From which size on each kernel is taken in place of SDPA on this device."""
    import torch

    from hookctl.bench import tuning, wins
    from hookctl.bench.calls import Bench
    from hookctl.bench.measure import DisagreementError, Measured, measure
    from hookctl.errors import InputError
    from hookctl.kernels.common.launch import arch_of
    from hookctl.kernels.common.wins import FILE

    tuning.refuse(device, "--wins")
    dtype = getattr(torch, options.dtype or "bfloat16")
    bench = Bench(device, dtype, most=0.0, flex=False)
    asked: list[tuple[wins.Question, Measured | None]] = []
    with torch.inference_mode(False), torch.no_grad():
        for one in wins.questions(bench, options.only):
            print(f"\r{one.kernel}, {one.count}: {one.tokens}", end="", file=sys.stderr)
            try:
                found = measure(one.case, 0.0, device, options.seconds or 1.0)
            except (DisagreementError, torch.OutOfMemoryError) as error:
                print(f"\n{error}", file=sys.stderr)
                found = None
            asked.append((one, found))
    if not asked:
        raise InputError(f"--only {options.only!r}: no kernel has that in its name")
    _shown([measured for _, measured in asked if measured], options, "wins.json")
    least = wins.answers(asked)
    print("\n".join(wins.written(least, arch_of(device), torch.cuda.get_device_name(device))))
    print(f"\nwritten to {FILE}")


def _shown(measured: list[Any], options: Any, name: str) -> None:
    from hookctl.bench import report

    print(file=sys.stderr)
    print(report.text(measured))
    with out_folder(options.out, "bench") as out:
        write_json(out / name, [one.data() for one in measured])
