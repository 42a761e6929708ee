"""Cyclic One-Way diffusion as the official code writes it, step counts, masks and batches included.

Wang et al., arXiv 2306.08247. Nothing here is shared with the recipe. The inverse scheduler is
written out in float64, on the levels of the pipeline's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

NEGATIVE = "a bad quality and low resolution image,extra fingers,deformed hands"
SCALE = 7.5


class Cow:
    """pipe: with DDIM steps; images: PIL, of one size; mask: PIL, black where they count."""

    def __init__(
        self,
        pipe: Any,
        images: list[Image.Image],
        mask: Image.Image,
        prompts: list[str],
        *,
        steps: int,
        at: tuple[int, int],
        canvas: int,
        cycles: int,
        seed: int,
        texts: tuple[str, str, str] = (NEGATIVE, "human face", "a high quality and colorful image"),
    ) -> None:
        self.pipe, self.prompts, self.steps, self.cycles = pipe, prompts, steps, cycles
        self.negative, self.suppress, self.diverse = texts
        self.generator = torch.Generator().manual_seed(seed)
        inverted = ImageChops.invert(mask.convert("1"))
        gray = Image.new("RGB", images[0].size, (128, 128, 128))
        self.images = [Image.composite(image, gray, inverted) for image in images]
        self.canvases = []
        for image in self.images:
            background = Image.new("RGB", (canvas, canvas), color=(128, 128, 128))
            background.paste(image, at)
            self.canvases.append(background)
        pixels = torch.from_numpy(np.array(inverted)).double()[None, None]
        side = images[0].size[0] // 8
        self.x, self.y, self.side = at[0] // 8, at[1] // 8, side
        self.mask = F.interpolate(pixels, size=(side, side), mode="nearest")
        self.mask[self.mask != 1] = 0
        self.sample_mask = torch.zeros(1, 1, canvas // 8, canvas // 8, dtype=torch.float64)
        self.sample_mask[..., self.y : self.y + side, self.x : self.x + side] = self.mask

    def encoded(self, images: list[Image.Image]) -> Tensor:
        vae, found = self.pipe.vae, []
        for image in images:
            pixels = self.pipe.image_processor.preprocess(image).to(vae.dtype)
            found.append(vae.encode(pixels).latent_dist.sample(self.generator))
        return torch.cat(found) * vae.config.scaling_factor

    def text(self, prompts: list[str]) -> Tensor:
        return self.pipe.encode_prompt(prompts, "cpu", 1, False)[0]

    def alpha(self, t: int) -> float:
        scheduler = self.pipe.scheduler
        return float(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod)

    def invert(self, x: Tensor, start: int, end: int) -> tuple[Tensor, list[Tensor]]:
        text = torch.cat([self.text([""] * len(x)), self.text(self.prompts)])
        kept = [x]
        for t in self.ascending[start:end]:
            u, c = self.pipe.unet(torch.cat([x] * 2), t, text).sample.chunk(2)
            eps = u + SCALE * (c - u)
            here, there = self.alpha(t - 1000 // self.steps), self.alpha(t)
            x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
            x = there**0.5 * x0 + (1 - there) ** 0.5 * eps
            kept.append(x)
        return x, kept

    def sample(self, x: Tensor, start: int, end: int, eta: float, masked: bool) -> Tensor:
        batch = len(x)
        for i, t in enumerate(self.pipe.scheduler.timesteps):
            index = self.steps - i - 1
            if index >= start:
                continue
            if index < end:
                break
            if masked:
                given = [[self.negative], None, [self.suppress], [self.diverse]]
                texts = [self.text(self.prompts if g is None else g * batch) for g in given]
                out = self.pipe.unet(torch.cat([x] * 4), t, torch.cat(texts)).sample
                neg, text, sup, div = out.chunk(4)
                m = self.sample_mask
                n = m * neg + (1 - m) * (neg + sup - div)
                eps = n + SCALE * (text - n)
            else:
                texts = torch.cat([self.text([""] * batch), self.text(self.prompts)])
                u, c = self.pipe.unet(torch.cat([x] * 2), t, texts).sample.chunk(2)
                eps = u + SCALE * (c - u)
            x = self.pipe.scheduler.step(eps, t, x, eta=eta, generator=self.generator).prev_sample
        return x

    def replaced(self, x: Tensor, image: Tensor) -> Tensor:
        x, m = x.clone(), self.mask.expand_as(image)
        place = x[:, :, self.y : self.y + self.side, self.x : self.x + self.side]
        place[m == 1] = image[m == 1]
        return x

    @torch.no_grad()
    def run(self) -> Tensor:
        self.pipe.scheduler.set_timesteps(self.steps)
        self.ascending = self.pipe.scheduler.timesteps.tolist()[::-1]
        images, canvases = self.encoded(self.images), self.encoded(self.canvases)
        r, b, last = (int(f * self.steps) for f in (0.5, 0.7, 0.4))
        at_r, to_r = self.invert(images, 0, r)
        _, to_b = self.invert(at_r, r, b)
        levels = [*to_r, *to_b[1:]]
        x, _ = self.invert(canvases, 0, r)
        for _ in range(self.cycles):
            here, there = self.alpha(self.ascending[r]), self.alpha(self.ascending[b])
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            x = (there / here) ** 0.5 * x + (1 - there / here) ** 0.5 * noise
            level = b
            for k in range(b, r - 1, -1):
                x = self.replaced(self.sample(x, level, k, 1.0, True), levels[k])
                level = k
        x = self.replaced(self.sample(x, r, last, 0.1, False), levels[last])
        return self.sample(x, last, 0, 0.1, False)
