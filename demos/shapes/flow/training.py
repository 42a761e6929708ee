"""The training of the velocity network: data on the fly, rectified-flow loss, Muon, averages.

x = (1 - s) z + s noise, and the network predicts noise - z at the timestep 1000 s (Liu et al.,
2022; SD3, Esser et al., 2024). Everything random is drawn anew from the seed and the step, so a
training that was killed goes on as if it had not been.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTokenizer

from ..captions import sample
from ..haunting import haunted
from ..latents import Basis, fit_basis
from ..load import load_shapes
from ..muon import Muon
from ..render import render
from ..text import Words
from ..world import Scene
from .network import CountedZeros, Size, build_network, by_adam
from .text import Prompts, with_projection

Mix = tuple[float, float, float]  # weights of one, two and three objects

# From these shares of the run on: shapes first, counts and places later.
COUNTS: tuple[tuple[float, Mix], ...] = (
    (0.0, (1.0, 0.0, 0.0)),
    (0.03, (0.35, 0.4, 0.25)),
    (0.5, (0.25, 0.4, 0.35)),
)
HAUNTED = 0.35  # the share of the run from which on some samples are haunted (see `haunting`)
HAZY = 0.5  # the level of noise below which there is nothing left to decide
NEAR = 0.3  # the share of ghosts one place beside the object: it may be torn between the two
LEVEL, UNIFORM = 1.1, 0.15  # levels are sigmoid(1.1 + normal), and some of them uniform
ZEROS = (0, 77, 256, 256)  # how many zero tokens the pipeline may append for want of a T5
BANDS = 4  # of the level of noise, in which losses are told


@dataclass
class Parts:
    """What the sibling shares with the embedded pipeline."""

    tokenizer: CLIPTokenizer
    prompts: Prompts
    vae: AutoencoderKL
    basis: Basis

    @classmethod
    def embedded(cls, device: str = "cpu") -> Parts:
        """Those of the embedded pipeline; SD3 adds the autoencoder's shift, so it has one: 0."""
        pipe = load_shapes(device)
        pipe.vae.register_to_config(shift_factor=0.0)
        encoder = with_projection(pipe.text_encoder).to(device)
        prompts = Prompts(encoder, Words(pipe.tokenizer))
        return cls(pipe.tokenizer, prompts, pipe.vae, fit_basis(0).to(device))

    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Latents of scenes, [scenes, 12, 16, 16]."""
        return self.basis.encode(render(scenes, self.basis.mean.device))


@dataclass
class Plan:
    """How to train: `minutes` of the `clock`, peak learning rate and the rest."""

    minutes: float
    folder: Path
    seed: int = 0
    batch: int = 64
    rate: float = 3e-3
    warmup: int = 100
    drop: float = 0.1  # captions emptied
    keep: float = 0.998  # of the averaged weights, each step
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16  # of the network; its master weights are float32
    size: Size = Size()
    save_minutes: float = 2.0
    look_minutes: float = 20.0
    log: Callable[[str], None] = field(default=print)
    clock: Callable[[], float] = field(default=time.perf_counter)


class Trainer:
    """The network, its float32 master weights, their running mean, and the clock."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan, self.parts = plan, parts
        torch.manual_seed(plan.seed)
        self.master = build_network(plan.size).to(plan.device)
        self.network = copy.deepcopy(self.master)
        torch.nn.Module.to(self.network, plan.dtype)  # diffusers' own `to` warns without need
        self.attention = CountedZeros()
        self.network.set_attn_processor(self.attention)
        self.weights = list(self.network.parameters())
        self.parameters = list(self.master.parameters())
        self.mean = [p.detach().clone() for p in self.parameters]
        self.optimizer = Muon(self.master, by_adam(self.master), half=plan.dtype != torch.float32)
        self.steps, self.pictures, self.spent = 0, 0, 0.0
        self.losses = torch.zeros(BANDS, 2)
        self.looks: list[dict[str, float]] = []

    @property
    def part(self) -> float:
        """The share of the planned time that is over."""
        return self.spent / (60.0 * self.plan.minutes)

    def predict(
        self, x: Tensor, s: Tensor, states: Tensor, pooled: Tensor, zeros: Tensor
    ) -> Tensor:
        """The velocity [batch, 12, 16, 16], float32, at levels `s` [batch], with as many zero
        tokens as `zeros` [batch] says."""
        self.attention.log_counts = zeros.log()
        kind = self.plan.dtype
        made: Tensor = self.network(
            x.to(kind), states.to(kind), pooled.to(kind), 1000.0 * s, return_dict=False
        )[0]
        return made.float()

    def loss(self) -> Tensor:
        """Of a fresh batch."""
        plan, n = self.plan, self.plan.batch
        rng = np.random.default_rng((plan.seed, self.steps))
        random = torch.Generator().manual_seed(int(rng.integers(2**62)))
        counts = [mix for start, mix in COUNTS if start <= self.part][-1]
        pairs = [sample(rng, counts=counts) for _ in range(n)]
        scenes = [scene for scene, _ in pairs]
        texts = ["" if rng.random() < plan.drop else text for _, text in pairs]
        z = self.parts.encode(scenes)
        seen = z
        if self.part >= HAUNTED:
            seen = haunted(scenes, z, self.parts.encode, rng, near=NEAR)
        s, zeros = levels(n, random), torch.tensor(ZEROS)[torch.randint(4, (n,), generator=random)]
        noise = torch.randn(z.shape, generator=random)
        s, zeros, noise = (t.to(plan.device) for t in (s, zeros, noise))
        x, target = noised(z, seen, noise, s)
        made = self.predict(x, s, *self.parts.prompts(texts), zeros)
        error = (made - target).square().mean((1, 2, 3))
        band = (s * BANDS).long().clamp(max=BANDS - 1).cpu()
        told = torch.stack([error.detach().cpu(), torch.ones(n)], 1)
        self.losses.index_add_(0, band, told)
        return error.mean()

    def step(self) -> None:
        """One update of the master weights, their running mean and the network."""
        plan = self.plan
        loss = self.loss()
        self.network.zero_grad()
        loss.backward()
        for p, w in zip(self.parameters, self.weights, strict=True):
            p.grad = None if w.grad is None else w.grad.float()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = plan.rate * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(self.part, 1.0))))
        self.optimizer.step(rate * min(1.0, (self.steps + 1) / plan.warmup))
        self._show(self.parameters)
        self.steps += 1
        self.pictures += plan.batch
        keep = min(plan.keep, 1.0 - 1.0 / (1.0 + self.steps / 5.0))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1.0 - keep)

    @torch.no_grad()
    def _show(self, values: Sequence[Tensor]) -> None:
        for w, value in zip(self.weights, values, strict=True):
            w.copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the running mean of the weights meanwhile."""
        self._show(self.mean)
        try:
            yield
        finally:
            self._show(self.parameters)

    def trained(self) -> SD3Transformer2DModel:
        """A float32 copy with the running mean of the weights, as a stock pipeline runs it."""
        made = build_network(self.plan.size)
        with torch.no_grad():
            for p, mean in zip(made.parameters(), self.mean, strict=True):
                p.copy_(mean)
        return made.eval()

    def run(self, look: Callable[[Trainer], dict[str, float]] | None = None) -> None:
        """Train to the end of the planned time, saving; `look` gives figures now and then."""
        plan = self.plan
        saved, told, pictures, looked = self.spent, self.spent, self.pictures, self._looked()
        before, began = self.spent, plan.clock()
        while self.part < 1.0:
            self.step()
            self.spent = before + plan.clock() - began
            if self.steps % 50 == 0:
                pace = (self.pictures - pictures) / max(self.spent - told, 1e-9)
                self._tell(pace)
                told, pictures = self.spent, self.pictures
            if self.spent >= looked + 60.0 * plan.look_minutes or self.part >= 1.0:
                self._look(look)
                self.spent = before + plan.clock() - began
                looked = told = self.spent
                pictures = self.pictures
            if self.spent >= saved + 60.0 * plan.save_minutes or self.part >= 1.0:
                self.save()
                saved = self.spent

    def _looked(self) -> float:
        return 60.0 * self.looks[-1]["minutes"] if self.looks else 0.0

    def _look(self, look: Callable[[Trainer], dict[str, float]] | None) -> None:
        if look is None:
            return
        here = {"minutes": self.spent / 60.0, "step": self.steps, "pictures": self.pictures}
        self.looks.append(here | look(self))
        self.plan.log(" ".join(f"{name} {value:.4g}" for name, value in self.looks[-1].items()))

    def _tell(self, pace: float) -> None:
        mean = (self.losses[:, 0] / self.losses[:, 1].clamp(min=1)).tolist()
        self.plan.log(
            f"step {self.steps} {self.spent / 60:.1f}/{self.plan.minutes:g} min {self.pictures} "
            f"pictures {pace:.0f}/s loss " + " / ".join(f"{m:.4f}" for m in mean)
        )
        self.losses.zero_()

    def save(self) -> None:
        """Write a state to go on from; a kill in between leaves the one before."""
        state: dict[str, Any] = {
            "master": self.master.state_dict(), "mean": self.mean,
            "optimizer": self.optimizer.state_dict(), "steps": self.steps,
            "pictures": self.pictures, "spent": self.spent, "looks": self.looks,
        }  # fmt: skip
        path = self.plan.folder / STATE
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        told = self.plan.folder / "measurements.json"
        told.with_suffix(".part").write_text(json.dumps(self.looks, indent=2) + "\n", "utf-8")
        told.with_suffix(".part").replace(told)

    def resume(self) -> None:
        """Go on from the state in the folder."""
        state = torch.load(
            self.plan.folder / STATE, map_location=self.plan.device, weights_only=True
        )
        self.master.load_state_dict(state["master"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.looks = state["mean"], state["looks"]
        self.steps, self.pictures, self.spent = (state[k] for k in ("steps", "pictures", "spent"))
        self._show(self.parameters)


STATE = "flow.pt"


def levels(count: int, random: torch.Generator) -> Tensor:
    """Levels of noise [count] in 0 to 1, stratified, most of them where the layout is decided."""
    u = (torch.randperm(count, generator=random) + torch.rand(count, generator=random)) / count
    u = u.clamp(1e-6, 1 - 1e-6)
    even = torch.rand(count, generator=random) < UNIFORM
    return torch.where(even, u, torch.sigmoid(LEVEL + torch.special.ndtri(u)))


def noised(z: Tensor, seen: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees at levels `s` [batch], and the velocity that leads from there to z.

    Above HAZY it is made of `seen` instead of z: (x - z) / s is noise - z where the two are equal.
    """
    s = s.view(-1, 1, 1, 1)
    seen = torch.where(s > HAZY, seen, z)
    return (1 - s) * seen + s * noise, noise - z + (1 - s) / s * (seen - z)
