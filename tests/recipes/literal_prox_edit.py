"""ProxEdit's denoising loops as the official code writes them: with Prompt-to-Prompt (there without
its controller) and with MasaCtrl. Han et al., arXiv 2306.05414. Nothing here is shared with the
recipes; alphas are read in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp(val: float, low: Tensor, high: Tensor) -> Tensor:
    shape = low.shape
    low, high = low.flatten(1), high.flatten(1)
    low_norm = low / torch.norm(low, dim=1, keepdim=True)
    high_norm = high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    a = (torch.sin((1.0 - val) * omega) / so).unsqueeze(1)
    b = (torch.sin(val * omega) / so).unsqueeze(1)
    return (a * low + b * high).reshape(shape)


class Loop:
    """pipe: with DDIM steps; stars: the inverted latents, clean first; clean: the image's."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        pipe.scheduler.set_timesteps(steps)

    def alpha(self, t: int) -> float:
        scheduler = self.pipe.scheduler
        return float(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod)

    def text(self, prompts: list[str]) -> Tensor:
        found: Tensor = self.pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        return found

    @torch.no_grad()
    def inverted(self, clean: Tensor, prompt: str) -> list[Tensor]:
        found, text = [clean], self.text([prompt])
        for t in reversed(self.pipe.scheduler.timesteps.tolist()):
            x = found[-1]
            eps = self.pipe.unet(x, t, text).sample
            here, there = self.alpha(t - 1000 // self.steps), self.alpha(t)
            x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
            found.append(there**0.5 * x0 + (1 - there) ** 0.5 * eps)
        return found

    def step(self, eps: Tensor, t: int, x: Tensor, pull: tuple[Any, ...] = ()) -> Tensor:
        here, there = self.alpha(t), self.alpha(t - 1000 // self.steps)
        x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
        if pull:
            reference, rate, mask = pull
            x0 = x0 - rate * (x0 - reference.expand_as(x0)) * mask
        return there**0.5 * x0 + (1 - there) ** 0.5 * eps

    @staticmethod
    def shrunk(delta: Tensor, prox: str, quantile: float) -> tuple[Tensor, Any]:
        threshold = delta.abs().quantile(quantile) if quantile > 0 else -quantile
        delta = delta - delta.clamp(-threshold, threshold)
        if prox == "l1":
            delta = torch.where(delta > 0, delta - threshold, delta)
            delta = torch.where(delta < 0, delta + threshold, delta)
        return delta, threshold

    @torch.no_grad()
    def run(
        self,
        clean: Tensor,
        prompts: list[str],
        *,
        prox: str,
        quantile: float = 0.7,
        scale: float = 7.5,
        interp: float = 0.0,
        rate: float = 0.1,
        recon_t: int = 400,
        dilate: int = 1,
        reconstruction: bool = False,
        inversion: bool = False,
    ) -> Tensor:
        """negative_prompt_inversion.py and ptp_utils.diffusion_step."""
        stars = self.inverted(clean, prompts[0])
        uncond = self.text([prompts[0]])
        if interp > 0:
            uncond = slerp(interp, uncond, self.text([""]))
        texts = torch.cat([uncond.expand(len(prompts), -1, -1), self.text(prompts)])
        x = stars[-1].expand(len(prompts), -1, -1, -1)
        for i, t in enumerate(self.pipe.scheduler.timesteps.tolist()):
            u, c = self.pipe.unet(torch.cat([x] * 2), t, texts).sample.chunk(2)
            delta, threshold = self.shrunk(c - u, prox, quantile)
            pull: tuple[Any, ...] = ()
            mask = None
            if t < recon_t:
                edited = (delta.abs() > threshold).double()
                if dilate:
                    edited = F.max_pool2d(edited, 2 * dilate + 1, 1, dilate)
                mask = 1 - edited
                if reconstruction:
                    pull = (stars[0], rate, mask)
            x = self.step(u + scale * delta, t, x, pull)
            if mask is not None and inversion:
                x = x - rate * (x - stars[len(stars) - i - 2].expand_as(x)) * mask
        return x

    @torch.no_grad()
    def masactrl(
        self,
        clean: Tensor,
        prompts: list[str],
        *,
        quantile: float,
        prox: str = "l0",
        prox_step: int = 0,
        scale: float = 7.5,
        interp: float = 1.0,
    ) -> Tensor:
        """prox_masactrl.py, with npi; the attention is the caller's."""
        stars = self.inverted(clean, prompts[0])
        own = self.text([prompts[0]])
        uncond = torch.cat([own, slerp(interp, own, self.text([""])) if interp > 0 else own])
        texts = torch.cat([uncond, self.text(prompts)])
        x = stars[-1].expand(2, -1, -1, -1)
        for i, t in enumerate(self.pipe.scheduler.timesteps.tolist()):
            u, c = self.pipe.unet(torch.cat([x] * 2), t, texts).sample.chunk(2)
            delta = c[1:] - u[1:]
            if i >= prox_step:
                delta, _ = self.shrunk(delta, prox, quantile)
            eps = torch.cat([u[:1] + 1 * (c[:1] - u[:1]), u[1:] + scale * delta])
            x = self.step(eps, t, x)
        return x
