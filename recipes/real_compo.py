"""RealCompo: a layout model and a text model on one latent, mixed place by place.

Zhang et al., "RealCompo: Balancing Realism and Compositionality Improves Text-to-Image Diffusion
Models", arXiv 2402.12908 (NeurIPS 2024). With predictions e_l of a model that keeps a layout and
e_t of one that draws well, and a map d for each picture, every turn

    c = sigmoid(d),   x' = x~(c e_l + (1 - c) e_t)                     trial, conditional rows alone
    L = sum over objects and models of 1 - (attention inside) / (attention)        of the maps of x'
    d <- d - 2 rho B c (1 - c) sum_channels grad_x' L (e_l - e_t)
    e = c e_l + (1 - c) e_t,  each with classifier-free guidance; e_l alone in the first 2/5

The paper's two influence maps get opposite gradients, so their difference d is all there is, and
one gradient to the trial latents gives its own by the chain rule: B = dx'/de. The trial is a
deterministic step in the scheduler's space, seen at the turn's own time; it doesn't touch the
solver, whose history is of the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.address.sites import Selector
from hookctl.errors import InputError, UnsupportedError
from hookctl.kernels.latent_mixing import mix_predictions
from hookctl.loop.calls import prediction_of
from hookctl.loop.energy import Energies, Picture
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions, Proceed, State, split_branches
from hookctl.recipes.energy_guidance import (
    ATTENDING,
    Subject,
    WordEnergy,
    Words,
    level_of,
    mean_map,
)
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.recipes.layout_models import layout_model
from hookctl.recipes.perturbation import number
from hookctl.recipes.places import Places, check_share

PAPER_RHO = 1e6
PAPER_SEED = 31


class RealCompo(WordEnergy):
    """Mix the pipeline, the text model, with a layout model.

    words, regions: as many of each, for every prompt or a list for each. layout: the layout model:
    a guidance of the pipeline's own denoiser (by default `LayoutGuidance(words, regions)`), another
    pipeline or denoiser of the same latent space, or an object as in `recipes.layout_models`.
    rho: size of the largest change of d in a turn. alone: until this fraction of the schedule the
    layout model draws alone. coefficient: a fixed c instead, 0 for the text model (bit for bit)
    and 1 for the layout model. generator: draws the first d, from N(0, 2); without one d starts at
    0. paper: the official code, where d moves by rho = 1e6 sqrt(linspace(1, 0.5)) times the
    gradient of the layout model's maps alone, and starts from a generator of seed 31.

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

    def denoise(self, state: State, proceed: Proceed) -> Any:
        out = proceed()
        if self.coefficient != 0 and prediction_of(out) is not None:
            own = state.rows[: state.own_rows]
            self._found |= split_branches(type(state.rows)(own), self.layout.predict(state))
        return out

    def combine(self, predictions: Predictions) -> Tensor:
        found, self._found = self._found, {}
        if COND not in found:
            return predictions.guided
        text, layout = predictions.guided, _guided(predictions, found)
        state, like = predictions.state, predictions.guided
        self._update(state, found[COND].to(like), predictions[COND].to(like))
        turns = int(self.alone * state.clock.turns + 1e-9)
        if self.coefficient == 1 or (self.coefficient is None and state.clock.turn < turns):
            return layout
        if self.coefficient is not None:
            return text + self.coefficient * (layout - text)
        assert self.d is not None  # since `begin`
        return mix_predictions(layout, text, self.d[:, 0])

    def _update(self, state: State, layout: Tensor, text: Tensor) -> None:
        """d after this turn, [pictures, 1, ...]."""
        if self.coefficient is None and self.subjects and self.rho:
            assert self.d is not None
            self.d = self.d - self._change(state, layout, text)

    def _change(self, state: State, layout: Tensor, text: Tensor) -> Tensor:
        assert self.d is not None
        noise, here = Noise(state.pipe.scheduler), level_of(state)
        there = noise.after(state.pipe.scheduler.timesteps[state.clock.turn])
        c = self.d.sigmoid()

        def trial(x: Tensor, prediction: Tensor) -> Tensor:
            return there.mix(*noise.split(x, prediction, here))

        x = trial(state.latents, text + c * (layout - text))
        zero = torch.zeros_like(x)
        b = trial(zero, torch.ones_like(x))  # the trial is affine in the prediction
        pull = self._pull(state, x)
        change = 2 * c * (1 - c) * (b * pull * (layout - text)).sum(1, keepdim=True)
        if self.paper:
            share = state.clock.turn / max(state.clock.turns - 1, 1)
            return change * PAPER_RHO * (1 - 0.5 * share) ** 0.5
        top = change.abs().flatten(1).amax(1).reshape(-1, *([1] * (change.dim() - 1)))
        return self.rho * change / top.clamp_min(torch.finfo(change.dtype).tiny)

    def _pull(self, state: State, x: Tensor) -> Tensor:
        """The gradient of L to the trial latents."""

        def measure(at: State) -> Energies:
            return self.measured(at, self.energy, latents=x)

        second = self.layout.measured(state, measure)
        parts = [] if second is None else [second]
        if second is None or not self.paper:
            parts.append(measure(state))
        self.record.append((state.clock.turn, torch.stack([p.values for p in parts]).sum(0)))
        total = torch.stack([p.gradient for p in parts if p.gradient is not None]).sum(0)
        return total.to(x)

    def energy(self, picture: Picture) -> Tensor:
        """Sum over objects of 1 - the share of attention inside."""
        subjects: Sequence[Subject] = self.subjects.get(picture.row.prompt, ())
        if not subjects:
            return picture.latents.new_zeros(())
        maps = mean_map(picture.maps)
        parts = []
        for subject in subjects:
            m = maps[..., list(subject.columns)].sum(-1)
            inside = (m * subject.mask(maps)).sum()
            parts.append(1 - inside / m.sum().clamp_min(torch.finfo(m.dtype).tiny))
        return torch.stack(parts).sum()


def _guided(predictions: Predictions, found: dict[str, Tensor]) -> Tensor:
    """The layout model's prediction, guided as the pipeline guides its own."""
    like = predictions.guided
    if UNCOND not in found or UNCOND not in predictions.branches:
        return found[COND].to(like)
    pipe = predictions.state.pipe
    scale = float(getattr(pipe, "guidance_scale", 1.0))
    u, c = found[UNCOND].to(like), found[COND].to(like)
    if not torch.allclose(
        predictions[UNCOND] + scale * (predictions[COND] - predictions[UNCOND]),
        like,
        rtol=1e-2,
        atol=1e-2,
    ):
        raise InputError(
            "RealCompo: the pipeline or another editor guides otherwise than by u + scale (c - u), "
            "which the layout model can't follow; put RealCompo first and leave guidance_rescale 0"
        )
    return u + scale * (c - u)
