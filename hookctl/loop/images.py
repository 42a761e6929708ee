"""Images to latents and back, by a pipeline's own autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookctl.errors import InputError, UnsupportedError


@torch.no_grad()
def encode(pipe: Any, image: Any, generator: torch.Generator | None = None) -> Tensor:
    """The latents of an image, [1, channels, height, width]: the mean of the encoder's.

    image: PIL, mode RGB, with sides that the pipeline can draw. generator: draws from the encoder's
    distribution instead.
    Raises InputError for other modes and sizes.
    """
    vae, factor = _autoencoder(pipe), int(getattr(pipe, "vae_scale_factor", 8))
    mode, size = getattr(image, "mode", None), getattr(image, "size", None)
    if mode is None or not isinstance(size, tuple):
        raise InputError(f"image is a {type(image).__name__}; give a PIL image in mode RGB")
    if mode != "RGB":
        raise InputError(f"image has mode {mode!r}; give image.convert('RGB')")
    if size[0] % factor or size[1] % factor or not all(size):
        raise InputError(
            f"image is {size[0]} x {size[1]} px; this pipeline draws sides that are multiples of "
            f"{factor}, so crop or resize it"
        )
    pixels = pipe.image_processor.preprocess(image).to(vae.device, vae.dtype)
    found = vae.encode(pixels)
    if not hasattr(found, "latent_dist"):
        mean = found.latent
    elif generator is None:
        mean = found.latent_dist.mean
    else:
        mean = found.latent_dist.sample(generator)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents: Tensor = (mean - shift) * vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, output_type: str = "pil") -> Any:
    """Images of latents [images, channels, height, width], as the pipeline would show them."""
    if output_type == "latent":
        return latents
    vae = _autoencoder(pipe)
    shift = getattr(vae.config, "shift_factor", None)
    latents = latents / vae.config.scaling_factor
    if shift:
        latents = latents + shift
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type=output_type)


def _autoencoder(pipe: Any) -> Any:
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(pipe, "image_processor"):
        raise UnsupportedError(f"{type(pipe).__name__} has no autoencoder for images")
    return vae
