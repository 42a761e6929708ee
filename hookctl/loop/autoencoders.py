"""How the latents of a pipeline stand to those of its autoencoder.

Between the two lies what each family does in its own way: a scale and a shift, a mean and a spread
for every channel, statistics of a batch norm, patches packed into tokens. The formulas are those of
the pipelines themselves, in their order of operations, so that results agree bit for bit:

    Scaled          x = (z - shift) s          z = x / s + shift        Stable Diffusion, SD3, Flux
      with a mean   x = (z - m) s / d          z = x d / s + m          XL, Mochi
    Standardised    x = (z - m) (1 / d)        z = x / (1 / d) + m      Wan, Qwen-Image
    Buffered        x = (z - m) s / d          z = x d / s + m          LTX, which may add noise
    BatchNormed     x = (patches - m) / d      z = x d + m, unpatched   FLUX.2

with z the autoencoder's latents, x the scheduler's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import UnsupportedError
from hookctl.loop.noise import noise_like


class _Code:
    """samples: whether image-to-image draws from the encoder's distribution; frames: the
    autoencoder takes and gives videos; wide: latents are decoded in their own dtype up to the
    autoencoder; needs: methods of the pipeline that do it."""

    needs: tuple[str, ...] = ()
    samples = False
    frames = False
    wide = False

    def conditioned(
        self, pipe: Any, z: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What the decoder is given, and what besides."""
        return z, ()


@dataclass(frozen=True)
class Scaled(_Code):
    """One scale and one shift for all channels, or a mean and a spread for each."""

    frames: bool = False
    samples = True

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
class Standardised(_Code):
    """A mean and a spread for each channel; videos, of which an image is one frame."""

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


class Buffered(_Code):
    """A mean and a spread for each channel, which the autoencoder holds as buffers; its decoder may
    be told how much noise it is given."""

    needs = ("_normalize_latents", "_denormalize_latents")
    frames = True
    wide = True

    def from_autoencoder(self, pipe: Any, z: Tensor) -> Tensor:
        x: Tensor = pipe._normalize_latents(z, *self._statistics(pipe))
        return x

    def to_autoencoder(self, pipe: Any, x: Tensor) -> Tensor:
        z: Tensor = pipe._denormalize_latents(x, *self._statistics(pipe))
        return z

    def conditioned(
        self, pipe: Any, z: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        if not pipe.vae.config.timestep_conditioning:
            return z, (None,)
        time, scale = (options.get(name) for name in ("decode_timestep", "decode_noise_scale"))
        times, scales = (
            torch.tensor(one if isinstance(one, list) else [one] * len(z)).to(z)
            for one in (time or 0.0, (time if scale is None else scale) or 0.0)
        )
        generator = options.get("generator")
        if isinstance(generator, list | tuple):  # one for each image
            pairs = zip(z.split(1), generator, strict=True)
            noise = torch.cat([noise_like(one, own) for one, own in pairs])
        else:
            noise = noise_like(z, generator)
        scales = scales[:, None, None, None, None]
        return (1 - scales) * z + scales * noise, (times,)

    def _statistics(self, pipe: Any) -> tuple[Tensor, Tensor, float]:
        vae = pipe.vae
        return vae.latents_mean, vae.latents_std, vae.config.scaling_factor


class BatchNormed(_Code):
    """Patches of 2 x 2 cells, normalised by the running statistics of a batch norm."""

    needs = ("_patchify_latents", "_unpatchify_latents")

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


Code = Scaled | Standardised | Buffered | BatchNormed

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
    "AutoencoderKLLTXVideo": Buffered(),
    "AutoencoderKLFlux2": BatchNormed(),
}


def code_of(pipe: Any) -> Code:
    """How a pipeline's latents stand to its autoencoder's; UnsupportedError where unknown."""
    vae = getattr(pipe, "vae", None)
    if vae is None or processor_of(pipe) is None:
        raise UnsupportedError(f"{type(pipe).__name__} has no autoencoder for images")
    code = _CODES.get(type(vae).__name__)
    if code is None or not all(hasattr(pipe, method) for method in code.needs):
        raise UnsupportedError(
            f"{type(pipe).__name__}: how its latents stand to those of {type(vae).__name__} is not "
            "known here; let the pipeline decode them itself, by its own call"
        )
    return code


def processor_of(pipe: Any) -> Any:
    """What makes pixels of a pipeline's images and back, None without one."""
    # That of an image encoder, which some hold under the same name, makes none back.
    held = (getattr(pipe, name, None) for name in ("image_processor", "video_processor"))
    return next((one for one in held if hasattr(one, "postprocess")), None)


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
