"""What can't be launched is refused: ValueError says what was given and what to give."""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.launch import DTYPES, WIDEST, check_launch
from hookctl.kernels.common.stretches import STACKS, Stretch


def check_stacks(q: list[Tensor], k: list[Tensor], v: list[Tensor], terms: list[Stretch]) -> None:
    first = q[0]
    check_launch("sum_of_terms", first)
    for name, stacks in (("q", q), ("k", k), ("v", v)):
        if not 0 < len(stacks) <= STACKS:
            raise ValueError(f"sum_of_terms: {name} is {len(stacks)} stacks; give 1 to {STACKS}")
        for x in stacks:
            alike = x.dtype == first.dtype and x.device == first.device and x.dim() == 5
            if not alike or (x.shape[1:3], x.shape[-1]) != (first.shape[1:3], first.shape[-1]):
                raise ValueError(
                    f"sum_of_terms: {name} has {x.dtype} {tuple(x.shape)} on {x.device}; it must "
                    f"be like q, {first.dtype} {tuple(first.shape)} on {first.device}, but for its "
                    "rows and tokens"
                )
        _check_rows(terms, name, sum(len(x) for x in stacks), least=0)
    if first.dtype not in DTYPES or first.shape[-1] > WIDEST:
        raise ValueError(
            f"sum_of_terms: q is {first.dtype} with {first.shape[-1]} channels; give fp32, fp16 "
            f"or bf16 with at most {WIDEST}"
        )
    lengths = [x.shape[-2] for x in q]
    if len(set(lengths)) > 1:
        raise ValueError(f"sum_of_terms: the stacks of q have {lengths} tokens; give one length")
    for s in terms:
        of_k, of_v = stretches.row_of(k, s.k).shape[-2], stretches.row_of(v, s.v).shape[-2]
        if of_k != of_v:
            raise ValueError(f"sum_of_terms: {s} has {of_k} keys and {of_v} values")
    rows = [s.row for s in terms]
    if rows != sorted(rows) or set(rows) != set(range(rows[-1] + 1)) or not terms[-1].closes:
        raise ValueError("sum_of_terms: sort the terms by row, each row from 0 on with one or more")


def _check_rows(terms: list[Stretch], name: str, rows: int, least: int) -> None:
    for s in terms:
        if not least <= getattr(s, name) < rows:
            raise ValueError(f"sum_of_terms: {s}, but there are {rows} rows of {name}")


def check_extras(
    q: list[Tensor],
    k: list[Tensor],
    terms: list[Stretch],
    weights: Tensor | None,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> None:
    _, sub, heads, tokens, _ = q[0].shape
    of_queries, of_keys = factors or (None, None)
    for name, x in (("weights", weights), ("bias", bias), ("factors", of_queries)):
        _check_rows(terms, name, 0 if x is None else len(x), least=-1)

    def longest(name: str) -> int:
        used = (s for s in terms if getattr(s, name) >= 0)
        return max((stretches.row_of(k, s.k).shape[-2] for s in used), default=0)

    def check(name: str, x: Tensor, fits: bool, want: str) -> None:
        if not fits or x.device != q[0].device:
            raise ValueError(
                f"sum_of_terms: {name} is {tuple(x.shape)} on {x.device}; give [rows, {want}] "
                f"on {q[0].device}"
            )

    if weights is not None:
        check("weights", weights, tuple(weights.shape[1:]) == (tokens,), f"{tokens}")
    if bias is not None:
        of_sub, of_heads, keys = bias.shape[1:] if bias.dim() == 4 else (0, 0, -1)
        fits = of_sub in (1, sub) and of_heads in (1, heads) and keys >= longest("bias")
        check("bias", bias, fits, f"{sub} or 1, {heads} or 1, {longest('bias')} or more")
    if of_queries is not None and of_keys is not None:
        rows, rank = len(of_queries), of_queries.shape[-1]
        fits = tuple(of_queries.shape) == (rows, tokens, rank)
        check("the first of factors", of_queries, fits, f"{tokens}, r")
        fits = of_keys.dim() == 3 and tuple(of_keys.shape[::2]) == (rows, rank)
        fits = fits and of_keys.shape[1] >= longest("factors")
        check("the second of factors", of_keys, fits, f"{longest('factors')} or more, {rank}")
    constants = [x for x in (bias, of_queries, of_keys) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in constants):
        raise ValueError(
            "sum_of_terms: biases are constants; detach them, or use SDPA to learn them"
        )
