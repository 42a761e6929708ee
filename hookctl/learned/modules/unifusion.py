"""UniFusion: instances located by boxes, points, scribbles and masks, as grounding tokens.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024), section 3.1 and the official code. Each way to say where has an MLP and tokens of its
own: box | point | scribble | mask points, one a slot, then those of all masks as a raster.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.learned.modules.convnext import WIDTHS, ConvNeXt
from hookctl.learned.modules.fourier import fourier
from hookctl.learned.modules.gligen_tokens import SLOTS, WIDTH, mlp, or_null

FREQUENCIES, HIDDEN = 16, 3072
SCRIBBLE_POINTS, MASK_POINTS = 20, 256
RASTER_TOKENS = 64
MERGED = 4  # positions of the backbone's features that one raster token takes in

BOX, POINT, SCRIBBLE, MASK = FORMATS = ("box", "point", "scribble", "mask")


@dataclass
class Instances:
    """Where instances are, for some rows; a slot without instance is all zeros.

    masks: [rows, slots], 1 for a slot in use. phrases: [rows, slots, text].
    boxes: [rows, slots, 4] (x0, y0, x1, y1); points: [rows, slots, 2]; scribbles: [rows, slots,
    2 * points], x and y in turn; outlines: [rows, slots, 2 * points], the points of masks likewise;
    rasters: [rows, slots, height, width] of 0 and 1. All places are fractions of the canvas.
    located: [rows, slots], 1 for a slot with a box; None: as masks.
    """

    masks: Tensor
    phrases: Tensor
    boxes: Tensor
    points: Tensor
    scribbles: Tensor
    outlines: Tensor
    rasters: Tensor
    located: Tensor | None = None


class UniFusion(nn.Module):
    """The tokenizer; `Instances` in, tokens out."""

    def __init__(
        self,
        backbone: ConvNeXt | None = None,
        *,
        text: int = WIDTH,
        hidden: int = HIDDEN,
        out: int = WIDTH,
        slots: int = SLOTS,
        frequencies: int = FREQUENCIES,
        scribble_points: int = SCRIBBLE_POINTS,
        mask_points: int = MASK_POINTS,
        raster_tokens: int = RASTER_TOKENS,
        features: int = WIDTHS[-1],
    ) -> None:
        super().__init__()
        self.text, self.slots = text, slots
        self.frequencies, self.raster_tokens = frequencies, raster_tokens
        self.scribble_points, self.mask_points = scribble_points, mask_points
        box, point, scribble, outline = (
            2 * frequencies * numbers for numbers in (4, 2, 2 * scribble_points, 2 * mask_points)
        )
        raster = MERGED * features
        widths = [*(text + width for width in (box, point, scribble, outline)), raster]
        self.linears_list = nn.ModuleList(mlp(width, hidden, out) for width in widths)
        self.null_positive_feature = nn.Parameter(torch.zeros(text))
        self.null_position_feature = nn.Parameter(torch.zeros(box))
        self.null_point_feature = nn.Parameter(torch.zeros(point))
        self.null_scribble_feature = nn.Parameter(torch.zeros(scribble))
        self.null_polygon_feature = nn.Parameter(torch.zeros(outline))
        self.null_seg_feature = nn.Parameter(torch.zeros(raster))
        self.in_conv = nn.Conv2d(slots, 3, 3, padding=1)
        self.convnext_tiny_backbone = ConvNeXt() if backbone is None else backbone
        self.pos_embedding = nn.Parameter(torch.zeros(1, raster_tokens, raster))

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> UniFusion:
        """The tokenizer whose weights have these names and shapes."""
        k = shapes["null_point_feature"][0] // 4
        return cls(
            ConvNeXt.of_shapes(shapes, "convnext_tiny_backbone."),
            text=shapes["null_positive_feature"][0],
            hidden=shapes["linears_list.0.0.weight"][0],
            out=shapes["linears_list.0.4.weight"][0],
            slots=shapes["in_conv.weight"][1],
            frequencies=k,
            scribble_points=shapes["null_scribble_feature"][0] // (4 * k),
            mask_points=shapes["null_polygon_feature"][0] // (4 * k),
            raster_tokens=shapes["pos_embedding"][1],
            features=shapes["null_seg_feature"][0] // MERGED,
        )

    @property
    def side(self) -> int:
        """Side of the square to which rasters are brought, in pixels."""
        positions = self.raster_tokens * MERGED
        return math.isqrt(positions) * self.convnext_tiny_backbone.reduction

    def forward(self, given: Instances, formats: Collection[str] = FORMATS) -> Tensor:
        """Tokens [rows, 4 slots + raster tokens, out].

        formats: those of FORMATS that the model is shown; the others are null for every slot. None
        of them means boxes, as in the official code.
        """
        shown = formats or (BOX,)
        places = {
            BOX: (given.boxes, self.null_position_feature),
            POINT: (given.points, self.null_point_feature),
            SCRIBBLE: (given.scribbles, self.null_scribble_feature),
            MASK: (given.outlines, self.null_polygon_feature),
        }
        phrase = or_null(given.phrases, given.masks, self.null_positive_feature)
        tokens = []
        for i, (name, (numbers, null)) in enumerate(places.items()):
            m = self._present(given, name) * (name in shown)
            place = or_null(fourier(numbers, self.frequencies), m, null)
            tokens.append(self.linears_list[i](torch.cat([phrase, place], dim=-1)))
        return torch.cat([*tokens, self._of_rasters(given.rasters, MASK in shown)], dim=1)

    def _present(self, given: Instances, name: str) -> Tensor:
        """[rows, slots], 1 for a slot that has a place of a format.

        An instance without scribble or mask has one all the same, of zeros: so the model was
        trained.
        """
        if name == BOX and given.located is not None:
            return given.located
        if name in (BOX, POINT):
            return given.masks
        numbers = given.scribbles if name == SCRIBBLE else given.outlines
        return (numbers.sum(-1) + given.masks > 0).to(given.masks)

    def _of_rasters(self, rasters: Tensor, shown: bool) -> Tensor:
        """The tokens of all masks of a row, instance i as channel i of one picture."""
        m = rasters.flatten(1).any(dim=1, keepdim=True) * shown
        x = self.in_conv(F.interpolate(rasters, (self.side, self.side)))
        features = self.convnext_tiny_backbone(x)
        # In the order of memory, not cell by cell: token n sees column n mod w of several rows of
        # features. The weights were trained on this.
        features = features.reshape(len(x), -1, self.raster_tokens).transpose(1, 2)
        features = or_null(features, m, self.null_seg_feature)
        return cast(Tensor, self.linears_list[4](features + self.pos_embedding))
