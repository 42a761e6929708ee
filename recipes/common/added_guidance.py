"""Guidance beside the pipeline's own, in its place before `guidance_rescale`.

Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", arXiv 2305.08891: with
guided = u + g (c - u), pipelines that are given guidance_rescale = phi hand the scheduler

    R(guided) = phi guided std(c) / std(guided) + (1 - phi) guided

and diffusers' own further guidance belongs to the sum that is rescaled: R(guided + added).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.errors import UnsupportedError
from hookctl.loop.state import Predictions

CLOSE = 2e-2  # how far the pipeline's own result may be from R(guided), for half precision


def with_added(predictions: Predictions, added: Tensor) -> Tensor:
    """The step's prediction with a term [images, ...] more in the guided sum.

    The term may lack the channels of a variance, the last ones of some predictions.

    Several editors may add to one step, in any order; what others changed stays as it is. Raises
    UnsupportedError for a pipeline that rescales otherwise than by R(u + g (c - u)).
    """
    guided, state = predictions.guided, predictions.state
    phi = float(getattr(state.pipe, "guidance_rescale", 0.0) or 0.0)
    added = added.to(guided)
    if variance := guided.shape[1] - added.shape[1]:  # in the last channels
        added = torch.cat([added, torch.zeros_like(guided[: len(added), :variance])], 1)
    if not phi or predictions.own is None or UNCOND not in predictions.branches:
        return guided + added
    u, c = predictions[UNCOND].to(guided), predictions[COND].to(guided)
    plain = u + float(getattr(state.pipe, "guidance_scale", 1.0)) * (c - u)
    own = predictions.own
    if (rescaled(plain, c, phi) - own).norm() > CLOSE * own.norm():
        raise UnsupportedError(
            f"{type(state.pipe).__name__} uses guidance_rescale={phi:g} in a way of its own, in "
            "which further guidance has no place; leave guidance_rescale 0"
        )
    before = state.added_guidance
    state.added_guidance = added if before is None else before + added
    was = own if before is None else rescaled(plain + before, c, phi)
    now = rescaled(plain + state.added_guidance, c, phi)
    return now if guided is own else guided + (now - was)


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """R of guided predictions [images, ...]."""
    dims = list(range(1, guided.dim()))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return torch.lerp(guided, guided * ratio, phi)
