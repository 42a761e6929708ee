"""Collaborative Diffusion: several models on one latent, trusted place by place and step by step.

Huang et al., "Collaborative Diffusion for Multi-Modal Face Generation and Editing", arXiv
2304.10530 (CVPR 2023). Each modality m has a model and a *dynamic diffuser* D_m, a small network
that says how far the model is to be trusted where. In every step, per pixel,

    a_m = D_m(z_t, t, c_m)  [images, 1, h, w],   I = softmax over m of a,   eps = sum_m I_m eps_m

The published models know no classifier-free guidance. With it each model is guided by itself,
eps_m = u_m + s (c_m - u_m), and the D_m see the conditional rows alone: a share is of a model, not
of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.rows import COND
from hookctl.arguments import checked, number, share
from hookctl.arguments.values import is_list
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.collaborative.collaborator import Collaborator
from hookctl.learned.collaborative.influence import InfluenceMaps, led, shares_of
from hookctl.learned.collaborative.models import Model, model_of
from hookctl.loop.noise import Noise
from hookctl.loop.outputs import prediction_of
from hookctl.loop.state import Predictions, Proceed, State
from hookctl.run_state import RunState

FLOATS = (torch.float32, torch.float64)


class CollaborativeDiffusion(Editor):
    """Mix the predictions of several models by their influence maps.

        text = Collaborator("text", influence_of_text)  # the pipeline's own denoiser
        mask = Collaborator("mask", influence_of_mask, mask_unet, condition=mask_tokens)
        edit = CollaborativeDiffusion([mask, text])
        with hookctl.control(pipe, edit):
            image = pipe("a face with a beard").images[0]
        edit.influence.sheet(image).save("influence.png")

    models: any number of `Collaborator`. strength: 1 for the mixture, 0 for the pipeline's own
    prediction (bit for bit), between them a share of both. start, stop: fractions of the schedule.
    paper: the official sampler's schedule, in which one model leads early and fades
    (`influence.led`), whatever the maps say; leader: its name, by default the first one's; factor:
    how far it leads, 2 as published. (The official code also draws with eta = 1, an argument of
    the pipeline's call.)

    Costs, in a step, each model's call and each D's for the conditional rows. A whole pipeline as a
    model also runs, unused, before `start`: it draws step by step. `influence` has the maps of the
    last run, by step (`InfluenceMaps`).
    """

    influence: RunState[InfluenceMaps] = RunState(factory=InfluenceMaps)
    _logits: RunState[Tensor | None] = RunState(None)
    _parts: RunState[dict[str, dict[str, Tensor]]] = RunState(factory=dict)

    @checked(own=("models",))
    def __init__(
        self,
        models: Sequence[Collaborator],
        *,
        strength: float = 1.0,
        paper: bool = False,
        leader: str | None = None,
        factor: float = 2.0,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if not is_list(models) or not models:
            raise InputError(f"{self.name}: models={models!r}; give a list of Collaborator")
        for i, one in enumerate(models):
            if not isinstance(one, Collaborator):
                raise InputError(f"{self.name}: models[{i}]={one!r}; give Collaborator(...)")
        self.models = tuple(models)
        self.names = tuple(one.name for one in models)
        if len(set(self.names)) < len(self.names):
            raise InputError(f"{self.name}: models are named {self.names}; give each its own name")
        leader = self.names[0] if leader is None else leader
        if leader not in self.names:
            raise InputError(f"{self.name}: leader={leader!r}; give one of {', '.join(self.names)}")
        if paper and len(self.models) == 1:
            raise InputError(f"{self.name}: paper=True is of one model and the rest; give two")
        if factor != 2.0 and not paper:
            raise InputError(f"{self.name}: factor={factor!r} is of the schedule of paper=True")
        self.factor = number(factor, f"{self.name}: factor", above=0)
        self.strength, self.paper = share(strength, f"{self.name}: strength"), paper
        self.leader, self.start, self.stop = leader, start, stop
        self._models: dict[str, Model] = {one.name: model_of(one) for one in models}

    def neutral(self) -> bool | None:
        return self.strength == 0

    def active(self, clock: Clock) -> bool:
        # A pipeline beside this one keeps step with it from the first.
        start = 0.0 if any(model.keeps_step for model in self._models.values()) else self.start
        return self.strength > 0 and Window(start, self.stop).holds(clock)

    def attach(self, target: Any) -> None:
        if not hasattr(target, "scheduler"):
            raise UnsupportedError(
                f"{self.name}: mixes the predictions of a pipeline's steps, and a bare "
                f"{type(target).__name__} takes none; control its pipeline"
            )
        if self.paper and Noise(target.scheduler).flow:
            raise UnsupportedError(
                f"{self.name}: paper=True is a schedule over training timesteps, which "
                f"{type(target.scheduler).__name__} has not; leave it out"
            )
        for model in self._models.values():
            model.attach(target)

    def begin(self, state: State) -> None:
        self.influence, self._logits, self._parts = InfluenceMaps(self.names), None, {}
        if state.latents.dim() < 4:
            raise UnsupportedError(
                f"{self.name}: packed latents have no places; use a pipeline with a UNet"
            )
        self._end(over=False)  # of a run that was broken off
        if not self.strength or not self.stop:
            return
        for one in self.models:
            one.check_images(state)
            told = None if one.is_pipeline else self._models[one.name].condition_in(state)
            one.check_sizes(state, told)
        try:
            for model in self._models.values():
                model.begin(state)
        except BaseException:
            self._end(over=False)
            raise

    def denoise(self, state: State, proceed: Proceed) -> Any:
        acts = self.window().holds(state.clock)
        own = state.rows[: state.own_rows]
        if acts and any(row.branch == COND for row in own):
            self._logits = self._asked(state)
        for name, model in self._models.items():
            if acts or model.keeps_step:
                parts = self._parts.setdefault(name, {})
                parts |= model.ask(state)
        return proceed()

    def combine(self, predictions: Predictions) -> Tensor:
        parts, self._parts = self._parts, {}
        logits, self._logits = self._logits, None
        if logits is None or COND not in predictions.branches:
            return predictions.guided
        state, guided = predictions.state, predictions.guided
        shares = shares_of(logits)
        if self.paper:
            trained = state.pipe.scheduler.config.get("num_train_timesteps", 1000)
            passed = state.clock.timestep / trained
            shares = led(logits, self.names.index(self.leader), passed, self.factor)
        self.influence.note(state.clock.step, state.clock.timestep, shares)
        mixed: Tensor | None = None
        for m, (name, model) in enumerate(self._models.items()):
            predicted = model.guided(predictions, parts.get(name, {})).to(guided)
            part = shares[:, m : m + 1].to(guided) * predicted
            mixed = part if mixed is None else mixed + part
        assert mixed is not None  # there are models
        return mixed if self.strength == 1 else torch.lerp(guided, mixed, self.strength)

    def after(self, state: State) -> None:
        clock = state.clock
        if not self.active(replace(clock, step=clock.step + 1)):
            self._end(over=clock.step + 1 == clock.steps)

    def _end(self, over: bool) -> None:
        for model in self._models.values():
            model.end(over)

    # -- the dynamic diffusers -----------------------------------------------------------------

    def _asked(self, state: State) -> Tensor:
        """The logits of every model for the conditional rows of a call, [images, models, ...]."""
        rows = [row.index for row in state.rows[: state.own_rows] if row.branch == COND]
        channels = state.latents.shape[1]  # pipelines append images and masks
        x = state.kwargs[state.sample][rows[0] : rows[-1] + 1, :channels]
        maps = []
        for one in self.models:
            found = x.new_zeros(len(x), 1, *x.shape[2:])
            if one.influence is not None:
                condition = self._models[one.name].condition_in(state)
                found = self._map_of(one, x, state.clock.timestep, condition)
            maps.append(found if found.dtype in FLOATS else found.float())
        return torch.cat(maps, 1)

    def _map_of(
        self, one: Collaborator, x: Tensor, timestep: float, condition: Tensor | None
    ) -> Tensor:
        """a_m, [images, 1, ...]; InputError for another shape."""
        returned = one.ask_influence(x, timestep, condition)
        found, wanted = prediction_of(returned), (len(x), 1, *x.shape[2:])
        if found is None or tuple(found.shape) != wanted:
            given = type(returned).__name__ if found is None else tuple(found.shape)
            raise InputError(
                f"{self.name}: the influence of {one.name!r} returned {given} for latents "
                f"{tuple(x.shape)}; give a network that returns one logit for each place, {wanted}"
            )
        return found.to(x.device)

    def sheets(self, pictures: Sequence[Any]) -> dict[str, Any]:
        """Name -> a sheet of the influence maps of each image that was drawn, which `hookctl run`
        writes."""
        if not len(self.influence):
            return {}
        count = min(len(pictures), len(self.influence.maps[0]))
        return {f"influence-{i}": self.influence.sheet(pictures[i], i) for i in range(count)}
