"""Images to latents and back, as a pipeline itself does it.

`encode` gives what the pipeline's own image-to-image starts from, `decode` what its call returns,
bit for bit; `loop.autoencoders` has the families. Pipelines that decode frame by frame in a method
of their own (AnimateDiff, SVD, CogVideoX) are asked to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.autoencoders import code_of, processor_of, reads, upcast
from hookctl.loop.packing import Size, cells_of, packed, unpacked


@torch.no_grad()
def encode(pipe: Any, image: Any, generator: torch.Generator | None = None) -> Tensor:
    """The latents of an image in the scheduler's space, [1, channels, [frames,] height, width], or
    [1, tokens, channels] where the pipeline packs them.

    image: PIL, mode RGB, with sides that the pipeline can draw; for pipelines of videos also a list
    of them, the frames. generator: draws from the encoder's distribution, as image-to-image does;
    None takes its mean (as FLUX.2 and Wan always do).
    Raises InputError for other modes and sizes, and UnsupportedError for autoencoders that are not
    known or give no numbers.
    """
    processor, vae, name = processor_of(pipe), getattr(pipe, "vae", None), type(pipe).__name__
    by_frames = _decodes_itself(pipe)
    if by_frames and "AnimateDiff" not in name:
        raise UnsupportedError(
            f"{name}: how an image becomes what its scheduler steps is not known here; let the "
            "pipeline take the image itself"
        )
    code = code_of(pipe)
    assert vae is not None  # `code_of` has refused
    _check_reads_alone(processor, name)
    frames = _checked(image, code.frames or by_frames, _side(processor), name)
    own = vae.dtype
    with upcast(pipe) as dtype:
        if code.frames and hasattr(processor, "preprocess_video"):
            pixels = processor.preprocess_video(frames)
        else:
            pixels = torch.cat([processor.preprocess(frame) for frame in frames])
        pixels = pixels.to(_device(pipe), own).to(dtype)
        if code.frames and pixels.dim() == 4:
            pixels = pixels.unsqueeze(2)
        z = _latents_in(vae.encode(pixels), generator if code.samples else None)
    x = code.from_autoencoder(pipe, z.to(_dtype(pipe, own)))
    if by_frames:
        x = x.transpose(0, 1)[None]  # frames -> [1, channels, frames, height, width]
    _check_finite(x, "the latents of the image", vae)
    return packed(pipe, x)


@torch.no_grad()
def decode(
    pipe: Any,
    latents: Tensor,
    output_type: str = "pil",
    *,
    size: Size | None = None,
    frames: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Images (or videos) of latents in the scheduler's space, as the pipeline would show them.

    output_type: the pipeline's ("pil", "np", "pt", "latent"). size: (height, width) in px, for
    latents that are packed into tokens; None for the pipeline's default or a square; frames: of
    the latent, where it is a video and packed. options: arguments of the pipeline's call that its
    decoding reads (LTX: decode_timestep, decode_noise_scale, generator).
    Raises InputError for latents with NaN, UnsupportedError where the autoencoder makes some.
    """
    name, vae = type(pipe).__name__, getattr(pipe, "vae", None)
    if output_type == "latent" and (vae is None or latents.dim() != 3):
        return latents
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        raise InputError(
            f"latents hold {bad} values that are NaN or infinite (of {latents.numel()}), so they "
            "are no image; a run in float16 may have overflowed: try torch.bfloat16 or float32"
        )
    if _decodes_itself(pipe):
        return processor_of(pipe).postprocess_video(
            _finite_pixels(_by_frames(pipe, latents), vae), output_type=output_type
        )
    code = code_of(pipe)
    assert vae is not None  # `code_of` has refused
    if output_type == "latent" and not _shows_decoded(pipe):
        return latents
    if latents.dim() == 3:
        latents = unpacked(pipe, latents, cells_of(pipe, latents.shape[1], size, frames))
    if output_type == "latent":
        return code.to_autoencoder(pipe, latents)
    with upcast(pipe) as dtype:
        x = latents.to(_device(pipe), latents.dtype if code.wide else dtype)
        z = code.to_autoencoder(pipe, x).to(dtype)
        z, conditions = code.conditioned(pipe, z, options)
        pixels = vae.decode(z, *conditions, return_dict=False)[0]
    return _shown(pipe, _finite_pixels(pixels, vae), output_type, size, name)


def _shows_decoded(pipe: Any) -> bool:
    """Whether output_type="latent" gives latents as the autoencoder takes them."""
    loop = families.loop_of(pipe)
    if loop is not None:
        return loop.shows == "decoded"
    return hasattr(pipe, "_unpack_latents_with_ids")


def _shown(pipe: Any, pixels: Tensor, output_type: str, size: Size | None, name: str) -> Any:
    """Pixels as the pipeline hands them out: checked, marked and in its output's type."""
    processor = processor_of(pipe)
    if pixels.dim() == 5:
        if hasattr(processor, "postprocess_video"):
            return processor.postprocess_video(pixels, output_type=output_type)
        pixels = pixels[:, :, 0]
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        if not hasattr(processor, "resize_and_crop_tensor"):
            raise InputError(f"size={size}: these latents are an image of {pixels.shape[-2:]} px")
        pixels = processor.resize_and_crop_tensor(pixels, size[1], size[0])
    if getattr(pipe, "watermark", None) is not None:
        pixels = pipe.watermark.apply_watermark(pixels)
    if getattr(pipe, "safety_checker", None) is None:
        return processor.postprocess(pixels, output_type=output_type)
    pixels, hidden = pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
    shown = [not hide for hide in hidden]
    return processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)


def _decodes_itself(pipe: Any) -> bool:
    return hasattr(pipe, "vae") and reads(pipe, "decode_latents", "__call__")


def _by_frames(pipe: Any, latents: Tensor) -> Tensor:
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipe.decode_latents).parameters.items():
        if name == "num_frames":
            given |= {"num_frames": latents.shape[1], "decode_chunk_size": latents.shape[1]}
        elif name != "latents" and name not in given and parameter.default is parameter.empty:
            raise UnsupportedError(
                f"{type(pipe).__name__}.decode_latents wants {name}, which is not known here; let "
                "the pipeline decode its latents itself"
            )
    pixels: Tensor = pipe.decode_latents(latents, **given)
    return pixels


# -- checks ----------------------------------------------------------------------------------------


def _check_reads_alone(processor: Any, name: str) -> None:
    """Raise UnsupportedError for a pipeline that reads its images together with its prompts."""
    taken = inspect.signature(processor.preprocess).parameters.values()
    if sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in taken) > 1:
        raise UnsupportedError(
            f"{name} reads its images together with its prompts, so an image alone can't be made "
            "latents of; use the family's text-to-image pipeline"
        )


def _side(processor: Any) -> int:
    """What the sides of an image must be multiples of, in px."""
    return int(getattr(getattr(processor, "config", None), "vae_scale_factor", 1) or 1)


def _checked(image: Any, video: bool, factor: int, name: str) -> list[Any]:
    """The frames of an image or video; InputError for what can't be drawn."""
    if isinstance(image, Sequence) and not isinstance(image, str):
        if not video or not image:
            raise InputError(f"image is a {type(image).__name__}; {name} takes one PIL image")
        frames = list(image)
    else:
        frames = [image]
    for frame in frames:
        mode, size = getattr(frame, "mode", None), getattr(frame, "size", None)
        if mode is None or not isinstance(size, tuple):
            raise InputError(f"image is a {type(frame).__name__}; give a PIL image in mode RGB")
        if mode != "RGB":
            raise InputError(f"image has mode {mode!r}; give image.convert('RGB')")
        if size[0] % factor or size[1] % factor or not all(size):
            raise InputError(
                f"image is {size[0]} x {size[1]} px; this pipeline draws sides that are multiples "
                f"of {factor}, so crop or resize it"
            )
        if size != frames[0].size:
            raise InputError(f"image: frames of {frames[0].size} and {size} px; give them one size")
    return frames


def _latents_in(found: Any, generator: torch.Generator | None) -> Tensor:
    """What an encoder found; some give a distribution."""
    if not hasattr(found, "latent_dist"):
        z: Tensor = found.latents if hasattr(found, "latents") else found.latent
        return z
    drawn: Tensor = (
        found.latent_dist.mode() if generator is None else found.latent_dist.sample(generator)
    )
    return drawn


def _finite_pixels(pixels: Tensor, vae: Any) -> Tensor:
    _check_finite(pixels, "the image", vae)
    return pixels


def _check_finite(x: Tensor, what: str, vae: Any) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise UnsupportedError(
            f"{bad} values of {what} (of {x.numel()}) are NaN or infinite: {type(vae).__name__} "
            f"overflows in {str(vae.dtype).removeprefix('torch.')}; call pipe.vae.to(torch.float32)"
            " or load another autoencoder"
        )


def _device(pipe: Any) -> torch.device:
    """Where the pipeline computes; the autoencoder's own place may be that of its rest."""
    device: torch.device = getattr(pipe, "_execution_device", pipe.vae.device)
    return device


def _dtype(pipe: Any, fallback: torch.dtype) -> torch.dtype:
    """The dtype that the pipeline has its latents in."""
    dtype: torch.dtype = getattr(families.denoiser_of(pipe), "dtype", fallback)
    return dtype if dtype.is_floating_point else fallback


__all__ = ["decode", "encode"]
