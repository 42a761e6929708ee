"""FlowEdit and RF-Inversion as their official codes write them, for Stable Diffusion 3 and FLUX.1.

Kulikov et al., arXiv 2412.08629; Rout et al., arXiv 2410.10792. Nothing here is shared with the
recipes; noise comes from a generator in the place of the global one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

TOKENS = 16  # of T5


class FlowMatchExact(FlowMatchEulerDiscreteScheduler):
    """Whose steps are in the precision of their latents, not in single."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        here, there = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        return (sample + (float(there) - float(here)) * model_output,)


class SD3:
    """Velocities of a pipeline, and its levels."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe = pipe
        pipe.scheduler.set_timesteps(steps)
        self.timesteps = pipe.scheduler.timesteps
        self.sigmas = [*(float(t) / 1000 for t in self.timesteps), 0.0]

    @torch.no_grad()
    def encode(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        vae = self.pipe.vae
        found = vae.encode(self.pipe.image_processor.preprocess(image).to(vae.dtype)).latent_dist
        z = found.mode() if generator is None else found.sample(generator)
        latents: Tensor = (z - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def text(self, prompt: str) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.pipe.encode_prompt(
            prompt, None, None, negative_prompt="", max_sequence_length=TOKENS
        )
        return found

    def both(
        self, x: Tensor, z: Tensor, i: int, prompts: list[str], scales: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Of the source and the target: one call of [u_s, c_s, u_t, c_t]."""
        (c_s, u_s, pc_s, pu_s), (c_t, u_t, pc_t, pu_t) = map(self.text, prompts)
        rows = self.pipe.transformer(
            torch.cat([x, x, z, z]),
            timestep=self.timesteps[i].expand(4),
            encoder_hidden_states=torch.cat([u_s, c_s, u_t, c_t]),
            pooled_projections=torch.cat([pu_s, pc_s, pu_t, pc_t]),
        ).sample
        us, cs, ut, ct = rows.chunk(4)
        return us + scales[0] * (cs - us), ut + scales[1] * (ct - ut)

    def target(self, z: Tensor, i: int, prompts: list[str], scales: tuple[float, float]) -> Tensor:
        return self.both(z, z, i, prompts, scales)[1]


class Flux:
    """Velocities of a pipeline whose model was taught a scale, one row a call, and its levels."""

    def __init__(self, pipe: Any, steps: int, tokens: int) -> None:
        self.pipe, config = pipe, pipe.scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = tokens * slope + config.base_shift - slope * config.base_image_seq_len
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        self.timesteps = pipe.scheduler.timesteps
        self.sigmas = pipe.scheduler.sigmas.tolist()

    @torch.no_grad()
    def encode(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        z = SD3.encode(self, image, generator)  # type: ignore[arg-type]
        self.height, self.width = z.shape[2] // 2, z.shape[3] // 2
        batch, channels = z.shape[:2]
        z = z.view(batch, channels, self.height, 2, self.width, 2).permute(0, 2, 4, 1, 3, 5)
        return z.reshape(batch, self.height * self.width, channels * 4)

    def velocity(self, x: Tensor, time: Tensor, prompt: str, scale: float) -> Tensor:
        """time: from 0 (clean) to 1."""
        text, pooled, ids = self.pipe.encode_prompt(prompt, None, max_sequence_length=TOKENS)
        rows, columns = torch.meshgrid(
            torch.arange(self.height), torch.arange(self.width), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        found: Tensor = self.pipe.transformer(
            x,
            timestep=time.to(x.dtype).expand(1),
            guidance=torch.full([1], scale, dtype=torch.float32),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=ids,
            img_ids=places.to(x.dtype),
        ).sample
        return found

    def at(self, x: Tensor, i: int, prompt: str, scale: float) -> Tensor:
        return self.velocity(x, self.timesteps[i].to(x.dtype) / 1000, prompt, scale)

    def both(
        self, x: Tensor, z: Tensor, i: int, prompts: list[str], scales: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        return self.at(x, i, prompts[0], scales[0]), self.at(z, i, prompts[1], scales[1])

    def target(self, z: Tensor, i: int, prompts: list[str], scales: tuple[float, float]) -> Tensor:
        return self.at(z, i, prompts[1], scales[1])


@torch.no_grad()
def flow_edit(
    model: SD3 | Flux,
    x_src: Tensor,
    prompts: list[str],
    *,
    n_max: int,
    n_min: int,
    n_avg: int,
    scales: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    steps, edit = len(model.timesteps), x_src.clone()

    def noise() -> Tensor:
        return torch.randn(x_src.shape, generator=generator, dtype=x_src.dtype)

    for i in range(steps):
        if steps - i > n_max:
            continue
        here, there = model.sigmas[i], model.sigmas[i + 1]
        if steps - i > n_min:
            average = torch.zeros_like(x_src)
            for _ in range(n_avg):
                src = (1 - here) * x_src + here * noise()
                tar = edit + src - x_src
                v_src, v_tar = model.both(src, tar, i, prompts, scales)
                average += (1 / n_avg) * (v_tar - v_src)
            edit = edit + (there - here) * average
        else:
            if i == steps - n_min:
                tar = edit + ((1 - here) * x_src + here * noise()) - x_src
            tar = tar + (there - here) * model.target(tar, i, prompts, scales)
    return edit if n_min == 0 else tar


@torch.no_grad()
def rf_invert(
    model: Flux, y_0: Tensor, y_1: Tensor, *, gamma: float, scale: float, published: bool
) -> Tensor:
    """Published: the model is told i / N, N levels; else the level that the latents are at."""
    sigmas, y = model.sigmas, y_0
    count = len(sigmas)
    for i in range(count - 1):
        if published:
            t, length = i / count, sigmas[i] - sigmas[i + 1]
        else:
            t = sigmas[count - 1 - i]
            length = sigmas[count - 2 - i] - t
        told = torch.tensor(t, dtype=torch.float32) * 1000  # as schedulers have their times
        u = model.velocity(y, told.to(y.dtype) / 1000, "", scale)
        u = u + gamma * ((y_1 - y) / (1 - t) - u)
        y = y + u * length
    return y


@torch.no_grad()
def rf_edit(
    model: Flux,
    x: Tensor,
    y_0: Tensor,
    prompt: str,
    *,
    eta: float,
    start: int,
    stop: int,
    power: float,
    scale: float,
) -> Tensor:
    n = len(model.timesteps)
    for i in range(n):
        s, after = model.sigmas[i], model.sigmas[i + 1]
        v = -model.at(x, i, prompt, scale)
        pull = (y_0 - x) / s
        eta_t = eta * (1 - i / n) ** power if start <= i < stop else 0.0
        x = x + (v + eta_t * (pull - v)) * (s - after)
    return x
