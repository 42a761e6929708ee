"""Where a kernel is taken in place of SDPA: wins.json, which `hookctl bench --wins` replaces.

    {kernel: {architecture: {count: tokens}}}

count: of what shares the launch: terms of a row, rows of one softmax, kinds of queries by region,
maps; a call takes the entry of its own count or of the next smaller that is listed. tokens: the
fewest from which the kernel is taken, queries over short keys and keys elsewhere; null: never.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hookctl.kernels.common.launch import arch_of
from hookctl.kernels.common.launch_tables import MAPS, REGIONS

__all__ = ["MAPS", "REGIONS", "SHARED", "TERMS", "read", "wins", "write"]

FILE = Path(__file__).with_name("wins.json")

TERMS, SHARED = "sum of terms", "shared probabilities"

Table = dict[str, dict[str, dict[int, int | None]]]


def read(path: Path = FILE) -> tuple[Table, dict[str, Any]]:
    """The table, and what else the file says of it."""
    said = json.loads(path.read_text())
    table = {
        kernel: {
            arch: {int(count): tokens for count, tokens in of_arch.items()}
            for arch, of_arch in archs.items()
        }
        for kernel, archs in said.pop("table").items()
    }
    return table, said


def write(table: Table, said: Mapping[str, Any], path: Path = FILE) -> None:
    """Replace the file; the next process reads it."""
    path.write_text(json.dumps({**said, "table": table}, indent=1) + "\n")


# Read once, here: the compiler of graphs, which may see a choice, can't open files.
_shipped = read()[0]


def wins(kernel: str, device: torch.device, count: int, tokens: int) -> bool:
    """Whether a kernel is taken to be faster than SDPA on a GPU."""
    of_arch = _shipped[kernel][arch_of(device)]
    known = [listed for listed in of_arch if listed <= count]
    least = of_arch[max(known)] if known else None
    return least is not None and tokens >= least
