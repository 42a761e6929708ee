"""A CLIP image encoder, and an image as it reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hookctl.arguments import refusal, shown
from hookctl.errors import InputError
from hookctl.hooks.offloading import device_of

# Of the images that CLIP was trained on.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(image: Image.Image, size: int, *, crop: bool) -> Tensor:
    """An image as CLIP reads it, float32 [1, 3, size, size].

    crop: cut out the middle, as it was trained; without it the whole image is squeezed into the
    square.
    """
    image = image.convert("RGB")
    if crop:
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(image).astype(np.float32) / 255)
    return ((x - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)).permute(2, 0, 1)[None]


class ImageEncoder:
    """A CLIP image encoder of the user's, such as `pipe.image_encoder`.

    crop: resize the shorter side and cut out the middle, as CLIP was trained; without it the whole
    image is squeezed into the square, so that nothing at its ends is lost.
    """

    def __init__(self, model: nn.Module, *, crop: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise refusal("image_encoder", model, "a CLIPVisionModelWithProjection")
        self.model, self.crop = model, crop
        self._config: Any = getattr(model, "config", None)
        self.size = int(getattr(self._config, "image_size", 224))

    def check(self, kind: str, channels: int, name: str) -> None:
        """Raise InputError if it can't give what an adapter reads.

        kind: "embedding" or "features".
        """
        wanted = "projection_dim" if kind == "embedding" else "hidden_size"
        width = getattr(self._config, wanted, None)
        if width is None:
            raise refusal(f"{name}: image_encoder", self.model, "a CLIPVisionModelWithProjection")
        if width != channels:
            raise InputError(
                f"{name}: the image encoder gives {kind} of {width} channels, but this adapter "
                f"reads {channels}: it was trained with another encoder (of the published ones "
                "ViT-H has embeddings of 1024 and features of 1280 channels, ViT-bigG embeddings "
                "of 1280); give image_encoder="
            )

    def pixels(self, image: Image.Image) -> Tensor:
        """An image as the encoder reads it, [1, 3, size, size]."""
        return pixels(image, self.size, crop=self.crop)

    def read(self, pixels: Tensor, kind: str) -> Tensor:
        """The embedding [1, channels] or the features [1, tokens, channels], float32."""
        place = device_of(self.model), next(self.model.parameters()).dtype
        with torch.inference_mode(False), torch.no_grad():
            found: Any = self.model(pixels.to(*place), output_hidden_states=kind == "features")
        if kind != "features" and getattr(found, "image_embeds", None) is None:
            raise InputError(
                f"image_encoder: {type(self.model).__name__} gives no embedding of an image "
                "(image_embeds); give a CLIPVisionModelWithProjection"
            )
        # The last layer's are turned to the embedding; those before it still hold the places.
        read: Tensor = found.hidden_states[-2] if kind == "features" else found.image_embeds
        return read.float()


def encoder_in(given: Any, name: str) -> Any:
    """What was given as an image encoder, or the one in a folder, by safetensors alone.

    Raises InputError if a folder holds none.
    """
    if not isinstance(given, str | Path):
        return given
    if not (Path(given) / "config.json").is_file():
        raise InputError(
            f"{name}={str(given)!r}: there is no config.json; give the folder image_encoder of "
            "IP-Adapter, with config.json and model.safetensors"
        )
    from transformers import CLIPVisionModelWithProjection

    try:
        found = CLIPVisionModelWithProjection.from_pretrained(
            str(given), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}={str(given)!r}: {shown(str(error))}; give the folder image_encoder of "
            "IP-Adapter, with config.json and model.safetensors"
        ) from None
    return found.eval().requires_grad_(False)
