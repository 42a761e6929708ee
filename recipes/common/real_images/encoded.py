"""Real images and videos as latents, with what says how large they are drawn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.arguments import is_list
from hookctl.errors import InputError
from hookctl.loop.images import encode


@dataclass(frozen=True, eq=False)
class Encoded:
    """latents: of all images, [images, ...], as the pipeline's scheduler has them; size: (height,
    width) in px; extent: what else of the pipeline's call says how large they are drawn."""

    latents: Tensor
    size: tuple[int, int]
    extent: Mapping[str, Any]


def takes_videos(pipe: Any) -> bool:
    """Whether an image of a pipeline may be a list of frames."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def encoded(
    pipe: Any, images: Sequence[Any], who: str, generator: torch.Generator | None = None
) -> Encoded:
    """Images, or videos as lists of frames, in one batch.

    generator: draws from the encoder's distribution (`encode`), for each image alike. Raises
    InputError for images of several sizes and videos of several lengths.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    videos = [list(image) if is_list(image) else [image] for image in images]
    sizes = {getattr(frame, "size", None) for video in videos for frame in video}
    if len(sizes) > 1:
        raise InputError(f"{who}: images of the sizes {list(sizes)}; give them one size")
    if len({len(video) for video in videos}) > 1:
        raise InputError(f"{who}: videos of several lengths; give them as many frames")
    begun, found = None if generator is None else generator.get_state(), []
    for image in images:
        if generator is not None and begun is not None:
            generator.set_state(begun)  # an image is drawn as it is alone
        found.append(encode(pipe, image, generator))
    latents = torch.cat(found)
    dtype = next(families.denoiser_of(pipe).parameters()).dtype
    width, height = videos[0][0].size
    extent = {"num_frames": len(videos[0]), "max_area": height * width}
    extent = {key: value for key, value in extent.items() if key in known}
    return Encoded(latents.to(dtype), (height, width), extent)
