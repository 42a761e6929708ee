"""Classifier-free guidance of a program's own: its scales, and how predictions are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.errors import InputError

Guidance = float | Sequence[float] | Tensor
Scales = float | Tensor


def guidance_scales(guidance: Guidance, latents: Tensor, branches: Sequence[str]) -> Scales:
    """One scale for all images, or one for each in the shape of the latents, [images, 1, ...].

    branches: those that a run has. Raises InputError for another number of scales than of images,
    and for guidance of a run without unconditional rows.
    """
    if isinstance(guidance, int | float):
        scale: Scales = float(guidance)
    else:
        many = torch.as_tensor(guidance, dtype=torch.float32, device=latents.device)
        if many.shape != (len(latents),):
            raise InputError(
                f"guidance={guidance!r}; give one scale, or one for each of {len(latents)} images"
            )
        shaped = many.reshape(-1, *[1] * (latents.dim() - 1)).to(latents.dtype)
        scale = float(many[0]) if bool((many == many[0]).all()) else shaped
    if UNCOND not in branches and (isinstance(scale, Tensor) or scale > 1):
        raise InputError(
            f"guidance={guidance!r}, but this run has no unconditional rows; make it with "
            "guidance= above 1"
        )
    return scale


def needed_branches(scales: Scales, branches: tuple[str, ...]) -> tuple[str, ...]:
    """The branches of a run that guidance of this scale needs."""
    return (COND,) if not isinstance(scales, Tensor) and scales == 1.0 else branches


def combined(parts: Mapping[str, Tensor], scales: Scales) -> Tensor:
    """uncond + s (cond - uncond), or cond where there is nothing else."""
    if UNCOND not in parts:
        return parts[COND]
    return parts[UNCOND] + scales * (parts[COND] - parts[UNCOND])
