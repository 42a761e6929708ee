"""Instances of InstanceDiffusion: a caption and a place each, as the numbers of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hookctl.address.outlines import Array
from hookctl.address.regions import Region, RegionLike
from hookctl.arguments import refusal
from hookctl.errors import InputError
from hookctl.learned import locations
from hookctl.learned.clip_features import phrase_of
from hookctl.learned.modules.unifusion import Instances, UniFusion


@dataclass(frozen=True)
class Instance:
    """A thing in the picture: its caption, or its features [width], and where it is.

    box: (x0, y0, x1, y1); point: (x, y); scribble: points of a stroke, (x, y) each; mask: an image,
    an array [height, width] or a region. All are fractions of the canvas, and one is enough: a mask
    has a box, and a box or a stroke has a middle.
    """

    caption: str | Tensor
    box: Any = None
    point: Sequence[float] | None = None
    scribble: Sequence[Sequence[float]] | None = None
    mask: RegionLike | None = None


_KEYS = "caption", "box", "point", "scribble", "mask"


@dataclass(frozen=True, eq=False)
class Located:
    """An instance as numbers; None for what it has not."""

    caption: str | Tensor
    point: locations.Point
    box: locations.Box | None
    scribble: Array | None
    mask: Array | None
    outline: Array | None
    drawn: bool  # whether the scribble was given, not taken from the mask

    @property
    def region(self) -> Region | None:
        """The part of the canvas that it covers."""
        if self.mask is not None:
            return Region.mask(self.mask)
        return None if self.box is None else Region.box(*self.box)


def located(given: Any, net: UniFusion, name: str) -> Located:
    """An instance as numbers of a tokenizer. Raises InputError."""
    if isinstance(given, Mapping) and set(given) <= set(_KEYS) and "caption" in given:
        given = Instance(**given)
    if not isinstance(given, Instance):
        raise refusal(
            name, given, f"an Instance(caption, box=...), or a table of {', '.join(_KEYS)}"
        )
    caption = phrase_of(given.caption, f"{name}.caption")
    mask = outline = scribble = point = box = None
    if given.mask is not None:
        mask = locations.mask_of(given.mask, net.side, f"{name}.mask")
        outline = locations.points_of_mask(mask, net.mask_points)
        box = locations.box_of_mask(mask)
        scribble = locations.scribble_of_mask(mask, net.scribble_points)
    if given.box is not None:
        box = locations.box_of(given.box, f"{name}.box")
    if given.scribble is not None:
        at = f"{name}.scribble"
        scribble = locations.scribble_of(given.scribble, net.scribble_points, at)
    if given.point is not None:
        point = locations.point_of(given.point, f"{name}.point")
    elif box is not None:
        point = locations.centre(box)
    elif scribble is not None:
        point = (float(scribble[:, 0].mean()), float(scribble[:, 1].mean()))
    else:
        raise InputError(f"{name} is nowhere; give box=, point=, scribble= or mask=")
    drawn = given.scribble is not None
    return Located(caption, point, box, scribble, mask, outline, drawn)


def as_row(
    given: Sequence[Located], features: Sequence[Tensor], net: UniFusion, like: Tensor
) -> Instances:
    """Instances with the features of their captions, [width] each, as a row of the tokenizer."""

    def zeros(*shape: int) -> Tensor:
        return like.new_zeros(1, net.slots, *shape)

    found = Instances(
        masks=zeros(),
        phrases=zeros(net.text),
        boxes=zeros(4),
        points=zeros(2),
        scribbles=zeros(2 * net.scribble_points),
        outlines=zeros(2 * net.mask_points),
        rasters=zeros(net.side, net.side),
        located=zeros(),
    )
    assert found.located is not None
    for i, (one, feature) in enumerate(zip(given, features, strict=True)):
        found.masks[0, i], found.phrases[0, i] = 1, feature.to(like)
        found.points[0, i] = like.new_tensor(one.point)
        if one.box is not None:
            found.boxes[0, i], found.located[0, i] = like.new_tensor(one.box), 1
        for numbers, into in (
            (one.scribble, found.scribbles),
            (one.outline, found.outlines),
            (one.mask, found.rasters),
        ):
            if numbers is not None:
                values = torch.from_numpy(numbers.astype(np.float64)).to(like)
                into[0, i] = values.flatten() if into.dim() == 3 else values
    return found
