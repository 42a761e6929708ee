"""Rules in the place of classifier-free guidance: what APG, CFGZeroStar, TCFG and FDG share.

A rule makes something else of the two predictions than the pipeline's u + g (c - u), at the
pipeline's own guidance g. It is written as a term beside that sum, so that what further editors add
stays, and a pipeline's `guidance_rescale` rescales the whole, as diffusers' guiders do:

    u + g (c - u) + s (rule(u, c, g) - (u + g (c - u)))        s the strength

g is read from what the pipeline makes of the two, so it may differ by image, and a scale that
counts from 0 (Z-Image: c + g (c - u)) means the same guidance. What a family makes of the guided
sum afterwards (`address.families.loops`: Qwen-Image's norms, Z-Image's cap) it makes of the rule's
too. Pipelines that make anything else of the two are refused, such as guidance by three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.families.loops import Finish, Settings
from hookctl.address.rows import COND, UNCOND
from hookctl.arguments import checked, number
from hookctl.editor import Claim, Editor
from hookctl.errors import UnsupportedError
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.added_guidance import with_added

COMBINATION = "combination of predictions"
COMBINATION_CURE = "Give one of them alone, or windows that do not overlap"


@dataclass(frozen=True, eq=False)
class Guided:
    """One guided step, in float32 or finer.

    u, c: the predictions, [images, channels, ...]; g: the guidance, [images, 1, ...]; own: what the
    pipeline made of them; finish: what its family makes of a guided sum.
    """

    u: Tensor
    c: Tensor
    g: Tensor
    own: Tensor
    state: State
    finish: Callable[[Tensor], Tensor] | None = None

    def beside(self, term: Tensor) -> Tensor:
        """What a term beside the guided sum adds to what the pipeline made of that."""
        if self.finish is None:
            return term
        plain = self.u + self.g * self.d
        return self.finish(plain + term) - self.finish(plain)

    @property
    def d(self) -> Tensor:
        return self.c - self.u


class GuidanceRule(Editor):
    """Base of the rules. strength: s, 0 the pipeline's own guidance, 1 the rule's; start, stop:
    fractions of the schedule."""

    @checked()
    def __init__(self, *, strength: float = 1.0, start: float = 0.0, stop: float = 1.0) -> None:
        self.strength = number(strength, f"{self.name}: strength", low=0)
        self.start, self.stop = start, stop

    def neutral(self) -> bool:
        return self.strength == 0

    def claims(self) -> Sequence[Claim]:
        if self.neutral():
            return []
        return [Claim(COMBINATION, None, self.window(), cure=COMBINATION_CURE)]

    def combine(self, predictions: Predictions) -> Tensor:
        if self.neutral() or _is_truncated(predictions):
            return predictions.guided
        step = guided(self.name, predictions)
        return with_added(predictions, step.beside(self.strength * self.term(step)))

    def term(self, step: Guided) -> Tensor:
        """rule(u, c, g) - (u + g (c - u)), [images, channels, ...]."""
        raise NotImplementedError


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of images, [images, 1, ...]."""
    return (a * b).sum(list(range(1, a.dim())), keepdim=True)


def _is_truncated(predictions: Predictions) -> bool:
    """Whether the pipeline leaves out the guidance of this step by a setting of its own."""
    state = predictions.state
    unguided = UNCOND not in predictions.branches
    return unguided and families.leaves_unguided(state.pipe, state.clock.entry)


def guided(name: str, predictions: Predictions) -> Guided:
    """What a step's guidance is made of. UnsupportedError, for the editor of this name, if there is
    none, or if the pipeline combines its predictions in another way."""
    state, pipe = predictions.state, type(predictions.state.pipe).__name__
    if COND not in predictions.branches and UNCOND not in predictions.branches:
        raise UnsupportedError(
            f"{name} combines predictions, and those of {pipe} are in a form unknown here"
        )
    if UNCOND not in predictions.branches:
        raise UnsupportedError(
            f"{name} is a rule of guidance, but this run has none; give guidance_scale above 1 "
            "(true_cfg_scale and a negative prompt where the pipeline has them)"
        )
    own = predictions.guided if predictions.own is None else predictions.own
    fine = torch.promote_types(own.dtype, torch.float32)
    channels = own.shape[1]
    if own.dim() > 3 and channels == 2 * state.latents.shape[1]:
        channels //= 2  # the others are a variance, which no guidance changes
    u, c, made = (
        z[:, :channels].to(own.device, fine) for z in (predictions[UNCOND], predictions[COND], own)
    )
    d = c - u
    scale = getattr(state.pipe, "guidance_scale", 1.0)
    stated = float(scale) if isinstance(scale, int | float) else 1.0  # one for each frame (SVD)
    if getattr(state.pipe, "guidance_rescale", 0.0):  # `with_added` checks it
        return Guided(u, c, torch.full_like(inner(d, d), stated), made, state)
    bound = max(2 * torch.finfo(own.dtype).eps, 1e-4)
    loop = families.loop_of(state.pipe)
    finish: Callable[[Tensor], Tensor] | None = None
    if loop is not None and loop.finish is not None:
        finish = partial(_finished, loop.finish, c, families.settings_of(state.pipe, loop))
    g = _measured(u, d, made, by_token=made.dim() == 3) if finish else _projected(u, d, made)
    if bool(((g - stated).abs() < bound * abs(stated)).all()):
        g = torch.full_like(g, stated)
    sum = u + g * d
    away = (made - (finish(sum) if finish else sum)).norm()
    if away > bound * (u.norm() + (g * d).norm()) or not math.isfinite(away):
        raise UnsupportedError(
            f"{name} takes the place of u + g (c - u), and {pipe} makes something else of its "
            "predictions in this step; give it none of its own rescaling, cap or further guidance, "
            "or leave the rule out"
        )
    return Guided(u, c, g, made, state, finish)


def _finished(finish: Finish, c: Tensor, settings: Settings, guided: Tensor) -> Tensor:
    return finish(guided, c, settings)


def _projected(u: Tensor, d: Tensor, made: Tensor) -> Tensor:
    """g of what was made by u + g d, [images, 1, ...]."""
    size = inner(d, d)
    return torch.where(size > 0, inner(made - u, d) / size, torch.ones_like(size))


def _measured(u: Tensor, d: Tensor, made: Tensor, *, by_token: bool) -> Tensor:
    """g of what was made by l (u + g d), whatever the length l of each image, or of each token.

    The least squares l and l g are those of the plane of u and d; of tokens the middle g is taken.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True) if by_token else inner(a, b)

    uu, ud, dd, mu, md = dot(u, u), dot(u, d), dot(d, d), dot(made, u), dot(made, d)
    below = dd * mu - ud * md
    g = torch.where(below != 0, (uu * md - ud * mu) / below, torch.ones_like(below))
    return g.median(1, keepdim=True).values if by_token else g
