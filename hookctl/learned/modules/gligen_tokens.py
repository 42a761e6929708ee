"""GLIGEN's tokenizers: from what is to be where, to grounding tokens (`position_net`).

Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", arXiv 2301.07093, section 3.1 and
the official code. A slot without input has learned null vectors in place of the features and is
still a token: the number of slots is part of the model, and null tokens are attended to. What a row
without grounding (the unconditional one) sees is all slots empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.fourier import fourier

Shapes = Mapping[str, tuple[int, ...]]

FREQUENCIES, HIDDEN, WIDTH = 8, 512, 768
SLOTS = 30  # objects in a picture
PERSONS, JOINTS = 8, 17  # COCO's joints


def mlp(inputs: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, SiLU, Linear, SiLU, Linear."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, out),
    )  # fmt: skip


def or_null(features: Tensor, mask: Tensor, null: Tensor) -> Tensor:
    """m features + (1 - m) null, for a mask m that is one axis short of the features."""
    m = mask.to(features)[..., None]
    return m * features + (1 - m) * null


class BoxText(nn.Module):
    """Objects with a phrase and a box each: one token a slot."""

    def __init__(
        self, text: int = WIDTH, hidden: int = HIDDEN, out: int = WIDTH, k: int = FREQUENCIES
    ) -> None:
        super().__init__()
        self.text, self.frequencies = text, k
        self.linears = mlp(text + 8 * k, hidden, out)
        self.null_positive_feature = nn.Parameter(torch.zeros(text))
        self.null_position_feature = nn.Parameter(torch.zeros(8 * k))

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> BoxText:
        text, (hidden, _) = shapes["null_positive_feature"][0], shapes["linears.0.weight"]
        k = shapes["null_position_feature"][0] // 8
        return cls(text, hidden, shapes["linears.4.weight"][0], k)

    def forward(self, boxes: Tensor, masks: Tensor, phrases: Tensor) -> Tensor:
        """boxes [rows, slots, 4] (x0, y0, x1, y1), masks [rows, slots] of 0 and 1, phrases
        [rows, slots, text] -> tokens [rows, slots, out]."""
        box = or_null(fourier(boxes, self.frequencies), masks, self.null_position_feature)
        phrase = or_null(phrases, masks, self.null_positive_feature)
        return cast(Tensor, self.linears(torch.cat([phrase, box], dim=-1)))


class BoxTextImage(nn.Module):
    """Objects with a box and a phrase, an image or both: the text tokens of all slots, then the
    image tokens of all slots."""

    def __init__(
        self, text: int = WIDTH, hidden: int = HIDDEN, out: int = WIDTH, k: int = FREQUENCIES
    ) -> None:
        super().__init__()
        self.text, self.frequencies = text, k
        self.linears_text = mlp(text + 8 * k, hidden, out)
        self.linears_image = mlp(text + 8 * k, hidden, out)
        self.null_text_feature = nn.Parameter(torch.zeros(text))
        self.null_image_feature = nn.Parameter(torch.zeros(text))
        self.null_position_feature = nn.Parameter(torch.zeros(8 * k))

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> BoxTextImage:
        text, (hidden, _) = shapes["null_text_feature"][0], shapes["linears_text.0.weight"]
        k = shapes["null_position_feature"][0] // 8
        return cls(text, hidden, shapes["linears_text.4.weight"][0], k)

    def forward(
        self,
        boxes: Tensor,
        masks: Tensor,
        phrases: Tensor,
        images: Tensor,
        text_masks: Tensor | None = None,
        image_masks: Tensor | None = None,
    ) -> Tensor:
        """As `BoxText`, with images [rows, slots, text] in the text's space, and which slots have a
        phrase or an image (None: as `masks`) -> tokens [rows, 2 slots, out]."""
        text_masks = masks if text_masks is None else text_masks
        image_masks = masks if image_masks is None else image_masks
        box = or_null(fourier(boxes, self.frequencies), masks, self.null_position_feature)
        phrase = or_null(phrases, text_masks, self.null_text_feature)
        image = or_null(images, image_masks, self.null_image_feature)
        tokens = [
            self.linears_text(torch.cat([phrase, box], dim=-1)),
            self.linears_image(torch.cat([image, box], dim=-1)),
        ]
        return torch.cat(tokens, dim=1)


class Keypoints(nn.Module):
    """Persons with joints: one token a joint, person by person."""

    def __init__(
        self,
        persons: int = PERSONS,
        joints: int = JOINTS,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        out: int = WIDTH,
        k: int = FREQUENCIES,
    ) -> None:
        super().__init__()
        self.frequencies = k
        self.linears = mlp(width + 4 * k, hidden, out)
        self.person_embeddings = nn.Parameter(torch.zeros(persons, width))
        self.keypoint_embeddings = nn.Parameter(torch.zeros(joints, width))
        self.null_person_feature = nn.Parameter(torch.zeros(width))
        self.null_xy_feature = nn.Parameter(torch.zeros(4 * k))

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> Keypoints:
        persons, width = shapes["person_embeddings"]
        k = shapes["null_xy_feature"][0] // 4
        hidden, out = shapes["linears.0.weight"][0], shapes["linears.4.weight"][0]
        return cls(persons, shapes["keypoint_embeddings"][0], width, hidden, out, k)

    def forward(self, points: Tensor, masks: Tensor) -> Tensor:
        """points [rows, persons * joints, 2], masks [rows, persons * joints] of 0 and 1 -> tokens
        [rows, persons * joints, out]."""
        who = (self.person_embeddings[:, None] + self.keypoint_embeddings).flatten(0, 1)
        place = or_null(fourier(points, self.frequencies), masks, self.null_xy_feature)
        joint = or_null(who.expand(len(points), -1, -1), masks, self.null_person_feature)
        return cast(Tensor, self.linears(torch.cat([joint, place], dim=-1)))


class SpatialMap(nn.Module):
    """A map of the whole picture (edges, depth, normals, classes): a token for each cell of a
    coarse grid. classes: how many channels a map of classes has, None for a map of three."""

    def __init__(
        self,
        backbone: ConvNeXt | None = None,
        *,
        tokens: int = 64,
        features: int = WIDTH,
        hidden: int = HIDDEN,
        out: int = WIDTH,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if classes is not None:
            self.in_conv = nn.Conv2d(classes, 3, 3, padding=1)
        self.classes, self.tokens = classes, tokens
        self.convnext_tiny_backbone = ConvNeXt() if backbone is None else backbone
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, features))
        self.null_feature = nn.Parameter(torch.zeros(features))
        self.linears = mlp(features, hidden, out)

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> SpatialMap:
        _, tokens, features = shapes["pos_embedding"]
        classes = shapes["in_conv.weight"][1] if "in_conv.weight" in shapes else None
        return cls(
            ConvNeXt.of_shapes(shapes, "convnext_tiny_backbone."),
            tokens=tokens,
            features=features,
            hidden=shapes["linears.0.weight"][0],
            out=shapes["linears.4.weight"][0],
            classes=classes,
        )

    @property
    def side(self) -> int:
        """Side of the square to which maps are brought, in pixels."""
        return math.isqrt(self.tokens) * self.convnext_tiny_backbone.reduction

    def forward(self, maps: Tensor, masks: Tensor) -> Tensor:
        """maps [rows, 3 | classes, height, width], masks [rows] of 0 and 1 -> tokens
        [rows, tokens, out]."""
        x = F.interpolate(maps, (self.side, self.side))  # nearest, also for depth
        if self.classes is not None:
            x = self.in_conv(x)
        features = self.convnext_tiny_backbone(x).flatten(2).transpose(1, 2)
        features = or_null(features, masks[:, None], self.null_feature)
        return cast(Tensor, self.linears(features + self.pos_embedding))


class Downsampler(nn.Module):
    """A map as further channels of the latent: two convolutions 4x4 of stride 2, SiLU between."""

    def __init__(self, channels: int = 1, hidden: int = 4, out: int = 8) -> None:
        super().__init__()
        self.channels, self.out = channels, out
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 4, 2, 1), nn.SiLU(), nn.Conv2d(hidden, out, 4, 2, 1)
        )

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> Downsampler:
        hidden, channels = shapes["layers.0.weight"][:2]
        return cls(channels, hidden, shapes["layers.2.weight"][0])

    def forward(self, maps: Tensor, size: tuple[int, int], *, nearest: bool = False) -> Tensor:
        """maps [rows, channels or more, height, width] -> [rows, out, *size].

        size: height and width of the latent. nearest: how maps of classes are resized; others are
        by bicubic interpolation. Of a map with more channels than the network reads, the first are
        taken (edges and depth: one).
        """
        fine = (4 * size[0], 4 * size[1])
        mode = "nearest" if nearest else "bicubic"
        return cast(Tensor, self.layers(F.interpolate(maps[:, : self.channels], fine, mode=mode)))
