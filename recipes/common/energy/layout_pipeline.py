"""Another pipeline as the layout model of a mixture, driven through its own call.

What makes a pipeline a layout model is more than its denoiser: boxes and when they act (GLIGEN), a
control image that another network reads anew at every step (ControlNet), guidance and the meaning
of a prediction (v-prediction). So its own call runs beside the first pipeline's, step by step in a
thread of its own: at the end of each step it hands over what it predicted and waits, and it is
given the latents that the mixture came to as the result of its step.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.outlines import Box
from hookctl.address.regions import Region
from hookctl.address.rows import COND
from hookctl.errors import InputError
from hookctl.hooks.patch import Patch
from hookctl.loop.energy import Energies, MapReader
from hookctl.loop.noise import Level, Noise
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.energy.energy_guidance import level_of
from hookctl.recipes.common.energy.mixture import ModelPrediction
from hookctl.recipes.common.energy.word_energy import WordEnergy
from hookctl.session import control

# The mixture's own affair.
RESERVED = ("prompt", "latents", "num_inference_steps", "generator", "output_type", "return_dict")
SAME = 1e-3  # levels of two schedulers that are one


class LayoutPipeline:
    """A pipeline of the same latent space and noise schedule as the one that is controlled.

    arguments: of its own call, such as gligen_boxes or image. Prompts, negative prompts, number of
    images and steps, scale of the guidance and size are the controlled pipeline's, unless they are
    given.
    For a GLIGEN pipeline without gligen_boxes the words and the regions' boxes are taken, in all
    steps.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.pipe, self.arguments = pipe, dict(arguments or {})
        self.denoiser = uncompiled(denoiser_of(pipe))
        self._known = inspect.signature(type(pipe).__call__).parameters
        for name in self.arguments:
            if name in RESERVED or name not in self._known:
                reason = "set by the mixture" if name in RESERVED else "none of its call's"
                raise InputError(
                    f"RealCompo: layout_arguments: {name!r} is {reason}; give arguments of "
                    f"{type(pipe).__name__}'s call other than {', '.join(RESERVED)}"
                )
        self._run: _Run | None = None
        self._now: tuple[int, _Predicted] | None = None

    def attach(self, target: Any, reader: WordEnergy) -> None:
        """Check the pipeline; reader: the editor of the stack, which reads maps for the model."""
        if self.denoiser is uncompiled(denoiser_of(target)):
            raise InputError(
                "layout is a pipeline over the controlled pipeline's own denoiser; give it a copy "
                "(copy.deepcopy), or give a LayoutGuidance"
            )
        if Noise(self.pipe.scheduler).flow != Noise(target.scheduler).flow:
            raise InputError(
                f"layout: {type(self.pipe).__name__} and {type(target).__name__} do not share a "
                "noise schedule (flow matching or not); give pipelines of one kind"
            )
        self._reader = reader

    def begin(self, state: State) -> None:
        """Start the pipeline, and stop it before its first denoiser call.

        Raises what its call raises, and InputError for other timesteps or levels.
        """
        self.close()
        self._run, self._now = _Run(self.pipe, self._call(state)), None
        try:
            first = self._run.first()
            ours, theirs = level_of(state), level_of(first)
            if first.clock.timestep != state.clock.timestep or not _same(ours, theirs):
                raise InputError(
                    f"layout: {type(self.pipe).__name__} starts at timestep "
                    f"{first.clock.timestep:g} and the controlled pipeline at "
                    f"{state.clock.timestep:g}; give both one scheduler, such as pipe.scheduler = "
                    "type(other.scheduler).from_config(other.scheduler.config)"
                )
            if first.latents.shape != state.latents.shape:
                raise InputError(
                    f"layout: {type(self.pipe).__name__} draws latents "
                    f"{tuple(first.latents.shape)} and the controlled pipeline "
                    f"{tuple(state.latents.shape)}; give pipelines of one latent space"
                )
        except BaseException:
            self.close()
            raise

    def step(self, state: State) -> None:
        """Let the pipeline predict for the latents of a step; once, however many calls it has."""
        if self._now is None or self._now[0] != state.clock.step:
            assert self._run is not None  # since `begin`
            self._now = state.clock.step, self._run.predict(state.latents)

    def prediction(self, state: State) -> ModelPrediction:
        """What it predicted in this step, as the controlled pipeline's scheduler means it."""
        assert self._now is not None  # since `step`
        found, x = self._now[1], state.latents
        of = x if torch.equal(found.latents.to(x), x) else found.latents.to(x)
        theirs, ours = Noise(self.pipe.scheduler), Noise(state.pipe.scheduler)
        level = level_of(state)

        def meant(prediction: Tensor) -> Tensor:
            prediction = prediction.to(x)
            if theirs.kind == ours.kind:
                return prediction
            return ours.join(*theirs.split(of, prediction, level), level)

        return ModelPrediction(meant(found.cond), meant(found.guided), of)

    def energies(self, state: State, measure: Callable[[State], Energies]) -> Energies:
        """`measure` of this model's maps in the step."""
        assert self._run is not None and self._now is not None  # since `step`
        run, there = self._run, self._now[1].state
        self._reader.reader = run.tap
        try:
            found: Energies = run.do(lambda: measure(there))
        finally:
            self._reader.reader = None
        return found

    def finish(self) -> None:
        """The last step is over: let the pipeline end."""
        run, self._run, self._now = self._run, None, None
        if run is not None:
            run.finish()

    def close(self) -> None:
        """Stop a run that nobody goes on with."""
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def __del__(self) -> None:
        if getattr(self, "_run", None) is not None:
            self.close()

    def _call(self, state: State) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        x, factor = state.latents, int(getattr(self.pipe, "vae_scale_factor", 8))
        encoding = {k: v for k, v in state.encoding.items() if "embeds" not in k and k != "device"}
        sigma = float(getattr(state.pipe.scheduler, "init_noise_sigma", 1.0))
        given = {
            **{k: v for k, v in encoding.items() if k != "prompt" and v is not None},
            "height": x.shape[-2] * factor,
            "width": x.shape[-1] * factor,
            "num_images_per_prompt": state.images_per_prompt,
            "guidance_scale": getattr(state.pipe, "guidance_scale", None),
            **self._boxes(),
            **self.arguments,
            "prompt": list(state.prompts),
            "latents": x / sigma,  # the pipeline multiplies by it
            "num_inference_steps": state.pipe.scheduler.num_inference_steps,
            "generator": torch.Generator().manual_seed(0),  # so that it draws from no other
            "output_type": "latent",
            "return_dict": False,
        }
        known = {n: v for n, v in given.items() if n in self._known and v is not None}
        return known | self.arguments

    def _boxes(self) -> dict[str, Any]:
        """For a GLIGEN pipeline: words and boxes of the mixture."""
        wants = "gligen_boxes" in self._known and "gligen_boxes" not in self.arguments
        words, regions = self._reader.words, self._reader.regions
        if not wants or regions is None:
            return {}
        if not (words.shared and regions.shared) and max(len(words), len(regions)) > 1:
            raise InputError(
                f"layout: {type(self.pipe).__name__} takes one list of boxes for all prompts; give "
                "words and regions for all prompts, or one prompt"
            )
        return {
            "gligen_phrases": list(words[0]),
            "gligen_boxes": [_box(region) for region in regions[0]],
            "gligen_scheduled_sampling_beta": 1.0,
        }


@dataclass(frozen=True, eq=False)
class _Predicted:
    """What a pipeline predicted in a step, in its own parametrisation."""

    state: State
    latents: Tensor
    cond: Tensor
    guided: Tensor


class _Stop(BaseException):
    """The run is given up; no handler of ordinary errors may stop it."""


class _Run:
    """One call of a pipeline, in a thread that works only while another waits for it."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self._pipe, self._arguments, self.tap = pipe, arguments, _Tap(self)
        self.wanted: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.found: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        device = next(denoiser_of(pipe).parameters()).device.type
        self._autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        context = copy_context()
        self.thread = threading.Thread(
            target=context.run, args=(self._work,), name="layout model", daemon=True
        )
        self.thread.start()

    def _work(self) -> None:
        quiet = Patch(self._pipe, "_progress_bar_config", {"disable": True})
        try:
            with self._autocast, control(self._pipe, self.tap, strict=False):
                self._pipe(**self._arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.found.put(("error", error))
        else:
            self.found.put(("over", None))
        finally:
            quiet.remove()

    # -- for the one who waits -----------------------------------------------------------------

    def first(self) -> State:
        """The state of the first denoiser call, before it is made."""
        state: State = self._answer("ready")
        return state

    def predict(self, latents: Tensor) -> _Predicted:
        """What the pipeline predicts for the latents of its next step."""
        self.wanted.put(("latents", latents))
        predicted: _Predicted = self._answer("predicted")
        return predicted

    def do(self, job: Callable[[], Any]) -> Any:
        """What a function returns that is called inside the pipeline's step."""
        self.wanted.put(("job", job))
        return self._answer("done")

    def finish(self) -> None:
        self.wanted.put(("finish", None))
        self._answer("over")

    def stop(self) -> None:
        self.wanted.put(("stop", None))
        if self.thread is not threading.current_thread():
            self.thread.join(timeout=60)

    def _answer(self, expected: str) -> Any:
        try:
            kind, value = self.found.get()
        except BaseException:  # interrupted
            self.stop()
            raise
        if kind == "error":
            raise value
        if kind != expected:
            raise InputError(
                f"layout: {type(self._pipe).__name__} takes another number of steps than the "
                "controlled pipeline; give both one scheduler"
            )
        return value


class _Tap(MapReader):
    """The last editor of the pipeline: hands over its predictions, and puts latents in."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._begun = False
        self._next: Tensor | None = None

    @property
    def _mine(self) -> bool:
        """Whether this is the run's own call, and not somebody else's of the same pipeline."""
        return threading.current_thread() is self._run.thread

    def before(self, state: State) -> None:
        if self._mine and not self._begun:
            self._begun = True
            self._run.found.put(("ready", state))
            x = self._wait()
            if x is not None and not torch.equal(x.to(state.latents), state.latents):
                state.latents = x.to(state.latents)

    def combine(self, predictions: Predictions) -> Tensor:
        if self._mine:
            state, guided = predictions.state, predictions.guided
            found = _Predicted(state, state.latents, predictions[COND], guided)
            self._run.found.put(("predicted", found))
            self._next = self._wait()
        return predictions.guided

    def after(self, state: State) -> None:
        if self._mine and self._next is not None:
            state.latents = self._next.to(state.latents)

    def _wait(self) -> Tensor | None:
        """Do what is asked for until there are latents for the next step; None for the end."""
        while True:
            kind, value = self._run.wanted.get()
            if kind == "stop":
                raise _Stop
            if kind != "job":
                latents: Tensor | None = value
                return latents
            try:
                self._run.found.put(("done", value()))
            except Exception as error:
                self._run.found.put(("error", error))


def _same(one: Level, other: Level) -> bool:
    return abs(one.signal - other.signal) < SAME and abs(one.noise - other.noise) < SAME * (
        1 + other.noise
    )


def _box(region: Region) -> list[float]:
    """The bounding box of a region, (x0, y0, x1, y1) as fractions of the canvas."""
    if isinstance(region.outline, Box):
        box = region.outline
        return [box.x0, box.y0, box.x1, box.y1]
    side = 64
    rows, columns = region.tokens(side, side).reshape(side, side).nonzero().unbind(1)
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [float(end) / side for end in ends]
