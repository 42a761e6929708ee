"""What every kernel over stretches is launched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hookctl.kernels.common.launch import aligned, interpreting, sizes
from hookctl.kernels.common.stretches import STACKS, Stack, Tables, layout, tables

# log2(e): the query factors carry it, since kernels take exponentials in base 2.
_LOG2E = 1.4426950408889634
_RANK = 16  # columns of a product on tensor cores come in sixteens


class Extras(NamedTuple):
    """Weights and biases as the kernels read them.

    weights: fp32 [W, N]; bias: fp32 [B, sub-batch, heads, M], expanded; query_factors [F, N, R] in
    base 2 and key_factors [F, M, R] in the dtype of q, R a multiple of 16.
    """

    weights: Tensor | None = None
    bias: Tensor | None = None
    query_factors: Tensor | None = None
    key_factors: Tensor | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        factors: tuple[Tensor, Tensor] | None,
    ) -> Extras:
        """Traceable: weights keep their gradient."""
        _, sub, heads, *_ = q.shape
        if weights is not None:
            weights = weights.float().contiguous()
        if bias is not None:
            bias = bias.detach().float().contiguous().expand(-1, sub, heads, -1)
        if factors is None:
            return cls(weights, bias)
        rank = -(-factors[0].shape[-1] // _RANK) * _RANK
        rank = 1 << (rank - 1).bit_length()
        of_queries, of_keys = (
            torch.nn.functional.pad(x.detach(), (0, rank - x.shape[-1])) for x in factors
        )
        return cls(weights, bias, (of_queries * _LOG2E).to(q.dtype), of_keys.to(q.dtype))


def tables_of(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    extras: Extras,
    integers: Sequence[int],
    numbers: Sequence[float],
    rows: int,
) -> Tables:
    bias, factors = extras.bias, (extras.query_factors, extras.key_factors)
    sizes = [0 if x is None else x[0].numel() for x in factors]
    return tables(
        tuple(integers),
        tuple(numbers),
        rows,
        (layout(q), layout(k), layout(v)),
        None if bias is None else Stack(tuple(bias.shape), bias.stride()),
        (sizes[0], sizes[1]),
        q[0].device,
    )


def fixed(like: Tensor, extras: Extras, t: Tables, scale: float) -> dict[str, Any]:
    """The arguments of all kernels that calls of one form share; like: queries."""
    return {
        "cells": t.cells,
        "numbers": t.numbers,
        "tokens": like.shape[-2],
        "heads": like.shape[2],
        "scale": scale,
        **sizes(like.shape[-1]),
        "BIASED": extras.bias is not None,
        "RANK": 0 if extras.key_factors is None else extras.key_factors.shape[-1],
        "UPCAST": interpreting() and like.dtype == torch.bfloat16,
    }


def pointers(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], extras: Extras
) -> dict[str, Tensor | None]:
    """The tensors that differ between them."""
    return {
        **_three("q", q),
        **_three("k", k),
        **_three("v", v),
        "bias": extras.bias,
        "query_factors": extras.query_factors,
        "key_factors": extras.key_factors,
    }


def alignment(*stacks: Tensor) -> dict[str, int]:
    """What follows from where stacks lie: channels that are loaded at once."""
    return {"ALIGN": 16 // stacks[0].element_size() if aligned(*stacks) else 1}


def out_strides(x: Tensor) -> dict[str, int]:
    """Strides of an output [rows, sub-batch, heads, N, channels], or of its gradient."""
    return dict(zip(("o_row", "o_sub", "o_head", "o_token"), x.stride(), strict=False))


def _three(name: str, stacks: Sequence[Tensor]) -> dict[str, Tensor]:
    padded = [*stacks, *[stacks[0]] * (STACKS - len(stacks))]
    return {f"{name}{i}": x for i, x in enumerate(padded)}


def form(dtype: str, width: int) -> dict[str, Any]:
    """The types of these, for compilation ahead of time: aligned, without biases."""
    return {
        **{f"{name}{i}": f"*{dtype}:16" for name in "qkv" for i in range(STACKS)},
        "cells": "*i64:16",
        "numbers": "*fp32:16",
        **dict.fromkeys(("bias", "query_factors", "key_factors")),
        **dict.fromkeys(("tokens", "heads"), "i32"),
        "scale": "fp32",
        **dict.fromkeys(("o_row", "o_sub", "o_head", "o_token"), "i32:16"),
        **sizes(width),
        "ALIGN": 4 if dtype == "fp32" else 8,
        "BIASED": False,
        "RANK": 0,
        "UPCAST": False,
    }


def ranked(dtype: str) -> dict[str, Any]:
    """What `form` is changed by for rank-r biases."""
    return {**dict.fromkeys(("query_factors", "key_factors"), f"*{dtype}:16"), "RANK": _RANK}
