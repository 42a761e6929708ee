"""The image's own tokens in self- and joint attention: what appearance recipes share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.address.rows import Row
from hookctl.attention.call import AttentionCall


def image_keys(x: Tensor, call: AttentionCall) -> Tensor:
    """The image's part of keys or values [..., tokens, channels]."""
    start, stop = call.spans.image_keys or (0, x.shape[-2])
    return x[..., start:stop, :]


def with_image(own: Tensor, image: Tensor, span: tuple[int, int] | None) -> Tensor:
    """Tokens [..., tokens, channels] with the image's, at `span`, replaced."""
    if span is None or span == (0, own.shape[-2]):
        return image
    start, stop = span
    return torch.cat([own[..., :start, :], image, own[..., stop:, :]], -2)


def look_at(call: AttentionCall, row: Row, seen: Sequence[tuple[Row, Tensor]]) -> None:
    """Let a row attend to some image tokens, [indices], of other rows too; to none where there are
    no rows."""
    if seen:
        k, v = (
            torch.cat([image_keys(x[other.index], call)[..., at, :] for other, at in seen], -2)
            for x in (call.k, call.v)
        )
        call.extend(row, k, v)
