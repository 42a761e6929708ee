"""The same run of a family twice: by its pipeline's own call, and as a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookctl.loop.trajectory import Trajectory
from tests import zoo
from tests.zoo.case import Asked
from tests.zoo.wild import WILD
from tests.zoo.wild.around import smaller
from tests.zoo.wild.parts import value

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
    prompts: tuple[str, ...] = ("a red cat", "a blue dog")
    more: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        return (WILD if self.name in WILD else zoo.PIPELINES)[self.name].make()

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, but for what a program says in its own words."""
        if self.name in WILD:
            given = {n: value(one) for n, one in WILD[self.name]._entry["call"].items()}
        else:
            given = zoo.PIPELINES[self.name].inputs(Asked([], [], 1.0, 1))
        return {n: one for n, one in given.items() if n not in _SAID} | self.more

    def drawn(
        self,
        pipe: Any,
        guidance: float,
        steps: int = 3,
        output_type: str = "latent",
        prompts: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        """By the pipeline itself."""
        prompts = list(prompts or self.prompts)  # Z-Image writes into its list
        given: dict[str, Any] = {}
        if self.scale is not None:
            given[self.scale] = guidance - 1 + self.unguided
        if guidance > 1 and self.takes_negative:
            given["negative_prompt"] = ["blurry"] * len(prompts)
        if self.embedded:
            given["guidance_scale"] = 2.5
        with smaller(type(pipe)):
            found = pipe(
                prompt=prompts,
                num_inference_steps=steps,
                generator=generators(len(prompts)),
                output_type=output_type,
                return_dict=False,
                **given,
                **self.arguments() | more,
            )[0]
        return found

    def program(
        self,
        pipe: Any,
        guidance: float,
        steps: int = 3,
        prompts: Sequence[str] | None = None,
        **more: Any,
    ) -> Trajectory:
        prompts = list(prompts or self.prompts)
        if guidance > 1 and self.takes_negative:
            more.setdefault("negative", "blurry")
        if self.embedded:
            more.setdefault("embedded", 2.5)
        more.setdefault("generator", generators(len(prompts)))
        with smaller(type(pipe)):
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
    Family("BriaPipeline", more={"height": 64, "width": 32}),
    Family(
        "HunyuanVideoPipeline",
        "true_cfg_scale",
        embedded=True,
        # Of which something is left of an empty text.
        more={"prompt_template": {"template": "say {}", "crop_start": 0}},
    ),
    Family("FluxKontextPipeline", "true_cfg_scale"),
    Family("QwenImageEditPipeline", "true_cfg_scale", prompts=("a red cat",)),
    Family("QwenImageEditPlusPipeline", "true_cfg_scale", prompts=("a red cat",)),
    Family(
        "Flux2Pipeline",
        None,
        embedded=True,
        takes_negative=False,
        more={"max_sequence_length": 512},  # behind its template
    ),
]
FAMILIES = [one for one in _EVERY if one.name in WILD or one.name in zoo.PIPELINES]


BY_NAME = {one.name: one for one in FAMILIES}
