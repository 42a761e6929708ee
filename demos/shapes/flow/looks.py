"""What is measured while the velocity network trains, on few samples, so that it costs little."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..captions import sample
from ..evaluate import held_out_prompts, measure_prompts
from ..render import to_uint8
from .network import build_scheduler
from .training import BANDS, Trainer, noised

HELD_OUT = 10**6  # seed of what is only looked at
PROMPTS = 72  # a third each of one, two and three objects
PICTURES = 256  # of the validation loss, as many in each band
STEPS, GUIDANCE = 25, 3.0
ZEROS = 256  # what the stock pipeline appends unless told otherwise


@torch.no_grad()
def validation(trainer: Trainer, pictures: int = PICTURES, batch: int = 64) -> dict[str, float]:
    """The loss on held-out captions, by band of the level of noise; always of the same samples."""
    rng = np.random.default_rng(HELD_OUT)
    random = torch.Generator().manual_seed(HELD_OUT)
    sums = torch.zeros(BANDS)
    for _ in range(pictures // batch):
        pairs = [sample(rng, held_out=True) for _ in range(batch)]
        z = trainer.parts.encode([scene for scene, _ in pairs])
        s = (torch.arange(batch) + torch.rand(batch, generator=random)) / batch
        noise = torch.randn(z.shape, generator=random).to(z.device)
        x, target = noised(z, z, noise, s.to(z.device))
        zeros = torch.full((batch,), ZEROS, device=z.device)
        said = trainer.parts.prompts([text for _, text in pairs])
        error = (trainer.predict(x, s.to(z.device), *said, zeros) - target).square()
        sums += error.mean((1, 2, 3)).cpu().view(BANDS, -1).sum(1)
    width = 1.0 / BANDS
    return {
        f"loss {i * width:g}-{(i + 1) * width:g}": float(value) * BANDS / pictures
        for i, value in enumerate(sums)
    }


@torch.no_grad()
def draw(
    trainer: Trainer, prompts: list[str], seed: int = 0, steps: int = STEPS, zeros: int = ZEROS
) -> Tensor:
    """Latents [prompts, 12, 16, 16] of prompts, number i from seed + i; the stock pipeline's steps
    at guidance 3, by the network in training."""
    device, n = trainer.plan.device, len(prompts)
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    side, channels = trainer.network.config.sample_size, trainer.network.config.in_channels
    x = torch.cat(
        [
            torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed + i))
            for i in range(n)
        ]
    ).to(device)
    states, pooled = trainer.parts.prompts([""] * n + prompts)
    counts = torch.full((2 * n,), zeros, device=device)
    for t in scheduler.timesteps:
        s = (t / 1000.0).to(device).expand(2 * n)
        without, following = trainer.predict(torch.cat([x, x]), s, states, pooled, counts).chunk(2)
        x = scheduler.step(without + GUIDANCE * (following - without), t, x).prev_sample
    return x


@torch.no_grad()
def hits(trainer: Trainer, prompts: int = PROMPTS, batch: int = 24) -> dict[str, float]:
    """Strict success on held-out captions, for one or two objects and for three."""
    texts = held_out_prompts(prompts, HELD_OUT)
    made = []
    for i in range(0, prompts, batch):
        z = draw(trainer, texts[i : i + batch], HELD_OUT + i)
        made += [to_uint8(trainer.parts.vae.decode(part).sample) for part in z.split(8)]
    found = measure_prompts(texts, np.concatenate(made))
    return {"strict 1-2": found["strict, 1-2 objects"], "strict 3": found["strict, 3 objects"]}


def look(trainer: Trainer, prompts: int = PROMPTS, pictures: int = PICTURES) -> dict[str, float]:
    """All figures, of the averaged weights."""
    with trainer.averaged():
        return validation(trainer, pictures) | hits(trainer, prompts)
