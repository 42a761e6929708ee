"""RealCompo: a layout model and a text model on one latent, mixed place by place.

Zhang et al., "RealCompo: Balancing Realism and Compositionality Improves Text-to-Image Diffusion
Models", arXiv 2402.12908 (NeurIPS 2024). With predictions e_l of a model that keeps a layout and
e_t of one that draws well, each with classifier-free guidance, and a map d for each image, every
step

    c = sigmoid(d),   x' = c T(e_l) + (1 - c) T(e_t)                   trial, conditional rows alone
    L = sum over objects and models of 1 - (attention inside) / (attention)        of the maps of x'
    d <- d - 2 rho c (1 - c) sum_channels grad_x' L (T(e_l) - T(e_t))
    x <- c S_l(e_l) + (1 - c) S_t(e_t)                                c = 1 in the first 2/5

The paper's two influence maps get opposite gradients, so their difference d is all there is. The
trial T is a deterministic step of first order in the scheduler's space, seen at the step's own
time; it doesn't touch the solvers. S_l and S_t are the scheduler's step, each with a history of its
own model's predictions (`loop.mixture`): with a solver of first order that is the step of the mixed
prediction, with a multistep one it is not where c changes. A layout model that guides by its
latents steps from where it moved them, so that c = 1 is that guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.address.sites import Selector
from hookctl.errors import InputError, UnsupportedError
from hookctl.kernels.latent_mixing import mix_predictions, update_difference
from hookctl.loop.calls import prediction_of
from hookctl.loop.energy import Energies, ImageMaps
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions, Proceed, State, split_branches
from hookctl.recipes.common.energy_guidance import (
    ATTENDING,
    Subject,
    WordEnergy,
    Words,
    level_of,
    mean_map,
)
from hookctl.recipes.common.layout_models import layout_model
from hookctl.recipes.common.mixture import MixedSteps, Part
from hookctl.recipes.common.perturbed_guidance import number
from hookctl.recipes.common.places import Places, check_share
from hookctl.recipes.layout_guidance import LayoutGuidance

PAPER_RHO = 1e6
PAPER_SEED = 31
LAYOUT, TEXT, MIXTURE = "layout", "text", "mixture"  # whose history a solver has


@dataclass(frozen=True, eq=False)
class Guess:
    """What a model predicts in a step: conditional, and guided; and of which latents."""

    cond: Tensor
    guided: Tensor
    latents: Tensor


class RealCompo(WordEnergy):
    """Mix the pipeline, the text model, with a layout model.

    words, regions: as many of each, for every prompt or a list for each. layout: the layout model:
    a guidance of the pipeline's own denoiser (by default `LayoutGuidance(words, regions)`), another
    pipeline or denoiser of the same latent space, or an object as in `recipes.layout_models`.
    rho: size of the largest change of d in a step. alone: until this fraction of the schedule the
    layout model draws alone. coefficient: a fixed c instead, 0 for the text model (bit for bit)
    and 1 for the layout model. generator: draws the first d, from N(0, 2); without one d starts at
    0. paper: the official code, where d moves by rho = 1e6 sqrt(linspace(1, 0.5)) times the
    gradient of the layout model's maps alone, and starts from a generator of seed 31; and one
    solver's history is of the mixed prediction.

    Costs the layout model's call beside the text model's, and a partial forward and backward of the
    conditional rows for each model.
    """

    def __init__(
        self,
        words: Words,
        regions: Places,
        layout: Any = None,
        *,
        rho: float = 1.0,
        alone: float = 0.4,
        coefficient: float | None = None,
        sites: Selector = None,
        generator: torch.Generator | None = None,
        paper: bool = False,
    ) -> None:
        super().__init__(words, regions, sites)
        self.sites = ATTENDING  # also what the layout model reads
        self.layout = layout_model(LayoutGuidance(words, regions) if layout is None else layout)
        self.rho = number(rho, "RealCompo: rho")
        self.alone = check_share(alone, "RealCompo: alone")
        if coefficient is not None:
            check_share(coefficient, "RealCompo: coefficient")
        if generator is None and paper:
            generator = torch.Generator().manual_seed(PAPER_SEED)
        self.coefficient, self.generator, self.paper = coefficient, generator, paper
        self.d: Tensor | None = None
        self.record: list[tuple[int, Tensor]] = []
        self._found: dict[str, Tensor] = {}
        self._seen: Tensor | None = None  # the latents that `_found` is of
        self._steps: MixedSteps | None = None
        self._missing: Tensor | None = None  # from the pipeline's next latents

    def attach(self, target: Any) -> None:
        super().attach(target)
        self.layout.attach(target, self)

    def begin(self, state: State) -> None:
        super().begin(state)
        self.layout.begin(state)
        x = state.latents
        if x.dim() < 4:
            raise UnsupportedError("RealCompo: packed latents have no places; use a UNet pipeline")
        shape = (len(x), 1, *x.shape[2:])
        drawn = torch.zeros(shape)
        if self.generator is not None:
            drawn = 2**0.5 * torch.randn(
                shape, generator=self.generator, device=self.generator.device
            )
        self.d, self.record, self._found = drawn.to(x), [], {}
        names = [MIXTURE] if self.paper else [LAYOUT, TEXT]
        self._steps = MixedSteps(state.pipe.scheduler, names)

    def denoise(self, state: State, proceed: Proceed) -> Any:
        out = proceed()
        if self.coefficient != 0 and prediction_of(out) is not None:
            own = type(state.rows)(state.rows[: state.own_rows])
            found, self._seen = self.layout.predict(state)
            self._found |= split_branches(own, found)
        return out

    def combine(self, predictions: Predictions) -> Tensor:
        found, self._found = self._found, {}
        if COND not in found:
            return predictions.guided
        state, like = predictions.state, predictions.guided
        x, seen = state.latents, self._seen
        seen = x if seen is None or torch.equal(seen, x) else seen.to(x)
        layout = Guess(found[COND].to(like), _guided(predictions, found), seen)
        text = Guess(predictions[COND].to(like), like, x)
        self._update(state, layout, text)
        mixed, c = self._mixed(state, layout.guided, text.guided)
        self._missing = self._between(predictions, mixed, layout, text, c)
        return mixed

    def _mixed(self, state: State, layout: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture of the predictions, and c."""
        assert self.d is not None  # since `begin`
        steps = int(self.alone * state.clock.steps + 1e-9)
        share = self.coefficient
        if share is None and state.clock.step >= steps:
            return mix_predictions(layout, text, self.d[:, 0]), self.d.sigmoid()
        share = 1.0 if share is None else share
        mixed = layout if share == 1 else torch.lerp(text, layout, share)
        return mixed, torch.full_like(self.d, share)

    def after(self, state: State) -> None:
        missing, self._missing = self._missing, None
        if missing is not None:
            state.latents = state.latents + missing.to(state.latents)

    def _between(
        self, predictions: Predictions, mixed: Tensor, layout: Guess, text: Guess, c: Tensor
    ) -> Tensor | None:
        """The way from the step of the mixed prediction to the mixture of the models' steps."""
        assert self._steps is not None  # since `begin`
        x = text.latents
        parts = {
            LAYOUT: Part(c, layout.guided, layout.latents),
            TEXT: Part(1 - c, text.guided, x),
        }
        if self.paper:
            seen = x if layout.latents is x else x + c * (layout.latents - x)
            parts = {MIXTURE: Part(1.0, mixed, seen)}
        step = predictions.state.clock.step
        return self._steps.difference(step, mixed, x, parts, predictions.options)

    def _update(self, state: State, layout: Guess, text: Guess) -> None:
        """d after this step, [images, 1, ...]."""
        if self.coefficient is not None or not self.subjects or not self.rho:
            return
        assert self.d is not None  # since `begin`
        a, b = (self._trial(state, guess) for guess in (layout, text))
        pull = self._pull(state, b + self.d.sigmoid() * (a - b))
        rate = self.rho
        if self.paper:
            share = state.clock.step / max(state.clock.steps - 1, 1)
            rate = PAPER_RHO * (1 - 0.5 * share) ** 0.5
        d = update_difference(self.d[:, 0], pull, a, b, rate, largest=not self.paper)
        self.d = d[:, None]

    def _trial(self, state: State, guess: Guess) -> Tensor:
        """T: where a model's conditional prediction leads by a step of first order."""
        noise = Noise(state.pipe.scheduler)
        there = noise.after(state.pipe.scheduler.timesteps[state.clock.step])
        return there.mix(*noise.split(guess.latents, guess.cond, level_of(state)))

    def _pull(self, state: State, x: Tensor) -> Tensor:
        """The gradient of L to the trial latents."""

        def measure(at: State) -> Energies:
            return self.measured(at, self.energy, latents=x)

        second = self.layout.measured(state, measure)
        parts = [] if second is None else [second]
        if second is None or not self.paper:
            parts.append(measure(state))
        self.record.append((state.clock.step, torch.stack([p.values for p in parts]).sum(0)))
        total = torch.stack([p.gradient for p in parts if p.gradient is not None]).sum(0)
        return total.to(x)

    def energy(self, image: ImageMaps) -> Tensor:
        """Sum over objects of 1 - the share of attention inside."""
        subjects: Sequence[Subject] = self.subjects.get(image.row.prompt, ())
        if not subjects:
            return image.latents.new_zeros(())
        maps = mean_map(image.maps)
        parts = []
        for subject in subjects:
            m = maps[..., list(subject.columns)].sum(-1)
            inside = (m * subject.mask(maps)).sum()
            parts.append(1 - inside / m.sum().clamp_min(torch.finfo(m.dtype).tiny))
        return torch.stack(parts).sum()


def _guided(predictions: Predictions, found: dict[str, Tensor]) -> Tensor:
    """The layout model's prediction, guided as the pipeline guides its own, with what editors
    before this one have added."""
    like = predictions.guided
    own = like if predictions.own is None else predictions.own
    if UNCOND not in found or UNCOND not in predictions.branches:
        return found[COND].to(like) + (like - own)
    pipe = predictions.state.pipe
    scale = float(getattr(pipe, "guidance_scale", 1.0))
    u, c = found[UNCOND].to(like), found[COND].to(like)
    if not torch.allclose(
        predictions[UNCOND] + scale * (predictions[COND] - predictions[UNCOND]),
        own,
        rtol=1e-2,
        atol=1e-2,
    ):
        raise InputError(
            "RealCompo: the pipeline guides otherwise than by u + scale (c - u), which the layout "
            "model can't follow; leave guidance_rescale 0"
        )
    return u + scale * (c - u) + (like - own)
