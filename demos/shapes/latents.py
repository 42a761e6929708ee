"""Latents: whitened principal components of 8 x 8 px patches, and an AutoencoderKL fitted to them.

The basis makes a linear encoder and decoder from the first second on, so the denoiser never waits
for the autoencoder; the autoencoder learns the same latents as an ordinary `AutoencoderKL`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .muon import Muon
from .render import render
from .world import IMAGE_SIZE, LATTICE, sample_scene

CHANNELS = 12
WHITENING = 0.8  # power of the standard deviation that is divided out
CELL = IMAGE_SIZE // LATTICE  # 16 cells a side


@dataclass
class Basis:
    """Of 8 x 8 x 3 patches: `mean` [192], `encoder` [channels, 192], `decoder` [192, channels]."""

    mean: Tensor
    encoder: Tensor
    decoder: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Images [batch, 3, h, w] in -1 to 1 -> latents [batch, channels, h / 8, w / 8]."""
        patches = F.pixel_unshuffle(images, LATTICE)
        return torch.einsum("bphw,cp->bchw", patches - self.mean[:, None, None], self.encoder)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear inverse of `encode`."""
        patches = torch.einsum("bchw,pc->bphw", latents, self.decoder)
        return F.pixel_shuffle(patches + self.mean[:, None, None], LATTICE)

    def to(self, device: torch.device | str) -> Basis:
        """A copy on a device."""
        return Basis(self.mean.to(device), self.encoder.to(device), self.decoder.to(device))


def fit_basis(seed: int, channels: int = CHANNELS, power: float = WHITENING) -> Basis:
    """Principal components of 1024 scenes, a tenth of them off the lattice; latents have mean 0
    and variance 1 over all channels."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, lattice=1 if i % 10 == 0 else LATTICE, gap=4) for i in range(1024)]
    patches = F.pixel_unshuffle(render(scenes), LATTICE).permute(0, 2, 3, 1).reshape(-1, 192)
    mean = patches.mean(0)
    covariance = torch.cov(patches.T.double())
    variance, vectors = torch.linalg.eigh(covariance)
    variance = variance.flip(0)[:channels].float()
    vectors = vectors.flip(1)[:, :channels].float()
    scale = variance.sqrt() ** power
    scale = scale * (variance / scale**2).mean().sqrt()
    return Basis(mean, vectors.T / scale[:, None], vectors * scale)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1 to 1."""
    return float(10.0 * torch.log10(4.0 / F.mse_loss(a.clamp(-1, 1), b)))


def build_vae(channels: int = CHANNELS) -> AutoencoderKL:
    """A small f8 autoencoder, [batch, 3, 128, 128] <-> [batch, channels, 16, 16]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64), layers_per_block=1, latent_channels=channels,
        norm_num_groups=8, sample_size=IMAGE_SIZE, scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
    )  # fmt: skip


def _image_loss(made: Tensor, true: Tensor) -> Tensor:
    slopes = sum(F.l1_loss(made.diff(dim=d), true.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(made, true) + 2.0 * F.mse_loss(made, true) + 0.4 * slopes


def train_vae(
    basis: Basis,
    seed: int,
    minutes: float,
    log: Callable[[str], None],
    device: torch.device | str = "cpu",
    crops: Sequence[tuple[float, int, int]] = ((0.0, 64, 12), (0.7, 128, 4)),
    start: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Fit encoder and decoder to the basis within a wall-clock budget.

    Receives: `crops`, (fraction of the budget from which on, side in px, batch), and the
    autoencoder to `start` from (None: a fresh one). Returns: the autoencoder, frozen.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1 + (start is not None))
    vae = (start or build_vae(basis.encoder.shape[0])).to(device).train().requires_grad_(True)
    basis = basis.to(device)
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    optimizer = Muon(vae, ends)
    began, step, part = time.time(), 0, 0.0
    while part < 1.0:
        part = (time.time() - began) / (60.0 * minutes)
        _, side, batch = [c for c in crops if c[0] <= part][-1]
        count = 1 if side < IMAGE_SIZE else None
        lattice = 1 if rng.random() < 0.1 else LATTICE
        scenes = [sample_scene(rng, count, lattice, extent=side, gap=4) for _ in range(batch)]
        true = render(scenes, device)[:, :, :side, :side]
        z = basis.encode(true)
        noisy = z + 0.06 * torch.randn_like(z) * torch.rand(batch, 1, 1, 1, device=device) * 2
        moments = vae.encoder(true)
        mean, logvar = moments.chunk(2, dim=1)
        loss = _image_loss(vae.decoder(noisy), true)
        loss = loss + F.mse_loss(mean, z) + 1e-3 * F.mse_loss(logvar, torch.full_like(logvar, -12))
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        fall = 0.5 + 0.5 * math.cos(math.pi * min(part, 1.0))
        optimizer.step(2e-3 * min(1.0, (step + 1) / 50) * max(fall, 0.01))
        step += 1
        if step % 50 == 0:
            with torch.no_grad():
                quality, error = psnr(vae.decoder(z), true), F.mse_loss(mean, z).item()
            log(f"vae {step} {part:.0%} loss {loss:.4f} {quality:.1f} dB, z error {error:.3f}")
    return vae.eval().requires_grad_(False)
