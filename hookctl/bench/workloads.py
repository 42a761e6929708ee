"""What each launch table is measured on: its kernel at a usual size, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.bench.measure import Form
from hookctl.kernels.common.launch import WIDTHS, pieces
from hookctl.kernels.common.launch_tables import (
    GAIN,
    GRADIENTS,
    KEYS,
    MAPS,
    MIXING,
    QUERIES,
    RANKED,
    REGIONS,
    SHORT,
    Key,
)

HEADS = 8
TOKENS, TEXT = 4096, {128: 77, 256: 226}
SMALL = 20  # tokens, or the sides of an image, in tests
NARROW = 64  # channels of a head of which several stand side by side
SIDES = (16, 128)  # of a tile of queries or keys, the least and the most

Given = Callable[[Key, Iterable[Key], bool], list[Tensor]]


@dataclass(frozen=True)
class Workload:
    """The kernel of a table.

    inputs: tensors for an entry of those that are listed, on the CPU, few where small; kernel,
    reference: from such tensors to a function of them; learns: which of them the gradient is taken
    of, none for the forward; first, second: the least and the most of each side of a candidate
    tile, None for a side that the form fixes; staged: whether a loop has stages; axes: what the
    last two sides of the first tensor are; needs: other tables that must have an entry for a call
    to run.
    """

    inputs: Given
    kernel: Callable[..., Callable[..., Tensor]]
    reference: Callable[..., Callable[..., Tensor]]
    learns: tuple[int, ...] = ()
    first: tuple[int, int] | None = SIDES
    second: tuple[int, int] | None = SIDES
    staged: bool = True
    axes: tuple[str, str] = ("tokens", "channels")
    needs: tuple[str, ...] = ()

    def given(
        self, device: torch.device, dtype: torch.dtype, key: Key, listed: Iterable[Key], small: bool
    ) -> list[Tensor]:
        return [x.to(device, dtype) for x in self.inputs(key, listed, small)]

    def form(self, given: Sequence[Tensor]) -> Callable[[], Form]:
        return lambda: _run(self.kernel(*given), given, self.learns)

    def truth(self, given: Sequence[Tensor]) -> Tensor:
        wide = [x.double() for x in given]
        return _run(self.reference(*wide), wide, self.learns)()


def _heads(tokens: int, keys: int, rows: int, key_of: Callable[[int], Key] = pieces) -> Given:
    """q, k, v, stacks [rows, 1, heads, tokens, channels], of the widest head that takes an entry;
    as many rows of 64 channels as its key says if rows is 0."""

    def inputs(key: Key, listed: Iterable[Key], small: bool) -> list[Tensor]:
        count, width = rows or key[0] // NARROW, NARROW
        if rows:
            known = list(listed)
            width = max(d for d in WIDTHS if min(x for x in known if x >= key_of(d)) == key)
        generator = torch.Generator().manual_seed(width)
        n, m = (min(x, SMALL) if small else x for x in (tokens, keys))
        shapes = [(count, 1, t, 1 if small else HEADS, width) for t in (n, m, m)]
        return [torch.randn(shape, generator=generator).transpose(2, 3) for shape in shapes]

    return inputs


def _images(side: int, *leading: tuple[int, ...]) -> Given:
    """Tensors [*leading, side, side]."""

    def inputs(key: Key, listed: Iterable[Key], small: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(side)
        shapes = [(*some, side, side) for some in leading]
        if small:
            shapes = [tuple(min(x, SMALL) for x in shape) for shape in shapes]
        return [torch.randn(shape, generator=generator) for shape in shapes]

    return inputs


def _run(function: Callable[..., Tensor], given: Sequence[Tensor], learns: Sequence[int]) -> Form:
    """The output, or one backward of an output that is kept."""
    if not learns:
        return lambda: function(*given)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(i in learns) for i, x in enumerate(given)]
        out = function(*leaves)
    chosen = [leaves[i] for i in learns]
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)

    def run() -> Tensor:
        found = torch.autograd.grad(out, chosen, gradient, retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    return run


def _sum(explicit: bool, several: bool, ranked: bool) -> Callable[..., Any]:
    """A term a row, or two, the second weighted by query; with rank-r biases if `ranked`."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels.sum_of_terms import Stretch, reference, sum_of_terms

        terms, options = [], dict[str, Any]()
        for row in range(len(q)):
            factors = 0 if ranked else -1
            terms.append(Stretch(row, row, row, row, factors=factors))
            if several:
                terms.append(Stretch(row, row, (row + 1) % len(q), row, weights=0))
        n, m = q.shape[-2], k.shape[-2]
        if several:
            options["weights"] = torch.linspace(0, 1, n, device=q.device).to(q)[None]
        if ranked:
            waves = (torch.linspace(-1, 1, 2 * x, device=q.device).view(1, x, 2) for x in (n, m))
            options["factors"] = tuple(x.to(q) for x in waves)
        function: Any = reference.sum_of_terms if explicit else sum_of_terms
        scale = q.shape[-1] ** -0.5
        return lambda q, k, v: function([q], [k], [v], terms, scale, **options)[0]

    return make


def _sums(several: bool, ranked: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return _sum(False, several, ranked), _sum(True, several, ranked)


def _shared(explicit: bool) -> Callable[..., Any]:
    """As many rows of values as one program takes."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels.shared_probabilities import Group, reference, shared_probabilities

        function: Any = reference.shared_probabilities if explicit else shared_probabilities
        groups = [Group(0, 0, tuple(range(len(v))))]
        return lambda q, k, v: function(q, k, v, groups, q.shape[-1] ** -0.5)[0]

    return make


def _regions(explicit: bool) -> Callable[..., Any]:
    """Four regions that cover everything; the lists of tiles are made for the tile that runs."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels.region_attention import lists, reference, region_attention

        n = q.shape[-2]
        bits = 1 << (torch.arange(n, device=q.device) * 4 // n)
        function: Any = reference.region_attention if explicit else region_attention
        listed = () if explicit else (lists(bits, bits, q),)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out: Tensor = function(*flat, bits, bits, q.shape[-1] ** -0.5, *listed)[0]
            return out

        return run

    return make


def _maps(explicit: bool) -> Callable[..., Any]:
    """Maps of eight tokens."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels.map_readout import map_readout, reference

        tokens = torch.arange(8, device=q.device)
        function: Any = reference.map_readout if explicit else map_readout
        return lambda q, k, v: function(q.flatten(0, 1), k.flatten(0, 1), tokens)

    return make


def _gain(which: str) -> Callable[..., Any]:
    """FreeU's filter of SDXL's backbone features."""

    def make(x: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import fourier_gain as operator

        function: Any = getattr(operator, which).fourier_gain
        return lambda x: function(x, 0.9)

    return make


def _mixtures(which: str) -> Callable[..., Any]:
    """All that is done to latents: they share a tile."""

    def make(x: Tensor, d: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import latent_mixing as operators

        by: Any = getattr(operators, which)
        sources = torch.zeros(len(x), dtype=torch.long, device=x.device)

        def run(x: Tensor, d: Tensor) -> Tensor:
            y = x.flip(0)
            found = [by.local_blend(x, sources, d), by.merge_instances(x, d[1:])]
            found += [by.mix_predictions(x, y, d), by.update_difference(d, x, x, y, 0.1)]
            return torch.cat([one.flatten() for one in found])

        return run

    return make


def _channels(width: int) -> Key:
    return (width,)


def _workloads() -> dict[str, Workload]:
    long, brief = _heads(TOKENS, TOKENS, 2), _heads(1024, 1024, 2)
    found = {
        "sum of terms, one term": Workload(long, *_sums(several=False)),
        "sum of terms, several terms": Workload(_heads(TOKENS, 1024, 2), *_sums(several=True)),
    }
    for most, table in SHORT.items():
        text = _heads(TOKENS, TEXT[most], 2)
        found[table] = Workload(text, *_sums(several=True), second=None, staged=False)
    for suffix, ranked in (("", False), (RANKED, True)):
        sums = _sums(several=False, ranked=ranked)
        both = QUERIES + suffix, KEYS + suffix
        found[both[0]] = Workload(brief, *sums, learns=(0,), needs=both)
        found[both[1]] = Workload(brief, *sums, learns=(1, 2), needs=both)
    shared = _shared(explicit=False), _shared(explicit=True)
    found["shared probabilities"] = Workload(_heads(TOKENS, TOKENS, 0), *shared)
    long, brief = (_heads(n, n, 1, _channels) for n in (TOKENS, 1024))
    regions = _regions(explicit=False), _regions(explicit=True)
    maps = _maps(explicit=False), _maps(explicit=True)
    found[REGIONS] = Workload(long, *regions)
    found[REGIONS + GRADIENTS] = Workload(brief, *regions, learns=(0, 1, 2), needs=(REGIONS,))
    found[MAPS] = Workload(long, *maps)
    found[MAPS + GRADIENTS] = Workload(brief, *maps, learns=(0, 1), needs=(MAPS,))
    found[GAIN] = Workload(
        _images(64, (4, 640)), _gain("forward"), _gain("reference"),
        first=(1, 16), second=(128, 2048), staged=False, axes=("height", "width"),
    )  # fmt: skip
    found[MIXING] = Workload(
        _images(128, (8, 4), (8,)), _mixtures("forward"), _mixtures("reference"),
        first=None, second=(128, 4096), staged=False, axes=("height", "width"),
    )  # fmt: skip
    return found


WORKLOADS = _workloads()
