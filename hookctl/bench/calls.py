"""Cases of one attention call: shapes of the common models, kinds of edits, shares of regions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import COND, Rows
from hookctl.address.sites import Site
from hookctl.attention.call import AttentionCall
from hookctl.bench.edits import (
    TEXT,
    Edit,
    adapter,
    cross,
    density,
    guided,
    masked,
    probabilities,
    regions_of,
    rows_of,
    sampled,
    self_replacement,
)
from hookctl.bench.measure import OURS, PLAIN, Case, Form
from hookctl.evaluate import plan

Shape = tuple[int, int, int]  # tokens, heads, channels

SHAPES: dict[str, tuple[Shape, ...]] = {
    "SD1.5-512": ((4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)),
    "SDXL-1024": ((4096, 10, 64), (1024, 20, 64)),
    "SD3-1024": ((4096, 24, 64),),
    "Flux-1024": ((4096, 24, 128),),
    "SDXL-2048": ((16384, 10, 64), (4096, 20, 64)),
}
QUICK: tuple[Shape, ...] = ((1024, 8, 80), (256, 8, 160), (64, 8, 160), (256, 2, 32))
DENSITIES = ((2, 1.0), (4, 0.5), (4, 1.0), (8, 1.0))  # instances, share of the canvas they cover
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CHECKED = 64  # queries whose result is compared with float64
READ = (2, 5)  # tokens whose maps are read


class Bench:
    """Where and in what calls are measured. most: bytes that the matrices of one form may take."""

    def __init__(self, device: torch.device, dtype: torch.dtype, most: float, flex: bool) -> None:
        self.device, self.dtype, self.most, self.flex = device, dtype, most, flex
        self.tolerance = TOLERANCES[dtype]

    def given(self, rows: int, n: int, m: int, heads: int, d: int) -> list[Tensor]:
        """q, k, v [rows, heads, tokens, channels], laid out as projections give them."""
        generator = torch.Generator().manual_seed(n + 3 * d)
        found = (torch.randn(rows, t, heads * d, generator=generator) for t in (n, m, m))
        return [
            x.to(self.device, self.dtype).unflatten(-1, (heads, d)).transpose(1, 2) for x in found
        ]

    def scaling(self, most_tokens: int, most_regions: int, most_edits: int) -> Iterator[Case]:
        """Cost against tokens, regions and edits of one source, each doubled up to its most."""
        for tokens in (4**i for i in range(4, 8)):
            if tokens <= most_tokens:
                shape = (tokens, 8, 40)
                yield self.case("self-replacement", self_replacement(), shape, group="tokens")
                yield self.regions(shape, 4, 1.0, group="tokens")
        for count in (2**i for i in range(6)):
            if count <= most_regions:
                yield self.regions((1024, 8, 40), count, 1.0, group="regions")
        for edits in (2**i for i in range(4)):
            if edits <= most_edits:
                edit = self_replacement(edits)
                yield self.case("self-replacement", edit, (1024, 8, 40), edits=edits, group="edits")

    def cross_cases(self, shape: Shape) -> Iterator[Case]:
        _, heads, d = shape
        for kind in ("replace", "refine", "reweight"):
            yield self.case(f"P2P {kind}", cross(kind, self.device), shape)
        yield self.case("adapter", adapter(heads, d, self.device, self.dtype), shape)
        yield self.maps(shape)

    def self_cases(self, shape: Shape, densities: tuple[tuple[int, float], ...]) -> Iterator[Case]:
        yield self.case("self-replacement", self_replacement(), shape)
        for count, cover in densities:
            yield self.regions(shape, count, cover)

    def regions(self, shape: Shape, count: int, cover: float, group: str = "call") -> Case:
        bits = regions_of(shape[0], count, cover)
        more: dict[str, Any] = {"regions": count, "density": round(density(bits), 3)}
        return self.case("regions", masked(bits, self.device), shape, group=group, **more)

    def case(
        self,
        name: str,
        edit: Edit,
        shape: Shape,
        *,
        edits: int = 1,
        group: str = "call",
        **more: float,
    ) -> Case:
        """One kind of edit at one shape, in every form that fits."""
        n, heads, d = shape
        m = n if edit.keys is None else edit.keys
        rows = rows_of(edits)
        q, k, v = self.given(len(rows), n, m, heads, d)
        size = q.element_size()
        forms: dict[str, Form] = {OURS: self.engine(edit, q, k, v, rows)}
        for evaluator in plan.EVALUATORS:
            if self.takes(evaluator, edit):
                forms[f"plan {evaluator.name}"] = self.engine(edit, q, k, v, rows, evaluator.name)
        if 2 * len(rows) * heads * n * m * size <= self.most:
            forms["eager"] = lambda: merged(edit.explicit(q, k, v))
        if edit.hand != "dense mask" or n * m <= self.most:
            forms[edit.hand] = lambda: merged(edit.by_hand(q, k, v))
        if self.flex and edit.bits is not None:
            compiled = flex(q, k, v, edit.bits.to(self.device))
            forms |= {"flex": compiled} if compiled else {}
        forms[PLAIN] = lambda: merged(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        places = sampled(n, min(n, CHECKED)).to(self.device)

        def truth() -> Tensor:
            exact = (x.double() for x in (q[:, :, places], k, v))
            return merged(edit.explicit(*exact))

        if edits > 1 or group == "edits":
            more["edits"] = edits
        return Case(
            group, name, {"tokens": n, "heads": heads, "channels": d, **more}, forms, truth,
            lambda out: out[:, places], self.tolerance,
            flops=4.0 * len(rows) * heads * n * m * d * edit.work,
            traffic=size * len(rows) * heads * d * (2 * n + 2 * m),
        )  # fmt: skip

    def takes(self, evaluator: plan.Evaluator, edit: Edit) -> bool:
        """Whether an evaluator is one of the choices for an edit. A shared softmax knows no
        regions, and holds the matrix: it is for short keys."""
        if evaluator.name == "reference" or evaluator.missing() is not None:
            return False
        return evaluator.name != "short keys" or (edit.keys is not None and edit.bits is None)

    def engine(
        self, edit: Edit, q: Tensor, k: Tensor, v: Tensor, rows: Rows, backend: str = "auto"
    ) -> Form:
        site = Site("site", "self" if edit.keys is None else "cross", "down", 0, 0)

        def run() -> Tensor:
            call = call_of(site, q, k, v, rows)
            edit.apply(call)
            return merged(plan.evaluate(call, backend)[0].flatten(0, 1))

        return run

    def maps(self, shape: Shape, group: str = "call", *, of_self: bool = False) -> Case:
        """Maps of two keys on the guided rows: what capture adds to a call that nothing edits."""
        n, heads, d = shape
        m = n if of_self else TEXT
        rows = rows_of()
        q, k, v = self.given(len(rows), n, m, heads, d)
        site = Site("site", "self" if of_self else "cross", "down", 0, 0)
        here, read = guided(q), torch.tensor(READ, device=q.device)
        count = here.stop - here.start

        def by(backend: str) -> Form:

            def run() -> Tensor:
                call = call_of(site, q, k, v, rows)
                found: list[Tensor] = []
                shown = rows.where(branch=COND)
                call.read(shown, READ, lambda row, values: found.append(values[0]))
                plan.read_only(call, backend)
                return torch.stack(found)

            return run

        def eager() -> Tensor:
            """As capture does it in the wild: the matrices of all rows, then those that count."""
            return probabilities(q, k)[here].mean(1)[..., read]

        def truth() -> Tensor:
            return probabilities(q[here].double(), k[here].double()).mean(1)[..., read]

        size = q.element_size()
        forms = {OURS: by("auto"), "eager": eager}
        if of_self:
            forms |= {f"plan {e.name}": by(e.name) for e in plan.EVALUATORS if reads(e)}
        return Case(
            group, "map capture", {"tokens": n, "keys": m, "heads": heads, "channels": d},
            forms, truth, tolerance=self.tolerance,
            flops=2.0 * count * heads * n * m * d,
            traffic=size * count * heads * d * (n + m),
        )  # fmt: skip


def reads(evaluator: plan.Evaluator) -> bool:
    """Whether an evaluator is one of the choices for a map over long keys."""
    return evaluator.name in ("triton", "sdpa") and evaluator.missing() is None


def call_of(site: Site, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> AttentionCall:
    stacks = (x.unsqueeze(1) for x in (q, k, v))
    clock = Clock(0, 10, 1.0)
    return AttentionCall(site, *stacks, rows=rows, clock=clock, scale=q.shape[-1] ** -0.5)


def merged(x: Tensor) -> Tensor:
    """Heads joined, as the model goes on: [rows, N, heads * channels]."""
    return x.transpose(1, 2).flatten(2)


def flex(q: Tensor, k: Tensor, v: Tensor, bits: Tensor) -> Form | None:
    """FlexAttention, compiled, with the same regions on the guided half of the rows; None where it
    doesn't compile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each case is another graph, and beyond a few of one function they are no longer compiled.
    torch._dynamo.reset()
    attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    first = guided(q).start  # they are the last rows

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (b < first) | ((bits[i] & bits[j]) != 0)

    n = q.shape[2]
    mask = create_block_mask(sees, q.shape[0], None, n, n, device=str(q.device))

    def form() -> Tensor:
        return merged(attention(q, k, v, block_mask=mask))

    try:
        form()
    except Exception as error:  # of the compiler, the C compiler or the device
        print(f"\nno FlexAttention for {tuple(q.shape)}: {str(error)[:200]}", file=sys.stderr)
        return None
    return form


def most_bytes(device: torch.device) -> float:
    """Memory that explicit matrices may take: a third of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 3
    try:
        with open("/proc/meminfo") as file:
            free = next(line for line in file if line.startswith("MemAvailable"))
        return int(free.split()[1]) * 1024 / 3
    except OSError:  # not Linux
        return 4e9
