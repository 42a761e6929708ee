"""`hookctl bench`: what edits cost on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.bench_tables import place, tune
from hookctl.cli.common import (
    add_command,
    add_out,
    out_folder,
    positive,
    save_image,
    usable_device,
    whole,
    write_json,
)
from hookctl.errors import HookctlError, InputError

if TYPE_CHECKING:
    import torch

GROUPS = ("calls", "kernels", "steps", "scaling")
PEERS, LEARNED, DEVICE = "peers", "learned", "device"
_TEXT = """
Measure edited attention against the plain call, against eager control and against SDPA: interleaved
medians with quartiles, time and peak memory together. Every form is compared with float64 first; a
case in which one disagrees has no figures, and the command fails.

groups:
  calls      single attention calls, each kind of edit beside the plain call
  kernels    the Triton kernels beside SDPA, on a GPU
  steps      whole denoising steps of a pipeline, with and without editors
  scaling    how the time grows with tokens, with regions and with edits at once
  peers      the same edits by other libraries' means
  learned    trained modules, beside diffusers' own pipelines of them
  device     on a GPU: all that waits for one, alone
"""
_EXAMPLES = """
hookctl bench --quick                        # two minutes on one core of a CPU
hookctl bench                                # every shape; on a GPU, the kernels too
hookctl bench calls --only regions --flex    # one kind of edit, also against FlexAttention
hookctl bench peers                          # beside what else a user might take
hookctl bench learned                        # trained modules, beside diffusers' own pipelines
hookctl bench device                         # on a GPU: all that waits for one, in 12 minutes
hookctl bench --tune                         # on a GPU: the fastest tiles into the launch tables
hookctl bench --wins                         # then: where the kernels are taken in place of SDPA
"""


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        main,
        "measure what edits cost on this machine",
        _TEXT,
        _EXAMPLES,
    )
    command.add_argument(
        "groups",
        nargs="*",
        default=[],
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)} (default: all these), {PEERS}, {LEARNED}; or {DEVICE} alone",
    )
    command.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds, for a first look"
    )
    tables = command.add_mutually_exclusive_group()
    tables.add_argument(
        "--tune",
        action="store_true",
        help="measure the kernels' candidate tiles, and write the fastest into the launch tables",
    )
    tables.add_argument(
        "--wins",
        action="store_true",
        help="measure from which size on the kernels beat SDPA, and write it into the plan's table",
    )
    command.add_argument(
        "--only", default="", metavar="WORD", help="measure the cases whose name has this"
    )
    command.add_argument("--flex", action="store_true", help="FlexAttention too, where it compiles")
    command.add_argument(
        "--seconds",
        type=positive,
        metavar="S",
        help="spent on each case (default: 4; with --quick 0.6)",
    )
    command.add_argument(
        "--threads", type=whole(1), default=1, help="how many of a CPU are used (default: 1)"
    )
    command.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the tensors (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    add_out(command, "out/bench")


def main(options: Any) -> None:
    if DEVICE in options.groups and len(options.groups) > 1:
        raise InputError(f"group {DEVICE!r} given with others; give it alone")
    every = (*GROUPS, PEERS, LEARNED, DEVICE)
    unknown = set(options.groups) - set(every)
    if unknown:
        raise InputError(f"group {min(unknown)!r} given; give some of {', '.join(every)}")
    import torch

    device = usable_device(options.device)
    if options.groups == [DEVICE]:
        with out_folder(options.out, "bench", DEVICE) as out:
            return _device(out, device)
    usual = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, options.dtype or usual)
    if options.tune or options.wins:
        return (tune if options.tune else place)(device, options)
    # The folder first: to measure takes long.
    with out_folder(options.out, "bench") as out:
        _measure(out, device, dtype, options)


def _device(out: Path, device: torch.device) -> None:
    from hookctl.cli import bench_device

    found = bench_device.main(out, device)
    print((out / bench_device.PAGE).read_text())
    print(f"written to {out}: {bench_device.FILE}, {bench_device.PAGE}")
    if found["left"]:
        print(f"{len(found['left'])} items are left; run the command again to go on")
    if found["failed"]:
        raise HookctlError(f"{len(found['failed'])} items failed; the page says why")


def _measure(out: Path, device: torch.device, dtype: torch.dtype, options: Any) -> None:
    import torch

    from hookctl.bench import report
    from hookctl.bench.calls import Bench, most_bytes
    from hookctl.bench.limits import Limits
    from hookctl.bench.measure import Measured, measure

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    seconds = options.seconds or (0.6 if options.quick else 4.0)
    measured: list[Measured] = []
    failed: dict[str, str] = {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            limits = Limits.of(device, dtype)
            flex = options.flex or PEERS in options.groups
            bench = Bench(device, dtype, most_bytes(device), flex)
            for case in _cases(bench, options):
                if options.only not in case.name:
                    continue
                what = f"{case.group}: {case.name} {dict(case.shape)}"
                print(f"\r{what}", end="", file=sys.stderr)
                limit = limits.seconds(case.flops, case.traffic)
                try:
                    measured.append(measure(case, limit, device, seconds))
                except Exception as error:  # of the reference, a compiler or the device
                    failed[what] = f"{type(error).__name__}: {error}"
                # What was measured outlives what comes after.
                data = report.data(measured, limits, device, dtype) | {"failed": failed}
                write_json(out / "bench.json", data)
    finally:
        torch.set_num_threads(before)
        print(file=sys.stderr)
    if not measured and not failed:
        raise InputError(f"--only {options.only!r}: no case has that in its name")
    if measured:
        print(report.text(measured))
        heading = "{name}, {dtype}, torch {torch}".format_map(data)
        save_image(report.plot(measured, heading), out / "bench.png")
        print(f"\nwritten to {out}: bench.json, bench.png")
    if failed:
        said = "\n".join(f"{what}: {why}" for what, why in failed.items())
        raise HookctlError(f"{len(failed)} cases have no figures:\n{said}")


def _cases(bench: Any, options: Any) -> Iterator[Any]:
    """One after the other, so that the tensors of a case live only as long as it is measured."""
    from hookctl.bench import kernels
    from hookctl.bench.calls import DENSITIES, QUICK, SHAPES
    from hookctl.cli.bench_steps import steps

    groups = options.groups or GROUPS
    if "calls" in groups:
        shapes = QUICK if options.quick else dict.fromkeys(s for of in SHAPES.values() for s in of)
        for shape in shapes:
            yield from bench.cross_cases(shape)
            if shape[0] > 256 or not options.quick:
                yield from bench.self_cases(shape, DENSITIES[:2] if options.quick else DENSITIES)
            else:
                yield from bench.self_cases(shape, ())
    if "kernels" in groups:
        yield from kernels.cases(bench, options.quick)
    if "scaling" in groups:
        yield from bench.scaling(*((1024, 8, 4) if options.quick else (16384, 32, 8)))
    if "steps" in groups:
        yield from steps(bench, options.quick)
    if PEERS in groups:
        from hookctl.cli import bench_peers

        yield from bench_peers.cases(bench, options.quick)
        for package in bench_peers.absent():
            print(f"\nnot installed, so not compared: {package}", file=sys.stderr)
    if LEARNED in groups:
        from hookctl.cli import bench_learned

        yield from bench_learned.cases(bench, options.quick)
