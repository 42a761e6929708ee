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
time; it does not touch the solvers. S_l and S_t are the scheduler's step, each with a history of
its own model's predictions (`recipes.common.mixture`): with a solver of first order that is the
step of the mixed prediction, with a multistep one it is not where c changes. A layout model that
guides by its latents steps from the latents that it changed, so that c = 1 is that guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor
from typing import Any

import torch
from torch import Tensor

from hookctl.address.per_prompt import Regions
from hookctl.address.rows import COND
from hookctl.address.sites import Selector
from hookctl.arguments import checked, number, share
from hookctl.companions.denoiser import guided_as_the_pipeline
from hookctl.companions.prediction import ModelPrediction
from hookctl.errors import UnsupportedError
from hookctl.kernels.latent_mixing import mix_predictions, update_difference
from hookctl.loop.energy import Energies, ImageMaps
from hookctl.loop.outputs import stacked
from hookctl.loop.solver import entries_of
from hookctl.loop.state import Predictions, Proceed, State, split_branches
from hookctl.recipes.common.energy.layout_models import layout_model
from hookctl.recipes.common.energy.layout_pipeline import LayoutPipeline
from hookctl.recipes.common.energy.map_functions import mean_map
from hookctl.recipes.common.energy.mixture import MixedSteps, Part
from hookctl.recipes.common.energy.word_energy import TEXT_SITES, Subject, WordEnergy, Words
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.run_state import RunState

PAPER_RHO = 1e6
PAPER_SEED = 31
LAYOUT, TEXT, MIXTURE = "layout", "text", "mixture"  # whose history a solver has


class RealCompo(WordEnergy):
    """Mix the pipeline, the text model, with a layout model.

        RealCompo(["circle", "square"], [(0, 0, 0.5, 1), (0.5, 0, 1, 1)])

    words, regions: as many of each, for every prompt or a list for each. layout: the layout model:
    a guidance of the pipeline's own denoiser (by default `LayoutGuidance(words, regions)`; one that
    was given no stop= lasts to the end), another pipeline of the same latent space and scheduler,
    which runs beside this one through its own call, a bare denoiser, or a
    `recipes.common.energy.layout_models.LayoutModel`. layout_arguments: of that pipeline's call,
    such as {"gligen_boxes": ...} or {"image": ...}; prompts, steps, guidance and size are this
    one's. rho: size of the largest change of d in a step. alone: until this fraction of the
    schedule the layout model draws alone. coefficient: a fixed c instead, 0 for the text model (bit
    for bit) and 1 for the layout model. sites: see `WordEnergy`. generator: draws the first d, the
    difference of two draws of N(0, 1); without one d starts at 0. paper: the official code, where d
    moves by rho = 1e6 sqrt(linspace(1, 0.5)) times the gradient of the layout model's maps alone,
    starts from a generator of seed 31, the same for every image, and the edges of boxes are floored
    to cells; and one solver's history is of the mixed prediction. (Its maps are the model's own;
    the official code takes those of a second pass of each block over its own output.)

    Costs the layout model's call beside the text model's, and a partial forward and backward of the
    conditional rows for each model. After a run `d` is the last map, [images, 1, height, width],
    and `record` holds (step, L [images]) of every update.
    """

    d: RunState[Tensor | None] = RunState(None)
    record: RunState[list[tuple[int, Tensor]]] = RunState(factory=list)
    _predicted: RunState[dict[str, Tensor]] = RunState(factory=dict)
    _predicted_of: RunState[Tensor | None] = RunState(None)
    _solvers: RunState[MixedSteps | None] = RunState(None)
    _correction: RunState[Tensor | None] = RunState(None)

    @checked(own=("regions",))
    def __init__(
        self,
        words: Words,
        regions: Regions,
        layout: Any = None,
        *,
        layout_arguments: Mapping[str, Any] | None = None,
        rho: float = 1.0,
        alone: float = 0.4,
        coefficient: float | None = None,
        sites: Selector = None,
        generator: torch.Generator | None = None,
        paper: bool = False,
    ) -> None:
        super().__init__(words, sites=sites)
        self.set_regions(regions)
        self.sites = TEXT_SITES  # also what the layout model reads
        self.rho = number(rho, "RealCompo: rho", low=0)
        self.alone = share(alone, "RealCompo: alone")
        if coefficient is not None:
            share(coefficient, "RealCompo: coefficient")
        given = LayoutGuidance(words, regions) if layout is None else layout
        self.layout = layout_model(
            given, layout_arguments, self.alone if coefficient is None else None
        )
        self.coefficient, self.generator, self.paper = coefficient, generator, paper

    def attach(self, target: Any) -> None:
        super().attach(target)
        self.layout.attach(target, self)

    def begin(self, state: State) -> None:
        super().begin(state)
        self.layout.begin(state)
        x = state.latents
        if x.dim() < 4:
            raise UnsupportedError("RealCompo: packed latents have no places; use a UNet pipeline")
        self.d, self.record, self._predicted = self._first_map(x), [], {}
        models = [MIXTURE] if self.paper else [LAYOUT, TEXT]
        self._solvers = MixedSteps(state.pipe.scheduler, models)

    def _first_map(self, x: Tensor) -> Tensor:
        """d, [images, 1, height, width], for latents x."""
        shape, generator = (1, 1, *x.shape[2:]), self.generator
        if self.paper:
            # Every image's is that of a run of one image; without a generator, of the same seed.
            generator = (
                torch.Generator().manual_seed(PAPER_SEED) if generator is None else generator
            )
        if generator is None:
            return x.new_zeros(len(x), *shape[1:])
        given = generator

        def draw() -> Tensor:
            return torch.randn(shape, generator=given, device=given.device).to(x)

        # Image by image, or one's would depend on how many are drawn beside it.
        each = [draw() - draw() for _ in range(1 if self.paper else len(x))]
        return torch.cat(each).expand(len(x), *shape[1:]).contiguous()

    def denoise(self, state: State, proceed: Proceed) -> Any:
        output = proceed()
        if self.coefficient == 0 or stacked(output) is None:
            return output
        if isinstance(self.layout, LayoutPipeline):
            self.layout.step(state)
        else:
            own = type(state.rows)(state.rows[: state.own_rows])
            prediction, self._predicted_of = self.layout.predict(state)
            self._predicted |= split_branches(own, prediction)
        return output

    def combine(self, predictions: Predictions) -> Tensor:
        predicted, self._predicted = self._predicted, {}
        whole = isinstance(self.layout, LayoutPipeline) and self.coefficient != 0
        if COND not in predicted and not (whole and COND in predictions.branches):
            return predictions.guided
        state, like = predictions.state, predictions.guided
        x, of = state.latents, self._predicted_of
        predicted = {
            k: predictions.handed(v, x if of is None else of) for k, v in predicted.items()
        }
        if isinstance(self.layout, LayoutPipeline):
            layout = self.layout.prediction(state)
            if predictions.own is not None and like is not predictions.own:
                # What editors before this one have added to the guidance.
                layout = replace(layout, guided=layout.guided + (like - predictions.own))
        else:
            of = x if of is None or torch.equal(of, x) else of.to(x)
            guided = guided_as_the_pipeline(
                predictions, predicted, editor=self.name, model="the layout model"
            )
            layout = ModelPrediction(predicted[COND].to(like), guided, of)
        text = ModelPrediction(predictions[COND].to(like), like, x)
        self._update(state, layout, text)
        mixed, c = self._mixed(state, layout.guided, text.guided)
        self._correction = self._solver_correction(predictions, mixed, layout, text, c)
        return mixed

    def after(self, state: State) -> None:
        correction, self._correction = self._correction, None
        if correction is not None:
            state.latents = state.latents + correction.to(state.latents)
        if isinstance(self.layout, LayoutPipeline) and state.clock.step == state.clock.steps - 1:
            self.layout.finish()

    # -- the mixture ---------------------------------------------------------------------------

    def _mixed(self, state: State, layout: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture of the guided predictions, and c."""
        assert self.d is not None  # since `begin`
        step, steps, _ = _outer_step(state)
        c = self.coefficient
        if c is None and step >= int(self.alone * steps + 1e-9):
            return mix_predictions(layout, text, self.d[:, 0]), self.d.sigmoid()
        c = 1.0 if c is None else c
        mixed = layout if c == 1 else torch.lerp(text, layout, c)
        return mixed, torch.full_like(self.d, c)

    def _solver_correction(
        self,
        predictions: Predictions,
        mixed: Tensor,
        layout: ModelPrediction,
        text: ModelPrediction,
        c: Tensor,
    ) -> Tensor | None:
        """From the step of the mixed prediction to the mixture of the models' steps."""
        assert self._solvers is not None  # since `begin`
        x = text.latents
        parts = {
            LAYOUT: Part(c, layout.guided, layout.latents),
            TEXT: Part(1 - c, text.guided, x),
        }
        if self.paper:
            of = x if layout.latents is x else x + c * (layout.latents - x)
            parts = {MIXTURE: Part(1.0, mixed, of)}
        step = predictions.state.clock.entry
        return self._solvers.difference(step, mixed, x, parts, predictions.options)

    # -- the map -------------------------------------------------------------------------------

    def _update(self, state: State, layout: ModelPrediction, text: ModelPrediction) -> None:
        """Move d, [images, 1, ...], by the gradient of L."""
        step, steps, begins = _outer_step(state)
        if self.coefficient is not None or not self.subjects or not self.rho or not begins:
            return
        assert self.d is not None  # since `begin`
        a, b = layout.trial_step(state), text.trial_step(state)
        gradient = self._gradient(state, b + self.d.sigmoid() * (a - b))
        rho = self.rho
        if self.paper:
            passed = step / max(steps - 1, 1)
            rho = PAPER_RHO * (1 - 0.5 * passed) ** 0.5
        d = update_difference(self.d[:, 0], gradient, a, b, rho, largest=not self.paper)
        self.d = d[:, None]

    def _gradient(self, state: State, x: Tensor) -> Tensor:
        """The gradient of L to the trial latents x."""

        def measure(at: State) -> Energies:
            return self.energies_of(at, self.energy, latents=x)

        of_layout = self.layout.energies(state, measure)
        found = [] if of_layout is None else [of_layout]
        if of_layout is None or not self.paper:
            found.append(measure(state))
        self.record.append((state.clock.step, torch.stack([f.values for f in found]).sum(0)))
        gradients = [f.gradient for f in found if f.gradient is not None]
        return torch.stack(gradients).sum(0).to(x)

    def energy(self, image: ImageMaps) -> Tensor:
        """Sum over objects of 1 - the share of attention inside, of one image."""
        subjects: Sequence[Subject] = self.subjects.get(image.row.prompt, ())
        if not subjects:
            return image.latents.new_zeros(())
        maps = mean_map(image.maps)
        losses = []
        for subject in subjects:
            m = maps[..., list(subject.columns)].sum(-1)
            inside = (m * subject.mask(maps, floor if self.paper else None)).sum()
            losses.append(1 - inside / m.sum().clamp_min(torch.finfo(m.dtype).tiny))
        return torch.stack(losses).sum()


def _outer_step(state: State) -> tuple[int, int, bool]:
    """Which step a call belongs to, of how many, and whether it begins it.

    A timestep that comes twice (PNDM, Heun) belongs to one step, of two calls.
    """
    clock = state.clock
    every = [float(t) for t in state.pipe.scheduler.timesteps]
    times = every[clock.skipped : clock.skipped + clock.steps]
    if len(set(times)) == len(times):
        return clock.step, clock.steps, True
    for step, entries in enumerate(entries_of(times)):
        if clock.step in entries:
            return step, len(set(times)), clock.step == entries[0]
    raise AssertionError(f"step {clock.step} is not among {times}")
