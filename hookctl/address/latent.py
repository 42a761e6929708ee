"""What a denoiser call shows of its latent and its text: a grid and a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from hookctl.address.families import uncompiled
from hookctl.address.sites import Site

_FRAMES_FIRST = r"SpatioTemporal|CogVideoX|ConsisID"  # [rows, frames, channels, height, width]
_CHANNELS_LAST = r"Kandinsky5"  # [rows, frames, height, width, channels]
_BLOCK = 32  # tokens to a multiple of which Z-Image pads each text


def latent_grid(
    sample: Tensor, arguments: Mapping[str, Any], denoiser: nn.Module
) -> tuple[int, ...]:
    """([frames,] height, width) of the latent of one denoiser call; () if it shows none.

    sample: the model input; arguments: of the call, by name. Where the latent is packed into a
    sequence of tokens, an argument of the model says how.
    """
    name = type(uncompiled(denoiser)).__name__
    if sample.dim() == 5:
        if re.search(_CHANNELS_LAST, name):
            return tuple(sample.shape[1:4])
        frames = sample.shape[1 if re.search(_FRAMES_FIRST, name) else 2]
        return (frames, *sample.shape[-2:])
    if sample.dim() == 4:
        return tuple(sample.shape[-2:])
    ids = arguments.get("img_ids")
    if isinstance(ids, Tensor):  # (frame, row, column, ...) of every image token
        flat = ids.reshape(-1, ids.shape[-1])
        return tuple(int(flat[:, axis].max()) + 1 for axis in (1, 2))
    shapes = arguments.get("img_shapes")
    if shapes:  # (frames, height, width) of a row's images: the one that is drawn comes first
        first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return tuple(int(side) for side in first)
    sides = (arguments.get(key) for key in ("num_frames", "height", "width"))
    said = tuple(side for side in sides if isinstance(side, int))
    return said if len(said) == 3 else ()


def text_tokens(text: Any, arguments: Mapping[str, Any], denoiser: nn.Module) -> int | None:
    """How many tokens the attention sees of the text that a pipeline gave.

    text: the call's text argument. None if there is none, or if each row has a number of its own.
    """
    model = uncompiled(denoiser)
    name = type(model).__name__
    if isinstance(text, list) and text and "ZImage" in name:
        return -(-max(len(one) for one in text) // _BLOCK) * _BLOCK
    if not isinstance(text, Tensor):
        return None
    mask = arguments.get("encoder_attention_mask")
    # Lumina 2 puts each row's text, as long as it is, right before its image.
    if "Lumina2" in name and isinstance(mask, Tensor):
        lengths = mask.sum(1)
        return int(lengths[0]) if bool((lengths == lengths[0]).all()) else None
    return text.shape[1] + registers(model)


def registers(denoiser: nn.Module) -> int:
    """Learned tokens that a model puts before the text (AuraFlow)."""
    found = getattr(uncompiled(denoiser), "register_tokens", None)
    return found.shape[1] if isinstance(found, Tensor) and found.dim() == 3 else 0


LAYOUT_RESOLUTION = Fraction(1, 4)
LAYOUT_CELLS = 16


def finest_within(
    sites: Iterable[Site], latent: tuple[int, ...], resolution: Fraction = LAYOUT_RESOLUTION
) -> Fraction | None:
    """The finest resolution among `sites` that holds the layout of a latent ([frames,] h, w).

    That is no finer than `resolution` of the latent, or than LAYOUT_CELLS cells. Where no site is
    as coarse (a transformer has one grid throughout), the coarsest there is; None without any.
    """
    side = max(latent[-2:])
    known = sorted({site.resolution for site in sites if site.resolution is not None})
    bound = max(side * resolution, Fraction(min(side, LAYOUT_CELLS)))
    fitting = [r for r in known if side * r <= bound]
    if fitting:
        return fitting[-1]
    return known[0] if known else None


def over_latent(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask, or weights, [frames | 1, height, width] in the shape of one latent of any family."""
    if latent.dim() == 2:  # packed tokens [height * width, channels]
        return mask[0].reshape(-1, 1)
    if latent.dim() == 4:  # [channels, frames, height, width]
        frames = latent.shape[1]
        return (mask if mask.shape[0] in (1, frames) else mask.any(0, keepdim=True))[None]
    return mask
