"""What the trainings of modules over the frozen base share: base, data, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..captions import sample
from ..latents import Basis, fit_basis
from ..load import load_shapes
from ..render import render
from ..text import Words
from ..world import Scene

# From here on noise is so strong that where objects lie is still to be decided.
EARLY = 700
HELD_OUT = 10**9  # seeds of what is only looked at


class Task(Protocol):
    """A module to be trained.

    module: all that is learned, by its names; others: beginnings of the names of what is learned by
    Adam, though matrices; rate: the highest one of learning; stages: steps from which on others
    learn, on the averages of what was learned before; loss: of a batch drawn by a generator, at a
    step of the training (the curriculum); look: figures that show whether it learns, of held-out
    data; state: the weights with the names of the official checkpoints.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def others(self) -> tuple[str, ...]: ...

    @property
    def rate(self) -> float: ...

    @property
    def stages(self) -> tuple[int, ...]: ...

    def loss(self, rng: np.random.Generator, step: int) -> Tensor: ...

    def look(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...


@dataclass
class Batch:
    """Scenes with captions; latents [batch, 12, 16, 16] and text states [batch, 32, 128]."""

    scenes: Sequence[Scene]
    texts: Sequence[str]
    latents: Tensor
    states: Tensor


class Base:
    """The frozen pipeline with what its training knew."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.pipe = load_shapes(device)
        for part in (self.pipe.unet, self.pipe.text_encoder):
            part.eval().requires_grad_(False)
        self.words = Words(self.pipe.tokenizer)
        self.alphas = self.pipe.scheduler.alphas_cumprod.to(device)

    @property
    def unet(self) -> UNet2DConditionModel:
        unet: UNet2DConditionModel = self.pipe.unet
        return unet

    @cached_property
    def basis(self) -> Basis:
        return fit_basis(0).to(self.device)

    def scenes(self, rng: np.random.Generator, count: int, pool: int | None) -> list[Any]:
        """(scene, caption) pairs, of the first `pool` ones there are, or fresh ones."""
        counts = (0.2, 0.45, 0.35)
        if pool is None:
            return [sample(rng, counts=counts) for _ in range(count)]
        chosen = rng.integers(pool, size=count)
        return [sample(np.random.default_rng((7, int(i))), counts=counts) for i in chosen]

    @torch.no_grad()
    def batch(self, pairs: Sequence[tuple[Scene, str]], texts: Sequence[str]) -> Batch:
        scenes = [scene for scene, _ in pairs]
        latents = self.basis.encode(render(scenes, self.device))
        return Batch(scenes, texts, latents, self.states(texts))

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """What the denoiser is given of texts, [texts, 32, 128]."""
        ids = self.words(list(texts)).to(self.device)
        found: Tensor = self.pipe.text_encoder(ids).last_hidden_state
        return found

    @torch.no_grad()
    def pooled(self, texts: Sequence[str]) -> Tensor:
        """The state of each text's last token, [texts, 128]."""
        ids = self.words(list(texts)).to(self.device)
        found: Tensor = self.pipe.text_encoder(ids).pooler_output
        return found

    def times(self, rng: np.random.Generator, count: int, early_share: float) -> Tensor:
        """Timesteps [count], that share of them EARLY or later."""
        early = rng.random(count) < early_share
        u = rng.random(count)
        times = np.where(early, EARLY + u * (1000 - EARLY), u * EARLY)
        return torch.from_numpy(times).long().clamp(max=999).to(self.device)

    def error(self, z: Tensor, t: Tensor, noise: Tensor, states: Tensor) -> Tensor:
        """The v-prediction's squared error of every sample, weighed as in the base's training."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        v = a.sqrt() * noise - (1 - a).sqrt() * z
        on_gpu = self.device != "cpu"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=on_gpu):
            made = self.unet(noisy, t, states, return_dict=False)[0]
        error = (made.float() - v).square().mean((1, 2, 3))
        return error * (5.0 * (1 - a)).clamp(max=1.0).flatten()  # 5 / (snr + 1)


def ldm_name(path: str, layers: int) -> str:
    """The name that LDM has for what stands at a path in an attention block of a UNet.

    layers: of a block of the UNet.
    """
    place, rest = path.split(".", 1)
    if place == "mid_block":
        return f"middle_block.1.{rest.removeprefix('attentions.0.')}"
    block, _, layer, rest = rest.split(".", 3)
    number = int(block) * (layers + 1) + int(layer)
    if place == "down_blocks":
        return f"input_blocks.{number + 1}.1.{rest}"
    return f"output_blocks.{number}.1.{rest}"
