"""ConvNeXt, the backbone that reads maps and masks, with the names of its official checkpoint.

Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545. Here without the last norm and the head,
and with no weights of its own: they come with the checkpoint of what uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
DEPTHS, WIDTHS = (3, 3, 9, 3), (96, 192, 384, 768)  # of "tiny"
STEM = 4  # side of the patches that the first layer reads


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [rows, channels, height, width]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """x + gamma * MLP(LN(depthwise convolution 7x7 of x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).movedim(1, -1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + (self.gamma * y).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Features [rows, widths[-1], height / 32, width / 32] of images [rows, 3, height, width]."""

    def __init__(
        self, depths: Sequence[int] = DEPTHS, widths: Sequence[int] = WIDTHS, channels: int = 3
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(channels, widths[0], STEM, STEM), ChannelNorm(widths[0]))
        halvings = [
            nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2))
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )

    @property
    def reduction(self) -> int:
        """How many pixels of the image a feature stands for, along a side."""
        return int(STEM * 2 ** (len(self.stages) - 1))

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> ConvNeXt:
        """The network whose weights have these names and shapes."""
        depths: list[int] = []
        widths: list[int] = []
        while (stem := f"{prefix}stages.{len(depths)}.0.gamma") in shapes:
            stage = f"{prefix}stages.{len(depths)}."
            blocks = {key[len(stage) :].split(".")[0] for key in shapes if key.startswith(stage)}
            widths.append(shapes[stem][0])
            depths.append(len(blocks))
        return cls(depths, widths, shapes[f"{prefix}downsample_layers.0.0.weight"][1])

    def forward(self, x: Tensor) -> Tensor:
        for shrink, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(shrink(x))
        return x
