"""Latents that a pipeline packs into tokens, and the grids that these are of.

    Flux, Qwen-Image   2 x 2 cells of [images, channels, height, width] in one token
    Bria's FIBO        one cell of [images, channels, 1, height, width]
    FLUX.2             one cell of [images, 4 channels, height / 2, width / 2], patched already
    LTX                one cell of [images, channels, frames, height, width]

All other latents are grids as they are.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import InputError, UnsupportedError

Size = tuple[int, int]  # height and width in px
Cells = tuple[int, ...]  # rows and columns of tokens, frames before them in videos

_IMAGE = ("latents", "batch_size", "num_channels_latents", "height", "width")
_VIDEO = ("latents", "patch_size", "patch_size_t")
_OF_IMAGE = ("latents", "height", "width", "vae_scale_factor")
_OF_VIDEO = ("latents", "num_frames", "height", "width", "patch_size", "patch_size_t")


def packed(pipe: Any, x: Tensor) -> Tensor:
    """Latents as the pipeline's scheduler has them: a sequence of tokens where it packs them."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None or x.dim() == 3:
        return x
    known = tuple(inspect.signature(pack).parameters)
    if _has_plain_tokens(pipe):
        return x.flatten(2).mT
    if known == ("latents",):
        tokens: Tensor = pack(x)
    elif known == _IMAGE:
        tokens = pack(x, x.shape[0], x.shape[1], *x.shape[-2:])
    elif known == _VIDEO:
        tokens = pack(x, *_patch(pipe))
    else:
        raise _unknown(pipe)
    return tokens


def unpacked(pipe: Any, x: Tensor, cells: Cells) -> Tensor:
    """A sequence of tokens, [images, tokens, channels], as a grid; other latents as they are.

    cells: of the tokens.
    """
    if x.dim() != 3:
        return x
    if hasattr(pipe, "_unpack_latents_with_ids"):
        return x.mT.reshape(len(x), -1, *cells[-2:])
    if _has_plain_tokens(pipe):
        return x.mT.reshape(len(x), -1, 1, *cells[-2:])
    unpack = getattr(pipe, "_unpack_latents", None)
    known = () if unpack is None else tuple(inspect.signature(unpack).parameters)
    if known == _OF_IMAGE:
        assert unpack is not None  # it has parameters
        side, (height, width) = side_of_token(pipe), cells[-2:]
        grid: Tensor = unpack(x, height * side, width * side, int(pipe.vae_scale_factor))
    elif known == _OF_VIDEO and len(cells) == 3:
        assert unpack is not None
        grid = unpack(x, *cells, *_patch(pipe))
    else:
        raise _unknown(pipe)
    return grid


def cells_of(pipe: Any, tokens: int, size: Size | None, frames: int = 1) -> Cells:
    """Rows and columns of so many tokens, frames before them where the pipeline draws videos.

    size: (height, width) in px; None for the pipeline's default, or a square.
    """
    side = side_of_token(pipe)
    video = _packs_videos(pipe)
    many = tokens // frames if video else tokens
    if size is not None:
        rows, columns = size[0] // side, size[1] // side
        if rows * columns != many:
            raise InputError(
                f"size={size}: an image of {size[0]} x {size[1]} px has {rows * columns} tokens, "
                f"these latents have {many}"
            )
    else:
        own = int(getattr(pipe, "default_sample_size", 0) or 0)
        rows = columns = own * int(getattr(pipe, "vae_scale_factor", 1)) // side
        if rows * columns != many:
            rows = columns = math.isqrt(many)
        if rows * columns != many:
            raise InputError(
                f"latents of {many} tokens are of no square image; give size=(height, width) in px"
            )
    return (frames, rows, columns) if video else (rows, columns)


def side_of_token(pipe: Any) -> int:
    """Height and width in px of what one token of the image stands for."""
    if _packs_videos(pipe):
        return int(pipe.vae_spatial_compression_ratio) * _patch(pipe)[0]
    factor, unpack = int(pipe.vae_scale_factor), getattr(pipe, "_unpack_latents", None)
    if _has_plain_tokens(pipe):
        return factor
    if unpack is None or tuple(inspect.signature(unpack).parameters) != _OF_IMAGE:
        return 2 * factor
    rows, columns = 2, 4
    for side in (2 * factor, factor):  # the factor of some (Bria) is of tokens
        try:
            unpack(torch.zeros(1, rows * columns, 4), rows * side, columns * side, factor)
        except RuntimeError:
            continue
        return side
    raise _unknown(pipe)


def _has_plain_tokens(pipe: Any) -> bool:
    """Whether a token is one cell of a video of one frame, unless the call asks for patches."""
    return hasattr(pipe, "_pack_latents_no_patch")


def _packs_videos(pipe: Any) -> bool:
    pack = getattr(pipe, "_pack_latents", None)
    return pack is not None and tuple(inspect.signature(pack).parameters) == _VIDEO


def _patch(pipe: Any) -> tuple[int, int]:
    return int(pipe.transformer_spatial_patch_size), int(pipe.transformer_temporal_patch_size)


def _unknown(pipe: Any) -> UnsupportedError:
    return UnsupportedError(f"{type(pipe).__name__} packs its latents in a way unknown here")
