"""What pipelines hand the scheduler of their denoiser's prediction, branch by branch.

Most hand over the prediction itself, or the part of it that belongs to the latents (`own_part`).
The others declare what they make of it: the guidance of editors must be put into the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Step:
    """The step that a prediction is handed to.

    pipe: the pipeline; arguments: of the denoiser call, by name; sample: the name of its model
    input; latents: that the step is of, [images, ...]; given: what the scheduler is given of the
    branches, [images, ...]; of: the latents that the prediction is of, an editor's perhaps.
    """

    pipe: Any
    arguments: Mapping[str, Any]
    sample: str
    latents: Tensor
    given: Tensor
    of: Tensor


Handing = Callable[[Tensor, Step], Tensor]  # a branch's prediction, [images, ...] -> handed over


def own_part(prediction: Tensor, step: Step) -> Tensor:
    """The part of a prediction that belongs to the latents, where that is known.

    Some models predict a variance in further channels, which guidance leaves as it is; edit models
    predict the tokens of their references too, behind those of the latents, which then begin the
    model input.
    """
    given, latents = step.given, step.latents
    if prediction.dim() > 3 and given.dim() == prediction.dim():
        channels, own = prediction.shape[1], latents.shape[1]
        if channels == 2 * given.shape[1]:
            return prediction[:, : channels // 2]
        if channels == given.shape[1] == 2 * own:
            return torch.cat([prediction[:, :own], given[: len(prediction), own:]], 1)
        return prediction
    if prediction.dim() == 3 == given.dim() and prediction.shape[2] == given.shape[2]:
        own, whole = given.shape[1], step.arguments[step.sample]
        if (
            own < prediction.shape[1] == whole.shape[1]
            and latents.shape[1:] == whole[:, :own].shape[1:]
            and torch.equal(whole[: len(latents), :own], latents.to(whole))
        ):
            return prediction[:, :own]
    return prediction


def negated(prediction: Tensor, step: Step) -> Tensor:
    """Models that predict what leads to the image, where the scheduler wants what leads away."""
    return -prediction


def negated_tokens(prediction: Tensor, step: Step) -> Tensor:
    """Likewise [rows, channels, frames, height, width], as tokens [rows, n, channels]."""
    return -prediction.flatten(2).transpose(1, 2)


def in_float32(prediction: Tensor, step: Step) -> Tensor:
    """Models in half precision whose steps are computed in single."""
    return prediction.float()


def negated_image(prediction: Tensor, step: Step) -> Tensor:
    """As `negated`, in single precision, of images that the model takes for videos of one frame."""
    return -(prediction.squeeze(2) if prediction.dim() == 5 else prediction).float()


def later_frames(prediction: Tensor, step: Step) -> Tensor:
    """[rows, channels, frames, ...] without the first frames, which are given as images."""
    return prediction[:, :, -step.given.shape[2] :]


def later_frames_first(prediction: Tensor, step: Step) -> Tensor:
    """[rows, frames, ..., channels] without the first frames, which are given as images."""
    return prediction[:, -step.given.shape[1] :]


def later_frames_of_tokens(prediction: Tensor, step: Step) -> Tensor:
    """[rows, tokens, channels] as frames, without the first ones, which are given as images."""
    if prediction.dim() != 3 or step.given.dim() != 5:
        return prediction
    pipe, sides = step.pipe, (step.arguments[n] for n in ("num_frames", "height", "width"))
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    return later_frames(pipe._unpack_latents(prediction, *sides, *patches), step)


def left_half(prediction: Tensor, step: Step) -> Tensor:
    """The latents' own columns, of latents and image side by side."""
    return prediction[..., : step.given.shape[-1]]


def velocity_of_image(prediction: Tensor, step: Step) -> Tensor:
    """(x - x0) / t of a prediction of x0; the pipeline takes no smaller t than 0.05."""
    t = step.arguments["timestep"].flatten()[0].clamp(min=0.05)
    return (step.of.to(prediction) - prediction) / t


def preconditioned_flow(prediction: Tensor, step: Step) -> Tensor:
    """(1 - t)(x + prediction), with the t = s / (1 + s) of the noise s that the model is told.

    This is (x - x0) / s of x0 = (1 - t) x - t prediction.
    """
    t = step.arguments["timestep"].flatten()[-1].to(prediction)
    return (1 - t) * (step.of.to(prediction) + prediction)


def of_its_own(prediction: Tensor, step: Step) -> Tensor:
    """Refuses: what is made of the predictions is neither theirs nor a sum of them."""
    raise UnsupportedError(
        f"{type(step.pipe).__name__} guides by images, steps or masks of its own, not by a sum of "
        "its denoiser's predictions, so these can't be combined anew; leave out editors that "
        "change the guidance"
    )


def preconditioned(prediction: Tensor, step: Step) -> Tensor:
    """x / (s^2 + 1) + s / sqrt(s^2 + 1) prediction, at the noise s, without the last channel.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv
    2206.00364, table 1.
    """
    scheduler = step.pipe.scheduler
    s = scheduler.sigmas[scheduler.step_index].to(prediction)
    own = prediction[:, : step.latents.shape[1]]
    return step.of.to(prediction) / (s**2 + 1) + s / (s**2 + 1) ** 0.5 * own
