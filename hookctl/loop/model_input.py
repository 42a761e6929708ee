"""The latents in what a denoiser is given: alone, beside images and masks, or as a list of images.

A model that takes a list may take each image as a video of one frame (`Model.as_videos`); its texts
are a list then, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import model_of
from hookctl.errors import UnsupportedError


def latents_of(given: Any, denoiser: nn.Module) -> Tensor:
    """[rows, channels, ...] of a model input, without the frame that its pipeline put in.

    Raises UnsupportedError for a list of images of several sizes, which no tensor holds.
    """
    if isinstance(given, Tensor):
        return given
    shapes = {tuple(one.shape) for one in given}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"{type(denoiser).__name__} is given images of several sizes, "
            f"{', '.join(map(str, sorted(shapes)))}, which can't be read or changed together; "
            "draw them by a call for each size"
        )
    rows = torch.stack(list(given))
    return rows.squeeze(2) if _as_videos(denoiser) and rows.shape[2] == 1 else rows


def with_latents(given: Any, rows: Tensor, denoiser: nn.Module, own: Tensor | None = None) -> Any:
    """A model input with latents [rows, channels, ...] in the place of its own.

    own: [images, ...], those that it has, by which they are found behind images and masks.
    """
    if isinstance(given, Tensor):
        return replace_channels(given, rows.to(given), own)
    framed = _as_videos(denoiser) and rows.dim() == given[0].dim()
    return list((rows.unsqueeze(2) if framed else rows).to(given[0]).unbind())


def replace_channels(model_input: Tensor, rows: Tensor, own: Tensor | None = None) -> Tensor:
    """The model input with the channels of the latents replaced, to which images and masks were
    appended: the first ones, or the last ones if those are `own`, [images, ...]."""
    if rows.shape == model_input.shape:
        return rows
    dim = next(d for d, n in enumerate(rows.shape) if n != model_input.shape[d])
    size, rest = rows.shape[dim], model_input.shape[dim] - rows.shape[dim]
    if own is not None:
        last = model_input[: len(own)].narrow(dim, rest, size)
        if last.shape == own.shape and torch.equal(last, own.to(last)):
            return torch.cat([model_input.narrow(dim, 0, rest), rows], dim)
    return torch.cat([rows, model_input.narrow(dim, size, rest)], dim)


def dtype_of(given: Any) -> torch.dtype:
    """Of a model input, or of the texts of a call."""
    dtype: torch.dtype = given.dtype if isinstance(given, Tensor) else given[0].dtype
    return dtype


def _as_videos(denoiser: nn.Module) -> bool:
    record = model_of(denoiser)
    return record is not None and record.as_videos
