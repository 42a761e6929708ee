"""A caught call without the texts that editors brought (`Editor.context`), and back again.

The plain call must not attend to them: they are cut off before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.query_lists import TextPlace
from hookctl.attention.sdpa_call import SDPACall
from hookctl.errors import UnsupportedError


class OwnPart(NamedTuple):
    """A call over widened text without what was appended, and how to put it back.

    call: as the model would make it on its own text; full: k and v with everything; context: where
    each further text stands in `full`, (start, stop); joint: the queries with everything, tokens of
    the own text and whether the image comes first, where text and image are one sequence.
    """

    call: SDPACall
    full: tuple[Tensor, Tensor]
    context: Mapping[str, TextPlace] = MappingProxyType({})
    joint: tuple[Tensor, int, bool] | None = None

    def of_texts(self) -> dict[str, Tensor]:
        """The output of further texts' own queries, by name, [..., tokens, channels].

        In a joint sequence each further text attends to the image and to itself, as it would in a
        run of its own; elsewhere texts ask nothing.
        """
        if self.joint is None:
            return {}
        q, text, image_first = self.joint
        image = slice(0, -text) if image_first else slice(text, None)
        parts = {}
        for name, (start, stop, _) in self.context.items():
            k, v = (
                torch.cat([own[..., image, :], full[..., start:stop, :]], -2)
                for own, full in zip((self.call.key, self.call.value), self.full, strict=True)
            )
            one = q[..., start:stop, :]
            parts[name] = F.scaled_dot_product_attention(one, k, v, scale=self.call.scale)
        return parts

    def whole(self, out: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """The output [..., queries, channels] of the own part, with that of further texts."""
        if self.joint is None:
            return out
        _, text, image_first = self.joint
        own = [out] if image_first else [out[..., :text, :], out[..., text:, :]]
        return torch.cat([own[0], *texts.values(), *own[1:]], -2)


def own_part(
    given: SDPACall, kind: str, order: str | None, own: int | None, extra: Mapping[str, TextPlace]
) -> OwnPart:
    """A caught call as the model would make it on its own text.

    kind: of the site; order: of a joint sequence, "image_text" or "text_image"; own: tokens of the
    own text; extra: where further texts stand.
    """
    q, k, v, mask = given[:4]
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
    if mask is not None:
        raise UnsupportedError("a joint sequence with a mask can't be widened")
    image_first = order == "image_text"
    offset = k.shape[-2] - widest if image_first else 0

    def cut(x: Tensor) -> Tensor:
        if image_first:
            return x[..., : offset + own, :]
        return torch.cat([x[..., :own, :], x[..., widest:, :]], -2)

    places = {name: TextPlace(offset + x.start, offset + x.stop) for name, x in extra.items()}
    call = given._replace(query=cut(q), key=cut(k), value=cut(v))
    return OwnPart(call, (k, v), places, (q, own, image_first))
