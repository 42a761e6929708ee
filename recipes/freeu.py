"""FreeU: strengthen a UNet's backbone features, calm its skip connections.

Si et al., "FreeU: Free Lunch in Diffusion U-Net", arXiv 2309.11497 (CVPR 2024). At a decoder
concat with backbone h and skip r:

    h[:, :C/2] <- h[:, :C/2] * gain        gain = b (version 1) or (b - 1) h~ + 1 (version 2),
    r <- F_s(r)                            h~ = channel mean of h, scaled to 0..1 per picture

F_s multiplies the lowest frequencies by s. The official code masks the 2 x 2 window {-1, 0}^2 of
the shifted spectrum and takes the real part, so a gain of s acts on the mean and (1 + s) / 2 on the
waves (1,0), (0,1), (1,1): seven inner products per channel, no Fourier transform, any size and
dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of
from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.loop.features import FeatureCall, concats

RULES = ("official", "diffusers")


class FreeU(Editor):
    """Re-weight decoder features.

    b1, s1: gains of backbone and skip at the widest concats (SD1.x: 1280 channels); b2, s2: at the
    second widest. The defaults are the paper's for SD1.4 and SDXL. rule: "official" chooses by the
    backbone's width as the authors' code does, "diffusers" by decoder block (its `enable_freeu`).
    version: 2 (gain by structure) or 1 (constant gain, which is also diffusers' form). Gains of 1
    leave a concat untouched.
    """

    def __init__(
        self,
        b1: float = 1.3,
        b2: float = 1.4,
        s1: float = 0.9,
        s2: float = 0.2,
        *,
        rule: str = "official",
        version: int | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        for name, value in (("b1", b1), ("b2", b2), ("s1", s1), ("s2", s2)):
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"FreeU: {name}={value!r}; give a gain of 0 or more, such as 1.2")
        if rule not in RULES:
            raise InputError(f"FreeU: rule={rule!r}; give one of {', '.join(RULES)}")
        if version not in (None, 1, 2):
            raise InputError(f"FreeU: version={version!r}; give 1 or 2")
        self.gains = ((float(b1), float(s1)), (float(b2), float(s2)))
        self.rule = rule
        self.version = version or (2 if rule == "official" else 1)
        self.start, self.stop = start, stop
        self._stages: dict[int, int] = {}

    def attach(self, target: object) -> None:
        places = list(concats(denoiser_of(target)))
        widths = sorted({c.backbone_channels for c in places}, reverse=True)
        self._stages = {
            c.order: c.block if self.rule == "diffusers" else widths.index(c.backbone_channels)
            for c in places
        }

    def features(self, call: FeatureCall) -> None:
        stage = self._stages.get(call.order, len(self.gains))
        if stage >= len(self.gains):
            return
        b, s = self.gains[stage]
        if b != 1.0:
            call.backbone = self._strengthen(call.backbone, b)
        if s != 1.0:
            call.skip = scale_low_frequencies(call.skip, s)

    def _strengthen(self, h: Tensor, b: float) -> Tensor:
        half = h.shape[1] // 2
        gain: Tensor | float = b
        if self.version == 2:
            mean = h.mean(1, keepdim=True)
            low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
            # A constant feature map has no structure to follow: its gain is 1, not 0 / 0.
            gain = (b - 1) * (mean - low) / (high - low).clamp_min(1e-12) + 1
        return torch.cat([h[:, :half] * gain, h[:, half:]], 1)


def scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """F_s of a feature map [rows, channels, height, width]; s = 1 is the identity."""
    height, width = x.shape[-2:]
    waves, shares = _waves(height, width)
    waves = waves.to(x.device)
    flat = x.float().flatten(2)
    amounts = (flat @ waves.mT) * ((1 - s) * shares.to(x.device))
    return (flat - amounts @ waves).unflatten(2, (height, width)).to(x.dtype)


def _waves(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The mean and the cosine and sine of the three lowest waves, orthonormal: [7, pixels].

    And the share of each that the window holds: half of a wave's two frequencies, or all of it
    where the two are one (the mean, and the shortest wave of a side of 2).
    """
    rows = torch.arange(height, dtype=torch.float64)[:, None] / height
    columns = torch.arange(width, dtype=torch.float64)[None] / width
    found = [torch.ones(height, width, dtype=torch.float64)]
    shares = [1.0]
    for u, v in ((1, 0), (0, 1), (1, 1)):
        angle = 2 * math.pi * (u * rows + v * columns)
        found += [angle.cos(), angle.sin()]
        alone = 2 * u % height == 0 and 2 * v % width == 0
        shares += [1.0 if alone else 0.5] * 2
    flat = torch.stack([wave.flatten() for wave in found])
    norm = flat.norm(dim=1, keepdim=True)
    # The sine of a wave that is its own mirror vanishes, but for rounding.
    return torch.where(norm > 1e-6, flat / norm.clamp_min(1e-6), 0).float(), torch.tensor(shares)
