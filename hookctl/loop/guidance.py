"""Guidance of a program's own: its scales, and how predictions are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hookctl.address.families.loops import Scales
from hookctl.address.rows import COND, UNCOND
from hookctl.errors import InputError
from hookctl.loop.pattern import Template

Guidance = float | Sequence[float] | Tensor


def guidance_scales(guidance: Guidance, latents: Tensor, branches: Sequence[str]) -> Scales:
    """One scale for all images, or one for each in the shape of the latents, [images, 1, ...].

    branches: those that a run has. Raises InputError for another number of scales than of images,
    and for guidance of a run without unconditional rows.
    """
    scale = per_image(guidance, latents, "guidance")
    if UNCOND not in branches and (isinstance(scale, Tensor) or scale > 1):
        raise InputError(
            f"guidance={guidance!r}, but this run has no unconditional rows; make it with "
            "guidance= above 1"
        )
    return scale


def per_image(value: Guidance, latents: Tensor, name: str) -> Scales:
    """One number for all images, or one for each in the shape of the latents, [images, 1, ...]."""
    if isinstance(value, int | float):
        return float(value)
    many = torch.as_tensor(value, dtype=torch.float32, device=latents.device)
    if many.shape != (len(latents),):
        raise InputError(
            f"{name}={value!r}; give one scale, or one for each of {len(latents)} images"
        )
    shaped = many.reshape(-1, *[1] * (latents.dim() - 1)).to(latents.dtype)
    return float(many[0]) if bool((many == many[0]).all()) else shaped


def needed_branches(scales: Scales, branches: tuple[str, ...]) -> tuple[str, ...]:
    """The branches of a run that guidance of this scale needs."""
    return (COND,) if not isinstance(scales, Tensor) and scales == 1.0 else branches


def combined(parts: Mapping[str, Tensor], scales: Scales, template: Template) -> Tensor:
    """The guided prediction in the way of the family, or the only one."""
    if UNCOND not in parts:
        return parts[COND]
    return template.loop.combine(parts[COND], parts[UNCOND], scales, template.settings)
