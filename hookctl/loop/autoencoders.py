"""How the latents of a pipeline stand to those of its autoencoder.

Between the two lies what each family does in its own way: a scale and a shift, a mean and a spread
for every channel, statistics of a batch norm, patches packed into tokens. The formulas are those of
the pipelines themselves, in their order of operations, so that results agree bit for bit:

    Scaled          x = (z - shift) s          z = x / s + shift        Stable Diffusion, SD3, Flux
      with a mean   x = (z - m) s / d          z = x d / s + m          XL, Mochi
    Standardised    x = (z - m) (1 / d)        z = x / (1 / d) + m      Wan, Qwen-Image
    BatchNormed     x = (patches - m) / d      z = x d + m, unpatched   FLUX.2

with z the autoencoder's latents, x the scheduler's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import InputError, UnsupportedError

Size = tuple[int, int]  # height and width in px


@dataclass(frozen=True)
class Scaled:
    """One scale and one shift for all channels, or a mean and a spread for each.

    frames: the autoencoder takes and gives videos.
    """

    frames: bool = False
    samples = True  # image-to-image draws from the encoder's distribution

    def from_autoencoder(self, pipe: Any, z: Tensor) -> Tensor:
        config = pipe.vae.config
        if (statistics := _mean_and_spread(pipe, z)) is not None:
            mean, spread = statistics
            return (z - mean) * config.scaling_factor / spread
        shift = getattr(config, "shift_factor", None)
        return (z - shift if shift is not None else z) * config.scaling_factor

    def to_autoencoder(self, pipe: Any, x: Tensor) -> Tensor:
        config = pipe.vae.config
        if (statistics := _mean_and_spread(pipe, x)) is not None:
            mean, spread = statistics
            return x * spread / config.scaling_factor + mean
        z, shift = x / config.scaling_factor, getattr(config, "shift_factor", None)
        return z + shift if shift is not None else z


@dataclass(frozen=True)
class Standardised:
    """A mean and a spread for each channel; videos, of which an image is one frame.

    samples: whether image-to-image draws from the encoder's distribution.
    """

    samples: bool
    frames = True

    def from_autoencoder(self, pipe: Any, z: Tensor) -> Tensor:
        mean, inverse = self._statistics(pipe, z)
        return (z - mean) * inverse

    def to_autoencoder(self, pipe: Any, x: Tensor) -> Tensor:
        mean, inverse = self._statistics(pipe, x)
        return x / inverse + mean

    def _statistics(self, pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        config = pipe.vae.config
        mean, spread = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(like.device, like.dtype)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return mean, 1.0 / spread


@dataclass(frozen=True)
class BatchNormed:
    """Patches of 2 x 2 cells, normalised by the running statistics of a batch norm."""

    samples = False
    frames = False

    def from_autoencoder(self, pipe: Any, z: Tensor) -> Tensor:
        patches: Tensor = pipe._patchify_latents(z)
        mean, spread = self._statistics(pipe, patches)
        return (patches - mean) / spread

    def to_autoencoder(self, pipe: Any, x: Tensor) -> Tensor:
        if x.shape[1] == pipe.vae.config.latent_channels:
            return x  # `output_type="latent"` of these pipelines has them so
        mean, spread = self._statistics(pipe, x)
        z: Tensor = pipe._unpatchify_latents(x * spread + mean)
        return z

    def _statistics(self, pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = pipe.vae.bn
        variance = norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps
        mean = norm.running_mean.view(1, -1, 1, 1)
        return mean.to(like.device, like.dtype), torch.sqrt(variance).to(like.device, like.dtype)


Code = Scaled | Standardised | BatchNormed

_CODES: dict[str, Code] = {
    "AutoencoderKL": Scaled(),
    "AsymmetricAutoencoderKL": Scaled(),
    "AutoencoderTiny": Scaled(),
    "ConsistencyDecoderVAE": Scaled(),
    "AutoencoderDC": Scaled(),
    "AutoencoderKLHunyuanImage": Scaled(),
    "AutoencoderKLHunyuanVideo": Scaled(frames=True),
    "AutoencoderKLHunyuanVideo15": Scaled(frames=True),
    "AutoencoderKLMochi": Scaled(frames=True),
    "AutoencoderKLQwenImage": Standardised(samples=True),
    "AutoencoderKLWan": Standardised(samples=False),
    "AutoencoderKLFlux2": BatchNormed(),
}


def code_of(pipe: Any) -> Code:
    """How a pipeline's latents stand to its autoencoder's; UnsupportedError where unknown."""
    vae = getattr(pipe, "vae", None)
    if vae is None or processor_of(pipe) is None:
        raise UnsupportedError(f"{type(pipe).__name__} has no autoencoder for images")
    code = _CODES.get(type(vae).__name__)
    if code is None:
        raise UnsupportedError(
            f"{type(pipe).__name__}: how its latents stand to those of {type(vae).__name__} is not "
            "known here; let the pipeline decode them itself, by its own call"
        )
    return code


def processor_of(pipe: Any) -> Any:
    """What makes pixels of a pipeline's images and back, None without one."""
    return getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)


def reads(pipe: Any, name: str, *methods: str) -> bool:
    """Whether a pipeline's own code reads this attribute, in some methods or anywhere."""
    for kind in type(pipe).__mro__:
        for method, value in vars(kind).items():
            function = inspect.unwrap(value) if callable(value) else value
            code = getattr(function, "__code__", None)
            if code is not None and (not methods or method in methods):
                if name in code.co_names or name in code.co_consts:
                    return True
    return False


def _mean_and_spread(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of each channel, where the autoencoder has them and the pipeline minds them."""
    config, found = pipe.vae.config, []
    for name in ("latents_mean", "latents_std"):
        numbers = getattr(config, name, None)
        if numbers is None or not reads(pipe, name):
            return None
        shape = (1, -1, *[1] * (like.dim() - 2))
        found.append(torch.tensor(numbers).view(shape).to(like.device, like.dtype))
    return found[0], found[1]


@contextmanager
def upcast(pipe: Any) -> Iterator[torch.dtype]:
    """The autoencoder in float32 meanwhile, where the pipeline too does this to avoid an overflow
    in float16; the dtype that it takes."""
    vae = pipe.vae
    before = vae.dtype
    wide = before == torch.float16 and getattr(vae.config, "force_upcast", False)
    if not wide or not reads(pipe, "force_upcast"):
        yield before
        return
    vae.to(dtype=torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype=before)


# -- tokens ----------------------------------------------------------------------------------------


def packed(pipe: Any, x: Tensor) -> Tensor:
    """Latents as the pipeline's scheduler has them: a sequence of tokens where it packs them."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return x
    known = tuple(inspect.signature(pack).parameters)
    if known == ("latents",):
        tokens: Tensor = pack(x)
        return tokens
    if known != ("latents", "batch_size", "num_channels_latents", "height", "width"):
        raise UnsupportedError(f"{type(pipe).__name__} packs its latents in a way unknown here")
    tokens = pack(x, x.shape[0], x.shape[1], *x.shape[-2:])
    return tokens


def unpacked(pipe: Any, x: Tensor, size: Size | None) -> Tensor:
    """A sequence of tokens, [images, tokens, channels], as a grid; other latents as they are.

    size: (height, width) in px; None for the pipeline's default, or a square.
    """
    if x.dim() != 3:
        return x
    factor = int(pipe.vae_scale_factor)
    height, width = _grid(pipe, x.shape[1], factor * 2, size)
    if hasattr(pipe, "_unpack_latents_with_ids"):
        return x.mT.reshape(len(x), -1, height, width)
    unpack = getattr(pipe, "_unpack_latents", None)
    known = () if unpack is None else tuple(inspect.signature(unpack).parameters)
    if known != ("latents", "height", "width", "vae_scale_factor"):
        raise UnsupportedError(f"{type(pipe).__name__} packs its latents in a way unknown here")
    assert unpack is not None  # it has parameters
    grid: Tensor = unpack(x, height * factor * 2, width * factor * 2, factor)
    return grid


def _grid(pipe: Any, tokens: int, cell: int, size: Size | None) -> tuple[int, int]:
    """Rows and columns of so many tokens, each of cell x cell px."""
    if size is not None:
        rows, columns = size[0] // cell, size[1] // cell
        if rows * columns != tokens:
            raise InputError(
                f"size={size}: an image of {size[0]} x {size[1]} px has {rows * columns} tokens, "
                f"these latents have {tokens}"
            )
        return rows, columns
    side = int(getattr(pipe, "default_sample_size", 0) or 0) * int(pipe.vae_scale_factor) // cell
    if side * side == tokens:
        return side, side
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(
            f"latents of {tokens} tokens are of no square image; give size=(height, width) in px"
        )
    return side, side
