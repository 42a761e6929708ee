"""Masks and pictures of every mode and depth, read without loss or refused by name."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from hookctl.address.outlines import Array
from hookctl.errors import InputError

MaskLike: TypeAlias = Array | Tensor | Image.Image

NEARLY_GREY = 8  # how far the channels of a grey picture may lie apart, of 255 (JPEG)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOURS = ("RGB", "RGBX", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV")
_GREYS = ("1", "L", "LA", "La", "F", *_SIXTEEN_BITS)


def mask_values(mask: MaskLike) -> Array:
    """A mask as float64 [height, width], 0 to 1.

    Of a picture with transparency the mask is its alpha channel; it must not be a grey mask as
    well. Raises InputError for what could mean several things, or nothing.
    """
    if isinstance(mask, Image.Image):
        mask = _of_picture(mask)
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        if mask.dtype.is_complex:
            raise InputError(f"mask: {mask.dtype} values given; bool, int or float expected")
        mask = (mask.double() if mask.is_floating_point() else mask).numpy()
    try:
        given = np.asarray(mask)
    except ValueError as error:
        raise InputError(f"mask: no array given ({error}); [height, width] expected") from None
    if given.ndim != 2 or not given.size:
        raise InputError(f"mask: shape {list(given.shape)} given; [height, width] expected")
    if given.dtype.kind not in "biuf":
        raise InputError(f"mask: {given.dtype} values given; bool, int or float expected")
    values = given.astype(np.float64)
    if given.dtype.kind in "iu" and values.max() > 1:
        values /= 255
    if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
        low, high = given.min(), given.max()
        raise InputError(f"mask: values from {low} to {high} given; 0 to 1 expected (bytes: 255)")
    if not values.any():
        raise InputError("mask: empty, all values 0, given; a mask that covers something expected")
    return values


def _of_picture(picture: Image.Image) -> Array:
    """The mask in a picture, bytes or fractions [height, width]."""
    mode = picture.mode
    if mode not in _GREYS + _COLOURS:
        raise InputError(
            f"mask: a picture of mode {mode!r} given, of which it is not known what is white; "
            "give a float array of 0 to 1, or picture.convert('L')"
        )
    if (frames := getattr(picture, "n_frames", 1)) > 1:
        raise InputError(
            f"mask: a picture of {frames} frames given; give one of them: picture.seek(i), then "
            "picture.copy()"
        )
    if mode in _SIXTEEN_BITS:
        return np.asarray(picture).astype(np.float64) / 65535
    transparent = _is_transparent(picture)
    if mode in _GREYS and not transparent:
        return np.asarray(picture)
    grey = _grey(picture)
    if not transparent:
        if grey is None:
            raise InputError(
                f"mask: a coloured picture (mode {mode!r}) given; give one of its channels, such "
                "as picture.getchannel('R'), or its brightness, picture.convert('L')"
            )
        return grey
    alpha = np.asarray(_rgba(picture).getchannel("A"))
    if alpha.min() == 255:
        return _of_picture(_rgba(picture).convert("RGB"))
    if grey is not None and np.ptp(grey[alpha > 0] if (alpha > 0).any() else grey) > 0:
        raise InputError(
            f"mask: a picture (mode {mode!r}) that is a grey mask and transparent as well given; "
            "give the one that is meant: picture.getchannel('A') or picture.convert('L')"
        )
    return alpha


def _grey(picture: Image.Image) -> Array | None:
    """The grey of a picture, bytes; None if it has colours."""
    opaque = _rgba(picture).convert("RGB")
    colours = np.asarray(opaque).astype(np.int64)
    if np.ptp(colours, axis=-1).max(initial=0) > NEARLY_GREY:
        return None
    grey: Array = np.asarray(opaque.convert("L"))
    return grey


def _is_transparent(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def _rgba(picture: Image.Image) -> Image.Image:
    # Pillow makes nothing else of a premultiplied grey.
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")


def rgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture in mode RGB; InputError, by name, if that would lose anything."""
    mode = picture.mode
    if mode in _SIXTEEN_BITS or mode not in _GREYS + _COLOURS or mode == "F":
        raise InputError(
            f"{name}: a picture of mode {mode!r} has more than 8 bits a channel, or none that are "
            "known; save it as an 8-bit RGB picture"
        )
    if _is_transparent(picture):
        picture = _rgba(picture)
        if picture.getchannel("A").getextrema()[0] != 255:
            raise InputError(
                f"{name}: a picture with transparent parts (mode {mode!r}); lay it on a "
                "background first, or drop its transparency: picture.convert('RGB')"
            )
    return picture.convert("RGB")


def readable(value: Any, name: str) -> Image.Image:
    """The picture in a file, in mode RGB; InputError if it can't be read or would lose anything."""
    try:
        with Image.open(value) as file:
            file.load()
            return rgb(file, name)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}={str(value)!r}: {error}; give a readable image") from None


__all__ = ["MaskLike", "mask_values", "readable", "rgb"]
