"""The same run of a family twice: by its pipeline's own call, and as a program."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hookctl.loop.trajectory import Trajectory
from tests import zoo
from tests.zoo.case import Asked
from tests.zoo.wild import WILD
from tests.zoo.wild.parts import value

TEXTS = ["a red cat", "a blue dog"]
# What a program says in other words than the pipeline's call.
_SAID = (
    "prompt",
    "negative_prompt",
    "guidance_scale",
    "true_cfg_scale",
    "num_inference_steps",
    "output_type",
)


@dataclass(frozen=True)
class Family:
    """A tiny pipeline; scale: what its call names the scale; unguided: that scale without guidance;
    embedded: whether its model was taught a scale of its own."""

    name: str
    scale: str | None = "guidance_scale"
    unguided: float = 1.0
    embedded: bool = False
    takes_negative: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        return (WILD if self.name in WILD else zoo.PIPELINES)[self.name].make()

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, but for what a program says in its own words."""
        if self.name in WILD:
            given = {n: value(one) for n, one in WILD[self.name]._entry["call"].items()}
        else:
            given = zoo.PIPELINES[self.name].inputs(Asked(TEXTS, TEXTS, 1.0, 1))
        return {n: one for n, one in given.items() if n not in _SAID} | self.more

    def drawn(
        self,
        pipe: Any,
        guidance: float,
        steps: int = 3,
        output_type: str = "latent",
        prompts: list[str] = TEXTS,
        **more: Any,
    ) -> Any:
        """By the pipeline itself."""
        given: dict[str, Any] = {}
        if self.scale is not None:
            given[self.scale] = guidance - 1 + self.unguided
        if guidance > 1 and self.takes_negative:
            given["negative_prompt"] = ["blurry"] * len(prompts)
        if self.embedded:
            given["guidance_scale"] = 2.5
        return pipe(
            prompt=list(prompts),  # into which Z-Image writes
            num_inference_steps=steps,
            generator=generators(len(prompts)),
            output_type=output_type,
            return_dict=False,
            **given,
            **self.arguments() | more,
        )[0]

    def program(
        self,
        pipe: Any,
        guidance: float,
        steps: int = 3,
        prompts: list[str] = TEXTS,
        **more: Any,
    ) -> Trajectory:
        if guidance > 1 and self.takes_negative:
            more.setdefault("negative", "blurry")
        if self.embedded:
            more.setdefault("embedded", 2.5)
        more.setdefault("generator", generators(len(prompts)))
        return Trajectory(
            pipe, prompts, steps=steps, guidance=guidance, **self.arguments() | more
        )

    @property
    def guides(self) -> bool:
        return self.scale is not None


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


_EVERY = [
    Family("sd15"),
    Family("sdxl", more={"height": 128, "width": 128}),
    Family("sd3"),
    Family("pixart"),
    Family("flux", "true_cfg_scale", embedded=True),
    Family("flux2_klein", takes_negative=False),
    Family("qwen_image", "true_cfg_scale"),
    Family("z_image", unguided=0.0),
    Family("wan"),
    Family("WanPipeline of two denoisers", more={"guidance_scale_2": 2.0}),
    Family("LTXPipeline"),
    Family("HunyuanVideoPipeline", "true_cfg_scale", embedded=True),
    Family("FluxKontextPipeline", "true_cfg_scale"),
]
FAMILIES = [one for one in _EVERY if one.name in WILD or one.name in zoo.PIPELINES]


def size_of(latents: Tensor) -> tuple[int, ...]:
    return tuple(latents.shape)


def takes(pipe: Any, name: str) -> bool:
    return name in inspect.signature(type(pipe).__call__).parameters
