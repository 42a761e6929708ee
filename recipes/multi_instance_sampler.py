"""Multi-instance sampler: every instance is first drawn alone, then all are merged.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024), section 3.4. From the same noise, for the first `share` of the schedule, 1 + n
images are denoised side by side: the one of the whole prompt, and one for each instance whose
prompt is the instance's own phrase, so that no other instance can leak into it. Each has its own
solver. Then they become one image, which goes on with the whole prompt:

    mean     x <- (x_0 + sum_i x_i) / (1 + n)                             the official code
    paste    x <- (1 - sum_i m_i) x_0 + sum_i m_i x_i                     crop and paste

m_i: where instance i is to be. Averaging n + 1 latents lowers their variance (`spread` says from
what to what); `renormalise` restores it. The official crop-and-paste, switched off there, indexes
the height by x; here x is to the right.

The official instance branches are grounded by trained modules. Without such, `outside` says what
an instance's image shows beyond its region, and the phrase is asked for inside alone, as by
`RegionalPrompts`; without `outside` the phrase is asked for everywhere. `background` paints what is
beyond in a plain colour at the noise level of every step, as MultiDiffusion's bootstrapping does
(Bar-Tal et al., arXiv 2302.08113, section 4.2): the instance then has to find room inside. A phrase
that is asked for everywhere may still put its object across the region's edge, where it is cut;
`outside=""`, nothing beyond, prevents that. With `start` the instances leave the image later,
once something else in the stack, such as layout guidance, has laid it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from hookctl.address.latent import over_latent
from hookctl.address.rows import COND, Row, Rows
from hookctl.address.sites import Grid, Selector
from hookctl.attention.call import AttentionCall
from hookctl.attention.division import Division
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.kernels.latent_mixing import merge_instances
from hookctl.loop.images import encode
from hookctl.loop.noise import Noise
from hookctl.loop.prompts import EncodedTexts, Text, check_texts
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common import places
from hookctl.recipes.common.companion import Beside, guidance_of
from hookctl.recipes.common.places import Places, Texts, check_share, grid_in, shares

MERGES = ("mean", "paste")
Colour = tuple[int, int, int]


class MultiInstanceSampler(Editor):
    """Draw each instance alone for the first part of the schedule, then merge.

    texts, regions: phrase and place of each instance, for every prompt of the run, or a list of
    lists, one for each. share: of the schedule before the merge (0.36 in the official code, 0.1 in
    the paper's figures). start: of the schedule before the instances leave the image, 0 as
    published. merge: "mean" or "paste". outside: text of an instance's image beyond its region,
    None for its phrase everywhere. background: colour (red, green, blue; 0 to 255) of the plain
    surface that the image is kept to there, or one for each prompt. edge: soft border of the
    regions, a fraction of the shorter side. renormalise: keep the standard deviation of each image.
    seed: of the noise that solvers of instances draw, where they draw any.

    share=0, start=share or no instances leave a run bit for bit as it was. Instances are guided by
    the scale that the pipeline's own combination shows, so list this editor before others that
    guide. After a run `spread` holds, for each image, its standard deviation before and after the
    merge.
    """

    def __init__(
        self,
        texts: Texts,
        regions: Places,
        *,
        share: float = 0.36,
        start: float = 0.0,
        merge: Literal["mean", "paste"] = "mean",
        outside: str | None = None,
        background: Colour | Sequence[Colour] | None = None,
        edge: float = 0.0,
        renormalise: bool = False,
        seed: int = 0,
        sites: Selector = "cross, joint",
    ) -> None:
        self.texts = places.texts(texts, f"{self.name}: texts")
        self.regions = places.regions(regions, f"{self.name}: regions")
        self.texts.check_like(self.regions)
        if merge not in MERGES:
            raise InputError(f"{self.name}: merge={merge!r}; give one of {', '.join(MERGES)}")
        self.merge, self.outside, self.renormalise = merge, outside, renormalise
        self.background = (
            None if background is None else _colours(background, f"{self.name}: background")
        )
        self.edge = check_share(edge, f"{self.name}: edge")
        self.start = check_share(start, f"{self.name}: start")
        self.stop = check_share(share, f"{self.name}: share")
        if self.start > self.stop:
            raise InputError(
                f"{self.name}: start={start!r} is after share={share!r}; instances must leave the "
                "image before they are merged"
            )
        self.sites, self.seed = sites, seed
        self._restart()

    def _restart(self) -> None:
        self.spread: list[tuple[float, float]] = []
        self._instances: dict[str, Beside] = {}
        self._left = False
        self._encoded: EncodedTexts | None = None
        self._surface: tuple[Tensor, Tensor] | None = None
        self._divisions: dict[tuple[int, int, Grid], Division] = {}

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        if not hasattr(getattr(target, "scheduler", None), "step"):
            raise UnsupportedError(
                f"{self.name} keeps a solver for each instance: control a pipeline with a scheduler"
            )
        check_texts(target, self._every, self.name)
        if self.background is not None:
            Noise(target.scheduler)

    # -- the instances' own images -----------------------------------------------------------

    def begin(self, state: State) -> None:
        self.regions.check_rows(state.rows)
        self._restart()
        if self.background is not None and self.texts.most:
            self._surface = self._painted(state)
        if self.texts.most:
            self._encoded = EncodedTexts(state, self._every)

    def before(self, state: State) -> None:
        if not self._left:
            self._left = True
            self._instances = {
                f"instance {i}": Beside(f"instance {i}", state, self.seed + i)
                for i in range(self.texts.most)
            }
        for index, instance in enumerate(self._instances.values()):
            assert self._encoded is not None  # there are instances
            if self._surface is not None:
                instance.latents = self._kept(state, instance.latents, index)
            asked = self._asked(state.rows, index)
            instance.predict(state, partial(self._encoded.put, state=state, rows=asked))

    def _painted(self, state: State) -> tuple[Tensor, Tensor]:
        """(x0, eps) of plain surfaces: [images, channels, height, width] each."""
        colours, latents = self.background or [], state.latents
        drawn = len({row.prompt for row in state.rows})
        if len(colours) not in (1, drawn):
            raise InputError(
                f"{self.name}: background has {len(colours)} colours, but the pipeline draws "
                f"{drawn} prompts; give one for all, or one for each"
            )
        if latents.dim() != 4:
            raise UnsupportedError(f"{self.name}: background is for latents [images, c, h, w]")
        factor = state.pipe.vae_scale_factor
        size = (latents.shape[-1] * factor, latents.shape[-2] * factor)
        x0 = [encode(state.pipe, Image.new("RGB", size, colour)) for colour in colours]
        chosen = [x0[row.prompt if len(x0) > 1 else 0] for row in state.images]
        sigma = float(getattr(state.pipe.scheduler, "init_noise_sigma", 1.0))
        return torch.cat(chosen).to(latents), latents / sigma

    def _kept(self, state: State, latents: Tensor, index: int) -> Tensor:
        """An instance's latents, with the plain surface of this step's level beyond its region."""
        assert self._surface is not None  # the caller looked
        level = Noise(state.pipe.scheduler).level(state.clock.timestep)
        surface = level.mix(*self._surface)
        kept = latents.clone()
        for row in state.images:
            region = self.regions[row.prompt][index : index + 1]
            if region:
                share = shares(region, *state.grid[-2:], edge=self.edge).to(latents)
                kept[row.index] = torch.lerp(surface[row.index], latents[row.index], share)
        return kept

    def _asked(self, rows: Rows, index: int) -> dict[int, Text]:
        """The text of every conditional row, by row, in an instance's image."""
        found: dict[int, Text] = {}
        for row in rows.where(role=COND):
            phrases = self.texts[row.prompt]
            if index < len(phrases):
                found[row.index] = phrases[index] if self.outside is None else self.outside
        return found

    def combine(self, predictions: Predictions) -> Tensor:
        """A step of every instance's image, guided as the pipeline guides its own."""
        if self._instances:
            scale = guidance_of(predictions)
            for instance in self._instances.values():
                instance.step(predictions, scale)
        return predictions.guided

    @property
    def _every(self) -> list[Text]:
        given = self.texts.every
        return given if self.outside is None else [*given, self.outside]

    # -- inside a region alone -----------------------------------------------------------------

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        """The phrase of the instance whose image a call is of."""
        drawn = {self._index(row) for row in state.rows} - {None}
        if self.outside is None or not drawn or self._encoded is None:
            return None
        (index,), encoded = drawn, self._encoded
        phrases = [self.texts[row.prompt][index : index + 1] for row in state.rows]
        sequences = [encoded.sequence(p[0] if p else encoded.any) for p in phrases]
        return {self._label: torch.stack(sequences)}

    def attention(self, call: AttentionCall) -> None:
        if self.outside is None:
            return
        for row in call.rows:
            index = self._index(row)
            if index is not None and index < len(self.texts[row.prompt]):
                grid = grid_in(call, self.name)
                call.divide(row, self._division(row.prompt, index, grid))

    @property
    def _label(self) -> str:
        return f"{self.name} {id(self):x}"  # of this editor: there may be several

    def _index(self, row: Row) -> Any:
        """Which instance a row is to show, None if none."""
        names = list(self._instances)
        return names.index(row.branch) if row.branch in names else None

    def _division(self, prompt: int, index: int, grid: Grid) -> Division:
        key = (prompt, index, grid)
        if key not in self._divisions:
            assert self._encoded is not None  # there are instances
            region = self.regions[prompt][index]
            share = shares([region], grid.height, grid.width, edge=self.edge)
            shift = self._encoded.shift(self.texts[prompt][index])
            self._divisions[key] = Division(
                {self._label: share.flatten().repeat(grid.frames)},
                {} if shift is None else {self._label: shift},
            )
        return self._divisions[key]

    # -- the merge -----------------------------------------------------------------------------

    def after(self, state: State) -> None:
        last = replace(state.clock, step=state.clock.step + 1)
        if not self._instances or self.active(last):
            return
        latents = state.latents
        merged = torch.stack([self._merged(latents, row, state) for row in state.images])
        for before, after in zip(latents, merged, strict=True):
            self.spread.append((float(before.std()), float(after.std())))
        self._instances = {}
        state.latents = merged

    def _merged(self, latents: Tensor, image: Row, state: State) -> Tensor:
        own, regions = latents[image.index], self.regions[image.prompt]
        instances = list(self._instances.values())[: len(regions)]
        drawn = [instance.latents[image.index] for instance in instances]
        if not drawn:
            return own
        if self.merge == "mean":
            merged = merge_instances(torch.stack([own, *drawn]))
        else:
            height, width = state.grid[-2:]
            weights = shares(regions, height, width, edge=self.edge).to(own)
            merged = own
            for weight, one in zip(weights, drawn, strict=True):
                merged = merged + over_latent(weight[None], own) * (one - own)
        if self.renormalise:
            middle = merged.mean()
            merged = middle + (merged - middle) * (own.std() / merged.std())
        return merged


def _colours(given: Any, who: str) -> list[Colour]:
    """One colour, or several, as a list."""
    many = [given] if given and isinstance(given[0], int) else list(given)
    for colour in many:
        if len(colour) != 3 or any(not isinstance(c, int) or not 0 <= c <= 255 for c in colour):
            raise InputError(f"{who}={given!r}; give (red, green, blue), each from 0 to 255")
    return [(int(r), int(g), int(b)) for r, g, b in many]
