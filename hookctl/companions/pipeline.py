"""Another pipeline beside the one that is controlled, driven through its own call.

What makes a pipeline a model of its own is more than its denoiser: boxes and when they act
(GLIGEN), a control image that another network reads anew at every step (ControlNet), guidance and
the meaning of a prediction (v-prediction). So its own call runs beside the first pipeline's
(`call_beside`): every step it predicts for the latents that the first one came to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of
from hookctl.companions.call_beside import CallBeside, Predicted
from hookctl.companions.denoiser import condition_of
from hookctl.companions.prediction import ModelPrediction
from hookctl.errors import InputError
from hookctl.loop.noise import Level, Noise, level_of
from hookctl.loop.state import State
from hookctl.run_state import RunState

# The mixture's own affair.
RESERVED = ("prompt", "latents", "num_inference_steps", "generator", "output_type", "return_dict")
SAME = 1e-3  # levels of two schedulers that are one


class CompanionPipeline:
    """A pipeline of the same latent space and noise schedule as the one that is controlled.

    arguments: of its own call, such as gligen_boxes or image. Prompts, negative prompts, number of
    images and steps, scale of the guidance and size are the controlled pipeline's, unless they are
    given. label, arguments_label: what errors call it and them; instead: what else may be given;
    reserved: arguments that the mixture sets itself.
    """

    _run: RunState[CallBeside | None] = RunState(None)
    _first: RunState[State | None] = RunState(None)
    _now: RunState[tuple[int, Predicted] | None] = RunState(None)

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any] | None = None,
        *,
        label: str = "companion",
        arguments_label: str = "arguments",
        instead: str = "",
        reserved: Sequence[str] = RESERVED,
    ) -> None:
        self.pipe, self.arguments = pipe, dict(arguments or {})
        self.label, self.instead = label, instead
        denoiser_of(pipe)  # or there is none
        self._known = inspect.signature(type(pipe).__call__).parameters
        for name in self.arguments:
            if name in reserved or name not in self._known:
                reason = "set by the mixture" if name in reserved else "none of its call's"
                raise InputError(
                    f"{arguments_label}: {name!r} is {reason}; give arguments of "
                    f"{type(pipe).__name__}'s call other than {', '.join(reserved)}"
                )

    def attach(self, target: Any) -> None:
        """Check the pipeline that is controlled."""
        if self.pipe is target:
            raise InputError(
                f"{self.label} is the controlled pipeline itself; give another one{self.instead}"
            )
        if Noise(self.pipe.scheduler).flow != Noise(target.scheduler).flow:
            raise InputError(
                f"{self.label}: {type(self.pipe).__name__} and {type(target).__name__} do not "
                "share a noise schedule (flow matching or not); give pipelines of one kind"
            )

    def begin(self, state: State) -> None:
        """Start the pipeline, and stop it before its first denoiser call.

        Raises what its call raises, and InputError for other timesteps or levels.
        """
        self.close()
        self._run, self._now = CallBeside(self.pipe, self.call(state), self.label), None
        try:
            first = self._first = self._run.first()
            ours, theirs = level_of(state), level_of(first)
            if first.clock.timestep != state.clock.timestep or not _same(ours, theirs):
                raise InputError(
                    f"{self.label}: {type(self.pipe).__name__} starts at timestep "
                    f"{first.clock.timestep:g} and the controlled pipeline at "
                    f"{state.clock.timestep:g}; give both one scheduler, such as pipe.scheduler = "
                    "type(other.scheduler).from_config(other.scheduler.config)"
                )
            if first.latents.shape != state.latents.shape:
                raise InputError(
                    f"{self.label}: {type(self.pipe).__name__} draws latents "
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

    def text(self) -> Tensor | None:
        """The text that its conditional rows see, [images, tokens, channels]; None if none."""
        assert self._first is not None  # since `begin`
        return condition_of(self._first)

    def finish(self) -> None:
        """The last step is over: let the pipeline end."""
        run, self._run, self._now, self._first = self._run, None, None, None
        if run is not None:
            run.finish()

    def close(self) -> None:
        """Stop a run that nobody goes on with."""
        run, self._run, self._now, self._first = self._run, None, None, None
        if run is not None:
            run.stop()

    def call(self, state: State) -> dict[str, Any]:
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
            "prompt": list(state.prompts),
            **self.arguments,
            "latents": x / sigma,  # the pipeline multiplies by it
            "num_inference_steps": state.pipe.scheduler.num_inference_steps,
            "generator": torch.Generator().manual_seed(0),  # so that it draws from no other
            "output_type": "latent",
            "return_dict": False,
        }
        if "prompt_embeds" in self.arguments:
            del given["prompt"]
        known = {n: v for n, v in given.items() if n in self._known and v is not None}
        return known | self.arguments


def _same(one: Level, other: Level) -> bool:
    return abs(one.signal - other.signal) < SAME and abs(one.noise - other.noise) < SAME * (
        1 + other.noise
    )
