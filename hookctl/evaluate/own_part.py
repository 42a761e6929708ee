"""A call over a text with others behind it, without those, and how to put it back.

The plain call must not attend to the texts that editors brought (`Editor.context`). They are cut
off before anyone sees the call; editors find their keys and values by `AttentionCall.context`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import Rows
from hookctl.attention.arguments import additive
from hookctl.attention.call import AttentionCall
from hookctl.attention.query_lists import TextPlace
from hookctl.attention.sdpa_call import SDPACall
from hookctl.attention.text_rows import Apart, TextRows
from hookctl.errors import UnsupportedError


class DenoiserTexts(Protocol):
    """The denoiser call, as far as its texts go."""

    own_text: int | None
    extra_text: dict[str, TextPlace]
    text_rotations: Tensor | None
    text_rows: TextRows | None
    rows: Rows


class OwnPart(NamedTuple):
    """A call over a text with others behind it, without those, and how to put it back.

    call: as the model would make it on its own text; full: k and v with everything; context: where
    each further text stands in `full`, (start, stop); joint: the queries with everything, tokens of
    the own text and whether the image comes first, where text and image are one sequence; apart:
    further texts that stand in rows of their own.
    """

    call: SDPACall
    full: tuple[Tensor, Tensor]
    context: Mapping[str, TextPlace] = MappingProxyType({})
    joint: tuple[Tensor, int, bool] | None = None
    apart: Apart | None = None

    def of_texts(self, call: AttentionCall) -> dict[str, Tensor]:
        """The output of further texts' own queries, by name, [..., tokens, channels].

        In a joint sequence each further text attends to the images and to itself, as it would in a
        run of its own: what biases and restrictions hide from the own text they hide from it too.
        Elsewhere texts ask nothing.
        """
        if self.joint is None:
            return {} if self.apart is None else self.apart.of_texts()
        q, text, image_first = self.joint
        image = slice(0, -text) if image_first else slice(text, None)
        hidden, own_mask = _seen_by_text(call, len(q)), self.call.attn_mask
        if own_mask is not None:
            own_mask = additive(own_mask, q)
            hidden = own_mask if hidden is None else hidden + own_mask
        hidden = None if hidden is None else hidden[..., image]
        parts = {}
        for name, (start, stop, _) in self.context.items():
            k, v = (
                torch.cat([own[..., image, :], full[..., start:stop, :]], -2)
                for own, full in zip((self.call.key, self.call.value), self.full, strict=True)
            )
            one = q[..., start:stop, :]
            here = _of_region(call, name, hidden, k[..., : -(stop - start), :])
            mask = None if here is None else F.pad(here, (0, stop - start)).to(q)
            parts[name] = F.scaled_dot_product_attention(
                one, k, v, attn_mask=mask, scale=self.call.scale
            )
        return parts

    def whole(self, out: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """The output [..., queries, channels] of the own part, with that of further texts."""
        if self.apart is not None:
            return self.apart.whole(out, None if self.joint is None else texts)
        if self.joint is None:
            return out
        _, text, image_first = self.joint
        own = [out] if image_first else [out[..., :text, :], out[..., text:, :]]
        return torch.cat([own[0], *texts.values(), *own[1:]], -2)


def own_part(state: DenoiserTexts, kind: str, order: str | None, given: SDPACall) -> OwnPart:
    """A caught call as the model would make it on its own text.

    kind: of the site; order: of a joint sequence, "image_text" or "text_image".
    """
    q, k, v, mask = given[:4]
    if state.text_rows is not None:
        apart = Apart(given, len(state.rows), state.text_rows, kind)
        if kind != "joint" or state.text_rows.moved:
            return OwnPart(apart.call(), (k, v), apart=apart)
        (q, k, v), places = apart.with_texts()
        joint = q, state.text_rows.own, True
        return OwnPart(apart.call(), (k, v), places, joint, apart)
    own, extra = state.own_text, state.extra_text
    whole = OwnPart(given, (k, v))
    if own is None or not extra:
        return whole
    widest = max(place.stop for place in extra.values())
    if kind == "cross" and k.shape[-2] == widest:
        short = mask[..., :own] if mask is not None and mask.shape[-1] == widest else mask
        call = given._replace(key=k[..., :own, :], value=v[..., :own, :], attn_mask=short)
        return whole._replace(call=call, context=extra)
    if kind != "joint" or not q.shape[-2] == k.shape[-2] > widest:
        return whole  # an adapter's call over keys of its own
    if mask is not None and mask.shape[-2] > 1:
        raise UnsupportedError(
            "a joint sequence with a mask of queries and keys [N, M] can't be widened"
        )
    image_first = order == "image_text"
    offset = k.shape[-2] - widest if image_first else 0

    def cut(x: Tensor) -> Tensor:
        if image_first:
            return x[..., : offset + own, :]
        return torch.cat([x[..., :own, :], x[..., widest:, :]], -2)

    places = {name: TextPlace(offset + x.start, offset + x.stop) for name, x in extra.items()}
    short = None if mask is None else cut(mask.mT).mT
    call = given._replace(query=cut(q), key=cut(k), value=cut(v), attn_mask=short)
    if state.text_rotations is not None:
        q, k = (_rotated_back(x, places, state.text_rotations) for x in (q, k))
    return OwnPart(call, (k, v), places, (q, own, image_first))


def _rotated_back(x: Tensor, places: Mapping[str, TextPlace], rotations: Tensor) -> Tensor:
    """Queries or keys [..., tokens, channels] whose further texts have the positions of a run of
    their own: what stands s places behind the own text's first token was rotated s too far."""
    out = x.clone()
    for start, stop, _ in places.values():
        part = torch.view_as_complex(x[..., start:stop, :].float().unflatten(-1, (-1, 2)))
        back = rotations[start].conj().to(x.device)
        out[..., start:stop, :] = torch.view_as_real(part * back).flatten(-2).to(x.dtype)
    return out


def _of_region(
    call: AttentionCall, name: str, hidden: Tensor | None, images: Tensor
) -> Tensor | None:
    """What is added to the scores of a further text over the images' keys, [batch, 1, 1, keys];
    None for nothing.

    hidden: what is for every text; images: those keys, [batch, heads, keys, channels].
    """
    by_row = call.seen_by_texts.get(name)
    if by_row is None:
        return hidden
    batch, rows, keys = len(images), len(call.rows), images.shape[-2]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    for row, one in by_row.items():
        seen[row] = one
    added = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    added = added.repeat_interleave(batch // rows, 0)[:, None, None].to(images)
    return added if hidden is None else added + hidden


def _seen_by_text(call: AttentionCall, batch: int) -> Tensor | None:
    """What biases and restrictions add to the scores of the own text, taken as those of its first
    token, [batch, 1, 1, keys]; None where there are none."""
    if not any(o.verb in ("bias", "restrict") for o in call.operations):
        return None
    assert call.spans.text_keys is not None  # a joint site
    at, finished, rows = call.spans.text_keys[0], call.fold(), []
    for row in range(finished.rows):
        term = next(term for term in finished.terms[row] if not term.extra)
        added = call.q.new_zeros(term.own.tokens)
        for queries, keys in term.factors:
            added = added + (keys.sum(1) if queries is None else keys @ queries[at])
        if term.regions is not None:
            seen = (term.regions.keys & term.regions.queries[at]) != 0
            added = added.masked_fill(~seen[: len(added)], float("-inf"))
        rows.append(added)
    return torch.stack(rows).repeat_interleave(batch // finished.rows, 0)[:, None, None]
