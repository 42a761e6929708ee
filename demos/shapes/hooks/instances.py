"""UniFusion grounding with ScaleU over the embedded pipeline (InstanceDiffusion, 2402.03290).

A curriculum of ever more scenes, gates that begin open, and times where the layout is decided make
it learn in thousands of steps what the papers' recipes take hundreds of thousands for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hookctl
from hookctl import Editor, InsertCall
from hookctl.address.families import plain_blocks
from hookctl.hooks.skips import concats
from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.modules.unifusion import (
    BOX,
    FORMATS,
    POINT,
    Instances,
    UniFusion,
)
from hookctl.recipes import ScaleU

from ..latents import CELL
from ..world import Scene
from .task import EARLY, HELD_OUT, Base, Batch, ldm_name
from .ways import OUTLINE_POINTS, SCRIBBLE_POINTS, SLOTS, Way, draw_way, in_slots, mirrored

OPEN = 0.5  # where the gates begin
BATCH = 16
# From which step on how many scenes there are; None: fresh ones.
POOLS: tuple[tuple[int, int | None], ...] = ((0, 32), (300, 128), (800, 1024), (1600, None))
NO_CAPTION, NO_INSTANCES = 0.6, 0.1
# Modules that say where learn nothing once it is decided.
AT_EARLY = 0.85
# Weight of what makes places look at the tokens of their instance. Without it the match of places
# and tokens is what takes longest to be found.
ATTENDED = 0.3


class Modules(nn.Module):
    """Tokenizer, fusers and ScaleU for a UNet; paths: of the fusers' self-attention."""

    def __init__(self, unet: nn.Module, text: int) -> None:
        super().__init__()
        self.position_net = UniFusion(
            ConvNeXt((1, 1, 1), (24, 48, 64)), text=text, hidden=192, out=text, slots=SLOTS,
            frequencies=8, scribble_points=SCRIBBLE_POINTS, mask_points=OUTLINE_POINTS,
            raster_tokens=16, features=64,
        )  # fmt: skip
        blocks = plain_blocks(unet)
        places = {module: path for path, module in unet.named_modules()}
        self.paths = [places[attention] for attention in blocks]
        made = [_fuser(attention, text) for attention in blocks]
        self.fusers = nn.ModuleList(made)
        found = list(concats(unet))
        self.scaleu_b = nn.ParameterList(torch.zeros(one.backbone_channels) for one in found)
        self.scaleu_s = nn.ParameterList(torch.zeros(1) for _ in found)
        for fuser in made:
            nn.init.constant_(fuser.alpha_attn, OPEN)
            nn.init.constant_(fuser.alpha_dense, OPEN)
        for name, parameter in self.position_net.named_parameters():
            if name.startswith(("null", "pos_embedding")):
                nn.init.normal_(parameter, std=0.02)
            if name.endswith("gamma"):
                nn.init.constant_(parameter, 0.1)


def _fuser(attention: Any, text: int) -> GatedSelfAttention:
    return GatedSelfAttention(attention.to_q.in_features, text, attention.heads)


class Fusing(Editor):
    """Puts the fusers in while they learn, and looks whether places look at their own instance.

    tokens: [rows, M, text]; inside: the slot whose box holds each cell of the latents, [rows, 16,
    16], -1 for none; own: which tokens are of a slot, [slots, M]. missed: of each fuser, how little
    the cells in boxes attend to the tokens of their instance (-log of the share), while asked.
    """

    def __init__(self, modules: Modules) -> None:
        self.fusers = dict(zip(modules.paths, modules.fusers, strict=True))
        self.tokens = torch.empty(0)
        self.inside: Tensor | None = None
        self.own = torch.empty(0)
        self.missed: list[Tensor] = []

    def insert(self, call: InsertCall) -> None:
        fuser: Any = self.fusers[call.site.path]
        x = call.hidden
        if self.inside is not None and call.grid is not None:
            self.missed.append(self._missed(fuser, x, call.grid.width))
        call.hidden = fuser(x, self.tokens)

    def _missed(self, fuser: GatedSelfAttention, x: Tensor, width: int) -> Tensor:
        assert self.inside is not None
        step = self.inside.shape[-1] // width
        slots = self.inside[:, step // 2 :: step, step // 2 :: step].flatten(1)  # [rows, N]
        u = fuser.norm1(torch.cat([x, fuser.linear(self.tokens)], 1))
        q, k = fuser.attn.to_q(u[:, : x.shape[1]]), fuser.attn.to_k(u[:, x.shape[1] :])
        q, k = (y.unflatten(-1, (fuser.attn.heads, -1)).transpose(1, 2) for y in (q, k))
        shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        own = self.own[slots.clamp(min=0)] * (slots >= 0)[..., None]
        seen = (shares * own).sum(-1)
        return -seen[slots >= 0].clamp(min=1e-6).log().mean()


class InstancesTask:
    """Learns to draw instances where they are said to be."""

    others = ("position_net", "scaleu")
    rate, stages = 2e-3, ()

    def __init__(self, base: Base) -> None:
        self.base = base
        text = base.pipe.text_encoder.config.hidden_size
        self.module = Modules(base.unet, text).to(base.device)
        self.fusing = Fusing(self.module)
        self.scale = ScaleU(list(self.module.scaleu_b), list(self.module.scaleu_s))

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        pool = next(pool for since, pool in reversed(POOLS) if step >= since)
        pairs = self.base.scenes(rng, BATCH, pool)
        texts = [self._silent(text, scene, rng) for scene, text in pairs]
        batch = self.base.batch(pairs, texts)
        way = draw_way(rng)
        given = self.given(batch.scenes, rng, way, keep=1 - NO_INSTANCES)
        t = self.base.times(rng, BATCH, AT_EARLY)
        noise = torch.from_numpy(rng.standard_normal(batch.latents.shape, np.float32))
        self.fusing.inside, self.fusing.own = self._inside(given), self._own(way.formats)
        self.fusing.missed = []
        error = self._error(batch, t, noise.to(batch.latents), given, way.formats).mean()
        self.fusing.inside = None
        return error + ATTENDED * torch.stack(self.fusing.missed).mean()

    def _inside(self, given: Instances) -> Tensor:
        """The slot whose box holds each cell of the latents, [rows, 16, 16]; -1 for none."""
        at = (torch.arange(CELL, device=given.boxes.device) + 0.5) / CELL
        x0, y0, x1, y1 = (side[..., None] for side in given.boxes.unbind(-1))
        across, down = (at >= x0) & (at < x1), (at >= y0) & (at < y1)
        held = down[..., :, None] & across[..., None, :]  # [rows, slots, 16, 16]
        return torch.where(held.any(1), held.int().argmax(1), -1)

    def _own(self, formats: Collection[str]) -> Tensor:
        """Which tokens are of each slot, of the formats that are shown, [slots, M]."""
        net = self.module.position_net
        own = torch.zeros(SLOTS, len(FORMATS) * SLOTS + net.raster_tokens)
        for i, name in enumerate(FORMATS):
            if name in formats:
                own[:, i * SLOTS : (i + 1) * SLOTS] = torch.eye(SLOTS)
        return own.to(self.base.device)

    def _error(
        self, batch: Batch, t: Tensor, noise: Tensor, given: Instances, formats: Collection[str]
    ) -> Tensor:
        self.fusing.tokens = self.module.position_net(given, formats)
        with hookctl.control(self.base.unet, self.fusing, self.scale, rows=("cond",)):
            return self.base.error(batch.latents, t, noise, batch.states)

    def _silent(self, text: str, scene: Scene, rng: np.random.Generator) -> str:
        """Many captions leave the instances to the grounding: empty, or the background."""
        if rng.random() >= NO_CAPTION:
            return text
        return "" if rng.random() < 0.5 else f"a {scene.background} background"

    def given(
        self, scenes: Sequence[Scene], rng: np.random.Generator, way: Way, keep: float = 1.0
    ) -> Instances:
        """The instances of scenes; rows without any by chance, 1 - keep."""
        width = int(self.base.pipe.text_encoder.config.hidden_size)
        kept = [scene.things if rng.random() < keep else () for scene in scenes]
        return in_slots(kept, rng, way, self.base.pooled, width, self.base.device)

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """The loss x 1000 of 32 held-out scenes with their captions at strong noise: with true
        boxes and points, without any, and with mirrored ones; where these part, places are heeded.
        unseen: how little cells in boxes attend to the tokens of their instance (-log of the
        share).
        """
        rng = np.random.default_rng(HELD_OUT)
        pairs = self.base.scenes(rng, 32, None)
        batch = self.base.batch(pairs, [text for _, text in pairs])
        t = torch.linspace(EARLY, 999, 32).long().to(self.base.device)
        noise = torch.from_numpy(rng.standard_normal(batch.latents.shape, np.float32))
        way = Way((BOX, POINT))
        true = self.given(batch.scenes, rng, way)
        none = self.given(batch.scenes, rng, way, keep=0.0)
        found, formats = {}, way.formats
        self.fusing.inside, self.fusing.own = self._inside(true), self._own(formats)
        self.fusing.missed = []
        for name, given in {"true": true, "null": none, "mirrored": mirrored(true)}.items():
            error = self._error(batch, t, noise.to(batch.latents), given, formats)
            found[name] = round(1000 * float(error.mean()), 2)
            self.fusing.inside = None
        return {**found, "unseen": round(float(torch.stack(self.fusing.missed).mean()), 3)}

    def state(self) -> dict[str, Tensor]:
        """The weights by the names of the official checkpoint."""
        module, layers = self.module, int(self.base.unet.config.layers_per_block)
        found = {f"position_net.{k}": v for k, v in module.position_net.state_dict().items()}
        for path, fuser in zip(module.paths, module.fusers, strict=True):
            block = ldm_name(path.removesuffix(".attn1"), layers)
            found |= {f"{block}.fuser.{k}": v for k, v in fuser.state_dict().items()}
        for i, (b, s) in enumerate(zip(module.scaleu_b, module.scaleu_s, strict=True)):
            found |= {f"scaleu_b_{i}": b.detach(), f"scaleu_s_{i}": s.detach()}
        return found
