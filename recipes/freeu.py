"""FreeU: strengthen a UNet's backbone features, calm its skip connections.

Si et al., "FreeU: Free Lunch in Diffusion U-Net", arXiv 2309.11497 (CVPR 2024). At a decoder
concat with backbone h and skip r:

    h[:, :C/2] <- h[:, :C/2] * gain        gain = b (version 1) or (b - 1) h~ + 1 (version 2),
    r <- F_s(r)                            h~ = channel mean of h, scaled to 0..1 per image

F_s multiplies the lowest frequencies by s. The official code masks the 2 x 2 window {-1, 0}^2 of
the shifted spectrum and takes the real part, so a gain of s acts on the mean and (1 + s) / 2 on the
waves (1,0), (0,1), (1,1): no Fourier transform, any size and dtype
(`hookctl.kernels.fourier_gain`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of
from hookctl.arguments import checked, number, one_of
from hookctl.editor import Editor
from hookctl.hooks.skips import concats
from hookctl.kernels.fourier_gain import fourier_gain
from hookctl.loop.state import FeatureCall
from hookctl.recipes.common.features.statistics import structure
from hookctl.run_state import RunState

RULES = ("official", "diffusers")


class FreeU(Editor):
    """Re-weight decoder features.

    b1, s1: gains of backbone and skip at the widest concats (SD1.x: 1280 channels); b2, s2: at the
    second widest. The defaults are the paper's for SD1.4 and SDXL. rule: "official" chooses by the
    backbone's width as the authors' code does, "diffusers" by decoder block (its `enable_freeu`).
    version: 2 (gain by structure) or 1 (constant gain, which is also diffusers' form). Gains of 1
    leave a concat untouched.
    """

    _gains_of: RunState[dict[int, tuple[float, float]]] = RunState(factory=dict)

    @checked()
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
        given = {"b1": b1, "s1": s1, "b2": b2, "s2": s2}
        widest_b, widest_s, second_b, second_s = (
            number(value, f"FreeU: {name}", low=0) for name, value in given.items()
        )
        self.gains = ((widest_b, widest_s), (second_b, second_s))
        self.rule = one_of(rule, "FreeU: rule", RULES)
        if version is not None:
            one_of(version, "FreeU: version", (1, 2))
        self.version = version or (2 if rule == "official" else 1)
        self.start, self.stop = start, stop

    def neutral(self) -> bool:
        return all(gain == 1 for gains in self.gains for gain in gains)

    def attach(self, target: object) -> None:
        found = list(concats(denoiser_of(target)))
        widths = sorted({c.backbone_channels for c in found}, reverse=True)
        by_block = self.rule == "diffusers"
        stages = {
            c.order: c.block if by_block else widths.index(c.backbone_channels) for c in found
        }
        self._gains_of = {
            order: self.gains[stage] for order, stage in stages.items() if stage < len(self.gains)
        }

    def features(self, call: FeatureCall) -> None:
        b, s = self._gains_of.get(call.order, (1.0, 1.0))
        if b != 1.0:
            call.backbone = self._strengthen(call.backbone, b)
        if s != 1.0:
            call.skip = fourier_gain(call.skip, s)

    def _strengthen(self, h: Tensor, b: float) -> Tensor:
        half = h.shape[1] // 2
        gain: Tensor | float = b
        if self.version == 2:
            gain = (b - 1) * structure(h) + 1
        return torch.cat([h[:, :half] * gain, h[:, half:]], 1)
