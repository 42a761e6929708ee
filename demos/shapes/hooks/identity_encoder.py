"""The encoder of looks: a picture's object as an embedding, as a face network's is of a face.

It learns on rendered pictures by themselves. Two pictures of one look (other shape, size, place
and background) are to be nearer to one another than to those of other looks, and a linear reading
of the embedding is to be the look.

    python -m hookctl.demos.shapes.hooks.identity_encoder picture.png embedding.npy
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..detect import to_pixels
from ..world import Scene, sample_scene
from .looks import DEEPEST, Look, render_looks, sample_look
from .task import HELD_OUT, Base

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "hooks"
FILE = WEIGHTS / "identity_encoder.safetensors"
CHANNELS = 512  # of an embedding, as a face's
LENGTH = 20.0  # of an embedding, about that of a face as its network gives it
WIDTHS = (24, 48, 96, 128)
BATCH, TEMPERATURE = 32, 0.1
BLURRED = 0.5  # share of pictures that are seen as the latents have them


class Encoder(nn.Module):
    """Pictures [rows, 3, 128, 128] from -1 to 1 -> embeddings [rows, 512] of length 20."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.attend = nn.Conv2d(WIDTHS[-1], 1, 1)
        self.project = nn.Linear(WIDTHS[-1], CHANNELS)
        self.read = nn.Linear(CHANNELS, 3)  # cosine and sine of the hue, depth

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.layers(F.avg_pool2d(pictures, 2))
        where = self.attend(x).flatten(2).softmax(-1)
        pooled = (x.flatten(2) * where).sum(-1)
        return LENGTH * F.normalize(self.project(pooled), dim=-1)


def load_encoder(path: Path = FILE, device: str = "cpu") -> Encoder:
    """The trained encoder, frozen."""
    encoder = Encoder()
    encoder.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return encoder.eval().requires_grad_(False).to(device)


def embedding_of(image: Image.Image, encoder: Encoder | None = None) -> Tensor:
    """The embedding [512] of the object in a picture of 128 x 128 px."""
    encoder = encoder or load_encoder()
    pixels = torch.from_numpy(to_pixels(image) / 127.5 - 1).float()
    with torch.no_grad():
        found: Tensor = encoder(pixels.permute(2, 0, 1)[None])[0]
    return found


def references(
    looks: Sequence[Look], rng: np.random.Generator
) -> tuple[list[Scene], list[list[Look]]]:
    """Scenes of one object each, and its look, for `render_looks`."""
    return [sample_scene(rng, 1) for _ in looks], [[look] for look in looks]


class IdentityEncoderTask:
    """Learns what makes two pictures show the same look."""

    others: tuple[str, ...] = ("layers.0", "attend", "read")
    rate, stages = 2e-3, ()

    def __init__(self, base: Base) -> None:
        self.base = base
        self.module = Encoder().to(base.device)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        looks = [sample_look(rng) for _ in range(BATCH)]
        first, second = (self.module(self._pictures(looks, rng)) for _ in range(2))
        return self._apart(first, second) + 10 * self._reading(
            torch.cat([first, second]), looks * 2
        )

    def _pictures(self, looks: Sequence[Look], rng: np.random.Generator) -> Tensor:
        pictures = render_looks(*references(looks, rng)).to(self.base.device)
        basis = self.base.basis
        seen = basis.decode(basis.encode(pictures)).clamp(-1, 1)
        blurred = torch.from_numpy(rng.random(len(looks)) < BLURRED).to(self.base.device)
        return torch.where(blurred[:, None, None, None], seen, pictures)

    def _apart(self, first: Tensor, second: Tensor) -> Tensor:
        """Each picture is to find the other of its look among all."""
        near = (first @ second.T) / LENGTH**2 / TEMPERATURE
        own = torch.arange(len(near), device=near.device)
        return (F.cross_entropy(near, own) + F.cross_entropy(near.T, own)) / 2

    def _reading(self, embeddings: Tensor, looks: Sequence[Look]) -> Tensor:
        angles = [math.radians(look.hue) for look in looks]
        true = [
            [math.cos(a), math.sin(a), look.depth / DEEPEST]
            for a, look in zip(angles, looks, strict=True)
        ]
        return F.mse_loss(self.module.read(embeddings), torch.tensor(true).to(embeddings))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Of held-out looks: mean cosine of two pictures of one look and of two looks; mean error
        of the linear reading, hue in degrees and depth."""
        rng = np.random.default_rng(HELD_OUT)
        looks = [sample_look(rng) for _ in range(64)]
        first, second = (self.module(self._pictures(looks, rng)) for _ in range(2))
        near: Any = (first @ second.T) / LENGTH**2
        read = self.module.read(first)
        hues = torch.atan2(read[:, 1], read[:, 0]).rad2deg()
        true = torch.tensor([look.hue for look in looks]).to(hues)
        apart = ((hues - true + 180) % 360 - 180).abs()
        depths = torch.tensor([look.depth for look in looks]).to(hues)
        others = near[~torch.eye(len(looks), dtype=torch.bool)]
        return {
            "same": round(float(near.diagonal().mean()), 3),
            "other": round(float(others.mean()), 3),
            "hue": round(float(apart.mean()), 2),
            "depth": round(float((read[:, 2] * DEEPEST - depths).abs().mean()), 3),
        }

    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the embedding of a picture's object to a file, for presets and other programs."""
    name = "python -m hookctl.demos.shapes.hooks.identity_encoder"
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("picture", type=Path, help="of 128 x 128 px")
    parser.add_argument("embedding", type=Path, help="file to be written (.npy)")
    options = parser.parse_args(arguments)
    with Image.open(options.picture) as picture:
        np.save(options.embedding, embedding_of(picture).numpy())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
