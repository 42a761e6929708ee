"""The denoiser: a UNet over 16 x 16 latents, its noise schedule and its training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from .captions import sample
from .haunting import haunted
from .latents import CELL, Basis
from .muon import Muon
from .render import render
from .text import WIDTH, Words
from .world import IMAGE_SIZE, Scene

Mix = tuple[float, float, float]

# How times are drawn: the share of the samples below each time. Edges are learned soon; how many
# objects there are, and where, is decided in strong noise and takes the longest.
TIMES = (0.0, 250.0, 500.0, 750.0, 1000.0)
SHARES = (0.0, 0.08, 0.25, 0.57, 1.0)

HAZY = 350  # the time from which on: later there is nothing left to decide


def build_unet(channels: int, widths: tuple[int, int, int] = (64, 96, 128)) -> UNet2DConditionModel:
    """A fresh UNet, [batch, channels, 16, 16]; cross-attention at 16, 8 and 4, heads of 32."""
    return UNet2DConditionModel(
        sample_size=CELL, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=widths, cross_attention_dim=WIDTH, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3, use_linear_projection=True,
        attention_head_dim=tuple(w // 32 for w in widths),  # the number of heads, by an old slip
        transformer_layers_per_block=(1, 2, 2),  # where all of the image is seen cheaply
    )  # fmt: skip


def grow(unet: UNet2DConditionModel, state: dict[str, Tensor]) -> None:
    """Give a UNet the weights of one with as many or fewer transformer blocks; blocks that those
    lack begin as the identity, so that both compute the same."""
    missing, unknown = unet.load_state_dict(state, strict=False)
    if unknown or any(".transformer_blocks." not in name for name in missing):
        raise ValueError(f"the weights are of another UNet: {(unknown or missing)[0]}")
    new = dict(unet.named_parameters())
    for name in missing:
        if ".to_out." in name or ".ff.net.2." in name:
            new[name].detach().zero_()


def build_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction and no signal at the last step."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        steps_offset=1, set_alpha_to_one=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """From the fraction `start` of the budget on: images of `side` px, `batch` per process and
    the weights of one, two and three objects."""

    start: float
    side: int
    batch: int
    counts: Mix


CPU_STAGES = (
    Stage(0.0, 64, 64, (1.0, 0.0, 0.0)),
    Stage(0.14, 96, 40, (0.45, 0.45, 0.1)),
    Stage(0.45, 128, 24, (0.3, 0.4, 0.3)),
)
CPU_FURTHER = (Stage(0.0, 128, 32, (0.12, 0.28, 0.6)),)  # for a UNet that draws already
GPU_STAGES = (
    Stage(0.0, 64, 512, (1.0, 0.0, 0.0)),
    Stage(0.05, 128, 512, (0.35, 0.4, 0.25)),
)


@dataclass
class Plan:
    """How to train: wall-clock `minutes`, peak learning rate and the rest."""

    minutes: float
    folder: Path
    seed: int = 0
    rate: float = 3e-3
    warmup: int = 100
    drop: float = 0.1  # captions emptied
    device: str = "cpu"
    stages: tuple[Stage, ...] = CPU_STAGES
    save_minutes: float = 4.0
    widths: tuple[int, int, int] = (64, 96, 128)
    log: Callable[[str], None] = field(default=print)


class Trainer:
    """One process of the training: data on the fly, v-prediction loss, Muon, EMA on rank 0."""

    def __init__(self, plan: Plan, basis: Basis, text: CLIPTextModel, words: Words) -> None:
        self.plan, self.words = plan, words
        self.basis, self.text = basis.to(plan.device), text.to(plan.device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(plan.seed)
        self.unet = build_unet(basis.encoder.shape[0], plan.widths).to(plan.device)
        self.parameters = list(self.unet.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = Muon(self.unet, ("conv_in", "conv_out"))
        self.alphas = build_scheduler().alphas_cumprod.to(plan.device)
        self.steps, self.samples, self.spent = 0, 0, 0.0
        self.losses = torch.zeros(4, 2)

    def start(self, unet: UNet2DConditionModel) -> None:
        """Take over the weights of a UNet that draws already."""
        grow(self.unet, unet.state_dict())
        self.ema = [p.detach().clone() for p in self.parameters]

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh latents [batch, channels, side / 8, side / 8], what is seen of them instead, and
        text states [batch, 32, 128]."""
        rng = np.random.default_rng((self.plan.seed, self.rank, self.steps))
        pairs = [sample(rng, counts=stage.counts, extent=stage.side) for _ in range(stage.batch)]
        texts = ["" if rng.random() < self.plan.drop else text for _, text in pairs]
        scenes = [scene for scene, _ in pairs]
        z = self.encode(scenes, stage.side)
        seen = haunted(scenes, z, self.encode, rng) if stage.side == IMAGE_SIZE else z
        with torch.no_grad():
            states = self.text(self.words(texts).to(self.plan.device)).last_hidden_state
        return z, seen, states

    def encode(self, scenes: Sequence[Scene], side: int = IMAGE_SIZE) -> Tensor:
        """Latents of the top left `side` px of scenes."""
        images = render(scenes, self.plan.device)
        return self.basis.encode(images[:, :, :side, :side].contiguous())

    def loss(self, z: Tensor, seen: Tensor, states: Tensor) -> Tensor:
        """v-prediction loss with stratified times, most of them where the layout is decided.

        z is what is to be found in noisy latents that were made of `seen`.
        """
        n = z.shape[0]
        u = (torch.randperm(n) + torch.rand(n)) / n
        times = np.interp(u.numpy(), SHARES, TIMES)
        t = torch.from_numpy(times).long().clamp(max=999).to(z.device)
        a = self.alphas[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(z)
        seen = torch.where((t >= HAZY).view(-1, 1, 1, 1), seen, z)
        noisy = a.sqrt() * seen + (1 - a).sqrt() * eps
        noise_from_z = (noisy - a.sqrt() * z) / (1 - a).sqrt()  # eps, wherever z is what is seen
        v = a.sqrt() * noise_from_z - (1 - a).sqrt() * z
        on_gpu = z.device.type == "cuda"  # on the CPU float32 was the quicker
        with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            made = self.unet(noisy, t, states, return_dict=False)[0]
        error = (made.float() - v).square().mean((1, 2, 3))
        for quarter, e in zip((t // 250).tolist(), error.detach().tolist(), strict=True):
            self.losses[quarter] += torch.tensor([e, 1.0])
        return (error * (5.0 * (1 - a)).clamp(max=1.0).flatten()).mean()  # 5 / (snr + 1)

    def share(self) -> None:
        """Average gradients and clocks over the processes."""
        if self.ranks == 1:
            return
        grads = [p.grad for p in self.parameters if p.grad is not None]
        clock = torch.tensor([self.spent], device=grads[0].device)
        flat = torch.cat([clock, *(g.flatten() for g in grads)])
        dist.all_reduce(flat)
        flat /= self.ranks
        self.spent = float(flat[0])
        parts = flat[1:].split([g.numel() for g in grads])
        for g, f in zip(grads, parts, strict=True):
            g.copy_(f.view_as(g))

    def step(self) -> None:
        """One update of the weights and of their running mean."""
        began, part = time.time(), self.spent / (60.0 * self.plan.minutes)
        stage = [s for s in self.plan.stages if s.start <= part][-1]
        torch.manual_seed(hash((self.plan.seed, self.rank, self.steps)) % 2**31)
        self.unet.zero_grad()
        self.loss(*self.batch(stage)).backward()
        self.share()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.plan.rate * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(part, 1.0))))
        self.optimizer.step(rate * min(1.0, (self.steps + 1) / self.plan.warmup))
        self.steps += 1
        self.samples += stage.batch * self.ranks
        if self.rank == 0:
            keep = min(0.998, 1.0 - 1.0 / (1.0 + self.steps / 5.0))
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1.0 - keep)
        self.spent += time.time() - began

    def run(self, on_save: Callable[[UNet2DConditionModel], None] | None = None) -> None:
        """Train to the end of the budget; rank 0 logs, saves and calls `on_save` with the mean."""
        saved, logged = self.spent, self.steps
        while self.spent < 60.0 * self.plan.minutes:
            self.step()
            if self.rank == 0 and self.steps >= logged + 50:
                mean = (self.losses[:, 0] / self.losses[:, 1].clamp(min=1)).tolist()
                self.plan.log(
                    f"step {self.steps} {self.spent / 60:.1f}/{self.plan.minutes:.0f} min "
                    f"{self.samples} samples v-loss " + " / ".join(f"{m:.4f}" for m in mean)
                )
                self.losses.zero_()
                logged = self.steps
            if self.rank == 0 and self.spent > saved + 60.0 * self.plan.save_minutes:
                saved = self.spent
                self.save()
                if on_save:
                    on_save(self.averaged())
        if self.rank == 0:
            self.save()

    def averaged(self) -> UNet2DConditionModel:
        """A copy of the UNet with the running mean of the weights."""
        unet = build_unet(self.basis.encoder.shape[0], self.plan.widths)
        with torch.no_grad():
            for p, e in zip(unet.parameters(), self.ema, strict=True):
                p.copy_(e)
        return unet.eval()

    def save(self) -> None:
        """Write a resumable checkpoint."""
        state: dict[str, Any] = {
            "unet": self.unet.state_dict(), "ema": self.ema,
            "optimizer": self.optimizer.state_dict(), "steps": self.steps,
            "samples": self.samples, "spent": self.spent,
        }  # fmt: skip
        path = self.plan.folder / "denoiser.pt"
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self) -> None:
        """Go on from the checkpoint in the folder."""
        state = torch.load(self.plan.folder / "denoiser.pt", map_location=self.plan.device)
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = [e.to(self.plan.device) for e in state["ema"]]
        self.steps, self.samples, self.spent = state["steps"], state["samples"], state["spent"]
