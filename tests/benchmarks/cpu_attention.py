"""One edited attention call on a CPU, against control on explicit matrices and against SDPA.

    python -m tests.benchmarks.cpu_attention [--rounds N] [--only WORD] [--json FILE]

Four rows (source and edit, guided), one thread, float32, module layout in and out. `eager` is what
the official code does: heads into the batch, the matrix of every row, edited in place. `fold` is
one SDPA call per term over values mapped by a matrix product; `plain` is SDPA without any edit.
Medians of interleaved rounds of process time, and medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Site
from hookctl.attention import plan
from hookctl.attention.call import AttentionCall, Routing

ROWS = Rows([Row(2 * b + p, branch, p, 0) for b, branch in enumerate(("uncond", "cond"))
             for p in (0, 1)])  # fmt: skip
TOKENS = 77
SELF = ((64, 8, 160), (256, 8, 160), (1024, 8, 80), (1024, 20, 64), (4096, 8, 40), (4096, 10, 64))
CROSS = ((256, 2, 32), *SELF)
Form = Callable[[], Tensor]


def token_edit(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token map, blend and gain of a typical edit of each kind."""
    token_map, blend, gain = torch.eye(TOKENS), torch.ones(TOKENS), torch.ones(TOKENS)
    if kind == "replace":
        token_map[5, 5] = 0
        token_map[5, 5:7] = 0.5
    elif kind == "refine":
        index = torch.arange(TOKENS)
        index[8:] -= 3
        token_map = torch.zeros(TOKENS, TOKENS)
        token_map[index, torch.arange(TOKENS)] = 1
        blend[5:8] = 0
    else:
        gain[5] = 3.0
    return token_map, blend, gain


def forms(kind: str, n: int, heads: int, d: int) -> dict[str, Form]:
    m = n if kind == "self" else TOKENS
    given = [torch.randn(4, t, heads * d) for t in (n, m, m)]
    token_map, blend, gain = token_edit(kind)
    scale = d**-0.5
    routing = Routing.of(TOKENS, None if kind == "reweight" else token_map, blend, gain)
    index = token_map.argmax(0)
    site = Site("site", "self" if kind == "self" else "cross", "down", 0, 0)

    def split() -> list[Tensor]:
        return [x.unflatten(-1, (heads, d)).transpose(1, 2) for x in given]

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(4, n, heads * d)

    def edit(p: Tensor) -> None:
        if kind == "self":
            p[3] = p[2]
        elif kind == "replace":
            p[3] = torch.einsum("hpw,wn->hpn", p[2], token_map)
        elif kind == "refine":
            p[3] = p[2][:, :, index] * blend + (1 - blend) * p[3]
        else:
            p[3] = p[2] * gain

    def eager() -> Tensor:
        q, k, v = (x.reshape(4 * heads, -1, d) for x in split())
        p = torch.baddbmm(q.new_empty(4 * heads, n, m), q, k.mT, beta=0, alpha=scale).softmax(-1)
        edit(p.view(4, heads, n, m))
        return merge(torch.bmm(p, v).view(4, heads, n, d))

    def fold() -> Tensor:
        q, k, v = split()
        out = q.new_empty(4, n, heads, d).transpose(1, 2)
        out[:3] = F.scaled_dot_product_attention(q[:3], k[:3], v[:3])
        moved = v[3:] if kind == "self" else (token_map * (blend * gain)) @ v[3:]
        out[3:] = F.scaled_dot_product_attention(q[2:3], k[2:3], moved)
        if kind == "refine":
            own = v[3:] * ((1 - blend) * gain)[:, None]
            out[3:] += F.scaled_dot_product_attention(q[3:], k[3:], own)
        return merge(out)

    def plain() -> Tensor:
        return merge(F.scaled_dot_product_attention(*split()))

    def ours() -> Tensor:
        q, k, v = (x.unsqueeze(1) for x in split())
        call = AttentionCall(site, q, k, v, rows=ROWS, clock=Clock(0, 10, 1.0), scale=scale)
        if kind == "self":
            call.borrow(3, q=2, k=2)
        else:
            call.route_by(3, 2, routing)
        return merge(plan.evaluate(call)[0].flatten(0, 1))

    return {"ours": ours, "eager": eager, "fold": fold, "plain": plain}


def measure(kind: str, n: int, heads: int, d: int, rounds: int | None) -> dict[str, object]:
    every = forms(kind, n, heads, d)
    outs = {name: form() for name, form in every.items()}
    for name in ("eager", "fold"):
        torch.testing.assert_close(outs["ours"], outs[name], rtol=1e-3, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds or max(4, min(60, 4_000_000 // (n * (n if kind == "self" else TOKENS))))):
        for name, form in every.items():
            start = time.process_time()
            form()
            times[name].append(time.process_time() - start)
    row: dict[str, object] = {"edit": kind, "tokens": n, "heads": heads, "channels": d}
    row |= {f"{name}_ms": round(1e3 * statistics.median(t), 3) for name, t in times.items()}
    for name in ("eager", "fold", "plain"):
        ratios = [b / a for a, b in zip(times["ours"], times[name], strict=True)]
        row[f"{name}/ours"] = round(statistics.median(ratios), 2)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, help="rounds per shape; by default by its size")
    parser.add_argument("--only", default="", help="only edits whose name contains this")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = []
    for kind in ("self", "replace", "refine", "reweight"):
        if args.only in kind:
            for shape in SELF if kind == "self" else CROSS:
                row = measure(kind, *shape, args.rounds)
                if not table:
                    print("  ".join(row), flush=True)
                table.append(row)
                print("  ".join(f"{v!s:>{len(k)}}" for k, v in row.items()), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": 1, "figures": table}, file, indent=1)


if __name__ == "__main__":
    main()
