"""ScaleU: learned gains of a UNet's backbone features and of its skips' low frequencies.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024), section 3.3. At decoder concat i with backbone h and skip r:

    h <- h (1 + tanh b_i)         b_i: one for each channel of h
    r <- F_s(r),  s = 1 + tanh s_i     F: the lowest frequencies scaled, as in FreeU

The official checkpoint holds b_i and s_i for all 12 concats (`scaleu_b_i`, `scaleu_s_i`); zeros
leave everything as it is. The variant that depends on the image, which the official code holds but
switches off, follows the structure of the features: h <- h (1 + tanh(b_i) h~), h~ the channel mean
of h scaled to 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of
from hookctl.arguments import checked, refusal
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError
from hookctl.hooks.skips import Concat, concats
from hookctl.kernels.fourier_gain import fourier_gain
from hookctl.loop.state import FeatureCall
from hookctl.recipes.common.features.statistics import structure

Gains = Mapping[int, float | Sequence[float] | Tensor] | Sequence[float | Sequence[float] | Tensor]


class ScaleU(Editor):
    """Scale decoder features by given parameters.

    backbone: b_i for each decoder concat in forward order, a number for all channels or one for
    each ([channels]); skip: s_i for each, a number. Both may be tables {concat: ...}; a concat
    that is left out keeps its features. by_structure: the variant that depends on the image.
    Tensors are used as they are, so gains can be learned through them.
    """

    @checked()
    def __init__(
        self,
        backbone: Gains = (),
        skip: Gains = (),
        *,
        by_structure: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.backbone = _by_concat(backbone, f"{self.name}: backbone")
        self.skip = _by_concat(skip, f"{self.name}: skip")
        for order, gain in self.skip.items():
            if gain.numel() != 1:
                raise InputError(
                    f"{self.name}: skip[{order}] is {tuple(gain.shape)}; give one number"
                )
        self.by_structure = by_structure
        self.start, self.stop = start, stop

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor], **options: Any) -> ScaleU:
        """From the keys `scaleu_b_i` and `scaleu_s_i` of an official checkpoint; options: of the
        editor. Raises InputError without such keys."""
        backbone: dict[int, Tensor] = {}
        skip: dict[int, Tensor] = {}
        for key, value in weights.items():
            name, _, order = key.rpartition("_")
            if name in ("scaleu_b", "scaleu_s") and order.isdecimal():
                gains = backbone if name == "scaleu_b" else skip
                gains[int(order)] = value
        if not backbone and not skip:
            raise InputError(
                "ScaleU: the weights hold no scaleu_b_0, scaleu_s_0 ...; give those of an "
                "InstanceDiffusion checkpoint"
            )
        return cls(backbone, skip, **options)

    def neutral(self) -> bool:
        return all(_is_zero(gain) for gain in (*self.backbone.values(), *self.skip.values()))

    def claims(self) -> Sequence[Claim]:
        return (
            [] if self.neutral() else [Claim("gains of ScaleU", window=self.window(), shared=True)]
        )

    def attach(self, target: Any) -> None:
        found = {concat.order: concat for concat in concats(denoiser_of(target))}
        if not found:
            return  # refused as every editor of features is
        for name, gains in (("backbone", self.backbone), ("skip", self.skip)):
            for order, gain in gains.items():
                if order not in found:
                    raise InputError(
                        f"{self.name}: {name}[{order}] is for a concat that this model lacks; it "
                        f"has {len(found)}"
                    )
                if name == "backbone":
                    self._check_width(gain, found[order])

    def _check_width(self, gain: Tensor, concat: Concat) -> None:
        if gain.numel() not in (1, concat.backbone_channels):
            raise InputError(
                f"{self.name}: backbone[{concat.order}] has {gain.numel()} numbers; the backbone "
                f"at {concat.path} has {concat.backbone_channels} channels, so give as many or one"
            )

    def features(self, call: FeatureCall) -> None:
        b, s = self.backbone.get(call.order), self.skip.get(call.order)
        if b is not None and not _is_zero(b):
            h = call.backbone
            gain = torch.tanh(b.to(h)).reshape(1, -1, 1, 1)
            call.backbone = h * (1 + (gain * structure(h) if self.by_structure else gain))
        if s is not None and not _is_zero(s):
            call.skip = fourier_gain(call.skip, 1 + torch.tanh(s).reshape(()))


def _is_zero(gain: Tensor) -> bool:
    """Whether a gain is known to change nothing; one that is being learned never is."""
    return not gain.requires_grad and not bool(gain.any())


def _by_concat(given: Any, name: str) -> dict[int, Tensor]:
    """Gains by the order of their concat, each one number or [channels]."""
    items = given.items() if isinstance(given, Mapping) else enumerate(given)
    found = {}
    for order, value in items:
        try:
            gain = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
            concat = int(order)  # tables of a file have texts for keys
        except (TypeError, ValueError):
            raise refusal(f"{name}[{order!r}]", value, "a number or numbers") from None
        if gain.dim() > 1 or not bool(torch.isfinite(gain.detach()).all()):
            raise refusal(f"{name}[{order}]", value, "finite numbers, one or [channels]")
        found[concat] = gain
    return found
