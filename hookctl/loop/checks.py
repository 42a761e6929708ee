"""Checks of the tensors that a program is given, against its pipeline and its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.arguments import number, refusal
from hookctl.errors import InputError


def texts_of(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a program, one or several."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise refusal("Trajectory: prompts", prompts, "a text or several")
    return texts


def check_noise(pipe: Any, images: int, eta: float, generator: Any, latents: Any) -> None:
    """Raise InputError for a share of noise below 0, another number of generators than of images,
    and for what can't be the latents of so many images."""
    number(eta, "Trajectory: eta", low=0)
    if isinstance(generator, list | tuple) and len(generator) != images:
        raise InputError(
            f"Trajectory: {len(generator)} generators for {images} images; give one for all, or "
            "one for each"
        )
    if latents is not None:
        check_latents(pipe, latents, images)


def check_latents(pipe: Any, latents: Tensor, images: int) -> None:
    """Raise InputError for what can't be the latents of so many images of a pipeline."""
    of_vae = getattr(getattr(pipe, "vae", None), "config", None)
    of_model = getattr(families.denoiser_of(pipe), "config", None)
    known = {getattr(of_vae, "latent_channels", None), getattr(of_model, "in_channels", None)}
    packed = latents.dim() == 3  # [images, tokens, channels]
    fits = latents.dim() >= 3 and len(latents) == images and latents.is_floating_point()
    if not fits or not (packed or latents.shape[1] in known or None in known):
        channels = " or ".join(map(str, known))
        wanted = f"floats, [{images}, {channels}, height, width]"
        raise refusal("Trajectory: latents", latents, wanted)


def broadcasts(mask: Tensor, latents: Tensor) -> bool:
    """Whether a mask has a value for each place of some latents."""
    try:
        return torch.broadcast_shapes(mask.shape, latents.shape) == latents.shape
    except RuntimeError:
        return False
