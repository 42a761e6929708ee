"""What each launch table is measured on: its kernel at a usual size, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.bench.measure import Form
from hookctl.kernels.launch import WIDTHS, pieces
from hookctl.kernels.launch_tables import (
    GRADIENTS,
    KEYS,
    MAPS,
    QUERIES,
    RANKED,
    REGIONS,
    SHORT,
    Key,
)

HEADS = 8
TOKENS, TEXT = 4096, {128: 77, 256: 226}
SMALL = 20  # tokens in tests
NARROW = 64  # channels of a head of which several stand side by side


@dataclass(frozen=True)
class Workload:
    """The kernel of a table.

    tokens, keys, rows: of the tensors, as many rows as 64 channels fit in the key if 0; kernel,
    reference: from q, k, v (stacks [rows, 1, heads, tokens, channels]) to a function of them;
    learns: which of q, k, v the gradient is taken of, none for the forward; whole: whether the
    block of keys is that of the form; key: of a head width.
    """

    tokens: int
    keys: int
    rows: int
    kernel: Callable[..., Callable[..., Tensor]]
    reference: Callable[..., Callable[..., Tensor]]
    learns: tuple[int, ...] = ()
    whole: bool = False
    key: Callable[[int], Key] = pieces

    def given(
        self, device: torch.device, dtype: torch.dtype, key: Key, listed: Iterable[Key], small: bool
    ) -> list[Tensor]:
        """q, k, v of the widest head that takes the entry `key` of those that are listed."""
        rows, width = self.rows or key[0] // NARROW, NARROW
        if self.rows:
            known = list(listed)
            width = max(d for d in WIDTHS if min(x for x in known if x >= self.key(d)) == key)
        generator = torch.Generator().manual_seed(width)
        heads = 1 if small else HEADS
        n, m = (min(x, SMALL) if small else x for x in (self.tokens, self.keys))
        shapes = [(rows, 1, t, heads, width) for t in (n, m, m)]
        made = (torch.randn(shape, generator=generator) for shape in shapes)
        return [x.to(device, dtype).transpose(2, 3) for x in made]

    def form(self, given: Sequence[Tensor]) -> Callable[[], Form]:
        return lambda: _run(self.kernel(*given), given, self.learns)

    def truth(self, given: Sequence[Tensor]) -> Tensor:
        wide = [x.double() for x in given]
        return _run(self.reference(*wide), wide, self.learns)()


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


def _sum(module_function: str, several: bool, ranked: bool = False) -> Callable[..., Any]:
    """`sum_of_terms` or its reference: a term a row, or two, the second weighted by query; with
    rank-r biases if `ranked`."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import sum_of_terms as module
        from hookctl.kernels.stretches import Stretch

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
        function: Any = getattr(module, module_function)
        scale = q.shape[-1] ** -0.5
        return lambda q, k, v: function([q], [k], [v], terms, scale, **options)[0]

    return make


def _sums(several: bool, ranked: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return _sum("sum_of_terms", several, ranked), _sum("reference", several, ranked)


def _shared(name: str) -> Callable[..., Any]:
    """As many rows of values as one program takes."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import shared_probabilities as module

        function: Any = getattr(module, name)
        groups = [module.Group(0, 0, tuple(range(len(v))))]
        return lambda q, k, v: function(q, k, v, groups, q.shape[-1] ** -0.5)[0]

    return make


def _regions(name: str) -> Callable[..., Any]:
    """Four regions that cover everything; the lists of tiles are made for the tile that runs."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import region_attention as module

        n = q.shape[-2]
        bits = 1 << (torch.arange(n, device=q.device) * 4 // n)
        function: Any = getattr(module, name)
        lists = () if name == "reference" else (module.lists(bits, bits, q),)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out: Tensor = function(*flat, bits, bits, q.shape[-1] ** -0.5, *lists)[0]
            return out

        return run

    return make


def _maps(name: str) -> Callable[..., Any]:
    """Maps of eight tokens."""

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from hookctl.kernels import map_readout as module

        tokens = torch.arange(8, device=q.device)
        function: Any = getattr(module, name)
        return lambda q, k, v: function(q.flatten(0, 1), k.flatten(0, 1), tokens)

    return make


def _channels(width: int) -> Key:
    return (width,)


def _workloads() -> dict[str, Workload]:
    found = {
        "sum of terms, one term": Workload(TOKENS, TOKENS, 2, *_sums(several=False)),
        "sum of terms, several terms": Workload(TOKENS, 1024, 2, *_sums(several=True)),
    }
    for most, table in SHORT.items():
        found[table] = Workload(TOKENS, TEXT[most], 2, *_sums(several=True), whole=True)
    for suffix, ranked in (("", False), (RANKED, True)):
        sums = _sums(several=False, ranked=ranked)
        found[QUERIES + suffix] = Workload(1024, 1024, 2, *sums, learns=(0,))
        found[KEYS + suffix] = Workload(1024, 1024, 2, *sums, learns=(1, 2))
    shared = _shared("shared_probabilities"), _shared("reference")
    found["shared probabilities"] = Workload(TOKENS, TOKENS, 0, *shared)
    regions = _regions("region_attention"), _regions("reference")
    maps = _maps("map_readout"), _maps("reference")
    found[REGIONS] = Workload(TOKENS, TOKENS, 1, *regions, key=_channels)
    found[REGIONS + GRADIENTS] = Workload(1024, 1024, 1, *regions, learns=(0, 1, 2), key=_channels)
    found[MAPS] = Workload(TOKENS, TOKENS, 1, *maps, key=_channels)
    found[MAPS + GRADIENTS] = Workload(1024, 1024, 1, *maps, learns=(0, 1), key=_channels)
    return found


WORKLOADS = _workloads()
