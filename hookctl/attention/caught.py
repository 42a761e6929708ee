"""One caught attention call: made an `AttentionCall`, shown to its editors, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import PERTURBED, Rows
from hookctl.address.sites import Site
from hookctl.attention import plan
from hookctl.attention.call import AttentionCall
from hookctl.attention.repeats import Repeats
from hookctl.attention.widened import OwnPart


class Caught(NamedTuple):
    """The arguments of one `scaled_dot_product_attention`.

    part: its tensors, with the texts of editors cut off; own: what the model itself would do, None
    for SDPA.
    """

    part: OwnPart
    dropout_p: float
    is_causal: bool
    scale: float | None
    own: Callable[[], Tensor] | None = None

    def original(self) -> Tensor:
        """What the model itself would have got."""
        part = self.part
        if self.own is not None and part.k is part.full[0]:
            return self.own()
        return F.scaled_dot_product_attention(
            part.q, part.k, part.v, part.mask, self.dropout_p, self.is_causal, scale=self.scale
        )


def edit(
    caught: Caught,
    site: Site,
    state: Any,
    attached: Sequence[Any],
    *,
    index: int,
    joint_order: str | None,
    keeps_perturbed: bool,
    repeated: bool,
    repeats: Repeats,
) -> Tensor:
    """Show a call to its editors and evaluate what they made of it.

    attached: editors with their sessions; index: of the call in its module's forward;
    keeps_perturbed: False where the pipeline attends to its perturbed rows apart; repeated: the
    call is made again for a backward pass, so read-outs are not handed out twice; repeats: the
    calls that may be like this one.
    """
    part = caught.part
    rows, count = _rows_of(part.q, state.rows, index, keeps_perturbed)
    mask = part.mask
    if caught.is_causal:
        mask = plan.causal_mask(part.q.shape[-2], part.k.shape[-2], part.q.device)
    call = AttentionCall(
        site,
        *(plan.stack_rows(x, count) for x in (part.q, part.k, part.v)),
        rows=rows,
        clock=state.clock,
        scale=part.q.shape[-1] ** -0.5 if caught.scale is None else caught.scale,
        mask=plan.stack_mask(mask, count),
        latent=state.grid,
        text_tokens=state.own_text,
        joint_order=joint_order,
        index=index,
        context=part.context,
        prompts=state.prompts,
    )
    if part.context:
        call.set_context_source(*(plan.stack_rows(x, count) for x in part.full))
    for one in attached:
        call.editor = one.editor
        one.editor.attention(call)
    if state.reading is not None:
        # A call made to read maps: those that others read belong to the pipeline's own calls.
        call.read_outs = [r for r in call.read_outs if r.editor is state.reading.reader]
    if repeated:
        call.read_outs = [r._replace(into=lambda row, values: None) for r in call.read_outs]
    if not call.operations:
        if call.read_outs:
            plan.read_only(call, _backend(attached), repeats)
            _log(attached, call, plan.PASS_THROUGH, state)
        return caught.original()
    out, chosen = plan.evaluate(call, _backend(attached), repeats)
    _log(attached, call, chosen, state)
    return out.flatten(0, 1)


def ungrouped(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries (grouped-query attention)."""
    if not grouped or q.shape[-3] == k.shape[-3]:
        return k, v
    repeats = q.shape[-3] // k.shape[-3]
    return k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)


def per_sample(q: Tensor, rows: Rows) -> bool:
    """Whether a model loops over its samples, so that this call holds only one of them."""
    return q.shape[0] == 1 and len(rows) > 1


def _rows_of(q: Tensor, rows: Rows, index: int, keeps_perturbed: bool) -> tuple[Rows, int]:
    if not keeps_perturbed:
        kept = [row for row in rows if row.branch != PERTURBED]
        return Rows(kept), len(kept)
    if per_sample(q, rows):
        row = rows[index % len(rows)]
        return Rows([replace(row, index=0)]), 1
    return rows, len(rows)


def _backend(attached: Iterable[Any]) -> str:
    """The backend that some session asks for by name, the innermost first."""
    asked = [one.session.backend for one in attached if one.session.backend != "auto"]
    return asked[-1] if asked else "auto"


def _log(attached: Iterable[Any], call: AttentionCall, chosen: plan.Plan, state: Any) -> None:
    for one in attached:
        verbs = {o.verb for o in call.operations if o.editor is one.editor}
        if call.read_outs and not verbs:
            verbs = {"read"}
        if verbs:
            one.session.log.note(one.editor, call.site, state.clock.turn, verbs, chosen)
