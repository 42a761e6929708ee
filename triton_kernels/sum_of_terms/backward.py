"""The launches of the gradients of the sum of terms; `backward_kernels` has the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import (
    Extras,
    alignment,
    fixed,
    form,
    out_strides,
    pointers,
    ranked,
)
from hookctl.kernels.common.launch import INTERPRETED, WIDTHS, Specimen, cdiv, pieces
from hookctl.kernels.common.launch_tables import KEYS, QUERIES, RANKED, entry, needed, tile_for
from hookctl.kernels.common.stretches import Tables
from hookctl.kernels.sum_of_terms.backward_kernels import (
    keys_kernel,
    overlaps_kernel,
    queries_kernel,
    rowsums_kernel,
)

_OWNED = {"sources": "*i64:16", "starts": "*i32:16", "users": "*i32:16"}
_PLAIN = {"lse": "*fp32:16", "offsets": "*fp32:16", "weights": None, "WEIGHTED": False}
_FULL = _PLAIN | {"weights": "*fp32:16", "WEIGHTED": True, "bias": "*fp32:16", "BIASED": True}


def gradients(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    extras: Extras,
    t: Tables,
    scale: float,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    lse_gradient: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradient of each stack of q, k and v and of the weights; empty where it is not wanted."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    arguments = fixed(q[0], extras, t, scale) | out_strides(gradient)
    arguments |= pointers(q, k, v, extras) | alignment(*q, *k, *v, gradient, out)
    key = arguments["D0"], arguments["D1"]
    arguments |= {"gradient": gradient, "lse": lse, "weights": extras.weights}
    arguments |= {"WEIGHTED": extras.weights is not None}
    ranked_by = RANKED if extras.key_factors is not None else ""
    of_queries, of_keys = QUERIES + ranked_by, KEYS + ranked_by
    tile = needed(tile_for(of_queries, key, q[0]), of_queries, q[0])
    key_tile = needed(tile_for(of_keys, key, q[0]), of_keys, q[0])
    by_queries = arguments | tile.sides | tile.options
    by_keys = arguments | key_tile.sides | key_tile.options
    lse_gradient = lse_gradient.contiguous()
    of_weights = extras.weights is not None and wanted[-1]
    _, sub, heads, n, _ = q[0].shape
    found: list[Tensor] = []
    with torch.cuda.device_of(q[0]):
        offsets = torch.empty_like(lse)
        rowsums = torch.empty_like(lse) if of_weights or not t.single else None
        grid = cdiv(n, tile.block_m), sub * heads, out.shape[0]
        if rowsums is None:
            overlaps_kernel[grid](
                **_of_out(by_queries, out), lse_gradient=lse_gradient, offsets=offsets
            )
        else:
            rowsums_kernel[grid](
                **by_queries,
                lse_gradient=lse_gradient,
                rowsums=rowsums,
                offsets=offsets,
                starts=t.starts,
            )
        for which, stacks in enumerate((q, k, v)):
            of_kind = tuple(wanted[len(found) : len(found) + len(stacks)])
            chosen = (by_keys if which else by_queries) | {"offsets": offsets}
            found += _of_stacks(which, stacks, of_kind, chosen, t)
    if extras.weights is not None:
        found.append(_of_weights(extras.weights, rowsums, t) if of_weights else lse.new_empty(0))
    return found


def _of_out(arguments: dict[str, Any], out: Tensor) -> dict[str, Any]:
    """The arguments of `overlaps_kernel`."""
    names = ["gradient", "tokens", "heads", "o_row", "o_sub", "o_head", "o_token", "D", "D0", "D1"]
    names += ["BM", "ALIGN", *INTERPRETED.options]
    strides = zip(("x_row", "x_sub", "x_head", "x_token"), out.stride(), strict=False)
    return {name: arguments[name] for name in names} | dict(strides) | {"out": out}


def _of_stacks(
    which: int,
    stacks: Sequence[Tensor],
    wanted: tuple[bool, ...],
    arguments: dict[str, Any],
    t: Tables,
) -> list[Tensor]:
    """The gradients of the stacks of q (0), k (1) or v (2). Rows that nothing used get zeros."""
    found = [
        x.new_zeros(x.shape) if w else x.new_empty(0) for x, w in zip(stacks, wanted, strict=True)
    ]
    users = t.users(which, wanted)
    if not users.rows:
        return found
    _, sub, heads, _, _ = stacks[0].shape
    tokens = max(x.shape[-2] for x in stacks)
    kernel: Any = queries_kernel if which == 0 else keys_kernel
    prefix, block = ("dq", arguments["BM"]) if which == 0 else ("dx", arguments["BN"])
    padded = [*found, *[found[0]] * (stretches.STACKS - len(found))]
    values = {} if which == 0 else {"VALUES": which == 2}
    kernel[cdiv(tokens, block), sub * heads, users.rows](
        **arguments,
        **values,
        **{f"{prefix}{i}": x for i, x in enumerate(padded)},
        sources=users.sources,
        starts=users.starts,
        users=users.stretches,
    )
    return found


def _of_weights(weights: Tensor, rowsums: Tensor | None, t: Tables) -> Tensor:
    """[W, N]: a weight multiplies all heads, and may serve several terms."""
    assert rowsums is not None  # they are made whenever weights learn
    found = torch.zeros_like(weights)
    for term, (_, number, row) in zip(rowsums, t.terms, strict=True):
        if row >= 0:
            found[row] += number * term.sum((0, 1))
    return found


def specimens(arch: str) -> Iterator[Specimen]:
    """What ships for an architecture: plain, and with all that a row may have in bf16 and fp32."""
    of_terms = {"lse_gradient": "*fp32:16", "rowsums": "*fp32:16", "starts": "*i32:16"}
    kinds: tuple[tuple[str, Any, str, dict[str, Any]], ...] = (
        ("rowsums", rowsums_kernel, QUERIES, of_terms),
        ("dQ", queries_kernel, QUERIES, _OWNED),
        ("dK", keys_kernel, KEYS, _OWNED | {"VALUES": False}),
        ("dV", keys_kernel, KEYS, _OWNED | {"VALUES": True}),
    )
    for d in WIDTHS:
        for name, kernel, table, own in kinds:
            plain = [(element, _PLAIN) for element in ("fp16", "fp32")]
            full = [(element, _FULL | ranked(element)) for element in ("bf16", "fp32")]
            for element, more in (*plain, *full):
                ranked_by = RANKED if "RANK" in more else ""
                tile = entry(table + ranked_by, arch, pieces(d), element)
                if tile is not None:
                    given = form(element, d) | own | more | {"gradient": f"*{element}:16"}
                    given |= tile.sides
                    found = [x for x in kernel.arg_names if x[:2] in ("dq", "dx")]
                    given |= dict.fromkeys(found, f"*{element}:16")
                    at = f"sum of terms, {name}{ranked_by}, {element}, {d}"
                    yield Specimen(at, kernel, given, tile, arch, dots=element != "fp32")
        yield from _of_overlaps(arch, d)


def _of_overlaps(arch: str, d: int) -> Iterator[Specimen]:
    strides = dict.fromkeys(("x_row", "x_sub", "x_head", "x_token"), "i32:16")
    for element in ("fp16", "bf16", "fp32"):
        tile = entry(QUERIES, arch, pieces(d), element)
        if tile is not None:
            common = form(element, d) | tile.sides
            names = overlaps_kernel.arg_names
            given = {name: x for name, x in common.items() if name in names} | strides
            given |= dict.fromkeys(("gradient", "out"), f"*{element}:16")
            given |= dict.fromkeys(("lse_gradient", "offsets"), "*fp32:16")
            name = f"sum of terms, overlaps, {element}, {d}"
            yield Specimen(name, overlaps_kernel, given, tile, arch, dots=False)
