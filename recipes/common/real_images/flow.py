"""What the recipes share that edit real images along the velocities of flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.outlines import Mask
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.arguments import for_each, images_and_prompts, refusal
from hookctl.editor import Editor, overrides
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.inversion import require_first_order
from hookctl.loop.noise import matches_flow, noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.encoded import encoded, takes_videos
from hookctl.recipes.common.real_images.inverted import call_arguments
from hookctl.session import Session

_ONE_PROMPT = "QwenImageEdit"  # whose prompts hold the image
_OF_STEPS = ("before", "branches", "denoise", "combine")


class FlowProgram:
    """Base of programs on real images; its errors come before any denoising.

    image, prompt: as of `Inversion`; steps: of the schedule; negative: prompt of the unconditional
    rows; arguments: further ones of the pipeline's call; generator: draws from the encoder's
    distribution, None takes its mean. clean: the images' latents, [images, ...]; size: (height,
    width) in px; taught: whether scales of guidance are ones that the model was taught (FLUX.1
    dev), else they are those of classifier-free guidance; session: of the last run.

    takes_editors: whether editors may act in it.

    Raises UnsupportedError for models other than those of flow matching.
    """

    takes_editors = True

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        steps: int,
        negative: str | None,
        arguments: Mapping[str, Any] | None,
        generator: torch.Generator | None = None,
    ) -> None:
        name = type(self).__name__
        self.pipe, self.steps, self.negative = pipe, steps, negative
        given = call_arguments(pipe, arguments, name)
        images, self.prompts = images_and_prompts(image, prompt, name, videos=takes_videos(pipe))
        found = encoded(pipe, images, name, generator)
        self.clean, self.size = found.latents, found.size
        self.arguments = {**found.extent, **given}
        self.taught = is_taught_scale(pipe)
        self.session: Session | None = None

    def _program(self, prompts: Sequence[str], scales: Sequence[float]) -> Trajectory:
        """A run that starts from latents of the images, to be asked with scales up to these.

        Raises UnsupportedError for a scheduler that is not of first order, and for several prompts
        of a pipeline that reads one at a time.
        """
        if len(prompts) > 1 and type(self.pipe).__name__.startswith(_ONE_PROMPT):
            raise UnsupportedError(
                f"{type(self).__name__}: {type(self.pipe).__name__} reads one prompt at a time, "
                f"and here {len(prompts)} are asked together; RFInversion and RFSolver of one "
                "image take one, and QwenImagePipeline takes several"
            )
        (height, width), highest = self.size, max(1.0, *scales)
        scale: dict[str, Any] = {"guidance": highest}
        if self.taught:
            scale = {"embedded": max(scales)}
        program = Trajectory(
            self.pipe,
            prompts,
            steps=self.steps,
            negative=self.negative,
            latents=torch.cat([self.clean] * (len(prompts) // len(self.clean))),
            height=height,
            width=width,
            **scale,
            **self.arguments,
        )
        require_first_order(program, type(self).__name__)
        sample = program.template.arguments[program.template.sample]
        if not program.template.grid and not isinstance(sample, list):
            raise UnsupportedError(
                f"{type(self).__name__}: {type(self.pipe).__name__} has latents of a form unknown "
                "here; use the family's text-to-image pipeline"
            )
        return program

    def _scales(self, scales: Sequence[float]) -> dict[str, Any]:
        """The scales of each image as `Trajectory.predict` and `denoise` take them."""
        if self.taught:
            return {"embedded": list(scales)}
        return {"guidance": list(scales) if max(scales) > 1 else 1.0}

    def _velocity(
        self,
        program: Trajectory,
        scales: Sequence[float],
        x: Tensor,
        i: int | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """The velocity of latents at a level, or a share of noise, in single precision at least."""
        x = x.to(program.latents)
        return wide(program.predict(x, i, sigma=sigma, **self._scales(scales)))

    def _noised(self, program: Trajectory, i: int, seed: int) -> Tensor:
        """The images at a level of a program, by the same noise for each."""
        image, level = wide(self.clean.to(program.latents)), program.levels[i].noise
        noise = noise_like(image[:1], torch.Generator().manual_seed(seed))
        return (1 - level) * image + level * noise


def length(program: Trajectory, i: int, j: int) -> float:
    """Of the step from level i to level j."""
    return program.levels[j].noise - program.levels[i].noise


def require_flow(pipe: Any, who: str) -> None:
    """Raise UnsupportedError unless the pipeline's model is one of flow matching."""
    scheduler = getattr(pipe, "scheduler", None)
    if not matches_flow(scheduler):
        raise UnsupportedError(
            f"{who} follows the velocities of a flow-matching model (SD3, FLUX, Qwen-Image, "
            f"Z-Image, Wan ...), which {type(pipe).__name__} with {type(scheduler).__name__} is "
            "not; for a diffusion model there is DirectInversion, with PromptToPrompt on it"
        )


def is_taught_scale(pipe: Any) -> bool:
    """Whether a pipeline's `guidance_scale` is one that its model was taught."""
    loop = families.loop_of(pipe)
    config = getattr(families.denoiser_of(pipe), "config", None)
    taught = loop is not None and loop.embedded is not None
    return taught and bool(getattr(config, "guidance_embeds", False))


def for_each_image(given: str | Sequence[str], prompts: Sequence[str], who: str) -> list[str]:
    """The source prompts of the images of these prompts: one for all, or one for each."""
    found = for_each(
        given, f"{who}: source_prompt", len(prompts), "images", is_one=isinstance(given, str)
    )
    if not all(isinstance(text, str) for text in found):
        raise refusal(f"{who}: source_prompt", given, "a text, or a list of texts")
    return found


def check_editors(editors: Sequence[Editor], program: FlowProgram) -> None:
    """Raise UnsupportedError for editors that can't act in a program of its own steps."""
    who = type(program).__name__
    if editors and not program.takes_editors:
        raise UnsupportedError(
            f"{who}: asks for two texts in turn as it is set, and {editors[0].name} follows one "
            "run; leave it out, or give inversion=True"
        )
    for editor in editors:
        check_without_steps(editor, who)


def check_without_steps(editor: Editor, who: str) -> None:
    """Raise UnsupportedError for an editor that works on the steps of a scheduler."""
    # Prompt-to-Prompt has use for them where it blends.
    ends = overrides(editor, "after") and getattr(editor, "local", True) is not None
    if ends or any(overrides(editor, hook) for hook in _OF_STEPS):
        raise UnsupportedError(
            f"{who} takes no steps of a scheduler, which {editor.name} works on; give editors that "
            "act inside the denoiser, such as PromptToPrompt without blend=, or use DirectInversion"
        )


def region_of_image(mask: RegionLike, size: tuple[int, int], name: str) -> Region:
    """A part of an image of (height, width) px; InputError for a mask of another shape than its."""
    region = region_of(mask, name)
    if isinstance(region.outline, Mask):
        rows, columns = region.outline.values.shape
        if rows * size[1] != columns * size[0]:
            raise InputError(
                f"{name}: a mask of {rows} x {columns} for an image of {size[0]} x {size[1]} px "
                "(height x width); give it the size of the image, or a fraction of that"
            )
    return region


def share_of_latents(region: Region, program: Trajectory) -> Tensor:
    """How much of each place lies inside, [1, ...] in the form of the program's latents."""
    grid = program.unpacked()[:1]
    covered = region.coverage(*grid.shape[-2:]).to(grid.device)
    return program.packed(covered.expand(grid.shape))


def wide(x: Tensor) -> Tensor:
    """In single precision at least: half has too few bits for the difference of two latents."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
