"""Which tile each kernel takes: data in launches.json, which `hookctl bench --tune` replaces.

    {table: {architecture: {key: [block_m, block_n, warps, stages]}}}

A key is what counts of a call, as numbers: the two parts of a head, or channels, or nothing where
one entry serves all calls. A call takes the entry of its own key or of the next larger that is
listed. null: no tile was found that does not spill registers; the call takes another form of the
kernel, or is left to SDPA. Tables are of fp16 and bf16; those of fp32, which has no tensor cores
here, are named so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hookctl.kernels.common.launch import (
    FORMS,
    INTERPRETED,
    MOST_PAIRS,
    Launch,
    arch_of,
    interpreting,
    pieces,
)

FILE = Path(__file__).with_name("launches.json")

Key = tuple[int, ...]
Tables = dict[str, dict[str, dict[Key, Launch | None]]]

# Forms of the sum of terms that hold a whole softmax in registers, by its most keys.
SHORT = {128: "sum of terms, up to 128 keys", 256: "sum of terms, up to 256 keys"}

SINGLE = ", fp32"

# Of the sum of terms; those with rank-r biases have tables of their own, named after these.
QUERIES, KEYS, RANKED = "sum of terms, dQ", "sum of terms, dK and dV", ", rank r"

# Tables by channels; those of their gradients are named after them.
REGIONS, MAPS, GRADIENTS = "region attention", "map read-out", ", gradients"

# Without products: one entry each. A tile is of channels and pixels, or of one row and its places.
GAIN, MIXING = "Fourier gain", "latent mixing"

_tried: dict[str, Launch] = {}  # seen by every thread: gradients are computed on autograd's


def read(path: Path = FILE) -> tuple[Tables, dict[str, Any]]:
    """The tables, and what else the file says of them."""
    found = json.loads(path.read_text())
    tables = {
        name: {
            arch: {
                tuple(map(int, key.split())): tile and Launch(*tile)
                for key, tile in of_arch.items()
            }
            for arch, of_arch in table.items()
        }
        for name, table in found.pop("tables").items()
    }
    return tables, found


def write(tables: Tables, said: Mapping[str, Any], path: Path = FILE) -> None:
    """Replace the file, an entry a line; the next process reads it."""
    plain = {
        name: {
            arch: {" ".join(map(str, key)): tile and list(tile) for key, tile in of_arch.items()}
            for arch, of_arch in table.items()
        }
        for name, table in tables.items()
    }
    text = json.dumps({**said, "tables": plain}, indent=1)
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n")


# Read once, here: the compiler of graphs, which may see a launch, can't open files.
_shipped = read()[0]


def shipped() -> Tables:
    return _shipped


def entry(name: str, arch: str, key: Key, element: str = "fp16") -> Launch | None:
    """The tile of a table for a key or the next larger that is listed; None where that is null,
    beyond the last, and where there is no table of that dtype."""
    of_arch = shipped().get(name + SINGLE * (element == "fp32"), {}).get(arch, {})
    found = min((x for x in of_arch if x >= key), default=None)
    return None if found is None else of_arch[found]


def forms(
    name: str, arch: str, wanted: Iterable[tuple[str, int]] = FORMS
) -> Iterator[tuple[str, int, Launch]]:
    """(element, width, tile) of what is wanted of a table by channels and ships."""
    for element, width in wanted:
        tile = entry(name, arch, (width,), element)
        if tile is not None:
            yield element, width, tile


def tile_for(name: str, key: Key, like: torch.Tensor) -> Launch | None:
    """The entry for the device and dtype of a tensor, None if the table leaves it out."""
    element = "fp32" if like.dtype == torch.float32 else "fp16"
    tried = _tried.get(name + SINGLE * (element == "fp32"))
    if tried or interpreting():
        return tried or INTERPRETED
    return entry(name, arch_of(like.device), key, element)


def serves(name: str, like: torch.Tensor) -> bool:
    """Whether a kernel has a form for tensors [..., heads, tokens, channels] like this one, and for
    the gradient if it learns."""
    names = (name, name + GRADIENTS) if like.requires_grad else (name,)
    return like.shape[:-2].numel() <= MOST_PAIRS and all(
        tile_for(x, (like.shape[-1],), like) is not None for x in names
    )


def learns_ranked(like: torch.Tensor) -> bool:
    """Whether terms with rank-r biases have forms of their gradients for tensors like this one."""
    key = pieces(like.shape[-1])
    return all(tile_for(name + RANKED, key, like) is not None for name in (QUERIES, KEYS))


def short_form(like: torch.Tensor, keys: int) -> tuple[int, Launch] | None:
    """The form of the sum of terms that holds a softmax of so many keys, and its tile.

    None is shipped for fp32, which has no tensor cores and gains nothing by it.
    """
    for most, table in SHORT.items():
        tile = tile_for(table, pieces(like.shape[-1]), like) if keys <= most else None
        if tile is not None:
            return most, tile
    return None


def needed(tile: Launch | None, name: str, like: torch.Tensor) -> Launch:
    """A tile that must be there; ValueError says that no shipped form serves the call."""
    if tile is None:
        raise ValueError(
            f"{name}: no form is shipped for {like.dtype} with {like.shape[-1]} channels on "
            f"{arch_of(like.device)}; it would spill registers"
        )
    return tile


@contextmanager
def using(name: str, tile: Launch) -> Iterator[None]:
    """Let a kernel take another tile than that of the table `name`, to measure it."""
    _tried[name] = tile
    try:
        yield
    finally:
        del _tried[name]
