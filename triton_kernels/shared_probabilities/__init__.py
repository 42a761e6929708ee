"""One softmax, several value tensors: for the rows r of a group

    out_r = softmax(q k^T * scale) v_r

Prompt-to-prompt's self-replacement (Hertz et al., arXiv 2208.01626) gives the source's
probabilities to the source and to all its edits: a batch of R rows costs 1 + R products instead of
2 R.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hookctl.kernels.common.launch import DTYPES, WIDEST, check_launch
from hookctl.kernels.shared_probabilities import forward
from hookctl.kernels.shared_probabilities.groups import Group, encode

__all__ = ["Group", "shared_probabilities"]


def shared_probabilities(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """Rows that share their probabilities, group by group, in one launch.

    q, k, v: stacks [rows, sub-batch, heads, tokens, channels] of any strides, alike but for their
    rows and tokens. Returns the outputs [rows of all groups in order, sub-batch, heads, N,
    channels] in the dtype of q and the natural log-sum-exp of the scores, float32 [groups,
    sub-batch, heads, N]; both are differentiable in q, k and v.
    Raises ValueError for stacks that differ, groups of rows that are not there, and where no kernel
    can run or none ships for the dtype and the width.
    """
    _check(q, k, v, groups)
    return forward.operator(q, k, v, encode(groups), scale)


def _check(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group]) -> None:
    check_launch("shared_probabilities", q)
    alike = {(x.dtype, x.device, x.dim(), x.shape[1:3], x.shape[-1]) for x in (q, k, v)}
    if len(alike) > 1 or q.dim() != 5 or k.shape[-2] != v.shape[-2] or not k.shape[-2]:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
        raise ValueError(
            f"shared_probabilities: q, k, v are {shapes}; give stacks [rows, sub-batch, heads, "
            "tokens, channels] of one dtype and device, k and v of as many tokens"
        )
    if q.dtype not in DTYPES or q.shape[-1] > WIDEST:
        raise ValueError(
            f"shared_probabilities: q is {q.dtype} with {q.shape[-1]} channels; give fp32, fp16 "
            f"or bf16 with at most {WIDEST}"
        )
    if not groups or not all(group.values for group in groups):
        raise ValueError("shared_probabilities: give groups, each of one row of values or more")
    for group in groups:
        named = ((group.q, q), (group.k, k), *((row, v) for row in group.values))
        if not all(0 <= row < len(x) for row, x in named):
            rows = ", ".join(str(len(x)) for x in (q, k, v))
            raise ValueError(f"shared_probabilities: {group}, but q, k, v have {rows} rows")
