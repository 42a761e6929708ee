"""RealCompo as the official code writes it: PLMS or DDIM over one image, influence maps apart.

Zhang et al., arXiv 2402.12908 (`plms.py`, `loss_function.py`), with the maps of the layout model's
own cross-attention. Nothing here is shared with the recipe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.recipes.literal_energies import Model


class RealCompoLoop:
    """pipe: the text model's, with a DDIM schedule in float64; layout: another UNet."""

    def __init__(self, pipe: Any, layout: Any, *, steps: int, guidance: float, plms: bool) -> None:
        self.pipe, self.layout = pipe, Model(pipe, layout)
        self.steps, self.guidance, self.plms = steps, guidance, plms
        stride = 1000 // steps
        self.times = [i * stride + 1 for i in range(steps)][::-1]
        alphas = [float(pipe.scheduler.alphas_cumprod[t]) for t in self.times]
        self.alphas = [*alphas, float(pipe.scheduler.final_alpha_cumprod)]

    def moved(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        a, b = self.alphas[i], self.alphas[i + 1]
        return b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps

    def loss(self, boxes: list[tuple[float, ...]], tokens: list[int]) -> Tensor:
        kept = [m for m in self.layout.maps.values() if m.shape[1] == 256]
        maps = torch.cat(kept).mean(0).reshape(16, 16, -1)
        total = torch.zeros((), dtype=torch.float64)
        for (x1, y1, x2, y2), token in zip(boxes, tokens, strict=True):
            rows, columns = slice(int(16 * y1), int(16 * y2)), slice(int(16 * x1), int(16 * x2))
            total = total + 1 - maps[rows, columns, token].sum() / maps[:, :, token].sum()
        return total  # the text model's maps are detached: a constant

    def run(
        self, prompt: str, boxes: list[tuple[float, ...]], tokens: list[int], t0: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The final latents, and the last difference of the influence maps."""
        text = self.layout.text(prompt)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((1, 4, 16, 16), generator=generator, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(31)
            of_layout = torch.randn((1, 1, 16, 16)).double()
            of_text = torch.randn((1, 1, 16, 16)).double()
        old: list[Tensor] = []
        scale_range = np.linspace(1.0, 0.5, self.steps)
        for i, t in enumerate(self.times):
            of_layout = of_layout.clone().detach().requires_grad_(True)
            of_text = of_text.clone().detach().requires_grad_(True)

            def composed(a: Tensor, b: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
                share = torch.cat(maps, 1).softmax(1)
                return share[:, :1] * a + share[:, 1:] * b

            with torch.no_grad():
                e_l = self.layout.unet(x, t, text[1:]).sample
                e_t = self.pipe.unet(x, t, text[1:]).sample
            trial = self.moved(x, composed(e_l, e_t, (of_layout, of_text)), i)
            self.layout.unet(trial, t, text[1:])
            leaves = [of_layout, of_text]
            grads = torch.autograd.grad(self.loss(boxes, tokens), leaves)
            rho = 1e6 * np.sqrt(scale_range[i])
            maps = tuple((m - rho * g).detach() for m, g in zip(leaves, grads, strict=True))
            of_layout, of_text = maps

            @torch.no_grad()
            def output(x: Tensor, t: int, i: int = i, maps: Any = maps) -> Tensor:
                guided = []
                for unet in (self.layout.unet, self.pipe.unet):
                    u, c = unet(torch.cat([x] * 2), t, text).sample.chunk(2)
                    guided.append(u + self.guidance * (c - u))
                return guided[0] if i < t0 else composed(*guided, maps)

            e = output(x, t)
            if not self.plms:
                prime = e
            elif not old:
                after = self.times[min(i + 1, self.steps - 1)]
                prime = (e + output(self.moved(x, e, i), after)) / 2
            elif len(old) == 1:
                prime = (3 * e - old[-1]) / 2
            elif len(old) == 2:
                prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
            else:
                prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
            x = self.moved(x, prime, i)
            old = [*old, e][-3:]
        return x, (of_layout - of_text).detach()
