"""Real images made editable: what the inversion recipes share.

An `Inversion` of an image gives an `Inverted`, which draws the image again and its edits beside it:

    inverted = DirectInversion(pipe, image, "a red circle above a blue square").run()
    edit = PromptToPrompt([inverted.prompt, "a green circle above a blue square"])
    image_again, edited = inverted.edit(pipe, edit)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.arguments import checked, images_and_prompts, whole
from hookctl.loop.inversion import Correction, Progress
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.encoded import encoded, takes_videos
from hookctl.recipes.common.real_images.inverted import Inverted, call_arguments, image_of


class Inversion(ABC):
    """Base of the inversion recipes: images, their prompts and a pipeline.

    image: PIL, mode RGB, with sides in px that the pipeline can draw, for pipelines of videos also
    a list of frames; prompt: that describes it. Or a list of each, of images of one size, which are
    inverted in one batch. steps: of the sampling to come; guidance: scale for the source's rows in
    it; embedded: likewise the scale that a model was taught (`Trajectory`), in the inversion too.
    arguments: further ones of the pipeline's call, in the inversion and in what is drawn
    (clip_skip, ip_adapter_image ...).

    Raises InputError for images of several sizes or in another mode, for another number of prompts
    than of images, and for steps below 1.
    """

    edit_guidance = 7.5

    @checked(own=("arguments",))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        guidance: float = 7.5,
        embedded: float | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        images, self.prompts = images_and_prompts(image, prompt, name, videos=takes_videos(pipe))
        self.single = isinstance(prompt, str)
        self.pipe, self.guidance, self.embedded = pipe, float(guidance), embedded
        self.steps = whole(steps, f"{name}: steps", 1)
        further = call_arguments(pipe, arguments, name)
        found = encoded(pipe, images, name)
        self.clean, self.size = found.latents, found.size
        self.arguments = {**found.extent} | further

    def run(self, progress: Progress | None = None) -> Any:
        """Invert: an `Inverted`, or a list of them where several images were given.

        progress: called with (steps done, steps in all) as the work goes on.
        """
        batch = self._invert(self._program(), progress)
        images = [image_of(batch, i, prompt) for i, prompt in enumerate(self.prompts)]
        return images[0] if self.single else images

    def _program(self) -> Trajectory:
        height, width = self.size
        return Trajectory(
            self.pipe,
            self.prompts,
            steps=self.steps,
            guidance=self.guidance,
            embedded=self.embedded,
            latents=self.clean,
            height=height,
            width=width,
            **self.arguments,
        )

    @abstractmethod
    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        """All images in one batch: every tensor has an entry for each."""

    def _inverted(
        self,
        program: Trajectory,
        path: Sequence[Tensor],
        corrections: Sequence[Correction] | None = None,
        **fields: Any,
    ) -> Inverted:
        """The result of `_invert`; fields: of `Inverted`, where they are not the recipe's own."""
        none = [Correction()] * program.steps
        return Inverted(
            prompt="",
            path=tuple(path),
            corrections=tuple(none if corrections is None else corrections),
            **{
                "guidance": self.guidance,
                "embedded": self.embedded,
                "edit_guidance": self.edit_guidance,
                "size": self.size,
                "arguments": self.arguments,
                "timesteps": tuple(program.noise.timesteps),
                **fields,
            },
        )
