"""Guidance by an energy of attention maps: what the box and subject recipes share.

Before a step's denoiser call, while an editor's window lasts,

    x <- x - rho grad_x L(maps of x)

once, or again and again until the energy is low enough (refinement). Every image of a batch has
its own energy and stops by itself. What the papers say of latents in alpha-bar space holds for
sigma space and flows too: with x at a level of signal a and noise s, x / r, r^2 = a^2 + s^2, is
where their step is taken, and a step rho there is a step r^2 rho here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.latent import finest_within
from hookctl.address.regions import Region
from hookctl.address.rows import COND
from hookctl.address.sites import Selector, Site, select
from hookctl.address.text import PromptText, TextLayout
from hookctl.editor import WHOLE_IMAGE, Claim
from hookctl.errors import InputError, SelectorError, UnsupportedError
from hookctl.loop.energy import Energies, ImageMaps, MapReader, energies
from hookctl.loop.noise import Level, Noise
from hookctl.loop.state import State
from hookctl.recipes.common import places
from hookctl.recipes.common.perturbed_guidance import number
from hookctl.recipes.common.places import Places

Words = Sequence[str] | Sequence[Sequence[str]]
Stage = Literal["refine", "update", "refined"]  # the last: an update after a refinement

ATTENDING = "cross, joint"  # where the image attends to the text


@dataclass(frozen=True, eq=False)
class Subject:
    """A word of one prompt: the columns of its tokens in the maps, and where it belongs."""

    word: str
    columns: tuple[int, ...]
    region: Region | None = None

    def mask(self, like: Tensor) -> Tensor:
        """Which cells of a map's grid [..., height, width, tokens] are inside: [height, width]."""
        assert self.region is not None
        height, width = like.shape[-3:-1]
        return self.region.tokens(height, width).reshape(height, width).to(like)


class WordEnergy(MapReader):
    """An editor with an energy of the maps of some words.

    words: for every prompt of a run, or a list of them for each; regions: as many. A word of
    several tokens, or one that stands several times, is all of them. sites: which maps; by default
    those of the grids that hold the layout (`address.layout`).
    """

    whole_text = False  # whether the energy compares the words with all other tokens
    reader: MapReader | None = None  # who reads in the stack, if not this editor itself

    def __init__(self, words: Words, regions: Places | None, sites: Selector) -> None:
        self.words = places.texts(words, f"{self.name}: words")
        self.regions = None
        if regions is not None:
            self.regions = places.regions(regions, f"{self.name}: regions")
            self.regions.check_like(self.words)
        self.chosen, self.sites = sites, ATTENDING if sites is None else sites
        self.subjects: dict[int, list[Subject]] = {}
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._paths: tuple[str, ...] = ()

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        denoiser = denoiser_of(target)
        if target is denoiser:
            raise InputError(f"{self.name}: a bare denoiser has no words; control the pipeline")
        self._layout = TextLayout(target)
        every = [site for site, _ in describe_sites(denoiser)]
        self._sites = select(every, self.chosen or ATTENDING, who=self.name)
        if self._sites and not any(site.kind in ("cross", "joint") for site in self._sites):
            raise SelectorError(
                f"{self.name}: sites={self.sites!r} are no sites where the image attends to the "
                "text; give cross or joint sites, such as 'cross up'"
            )

    def begin(self, state: State) -> None:
        """Find the words and the sites of a run."""
        if not state.prompts:
            raise InputError(
                f"{self.name}: the pipeline was called without text prompts (with embeddings?), so "
                "words can't be found; call it with prompt="
            )
        self.words.check_rows(state.rows)
        if self.regions is not None:
            self.regions.check_rows(state.rows)
        self.subjects, self._tokens = {}, {}
        for p, prompt in enumerate(state.prompts):
            self._read_prompt(p, prompt, state.own_text)
        self._paths = tuple(site.path for site in self.layout_sites(state))

    def _read_prompt(self, p: int, prompt: str, length: int | None) -> None:
        text = self._layout.read(prompt, length)
        found = [text.find(word) for word in self.words[p]]
        if not found:
            return
        tokens = tuple(sorted({position for positions in found for position in positions}))
        if self.whole_text:
            tokens = compared(text)
        place = {position: column for column, position in enumerate(tokens)}
        regions = [None] * len(found) if self.regions is None else self.regions[p]
        self._tokens[p] = tokens
        self.subjects[p] = [
            Subject(word, tuple(place[t] for t in positions if t in place), region)
            for word, positions, region in zip(self.words[p], found, regions, strict=True)
        ]

    def layout_sites(self, state: State) -> Sequence[Site]:
        """The sites to read in a run."""
        sites = [site for site in self._sites if site.kind in ("cross", "joint")]
        if self.chosen is not None:
            return sites
        finest = finest_within(sites, state.grid) if state.grid else None
        if finest is None:
            raise UnsupportedError(
                f"{self.name}: this model doesn't tell the grids of its attention sites; give "
                "sites= yourself, such as 'cross up1'"
            )
        return [site for site in sites if site.resolution == finest]

    def measured(self, state: State, scalar: Any, **options: Any) -> Energies:
        """The energies of a call's images by a scalar of the maps of the words."""
        return energies(
            state,
            scalar,
            reader=self.reader or self,
            sites=self._paths,
            tokens=self._tokens,
            heads=self.heads,
            **options,
        )


class EnergyGuidance(WordEnergy, ABC):
    """An editor that takes latents downhill.

    record: (step, energies [images]) of every denoiser call that it made in the last run;
    staged: whether the energy is another one in a refinement.
    """

    staged = False

    def __init__(
        self,
        words: Words,
        regions: Places | None,
        scale: float,
        sites: Selector,
        start: float,
        stop: float,
    ) -> None:
        super().__init__(words, regions, sites)
        self.scale = number(scale, f"{self.name}: scale")
        self.start, self.stop = start, stop
        self.window()
        self.record: list[tuple[int, Tensor]] = []
        self._last: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        """L of one image; or [L, what is compared with the bound of the refinement]."""

    @abstractmethod
    def step(self, clock: Clock, level: Level) -> float:
        """rho at this time, for latents in the scheduler's own space."""

    def refinement(self, clock: Clock) -> tuple[float, int]:
        """The bound below which a refinement ends, and how many steps it may take."""
        return 0.0, 0

    def updates(self, clock: Clock) -> bool:
        """Whether a step is taken after the refinement, whatever the energy."""
        return True

    def begin(self, state: State) -> None:
        super().begin(state)
        self.record, self._last = [], None

    def before(self, state: State) -> None:
        moved = self.moved(state)
        if moved is not None:
            state.latents = moved

    def moved(self, state: State) -> Tensor | None:
        """The latents of a call after this step's steps, None if none is taken."""
        if self.scale == 0 or not self.subjects:
            return None
        given = state.latents
        if self._last is not None and torch.equal(self._last[0], given):
            return self._last[1]  # another call of the same step: of the other branch
        if state.rows.where(branch=COND):
            guided = self.guided(state).to(given)
            if not torch.isfinite(guided).all():
                raise UnsupportedError(
                    f"{self.name}: the gradient in {state.kwargs[state.sample].dtype} isn't "
                    "finite; run the denoiser in float32 or bfloat16, or lower scale="
                )
            self._last = given, guided
            return guided
        return None

    def guided(self, state: State) -> Tensor:
        """The latents of a call after this step's steps, [images, ...]."""
        x, found = state.latents, None
        bound, most = self.refinement(state.clock)
        stages: list[Stage] = ["update"] * len(x)
        for _ in range(most):
            found = self._energies(state, x, ["refine"] * len(x))
            active = found.terms[:, -1] > bound
            if not active.any():
                break
            x, found = self._stepped(state, x, found, active), None
            stages = ["refined" if on else s for s, on in zip(stages, active.tolist(), strict=True)]
        if self.updates(state.clock):
            if found is None or self.staged:
                found = self._energies(state, x, stages)
            x = self._stepped(state, x, found, found.values != 0)
        return x

    def _energies(self, state: State, x: Tensor, stages: Sequence[Stage]) -> Energies:
        """stages: of each image."""
        rows = state.rows.where(branch=COND)
        by_key = {(r.prompt, r.image): s for r, s in zip(rows, stages, strict=True)}

        def scalar(image: ImageMaps) -> Tensor:
            row = image.row
            subjects = self.subjects.get(row.prompt, ())
            if not subjects:
                return image.latents.new_zeros(2)
            found = self.energy(image, subjects, by_key[row.prompt, row.image])
            return found if found.dim() else found.repeat(2)

        found = self.measured(state, scalar, latents=x)
        self.record.append((state.clock.step, found.values))
        return found

    def _stepped(self, state: State, x: Tensor, found: Energies, active: Tensor) -> Tensor:
        assert found.gradient is not None
        rho = self.step(state.clock, level_of(state))
        gates = active.reshape(-1, *([1] * (x.dim() - 1)))
        return torch.where(gates, x - rho * found.gradient, x.to(found.gradient))


def whole(value: Any, name: str, least: int = 0) -> int:
    """A whole number of at least `least`, or InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r}; give a whole number of {least} or more")
    return value


def compared(text: PromptText) -> tuple[int, ...]:
    """The tokens that compete for attention: all but the one that begins the text, which draws
    most of it, and the last of the padding."""
    return tuple(
        start + position
        for start, prompt in text.streams
        for position in range(prompt.start, max(prompt.end, prompt.length - 1))
    )


def level_of(state: State) -> Level:
    """Signal and noise of the latents of a call."""
    scheduler = state.pipe.scheduler
    return Noise(scheduler).level(scheduler.timesteps[state.clock.step])


def variance(level: Level) -> float:
    """r^2 = a^2 + s^2, by which a step in alpha-bar space is multiplied for this level's space."""
    return level.signal**2 + level.noise**2


def mean_map(maps: Mapping[Site, Tensor]) -> Tensor:
    """The mean over heads and sites, on the finest grid: [frames, height, width, tokens]."""
    means = [one.mean(1) for one in maps.values()]
    height, width = max((one.shape[1:3] for one in means), key=lambda size: size[0] * size[1])
    return torch.stack([_resized(one, height, width) for one in means]).mean(0)


def _resized(one: Tensor, height: int, width: int) -> Tensor:
    if one.shape[1:3] == (height, width):
        return one
    moved = F.interpolate(one.movedim(-1, 1), size=(height, width), mode="bilinear")
    return moved.movedim(1, -1)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Maps [..., height, width] under a Gaussian of 3 x 3 cells."""
    edge = torch.tensor(-0.5 / sigma**2).exp().item()
    kernel = maps.new_tensor([edge, 1.0, edge]) / (1 + 2 * edge)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = F.pad(flat, (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None]).reshape(maps.shape)
