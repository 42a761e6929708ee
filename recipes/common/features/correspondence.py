"""The same place of a thing in several images, by features of the model itself.

Tang et al., "Emergent Correspondence from Image Diffusion" (DIFT), arXiv 2306.03881: what a decoder
gives at a late step is alike where things are. Tewel et al., "ConsiStory", arXiv 2402.03286, write
the attention's output of the nearest such place into an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of
from hookctl.address.rows import COND
from hookctl.address.sites import Site
from hookctl.editor import Editor
from hookctl.errors import UnsupportedError
from hookctl.hooks.skips import concats
from hookctl.loop.inserting import LinearCall
from hookctl.loop.state import FeatureCall, State
from hookctl.recipes.common.features.otsu import otsu
from hookctl.recipes.common.features.smoothing import blur, cut_blur_matrix
from hookctl.recipes.common.sites import sites_of
from hookctl.run_state import RunState

Image = tuple[int, int]  # prompt and image
LATE = 261  # the timestep of 1000 whose features are compared


class SeenFeatures(Editor):
    """Keeps the decoder's features at a resolution, of the step nearest to timestep 261: image ->
    [channels, height, width]."""

    found: RunState[dict[Image, Tensor]] = RunState(factory=dict)
    _distance: RunState[float] = RunState(float("inf"))

    def __init__(self, resolution: Fraction) -> None:
        self.resolution = resolution

    def neutral(self) -> bool:
        return True

    def begin(self, state: State) -> None:
        self.found, self._distance = {}, float("inf")

    def features(self, call: FeatureCall) -> None:
        distance = abs(call.clock.timestep - LATE)
        if call.place or call.resolution != self.resolution or distance > self._distance:
            return
        self._distance = distance
        for row in call.rows.where(branch=COND):
            self.found[row.prompt, row.image] = call.backbone[row.index].detach().clone()


def injection_sites(who: str, pipe: Any, resolution: Fraction) -> list[Site]:
    """The self-attention of a UNet whose outputs are mixed; UnsupportedError for other models."""
    model = denoiser_of(pipe)
    at = {one.resolution for one in concats(model) if not one.place}
    found = [
        site
        for site in sites_of(pipe)
        if site.kind == "self" and site.place in ("down", "up") and site.resolution == resolution
    ]
    if resolution not in at or not found:
        raise UnsupportedError(
            f"{who}: {type(model).__name__} has no decoder features and self-attention at "
            f"{resolution} of the latent, which the injection needs; give injected=0"
        )
    return found


@dataclass(frozen=True, eq=False)
class Match:
    """For the tokens `own` of an image, the tokens `theirs` of the images `sources`, [places]."""

    own: Tensor
    theirs: Tensor
    sources: Sequence[Image]


def matched(
    image: Image,
    others: Sequence[Image],
    features: Mapping[Image, Tensor],
    masks: Mapping[Image, Tensor],
) -> Match | None:
    """The nearest place of the subject in other images for every place of it in this one.

    Nearest by cosine, of whichever image; places that are further than Otsu's threshold of all
    distances have none. masks: bool [tokens] of each image. None where there is no such place.
    """
    at = {one: mask.nonzero()[:, 0] for one, mask in masks.items()}
    others = [one for one in others if len(at[one])]
    if not others or not len(at[image]):
        return None
    own = _unit(features[image])
    near = [(1 - own @ _unit(features[one])[at[one]].mT).min(1) for one in others]
    distance, whose = torch.stack([one.values for one in near]).min(0)
    places = torch.stack(
        [at[one][found.indices] for one, found in zip(others, near, strict=True)]
    ).gather(0, whose[None])[0]
    close = (masks[image] & (distance < otsu(distance))).nonzero()[:, 0]
    if not len(close):
        return None
    return Match(close, places[close], [others[i] for i in whose[close].tolist()])


def matches_of(
    features: Mapping[Image, Tensor], masks: Mapping[Image, Tensor], anchors: int
) -> dict[Image, Match]:
    """The matches of every image among the first prompts' images of the same number."""
    found: dict[Image, Match] = {}
    for prompt, number in features:
        others = [(p, number) for p in range(anchors) if p != prompt]
        match = matched((prompt, number), others, features, masks)
        if match is not None:
            found[prompt, number] = match
    return found


def _unit(features: Tensor) -> Tensor:
    """Smoothed features [channels, height, width] as unit vectors, [tokens, channels]."""
    sides = [cut_blur_matrix(side, 1.0, 3) for side in features.shape[-2:]]
    smooth = blur(features.float(), *sides) if min(features.shape[-2:]) > 1 else features.float()
    return F.normalize(smooth.flatten(1).mT, dim=-1)


class InjectedOutputs(Editor):
    """Mixes into what self-attention gives an image what it gives at the matching places.

    who: for errors; sites: whose outputs, of `matches`' resolution; weight: of the others.
    """

    def __init__(
        self, sites: Sequence[Site], matches: Mapping[Image, Match], weight: float, window: Window
    ) -> None:
        self.paths = frozenset(f"{site.path}.to_out.0" for site in sites)
        self.matches, self.weight = matches, weight
        self.start, self.stop = window.start, window.stop

    def neutral(self) -> bool:
        return not self.weight or not self.matches

    def linears(self, path: str) -> bool:
        return path in self.paths

    def linear(self, call: LinearCall) -> None:
        if self.neutral() or not self.active(call.clock):
            return
        rows = {(row.prompt, row.image): row.index for row in call.rows.where(branch=COND)}
        out = call.output.clone()
        for image, index in rows.items():
            match = self.matches.get(image)
            if match is not None:
                sources = torch.tensor([rows[one] for one in match.sources], device=out.device)
                near = call.output[sources, match.theirs]
                out[index, match.own] = torch.lerp(call.output[index, match.own], near, self.weight)
        call.output = out
