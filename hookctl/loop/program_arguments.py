"""The arguments of a pipeline's call for a program's run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.address.families.loops import Loop
from hookctl.arguments import number
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.packing import cells_of, unpacked

MOST = 1e38  # that pipelines can put into a tensor of single precision

# What a program gives the pipeline under other names.
_OWN = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "images",
    "num_videos_per_prompt": "images",
    "negative_prompt": "negative",
    "guidance_scale": "guidance (or embedded, where the model was taught one)",
    "true_cfg_scale": "guidance",
}


def call_arguments(
    pipe: Any,
    loop: Loop,
    texts: Sequence[str],
    given: Mapping[str, Any],
    *,
    steps: int,
    guidance: float,
    negative: str | Sequence[str] | None,
    embedded: float | None,
    images: int,
    generator: Any,
    latents: Tensor | None,
) -> dict[str, Any]:
    """Of a run of these texts; given: further arguments of the call, by name.

    Raises InputError for arguments that the pipeline does not take, and UnsupportedError for a
    guidance that the family has not.
    """
    name, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    check_names(pipe, given)
    guided = guidance > 1
    if guided and loop.scale is None:
        raise UnsupportedError(
            f"guidance={guidance}: {name} has no unconditional rows, its model was taught a scale; "
            "give embedded="
        )
    if embedded is not None and loop.embedded is None:
        raise UnsupportedError(
            f"embedded={embedded}: the model of {name} was taught no scale of guidance; give "
            "guidance="
        )
    arguments = dict(given)
    if guided and (negative is not None or loop.asks_negative):
        if "negative_prompt" not in known:
            raise InputError(f"negative={negative!r}: {name} takes none, it is always empty")
        said = "" if negative is None else negative
        arguments["negative_prompt"] = [said] * len(texts) if isinstance(said, str) else list(said)
    per_prompt = [n for n in known if n in ("num_images_per_prompt", "num_videos_per_prompt")]
    if images > 1 and not per_prompt:
        raise InputError(f"images={images}: {name} draws one for each prompt")
    arguments |= dict.fromkeys(per_prompt, images)
    if loop.scale is not None:
        arguments[loop.scale] = number(guidance, "Trajectory: guidance") - (1 - loop.unguided)
    if embedded is not None:
        arguments["guidance_scale"] = number(embedded, "Trajectory: embedded", low=-MOST, high=MOST)
    if latents is not None and latents.dim() == 3 and loop.takes == "unpacked":
        height, width = (int(arguments.get(side) or 0) for side in ("height", "width"))
        size = (height, width) if height and width else None
        latents = unpacked(pipe, latents, cells_of(pipe, latents.shape[1], size))
    return arguments | {
        "prompt": None if arguments.get("prompt_embeds") is not None else list(texts),
        "num_inference_steps": steps,
        "generator": generator,
        "latents": latents,
    }


def check_names(pipe: Any, given: Mapping[str, Any], who: str = "Trajectory") -> None:
    """Raises InputError for what the pipeline's call does not take, or what is given otherwise."""
    name, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    for key in given:
        if key in _OWN:
            raise InputError(f"{who}: {key}={given[key]!r}; give {_OWN[key]}= in its place")
        if key not in known:
            references = "image" in key or "reference" in key
            cure = (
                "it has no references; use an edit pipeline, such as FluxKontextPipeline, "
                "Flux2KleinPipeline or QwenImageEditPlusPipeline"
                if references
                else "leave it out"
            )
            raise InputError(f"{who}: {key}: {name} takes none; {cure}")
