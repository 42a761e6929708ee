"""How GLIGEN's maps and its inpainting enter a denoiser: by further channels of the latents.

The first convolution is that of the checkpoint, over [z ; e]: of a map, e is what a small network
makes of it, or its brightness (edges of HED); for inpainting, the known latents and where they are
(Li et al., arXiv 2301.07093, section 3.3 and the official code). Unconditional rows have them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hookctl.address.rows import Row
from hookctl.arguments import is_list, opened
from hookctl.errors import InputError
from hookctl.learned.gligen_inputs import Maps, Objects
from hookctl.learned.modules.gligen_tokens import Downsampler
from hookctl.learned.weights import Weights
from hookctl.loop.images import encode
from hookctl.loop.inserting import StemCall
from hookctl.loop.noise import level_of, noise_like
from hookctl.loop.state import State
from hookctl.run_state import RunState


@dataclass(frozen=True)
class Stem:
    """The first convolution of a checkpoint: weight [outputs, channels + further, 3, 3]; its bias,
    None for the model's own."""

    weight: Tensor
    bias: Tensor | None = None

    def apply(self, call: StemCall, extra: Tensor, rows: Sequence[Row]) -> None:
        """Let some rows of a call enter by it. extra: [all rows, further, height, width]."""
        plain = call.output
        own = getattr(call.layer, "bias", None)
        bias: Tensor | None = own if self.bias is None else self.bias
        device = call.input.device
        weight = self.weight.to(device, call.input.dtype)
        call.convolve(weight, None if bias is None else bias.to(device), extra)
        if len(rows) < len(call.rows):
            index = torch.tensor([row.index for row in rows], device=device)
            call.output = plain.index_copy(0, index, call.output[index])


class MapChannels:
    """The channels of a map."""

    def __init__(self, maps: Maps, downsampler: Downsampler | None) -> None:
        self.maps = maps
        self.network = None if downsampler is None else Weights(downsampler)

    def extra(self, row: Row, latent: Tensor) -> Tensor:
        """[further, height, width] for a row; latent: [rows, channels, height, width]."""
        size = latent.shape[-2], latent.shape[-1]
        given = self.maps.of(row.prompt)[None].to(latent.device)
        if self.network is None:
            return F.interpolate(given[:, :1], size, mode="bicubic")[0].to(latent)
        made = self.network.like(given)(given, size, nearest=self.maps.classes is not None)
        return made[0].to(latent)


class Inpainting:
    """Images that are kept outside of the boxes."""

    _known: RunState[list[Tensor]] = RunState(factory=list)
    _generator: RunState[torch.Generator] = RunState(factory=torch.Generator)

    def __init__(self, who: str, image: Any, objects: Objects, seed: int) -> None:
        several = is_list(image)
        self.who, self.objects, self.seed, self.shared = who, objects, seed, not several
        self.images: list[Image.Image] = [
            opened(one, f"{who}: inpaint") for one in (image if several else [image])
        ]

    def begin(self, state: State) -> None:
        """Encode the images of a run."""
        drawn = len({row.prompt for row in state.rows})
        if not self.shared and len(self.images) != drawn:
            raise InputError(
                f"{self.who}: inpaint has {len(self.images)} images, but the pipeline draws "
                f"{drawn} prompts; give one for all, or one for each"
            )
        self._known = [encode(state.pipe, image) for image in self.images]
        for image, known in zip(self.images, self._known, strict=True):
            if tuple(known.shape[-2:]) != tuple(state.grid[-2:]):
                raise InputError(
                    f"{self.who}: inpaint is {image.width} x {image.height} px, which is not the "
                    "size that the pipeline draws; resize it, or give height= and width="
                )
        self._generator = torch.Generator().manual_seed(self.seed)

    def known(self, prompt: int) -> Tensor:
        """[1, channels, height, width]"""
        return self._known[0 if self.shared else prompt]

    def mask(self, prompt: int, size: tuple[int, int]) -> Tensor:
        """1 where the image is kept, 0 inside of the boxes, [1, height, width]."""
        height, width = size
        kept = torch.ones(1, height, width)
        for x0, y0, x1, y1 in self.objects.boxes[prompt]:
            kept[:, int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 0
        return kept

    def extra(self, row: Row, latent: Tensor) -> Tensor:
        """[channels + 1, height, width] for a row."""
        mask = self.mask(row.prompt, (latent.shape[-2], latent.shape[-1])).to(latent)
        return torch.cat([self.known(row.prompt)[0].to(latent) * mask, mask])

    def put(self, state: State, rows: Sequence[Row]) -> None:
        """The known part of the latents at the level of this step: z <- m z0_t + (1 - m) z."""
        latents = state.latents.clone()
        level = level_of(state)
        # One noise for all, or an image's would depend on how many are drawn beside it.
        noise = noise_like(latents[0].cpu(), self._generator)
        for row in rows:
            z = latents[row.index]
            mask = self.mask(row.prompt, (z.shape[-2], z.shape[-1])).to(z)
            known = self.known(row.prompt)[0].to(z)
            noisy = level.mix(known, noise.to(z))
            latents[row.index] = mask * noisy + (1 - mask) * z
        state.latents = latents
