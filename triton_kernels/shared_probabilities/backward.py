"""Gradients of shared probabilities: those of a sum of terms, one of each row."""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import Extras, tables_of
from hookctl.kernels.common.stretches import Stretch
from hookctl.kernels.shared_probabilities.groups import decode
from hookctl.kernels.sum_of_terms.backward import gradients


@torch.library.custom_op(
    "hookctl::shared_probabilities_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gradient, "
    "Tensor lse_gradient, int[] integers, float scale, bool[] wanted) -> Tensor[]",
)
def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    lse_gradient: Tensor,
    integers: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of q, k and v; empty where they are not wanted."""
    groups = decode(integers)
    pairs = [(i, row) for i, group in enumerate(groups) for row in group.values]
    terms = [Stretch(at, groups[i].q, groups[i].k, row) for at, (i, row) in enumerate(pairs)]
    lse = lse[[i for i, _ in pairs]]
    # A group has one log-sum-exp: its first row answers for it.
    of_terms = torch.zeros_like(lse)
    of_terms[[0, *accumulate(len(group.values) for group in groups[:-1])]] = lse_gradient
    integers, numbers = stretches.encode(terms)
    t = tables_of([q], [k], [v], Extras(), integers, numbers, len(pairs))
    return gradients([q], [k], [v], Extras(), t, scale, out, lse, gradient, of_terms, wanted)


@operator.register_fake
def _(q, k, v, out, lse, gradient, lse_gradient, integers, scale, wanted):
    return [x.new_empty(x.shape if w else (0,)) for x, w in zip((q, k, v), wanted, strict=True)]
