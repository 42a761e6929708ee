"""Influence maps: which of several models is trusted where, step by step.

Huang et al., "Collaborative Diffusion for Multi-Modal Face Generation and Editing", arXiv
2304.10530 (CVPR 2023). With logits a_m of M models, [images, M, ...], the shares are their softmax
over the models, place by place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookctl.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = 10  # steps that a sheet shows, evenly spread


def shares_of(logits: Tensor) -> Tensor:
    """The softmax over dimension 1, in float32 at least; a logit of +inf takes all."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    certain = logits == math.inf
    limit = torch.where(certain, 0.0, -math.inf).to(logits)
    return torch.where(certain.any(1, keepdim=True), limit, logits).softmax(1)


def led(logits: Tensor, leader: int, passed: float, factor: float = 2.0) -> Tensor:
    """The shares as the official sampler makes them: a model leads early and fades, whatever D
    says.

    With I the share of the leader and t / T = passed, s = (1 + cos(pi (1 - t / T))) / 2, m = s I,

        leader   factor m / (factor m + 1 - m)        the rest   (1 - m) / (factor m + 1 - m)

    (2m / (1 + m) and (1 - m) / (1 + m) as published, for two models). Several others, of which the
    paper has no case, divide the rest by the softmax over them alone.
    """
    m = (1 + math.cos(math.pi * (1 - passed))) / 2 * shares_of(logits)[:, leader : leader + 1]
    whole = factor * m + (1 - m)
    others = [i for i in range(logits.shape[1]) if i != leader]
    rest = shares_of(logits[:, others]) * (1 - m) / whole
    return torch.cat([rest[:, :leader], factor * m / whole, rest[:, leader:]], 1)


class InfluenceMaps:
    """The shares of the models in every step that they were mixed in.

    names: of the models; steps, timesteps: when; maps: of each step, [images, models, h, w].

        edit.influence.of(image=0)          # [steps, models, h, w]
        edit.influence["mask"]              # [steps, images, h, w]
        edit.influence.sheet(picture).save("influence.png")
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self.steps: list[int] = []
        self.timesteps: list[float] = []
        self.maps: list[Tensor] = []

    def note(self, step: int, timestep: float, shares: Tensor) -> None:
        """Keep those of a step, [images, models, h, w]."""
        self.steps.append(step)
        self.timesteps.append(timestep)
        self.maps.append(shares.detach())

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, name: str) -> Tensor:
        """The shares of one model, [steps, images, h, w]."""
        if name not in self.names:
            raise InputError(f"there is no model {name!r}; there are {', '.join(self.names)}")
        return self._all()[:, :, self.names.index(name)]

    def of(self, image: int = 0) -> Tensor:
        """Those of one image of the run, [steps, models, h, w]."""
        maps = self._all()
        if not 0 <= image < maps.shape[1]:
            raise InputError(f"image={image}; the run drew {maps.shape[1]}, give 0 or above")
        return maps[:, image]

    def sheet(self, picture: Image | None = None, image: int = 0) -> Image:
        """One model a row and one step a column, from black (0) to pale (1).

        picture: what was drawn, to lay the maps over; image: which one of the run it is.
        """
        from hookctl.inspect import show

        maps = self.of(image).float().cpu()
        count = min(WIDE, len(maps))
        chosen = [round(i * (len(maps) - 1) / max(count - 1, 1)) for i in range(count)]
        scale = (0.0, 1.0)
        rows: list[list[Any]] = []
        for m in range(len(self.names)):
            each = [maps[i, m] for i in chosen]
            if picture is None:
                rows.append([show.heatmap(one, (128, 128), scale=scale) for one in each])
            else:
                rows.append([show.overlay(picture, one, scale=scale) for one in each])
        titles = [f"step {self.steps[i]}" for i in chosen]
        scales = [scale] * len(rows)
        return show.grid(rows, titles, self.names, (128, 128), scales=scales, widest=None)

    def _all(self) -> Tensor:
        if not self.maps:
            raise InputError("there are no influence maps yet; draw an image under the editor")
        return torch.stack(self.maps)

    def __repr__(self) -> str:
        return f"<InfluenceMaps of {', '.join(self.names) or 'no models'}: {len(self)} steps>"
