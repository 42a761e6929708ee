"""One caught attention call: made an `AttentionCall`, shown to its editors, evaluated.

Texts that editors brought (`Editor.context`) are cut off before anyone sees the call (`own_part`);
editors find their keys and values by `AttentionCall.context`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import PERTURBED, Row, Rows
from hookctl.address.sites import ImageTokens, Site
from hookctl.attention.call import AttentionCall
from hookctl.attention.query_lists import TextPlace
from hookctl.attention.sdpa_call import SDPACall
from hookctl.attention.text_rows import TextRows
from hookctl.errors import UnsupportedError, naming
from hookctl.evaluate import plan
from hookctl.evaluate.own_part import OwnPart, own_part
from hookctl.evaluate.plan import Plan


class Attached(Protocol):
    """One editor in one session, as an attention call knows it."""

    @property
    def editor(self) -> SeesAttention: ...

    @property
    def backend(self) -> str:
        """As its session was told."""

    def sees(self, path: str) -> bool:
        """Whether the editor is shown the calls of a site."""

    def note(self, site: Site, step: int, verbs: set[str], plan: Plan) -> None:
        """Keep what the editor did at a site for the session's report."""


class SeesAttention(Protocol):
    def attention(self, call: AttentionCall) -> None: ...


class DenoiserCall(Protocol):
    """The denoiser call that an attention call belongs to (`loop.state.State`)."""

    rows: Rows
    clock: Clock
    grid: tuple[int, ...]
    part: bool
    images_in_sequence: ImageTokens | None
    prompts: tuple[str, ...]
    own_text: int | None
    extra_text: dict[str, TextPlace]
    text_rotations: Tensor | None
    text_rows: TextRows | None

    @property
    def reader(self) -> Reader | None:
        """Whose read-outs alone are served, None for everyone's."""


class Reader(NamedTuple):
    editor: object


@dataclass(eq=False)
class EditedSite:
    """A site whose calls are shown to some editors.

    attached: the editors, in order; own_call: which attention call of the module's forward is the
    model's own; joint_order: of a joint sequence, "image_text" or "text_image"; keeps_perturbed:
    says False where the pipeline attends to its perturbed rows apart.
    """

    site: Site
    attached: Sequence[Attached]
    own_call: int = 0
    joint_order: str | None = None
    keeps_perturbed: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        # The innermost session that asks for a backend by name has its way.
        asked = [one.backend for one in self.attached if one.backend != "auto"]
        self._backend = asked[-1] if asked else "auto"
        self._reported: set[tuple[object, ...]] = set()

    def output(
        self,
        given: SDPACall,
        original: Callable[[], Tensor] | None,
        denoiser_call: DenoiserCall,
        *,
        index: int,
        repeated: bool,
    ) -> Tensor:
        """Show a call to the editors and evaluate what they made of it.

        original: what the model itself would do, None for SDPA; index: of the call in its module's
        forward; repeated: the call is made again for a backward pass, so read-outs are not handed
        out twice. Returns [batch, heads, queries, channels].
        """
        given = given.ungrouped()
        part = own_part(denoiser_call, self.site.kind, self.joint_order, given)
        own = part.call
        plain = original if original is not None and part.call is given else own.attend
        further = index != self.own_call
        apart = not self.keeps_perturbed()  # its further calls are those of the perturbed rows
        if further and (apart or not per_sample(own.query, denoiser_call.rows)):
            return plain()
        if denoiser_call.extra_text and not part.context and self.site.kind in ("cross", "joint"):
            raise UnsupportedError(
                f"{self.site.path} attends to {given.key.shape[-2]} keys, in which the further "
                "texts that editors gave can't be told from the rest; leave it out with sites="
            )
        call = self._shown(part, denoiser_call, index)
        if repeated:
            call.read_outs = [r._replace(into=_discard) for r in call.read_outs]
            call.output_reads.clear()
        of_texts = part.of_texts(call)
        if not call.operations:
            if call.read_outs or call.output_reads:
                plan.read_only(call, self._backend)
                self._note(call, plan.PASS_THROUGH)
            if call.output_reads and original is not None:
                _hand_out(call, own.attend(), of_texts)  # its own way may not come back here
                call.output_reads.clear()
            out = plain()
        else:
            with naming(_editors_of(call), "attention", self.site.path):
                made, chosen = plan.evaluate(call, self._backend)
            self._note(call, chosen)
            out = made.flatten(0, 1)
        _hand_out(call, out, of_texts)
        return part.whole(out, of_texts)

    def _shown(self, part: OwnPart, denoiser_call: DenoiserCall, index: int) -> AttentionCall:
        own = part.call
        rows, count = self._rows(own.query, denoiser_call.rows, index)
        mask = own.attn_mask
        if own.is_causal:
            mask = causal_mask(own.query.shape[-2], own.key.shape[-2], own.query.device)
        call = AttentionCall(
            self.site,
            stack_rows(own.query, count),
            stack_rows(own.key, count),
            stack_rows(own.value, count),
            rows=rows,
            clock=denoiser_call.clock,
            scale=own.query.shape[-1] ** -0.5 if own.scale is None else own.scale,
            mask=stack_mask(mask, count),
            latent=denoiser_call.grid,
            part=denoiser_call.part,
            text_tokens=denoiser_call.own_text,
            joint_order=self.joint_order,
            images=denoiser_call.images_in_sequence,
            index=index,
            context=part.context,
            prompts=denoiser_call.prompts,
        )
        call.apart = None if part.context else part.apart
        if part.context:
            call.set_context_source(*(stack_rows(x, count) for x in part.full))
        for one in self.attached:
            if one.sees(self.site.path):
                call.show_to(one.editor)
        reader = denoiser_call.reader
        if reader is not None:
            call.read_outs = [r for r in call.read_outs if r.editor is reader.editor]
            call.output_reads = [r for r in call.output_reads if r.editor is reader.editor]
        return call

    def _rows(self, q: Tensor, rows: Rows, index: int) -> tuple[Rows, int]:
        if not self.keeps_perturbed():
            kept = [row for row in rows if row.branch != PERTURBED]
            return Rows(kept), len(kept)
        if per_sample(q, rows):
            row = rows[index % len(rows)]
            return Rows([replace(row, index=0)]), 1
        return rows, len(rows)

    def _note(self, call: AttentionCall, chosen: Plan) -> None:
        """Once for each step: its other denoiser calls are like the first."""
        done = (call.clock.step, chosen, *[(o.verb, id(o.editor)) for o in call.operations])
        looking = [r.editor for r in call.read_outs] + [r.editor for r in call.output_reads]
        done = (*done, *map(id, looking))
        if done in self._reported:
            return
        self._reported.add(done)
        for one in self.attached:
            verbs = {o.verb for o in call.operations if o.editor is one.editor}
            if any(editor is one.editor for editor in looking):
                verbs.add("read")
            if verbs:
                one.note(self.site, call.clock.step, verbs, chosen)


def _editors_of(call: AttentionCall) -> str:
    """Who rewrote a call."""
    names = [getattr(o.editor, "name", type(o.editor).__name__) for o in call.operations]
    return " + ".join(dict.fromkeys(names))


def _hand_out(call: AttentionCall, out: Tensor, of_texts: Mapping[str, Tensor]) -> None:
    """Hand out the outputs that are read; out: of the call, [batch, heads, queries, channels]."""
    start, stop = call.spans.image_queries if call.output_reads else (0, 0)
    count = len(call.rows)
    for request in call.output_reads:
        name = request.text
        found = out[..., start:stop, :] if name is None else of_texts[name]
        one = stack_rows(found, count)[request.row.index]
        request.into(request.row, one.transpose(1, 2).flatten(2))


def _discard(row: Row, values: Tensor) -> None:
    pass


def per_sample(q: Tensor, rows: Rows) -> bool:
    """Whether a model loops over its samples, so that this call holds only one of them."""
    return q.shape[0] == 1 and len(rows) > 1


def stack_rows(x: Tensor, rows: int) -> Tensor:
    """[batch, heads, tokens, channels] -> [rows, sub-batch, heads, tokens, channels]."""
    batch = len(x)
    if batch == rows:
        return x.unsqueeze(1)
    if batch % rows:
        raise UnsupportedError(
            f"an attention call has a batch of {batch}, which is no multiple of the denoiser's "
            f"{rows} rows"
        )
    return x.view(rows, batch // rows, *x.shape[1:])


def stack_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The model's mask as a stack [rows | 1, sub-batch | 1, heads | 1, N | 1, M]."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask[None]  # as torch broadcasts it: [heads, N, M], [N, M] or [M]
    return mask[None] if mask.shape[0] == 1 else stack_rows(mask, rows)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
