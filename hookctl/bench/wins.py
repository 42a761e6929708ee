"""From which size on a kernel is taken in place of SDPA: measured, and written into the table.

Every entry is a ladder of sizes. At each the same edited call is timed by the kernel and by SDPA,
interleaved, with heads of two widths, and the kernel wins there if it is faster in all. What is
written is the fewest tokens from which on it wins at every size that was tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hookctl.bench.calls import Bench, Shape
from hookctl.bench.edits import adapter, cross, self_replacement
from hookctl.bench.measure import OURS, Case, Measured
from hookctl.kernels.common import wins
from hookctl.kernels.common.wins import MAPS, REGIONS, SHARED, TERMS

SIZES = (64, 256, 1024, 4096)  # tokens
HEADS = ((10, 64), (8, 160))  # of each call, and their channels
SDPA = "sdpa"
MARGIN = 1.02  # times that SDPA must take


@dataclass(frozen=True, eq=False)
class Question:
    """One rung of the ladder of an entry; the case has two forms, the kernel's and SDPA's."""

    kernel: str
    count: int
    tokens: int
    case: Case


def questions(
    bench: Bench,
    only: str = "",
    sizes: Iterable[int] = SIZES,
    heads: Iterable[tuple[int, int]] = HEADS,
) -> Iterator[Question]:
    """Every rung of every ladder, of kernels whose name has `only`."""
    for tokens in sizes:
        for shape in ((tokens, *one) for one in heads):
            for kernel, count, case in _cases(bench, shape, only):
                forms = {OURS: case.forms["plan triton"], SDPA: case.forms["plan sdpa"]}
                yield Question(kernel, count, tokens, replace(case, group=kernel, forms=forms))


def _cases(bench: Bench, shape: Shape, only: str) -> Iterator[tuple[str, int, Case]]:
    if only in TERMS:
        of_adapter = adapter(*shape[1:], bench.device, bench.dtype)
        for name, edit in (("refine", cross("refine", bench.device)), ("adapter", of_adapter)):
            yield TERMS, 2, bench.case(name, edit, shape)
    if only in SHARED:
        for rows in (2, 4, 8):
            edit = self_replacement(rows - 1)
            yield SHARED, rows, bench.case("self-replacement", edit, shape, edits=rows - 1)
    if only in REGIONS:
        for kinds in (2, 4, 8):  # one of them is the background
            yield REGIONS, kinds, bench.regions(shape, kinds - 1, 0.5)
    if only in MAPS:
        yield MAPS, 1, bench.maps(shape, of_self=True)


def answers(
    asked: Iterable[tuple[Question, Measured | None]],
) -> dict[tuple[str, int], int | None]:
    """The fewest tokens of each entry, None where the kernel doesn't win at the largest size.

    What could not be measured is lost; a size that SDPA has no memory for is won.
    """
    won: dict[tuple[str, int], dict[int, bool]] = {}
    for one, measured in asked:
        ladder = won.setdefault((one.kernel, one.count), {})
        won_here = measured is not None and kernel_wins(measured)
        ladder[one.tokens] = ladder.get(one.tokens, True) and won_here
    return {entry: _fewest(ladder) for entry, ladder in won.items()}


def kernel_wins(measured: Measured) -> bool:
    sdpa = measured.figures.get(SDPA)
    return sdpa is None or (sdpa.per_ours or 0.0) >= MARGIN


def _fewest(ladder: Mapping[int, bool]) -> int | None:
    found = None
    for tokens in sorted(ladder, reverse=True):
        if not ladder[tokens]:
            break
        found = tokens
    return found


def written(
    found: Mapping[tuple[str, int], int | None],
    arch: str,
    device_name: str,
    path: Path = wins.FILE,
) -> list[str]:
    """Replace the entries of the kernels that were measured; the new ones as text."""
    table, said = wins.read(path)
    for kernel in {kernel for kernel, _ in found}:
        entries = {count: tokens for (one, count), tokens in found.items() if one == kernel}
        table[kernel][arch] = dict(sorted(entries.items()))
        said.setdefault("measured", {})[f"{kernel}, {arch}"] = device_name
    wins.write(table, said, path)
    return [
        f"{kernel}, {count} or more: "
        + ("SDPA everywhere" if tokens is None else f"from {tokens} tokens on")
        for (kernel, count), tokens in sorted(found.items())
    ]
