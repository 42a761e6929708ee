"""Calls over text that editors widened: the model's own part, and what was appended to it.

The plain call must not attend to the texts that editors brought. They are cut off before anyone
sees the call; editors find their keys and values by `AttentionCall.context`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.errors import UnsupportedError


class OwnPart(NamedTuple):
    """A call over widened text without what was appended, and how to put it back.

    q, k, v, mask: as the model would have them alone; full: k and v with everything; context:
    where each further text stands in `full`, (start, stop).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    full: tuple[Tensor, Tensor]
    context: Mapping[str, tuple[int, int]] = MappingProxyType({})
    joint: tuple[Tensor, int, bool] | None = None

    def whole(self, out: Tensor, scale: float | None) -> Tensor:
        """The output [..., queries, channels] of the own part, with that of further texts' queries.

        In a joint sequence each further text attends to the image and to itself, as it would in a
        run of its own.
        """
        if self.joint is None:
            return out
        q, text, image_first = self.joint
        image = slice(0, -text) if image_first else slice(text, None)
        parts = []
        for start, stop in self.context.values():
            k, v = (
                torch.cat([own[..., image, :], full[..., start:stop, :]], -2)
                for own, full in zip((self.k, self.v), self.full, strict=True)
            )
            one = q[..., start:stop, :]
            parts.append(F.scaled_dot_product_attention(one, k, v, scale=scale))
        own = [out] if image_first else [out[..., :text, :], out[..., text:, :]]
        return torch.cat([own[0], *parts, *own[1:]], -2)


def own_part(
    state: Any,
    kind: str,
    order: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> OwnPart:
    """A caught call as the model would make it on its own text.

    kind: of the site; order: of a joint sequence, "image_text" or "text_image".
    """
    own, extra = state.own_text, state.extra_text
    whole = OwnPart(q, k, v, mask, (k, v))
    if own is None or not extra:
        return whole
    widest = max(stop for _, stop in extra.values())
    if kind == "cross" and k.shape[-2] == widest:
        short = mask[..., :own] if mask is not None and mask.shape[-1] == widest else mask
        return whole._replace(k=k[..., :own, :], v=v[..., :own, :], mask=short, context=extra)
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

    places = {name: (offset + start, offset + stop) for name, (start, stop) in extra.items()}
    return OwnPart(cut(q), cut(k), cut(v), None, (k, v), places, (q, own, image_first))
