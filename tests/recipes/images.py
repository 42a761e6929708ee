"""An image and a tiny pipeline for the inversions, and how their work is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from tests import zoo

PROMPT, TARGET = "a red cat above a dog", "a blue cat above a dog"


def pipeline(name: str = "sd15", scheduler: Any = None, **config: Any) -> Any:
    pipe = zoo.PIPELINES[name].make()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, **config})
    return pipe


def image(seed: int = 0, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Coloured noise of low frequency, (width, height) pixels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@contextmanager
def counted(pipe: Any, denoiser: str = "unet") -> Iterator[list[int]]:
    """The rows of every denoiser call made meanwhile."""
    rows: list[int] = []
    module = getattr(pipe, denoiser)
    latents = "sample" if denoiser == "unet" else "hidden_states"
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs[latents])),
        with_kwargs=True,
    )
    try:
        yield rows
    finally:
        hook.remove()
