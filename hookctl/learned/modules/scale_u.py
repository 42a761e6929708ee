"""ScaleU: learned gains of a decoder's features and of its skips' low frequencies.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024), section 3.3. At decoder concat i, with backbone h and skip r:

    h <- h (1 + tanh b_i)              b_i: one for each channel of h
    r <- F_s(r),  s = 1 + tanh s_i     F: the lowest frequencies scaled by s, the same for all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hookctl.kernels.fourier_gain import fourier_gain

WIDTHS = (1280,) * 7 + (640,) * 3 + (320,) * 2  # of Stable Diffusion 1.x


class ScaleU(nn.Module):
    """The gains of all concats; zeros leave features as they are."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        for i, width in enumerate(widths):
            self.register_parameter(f"scaleu_b_{i}", nn.Parameter(torch.zeros(width)))
            self.register_parameter(f"scaleu_s_{i}", nn.Parameter(torch.zeros(1)))

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> ScaleU:
        """The gains whose tensors have these names and shapes."""
        count = sum(name.startswith("scaleu_b_") for name in shapes)
        return cls([shapes[f"scaleu_b_{i}"][0] for i in range(count)])

    @property
    def neutral(self) -> bool:
        """Whether all gains are 0, so that nothing changes."""
        return not any(bool(p.any()) for p in self.parameters())

    def forward(self, order: int, backbone: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The features at concat `order`, [rows, channels, height, width] each."""
        b, s = self.get_parameter(f"scaleu_b_{order}"), self.get_parameter(f"scaleu_s_{order}")
        wide = torch.promote_types(backbone.dtype, torch.float32)
        gain = (1 + torch.tanh(b.to(wide))).to(backbone.dtype)
        scaled = fourier_gain(skip, (1 + torch.tanh(s.to(wide))).reshape(()))
        return backbone * gain[:, None, None], scaled
