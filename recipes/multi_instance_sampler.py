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
`outside=""`, nothing beyond, prevents that. With `start` the instances get images of their own
later, once something else in the stack, such as layout guidance, has laid out the whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hookctl.address import per_prompt
from hookctl.address.latent import over_latent
from hookctl.address.per_prompt import Regions, Texts
from hookctl.address.rows import COND, Row, Rows
from hookctl.address.sites import Grid, Selector
from hookctl.arguments import Colour, checked, colours, one_of
from hookctl.arguments import share as check_share
from hookctl.attention.call import AttentionCall
from hookctl.attention.division import Division
from hookctl.companions.denoiser import guidance_scale_of
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.kernels.latent_mixing import merge_instances
from hookctl.loop.noise import Noise
from hookctl.loop.prompts import EncodedTexts, Text, check_texts
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.canvas.companion import Companion
from hookctl.recipes.common.canvas.plain_colours import Surface
from hookctl.recipes.common.canvas.region_shares import region_shares
from hookctl.recipes.common.sites import grid_of, text_sites
from hookctl.run_state import RunState

MERGES = ("mean", "paste")


class MultiInstanceSampler(Editor):
    """Draw each instance alone for the first part of the schedule, then merge.

    texts, regions: phrase and place of each instance, for every prompt of the run, or a list of
    lists, one for each. share: of the schedule before the merge (0.36 in the official code, 0.1 in
    the paper's figures). start: of the schedule before the instances get images of their own, 0 as
    published. merge: "mean" or "paste". outside: text of an instance's image beyond its region,
    None for its phrase everywhere. background: colour (red, green, blue; 0 to 255) of the plain
    surface beyond the region, or one for each prompt; None for none. edge: soft border of the
    regions, a fraction of the shorter side. renormalise: keep the standard deviation of each image.
    seed: of the noise that solvers of instances draw, where they draw any.

    share=0, start=share or no instances leave a run bit for bit as it was. Instances are guided by
    the scale that the pipeline's own combination shows, so list this editor before others that
    guide. After a run `spread` holds, for each image, its standard deviation before and after the
    merge.
    """

    spread: RunState[list[tuple[float, float]]] = RunState(factory=list)
    _instances: RunState[dict[str, Companion] | None] = RunState(None)
    _encoded: RunState[EncodedTexts | None] = RunState(None)
    _surface: RunState[Surface | None] = RunState(None)
    _divisions: RunState[dict[tuple[int, int, Grid], Division]] = RunState(factory=dict)

    @checked(own=("texts", "regions"))
    def __init__(
        self,
        texts: Texts,
        regions: Regions,
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
        self.texts = per_prompt.texts(texts, f"{self.name}: texts")
        self.regions = per_prompt.regions(regions, f"{self.name}: regions")
        self.texts.check_lengths(self.regions)
        self.merge = one_of(merge, f"{self.name}: merge", MERGES)
        self.outside, self.renormalise = outside, renormalise
        self.background = (
            None if background is None else colours(background, f"{self.name}: background")
        )
        self.edge = check_share(edge, f"{self.name}: edge")
        self.start = check_share(start, f"{self.name}: start")
        self.stop = check_share(share, f"{self.name}: share")
        if self.start > self.stop:
            raise InputError(
                f"{self.name}: start={start!r} is after share={share!r}; give instances images of "
                "their own before they are merged"
            )
        self.sites, self.seed = sites, seed
        self._restart()

    def _restart(self) -> None:
        self.spread = []
        self._instances = None  # none before `start`
        self._encoded = None
        self._surface = None
        self._divisions = {}

    def neutral(self) -> bool | None:
        return None if self.regions.longest else True

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        if not hasattr(getattr(target, "scheduler", None), "step"):
            raise UnsupportedError(
                f"{self.name} keeps a solver for each instance: control a pipeline with a scheduler"
            )
        check_texts(target, self._all_texts, self.name)
        if self.outside is not None:
            text_sites(self.name, target, self.sites)
        if self.background is not None:
            Noise(target.scheduler)

    @property
    def _all_texts(self) -> list[Text]:
        texts = self.texts.items
        return texts if self.outside is None else [*texts, self.outside]

    # -- the instances' own images -----------------------------------------------------------

    def begin(self, state: State) -> None:
        images = state.images_in_sequence
        if images is not None and images.references:
            raise UnsupportedError(
                f"{self.name} draws latents of its own for each instance, and those of this run of "
                f"{type(state.pipe).__name__} have reference images behind them; leave the "
                "references out"
            )
        self.regions.check_prompts(state.rows)
        self._restart()
        if self.texts.longest:
            if self.background is not None:
                self._surface = Surface(self.name, state, self.background)
            self._encoded = EncodedTexts(state, self._all_texts)
            self._encoded.check_fit(state, self.name)

    def before(self, state: State) -> None:
        if self._instances is None:
            names = [f"instance {i}" for i in range(self.texts.longest)]
            self._instances = {
                name: Companion(name, state, self.seed + i) for i, name in enumerate(names)
            }
        for index, instance in enumerate(self._instances.values()):
            assert self._encoded is not None  # there are instances
            if self._surface is not None:
                instance.latents = self._over_surface(self._surface, state, instance, index)
            texts = self._texts_of(state.rows, index)
            instance.predict(state, partial(self._encoded.put, state=state, rows=texts))

    def _over_surface(
        self, surface: Surface, state: State, instance: Companion, index: int
    ) -> Tensor:
        """An instance's latents, with the plain surface of this step's level beyond its region."""
        surfaces, latents = surface.at(state), instance.latents.clone()
        for row in state.images:
            region = self.regions[row.prompt][index : index + 1]
            if region:
                weight = region_shares(region, *state.grid[-2:], edge=self.edge).to(latents)
                latents[row.index] = torch.lerp(surfaces[row.index], latents[row.index], weight)
        return latents

    def _texts_of(self, rows: Rows, index: int) -> dict[int, Text]:
        """The text of every conditional row, by its index, in an instance's image."""
        texts: dict[int, Text] = {}
        for row in rows.where(role=COND):
            phrases = self.texts[row.prompt]
            if index < len(phrases):
                texts[row.index] = phrases[index] if self.outside is None else self.outside
        return texts

    def combine(self, predictions: Predictions) -> Tensor:
        """A step of every instance's image, guided as the pipeline guides its own."""
        if self._instances:
            scale = guidance_scale_of(predictions)
            for instance in self._instances.values():
                instance.step(predictions, scale)
        return predictions.guided

    # -- inside a region alone -----------------------------------------------------------------

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        """The phrase of the instance whose image a call is of."""
        instances = {self._instance_of(row) for row in state.rows} - {None}
        if self.outside is None or not instances or self._encoded is None:
            return None
        (index,), encoded = instances, self._encoded
        phrases = {row.prompt: self.texts[row.prompt][index : index + 1] for row in state.rows}
        found = {p: encoded.sequence(t[0] if t else encoded.any) for p, t in phrases.items()}
        if encoded.of_one_length:
            return {self._label(0): torch.stack([found[row.prompt] for row in state.rows])}
        return {self._label(prompt): text[None] for prompt, text in found.items()}

    def attention(self, call: AttentionCall) -> None:
        if self.outside is None:
            return
        for row in call.rows:
            index = self._instance_of(row)
            if index is not None and index < len(self.texts[row.prompt]):
                grid = grid_of(call, self.name)
                call.divide(row, self._division(row.prompt, index, grid))

    def _label(self, prompt: int) -> str:
        """Of the text of a prompt's rows: one for all where they have as many tokens."""
        name = f"{self.name} {id(self):x}"  # of this editor: there may be several
        alike = self._encoded is None or self._encoded.of_one_length
        return name if alike else f"{name} {prompt}"

    def _instance_of(self, row: Row) -> Any:
        """The index of the instance whose image a row is of, None if it is the whole image's."""
        names = list(self._instances or ())
        return names.index(row.branch) if row.branch in names else None

    def _division(self, prompt: int, index: int, grid: Grid) -> Division:
        key = (prompt, index, grid)
        if key not in self._divisions:
            assert self._encoded is not None  # there are instances
            region = self.regions[prompt][index]
            weight = region_shares([region], grid.height, grid.width, edge=self.edge)
            shift, label = self._encoded.shift(self.texts[prompt][index]), self._label(prompt)
            self._divisions[key] = Division(
                {label: weight.flatten().repeat(grid.frames)},
                {} if shift is None else {label: shift},
            )
        return self._divisions[key]

    # -- the merge -----------------------------------------------------------------------------

    def after(self, state: State) -> None:
        next_step = replace(state.clock, step=state.clock.step + 1)
        if not self._instances or self.active(next_step):
            return
        latents, instances = state.latents, list(self._instances.values())
        merged = torch.stack([self._merged(latents, row, instances, state) for row in state.images])
        for before, after in zip(latents, merged, strict=True):
            self.spread.append((float(before.std()), float(after.std())))
        self._instances = {}
        state.latents = merged

    def _merged(
        self, latents: Tensor, image: Row, instances: Sequence[Companion], state: State
    ) -> Tensor:
        """The latents of one image and of its instances as one, [channels, ...]."""
        own, regions = latents[image.index], self.regions[image.prompt]
        of_instances = [one.latents[image.index] for one in instances[: len(regions)]]
        if not of_instances:
            return own
        if self.merge == "mean":
            merged = merge_instances(torch.stack([own, *of_instances]))
        else:
            height, width = state.grid[-2:]
            weights = region_shares(regions, height, width, edge=self.edge).to(own)
            merged = own
            for weight, one in zip(weights, of_instances, strict=True):
                merged = merged + over_latent(weight[None], own, state.axes) * (one - own)
        if self.renormalise:
            mean = merged.mean()
            merged = mean + (merged - mean) * (own.std() / merged.std())
        return merged
