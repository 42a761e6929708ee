"""The image's own tokens in self- and joint attention: what appearance recipes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.sites import Selector, Site, select
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError

IMAGE_KINDS = ("self", "joint")


def image_sites(who: str, target: Any, selector: Selector) -> tuple[Site, ...]:
    """The selected sites of a pipeline; InputError if the image does not attend to itself there."""
    every = [site for site, _ in describe_sites(denoiser_of(target))]
    chosen = select(every, selector, who=who)
    for site in chosen:
        if site.kind not in IMAGE_KINDS:
            raise InputError(
                f"{who}: sites={selector!r} holds {site.path}, a {site.kind} site; give sites "
                "where the image attends to itself, such as 'self up'"
            )
    return chosen


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
