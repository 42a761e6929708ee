"""What a pipeline's loop does between the latents and the scheduler's step.

    x  ->  what the denoiser is given, at a time of its own  ->  its predictions, branch by branch
       ->  as the scheduler wants them (`handing`)  ->  one, by guidance  ->  the scheduler's step

Programs do alike. Scales of guidance are counted alike for all families: 1 is none. Every formula
is in the order of operations of the pipelines, so that results agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Scales = float | Tensor  # one for all images, or one for each in the shape of the latents
Settings = Mapping[str, Any]  # what guidance reads of the pipeline, as its call has set it

Told = Callable[[Tensor, Tensor], Tensor]
Combine = Callable[[Tensor, Tensor, Scales, Settings], Tensor]
Finish = Callable[[Tensor, Tensor, Settings], Tensor]

# -- time ------------------------------------------------------------------------------------------


def timestep(t: Tensor, latents: Tensor) -> Tensor:
    """The scheduler's timestep as it is."""
    return t


def timestep_as_latents(t: Tensor, latents: Tensor) -> Tensor:
    """The scheduler's timestep, rounded to the dtype of the latents."""
    return t.to(latents.dtype)


def sigma(t: Tensor, latents: Tensor) -> Tensor:
    """The share of noise, t / 1000."""
    return t.to(latents.dtype) / 1000


def one_minus_sigma(t: Tensor, latents: Tensor) -> Tensor:
    """The share of the image, (1000 - t) / 1000."""
    return (1000 - t) / 1000


# -- guidance --------------------------------------------------------------------------------------


def rescaled(cond: Tensor, uncond: Tensor, scale: Scales, settings: Settings) -> Tensor:
    """u + s (c - u), whose spread is brought towards that of c by `guidance_rescale`.

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891,
    section 3.4.
    """
    guided = uncond + scale * (cond - uncond)
    share = settings.get("guidance_rescale") or 0.0
    if not share > 0:
        return guided
    every = list(range(1, cond.ndim))
    spread = cond.std(dim=every, keepdim=True) / guided.std(dim=every, keepdim=True)
    return share * (guided * spread) + (1 - share) * guided


def of_length_of_cond(cond: Tensor, uncond: Tensor, scale: Scales, settings: Settings) -> Tensor:
    """q ||c|| / ||q|| with q = u + s (c - u), token by token."""
    return with_length_of_cond(uncond + scale * (cond - uncond), cond, settings)


def with_length_of_cond(guided: Tensor, cond: Tensor, settings: Settings) -> Tensor:
    """q ||c|| / ||q||, token by token."""
    own, now = (torch.norm(x, dim=-1, keepdim=True) for x in (cond, guided))
    return guided * (own / now)


def capped(cond: Tensor, uncond: Tensor, scale: Scales, settings: Settings) -> Tensor:
    """c + (s - 1)(c - u), image by image no longer than `_cfg_normalization` ||c||."""
    return within_cap(cond + (scale - 1) * (cond - uncond), cond, settings)


def within_cap(guided: Tensor, cond: Tensor, settings: Settings) -> Tensor:
    """Guided predictions, image by image no longer than `_cfg_normalization` ||c||."""
    cap = float(settings.get("_cfg_normalization") or 0.0)
    if not cap > 0:
        return guided
    images = []
    for own, one in zip(cond, guided, strict=True):
        longest, now = torch.linalg.vector_norm(own) * cap, torch.linalg.vector_norm(one)
        images.append(one * (longest / now) if now > longest else one)
    return torch.stack(images)


def untruncated(scale: Scales, t: float, settings: Settings) -> Scales:
    """The scale at a timestep: none once 1 - t / 1000 is above `_cfg_truncation`."""
    until = settings.get("_cfg_truncation")
    late = until is not None and float(until) <= 1 and (1000 - t) / 1000 > float(until)
    return 1.0 if late else scale


def always(scale: Scales, t: float, settings: Settings) -> Scales:
    """The scale as it is, at every timestep."""
    return scale


# -- which denoiser --------------------------------------------------------------------------------


def first(pipe: Any, t: float) -> str | None:
    """The only denoiser."""
    return None


def by_boundary(pipe: Any, t: float) -> str | None:
    """Wan 2.2: one for the noisy timesteps, another below `boundary_ratio`."""
    share = pipe.config.boundary_ratio
    noisy = share is None or t >= share * pipe.scheduler.config.num_train_timesteps
    return "transformer" if noisy else "transformer_2"


# -- how the model takes its images ----------------------------------------------------------------


def as_list(rows: Tensor) -> list[Tensor]:
    """[rows, channels, height, width] as a list of videos of one frame."""
    return list(rows.unsqueeze(2).unbind(0))


@dataclass(frozen=True)
class Loop:
    """What is declared of a pipeline's loop.

    scale: the argument of the pipeline's call that is the scale of classifier-free guidance, None
        where there is none; unguided: what it is without guidance.
    second_scale: the one for a second denoiser, from the timestep on where that takes over.
    embedded: what the denoiser's `guidance` is of the call's `guidance_scale` where that is a scale
        that the model was taught: its factor, None where the model has none.
    time: what the denoiser is told of a timestep of the scheduler, for these latents.
    combine: (cond, uncond, scale) -> what the scheduler is given; settings: attributes of the
        pipeline that this reads; at: the scale that counts at a timestep.
    finish: (u + s (c - u), cond) -> what it makes of that sum, where it is not that; of negated
        predictions it gives the negated.
    denoiser: the name of the denoiser at a timestep, None for the first.
    wrap: how the model takes its images, where not as a tensor.
    references: images may stand behind the target in the sequence; the prediction begins with it.
    takes: the form of latents that the call takes, where it packs: "packed" or "unpacked".
    shows: the form that output_type="latent" gives them in: "stepped", as the scheduler has them,
        or "decoded", as the autoencoder takes them.
    asks_negative: without a negative prompt there is no guidance, whatever the scale.
    """

    scale: str | None = "guidance_scale"
    unguided: float = 1.0
    second_scale: str | None = None
    embedded: float | None = None
    time: Told = timestep
    combine: Combine = rescaled
    settings: tuple[str, ...] = ("guidance_rescale",)
    at: Callable[[Scales, float, Settings], Scales] = always
    finish: Finish | None = None
    denoiser: Callable[[Any, float], str | None] = first
    wrap: Callable[[Tensor], Any] | None = None
    references: bool = False
    takes: Literal["packed", "unpacked"] = "packed"
    shows: Literal["stepped", "decoded"] = "stepped"
    asks_negative: bool = False


PLAIN = Loop()  # of pipelines that guide in one call, as Stable Diffusion does
_FLUX = Loop(scale="true_cfg_scale", embedded=1.0, time=sigma, settings=(), asks_negative=True)
_QWEN = replace(_FLUX, combine=of_length_of_cond, finish=with_length_of_cond)

LOOPS: dict[str, Loop] = {
    "FluxPipeline": _FLUX,
    "FluxKontextPipeline": replace(_FLUX, references=True),
    "Flux2Pipeline": Loop(
        scale=None, embedded=1.0, time=sigma, references=True, takes="unpacked", settings=()
    ),
    "Flux2KleinPipeline": Loop(
        time=sigma, references=True, takes="unpacked", shows="decoded", settings=()
    ),
    "QwenImagePipeline": _QWEN,
    "QwenImageEditPipeline": replace(_QWEN, references=True),
    "QwenImageEditPlusPipeline": replace(_QWEN, references=True),
    "ZImagePipeline": Loop(
        unguided=0.0,
        time=one_minus_sigma,
        combine=capped,
        settings=("_cfg_normalization", "_cfg_truncation"),
        at=untruncated,
        finish=within_cap,
        wrap=as_list,
    ),
    "WanPipeline": Loop(second_scale="guidance_scale_2", denoiser=by_boundary, settings=()),
    "LTXPipeline": Loop(),
    "HunyuanVideoPipeline": replace(_FLUX, embedded=1000.0, time=timestep_as_latents),
}


def declare_loops(loop: Loop, names: Iterable[str] | str) -> None:
    """Declare what the loops of pipelines do, by the names of their classes."""
    LOOPS.update(dict.fromkeys(names.split() if isinstance(names, str) else names, loop))


def loop_of(pipe: Any) -> Loop | None:
    """The loop of a pipeline, or of the first of its bases that has one; None if unknown."""
    return next((LOOPS[k.__name__] for k in type(pipe).__mro__ if k.__name__ in LOOPS), None)


def settings_of(pipe: Any, loop: Loop) -> dict[str, Any]:
    """What guidance reads of a pipeline, as its call has set it."""
    return {name: getattr(pipe, name, None) for name in loop.settings}


def leaves_unguided(pipe: Any, step: int) -> bool:
    """Whether a pipeline that guides leaves out the guidance at a place of its schedule."""
    loop = loop_of(pipe)
    if loop is None or loop.at is always:
        return False
    t = float(pipe.scheduler.timesteps[step])
    return bool(loop.at(2.0, t, settings_of(pipe, loop)) == 1.0)
